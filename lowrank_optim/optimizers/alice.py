"""Alice: Adam in a subspace that explores, and the gradient outside of it in units of its own running size."""

from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.groups.options import Options
from lowrank_optim.optimizers.base import LowRankOptimizer, Params
from lowrank_optim.projectors import RandomizedSVD
from lowrank_optim.residuals.complement import ComplementScaled
from lowrank_optim.rules import Adam


class AliceAdamW(LowRankOptimizer):
    """Adam in a subspace of which most is drawn anew at every refresh, and the rest of the gradient by its own running power.

        R = G B,   N = Adam(R),   p_j ← β p_j + (1−β)(‖g_j‖² − ‖r_j‖²),   C_j = √(d−r) (g_j − B r_j)/√p_j / ℓ
        W ← (1 − ηλ) W − η α (lift(N) + α_c C)

    A refresh takes a step of subspace iteration from the old basis, keeps the leading 40 of 256 vectors, and draws the others from
    what is orthogonal to those (`RandomizedSVD(explore="complement")`). `ComplementScaled` has the details of C. Moments stay as
    they are at a refresh, as in the paper.

    This is the paper's Alice-0. Alice also tracks a running RᵀR, r² numbers for each matrix, and mixes it into the iteration.

    Two things differ from the paper: Adam's moments are bias-corrected, and p begins with its first value; it begins with 0 under
    `match_reference=True`. There is no code of the authors.

    Args:
        params, lr, weight_decay: as for `GaLoreAdamW`. The paper takes lr=0.02 for matrices.
        betas: (β₁, β₂), (0.9, 0.9) as published. β of p is β₁.
        eps: ε.
        complement_scale: α_c.
        limiter: largest growth γ of ‖C‖ in a step; None does not limit.
        **options: see `Options`; unless given, `scale` (α) is 0.3 and `projector` as above. `proj_type="full"` is not possible.

    Memory: that of `GaLoreAdamW`, and 4·D + 4 bytes for each m×n matrix, D = max(m, n).

    Paper: Gong et al., "Towards Efficient Optimizer Design for LLM via Structured Fisher Approximation with a Low-Rank Extension",
    ICLR 2026, arXiv:2502.07752.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = torch.nn.Linear(64, 32)
        >>> optimizer = lo.AliceAdamW(lo.param_groups(model, rank=8), lr=1e-2)
        >>> optimizer.param_groups[0]["projector"], optimizer.param_groups[0]["residual"]
        ('randomized_svd:complement', 'complement_scaled')
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        complement_scale: float = 0.4,
        limiter: float | None = 1.01,
        **options: Unpack[Options],
    ) -> None:
        options.setdefault("scale", 0.3)
        if not (options.get("coordinates") or options.get("blocks")):
            options.setdefault("projector", RandomizedSVD(explore="complement"))
        residual = ComplementScaled(limiter, complement_scale)
        super().__init__(params, rule=Adam(betas, eps), residual=residual, lr=lr, weight_decay=weight_decay, **options)
