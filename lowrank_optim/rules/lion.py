"""Lion (Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023): the sign of an interpolated momentum."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.rules.adam import check_betas
from lowrank_optim.rules.base import Context, Direction, MomentumRule


@dataclass(frozen=True)
class Lion(MomentumRule):
    """N = sign(β₁m + (1−β₁)R), then m ← β₂m + (1−β₂)R.

    Memory: 4 bytes for each element of R (8 in float64).
    """

    name: ClassVar[str] = "lion"
    elementwise: ClassVar[bool] = True
    masks: ClassVar[bool] = True
    decays_last: ClassVar[bool] = False
    betas: tuple[float, float] = (0.9, 0.99)

    def check(self, options: Mapping[str, Any]) -> None:
        check_betas(options["betas"])

    def direction(
        self, grad: Tensor, state: Mapping[str, Tensor], options: Mapping[str, Any], context: Context
    ) -> Direction:
        beta1, beta2 = map(float, options["betas"])
        direction = kernels.lion_direct_(grad, state["exp_avg"], beta1=beta1, beta2=beta2, ok=context.ok)
        return Direction(direction)

    def mean_gradient(self, state: Mapping[str, Tensor], options: Mapping[str, Any], step: float) -> Tensor | None:
        return state["exp_avg"] / (1.0 - float(options["betas"][1]) ** step) if step >= 1 else None

    def gradient_share(self, options: Mapping[str, Any]) -> float:
        return (1.0 - float(options["betas"][1])) ** 2

    def memory(self, options: Mapping[str, Any]) -> float:
        beta2 = float(options["betas"][1])
        return beta2 / (1.0 - beta2)
