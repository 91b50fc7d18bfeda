"""LoRA-SB: adapters of which only an r×r matrix is trained."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.groups.options import Options
from lowrank_optim.optimizers.base import Params
from lowrank_optim.optimizers.lora import LoRAOptimizer
from lowrank_optim.rules.fixed_basis import FixedBasis
from lowrank_optim.rules.pairs import matrix_of, tall
from lowrank_optim.rules.small_matrices import pseudo_inverse_root
from lowrank_optim.sharding.dtensor import dense_sharding, local
from lowrank_optim.sharding.param_sharding import LOCAL


class LoRASBAdamW(LoRAOptimizer):
    """LoRA-SB, and LoRA-XS: W = W₀ + s B₀ R A with B₀ and A fixed, and AdamW on the r×r matrix R.

        g_R = B₀ᵀ g_B,   B ← (1−ηλ) B − η B₀ N,   N: Adam's direction for g_R

    The adapter holds B = B₀R, so that it is saved, loaded and merged as any other.

        bases = lo.lora_sb_(model, loss, eta=1e-4)
        optimizer = lo.LoRASBAdamW(lo.lora_pairs(model, freeze="A"), bases=bases)

    Args:
        params: groups of `lo.lora_pairs(model, freeze="A")`.
        lr, weight_decay, adamw_lr, **options: as for `LoRAOptimizer`.
        betas, eps: of Adam.
        bases: B₀ (m×r) by the parameter B, as `lo.lora_sb_` returns them. Where there is none, it is B (BᵀB)^(−1/2), which is that of
            LoRA-SB until B is trained.

    Raises:
        ValueError: A requires a gradient; a B without a basis has linearly dependent columns (in a new adapter it is zero); a basis
            of another shape.

    Memory of a pair: 4mr + 8r² bytes.

    Paper: Ponkshe et al., "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank
    Fine-Tuning", 2024, arXiv:2411.19557; Bałazy et al., "LoRA-XS", 2024, arXiv:2405.17604.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> a, b = torch.nn.Parameter(torch.randn(4, 32)), torch.nn.Parameter(torch.randn(64, 4))
        >>> optimizer = lo.LoRASBAdamW(lo.lora_pairs([(a, b, 2.0)], freeze="A"), lr=1e-3)
        >>> {name: tuple(tensor.shape) for name, tensor in optimizer.state[b].items() if tensor.dim()}
        {'basis': (64, 4), 'core_avg': (1, 4, 4), 'core_avg_sq': (1, 4, 4)}
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bases: Mapping[Tensor, Tensor] | None = None,
        adamw_lr: float | Tensor | None = None,
        **options: Unpack[Options],
    ) -> None:
        self._bases = bases or {}
        rule = FixedBasis(betas, eps)
        super().__init__(params, rule, lr, weight_decay, adamw_lr=adamw_lr, betas=betas, eps=eps, **options)
        self._bases = {}

    def _add_param_group(self, param_group: Mapping[str, Any]) -> None:
        if not param_group.get("pairs"):
            super()._add_param_group(param_group)
            return
        params = list(param_group["params"])
        second = [each[1] if isinstance(each, tuple) else each for each in params[1::2]]
        experts = param_group.get("experts") or [1] * len(second)
        bases = {
            param: _basis(param, self._bases.get(param), count, f"B of pair {number}")
            for number, (param, count) in enumerate(zip(second, experts, strict=True))
            if param.requires_grad
        }
        super()._add_param_group({**param_group, "params": params})
        for param, basis in bases.items():
            step = self.trained(param)
            sharding = step.plan.sharding
            step.state["basis"].copy_(basis if sharding is LOCAL else sharding.reduced.part(basis))


@torch.no_grad()
def _basis(param: Tensor, given: Tensor | None, experts: int, name: str) -> Tensor:
    """B₀ as a matrix."""
    if given is not None:
        if tuple(given.shape) != tuple(param.shape):
            raise ValueError(f"the basis of {name} is {tuple(given.shape)}; it must be as B, {tuple(param.shape)}")
        return given.reshape(matrix_of(given))
    whole = dense_sharding(param).gather(local(param).detach(), *range(-param.dim(), 0))
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    form = tall(whole.reshape(matrix_of(whole)).to(dtype), False, experts)
    gram = form.mT @ form
    root = pseudo_inverse_root(gram, torch.finfo(dtype).eps)
    smallest = gram.shape[-1] * torch.finfo(dtype).eps * gram.abs().amax()
    if bool((torch.linalg.eigvalsh(gram.double()) <= smallest).any()):
        raise ValueError(
            f"{name} {tuple(param.shape)} has linearly dependent columns (it is zero in a new adapter), so that it has no basis; "
            "give it initial values by lo.lora_sb_(model, …), or pass bases="
        )
    basis = form @ root.to(dtype)
    return basis.permute(1, 2, 0).reshape(matrix_of(whole))
