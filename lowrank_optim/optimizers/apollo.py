"""APOLLO: the raw gradient, scaled by what AdamW does in a random subspace."""

from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.groups.options import Options
from lowrank_optim.optimizers.base import LowRankOptimizer, Params
from lowrank_optim.projectors import Random
from lowrank_optim.residuals.scaled import GradientScaled
from lowrank_optim.rules import Adam


class APOLLOAdamW(LowRankOptimizer):
    """Moments in a random subspace, used only for the size of the step; its direction is the gradient's.

        R = G B,   N = Adam(R),   φ_j = √α ‖N_j‖ / ‖R_j‖ / ℓ,   W ← (1 − ηλ) W − η φ ⊙ G

    B has independent Gaussian entries of variance 1/r. It is never stored, but regenerated from (seed, parameter, refresh), so every
    matrix has its own. ℓ is Fira's norm-growth limiter on φ ⊙ G.

    Differences from the released code, each undone by `match_reference=True`: ε, decay and staggering as in `GaLoreAdamW`, and the
    limiter works on norms without Adam's bias correction. In any case the random numbers are the package's own, a zero gradient does
    not enter the limiter's memory, and a rank above the short side trains densely (with `match_reference`: is cut to it).

    Args:
        params, lr, betas, eps, weight_decay: as for `GaLoreAdamW`.
        scale_type: "channel" scales every row (column) for itself, "tensor" the whole matrix.
        limiter: largest growth γ of the update's norm in a step; None does not limit.
        **options: see `Options`; `scale` (α) enters as its square root, as published, and is 1 here unless given.

    Memory, for an m×n matrix with D = max(m, n): 8·D·r bytes of moments and one number; no basis.

    Paper: Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", MLSys 2025, arXiv:2412.05270.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        scale_type: str = "channel",
        limiter: float | None = 1.01,
        **options: Unpack[Options],
    ) -> None:
        options.setdefault("projector", Random("gaussian"))
        residual = GradientScaled(limiter, scale_type)
        super().__init__(params, rule=Adam(betas, eps), residual=residual, lr=lr, weight_decay=weight_decay, **options)


class APOLLOMiniAdamW(APOLLOAdamW):
    """APOLLO for rank 1: one scale for the whole matrix, α = 128.

    Groups say `rank=1` (`lowrank_optim.param_groups(model, rank=1)`); other options are those of `APOLLOAdamW`.

    Memory: 8·D bytes a matrix.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        scale_type: str = "tensor",
        limiter: float | None = 1.01,
        **options: Unpack[Options],
    ) -> None:
        options.setdefault("scale", 128.0)
        super().__init__(params, lr, betas, eps, weight_decay, scale_type=scale_type, limiter=limiter, **options)
