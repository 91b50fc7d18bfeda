"""Rules that see several parameters at once, such as the two factors of an adapter."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from lowrank_optim.rules.base import Context, Direction, FusedDense, Rule, Transport
from lowrank_optim.sharding.param_sharding import LOCAL, ParamSharding


@dataclass(frozen=True)
class Unit:
    """Parameters that are stepped together, in one step.

    grads: in the compute type, zero where they are to be ignored; None for a frozen parameter.
    states: the optimizer's state of each; empty for a frozen one.
    options: of their group, as `JointRule.unit_options` gives them.
    contexts: of each.
    steps: (α, κ) of each: a direction N without a step of its own makes the weights κW − αN, before rounding.
    cautious: directions are looked at before they are applied, and modified then; fused steps are not taken.
    memo: what a rule may keep from one step to the next beside the state, to save work: no number of a step may depend on it, for
        it is in no checkpoint.
    """

    grads: tuple[Tensor | None, ...]
    states: tuple[Mapping[str, Tensor], ...]
    options: Mapping[str, Any]
    contexts: tuple[Context, ...]
    steps: tuple[tuple[float, float | Tensor], ...] = ()
    cautious: bool = True
    memo: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def is_plain(self) -> bool:
        """Whether a rule may write the weights itself: all are trained, whole, contiguous and of the compute type, every gradient
        can be used, and nobody looks at the directions.
        """
        if self.cautious or not self.steps or self.options["l1"]:
            return False
        for grad, context, (_, keep) in zip(self.grads, self.contexts, self.steps, strict=True):
            weight = context.weight
            if (
                grad is None
                or type(weight) not in PLAIN
                or weight.dtype is not grad.dtype
                or type(keep) is not float
                or context.ok is not None
                or context.sharding is not LOCAL
                or not (weight.is_contiguous() and grad.is_contiguous())
            ):
                return False
        return True


PLAIN = (Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class UnitLists:
    """Plain units (`Unit.is_plain`) of one group, rank and type, which have seen as many steps, as lists.

    weights, grads, states: of the parameters of all units, in order.
    options: of their group.
    counts: how many steps each parameter of a unit has seen with this one.
    steps: `Unit.steps`, those of every unit.
    scalings: s of each pair.
    memos: `Unit.memo` of each.
    finite: a bool for each parameter, true, to be set to false where its gradient is not finite; the units of such ones stay as they
        are. None where gradients may be used as they come. Of rules that `finds_nonfinite`.
    """

    weights: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: Sequence[Mapping[str, Tensor]]
    options: Mapping[str, Any]
    counts: tuple[float, ...]
    steps: tuple[tuple[float, float], ...]
    scalings: Sequence[float]
    memos: Sequence[dict[str, Any]]
    finite: Tensor | None = None

    @staticmethod
    def of(units: Sequence[Unit]) -> "UnitLists":
        """Those of plain units of one kind."""
        first = units[0]
        return UnitLists(
            [context.weight for unit in units for context in unit.contexts],
            [grad for unit in units for grad in unit.grads if grad is not None],
            [state for unit in units for state in unit.states],
            first.options,
            tuple(context.step for context in first.contexts),
            tuple((alpha, float(keep)) for alpha, keep in first.steps),
            [float(unit.options["scaling"]) for unit in units],
            [unit.memo for unit in units],
        )


class Written:
    """In place of a direction: the rule has written the weights itself."""


WRITTEN = Written()

Answer: TypeAlias = tuple[Sequence[Direction | FusedDense | Written | None], Any]
"""What to apply to each parameter of a unit (None: leave it as it is), and what `JointRule.finish` is to know of this step; after
`WRITTEN`, the text of a RuntimeWarning, or None."""


class JointRule(Rule):
    """A rule over `arity` consecutive parameters of a group, which are stepped together, once all have a gradient.

    A subclass is a frozen dataclass like any rule, with `init_joint` and `directions`. Its groups are trained without `rank`; a group
    holds a multiple of `arity` parameters, none of them frozen or sharded. A rule that computes for many units at once
    (`directions_of`, or `writes_lists` and `write_lists`), takes frozen members, knows shards, or has work to do once the weights are
    written, overrides what stands under "units" below.

    The attributes are of the class. Subclasses set them without a type.

    Attributes:
        arity: the number of parameters.
        takes_frozen: some members of a unit, but not all, may be frozen.
        finishes: `finish` is to be called when the weights are written.
        finds_nonfinite: `write_lists` sees which gradients are not finite, so that nobody has to read them before.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Balanced(lo.JointRule):
        ...     name = "balanced"
        ...     def init_joint(self, shapes, options, dtype, device):
        ...         return [{} for _ in shapes]
        ...     def directions(self, grads, states, options, contexts):
        ...         size = torch.linalg.vector_norm(torch.stack([grad.norm() for grad in grads]))
        ...         return [lo.Direction(grad / size) for grad in grads]
        >>> pair = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
        >>> optimizer = lo.LowRankOptimizer([{"params": pair, "rule": Balanced()}], rule="adam", lr=1.0)
        >>> pair[0].grad, pair[1].grad = torch.tensor([2.0, 0.0]), torch.tensor([2.0])
        >>> optimizer.step()
        >>> pair[1]
        Parameter containing:
        tensor([-0.7071], requires_grad=True)
    """

    arity: ClassVar[int] = 2
    takes_frozen: ClassVar[bool] = False
    finishes: ClassVar[bool] = False
    finds_nonfinite: ClassVar[bool] = False

    @abstractmethod
    def init_joint(
        self, shapes: Sequence[tuple[int, ...]], options: Mapping[str, Any], dtype: torch.dtype, device: torch.device
    ) -> Sequence[dict[str, Tensor]]:
        """State tensors for each of the parameters of these shapes, all zero."""

    @abstractmethod
    def directions(
        self,
        grads: Sequence[Tensor],
        states: Sequence[Mapping[str, Tensor]],
        options: Mapping[str, Any],
        contexts: Sequence[Context],
    ) -> Sequence[Direction]:
        """Update the moments in `states` with the gradients, in place, and return what to apply to each parameter."""

    # ------------------------------------------------------------------------------------------------------------ units

    def unit_options(self, options: Mapping[str, Any], number: int) -> Mapping[str, Any]:
        """The options of a group, with what it says of its unit of this number."""
        return options

    def check_unit(self, names: Sequence[str], params: Sequence[Tensor], options: Mapping[str, Any]) -> None:
        """Raise ValueError for parameters that cannot be stepped together, naming them; `options` are those of the unit."""

    def unit_shapes(self, params: Sequence[Tensor]) -> Sequence[tuple[int, ...]]:
        """The shapes in which the rule sees these parameters, on all processes."""
        return [tuple(param.shape) for param in params]

    def unit_shardings(self, params: Sequence[Tensor], options: Mapping[str, Any]) -> Sequence[ParamSharding] | None:
        """Where the parts of sharded parameters lie, in the shapes of `unit_shapes`; None as for any dense parameter."""
        return None

    def unit_elements(self, params: Sequence[Tensor], options: Mapping[str, Any]) -> int:
        """How many numbers a unit keeps in memory while it waits for others; counted on all processes together."""
        return sum(param.numel() for param in params)

    def writes(self, unit: Unit) -> bool:
        """Whether the rule writes the weights of this unit itself, in `directions_of`, which answers `WRITTEN` for each then.
        `finish` is not called for them, and nothing of their size is kept while they wait.
        """
        return False

    def writes_lists(self, options: Mapping[str, Any]) -> bool:
        """Whether the rule writes the weights of all plain units of a group with these options itself, by `write_lists`."""
        return False

    def write_lists(self, units: UnitLists) -> str | None:
        """The whole step of plain units of one kind; says what there is to warn of, once all weights are written."""
        raise NotImplementedError

    def directions_of(self, units: Sequence[Unit]) -> Sequence[Answer]:
        """The directions of many units of one group; they may be computed together."""
        answers: list[Answer] = []
        for unit in units:
            grads = [grad for grad in unit.grads if grad is not None]
            answers.append((masked_directions(self, grads, unit.states, unit.options, unit.contexts), None))
        return answers

    def finish(self, units: Sequence[tuple[Unit, Any]]) -> Sequence[None]:
        """What is left to do when the weights of these units are written; each comes with what `directions_of` kept for it."""
        return [None for _ in units]

    def check_start(self, names: Sequence[str], params: Sequence[Tensor], options: Mapping[str, Any]) -> None:
        """Raise ValueError before the first step with the option `l1`, where it would leave nothing."""

    def shrink_(self, unit: Unit, steps: Sequence[float], l1: float) -> None:
        """The proximal step of the group option `l1`, after the weights were written: p ← sign(p)·max(|p| − ηξ, 0).

        Args:
            unit: of which the contexts hold the weights, modified in place.
            steps: η of each parameter.
            l1: ξ.
        """
        for context, grad, size in zip(unit.contexts, unit.grads, steps, strict=True):
            if grad is not None:
                soft_threshold_(context.weight, size * l1, context.ok)

    # --------------------------------------------------------------------------------------------------------- one matrix

    def init(
        self, shape: tuple[int, ...], options: Mapping[str, Any], dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        raise ValueError(
            f"{type(self).__name__} works on {self.arity} parameters at once, so its groups can have no rank"
        )

    def direction(
        self, grad: Tensor, state: Mapping[str, Tensor], options: Mapping[str, Any], context: Context
    ) -> Direction:
        raise ValueError(f"{type(self).__name__} works on {self.arity} parameters at once")

    def transport(self, state: Mapping[str, Tensor], move: Transport, options: Mapping[str, Any], step: float) -> None:
        raise ValueError(f"{type(self).__name__} works on {self.arity} parameters at once, none of them in a subspace")


def masked_directions(
    rule: JointRule,
    grads: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    options: Mapping[str, Any],
    contexts: Sequence[Context],
) -> Sequence[Direction]:
    """`rule.directions`; where the gradients are to be ignored, the moments stay and the directions are 0."""
    ok = contexts[0].ok
    if ok is None or rule.masks:
        return rule.directions(grads, states, options, contexts)
    made = rule.init_joint([tuple(g.shape) for g in grads], options, grads[0].dtype, torch.device("meta"))
    before = [{name: state[name].clone() for name in names} for state, names in zip(states, made, strict=True)]
    directions = rule.directions(grads, states, options, contexts)
    for state, kept in zip(states, before, strict=True):
        for name, tensor in kept.items():
            state[name].copy_(torch.where(ok, state[name], tensor))
    return [replace(move, matrix=torch.where(ok, move.matrix, 0.0)) for move in directions]


def soft_threshold_(weight: Tensor, threshold: float, ok: Tensor | None) -> None:
    """p ← sign(p)·max(|p| − threshold, 0), in place; nothing where `ok` is false."""
    shrunk = torch.nn.functional.softshrink(weight, threshold)
    weight.copy_(shrunk if ok is None else torch.where(ok, shrunk, weight))
