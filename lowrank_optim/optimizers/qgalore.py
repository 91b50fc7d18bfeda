"""Q-GaLore: GaLore with quantised moments and bases, and subspaces that are refreshed only while they move."""

from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.groups.options import Options
from lowrank_optim.optimizers.base import Params
from lowrank_optim.optimizers.galore import GaLoreAdamW


class QGaLoreAdamW8bit(GaLoreAdamW):
    """`GaLoreAdamW` with 8-bit moments, a packed 4-bit basis, and lazy refreshes.

        overlap = ‖P_oldᵀP_new‖²/r;   gap ← 2·gap   where the last 5 overlaps of a matrix average 0.4 or more

    The released code compares the first singular vectors only, whose sign and order mean nothing, so that a subspace that stands
    still can count as moving; and its 4-bit codes take a byte each and cannot express groups that do not straddle zero. Neither is
    reproduced by `match_reference=True`, which sets ε, decay, staggering and the exact SVD as for `GaLoreAdamW`.

    Args:
        params, lr, betas, eps, weight_decay: as for `GaLoreAdamW`.
        **options: see `Options`; unless given, `state_bits` is 8, `basis_bits` 4, `overlap_threshold` 0.4, `gap_factor` 2,
            `queue_size` 5 and `scale` 0.25.

    Memory, for an m×n matrix with D = max(m, n), d = min(m, n): 2·D·(r + 4⌈r/256⌉) bytes of moments, d·(⌈r/2⌉ + 8⌈r/256⌉) of basis.

    Paper: Zhang et al., "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients", arXiv:2407.08296.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[Options],
    ) -> None:
        options.setdefault("state_bits", 8)
        options.setdefault("basis_bits", 4)
        options.setdefault("overlap_threshold", 0.4)
        super().__init__(params, lr, betas, eps, weight_decay, **options)
