"""Initial values of adapters from gradients or weights of the layers that they belong to: LoRA-SB and LoRA-XS."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_optim.adapters.layers import Factors, base_of, linear_factors

INITS = ("sign", "gradient", "weight")

XS_DEVIATION = 1e-5
"""Of the elements of LoRA-XS's first R."""


def lora_sb_(
    model: nn.Module,
    gradients: Mapping[str, Tensor] | Callable[[], Tensor] | None = None,
    eta: float | None = None,
    *,
    init: str = "sign",
    adapter: str | None = None,
    seed: int = 0,
) -> dict[Tensor, Tensor]:
    """Give the adapters of linear layers the initial values of LoRA-SB or LoRA-XS, in place, and return the fixed bases B₀.

        D ≈ U Σ Vᵀ (rank r):   A ← Vᵀ,   B₀ = U,   B ← B₀ Σ/s          D = −η sign(G) or −η G        LoRA-SB
        W₀ ≈ U Σ Vᵀ (rank r):  A ← Vᵀ,   B₀ = UΣ,  B ← B₀ R,  R ~ N(0, 10⁻¹⁰)                         LoRA-XS

    G is the gradient of the weights of the layer. LoRA-SB begins with the best approximation of the first step of full fine-tuning:
    the model changes, by s B A = UΣVᵀ. Give the bases to `lo.LoRASBAdamW`; the adapters stay ordinary ones.

    Args:
        model: with adapters of peft.
        gradients: a function that returns the mean loss of some 50 samples or more, without calling backward; its gradients are taken
            layer by layer, so that there is never more than one. Or G (m×n) by the name of the adapter's layer, needed for quantised
            layers. Not used with init="weight".
        eta: η, the learning rate of the first step: that of the run over its warm-up steps. Not used with init="weight".
        init: "sign" (the paper's LoRA-SB, of Adam's first step), "gradient" (of descent), or "weight" (LoRA-XS).
        adapter: only this one; None takes all.
        seed: of LoRA-XS's R.

    Returns:
        B₀ (m×r, float32 or float64) by the parameter B.

    Raises:
        ValueError: no adapters; a layer that is not linear; a gradient that is missing, not finite, of another shape or of a rank
            below r (zero, say); η out of range. Nothing was changed.

    Memory: one gradient of a layer's weights and its singular value decomposition at a time, and r(m+n) numbers of each layer.

    Paper: Ponkshe et al., "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank
    Fine-Tuning", 2024, arXiv:2411.19557; Bałazy et al., "LoRA-XS", 2024, arXiv:2405.17604.
    """
    layers = linear_factors(model, adapter, "can have no initial values of LoRA-SB")
    _check(gradients, eta, init)
    if init == "weight":
        found = {each.path: _factors(each, _upright(each, _weight(each).detach()), 1.0) for each in layers}
    elif isinstance(gradients, Mapping):
        found = {each.path: _step(each, _given(each, gradients), init, eta) for each in layers}
    else:
        assert gradients is not None
        found = _measured(model, layers, gradients, lambda each, grad: _step(each, grad, init, eta))
    generator = torch.Generator().manual_seed(seed)
    bases = {}
    with torch.no_grad():
        for each in layers:
            left, values, right = found[each.path]
            if init == "weight":
                left = left * values
                core = XS_DEVIATION * torch.randn(len(values), len(values), generator=generator).to(left)
            else:
                core = torch.diag(values / each.scaling)
            each.a.copy_(right)
            each.b.copy_(left @ core)
            bases[each.b] = left
    return bases


Triple = tuple[Tensor, Tensor, Tensor]


def _check(gradients: Any, eta: float | None, init: str) -> None:
    if init not in INITS:
        raise ValueError(f"init is {init!r}; valid values are {', '.join(map(repr, INITS))}")
    if init == "weight":
        return
    if gradients is None:
        raise ValueError(
            f"init={init!r} needs gradients: a function that returns a loss, or a mapping from layers to them"
        )
    if eta is None or not 0.0 < float(eta) < float("inf"):
        raise ValueError(f"eta is {eta!r}; it must be a positive number, the learning rate of the first step")


def _weight(each: Factors) -> nn.Parameter:
    weight = base_of(each.layer).weight
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        raise ValueError(
            f"the weights of {each.path} are quantised; give gradients as a mapping, by the names of layers"
        )
    return weight


def _upright(each: Factors, matrix: Tensor) -> Tensor:
    """As m×n; some layers keep the transpose."""
    return matrix.mT if getattr(each.layer, "fan_in_fan_out", False) else matrix


def _given(each: Factors, gradients: Mapping[str, Tensor]) -> Tensor:
    if each.path not in gradients:
        raise ValueError(
            f"there is no gradient for {each.path}; the mapping has {', '.join(list(gradients)[:5]) or 'none'}"
        )
    return gradients[each.path]


def _step(each: Factors, grad: Tensor, init: str, eta: float | None) -> Triple:
    """U, Σ, Vᵀ of the first step."""
    assert eta is not None
    if grad.shape != (each.b.shape[0], each.a.shape[1]):
        raise ValueError(
            f"the gradient of {each.path} is {tuple(grad.shape)}, and the layer {(each.b.shape[0], each.a.shape[1])}"
        )
    if not bool(torch.isfinite(grad).all()):
        raise ValueError(f"the gradient of {each.path} holds NaN or infinity")
    return _factors(each, grad.sign() if init == "sign" else grad, -float(eta))


@torch.no_grad()
def _factors(each: Factors, matrix: Tensor, factor: float) -> Triple:
    """The leading r singular triples of factor · matrix."""
    rank = each.a.shape[0]
    wide = matrix.to(torch.float64 if matrix.dtype == torch.float64 else torch.float32)
    left, values, right = torch.linalg.svd(factor * wide, full_matrices=False)
    if not bool(values[rank - 1] > max(wide.shape) * torch.finfo(wide.dtype).eps * values[0]):
        raise ValueError(
            f"the gradient or the weight of {each.path} is zero or of a rank below {rank}; use more samples, or a smaller r"
        )
    return left[:, :rank].clone(), values[:rank].clone(), right[:rank].clone()


def _measured(
    model: nn.Module, layers: list[Factors], loss: Callable[[], Tensor], use: Callable[[Factors, Tensor], Triple]
) -> dict[str, Triple]:
    """What `use` makes of each layer's gradient, in one backward pass."""
    found: dict[str, Triple] = {}
    with _watched(model, layers) as weights:

        def take(each: Factors, weight: Tensor) -> None:
            assert weight.grad is not None
            found[each.path] = use(each, _upright(each, weight.grad))
            weight.grad = None

        handles = [
            weight.register_post_accumulate_grad_hook(lambda weight, each=each: take(each, weight))
            for each, weight in zip(layers, weights, strict=True)
        ]
        try:
            with torch.enable_grad():
                loss().backward()
        finally:
            for handle in handles:
                handle.remove()
    missing = [each.path for each in layers if each.path not in found]
    if missing:
        raise ValueError(f"the loss does not depend on {', '.join(missing[:5])}, so that there is no gradient")
    return found


@contextmanager
def _watched(model: nn.Module, layers: list[Factors]) -> Iterator[list[nn.Parameter]]:
    """The weights of layers alone require gradients meanwhile; gradients that are there stay."""
    weights = [_weight(each) for each in layers]
    if len({id(weight) for weight in weights}) < len(weights):
        raise ValueError("two of the layers share their weights, whose gradient belongs to both; untie them")
    kept = [(param, param.requires_grad, param.grad) for param in model.parameters()]
    try:
        for param, _, _ in kept:
            param.grad = None
            if param.is_floating_point():
                param.requires_grad_(any(param is weight for weight in weights))
        yield weights
    finally:
        for param, needed, grad in kept:
            if param.is_floating_point():
                param.requires_grad_(needed)
            param.grad = grad
