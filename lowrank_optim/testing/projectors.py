"""What a projector promises."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.projectors import Basis, Projector, StepParams, SubspaceSpec
from lowrank_optim.projectors.base import Refresh
from lowrank_optim.testing.problem import MATRICES, Run, difference, numbers
from lowrank_optim.testing.promises import (
    CLOSE,
    break_promise,
    check_object,
    check_refused,
    check_same,
    check_shared,
    promised,
)

KEYS = (11, 12, 13)


def check_projector(projector: Projector) -> None:
    """Try a projector of your own: bases, zero gradients, declared capabilities, few bits, resume, backward, sharding, names.

    Takes two or three seconds. Writes nothing, and starts no process.

    Args:
        projector: with the fields to be tried.

    Raises:
        AssertionError: the first promise that the projector breaks; the message says what came and what is needed.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> from dataclasses import dataclass
        >>> from lowrank_optim.testing import check_projector
        >>> @dataclass(frozen=True)
        ... class FirstVectors(lo.Projector):
        ...     name = "first_vectors"
        ...     needs_gradient = False
        ...     sees_all = False
        ...     def init(self, space, key, device):
        ...         return {}
        ...     def refresh(self, request):
        ...         return {}
        ...     def basis(self, space, state, key, device):
        ...         unit = torch.eye(space.basis_rows, space.rank, dtype=space.dtype, device=device)
        ...         return lo.DenseBasis(unit.expand(*space.batch, -1, -1), space.side, sharding=space.sharding)
        >>> check_projector(FirstVectors())
    """
    check_object(projector)
    for subspace in _subspaces(projector):
        _check_refresh(subspace)
        _check_basis(subspace)
        _check_capabilities(subspace)
    if projector.moments_change_shape:
        _check_sizes(projector)
    else:
        _check_sides(projector)
    variants: list[dict[str, Any]] = []
    if not projector.moments_change_shape:
        variants += [{"on_refresh": "reset"}, {"on_refresh": "rotate"}]
    if projector.narrows:
        variants += [{"on_refresh": "rotate"}]
    if _can_be_full(projector):
        variants += [{"proj_type": "full"}]
    if projector.stores_basis:
        variants += [{"basis_bits": 8, "overlap_threshold": 0.5}, {"basis_bits": 4}]
    check_shared(projector, *variants, bits=(8,))


@dataclass(frozen=True)
class Subspace:
    """A low-rank problem, its gradient, and the projector's tensors before and after the first refresh."""

    projector: Projector
    space: SubspaceSpec
    grad: Tensor
    begun: Mapping[str, Tensor]
    state: Mapping[str, Tensor]

    def basis(self, state: Mapping[str, Tensor], key: int) -> Basis:
        """The subspace of a state."""
        with promised(self.projector, f"basis makes the subspace of {self.told}"):
            return self.projector.basis(self.space, state, key, torch.device("cpu"))

    @property
    def told(self) -> str:
        """For messages."""
        return f"a {'×'.join(map(str, self.space.shape))} matrix, side {self.space.side!r}"

    def refresh(
        self, grad: Tensor, state: Mapping[str, Tensor], key: int, first: bool = True
    ) -> dict[str, Tensor] | None:
        """New tensors; the momentum is zero."""
        momentum = None
        if self.projector.uses_momentum and not first:
            momentum = numbers(self.projector.reduced_shape(self.space, state), 5)
        with promised(self.projector, f"refresh takes the gradient of {self.told}"):
            weight = numbers(self.space.shape, 9) if self.projector.uses_weights else None
            return self.projector.refresh(Refresh(grad, self.space, state, key, first, momentum, weight))


def _can_be_full(projector: Projector) -> bool:
    return "full" in projector.sides and not projector.moments_change_shape


def _subspaces(projector: Projector) -> Iterator[Subspace]:
    """One for every shape and side."""
    for proj_type in ("std", "full") if _can_be_full(projector) else ("std",):
        with promised(projector, "an optimizer can be built with the projector"):
            run = Run(projector, {"proj_type": proj_type})
        for name, shape in MATRICES.items():
            space = run.optimizer.plan_of(run.params[name]).space
            assert space is not None
            with promised(projector, f"init makes the state for a matrix {shape}"):
                begun = projector.init(space, KEYS[0], torch.device("cpu"))
            made = Subspace(projector, space, numbers(shape, 1), begun, begun)
            state = made.refresh(made.grad, begun, KEYS[1])
            if state is None:
                break_promise(
                    projector, "refresh makes a basis of a finite gradient that is not 0", "None", "its tensors"
                )
            yield Subspace(projector, space, numbers(shape, 1), begun, state)


def _check_refresh(made: Subspace) -> None:
    """Refreshes are functions of their arguments, of the shapes of `init`, and make no basis of a gradient without any."""
    projector, shapes = made.projector, {n: (t.shape, t.dtype) for n, t in made.begun.items()}
    came = {name: (tensor.shape, tensor.dtype) for name, tensor in made.state.items()}
    if projector.narrows:  # tensors of another length
        shapes, came = ({n: (torch.Size([len(s)]), t) for n, (s, t) in told.items()} for told in (shapes, came))
    if came != shapes:
        break_promise(projector, "refresh returns the tensors that init made", f"{came}", f"{shapes}")
    kept, grad = {name: tensor.clone() for name, tensor in made.state.items()}, made.grad.clone()
    first, again = (made.refresh(grad, made.state, KEYS[2], first=False) for _ in range(2))
    if not torch.equal(grad, made.grad) or difference(made.state, kept):
        break_promise(projector, "refresh changes none of its arguments", "a changed gradient or state", "new tensors")
    promise, remedy = "refresh gives the same for the same arguments", "random numbers from key"
    if first is None or again is None:
        break_promise(projector, promise, "None", remedy)
    check_same(projector, promise, again, first, remedy)
    usual, now = projector.reduced_shape(made.space), projector.reduced_shape(made.space, first)
    if now != usual and not projector.moments_change_shape:
        break_promise(
            projector,
            "moments_change_shape = False: R keeps its shape",
            f"{now} after {usual}",
            "moments_change_shape = True",
        )
    for told, bad in (
        ("a zero gradient", torch.zeros_like(grad)),
        ("a gradient of NaN", torch.full_like(grad, torch.nan)),
    ):
        if projector.needs_gradient:
            _check_refuses(made, told, bad)
        elif (new := made.refresh(bad, made.state, KEYS[2], first=False)) is None or difference(new, first):
            break_promise(
                projector,
                f"needs_gradient = False: {told} gives the same basis",
                f"{new}",
                "needs_gradient = True; False is for projectors that do not look at the gradient, no StoredProjector",
            )


def _check_refuses(made: Subspace, told: str, bad: Tensor) -> None:
    """A gradient without a subspace gives None; projectors that use the momentum may find a basis in that, or keep theirs."""
    projector = made.projector
    remedy = "None: see lowrank_optim.usable; or needs_gradient = False, if the basis never depends on the gradient"
    for first, state in ((True, made.begun), (False, made.state)):
        new = made.refresh(bad, state, KEYS[2], first)
        if new is None:
            continue
        core = numbers(projector.reduced_shape(made.space, new), 6)
        basis = made.basis(new, KEYS[2])
        valid = _far(basis.project(lift(basis, core, made.grad)), core) is None
        if first or not projector.uses_momentum or not valid:
            break_promise(projector, f"{told} does not become a basis", "tensors", remedy)


def lift(basis: Basis, core: Tensor, grad: Tensor) -> Tensor:
    """The matrix whose coordinates are `core`."""
    weight = torch.zeros_like(grad)
    basis.apply_(weight, core, StepParams(-1.0, 1.0))
    return weight


def _far(got: Tensor, needed: Tensor) -> str | None:
    return difference({"it": got}, {"it": needed}, 10 * CLOSE)


def _check_near(projector: Projector, promise: str, got: Tensor, needed: Tensor, remedy: str) -> None:
    check_same(projector, promise, {"it": got}, {"it": needed}, remedy, 10 * CLOSE)


def _check_basis(made: Subspace) -> None:
    """The numbers of a basis belong together."""
    projector, space, grad = made.projector, made.space, made.grad
    for told, state, key in (("before the first gradient", made.begun, KEYS[0]), ("after it", made.state, KEYS[1])):
        basis = made.basis(state, key)
        with promised(projector, f"a basis projects {made.told}, {told}"):
            reduced, shape = basis.project(grad), projector.reduced_shape(space, state)
        if tuple(reduced.shape) != shape or reduced.dtype != space.dtype:
            came = f"{reduced.dtype} {tuple(reduced.shape)}"
            break_promise(projector, "R has the shape that reduced_shape says", came, f"{space.dtype} {shape}")
        if not bool(torch.isfinite(reduced).all()):
            break_promise(projector, f"{told}, the state is a valid basis", "R is not finite", "numbers")
        if projector.orthonormal:
            core = numbers(shape, 6)
            if found := _far(basis.project(lift(basis, core, grad)), core):
                break_promise(
                    projector,
                    f"orthonormal = True: PᵀP is the identity ({made.told}, {told})",
                    f"project(lift(C)) is not C, {found}",
                    "orthonormal basis vectors (torch.linalg.qr), or orthonormal = False",
                )
        inside = grad.clone()
        with promised(projector, "lift_ makes the matrix in the subspace whose projection is R"):
            basis.lift_(inside, reduced)
            promise, remedy = "the projection of lift_(R) is R", "the pseudo-inverse of the basis"
            _check_near(projector, promise, basis.project(inside), reduced, remedy)
    again = made.basis(made.state, KEYS[1]).project(grad)
    if not torch.equal(again, made.basis(made.state, KEYS[1]).project(grad)):
        break_promise(projector, "basis gives the same for the same arguments", "another R", "random numbers from key")


def _check_capabilities(made: Subspace) -> None:
    """What the class says of itself is true."""
    projector, grad, state = made.projector, made.grad, made.state
    basis = made.basis(state, KEYS[1])
    reduced = basis.project(grad)
    if projector.has_channels and made.space.side != "full":
        with promised(projector, "has_channels = True: rows of R have norms"):
            same, squares = basis.project_with_norms(grad)
            lifted_squares = basis.lifted_squares(reduced)
        needed = grad.square().sum(-1 if made.space.side == "right" else -2).unsqueeze(-1)
        for name, came, right in (
            ("R", same, reduced),
            ("‖g_j‖²", squares, needed),
            ("Σ‖P r_j‖²", lifted_squares.sum(), lift(basis, reduced, grad).square().sum()),
        ):
            promise = f"has_channels = True: {name} belongs to the rows or columns of G"
            _check_near(projector, promise, came, right, "has_channels = False")
    if projector.sees_all and reduced.numel():
        for place in ((0, 0), (-1, -1), (grad.shape[-2] // 2, grad.shape[-1] // 3)):
            poisoned = grad.clone()
            poisoned[..., place[0], place[1]] = torch.nan
            if bool(torch.isfinite(basis.project(poisoned)).all()):
                break_promise(
                    projector,
                    "sees_all = True: R shows every NaN of the gradient",
                    f"a finite R for NaN at {place}",
                    "sees_all = False",
                )
    if basis.disjoint:
        inside = lift(basis, reduced, grad)
        if not bool(((inside == 0) | (inside == grad)).all()):
            break_promise(projector, "disjoint: lift R is G or 0", "other numbers", "disjoint = False")
    if projector.stores_basis:
        with promised(projector, "stores_basis = True: bases overlap"):
            overlap = float(basis.overlap(basis))
        if not abs(overlap - 1.0) < 10 * CLOSE:
            break_promise(projector, "stores_basis = True: a basis overlaps with itself", f"{overlap}", "1")
    moment = numbers(tuple(reduced.shape), 8)
    with promised(projector, "transport expresses moments in a new basis"):
        promise = "transport from a basis to itself changes nothing"
        _check_near(projector, promise, basis.transport(moment, basis, 1), moment, "P_oldᵀ P_new")


def _check_sides(projector: Projector) -> None:
    """Sides that it cannot do are refused, all others taken."""
    for side in ("left", "right", "full"):
        if side in projector.sides:
            with promised(projector, f"sides says that it can do {side!r}"):
                projector.check(side)
        else:
            promise = f"sides says that it cannot do {side!r}"
            check_refused(projector, promise, partial(projector.check, side), side)


def _check_sizes(projector: Projector) -> None:
    """moments_change_shape = True: R has the shape that `reduced_shape` says for the state, and never more than for no state."""
    run = Run(projector)
    for step in range(6):
        with promised(projector, "moments_change_shape = True: moments follow the shape of R"):
            run.train(range(step, step + 1))
        for name in MATRICES:
            param = run.params[name]
            plan, state = run.optimizer.plan_of(param), run.optimizer.state[param]
            assert plan.space is not None
            now, most = projector.reduced_shape(plan.space, state), projector.reduced_shape(plan.space)
            basis = projector.basis(plan.space, state, 1, torch.device("cpu"))
            came = tuple(basis.project(numbers(plan.space.shape, 1)).shape)
            if came != now:
                break_promise(projector, "R has the shape that reduced_shape(space, state) says", f"{came}", f"{now}")
            if torch.Size(now).numel() > torch.Size(most).numel():
                break_promise(projector, "reduced_shape without a state is the largest", f"{now}", f"at most {most}")
