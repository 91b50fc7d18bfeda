"""LoRA-SB and LoRA-XS on an ordinary pair: A and a basis of B are fixed, an r×r matrix between them is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim.rules.joint import Answer, Unit
from lowrank_optim.rules.pair_gradients import ADAM
from lowrank_optim.rules.pair_products import across, times
from lowrank_optim.rules.pairs import PairRule, Side
from lowrank_optim.rules.small_matrices import sum_together


@dataclass(frozen=True)
class FixedBasis(PairRule):
    """Adam on R in W = W₀ + s B₀ R A, where the pair holds B = B₀R, and A is frozen.

        g_R = B₀ᵀ g_B,   B ← (1−ηλ) B − η B₀ N,   N: Adam's direction for g_R

    B is what it would be if R were the parameter, so that a checkpoint is one of an ordinary pair. B₀ is part of the state, and is
    given by `lo.LoRASBAdamW`.

    betas, eps: of Adam.

    Memory of a pair: 4mr + 8r² bytes.
    """

    name: ClassVar[str] = "lora_sb"
    takes_frozen: ClassVar[bool] = True
    state_lies: ClassVar[Mapping[str, str]] = {"core_avg": "whole", "core_avg_sq": "whole"}
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def check(self, options: Mapping[str, Any]) -> None:
        ADAM.check(options)

    def check_unit(self, names: Sequence[str], params: Sequence[Tensor], options: Mapping[str, Any]) -> None:
        super().check_unit(names, params, options)
        if params[0].requires_grad:
            raise ValueError(
                f'LoRA-SB keeps A as it is, and {names[0]} requires a gradient; take lora_pairs(…, freeze="A")'
            )

    def init_joint(
        self, shapes: Sequence[tuple[int, ...]], options: Mapping[str, Any], dtype: torch.dtype, device: torch.device
    ) -> Sequence[dict[str, Tensor]]:
        experts, (ranks, _) = options["experts"], shapes[0]
        core = (experts, ranks // experts, ranks // experts)
        made = {"basis": shapes[1], "core_avg": core, "core_avg_sq": core}
        return [{}, {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in made.items()}]

    def directions_of(self, units: Sequence[Unit]) -> Sequence[Answer]:
        sides = [Side.of(unit, 1) for unit in units]
        bases = [side.tall(side.state["basis"]) for side in sides]
        parts = [across(basis, side.grad) for basis, side in zip(bases, sides, strict=True) if side.grad is not None]
        cores = sum_together(parts, [side.sharding for side in sides])
        answers: list[Answer] = []
        for unit, side, basis, core in zip(units, sides, bases, cores, strict=True):
            if side.context.step == 1 and not bool(side.state["basis"].any()):
                raise RuntimeError("LoRA-SB has no basis for B: build lo.LoRASBAdamW when B has its initial values")
            state = {"exp_avg": side.state["core_avg"], "exp_avg_sq": side.state["core_avg_sq"]}
            moved = ADAM.direction(core.contiguous(), state, unit.options, side.context)
            answers.append(([None, side.move(times(basis, moved.matrix))], None))
        return answers
