"""Gradients of a pair, scaled by the inverse Gram matrix of the other factor; and none at all: AdamW on pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lowrank_optim.rules.pairs import GradientPairRule, Pair, grams, times
from lowrank_optim.rules.small_matrices import damped_inverse, in_batches


@dataclass(frozen=True)
class AdamPair(GradientPairRule):
    """Adam on each factor, as if they were unrelated. What makes them a pair is the option `l1`, which shrinks rank-one terms.

    Memory of a pair: 8r(m+n) bytes.
    """

    name: ClassVar[str] = "adam_pair"

    def precondition(self, pairs: Sequence[Pair]) -> Sequence[tuple[Tensor | None, Tensor | None]]:
        return [(pair.a.grad, pair.b.grad) for pair in pairs]


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
