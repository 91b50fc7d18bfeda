"""What a residual promises."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.projectors import SVD, Basis, Coordinate, Projector, Random, StepParams, SubspaceSpec
from lowrank_optim.projectors.base import Refresh
from lowrank_optim.residuals import Residual, ResidualInput, Update
from lowrank_optim.testing.problem import RANK, Run, numbers
from lowrank_optim.testing.promises import (
    CLOSE,
    break_promise,
    check_in_place,
    check_object,
    check_refused,
    check_same,
    check_shared,
    promised,
)

SHAPES = ((20, 28), (28, 20), (2, 20, 28))


def check_residual(residual: Residual) -> None:
    """Try a residual of your own: what it reads and writes, linearity, masks, resume, updates in backward, sharding, names.

    Takes two or three seconds. Writes nothing, and starts no process.

    Args:
        residual: with the hyperparameters to be tried.

    Raises:
        AssertionError: the first promise that the residual breaks; the message says what came and what is needed.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> from dataclasses import dataclass
        >>> from lowrank_optim.testing import check_residual
        >>> @dataclass(frozen=True)
        ... class Whole(lo.Residual):
        ...     name = "whole"
        ...     linear = True
        ...     share: float = 0.1
        ...     def update(self, step, state, options):
        ...         phi = torch.full_like(step.projected[..., :1, :1], options["share"]) * step.unit
        ...         return lo.Update(step.direction, options["scale"], lo.GradientTerm(step.grad, phi, step.ok))
        >>> check_residual(Whole())
    """
    check_object(residual)
    with promised(residual, "an optimizer can be built with the residual"):
        options = Run(residual).optimizer.param_groups[0]
    for shape in SHAPES:
        for projector in (SVD(), Coordinate("columns")):
            problem = _Problem.of(residual, projector, shape, options)
            _check_arguments(problem)
            _check_sizes(problem)
            _check_ignored(problem)
            if residual.linear:
                _check_linear(problem)
    if residual.needs_orthonormal:
        promise = "needs_orthonormal = True refuses other projectors"
        check_refused(residual, promise, lambda: Run(residual, {"projector": Random("gaussian")}), residual.name)
    check_shared(residual, {"projector": Coordinate("columns")}, {"on_refresh": "rotate"}, bits=(8,))


@dataclass(frozen=True)
class _Problem:
    """A residual in the subspace of one matrix."""

    residual: Residual
    space: SubspaceSpec
    basis: Basis
    options: Mapping[str, Any]

    @classmethod
    def of(
        cls, residual: Residual, projector: Projector, shape: tuple[int, ...], options: Mapping[str, Any]
    ) -> "_Problem":
        device = torch.device("cpu")
        space = projector.space(shape, RANK, "std", torch.float32)
        begun = projector.init(space, 1, device)
        state = projector.refresh(Refresh(numbers(shape, 1), space, begun, 1, first=True))
        assert state is not None
        return cls(residual, space, projector.basis(space, state, 1, device), options)

    def state(self) -> dict[str, Tensor]:
        with promised(self.residual, f"init makes the state for {self.space.shape}"):
            return self.residual.init(self.space, torch.device("cpu"))

    def inputs(self, grad: Tensor, direction: Tensor, unit: float | Tensor = 1.0) -> ResidualInput:
        """What a step hands to the residual."""
        reduced, squares, norms = self.basis.project(grad), None, None
        if self.residual.uses_norms:
            reduced, squares = self.basis.project_with_norms(grad)
            norms = kernels.row_norms(direction, reduced)
        made = ResidualInput(grad, reduced, squares, direction, 1.0, unit, self.basis, self.space, None, norms)
        promise = "sums takes what a step hands to it (norms and squares only with uses_norms = True)"
        with promised(self.residual, promise):
            return replace(made, sums=self.residual.sums(made, self.state(), self.options))

    def update(self, inputs: ResidualInput, state: dict[str, Tensor], ok: Tensor | None = None) -> Tensor:
        """The change of the weights."""
        promise = "update takes what a step hands to it (norms and squares only with uses_norms = True)"
        weight = torch.zeros(self.space.shape)
        with promised(self.residual, promise):
            update = self.residual.update(inputs, state, self.options)
        made: object = update
        if not isinstance(made, Update):
            came = type(made).__name__
            break_promise(self.residual, "update returns an Update", f"a {came}", "return lo.Update(core, …)")
        phi: object = None if update.term is None else update.term.scale
        if phi is not None and not (isinstance(phi, Tensor) and phi.dim() > 1):
            came = f"a tensor of {tuple(phi.shape)}" if isinstance(phi, Tensor) else repr(phi)
            remedy = "for one number: torch.full_like(step.projected[..., :1, :1], number)"
            break_promise(self.residual, "φ is a tensor of (…, d, 1) or (…, 1, 1)", came, remedy)
        if update.term is not None and update.term.by_channel != (update.term.scale.shape[-2] != 1):
            came = f"by_channel = {update.term.by_channel} with φ of {tuple(update.term.scale.shape)}"
            promise_of_term = "by_channel says whether φ has one number for every row of R, which are sharded with it"
            break_promise(self.residual, promise_of_term, came, "by_channel = True for (…, d, 1), False for (…, 1, 1)")
        with promised(self.residual, promise):
            self.basis.apply_(weight, update.core, StepParams(update.factor, 1.0, ok), update.term)
        return weight

    def numbers(self, seed: int) -> tuple[Tensor, Tensor]:
        """A gradient and a direction."""
        reduced = self.basis.project(numbers(self.space.shape, 1))
        return numbers(self.space.shape, seed), numbers(tuple(reduced.shape), seed)


def _check_arguments(problem: _Problem) -> None:
    """The gradient is only handed on, state tensors are kept, and the gradient is not read where uses_gradient is False."""
    residual, state = problem.residual, problem.state()
    before = dict(state)
    grad, direction = problem.numbers(2)
    absorbed = residual.absorb(grad.clone(), state, None)
    if not residual.feeds_back and not torch.equal(absorbed, grad):
        break_promise(residual, "feeds_back = False: absorb returns the gradient", "another one", "feeds_back = True")
    inputs = problem.inputs(absorbed, direction)
    change = problem.update(inputs, state)
    if change.shape != grad.shape or not bool(torch.isfinite(change).all()):
        break_promise(residual, "finite gradients give a finite update", f"{tuple(change.shape)} with NaN", "numbers")
    if not residual.feeds_back and not torch.equal(inputs.grad, grad):
        break_promise(residual, "update does not write to the gradient", "it changed", "operations out of place")
    check_in_place(residual, before, state)
    if not residual.uses_gradient:
        without = replace(inputs, grad=torch.empty(0), squares=None)
        promise = "uses_gradient = False: R is all of the gradient it uses"
        came = problem.update(without, problem.state())
        check_same(residual, promise, {"update": came}, {"update": change}, "uses_gradient = True")


def _check_sizes(problem: _Problem) -> None:
    """α counts, and a direction that holds the learning rate gives an update that holds it."""
    residual, (grad, direction) = problem.residual, problem.numbers(2)
    changes = []
    for scale in (1.0, 2.0):
        scaled = replace(problem, options={**problem.options, "scale": scale})
        changes.append(scaled.update(scaled.inputs(grad.clone(), direction), scaled.state()))
    if torch.equal(*changes):
        promise = "the option `scale` (α) scales the update; nothing else applies it"
        break_promise(residual, promise, "the same for scale 1 and 2", 'lo.Update(core, options["scale"], …)')
    scaled = replace(problem, options={**problem.options, "scale": 1.0})
    made = scaled.inputs(grad.clone(), 0.5 * direction, torch.tensor(0.5))
    promise = "half the direction with `step.unit` ½ (a rule whose direction holds η) gives half the update"
    remedy = "φ in proportion to the direction, or times step.unit"
    check_same(residual, promise, {"it": scaled.update(made, scaled.state())}, {"it": 0.5 * changes[0]}, remedy, CLOSE)


def _check_ignored(problem: _Problem) -> None:
    """Where `ok` is false R and N are 0, and the gradient's NaN reaches neither weights nor state."""
    residual, ok = problem.residual, torch.tensor(False)
    if residual.feeds_back:
        return
    grad, direction = problem.numbers(2)
    state = problem.state()
    problem.update(problem.inputs(grad, direction), state)
    before = {name: tensor.clone() for name, tensor in state.items()}
    nothing = problem.inputs(torch.zeros_like(grad), torch.zeros_like(direction))
    ignored = replace(nothing, grad=torch.full_like(grad, torch.nan), ok=ok, kept={})
    if residual.uses_norms:
        ignored = replace(ignored, sums=residual.sums(ignored, state, problem.options))
    change = problem.update(ignored, state, ok)
    came, needed = {"the weights": change, **state}, {"the weights": torch.zeros_like(change), **before}
    remedy = "lo.GradientTerm(step.grad, φ, step.ok), and torch.where(step.ok, new, old)"
    check_same(residual, "where `step.ok` is false nothing changes", came, needed, remedy)


def _check_linear(problem: _Problem) -> None:
    """The update of a sum is the sum of the updates."""
    (grad1, first), (grad2, second) = problem.numbers(2), problem.numbers(3)
    one, two, both = (
        problem.update(problem.inputs(grad, direction), problem.state())
        for grad, direction in ((grad1, first), (grad2, second), (grad1 + grad2, first + second))
    )
    promise = "linear = True: the update of two gradients' sum is the sum of their updates"
    check_same(problem.residual, promise, {"the update": one + two}, {"the update": both}, "linear = False", CLOSE)
