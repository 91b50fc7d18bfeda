"""LoRA-Pro: changes of the factors whose product is as near as can be to the gradient of the whole matrix."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim.kernels import widened
from lowrank_optim.rules.joint import Answer, Unit
from lowrank_optim.rules.pair_gradients import ADAM, MOMENTS, GradientPairRule
from lowrank_optim.rules.pair_products import across, times
from lowrank_optim.rules.pairs import Pair
from lowrank_optim.rules.small_matrices import in_batches, pseudo_inverse, sum_together, sylvester
from lowrank_optim.sharding.param_sharding import LOCAL, MeshParamSharding, ParamSharding


@dataclass(frozen=True)
class LoRAPro(GradientPairRule):
    """γ_A, γ_B that minimise ‖s(B γ_A + γ_B A) − G‖, from the gradients of the factors alone.

        γ_A = K⁺g_A/s² + X A,   γ_B = (I − B K⁺Bᵀ) g_B M⁺/s² − B X,   K = BᵀB, M = AAᵀ
        K X + X M = −K⁺ g_A Aᵀ/s²        (the X for which they stay nearest to g_A and g_B)

    s(B γ_A + γ_B A) = G̃ is G projected on what a pair can change. Beside a frozen B, γ_A = K⁺g_A/s²; beside a frozen A,
    γ_B = g_B M⁺/s², which is LoRA-FA.

    moments: "none": A ← A − ηγ_A, B ← B − ηγ_B, without state; η is a rate of full fine-tuning. "full": Adam on G̃ (m×n), whose
        direction U takes the place of G: g_A = sBᵀU, g_B = sUAᵀ. "factors": Adam on γ_A and γ_B, which no paper has, and which is
        LoRA-FA's rule where A is frozen.

    Memory of a pair: nothing; 8mn bytes with "full", as much as AdamW on the whole matrix; 8r(m+n) with "factors".
    """

    name: ClassVar[str] = "lora_pro"
    state_lies: ClassVar[Mapping[str, str]] = {}
    moments: str = "none"

    def check(self, options: Mapping[str, Any]) -> None:
        ADAM.check(options)
        if options["moments"] not in MOMENTS:
            raise ValueError(f"moments is {options['moments']!r}; valid values are {', '.join(map(repr, MOMENTS))}")

    def check_unit(self, names: Sequence[str], params: Sequence[Tensor], options: Mapping[str, Any]) -> None:
        super().check_unit(names, params, options)
        if options["moments"] == "full" and params[0].requires_grad and not params[1].requires_grad:
            raise ValueError(
                f'moments="full" keeps its moments with B, and {names[1]} does not require a gradient; use "none" or "factors"'
            )

    def unit_shardings(self, params: Sequence[Tensor], options: Mapping[str, Any]) -> Sequence[ParamSharding] | None:
        """As for all pairs; with moments of the size of the matrix, whose rows lie as those of B, A is gathered."""
        found = list(super().unit_shardings(params, options) or ())
        if options["moments"] == "full" and found[0] is not LOCAL:
            own = found[0]
            assert isinstance(own, MeshParamSharding)
            whole = own.lines.only()
            found[0] = MeshParamSharding(matrix=own.matrix, reduced=whole, lines=own.lines, param=own.param)
        return found

    def unit_elements(self, params: Sequence[Tensor], options: Mapping[str, Any]) -> int:
        if options["moments"] != "full":
            return super().unit_elements(params, options)
        return params[1].shape[0] * params[0][0].numel() * int(options["experts"])

    def init_joint(
        self, shapes: Sequence[tuple[int, ...]], options: Mapping[str, Any], dtype: torch.dtype, device: torch.device
    ) -> Sequence[dict[str, Tensor]]:
        if options["moments"] != "full":
            return super().init_joint(shapes, options, dtype, device)
        shape = (shapes[1][0], options["experts"] * shapes[0][1])
        return [{}, ADAM.init(shape, options, dtype, device)]

    def precondition(self, pairs: Sequence[Pair]) -> Sequence[tuple[Tensor | None, Tensor | None]]:
        return adjusted(pairs, [(pair.a.grad, pair.b.grad) for pair in pairs], nearest=True)

    def directions_of(self, units: Sequence[Unit]) -> Sequence[Answer]:
        pairs = [Pair.of(unit) for unit in units]
        if pairs[0].options["moments"] != "full":
            return super().directions_of(units)
        grads = [(pair.a.grad, pair.b.grad) for pair in pairs]
        forms = [
            _of_matrix(pair, self._direction_of_matrix(pair, _product(pair, *changes)))
            for pair, changes in zip(pairs, adjusted(pairs, grads, nearest=False), strict=True)
        ]
        changes = adjusted(pairs, forms, nearest=True)
        return [([pair.a.move(a), pair.b.move(b)], None) for pair, (a, b) in zip(pairs, changes, strict=True)]

    def _direction_of_matrix(self, pair: Pair, matrix: Tensor) -> Tensor:
        """Adam's direction for G̃ (E, m, n); its moments lie with B, as (m, E·n)."""
        experts, rows, cols = matrix.shape
        flat = matrix.permute(1, 0, 2).reshape(rows, experts * cols).contiguous()
        moved = ADAM.direction(flat, pair.b.state, pair.options, pair.b.context).matrix
        return moved.view(rows, experts, cols).permute(1, 0, 2)


def adjusted(
    pairs: Sequence[Pair], grads: Sequence[tuple[Tensor | None, Tensor | None]], nearest: bool
) -> list[tuple[Tensor | None, Tensor | None]]:
    """γ_Aᵀ and γ_B of each pair for these gradients in tall form, None for a frozen factor; X = 0 unless `nearest`."""
    eps = pairs[0].a.eps
    products, shardings = [], []
    for pair, (grad_a, grad_b) in zip(pairs, grads, strict=True):
        for side, _ in pair.sides:
            products.append(across(side.weight, side.weight))
            shardings.append(side.sharding)
        for side, grad in ((pair.a, grad_a), (pair.b, grad_b)):  # A g_Aᵀ and Bᵀ g_B
            products.append(across(side.weight, torch.zeros_like(side.weight) if grad is None else grad))
            shardings.append(side.sharding)
    sums = [widened(each) for each in sum_together(products, shardings)]
    gram_a, gram_b, cross_a, cross_b = (sums[first::4] for first in range(4))
    inverse_a, inverse_b = (in_batches(lambda gram: pseudo_inverse(gram, eps), each) for each in (gram_a, gram_b))
    both = [grad_a is not None and grad_b is not None for grad_a, grad_b in grads]
    squares = [pair.scaling**2 for pair in pairs]
    targets = [-(inv @ cross.mT) / s2 for inv, cross, s2 in zip(inverse_b, cross_a, squares, strict=True)]
    free = in_batches(lambda k, m, c: sylvester(k, m, c, eps), gram_b, gram_a, targets) if nearest else []
    found: list[tuple[Tensor | None, Tensor | None]] = []
    for number, (pair, (grad_a, grad_b)) in enumerate(zip(pairs, grads, strict=True)):
        inv_a, inv_b, s2 = inverse_a[number], inverse_b[number], squares[number]
        change_a = None if grad_a is None else times(grad_a, inv_b / s2)
        change_b = None if grad_b is None else times(grad_b, inv_a / s2)
        if both[number]:
            assert change_a is not None
            assert change_b is not None
            inner = inv_b @ cross_b[number] @ inv_a / s2
            if nearest:
                inner = inner + free[number]
                change_a = change_a + times(pair.a.weight, free[number].mT)
            change_b = change_b - times(pair.b.weight, inner)
        found.append((change_a, change_b))
    return found


def _product(pair: Pair, change_a: Tensor | None, change_b: Tensor | None) -> Tensor:
    """G̃ = s(B γ_A + γ_B A), (E, m, n)."""
    a, b = pair.a.weight, pair.b.weight
    parts = [] if change_a is None else [b @ change_a.mT]
    parts += [] if change_b is None else [change_b @ a.mT]
    total = parts[0] if len(parts) == 1 else parts[0].add_(parts[1])
    return total.mul_(pair.scaling)


def _of_matrix(pair: Pair, direction: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients sUᵀB and sUAᵀ of the factors, in tall form, for U in place of G."""
    (grad_a,) = sum_together([direction.mT @ pair.b.weight], [pair.b.sharding])
    return (
        None if pair.a.grad is None else grad_a * pair.scaling,
        None if pair.b.grad is None else direction @ pair.a.weight * pair.scaling,
    )
