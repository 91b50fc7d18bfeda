"""The checks for parts of one's own: the package's parts pass them, so do small ones from outside, and wrong ones are caught."""

import doctest
import importlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, make_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lowrank_optim as lo
from lowrank_optim import projectors
from lowrank_optim.residuals import RESIDUALS
from lowrank_optim.rules import RULES
from lowrank_optim.testing import check_projector, check_residual, check_rule
from lowrank_optim.testing.problem import MATRICES, Run


@dataclass(frozen=True)
class Orthogonal(lo.MomentumRule):
    """N = U Vᵀ of m ← βm + R (Muon); vectors are normalised."""

    name = "orthogonal"
    heavy: float = 0.9

    def direction(self, grad, state, options, context):
        momentum = state["exp_avg"].mul_(options["heavy"]).add_(grad)
        if grad.dim() < 2:
            return lo.Direction(momentum / momentum.norm().clamp_min(1e-12))
        left, _, right = torch.linalg.svd(momentum, full_matrices=False)
        return lo.Direction(left @ right)


def hartley(size: int, dtype: torch.dtype) -> Tensor:
    """The orthonormal Hartley transform of this size, a vector a column."""
    turns = torch.arange(size, dtype=torch.float64).outer(torch.arange(size, dtype=torch.float64)) * (
        2 * math.pi / size
    )
    return ((turns.cos() + turns.sin()) / math.sqrt(size)).to(dtype)


@dataclass(frozen=True)
class Hartley(lo.Projector):
    """The vectors of the Hartley transform that hold most of the gradient."""

    name = "hartley"

    def init(self, space, key, device):
        return {"waves": torch.arange(space.rank, device=device).expand(*space.batch, -1).clone()}

    def refresh(self, request):
        grad, space = request.grad, request.space
        if not bool(lo.usable(grad).all()):
            return None
        lines = grad if space.side == "right" else grad.mT
        energy = (lines.to(space.dtype) @ hartley(space.basis_rows, space.dtype)).square().sum(-2)
        return {"waves": energy.topk(space.rank).indices.sort().values}

    def basis(self, space, state, key, device):
        chosen = hartley(space.basis_rows, space.dtype).T[state["waves"]].mT.contiguous()
        return lo.DenseBasis(chosen, space.side, sharding=space.sharding)


@dataclass(frozen=True)
class RowNormalised(lo.Residual):
    """W ← W − η(lift N + κ E_j/‖g_j‖), E = G − lift R: what is outside of the subspace, every line by the gradient's length."""

    name = "row_normalised"
    uses_norms = True
    needs_orthonormal = True
    outside: float = 0.1

    def update(self, step, state, options):
        phi = step.unit * options["outside"] * torch.where(step.squares > 0, step.squares.rsqrt(), 0.0)
        core = step.direction - phi * step.projected
        term = lo.GradientTerm(step.grad, phi, step.ok, by_channel=True)
        return lo.Update(core, options["scale"], term)


@dataclass(frozen=True)
class Breathing(lo.Projector):
    """The leading half of the vectors in every other period: moments change their shape with it."""

    name = "breathing"
    moments_change_shape = True
    sees_all = True
    state_lies = {"period": "host"}  # noqa: RUF012

    def width(self, space: lo.SubspaceSpec, state: Mapping[str, Tensor] | None) -> int:
        return space.rank // 2 if state is not None and int(state["period"]) % 2 else space.rank

    def reduced_shape(self, space, state=None):
        return (*space.reduced_shape[:-1], self.width(space, state))

    def init(self, space, key, device):
        wide = hartley(space.basis_rows, space.dtype)[:, : space.rank].expand(*space.batch, -1, -1)
        return {"period": torch.tensor(0), "vectors": wide.clone().to(device)}

    def refresh(self, request):
        grad, space = request.grad, request.space
        if not bool(lo.usable(grad).all()):
            return None
        lines = (grad if space.side == "right" else grad.mT).to(space.dtype)
        vectors = torch.linalg.svd(lines, full_matrices=False).Vh[..., : space.rank, :].mT
        return {"period": request.state["period"] + (not request.first), "vectors": vectors.contiguous()}

    def basis(self, space, state, key, device):
        chosen = state["vectors"][..., : self.width(space, state)].contiguous()
        return lo.DenseBasis(chosen, space.side, sharding=space.sharding)


@dataclass(frozen=True)
class OneIteration(lo.StoredProjector):
    """One power iteration from the first unit vectors; stored, and so also in few bits."""

    name = "one_iteration"

    def compute(self, request):
        grad, space = request.grad, request.space
        lines = grad if space.side == "right" else grad.mT
        return {"basis": torch.linalg.qr(lines.mT @ lines[..., : space.rank]).Q.contiguous()}


SMALL = (Orthogonal(), Hartley(), OneIteration(), RowNormalised(), Breathing())


def variants() -> Iterator[Any]:
    """The package's own parts: each with its defaults, and projectors with their variants."""
    yield from (kind() for kind in RULES.values())
    yield from (kind() for kind in RESIDUALS.values())
    names = {
        "randomized_svd": ("randomized_svd:complement", "randomized_svd:sample"),
        "svd": ("svd:unaligned",),
        "random": ("random:gaussian",),
        "coordinate": ("coordinate:rows", "coordinate:entries"),
        "blocks": ("blocks:random", "blocks:mirror"),
        "smallest_weights": ("smallest_weights:0.3,shrinks",),
    }
    for kind in projectors._BUILDERS:
        yield from map(projectors.from_name, (kind, *names.get(kind, ())))


def check(part: Any) -> None:
    for base, function in ((lo.Rule, check_rule), (lo.Projector, check_projector), (lo.Residual, check_residual)):
        if isinstance(part, base):
            function(part)


@pytest.mark.long
@pytest.mark.parametrize("part", [*variants(), *SMALL], ids=lambda part: f"{type(part).__name__}-{part.name}")
def test_parts_keep_what_they_promise(part):
    check(part)


def test_a_joint_rule_is_checked_as_far_as_it_is_one():
    @dataclass(frozen=True)
    class Balanced(lo.JointRule):
        name = "balanced"

        def init_joint(self, shapes, options, dtype, device):
            return [{"size": torch.zeros((), dtype=dtype, device=device)} for _ in shapes]

        def directions(self, grads, states, options, contexts):
            size = torch.stack([grad.norm() for grad in grads]).norm()
            for state in states:
                state["size"].lerp_(size, 0.5)
            return [lo.Direction(grad / states[0]["size"]) for grad in grads]

    check_rule(Balanced())


def test_moments_that_change_shape_do_so_and_resume_whatever_the_state_is_called():
    run = Run(Breathing())
    widths = []
    for step in range(6):
        run.train(range(step, step + 1))
        widths.append({name: run.optimizer.state[run.params[name]]["exp_avg"].shape[-1] for name in MATRICES})
    assert {8, 4} == {width for at_step in widths for width in at_step.values()}
    resumed = Run(Breathing())
    resumed.optimizer.load_state_dict(run.optimizer.state_dict())
    for name, param in resumed.params.items():
        for key, tensor in resumed.optimizer.state[param].items():
            assert torch.equal(tensor, run.optimizer.state[run.params[name]][key])


def test_an_optimizer_with_a_projector_of_ones_own_is_described():
    lines = lo.describe(Run(Hartley()).optimizer).splitlines()
    (wide,) = (line.split() for line in lines if line.strip().startswith("wide "))
    assert wide[1:6] == ["12x520", "left", "8", "auto", "low-rank"]


# ------------------------------------------------------------------------------------------------ parts that are wrong


@dataclass(frozen=True)
class IgnoresMask(lo.MomentumRule):
    name = "ignores_mask"
    masks = True

    def direction(self, grad, state, options, context):
        return lo.Direction(state["exp_avg"].mul_(0.9).add_(grad).clone())


@dataclass(frozen=True)
class Remembers(lo.MomentumRule):
    name = "remembers"

    def __post_init__(self):
        object.__setattr__(self, "seen", [])

    def direction(self, grad, state, options, context):
        self.seen.append(0)
        return lo.Direction(grad / len(self.seen))


@dataclass(frozen=True)
class NormOfAll(lo.MomentumRule):
    name = "norm_of_all"
    elementwise = True

    def direction(self, grad, state, options, context):
        return lo.Direction(grad / grad.norm().clamp_min(1e-12))


@dataclass(frozen=True)
class WritesToGradient(lo.MomentumRule):
    name = "writes_to_gradient"

    def direction(self, grad, state, options, context):
        return lo.Direction(grad.sign_())


@dataclass(frozen=True)
class NewTensors(lo.MomentumRule):
    name = "new_tensors"

    def direction(self, grad, state, options, context):
        state["exp_avg"] = 0.9 * state["exp_avg"] + grad
        return lo.Direction(state["exp_avg"])


@dataclass(frozen=True)
class Ascends(lo.MomentumRule):
    name = "ascends"

    def direction(self, grad, state, options, context):
        return lo.Direction(-grad)


@dataclass(frozen=True)
class NamedAsAnother(Orthogonal):
    name = "adam"


@dataclass(frozen=True)
class FieldOfAnother(Orthogonal):
    name = "field_of_another"
    scale: float = 1.0


@dataclass(frozen=True)
class TensorOfAnother(lo.Rule):
    name = "tensor_of_another"

    def init(self, shape, options, dtype, device):
        return {"basis": torch.zeros(shape, dtype=dtype, device=device)}

    def direction(self, grad, state, options, context):
        return lo.Direction(grad)

    def transport(self, state, move, options, step):
        pass


@dataclass(frozen=True)
class NotOrthonormal(Hartley):
    name = "not_orthonormal"

    def basis(self, space, state, key, device):
        return lo.DenseBasis(2.0 * super().basis(space, state, key, device).matrix, space.side)


@dataclass(frozen=True)
class Rolls(Hartley):
    name = "rolls"

    def refresh(self, request):
        space = request.space
        return super().refresh(request) and {
            "waves": torch.rand(*space.batch, space.basis_rows).topk(space.rank).indices
        }


@dataclass(frozen=True)
class TakesZero(Hartley):
    name = "takes_zero"

    def refresh(self, request):
        return super().refresh(request) or {"waves": request.state["waves"] + 0}


@dataclass(frozen=True)
class SeesLess(Hartley):
    name = "sees_less"

    def basis(self, space, state, key, device):
        unit = torch.eye(space.basis_rows, space.rank, dtype=space.dtype).expand(*space.batch, -1, -1)
        return projectors.coordinate_basis.CoordinateBasis(unit.argmax(-2).contiguous(), space.side)


@dataclass(frozen=True)
class SilentlyResizes(Breathing):
    name = "silently_resizes"
    moments_change_shape = False


@dataclass(frozen=True)
class Unnamed(Hartley):
    name = "unnamed"
    knows_shards = True


@dataclass(frozen=True)
class NotLinear(RowNormalised):
    name = "not_linear"
    linear = True


@dataclass(frozen=True)
class ReadsGradient(RowNormalised):
    name = "reads_gradient"
    uses_gradient = False


@dataclass(frozen=True)
class IgnoresNorms(RowNormalised):
    name = "ignores_norms"
    uses_norms = False


@dataclass(frozen=True)
class CountsNaN(lo.Residual):
    name = "counts_nan"

    def init(self, space, device):
        return {"count": torch.zeros((), dtype=space.dtype, device=device)}

    def update(self, step, state, options):
        state["count"] += 1
        return lo.Update(step.direction, options["scale"])


class NoDataclass(lo.MomentumRule):
    name = "no_dataclass"

    def options(self):
        return {}

    def direction(self, grad, state, options, context):
        return lo.Direction(grad)


@dataclass(frozen=True)
class Stays(Orthogonal):
    name = "stays"

    def transport(self, state, move, options, step):
        pass


@dataclass(frozen=True)
class Replaces(Orthogonal):
    name = "replaces"

    def transport(self, state, move, options, step):
        state["exp_avg"] = move(state["exp_avg"], 1)


@dataclass(frozen=True)
class ReadsSelf(Orthogonal):
    name = "reads_self"

    def direction(self, grad, state, options, context):
        return super().direction(grad, state, {"heavy": self.heavy}, context)


@dataclass(frozen=True)
class Untyped(lo.MomentumRule):
    name = "untyped"
    heavy = 0.9

    def direction(self, grad, state, options, context):
        return lo.Direction(state["exp_avg"].mul_(options["heavy"]).add_(grad).clone())


@dataclass(frozen=True)
class ReturnsTensor(lo.MomentumRule):
    name = "returns_tensor"

    def direction(self, grad, state, options, context):
        return grad.sign()


@dataclass(frozen=True)
class Nameless(lo.MomentumRule):
    def direction(self, grad, state, options, context):
        return lo.Direction(grad)


@dataclass(frozen=True)
class SignedSquares(lo.Rule):
    name = "signed_squares"

    def init(self, shape, options, dtype, device):
        return {"exp_avg_sq": torch.zeros(shape, dtype=dtype, device=device)}

    def direction(self, grad, state, options, context):
        return lo.Direction(state["exp_avg_sq"].lerp_(grad, 0.1).clone())

    def transport(self, state, move, options, step):
        state["exp_avg_sq"].copy_(move(state["exp_avg_sq"], 1))


@dataclass(frozen=True)
class OneName(OneIteration):
    name = "one_name"
    power: float = 2.0


@dataclass(frozen=True)
class ReadsSelfOutside(RowNormalised):
    name = "reads_self_outside"

    def update(self, step, state, options):
        return super().update(step, state, {**options, "outside": self.outside})


@dataclass(frozen=True)
class IgnoresScale(RowNormalised):
    name = "ignores_scale"

    def update(self, step, state, options):
        return super().update(step, state, {**options, "scale": 1.0})


@dataclass(frozen=True)
class IgnoresUnit(RowNormalised):
    name = "ignores_unit"

    def update(self, step, state, options):
        return super().update(replace(step, unit=1.0), state, options)


@dataclass(frozen=True)
class IgnoresChannel(RowNormalised):
    name = "ignores_channel"

    def update(self, step, state, options):
        made = super().update(step, state, options)
        return replace(made, term=replace(made.term, by_channel=False))


@dataclass(frozen=True)
class IgnoresOk(RowNormalised):
    name = "ignores_ok"

    def update(self, step, state, options):
        return super().update(replace(step, ok=None), state, options)


@dataclass(frozen=True)
class PlainNumber(lo.Residual):
    name = "plain_number"
    share: float = 0.1

    def update(self, step, state, options):
        term = lo.GradientTerm(step.grad, step.unit * options["share"], step.ok)
        return lo.Update(step.direction, options["scale"], term)


CAUGHT = {
    IgnoresMask: "masks = True: where `context.ok` is false the moments stay",
    Remembers: "direction is a function of its arguments",
    NormOfAll: "elementwise = True: a tensor that is given in parts",
    WritesToGradient: "direction does not change the gradient",
    NewTensors: "state is changed in place",
    Ascends: "an update goes down",
    NamedAsAnother: "rule 'adam' of NamedAsAnother has the name of Adam, a part of the package",
    FieldOfAnother: "an optimizer can be built .*'scale' is a field of the rule FieldOfAnother",
    TensorOfAnother: "'basis' belongs to the projector",
    NotOrthonormal: "orthonormal = True: PᵀP is the identity",
    Rolls: "refresh gives the same for the same arguments",
    TakesZero: "a zero gradient does not become a basis",
    SeesLess: "sees_all = True: R shows every NaN",
    SilentlyResizes: "moments_change_shape = False: R keeps its shape",
    Unnamed: "state_lies says where state lies.*nothing for waves",
    NotLinear: "linear = True: the update of two gradients' sum",
    ReadsGradient: "update takes what a step hands to it|uses_gradient = False",
    IgnoresNorms: "update takes what a step hands to it",
    CountsNaN: "where `step.ok` is false nothing changes",
    NoDataclass: "NoDataclass is no dataclass: write @dataclass.frozen=True. above the class",
    Stays: "transport expresses the moments in a new basis.*exp_avg is what it was.*copy_",
    Replaces: "transport expresses the moments.*replaces a tensor; write state.'exp_avg'.*copy_",
    ReadsSelf: "hyperparameters come from `options`.*where self.heavy is 1.9.*What is needed: options.'heavy'",
    ReadsSelfOutside: "hyperparameters come from `options`.*options.'outside'",
    Untyped: "KeyError: 'heavy'.*What is needed: a type at the field, heavy: float",
    ReturnsTensor: "direction returns a Direction.*return lo.Direction.tensor",
    Nameless: "Nameless has no name: write name = ",
    SignedSquares: "the moment exp_avg_sq is at least 0.*exp_avg for a moment with a sign",
    OneName: "the name tells projectors with other fields apart.*'one_name' for power 2.0 and 3.0.*self.power",
    IgnoresScale: "the option `scale` .α. scales the update.*options..scale",
    IgnoresUnit: "half the direction with `step.unit`",
    IgnoresChannel: "by_channel says whether",
    IgnoresOk: "changes no weight|where `step.ok` is false nothing changes",
    PlainNumber: "φ is a tensor.*What came: 0.1.*torch.full_like",
}


@pytest.mark.parametrize("kind", CAUGHT, ids=lambda kind: kind.__name__)
def test_a_part_that_breaks_a_promise_is_caught_with_its_name_and_what_is_needed(kind):
    with pytest.raises(AssertionError, match=f"(?s){kind.__name__}: (?=.*What is needed).*({CAUGHT[kind]})"):
        check(kind())


@pytest.mark.parametrize(
    ("check", "kind"), [(check_rule, Orthogonal), (check_projector, Hartley), (check_residual, RowNormalised)]
)
def test_a_class_in_place_of_a_part_is_named(check, kind):
    with pytest.raises(AssertionError, match=rf"{kind.__name__} is a class.*{kind.__name__}\(\)"):
        check(kind)


@pytest.mark.parametrize("field", ["part", "dtype", "mesh"])
def test_fields_may_be_named_as_the_arguments_of_the_checks(field):
    def direction(self, grad, state, options, context):
        return lo.Direction(state["exp_avg"].lerp_(grad, options[field]).clone())

    members = {"name": "named_field", "direction": direction}
    kind = make_dataclass("NamedField", [(field, float, 0.1)], bases=(lo.MomentumRule,), namespace=members, frozen=True)
    check_rule(kind())


def test_the_examples_of_the_checks_run():
    for name in ("rules", "projectors", "residuals"):
        module = importlib.import_module(f"lowrank_optim.testing.{name}")
        failed, attempted = doctest.testmod(module)
        assert not failed
        assert attempted


def test_a_check_leaves_no_process_group_behind():
    check_residual(RowNormalised())
    assert not torch.distributed.is_initialized()


def test_small_parts_need_public_names_only():
    for kind in SMALL:
        names = [name for name in vars(lo) if isinstance(vars(lo)[name], type)]
        for base in type(kind).__mro__[1:]:
            assert base.__module__ in ("builtins", "abc", __name__) or base.__name__ in names
    source = Path(__file__).read_text()
    used = re.findall(r"\blo\.([A-Za-z_]\w*)", source.partition("SMALL = (")[0])
    assert set(used) <= set(lo.__all__)


def test_a_moment_that_few_bits_leave_alone_is_told():
    @dataclass(frozen=True)
    class Named(lo.Rule):
        name = "named"

        def init(self, shape, options, dtype, device):
            return {"mean": torch.zeros(shape, dtype=dtype, device=device)}

        def direction(self, grad, state, options, context):
            return lo.Direction(state["mean"].lerp_(grad, 0.1).clone())

        def transport(self, state, move, options, step):
            state["mean"].copy_(move(state["mean"], 1))

    with pytest.warns(UserWarning, match="Named: mean stays in 32 bits whatever state_bits is; only exp_avg"):
        check_rule(Named())
