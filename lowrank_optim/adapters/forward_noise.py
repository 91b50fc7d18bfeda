"""LoRA-GGPO: random perturbations of the weights in forward, as large as weights and gradients are, never stored.

The noise N of a layer is a function of seed, layer and step, made block by block where it is multiplied. So all that runs forward in
one step sees the same weights W + N: micro-batches, processes, and the recomputation of checkpointed activations.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lowrank_optim.adapters.layers import Factors, base_of, columns_of, linear_factors
from lowrank_optim.kernels import compute_dtype, no_autograd_no_autocast
from lowrank_optim.kernels.compute import CHUNK_ELEMENTS, row_chunks
from lowrank_optim.kernels.counter_rng import PURPOSE_NOISE, derive_key, gaussian, make_key
from lowrank_optim.rules.small_matrices import pseudo_inverse
from lowrank_optim.sharding.dtensor import is_sharded
from lowrank_optim.step.param_plan import name_key


class ForwardNoise:
    """What `noise_in_forward` returns.

    step: the number of steps of the optimizer so far, which the noise is a function of.
    remove(): no noise from now on.
    state_dict(), load_state_dict(state): step and norms of gradients, for a resumed run with the same noise.
    """

    def __init__(self, layers: list[Factors], optimizer: Optimizer, sigma: float, beta: float, seed: int) -> None:
        self.step, self.sigma, self.beta, self.seed = 0, sigma, beta, seed
        self._layers = {each.path: _Layer(self, each) for each in layers}
        self._hooks: list[RemovableHandle] = [
            each.factors.layer.register_forward_hook(each) for each in self._layers.values()
        ]
        self._hooks.append(optimizer.register_step_pre_hook(self._before_step))

    def remove(self) -> None:
        """Take the hooks away: the model computes as without noise."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and tensors."""
        norms = {path: each.norms.clone() for path, each in self._layers.items() if each.norms is not None}
        return {"step": self.step, "norms": norms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()` of the same model.

        Raises:
            ValueError: a layer that this model does not have, or of another size; nothing was changed.
        """
        for path, norms in state["norms"].items():
            if path not in self._layers or len(norms) != self._layers[path].rows:
                raise ValueError(f"{path}: no layer of this name and of {len(norms)} outputs has noise here")
        self.step = int(state["step"])
        for path, each in self._layers.items():
            norms = state["norms"].get(path)
            each.norms = None if norms is None else norms.to(each.factors.b.device).clone()
            each.scales = None

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Look at the gradients of this step; the next one has other noise."""
        found = [each.look() for each in self._layers.values()] if self.beta else [True]
        if not any(found):
            raise RuntimeError(
                "no adapter with noise has a gradient when the optimizer steps (updates in backward free them, step(closure) makes "
                "them later), so that the noise cannot follow gradients. Use beta=0, or call remove() on the handle"
            )
        self.step += 1
        for each in self._layers.values():
            each.scales = None


def noise_in_forward(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    sigma: float = 0.03,
    beta: float = 0.01,
    adapter: str | None = None,
    seed: int = 0,
) -> ForwardNoise:
    """Train adapters of linear layers with LoRA-GGPO's noise: y + N x in place of y, as long as the model is in training mode.

        N_ij ~ N(0, 1) · (σ‖W_i‖ + β‖G_i‖²)/√n        W = W₀ + s B A, W_i and G_i rows

    N is a constant for autograd: the input gets the gradient (W + N)ᵀδ. ‖G_i‖ is that of the last step, of the projection of G that
    the gradients of the factors tell, G̃ = P_B G + (I − P_B) G P_A (zero before the first step). N is drawn anew for each step of the
    optimizer, by a generator that is a function of seed, layer and step, in blocks, forward and backward: it is never stored. All
    passes of one step have the same N, so that micro-batches and processes add up to one batch, and activations that are computed
    again (`torch.utils.checkpoint`) are the same.

    Args:
        model: with adapters of peft (quantised bases, too), or layers with such attributes and a `base_layer`.
        optimizer: any, of the factors; noise goes on with its steps.
        sigma: σ.
        beta: β; 0 leaves gradients out.
        adapter: only this one; None takes all.
        seed: of the noise; the same on all processes.

    Returns:
        A handle; `remove()` ends it. It has `state_dict` and `load_state_dict`.

    Raises:
        ValueError: no adapters; a layer that is not linear, is sharded, or has a variant such as DoRA, by name; an argument out of
            range.
        RuntimeError: a layer has noise already; updates in backward or `step(closure)` with β > 0, where no
            gradients are left, or there yet, to look at.

    Memory: 12m bytes a layer, and a block of 4 MiB at a time. Time: mn random numbers a layer in forward, and again in backward; a
    forward pass of n tokens through each base layer once, and of r tokens at each step.

    Paper: Chang et al., "LoRA-GGPO: Mitigating Double Descent in LoRA Fine-Tuning via Gradient-Guided Perturbation Optimization",
    2025, arXiv:2502.14538.
    """
    for name, value in (("sigma", sigma), ("beta", beta)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < math.inf:
            raise ValueError(f"{name} is {value!r}; it must be a finite number of at least 0")
    layers = linear_factors(model, adapter, "can have no noise in forward")
    for each in layers:
        _check(each)
    if beta and getattr(optimizer, "_in_backward", None) is not None:
        raise RuntimeError(
            "the optimizer updates in backward, which frees the gradients that the noise is to follow; use beta=0"
        )
    return ForwardNoise(layers, optimizer, float(sigma), float(beta), seed)


def _check(each: Factors) -> None:
    layer: Any = each.layer
    variant = getattr(layer, "lora_variant", {}).get(each.adapter)
    why = None
    if variant is not None:
        why = f"{type(variant).__name__} computes in another way"
    elif base_of(layer) is None or isinstance(base_of(layer), nn.MultiheadAttention):
        why = "it has no linear base_layer"
    elif is_sharded(each.a) or is_sharded(each.b):
        why = "its factors are sharded (DTensor)"
    if why is not None:
        raise ValueError(f"{each.path} can have no noise in forward: {why}; leave it out of target_modules")
    if any(isinstance(hook, _Layer) for hook in layer._forward_hooks.values()):
        raise RuntimeError(f"{each.path} has noise already; call remove() on the handle first")


class _Layer:
    """The forward hook of one layer.

    norms: ‖G̃_i‖ of the last step; None before.
    scales: what the numbers of each row are multiplied with in this step; None until they are needed.
    """

    def __init__(self, handle: ForwardNoise, factors: Factors) -> None:
        self.handle, self.factors, self.index = handle, factors, name_key(f"{factors.path}.{factors.adapter}")
        self.rows, self.cols = factors.b.shape[0], factors.a.shape[1]
        self.norms: Tensor | None = None
        self.scales: Tensor | None = None
        self._squares: Tensor | None = None

    def __call__(self, layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """The output with noise."""
        active = getattr(layer, "active_adapters", (self.factors.adapter,))
        off = getattr(layer, "disable_adapters", False) or getattr(layer, "merged", False)
        if not layer.training or off or self.factors.adapter not in active:
            return None
        if self.scales is None:
            self.scales = self._scales(args[0].dtype)
        key = make_key(self.handle.seed, self.index, self.handle.step, PURPOSE_NOISE)
        noise: Tensor = _Noise.apply(args[0].to(output.dtype), self.scales, key)
        return output + noise

    @torch.no_grad()
    def _scales(self, dtype: torch.dtype) -> Tensor:
        """(σ‖W_i‖ + β‖G_i‖²)/√n, with ‖W_i‖² = ‖W₀ᵢ‖² + 2s b_i·(W₀Aᵀ)_i + s² b_i AAᵀ b_iᵀ.

        W₀ is seen through the base layer, whatever it is stored as.
        """
        layer: Any = self.factors.layer
        base, scaling = base_of(layer), float(layer.scaling[self.factors.adapter])
        a, b = (each.detach().to(compute_dtype(each.dtype)) for each in (self.factors.a, self.factors.b))
        like = a.new_empty(0, dtype=dtype)
        if self._squares is None or any(param.requires_grad for param in base.parameters()):
            self._squares = torch.cat(
                [part.square().sum(1, keepdim=True) for part in columns_of(base, self.rows, self.cols, like)], 1
            ).sum(1)
        across = (base(a.to(dtype)) - base(like.new_zeros(1, self.cols))).to(a.dtype).mT
        squares = self._squares + scaling * (b * (2.0 * across + scaling * _twice(b, a))).sum(1)
        norms = 0.0 if self.norms is None else self.norms.square()
        return row_noise(squares.clamp_min(0.0).sqrt(), norms, self.handle.sigma, self.handle.beta, self.cols)

    def look(self) -> bool:
        """Keep ‖G̃_i‖ of the gradients that are there; False if there are none."""
        a, b = self.factors.a, self.factors.b
        if a.grad is None and b.grad is None:
            return False
        layer: Any = self.factors.layer
        new = projected_row_norms(a, b, a.grad, b.grad, float(layer.scaling[self.factors.adapter]))
        old = torch.zeros_like(new) if self.norms is None else self.norms
        self.norms = torch.where(torch.isfinite(new).all(), new, old)
        return True


@no_autograd_no_autocast
def _twice(b: Tensor, a: Tensor) -> Tensor:
    """B (A Aᵀ)."""
    return b @ (a @ a.mT)


def row_noise(weights: Tensor, gradients: Tensor | float, sigma: float, beta: float, cols: int) -> Tensor:
    """(σ‖W_i‖ + β‖G_i‖²)/√n from the norms of the rows of W and the squares of those of G."""
    return (sigma * weights + beta * gradients) / math.sqrt(cols)


@no_autograd_no_autocast
def projected_row_norms(a: Tensor, b: Tensor, grad_a: Tensor | None, grad_b: Tensor | None, scaling: float) -> Tensor:
    """‖G̃_i‖ (m) for G̃ = P_B G + (I − P_B) G P_A = B C + D A, of which only r×r products are needed.

        C = K⁺g_A/s,   D = (I − B K⁺Bᵀ) g_B M⁺/s        K = BᵀB, M = AAᵀ

    Beside a frozen factor, C = 0 and D = g_B M⁺/s, or D = 0.
    """
    dtype = compute_dtype(a.dtype)
    a, b = a.to(dtype), b.to(dtype)
    gram_a, gram_b = a @ a.mT, b.mT @ b
    inverse_a, inverse_b = (pseudo_inverse(g[None], torch.finfo(dtype).eps)[0].to(dtype) for g in (gram_a, gram_b))
    c, d = torch.zeros_like(a), torch.zeros_like(b)
    if grad_a is not None:
        c = inverse_b @ grad_a.to(dtype) / scaling
    if grad_b is not None:
        g = grad_b.to(dtype)
        g = g if grad_a is None else g - b @ (inverse_b @ (b.mT @ g))
        d = g @ inverse_a / scaling
    squares = (b @ (c @ c.mT) * b + 2.0 * (b @ (c @ a.mT)) * d + d @ gram_a * d).sum(1)
    return squares.clamp_min(0.0).sqrt()


def noise_blocks(key: int, scales: Tensor, cols: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The rows of N, block by block."""
    for number, part in enumerate(row_chunks(len(scales), cols, CHUNK_ELEMENTS)):
        block = gaussian(derive_key(key, number), (part.stop - part.start, cols), scales.device, scales.dtype)
        yield part, block.mul_(scales[part].unsqueeze(1)).to(dtype)


class _Noise(torch.autograd.Function):
    """x ↦ N x, with the gradient Nᵀδ of x; N is made twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Tensor, key: int) -> Tensor:
        ctx.save_for_backward(scales)
        ctx.key, ctx.cols = key, x.shape[-1]
        out = x.new_empty(*x.shape[:-1], len(scales))
        with torch.autocast(x.device.type, enabled=False):
            for part, block in noise_blocks(key, scales, x.shape[-1], x.dtype):
                out[..., part] = x @ block.mT
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        (scales,) = ctx.saved_tensors
        wide = compute_dtype(grad.dtype)
        total = torch.zeros(*grad.shape[:-1], ctx.cols, dtype=wide, device=grad.device)
        for part, block in noise_blocks(ctx.key, scales, ctx.cols, grad.dtype):
            total += grad[..., part] @ block
        return total.to(grad.dtype), None, None
