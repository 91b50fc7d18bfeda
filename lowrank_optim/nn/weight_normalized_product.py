"""The passes of a weight-normalised layer, W = M ∘ V/‖V‖ with V = W₀ + B A, without a temporary of m×n beyond some rows of V.

With ‖V‖ and M of the columns, c = M/‖V‖ scales the inputs: z = x ∘ c, u = z Aᵀ, q = ∂y B,

    y  = z W₀ᵀ + u Bᵀ + b      ∂z = ∂y W₀ + q A      ∂x = ∂z ∘ c      ∂c = Σ_t x_t ∘ ∂z_t
    ∂M = ∂c/‖V‖                γ = −∂M ∘ M / (2‖V‖²), the derivative by ‖V‖²
    ∂B = ∂yᵀ u + 2 (V∘γ) Aᵀ    ∂A = qᵀ z + 2 Bᵀ (V∘γ)                 ∂W₀ = ∂yᵀ z + 2 V∘γ

With those of the rows, c scales the outputs: y = c ∘ y₀ + b, where y₀ = x W₀ᵀ + (x Aᵀ) Bᵀ; ∂c = Σ_t ∂y_t ∘ (y₀)_t, and the rest as
above for ∂y ∘ c in the place of ∂y and x in that of z. A norm that is taken for constant ("detached") has γ = 0.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowrank_optim.kernels import cache_elements, compute_dtype, no_autograd_no_autocast, row_chunks, token_rows
from lowrank_optim.nn.quantized_weight import QuantizedWeight

SMALLEST = 1e-12
"""Norms below this count as this, and as constant: the weights of a column of zeros stay finite, and so do its gradients."""

ACCELERATOR_ELEMENTS = 1 << 22
"""Of V at a time on accelerators, 16 MiB, where more chunks would be more launches of kernels."""


def direction_rows(base: Tensor, a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """V = W₀ + B A (m×n) in float32 or wider, some rows at a time; W₀ may be a `QuantizedWeight`."""
    wide, (m, n) = compute_dtype(a.dtype), base.shape
    elements = cache_elements(a.device) if a.device.type == "cpu" else ACCELERATOR_ELEMENTS
    right = a.to(wide)
    for rows in row_chunks(m, n, elements):
        part = base.decoded(wide, rows) if isinstance(base, QuantizedWeight) else base[rows].to(wide)
        yield rows, torch.addmm(part, b[rows].to(wide), right)


def direction_norms(base: Tensor, a: Tensor, b: Tensor, by_rows: bool) -> Tensor:
    """‖V‖ of the rows (m), or of the columns (n), in float32 or wider, at least `SMALLEST`."""
    m, n = base.shape
    squares = torch.zeros(m if by_rows else n, dtype=compute_dtype(a.dtype), device=a.device)
    for rows, part in direction_rows(base, a, b):
        if by_rows:
            squares[rows] = part.square_().sum(1)
        else:
            squares += part.square_().sum(0)
    return squares.sqrt_().clamp_min_(SMALLEST)


def merged_weight(base: Tensor, a: Tensor, b: Tensor, magnitude: Tensor, by_rows: bool) -> Tensor:
    """M ∘ V/‖V‖, computed in float32 or wider and rounded once."""
    norms = direction_norms(base, a, b, by_rows)
    scale = magnitude.to(norms.dtype) / norms
    weight = torch.empty(base.shape, dtype=a.dtype, device=a.device)
    for rows, part in direction_rows(base, a, b):
        weight[rows] = (part.mul_(scale[rows].unsqueeze(1)) if by_rows else part.mul_(scale)).to(a.dtype)
    return weight


class WeightNormalizedProduct(torch.autograd.Function):
    """apply(x, W₀, A, B, M, b, whether M is of the rows, whether the norm is detached, compute type, result type); b may be None.

    Saved: x, the parameters and the norms; for rows, also y₀ if something is trained that needs it.
    """

    @staticmethod
    @no_autograd_no_autocast
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor,
        bias: Tensor | None,
        by_rows: bool,
        detach_norm: bool,
        compute: torch.dtype,
        result: torch.dtype,
    ) -> Tensor:
        norms = direction_norms(base, a, b, by_rows)
        scale = (magnitude.to(norms.dtype) / norms).to(compute)
        tokens = x.to(compute)
        z = tokens if by_rows else tokens * scale
        y = z @ _whole(base, compute).mT
        token_rows(y).addmm_(token_rows(z) @ a.to(compute).mT, b.to(compute).mT)
        need_base, need_a, need_b, need_m = ctx.needs_input_grad[1:5]
        need_norm = not detach_norm and (need_base or need_a or need_b)
        before = y if by_rows and (need_m or need_norm) else None
        ctx.save_for_backward(x, base, a, b, magnitude, bias, norms, before)
        ctx.by_rows, ctx.detach_norm, ctx.compute = by_rows, detach_norm, compute
        if by_rows:
            y = y * scale
        return (y if bias is None else y + bias.to(compute)).to(result)

    @staticmethod
    @once_differentiable
    @no_autograd_no_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, base, a, b, magnitude, bias, norms, before = ctx.saved_tensors
        compute, wide, by_rows = ctx.compute, norms.dtype, ctx.by_rows
        need_x, need_base, need_a, need_b, need_m, need_bias = ctx.needs_input_grad[:6]
        need_norm = not ctx.detach_norm and (need_base or need_a or need_b)
        g, tokens = token_rows(grad).to(compute), token_rows(x).to(compute)
        scale = (magnitude.to(wide) / norms).to(compute)
        outer, z = (g * scale, tokens) if by_rows else (g, tokens * scale)
        right, left = a.to(compute), b.to(compute)
        q = outer @ left
        grad_x: Any = None
        grad_c: Any = None
        if need_x or (not by_rows and (need_m or need_norm)):
            grad_x = torch.addmm(outer @ _whole(base, compute), q, right)
        if need_m or need_norm:
            first, second = (g, token_rows(before)) if by_rows else (tokens, grad_x)
            grad_c = (first * second).sum(0, dtype=wide)
        if grad_x is not None and not by_rows:
            grad_x = grad_x * scale
        grad_m: Any = None if grad_c is None else grad_c / norms
        grad_a = (q.mT @ z).to(wide) if need_a else None
        grad_b = outer.mT @ (z @ right.mT) if need_b else None
        grad_base = outer.mT @ z if need_base else None
        if need_norm:
            double_gamma = -grad_m * magnitude.to(wide) / norms.square()
            _add_norm_terms((base, a, b), double_gamma * (norms > SMALLEST), by_rows, grad_base, grad_a, grad_b)
        return (
            grad_x.view(x.shape).to(x.dtype) if need_x else None,
            _as(grad_base, base.dtype),
            _as(grad_a, a.dtype),
            _as(grad_b, b.dtype),
            _as(grad_m if need_m else None, magnitude.dtype),
            _as(g.sum(0, dtype=wide), bias.dtype) if need_bias else None,
            *(None,) * 4,
        )


def _add_norm_terms(
    factors: tuple[Tensor, Tensor, Tensor],
    double_gamma: Tensor,
    by_rows: bool,
    grad_base: Tensor | None,
    grad_a: Tensor | None,
    grad_b: Tensor | None,
) -> None:
    """Add what comes through the norm, 2 V∘γ and its products with the factors, to the gradients, in place."""
    _, a, b = factors
    for rows, part in direction_rows(*factors):
        part = part.mul_(double_gamma[rows].unsqueeze(1) if by_rows else double_gamma)
        if grad_base is not None:
            grad_base[rows] += part
        if grad_b is not None:
            grad_b[rows] += part @ a.to(part.dtype).mT
        if grad_a is not None:
            grad_a += b[rows].to(part.dtype).mT @ part


def _whole(base: Tensor, dtype: torch.dtype) -> Tensor:
    """W₀ as products read it: decoded, if it is stored in 8 bits."""
    return base.decoded(dtype) if isinstance(base, QuantizedWeight) else base.to(dtype)


def _as(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
