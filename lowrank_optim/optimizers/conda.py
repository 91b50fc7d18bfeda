"""Conda: Adam whose second moment lives in the singular vectors of the momentum."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.groups.options import Options
from lowrank_optim.optimizers.base import LowRankOptimizer, Params
from lowrank_optim.projectors import MomentumSVD
from lowrank_optim.rules.adam import CondaAdam, check_betas


class CondaAdamW(LowRankOptimizer):
    """Adam in the coordinates of all singular vectors of the momentum, which change at every refresh.

        B ← singular vectors of β₁m̂ + (1−β₁)G,   R = G B,   N = Adam(R),   W ← (1 − ηλ) W − η α lift(N)

    (right side). At full rank, `lo.param_groups(model, rank=1.0)`, B is a square orthogonal matrix, and nothing of the gradient is
    left out: in its coordinates the columns of R differ in size, and Adam brings them to one. The momentum goes along at a refresh,
    m ← m B_oldᵀB_new, which at full rank changes nothing of it; v stays as it is, as in the paper.

    It saves no memory; with a smaller rank, the rest of the gradient and of the momentum is left out, as in GaLore.

    With `match_reference=True`, ε is added before bias correction and the weights decay after the update, as in the released code.
    That code takes the momentum without bias correction, which differs for refreshes in the first steps only.

    Args:
        params: groups with a `rank`, `lo.param_groups(model, rank=1.0)`; all others are trained by AdamW.
        lr, betas, eps, weight_decay: as for `GaLoreAdamW`.
        **options: see `Options`; unless given, `scale` (α) is 1, `update_proj_gap` 2000, `on_refresh` "rotate", and `projector`
            `MomentumSVD(β₁)`. `proj_type="full"` is not possible.

    Memory, for an m×n matrix with d = min(m, n) at full rank: 8·m·n bytes of moments and 4·d² of basis; 2·m·n and d² in 8 bits.

    Paper: Wang et al., "Conda: Column-Normalized Adam for Training Large Language Models Faster", arXiv:2509.24218.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = torch.nn.Linear(64, 32)
        >>> optimizer = lo.CondaAdamW(lo.param_groups(model, rank=1.0), lr=1e-3)
        >>> tuple(optimizer.state[model.weight]["basis"].shape)
        (32, 32)
    """

    matrix_options: ClassVar[Mapping[str, Any]] = {"rank": 1.0}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[Options],
    ) -> None:
        rule = CondaAdam(betas, eps)
        if not (options.get("coordinates") or options.get("blocks")):
            check_betas(betas)
            options.setdefault("projector", MomentumSVD(betas[0]))
        options.setdefault("update_proj_gap", 2000)
        options.setdefault("on_refresh", "rotate")
        super().__init__(params, rule=rule, lr=lr, weight_decay=weight_decay, **options)
