"""What an update rule is: moments and a direction for one small or full matrix.

A rule is a frozen dataclass of default hyperparameters. It holds no tensors and knows nothing of subspaces: it sees a gradient R
(projected, or whole for dense parameters) and the state tensors that it made itself. Live hyperparameters come from the param
group, where schedulers change them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.sharding.param_sharding import LOCAL, ParamSharding

Transport = Callable[[Tensor, int], Tensor]
"""(matrix, power) → the matrix in the coordinates of a new basis (`Basis.transport`)."""


@dataclass(frozen=True)
class Direction:
    """W ← (1 − decay·λ) W − step·lift(matrix).

    step, decay: the learning rate, unless the rule says something else.
    correction: of the released Adam (`match_reference`), which has bias correction in its step size: that factor, which norms that
        limit growth leave out. 1 for all other rules.
    norms: of the rows of `matrix` and of the gradient, (…, rows, 1), where the rule's operation has measured them.
    """

    matrix: Tensor
    step: float | None = None
    decay: float | Tensor | None = None
    correction: float = 1.0
    norms: tuple[Tensor, Tensor] | None = None

    @property
    def unit(self) -> float | Tensor:
        """The learning rate as a multiple of the step size: 1, or η where the matrix holds η already (Adafactor)."""
        if self.step is None or self.decay is None:
            return 1.0
        return 1.0 if isinstance(self.decay, float) and self.decay == self.step else self.decay / self.step


@dataclass(frozen=True)
class FusedDirection:
    """A rule's direction as one operation, which changes the moments and returns the matrix, and perhaps norms of rows.

    op: its name.
    args: its arguments.
    direction: of its result.
    """

    op: str
    args: tuple[Any, ...]
    direction: Callable[[Any], Direction]

    def run(self) -> Direction:
        """The direction, computed now."""
        return self.direction(kernels.call(self.op, *self.args))


@dataclass(frozen=True)
class FusedDense:
    """A rule's whole step on a dense parameter as one operation, with the learning rate as step and decay.

    op: its name.
    call: its arguments, from those of `projectors.StepParams` by name.
    after: what is left to do then, if anything.
    """

    op: str
    call: Callable[[Mapping[str, Any]], tuple[Any, ...]]
    after: Callable[[], object] | None = None


@dataclass(frozen=True)
class Context:
    """What a rule may need to know besides the gradient.

    step: t ≥ 1, the steps that the moments have seen with this one.
    age: the steps that the parameter has seen with this one, also across resets of the moments.
    weight: the parameter, for rules whose step depends on its size; not modified.
    ok: 0-d bool on the device; where false, the moments stay and the direction is 0. None means true.
    dense: whether the gradient is the parameter's own, and no projection of it.
    fresh: whether the moments were made for this step (reset ones were not).
    sharding: where the rest of gradient and weight lies, if this process holds parts of them.
    norms: whether the norms of the rows of direction and gradient are wanted.
    squares: Σ x² of the lines that `Rule.lines_to_measure` asks for, where they are known.
    """

    step: float
    age: float
    weight: Tensor
    ok: Tensor | None
    dense: bool = False
    fresh: bool = False
    sharding: ParamSharding = LOCAL
    norms: bool = False
    squares: Tensor | None = None

    def at(self, weight: Tensor) -> "Context":
        """The same for a part of the parameter."""
        return replace(self, weight=weight)


class Rule(ABC):
    """An update rule; subclasses are frozen dataclasses whose fields are the group options they read.

    The attributes are of the class. Subclasses set them without a type.

    Attributes:
        name: in groups and checkpoints.
        elementwise: every element is treated for itself, so that a large tensor may be given in parts.
        on_matrices: dense parameters come in their matrix view (convolutions as out × the rest); vectors go to the optimizer's
            `dense_rule`, or are refused.
        in_subspaces: it works on projected gradients, too. If False, groups with a rank or density are refused.
        masks: `direction` looks at `Context.ok` itself; else that is done around it, with copies of the moments.
        knows_shards: sums over the gradient go through `Context.sharding`. If False, and not `elementwise`, sharded parameters are
            refused.
        keeps_errors: the operation of `fused_dense` keeps the errors of bfloat16 weights; else it is not used where they are kept.
        rotates_shards: `transport` works on the local parts of moments.
        state_lies: where each state tensor lies if parameters are sharded: "reduced" (as R; the default), "rows" or "columns" (one
            number for each of R's), "matrix", "stack" (one number for each matrix of a stack). Moments in few bits have to be as R.
        decays_last: with `match_reference`, weights decay after the update, as in the released code.

    State tensors named `exp_avg` (with a sign) and `exp_avg_sq` (at least 0) are stored in `state_bits`; all others stay as they are.
    """

    name: ClassVar[str]
    elementwise: ClassVar[bool] = False
    on_matrices: ClassVar[bool] = False
    in_subspaces: ClassVar[bool] = True
    knows_shards: ClassVar[bool] = False
    state_lies: ClassVar[Mapping[str, str]] = {}
    decays_last: ClassVar[bool] = True
    masks: ClassVar[bool] = False
    keeps_errors: ClassVar[bool] = False
    rotates_shards: ClassVar[bool] = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "fused_dense" in vars(cls) and "keeps_errors" not in vars(cls):
            cls.keeps_errors = False
        if "direction" in vars(cls):  # fused operations of a parent compute another one
            for name in {"fused_direction", "fused_dense"} - vars(cls).keys():
                setattr(cls, name, getattr(Rule, name))

    def options(self) -> dict[str, Any]:
        """Default hyperparameters by name, as they go into the param groups."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    def check(self, options: Mapping[str, Any]) -> None:  # noqa: B027 (nothing to check is common)
        """Raise ValueError for hyperparameters out of range: name, value, valid range."""

    def check_matrix(  # noqa: B027 (any matrix will do)
        self, shape: tuple[int, ...], side: str | None, sharding: ParamSharding, options: Mapping[str, Any]
    ) -> None:
        """Raise ValueError for a matrix that the rule cannot train; asked with `on_matrices`. The parameter's name is put before it.

        Args:
            shape: of the matrix view, on all processes.
            side: the projected one; None for a dense parameter.
            sharding: where its parts lie.
            options: of its group.
        """

    def structure(self, options: Mapping[str, Any]) -> tuple[Any, ...]:
        """What in the options decides which state there is; it cannot change in a live group."""
        return ()

    def moment_shape(self, shape: tuple[int, ...], options: Mapping[str, Any]) -> tuple[int, ...]:
        """The shape of `exp_avg` and `exp_avg_sq` for a gradient of `shape`.

        Another one than that is for rules that are `on_matrices` and not `in_subspaces`, and may have fewer columns only: a part of
        the rows of a gradient has that part of the rows of the moments, and `check_matrix` sees to columns that are split.
        """
        return shape

    def moment_gradient(self, grad: Tensor, options: Mapping[str, Any]) -> Tensor:
        """The gradient in that shape, as far as sizes go: the root mean square of the elements that share a moment."""
        return grad

    @abstractmethod
    def init(
        self, shape: tuple[int, ...], options: Mapping[str, Any], dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        """State tensors for a gradient of `shape`, all zero. Few bits know `exp_avg` and `exp_avg_sq`, see the class."""

    @abstractmethod
    def direction(
        self, grad: Tensor, state: Mapping[str, Tensor], options: Mapping[str, Any], context: Context
    ) -> Direction:
        """Update the moments in `state` with `grad`, in place, and return what to apply.

        `state` may hold more than `init` made (`step`, `basis`): touch only those.
        """

    def fused_direction(
        self, grad: Tensor, state: Mapping[str, Tensor], options: Mapping[str, Any], context: Context
    ) -> FusedDirection | None:
        """`direction` as one operation, which can be run together with those of other matrices; None where there is none."""
        return None

    def fused_dense(
        self,
        weight: Tensor,
        grad: Tensor,
        state: Mapping[str, Tensor],
        options: Mapping[str, Any],
        context: Context,
    ) -> FusedDense | None:
        """The step on a dense parameter as one operation; None where there is none, so that `direction` has to be applied."""
        return None

    def lines_to_measure(self, options: Mapping[str, Any]) -> int | None:
        """The dimension (−1: rows, −2: columns) of a dense gradient whose lines' Σ x² a step begins with; None for no such sums.

        A step finds out by them whether the gradient is finite, and passes them on as `Context.squares`.
        """
        return None

    def mean_gradient(self, state: Mapping[str, Tensor], options: Mapping[str, Any], step: float) -> Tensor | None:
        """An estimate of the mean gradient from the moments of `step` steps, in R's coordinates; None where there is none."""
        return None

    def averages_updates(self, options: Mapping[str, Any]) -> bool:
        """Whether `exp_avg` is a mean of updates in place of gradients."""
        return False

    def gradient_share(self, options: Mapping[str, Any]) -> float:
        """How much of a squared gradient a step adds to the squares whose roots are stored in few bits: v, or else m².

        An estimate will do, also where v is a mean of (g−m)²: it sets the scales of columns only. The default overrates the gradient.
        """
        return 1.0

    def memory(self, options: Mapping[str, Any]) -> float:
        """c: in the next moments, `exp_avg` weighs as much as a new gradient of c·exp_avg. 0 for rules without momentum."""
        return 0.0

    @abstractmethod
    def transport(
        self,
        state: Mapping[str, Tensor],  # modified in place
        move: Transport,
        options: Mapping[str, Any],
        step: float,
    ) -> None:
        """Express the moments in the coordinates of a new basis, in place: `state["exp_avg"].copy_(move(state["exp_avg"], 1))`.

        `move(tensor, power)` returns a moment in the new basis: power 1 for means, 2 for squares. `step` is the number of steps they
        have seen so far. Called with `on_refresh="rotate"` and by `change_group(rank=…)`, not with "keep".
        """


def masked_direction(
    rule: Rule, grad: Tensor, state: Mapping[str, Tensor], options: Mapping[str, Any], context: Context
) -> Direction:
    """`rule.direction`; where the gradient is to be ignored, the moments stay and the direction is 0, whatever the rule does."""
    ok = context.ok
    if ok is None or rule.masks:
        return rule.direction(grad, state, options, context)
    made = rule.init(tuple(grad.shape), options, grad.dtype, torch.device("meta"))
    before = {name: state[name].clone() for name in made}
    direction = rule.direction(grad, state, options, context)
    for name, tensor in before.items():
        state[name].copy_(torch.where(ok, state[name], tensor))
    return replace(direction, matrix=torch.where(ok, direction.matrix, 0.0), norms=None)


class MomentumRule(Rule):
    """A rule whose only moment is linear in the gradients: `exp_avg`, of R's shape."""

    def init(
        self, shape: tuple[int, ...], options: Mapping[str, Any], dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros(shape, dtype=dtype, device=device)}

    def transport(self, state: Mapping[str, Tensor], move: Transport, options: Mapping[str, Any], step: float) -> None:
        """m ← m C."""
        state["exp_avg"].copy_(move(state["exp_avg"], 1))


class MeanRule(MomentumRule):
    """A rule whose moment, where it has one, is the mean m ← μm + (1−μ)R; μ is the option `momentum`."""

    def check(self, options: Mapping[str, Any]) -> None:
        if not 0.0 <= options["momentum"] < 1.0:
            raise ValueError(f"momentum is {options['momentum']!r}; it must be in [0, 1)")

    def mean_gradient(self, state: Mapping[str, Tensor], options: Mapping[str, Any], step: float) -> Tensor | None:
        if step < 1 or "exp_avg" not in state:
            return None
        correction: float = 1.0 - float(options["momentum"]) ** step
        return state["exp_avg"] / correction

    def gradient_share(self, options: Mapping[str, Any]) -> float:
        return (1.0 - float(options["momentum"])) ** 2

    def memory(self, options: Mapping[str, Any]) -> float:
        momentum = float(options["momentum"])
        return momentum / (1.0 - momentum)
