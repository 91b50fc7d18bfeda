"""Muon for the matrices of a model beside AdamW for all else, and SUMO, its form in a subspace."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.groups.options import Options
from lowrank_optim.kernels import as_python
from lowrank_optim.optimizers.base import Params
from lowrank_optim.optimizers.matrix_rules import MatrixRuleOptimizer
from lowrank_optim.rules import Muon


class MuonAdamW(MatrixRuleOptimizer):
    """Muon for the matrices of the layers, AdamW for embeddings, head and vectors.

        m ← μm + (1−μ)G,   U S Vᵀ = (1−μ)G + μm,   W ← (1 − ηλ) W − η s U f(S) Vᵀ

    f is five steps of Newton–Schulz's iteration, and s = 0.2·√max(m, n), so that the rates of AdamW fit (`lowrank_optim.Muon` has the
    details, and what goes over the wire if matrices are sharded). Built from

        lo.MuonAdamW(lo.param_groups(model, rule="muon"))

    groups with `rule="muon"` are trained by Muon, groups with a `rank` by Muon in a subspace (`SUMOAdamW`), all others by AdamW.
    Another rule for matrices: `lo.LowRankOptimizer(lo.param_groups(model, rule=lo.NorMuon()), rule=lo.Adam())`.

    Args:
        params: groups, at least one of which names the rule or has a rank.
        lr: learning rate η.
        adamw_lr: that of the groups trained by AdamW that name none; None takes `lr`. Groups that are added later name their own.
        momentum, nesterov: μ, and whether the gradient counts once more.
        betas, eps: of AdamW.
        weight_decay: decoupled weight decay λ.
        adjust_lr_fn: "match_rms_adamw", or "original": s = √max(1, m/n), for larger rates (0.02).
        inner_dtype: of Newton–Schulz's products: "float32", or "bfloat16", faster on GPUs.
        **options: see `Options`. A group may have any field of `lowrank_optim.Muon`: {"split": 3} for queries, keys and values in one
            matrix (`overrides={"qkv": {"split": 3}}` of `param_groups`).

    Raises:
        ValueError: no group says which parameters are trained by Muon (a `rule`, or a `rank`, which may be None).

    Memory: 4 bytes for each element of a matrix, 8 for each of all else.

    Papers: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; Liu et al., "Muon is Scalable for LLM
    Training", 2025, arXiv:2502.16982.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 32))
        >>> optimizer = lo.MuonAdamW(lo.param_groups(model, rule="muon"), lr=1e-3)
        >>> [sorted(optimizer.state[p]) for p in model[0].parameters()]
        [['exp_avg', 'step'], ['exp_avg', 'exp_avg_sq', 'step']]
    """

    matrix_options: ClassVar[Mapping[str, Any]] = {"rule": "muon"}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        adamw_lr: float | Tensor | None = None,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        nesterov: bool = True,
        adjust_lr_fn: str | None = "match_rms_adamw",
        inner_dtype: str = "float32",
        **options: Unpack[Options],
    ) -> None:
        rule = Muon(momentum, as_python(nesterov), adjust_lr_fn=adjust_lr_fn, inner_dtype=inner_dtype)
        super().__init__(
            params, rule=rule, lr=lr, adamw_lr=adamw_lr, betas=betas, eps=eps, weight_decay=weight_decay, **options
        )


class SUMOAdamW(MuonAdamW):
    """Momentum in a subspace of the gradient, orthogonalised exactly, and AdamW for groups without `rank`.

        R = G B,   m ← μm + (1−μ)R,   N = s·m (mᵀm)^(−1/2),   W ← (1 − ηλ) W − η α lift(N)

    for the right side. (mᵀm)^(−1/2) comes from the eigenvalues of the r×r matrix: Newton–Schulz is far from it for the small singular
    values that moments in a subspace have. At a refresh m goes along into the new subspace. N has the same length in every step, so
    that the paper's limiter of its growth would change nothing. s = 0.2·√D gives N the root mean square of Adam's N.

    Matrices whose short side is below the rank are trained by Muon as they are. On a GPU the host waits for the eigenvalues.

    Args:
        params, lr, adamw_lr, momentum, betas, eps, weight_decay, adjust_lr_fn, inner_dtype: as for `MuonAdamW`.
        nesterov: take (1−μ)R + μm in place of m.
        **options: see `Options`; `on_refresh` is "rotate" unless given, `scale` (α) 1.

    Memory, for an m×n matrix with D = max(m, n), d = min(m, n): 4·D·r bytes of momentum and 4·d·r of basis.

    Paper: Refael et al., "SUMO: Subspace-Aware Moment-Orthogonalization for Accelerating Memory-Efficient LLM Training",
    NeurIPS 2025, arXiv:2505.24749.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = torch.nn.Linear(64, 32)
        >>> optimizer = lo.SUMOAdamW(lo.param_groups(model, rank=8), lr=1e-3)
        >>> model(torch.randn(4, 64)).square().mean().backward()
        >>> optimizer.step()
    """

    matrix_options: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        adamw_lr: float | Tensor | None = None,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        nesterov: bool = False,
        adjust_lr_fn: str | None = "match_rms_adamw",
        inner_dtype: str = "float32",
        **options: Unpack[Options],
    ) -> None:
        options.setdefault("on_refresh", "rotate")
        super().__init__(
            params,
            lr,
            adamw_lr,
            momentum,
            betas,
            eps,
            weight_decay,
            nesterov=nesterov,
            adjust_lr_fn=adjust_lr_fn,
            inner_dtype=inner_dtype,
            **options,
        )
