"""ALLoRA's scale of rows for both factors: the gradients of A and B are made from a gradient of the output whose rows are scaled."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowrank_optim.adapters.layers import Factors, base_of, linear_factors
from lowrank_optim.kernels import compute_dtype, no_autograd_no_autocast
from lowrank_optim.rules.riemannian import row_scales
from lowrank_optim.sharding.dtensor import is_sharded

FACTORS = ("AB", "A")


class RowScaling:
    """What `scale_rows_in_backward` returns; `remove()` takes the hooks away, and gradients are the ordinary ones again."""

    def __init__(self, layers: list[Factors], row_scale: float, both: bool) -> None:
        self._hooks: list[RemovableHandle] = []
        for each in layers:
            first, second = _modules(each)
            watch = _Watch(each.path, first, second, row_scale, both)
            self._hooks += [
                first.register_forward_hook(watch.after_first),
                second.register_forward_hook(watch.after_second),
            ]

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def scale_rows_in_backward(
    model: nn.Module, row_scale: float, *, adapter: str | None = None, factors: str = "AB"
) -> RowScaling:
    """Train adapters of linear layers by ALLoRA's gradients, with any optimizer: scale the rows of the gradient that reaches A and B.

        g_A = s Bᵀ diag(σ) G,   g_B = s diag(σ) G Aᵀ,   σ_i = (‖(BA)_i‖ + η⁻²)^(−1/2)

    Outputs which the adapter has hardly changed move faster. Outputs, and the gradient that is passed on to the input, stay as they
    are. The hooks make the gradients anew from the gradient of the output, so that they are exact, for A too, which no rule for
    gradients of factors can do. Accumulation, checkpointed activations, dropout, DoRA, `fully_shard` and updates in backward go on as
    before. The paper trains with s = 1 (`lora_alpha=r`) and without dropout. Adam undoes most of a scale that stays.

    Args:
        model: with adapters of peft, or layers with such attributes whose `lora_B` is given what `lora_A` gave.
        row_scale: η > 0; σ is η where the product is 0.
        adapter: only this one; None takes all.
        factors: "AB", or "A" beside an optimizer that scales the rows of B itself (`LoRAOptimizer(…, row_scale=η)`).

    Returns:
        A handle; `remove()` ends it.

    Raises:
        ValueError: no adapters; a layer that is not linear or computes otherwise, by name; an argument out of range.
        RuntimeError: the layers are scaled already. In forward: a layer that does not give to `lora_B` what `lora_A` gave, or whose
            factors are sharded (tensor parallel).

    Memory: σ (4m bytes) of each layer and forward pass, until backward.

    Paper: Huang and Balestriero, "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws", 2024, arXiv:2410.09692.
    """
    if isinstance(row_scale, bool) or not isinstance(row_scale, (int, float)) or not 0.0 < row_scale < math.inf:
        raise ValueError(f"row_scale is {row_scale!r}; it must be a positive number")
    if factors not in FACTORS:
        raise ValueError(f"factors is {factors!r}; valid values are {', '.join(map(repr, FACTORS))}")
    layers = linear_factors(model, adapter, "cannot have its rows scaled")
    for each in layers:
        _check(each)
    return RowScaling(layers, float(row_scale), factors == "AB")


def _modules(each: Factors) -> tuple[Any, Any]:
    layer: Any = each.layer
    return layer.lora_A[each.adapter], layer.lora_B[each.adapter]


def _check(each: Factors) -> None:
    layer: Any = each.layer
    first, second = _modules(each)
    variant = type(getattr(layer, "lora_variant", {}).get(each.adapter)).__name__
    why: str | None = None
    linear = isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    if not linear or getattr(first, "bias", None) is not None:
        why = "its factors are no linear layers, or A has a bias"
    elif variant != "NoneType" and not variant.startswith("Dora"):
        why = f"{variant} computes in another way"
    elif isinstance(base_of(layer), nn.MultiheadAttention):
        why = "attention merges its adapter into the weights in forward"
    if why is not None:
        raise ValueError(f"{each.path} cannot have its rows scaled: {why}; leave it out of target_modules")
    if any(isinstance(getattr(hook, "__self__", None), _Watch) for hook in second._forward_hooks.values()):
        raise RuntimeError(f"the rows of {each.path} are scaled already; call remove() on the handle first")


class _Watch:
    """The two hooks of one layer: they replace the output of `lora_B` by one that has another backward."""

    def __init__(self, path: str, first: Any, second: Any, row_scale: float, both: bool) -> None:
        self.path, self.first, self.second, self.row_scale, self.both = path, first, second, row_scale, both
        self.given: tuple[Tensor, Tensor] | None = None

    def after_first(self, module: nn.Module, args: tuple[Tensor, ...], hidden: Tensor) -> None:
        """Keep the input and the output of A until B has run."""
        self.given = (args[0], hidden) if torch.is_grad_enabled() else None

    def after_second(self, module: nn.Module, args: tuple[Tensor, ...], value: Tensor) -> Tensor | None:
        """The same output, with the gradients of ALLoRA."""
        given, self.given = self.given, None
        if not torch.is_grad_enabled():
            return None
        if given is None or given[1] is not args[0]:
            raise RuntimeError(
                f"{self.path} does not give to lora_B what lora_A gave, so that its rows cannot be scaled; call remove() on the "
                "handle"
            )
        a, b, bias = self.first.weight, self.second.weight, self.second.bias
        if is_sharded(a) or is_sharded(b):
            raise RuntimeError(f"{self.path} has sharded factors (tensor parallel), whose rows cannot be scaled")
        scales = _scales(a, b, self.row_scale)
        replaced: Tensor = _ScaledPair.apply(given[0], given[1].detach(), value.detach(), a, b, bias, scales, self.both)
        return replaced


@no_autograd_no_autocast
def _scales(a: Tensor, b: Tensor, row_scale: float) -> Tensor:
    """σ (m)."""
    wide_a, wide_b = (each.to(compute_dtype(each.dtype)) for each in (a, b))
    return row_scales(wide_b, wide_a @ wide_a.mT, row_scale).squeeze(-1)


class _ScaledPair(torch.autograd.Function):
    """B (A x) + bias, whose value is known: dx = δ B A,  g_A = (δσ B)ᵀ x,  g_B = (δσ)ᵀ (A x), rows of x and δ being tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        hidden: Tensor,
        value: Tensor,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        scales: Tensor,
        both: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, hidden, a, b, scales)
        ctx.both = both
        return value.view_as(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, a, b, scales = ctx.saved_tensors
        needs, kept = ctx.needs_input_grad, grad.dtype
        b_same, tokens = b.to(kept), grad.reshape(-1, grad.shape[-1])
        scaled = tokens * scales.to(kept)
        grad_x = grad_a = grad_b = grad_bias = None
        if needs[0]:
            grad_x = ((grad @ b_same) @ a.to(kept)).to(x.dtype)
        if needs[3]:
            grad_a = ((scaled @ b_same).mT @ x.reshape(-1, x.shape[-1]).to(kept)).to(a.dtype)
        if needs[4]:
            grad_b = ((scaled if ctx.both else tokens).mT @ hidden.reshape(-1, hidden.shape[-1]).to(kept)).to(b.dtype)
        if needs[5]:
            grad_bias = tokens.sum(0)
        return grad_x, None, None, grad_a, grad_b, grad_bias, None, None
