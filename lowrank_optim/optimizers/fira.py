"""Fira: GaLore plus the gradient outside the subspace, scaled by norms and limited in its growth."""

from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.groups.options import Options
from lowrank_optim.optimizers.base import LowRankOptimizer, Params
from lowrank_optim.residuals.scaled import NormScaled
from lowrank_optim.rules import Adam


class FiraAdamW(LowRankOptimizer):
    """Full-rank training with low-rank moments: what AdamW does inside the subspace sets the size of the step outside.

        R = G B,   N = Adam(R),   φ_j = ‖N_j‖ / ‖R_j‖ / ℓ
        W ← (1 − ηλ) W − η (α lift(N) + φ ⊙ (G − lift R))

    j runs over the rows of R, so φ scales rows of tall and columns of wide matrices. ℓ ≥ 1 keeps the norm of φ ⊙ (G − lift R) from
    growing by more than the factor `limiter` from one step to the next. The m×n residual is never formed.

    Differences from the released code, each undone by `match_reference=True`: there the residual is G − α lift R, so that a part of
    the gradient in the subspace is counted twice; ε, decay and staggering are as in `GaLoreAdamW`. Two things are different in any
    case: a zero gradient does not enter the limiter's memory (the released limiter is stuck for thousands of steps after one), and
    nothing waits for the device.

    Args:
        params, lr, betas, eps, weight_decay: as for `GaLoreAdamW`.
        limiter: largest growth γ of the residual's norm in a step; None does not limit.
        **options: see `Options`; `scale` (α) is 0.25 here unless given. `proj_type="full"` is not possible.

    Memory: that of `GaLoreAdamW`, and one number for each matrix.

    Paper: Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?", arXiv:2410.01623.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        limiter: float | None = 1.01,
        **options: Unpack[Options],
    ) -> None:
        options.setdefault("scale", 0.25)
        residual = NormScaled(limiter)
        super().__init__(params, rule=Adam(betas, eps), residual=residual, lr=lr, weight_decay=weight_decay, **options)
