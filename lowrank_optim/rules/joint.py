"""Rules that see several parameters at once, such as the two factors of an adapter."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim.rules.base import Context, Direction, Rule, Transport


class JointRule(Rule):
    """A rule over `arity` consecutive parameters of a group, which are stepped together, once all have a gradient.

    A subclass is a frozen dataclass like any rule, with `init_joint` and `directions`. Its groups are trained without `rank`; a group
    holds a multiple of `arity` parameters, none of them frozen or sharded.

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
