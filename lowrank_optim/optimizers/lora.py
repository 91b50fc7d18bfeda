"""Optimizers for low-rank adapters: the two factors of a pair are stepped together."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.groups.options import Options
from lowrank_optim.optimizers.base import LowRankOptimizer, Params
from lowrank_optim.rules import Adam, AdamPair, AlternatingLoRA, LoRAPro, PairRule, Riemannian, Rite

PRECONDITIONERS: dict[str, type[PairRule]] = {
    "none": AdamPair,
    "riemannian": Riemannian,
    "lora_pro": LoRAPro,
    "rite": Rite,
    "altlora": AlternatingLoRA,
}
"""The rules for pairs by short name."""

_FACTS = ("pairs", "scalings", "experts")


class LoRAOptimizer(LowRankOptimizer):
    """Groups of pairs are trained by a rule for pairs, all others by AdamW.

    W = W₀ + s B A with A (r×n) and B (m×r). Build it from

        lo.LoRAOptimizer(lo.lora_pairs(model), preconditioner="riemannian")

    Args:
        params: groups, at least one of them of pairs (`lora_pairs`).
        preconditioner: "none" (AdamW on each factor), "riemannian", "lora_pro", "rite", "altlora", or such a rule with its
            hyperparameters, `lowrank_optim.rules.Riemannian(damping=1e-3)`.
        lr, weight_decay: learning rate η and decoupled weight decay λ; what size fits, the rules say.
        adamw_lr, betas, eps: of the groups that AdamW trains; `adamw_lr` is for those that name no rate, None takes `lr`.
        **options: see `Options`, and the fields of the rule.

    Raises:
        ValueError: no group has pairs; a pair of unequal ranks, or of a rank above a side of its matrix; a scaling of 0.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> a, b = torch.nn.Parameter(torch.randn(4, 32)), torch.nn.Parameter(torch.zeros(64, 4))
        >>> optimizer = lo.LoRAOptimizer(lo.lora_pairs([(a, b, 2.0)]), preconditioner="riemannian", lr=1e-3)
        >>> (2.0 * (b @ a) - 1.0).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Params,
        preconditioner: str | PairRule = "none",
        lr: float | Tensor = 1e-3,
        weight_decay: float = 1e-2,
        *,
        adamw_lr: float | Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **options: Any,
    ) -> None:
        groups = _checked_groups(params, type(self).__name__)
        if adamw_lr is not None:
            groups = [group if group.get("pairs") else {"lr": adamw_lr, **group} for group in groups]
        super().__init__(
            groups,
            rule=pair_rule(preconditioner, betas, eps),
            dense_rule=Adam(betas, eps),
            lr=lr,
            weight_decay=weight_decay,
            **options,
        )

    def _add_param_group(self, param_group: Mapping[str, Any]) -> None:
        if isinstance(param_group, dict) and param_group.get("pairs") and "rule" not in param_group:
            param_group = {**param_group, "rule": self.parts.rule.name}
        super()._add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As for every optimizer; the scalings of pairs are facts of the model, and stay as they are here."""
        kept = [{name: group[name] for name in _FACTS if name in group} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, facts in zip(self.param_groups, kept, strict=True):
            group.update(facts)
        self.plans.renew(self.param_groups)


def pair_rule(preconditioner: str | PairRule, betas: tuple[float, float], eps: float) -> PairRule:
    """The rule that a name stands for, or the rule itself.

    Raises:
        ValueError: there is none of that name.
        TypeError: another kind of rule.
    """
    if isinstance(preconditioner, PairRule):
        return preconditioner
    if not isinstance(preconditioner, str):
        raise TypeError(f"preconditioner must be a name or a rule for pairs, got {preconditioner!r}")
    if preconditioner not in PRECONDITIONERS:
        raise ValueError(
            f"preconditioner is {preconditioner!r}; valid values are {', '.join(map(repr, PRECONDITIONERS))}"
        )
    kind = PRECONDITIONERS[preconditioner]
    return kind() if kind is AlternatingLoRA else kind(betas=betas, eps=eps)  # type: ignore[call-arg]


def _checked_groups(params: Any, optimizer: str) -> list[dict[str, Any]]:
    groups: list[Any] = [params] if isinstance(params, Tensor) else list(params)
    if not all(isinstance(group, dict) for group in groups) or not any(group.get("pairs") for group in groups):
        raise ValueError(
            f"no group says which parameters are pairs: {optimizer}(lo.lora_pairs(model)) finds those of peft, and "
            f"{optimizer}(lo.lora_pairs([(A, B, s), …])) takes your own"
        )
    return groups


class LoRARiteAdamW(LoRAOptimizer):
    """LoRA-RITE: Adam for pairs whose steps do not depend on how a matrix was split into B and A.

        U = g K^(−1/2),   V ← β̃₂V + (1−β̃₂)UᵀU/d,   M ← β̃₁M + (1−β̃₁)U V^(−1/2),   step −η M K^(−1/2)

    for each factor, with K the Gram matrix of the other one; `lowrank_optim.rules.Rite` has the details. The scale of the gradient
    and s do not matter. The size of a step is that of Adam's divided by the size of the other factor: begin with a rate ten times
    smaller than AdamW's (1e-4 to 2e-3 are usual). Gradients of rank one move the factors, which the released code leaves in silence;
    there is no clipping and no skipping of large updates. Clip by `torch.nn.utils.clip_grad_norm_` if needed.

    Weights that something else changes between two steps (an average swapped in, say) are taken as they are, with the moments in the
    same coordinates. For float32 factors on a CPU that is seen, and warned of once.

    Args:
        params, lr, weight_decay, adamw_lr, **options: as for `LoRAOptimizer`.
        betas, eps: β₁, β₂; ε of the roots of V. AdamW takes the same.
        escape: keep a floor for what changes of coordinates lose of V.

    Memory of a pair: 4r(m+n) + 8r² bytes, half of AdamW's 8r(m+n).

    Paper: Yen et al., "LoRA Done RITE: Robust Invariant Transformation Equilibration for LoRA Optimization", ICLR 2025,
    arXiv:2410.20625.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> a, b = torch.nn.Parameter(torch.randn(4, 32)), torch.nn.Parameter(torch.zeros(64, 4))
        >>> optimizer = lo.LoRARiteAdamW(lo.lora_pairs([(a, b, 2.0)]), lr=1e-3)
        >>> optimizer.state[a]["exp_avg"].shape, optimizer.state[a]["exp_avg_gram"].shape
        (torch.Size([4, 32]), torch.Size([1, 4, 4]))
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        *,
        escape: bool = False,
        adamw_lr: float | Tensor | None = None,
        **options: Unpack[Options],
    ) -> None:
        rule = Rite(betas, eps, escape)
        super().__init__(params, rule, lr, weight_decay, adamw_lr=adamw_lr, betas=betas, eps=eps, **options)


class LoRAProAdamW(LoRAOptimizer):
    """LoRA-Pro: the pair moves so that its product follows the gradient of the whole matrix as nearly as it can.

        γ_A = K⁺g_A/s² + X A,   γ_B = (I − B K⁺Bᵀ) g_B M⁺/s² − B X

    `lowrank_optim.rules.LoRAPro` has the details. Rates are those of full fine-tuning (2e-5 to 1e-4 with Adam's moments). Where a
    factor is frozen the other is stepped alone; with A frozen and `moments="factors"` that is LoRA-FA.

    Args:
        params, lr, weight_decay, adamw_lr, **options: as for `LoRAOptimizer`.
        moments: "none": gradient descent, without state. "full": the paper's, moments of the size of the whole matrix, which save
            nothing over full fine-tuning. "factors": moments of the factors.
        betas, eps: of Adam's moments.

    Memory of a pair: none; 8mn bytes with "full"; 8r(m+n) with "factors" (8rm where A is frozen).

    Paper: Wang et al., "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", ICLR 2025, arXiv:2407.18242; Zhang et al., "LoRA-FA",
    2023, arXiv:2308.03303.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        moments: str = "full",
        adamw_lr: float | Tensor | None = None,
        **options: Unpack[Options],
    ) -> None:
        rule = LoRAPro(betas, eps, moments)
        super().__init__(params, rule, lr, weight_decay, adamw_lr=adamw_lr, betas=betas, eps=eps, **options)


class AltLoRA(LoRAOptimizer):
    """AltLoRA: one factor at a time, along the projected gradient of the whole matrix, with momentum.

        M_B ← βM_B + (1−β) g_B M⁺/s²,   B ← B − η M_B/(1−β^k)   at odd steps, A likewise at even ones

    `lowrank_optim.rules.AlternatingLoRA` has the details. Rates are those of full fine-tuning by gradient descent with momentum.
    Learning-rate schedules act, which they do not in the released code.

    Args:
        params, lr, weight_decay, adamw_lr, **options: as for `LoRAOptimizer`.
        beta1: β.
        second_moment: AltLoRA+, which divides by the root of running squares, as Adam does. Rates are Adam's then, and the product
            depends on the choice of the factors.
        betas, eps: of the groups that AdamW trains; betas[1] and eps are those of the second moment, too.

    Memory of a pair: 4r(m+n) bytes, 8r(m+n) with `second_moment`.

    Paper: Yu et al., "AltLoRA: Towards Better Gradient Approximation in Low-Rank Adaptation with Alternating Projections",
    NeurIPS 2025, arXiv:2505.12455.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        beta1: float = 0.9,
        weight_decay: float = 0.0,
        *,
        second_moment: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adamw_lr: float | Tensor | None = None,
        **options: Unpack[Options],
    ) -> None:
        rule = AlternatingLoRA(beta1, second_moment, betas[1], eps)
        super().__init__(params, rule, lr, weight_decay, adamw_lr=adamw_lr, betas=betas, eps=eps, **options)


class RiemannianAdamW(LoRAOptimizer):
    """Adam on gradients that are scaled by the inverse Gram matrix of the other factor.

        g_A ← (K + δI)⁻¹ g_A,   g_B ← g_B (M + δI)⁻¹,   K = BᵀB, M = AAᵀ

    Args:
        params, lr, weight_decay, adamw_lr, **options: as for `LoRAOptimizer`.
        betas, eps: of Adam.
        damping: δ, times tr(K)/r (tr(M)/r).
        absolute_damping: δ is `damping` itself, as in peft.

    Memory of a pair: 8r(m+n) bytes.

    Paper: Zhang and Pilanci, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models", ICML 2024, arXiv:2402.02347.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        damping: float = 1e-2,
        absolute_damping: bool = False,
        adamw_lr: float | Tensor | None = None,
        **options: Unpack[Options],
    ) -> None:
        rule = Riemannian(betas, eps, damping=damping, absolute_damping=absolute_damping)
        super().__init__(params, rule, lr, weight_decay, adamw_lr=adamw_lr, betas=betas, eps=eps, **options)
