"""LDAdam: Adam in a subspace that follows the gradient at every step, with error feedback."""

from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.groups.options import Options
from lowrank_optim.kernels import as_python
from lowrank_optim.optimizers.base import LowRankOptimizer, Params
from lowrank_optim.projectors import PowerIteration
from lowrank_optim.residuals.gradient import ErrorFeedback, NoResidual
from lowrank_optim.rules import TorchAdam


class LDAdamW(LowRankOptimizer):
    """Adam on gradients projected to a subspace that takes one step of power iteration at every step.

        A = G + e,   B = ρ P m̂ + (1 − ρ) A,   P' = qf(B BᵀP),   C = P'ᵀP,   R = P'ᵀA
        m' = C m,   v' = |(1 − β₂ᵗ⁻¹) [(C∘C)(v̂ − m̂²) + (C m̂)²]|
        N = Adam(R; m', v'),   W ← (1 − ηλ) W − η P' N
        e = A − P'R + β₁/(1 − β₁)·(P m − P' m')

    (for the left side; hats are bias-corrected). What the subspace leaves out, and what the momentum loses by its rotation, is kept
    in e and added to the next gradient. e is optimizer state: gradients may be cleared, clipped and accumulated as usual.

    `match_reference=True` projects square matrices on the left and takes the exact SVD for the first basis, as the released code;
    its step counter, one for all parameters, is ours per parameter, and its loss of state on resume is not reproduced.

    Args:
        params, lr, betas, eps, weight_decay: as for `GaLoreAdamW`; betas are (0.908, 0.99) as published.
        rho: ρ in [0, 1], how much the momentum counts in the choice of the subspace.
        error_feedback: keep e; False leaves out what is outside the subspace.
        **options: see `Options`; `update_proj_gap` is 1 and `on_refresh` "rotate" unless given, `scale` is 1. `proj_type="full"` is
            not possible.

    Memory, for an m×n matrix with D = max(m, n), d = min(m, n): 8·D·r bytes of moments, 4·d·r of basis; with error feedback 4·m·n.

    Paper: Robert et al., "LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics", ICLR 2025, arXiv:2410.16103.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.908, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rho: float = 0.908,
        error_feedback: bool = True,
        **options: Unpack[Options],
    ) -> None:
        error_feedback = as_python(error_feedback)
        if not isinstance(error_feedback, bool):
            raise ValueError(f"error_feedback is {error_feedback!r}; it must be True or False")
        options.setdefault("projector", PowerIteration(rho))
        options.setdefault("update_proj_gap", 1)
        options.setdefault("on_refresh", "rotate")
        residual = ErrorFeedback() if error_feedback else NoResidual()
        rule = TorchAdam(betas, eps)
        super().__init__(params, rule=rule, residual=residual, lr=lr, weight_decay=weight_decay, **options)
