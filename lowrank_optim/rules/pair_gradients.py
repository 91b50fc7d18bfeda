"""Rules for pairs that change the gradients of the factors and then descend, or leave the rest to Adam."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim.rules.adam import TorchAdam
from lowrank_optim.rules.base import Context, Direction, FusedDense
from lowrank_optim.rules.joint import Answer, Unit
from lowrank_optim.rules.pairs import Pair, PairRule, Side
from lowrank_optim.sharding.param_sharding import LOCAL

MOMENTS = ("none", "factors", "full")

ADAM = TorchAdam()
"""The arithmetic and the checks of Adam; its numbers come from the group."""


@dataclass(frozen=True)
class GradientPairRule(PairRule):
    """Plain gradient descent, or Adam, on gradients of the factors that a subclass changes (`precondition`).

    moments: "none" for descent, or "factors" for Adam's m and v of each factor.
    """

    takes_frozen: ClassVar[bool] = True
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    moments: str = "factors"

    def check(self, options: Mapping[str, Any]) -> None:
        ADAM.check(options)
        if options["moments"] not in MOMENTS[:2]:
            raise ValueError(f"moments is {options['moments']!r}; valid values are {', '.join(map(repr, MOMENTS[:2]))}")

    def structure(self, options: Mapping[str, Any]) -> tuple[Any, ...]:
        return (options["moments"],)

    def init_joint(
        self, shapes: Sequence[tuple[int, ...]], options: Mapping[str, Any], dtype: torch.dtype, device: torch.device
    ) -> Sequence[dict[str, Tensor]]:
        return [ADAM.init(shape, options, dtype, device) if options["moments"] == "factors" else {} for shape in shapes]

    @abstractmethod
    def precondition(self, pairs: Sequence[Pair]) -> Sequence[tuple[Tensor | None, Tensor | None]]:
        """The changed gradients of A and B of each pair, in tall form; None for a frozen factor."""

    def directions_of(self, units: Sequence[Unit]) -> Sequence[Answer]:
        pairs = [Pair.of(unit) for unit in units]
        return [
            ([self._direction(side, form, pair) for (side, _), form in zip(pair.sides, forms, strict=True)], None)
            for pair, forms in zip(pairs, self.precondition(pairs), strict=True)
        ]

    def _direction(self, side: Side, form: Tensor | None, pair: Pair) -> Direction | FusedDense | None:
        if form is not None and "exp_avg" in side.state:
            grad = side.flat(form).contiguous()
            if (fused := fused_adam(grad, side.state, pair.options, side.context, pair.cautious)) is not None:
                return fused
            moved = ADAM.direction(grad, side.state, pair.options, side.context)
            form = side.tall(moved.matrix)
        return side.move(form)


def fused_adam(
    grad: Tensor, state: Mapping[str, Tensor], options: Mapping[str, Any], context: Context, cautious: bool
) -> FusedDense | None:
    """Adam's whole step on a factor from a gradient in the shape of its moments, as one operation; None where it has to be two."""
    if cautious or context.sharding is not LOCAL or not context.weight.is_contiguous():
        return None
    return ADAM.fused_dense(context.weight.view(grad.shape), grad, state, options, context)
