"""Stochastic gradient descent with momentum, plain or Nesterov's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.rules.base import Context, Direction, MomentumRule


@dataclass(frozen=True)
class SGD(MomentumRule):
    """b ← μb + R, N = b, or R + μb with `nesterov`; b starts at 0, so the first step is R itself (torch's convention).

    With `match_reference` as FRUGAL's released code: b starts at the first R, or, of a dense parameter, at its weights.

    Memory: 4 bytes for each element of R (8 in float64), also with momentum 0.
    """

    name: ClassVar[str] = "sgd"
    elementwise: ClassVar[bool] = True
    masks: ClassVar[bool] = True
    decays_last: ClassVar[bool] = False
    momentum: float = 0.0
    nesterov: bool = False

    def check(self, options: Mapping[str, Any]) -> None:
        if not 0.0 <= options["momentum"] < 1.0:
            raise ValueError(f"momentum is {options['momentum']!r}; it must be in [0, 1)")
        if options["nesterov"] and options["momentum"] == 0.0:
            raise ValueError("nesterov is True with momentum 0; give a momentum above 0")

    def direction(
        self, grad: Tensor, state: Mapping[str, Tensor], options: Mapping[str, Any], context: Context
    ) -> Direction:
        momentum, buffer = float(options["momentum"]), state["exp_avg"]
        if options["match_reference"] and context.fresh:
            buffer.copy_(context.weight if context.dense else grad)
        nesterov = bool(options["nesterov"])
        direction = kernels.sgd_direct_(grad, buffer, momentum=momentum, nesterov=nesterov, ok=context.ok)
        return Direction(direction)

    def mean_gradient(self, state: Mapping[str, Tensor], options: Mapping[str, Any], step: float) -> Tensor | None:
        momentum = float(options["momentum"])
        return state["exp_avg"] * ((1.0 - momentum) / (1.0 - momentum**step)) if step >= 1 else None

    def memory(self, options: Mapping[str, Any]) -> float:
        return float(options["momentum"])
