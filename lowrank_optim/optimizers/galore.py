"""GaLore: Adam and Adafactor in the subspace of the gradient's leading singular vectors."""

from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.groups.options import Options, expand_shorthands, projector_option
from lowrank_optim.optimizers.base import LowRankOptimizer, Params
from lowrank_optim.rules import Adafactor, Adam


class GaLoreAdamW(LowRankOptimizer):
    """AdamW on gradients projected to their leading singular subspace.

        R = G B (tall and square) or Gᵀ B (wide),   N = Adam(R),   W ← (1 − ηλ) W − η α lift(N)

    B holds r singular vectors of the short side and is computed anew from the gradient every `update_proj_gap` steps. Groups without
    `rank` are trained exactly as by `torch.optim.AdamW`.

    Differences from the released code, each undone by `match_reference=True`: weight decay comes before the update and ε after bias
    correction, as in torch (there: after, and before); refreshes are staggered; with `projector="svd"`, signs of new basis vectors
    are aligned with the old ones. The default projector is randomized; `projector="svd"` is the exact one. The values of `eps` and
    `weight_decay` stay as given: the released defaults are 1e-6 and 0.

    With `proj_type="full"`, R is diagonal on a refresh step but for rounding errors, which Adam scales up to full size; take `eps` of
    1e-6 or more, or `on_refresh="rotate"`.

    Args:
        params: tensors, (name, tensor) pairs, or groups; lists written for galore_torch work unchanged.
        lr: learning rate η. Low-rank matrices see α·η, dense parameters η.
        betas: decay rates of the moments.
        eps: ε.
        weight_decay: decoupled weight decay λ.
        **options: see `Options`; `scale` (α) is 0.25 here unless given.

    Memory, for an m×n matrix with D = max(m, n), d = min(m, n): 8·D·r bytes of moments and 4·d·r of basis (AdamW: 8·m·n).

    Paper: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", ICML 2024, arXiv:2403.03507.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = torch.nn.Linear(64, 32)
        >>> optimizer = lo.GaLoreAdamW(lo.param_groups(model, rank=8), lr=1e-2)
        >>> model(torch.randn(4, 64)).square().mean().backward()
        >>> optimizer.step()
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
        options.setdefault("scale", 0.25)
        super().__init__(params, rule=Adam(betas, eps), lr=lr, weight_decay=weight_decay, **options)


class GaLoreAdamW8bit(GaLoreAdamW):
    """`GaLoreAdamW` with 8-bit moments, of dense parameters too (those of at least 4096 elements), and an 8-bit basis.

    Args:
        params, lr, betas, eps, weight_decay: as for `GaLoreAdamW`.
        **options: see `Options`; `scale` is 0.25 here unless given, `state_bits` 8, `basis_bits` 8 (32 where the projector stores no
            basis, and with `match_reference`).

    Memory, for an m×n matrix with D = max(m, n), d = min(m, n): 2·D·(r + 4⌈r/256⌉) bytes of moments and d·(r + 8⌈r/256⌉) of basis
    (half of the codes with `basis_bits=4`); of a dense matrix 2·m·(n + 4⌈n/256⌉).
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
        stores = projector_option(expand_shorthands(dict(options))).stores_basis
        if stores and not options.get("match_reference"):
            options.setdefault("basis_bits", 8)
        super().__init__(params, lr, betas, eps, weight_decay, **options)


class GaLoreAdafactor(LowRankOptimizer):
    """Adafactor on gradients projected to their leading singular subspace: a factored second moment of the small matrix R.

        U = R/√V / max(1, RMS(R/√V)/d),   W ← (1 − λρ) W − α lift(ρ U),   ρ = η·max(ε₂, RMS(W))

    Args:
        params: as for `GaLoreAdamW`.
        lr: learning rate η; None takes steps relative to time, min(10⁻², 1/√t) (then group["lr"] is 1.0, a multiplier).
        beta1: decay rate of a first moment; None keeps none.
        eps: (ε₁, added to R²; ε₂, the least size of weights).
        weight_decay: decoupled weight decay λ.
        clip_threshold: d, the largest root mean square of an update before the step size.
        decay_rate: the second moment's decay is 1 − t^decay_rate.
        scale_parameter: multiply the step by max(ε₂, RMS(W)).
        relative_step: None chooses by `lr`.
        warmup_init: relative steps start at 10⁻⁶·t.
        **options: see `Options`; `scale` (α) is 0.25 here unless given.

    Memory, for an m×n matrix with D = max(m, n), d = min(m, n): 4·(D + r) bytes of moments (4·D·r more with `beta1`) and 4·d·r of
    basis.

    Paper: arXiv:2403.03507; Shazeer and Stern, "Adafactor", ICML 2018, arXiv:1804.04235.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor | None = None,
        beta1: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        weight_decay: float = 0.0,
        *,
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        scale_parameter: bool = True,
        relative_step: bool | None = None,
        warmup_init: bool = False,
        **options: Unpack[Options],
    ) -> None:
        if lr is not None and relative_step:
            raise ValueError(
                f"lr is {lr!r} and relative_step is True; give lr=None for relative steps, or relative_step=False"
            )
        if lr is None and relative_step is False:
            raise ValueError("lr is None and relative_step is False; give a learning rate, or leave relative_step out")
        rule = Adafactor(beta1, eps, clip_threshold, decay_rate, scale_parameter, lr is None, warmup_init)
        options.setdefault("scale", 0.25)
        super().__init__(params, rule=rule, lr=1.0 if lr is None else lr, weight_decay=weight_decay, **options)
