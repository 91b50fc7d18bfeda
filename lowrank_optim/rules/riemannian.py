"""Gradients of a pair, scaled by the inverse Gram matrix of the other factor; and none at all: AdamW on pairs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lowrank_optim.rules.base import FusedDense
from lowrank_optim.rules.joint import Answer, Unit
from lowrank_optim.rules.pair_gradients import GradientPairRule, fused_adam
from lowrank_optim.rules.pair_products import grams, times
from lowrank_optim.rules.pairs import Pair, matrix_of
from lowrank_optim.rules.small_matrices import damped_inverse, in_batches


@dataclass(frozen=True)
class AdamPair(GradientPairRule):
    """Adam on each factor, as if they were unrelated. What makes them a pair is the option `l1`, which shrinks rank-one terms.

    row_scale: η_A of ALLoRA for B: row i of g_B is multiplied by σ_i = (‖(BA)_i‖ + η_A⁻²)^(−1/2), so that outputs which the
        adapter has hardly changed move faster; 0 leaves it out. A is trained as ever: its gradient has to be scaled in backward,
        which `scale_rows_in_backward(model, η_A, factors="A")` does. Meant for s = 1 and descent (`moments="none"`): Adam undoes
        factors that stay.

    Memory of a pair: 8r(m+n) bytes, nothing with `moments="none"`.

    Paper of ALLoRA: Huang and Balestriero, 2024, arXiv:2410.09692.
    """

    name: ClassVar[str] = "adam_pair"
    row_scale: float = 0.0

    def check(self, options: Mapping[str, Any]) -> None:
        super().check(options)
        if not 0.0 <= float(options["row_scale"]) < math.inf:
            raise ValueError(f"row_scale is {options['row_scale']!r}; it must be a finite number, at least 0")

    def precondition(self, pairs: Sequence[Pair]) -> Sequence[tuple[Tensor | None, Tensor | None]]:
        scale = float(pairs[0].options["row_scale"]) if pairs else 0.0
        if not scale:
            return [(pair.a.grad, pair.b.grad) for pair in pairs]
        found = grams(pairs)[::2]
        return [
            (pair.a.grad, None if pair.b.grad is None else pair.b.grad * row_scales(pair.b.weight, gram, scale))
            for pair, gram in zip(pairs, found, strict=True)
        ]

    def directions_of(self, units: Sequence[Unit]) -> Sequence[Answer]:
        """One operation for each factor, without a look at the pair, where that can be."""
        fused = [self._fused(unit) for unit in units]
        found = iter(super().directions_of([unit for unit, moves in zip(units, fused, strict=True) if moves is None]))
        return [next(found) if moves is None else (moves, None) for moves in fused]

    def _fused(self, unit: Unit) -> list[FusedDense | None] | None:
        if unit.options["row_scale"]:
            return None
        moves: list[FusedDense | None] = []
        for grad, state, context in zip(unit.grads, unit.states, unit.contexts, strict=True):
            if grad is not None and "exp_avg" not in state:
                return None
            flat = None if grad is None else grad.reshape(matrix_of(grad)).contiguous()
            moves.append(None if flat is None else fused_adam(flat, state, unit.options, context, unit.cautious))
            if grad is not None and moves[-1] is None:
                return None
        return moves


def row_scales(b: Tensor, gram: Tensor, scale: float) -> Tensor:
    """σ_i = (‖(BA)_i‖ + η⁻²)^(−1/2), (…, m, 1), from B (…, m, r) and the Gram matrix AAᵀ: ‖(BA)_i‖² = b_i (AAᵀ) b_iᵀ."""
    squares = ((b @ gram.to(b.dtype)) * b).sum(-1, keepdim=True).clamp_min_(0.0)
    return (squares.sqrt_() + scale**-2).rsqrt_()


@dataclass(frozen=True)
class Riemannian(GradientPairRule):
    """g_A ← (K + δI)⁻¹ g_A, g_B ← g_B (M + δI)⁻¹ with K = BᵀB and M = AAᵀ, then Adam, or descent (`moments="none"`).

    damping: δ, relative to the mean eigenvalue tr(K)/r, so that a small B does not decide it.
    absolute_damping: δ is `damping` itself, as in peft and in the released code.

    Memory of a pair: 8r(m+n) bytes, nothing with `moments="none"`.
    """

    name: ClassVar[str] = "riemannian"
    damping: float = 1e-2
    absolute_damping: bool = False

    def check(self, options: Mapping[str, Any]) -> None:
        super().check(options)
        if not float(options["damping"]) >= 0.0:
            raise ValueError(f"damping is {options['damping']!r}; it must be at least 0")
        if not isinstance(options["absolute_damping"], bool):
            raise ValueError(f"absolute_damping is {options['absolute_damping']!r}; it must be True or False")

    def precondition(self, pairs: Sequence[Pair]) -> Sequence[tuple[Tensor | None, Tensor | None]]:
        damping, absolute = float(pairs[0].options["damping"]), pairs[0].options["absolute_damping"]
        inverses = in_batches(lambda gram: damped_inverse(gram, damping, absolute), grams(pairs))
        return [
            (
                None if pair.a.grad is None else times(pair.a.grad, inverses[2 * number + 1]),
                None if pair.b.grad is None else times(pair.b.grad, inverses[2 * number]),
            )
            for number, pair in enumerate(pairs)
        ]
