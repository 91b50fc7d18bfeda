"""RMSprop (Tieleman and Hinton, 2012), as torch has it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.rules.base import Context, Direction, Rule, Transport


@dataclass(frozen=True)
class RMSprop(Rule):
    """v ← βv + (1−β)R², N = R / (√v + ε), β being `alpha` as in torch.

    Memory: 4 bytes for each element of R (8 in float64).
    """

    name: ClassVar[str] = "rmsprop"
    elementwise: ClassVar[bool] = True
    masks: ClassVar[bool] = True
    alpha: float = 0.99
    eps: float = 1e-8

    def check(self, options: Mapping[str, Any]) -> None:
        if not 0.0 <= options["alpha"] < 1.0:
            raise ValueError(f"alpha is {options['alpha']!r}; it must be in [0, 1)")
        if not options["eps"] >= 0.0:
            raise ValueError(f"eps is {options['eps']!r}; it must be at least 0")

    def init(
        self, shape: tuple[int, ...], options: Mapping[str, Any], dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        return {"exp_avg_sq": torch.zeros(shape, dtype=dtype, device=device)}

    def direction(
        self, grad: Tensor, state: Mapping[str, Tensor], options: Mapping[str, Any], context: Context
    ) -> Direction:
        alpha, eps = float(options["alpha"]), float(options["eps"])
        direction = kernels.rmsprop_direct_(grad, state["exp_avg_sq"], alpha=alpha, eps=eps, ok=context.ok)
        return Direction(direction)

    def gradient_share(self, options: Mapping[str, Any]) -> float:
        return 1.0 - float(options["alpha"])

    def transport(self, state: Mapping[str, Tensor], move: Transport, options: Mapping[str, Any], step: float) -> None:
        """v ← v (C∘C): the entries of R are taken as uncorrelated."""
        state["exp_avg_sq"].copy_(move(state["exp_avg_sq"], 2))
