"""SubTrack++: Fira in a subspace that follows the gradient by small turns, with the moments."""

from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.groups.options import Options
from lowrank_optim.optimizers.base import Params
from lowrank_optim.optimizers.fira import FiraAdamW
from lowrank_optim.projectors import GrassmannTracking


class SubTrackAdamW(FiraAdamW):
    """Adam in a subspace that is turned towards the gradient, moments that turn with it, and the rest of the gradient as in Fira.

        R = G B,   N = Adam(R),   φ_j = ‖N_j‖/‖R_j‖/ℓ,   W ← (1 − ηλ) W − η (α lift(N) + φ ⊙ (G − lift R))

    A refresh takes one step along a geodesic of the Grassmann manifold, which turns one direction of the basis
    (`GrassmannTracking`, where it differs from the paper and its code). C = B_oldᵀ B_new carries the moments along, m ← m C, and v by
    the rule of `LDAdamW`; the released code leaves out the bias corrections of that rule.

    `match_reference=True` is that of `FiraAdamW`.

    Args:
        params, lr, betas, eps, weight_decay, limiter: as for `FiraAdamW`.
        step_size: largest angle of a refresh in radians.
        **options: see `Options`; unless given, `scale` (α) is 0.25, `on_refresh` "rotate", and `projector` as above.
            `proj_type="full"` is not possible.

    Memory: that of `FiraAdamW`.

    Paper: Rajabi et al., "SubTrack++: Gradient Subspace Tracking for Scalable LLM Training", NeurIPS 2025, arXiv:2502.01586.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = torch.nn.Linear(64, 32)
        >>> optimizer = lo.SubTrackAdamW(lo.param_groups(model, rank=8), lr=1e-3)
        >>> optimizer.param_groups[0]["projector"], optimizer.param_groups[0]["on_refresh"]
        ('grassmann_tracking', 'rotate')
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
        step_size: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        if not (options.get("coordinates") or options.get("blocks")):
            options.setdefault("projector", GrassmannTracking(step_size))
        options.setdefault("on_refresh", "rotate")
        super().__init__(params, lr, betas, eps, weight_decay, limiter=limiter, **options)
