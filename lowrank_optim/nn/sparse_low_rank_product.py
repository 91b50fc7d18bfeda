"""y = x Wᵀ + b for W = s·B A + S, forward and backward, in row tiles: neither W nor its gradient is ever made.

With x (N×n), A (r×n), B (m×r), S on a fixed support with values v, u = s·x Aᵀ and q = s·∂y B (both N×r):

    y  = u Bᵀ + x Sᵀ + b        ∂x = q A + ∂y S         ∂B = ∂yᵀ u        ∂A = qᵀ x
    ∂v_k = Σ_t ∂y[t, i_k] x[t, j_k]                     ∂b = Σ_t ∂y_t     ∂s = Σ_t ⟨(∂y B)_t, (x Aᵀ)_t⟩

For a slice T of rows, S_T is filled from v, and ∂v is read from Γ_T = (∂y_T)ᵀ x. Saved for backward: x and the parameters.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowrank_optim.kernels import no_autograd_no_autocast
from lowrank_optim.nn.supports import ColumnSupport, Support, Tile


class SparseLowRankProduct(torch.autograd.Function):
    """apply(x, A, B, v, b, θ, s, support, compute type, result type); A with B, v, b, θ may be None. With a θ, s = tanh θ."""

    @staticmethod
    @no_autograd_no_autocast
    def forward(
        ctx: Any,
        x: Tensor,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        values: Tensor | None,
        bias: Tensor | None,
        theta: Tensor | None,
        scale: float,
        support: Support | None,
        compute: torch.dtype,
        result: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, lora_a, lora_b, values, bias, theta)
        ctx.scale, ctx.support, ctx.compute = scale, support, compute
        tokens = _rows(x, compute)
        a, b, v, offset = (None if p is None else p.to(compute) for p in (lora_a, lora_b, values, bias))
        size = _size(lora_b, support)
        # Made in its final shape: what a custom function returns as a view cannot be changed in place.
        out = tokens.new_empty((*x.shape[:-1], size))
        y = out.view(len(tokens), size)
        if a is not None and b is not None:
            u = (tokens @ a.mT).mul_(_scale(theta, scale, compute))
            if offset is None:
                torch.mm(u, b.mT, out=y)
            else:
                torch.addmm(offset, u, b.mT, out=y)
        else:
            y.zero_() if offset is None else y.copy_(offset)
        if v is not None and support is not None:
            if isinstance(support, ColumnSupport):
                y.addmm_(tokens[:, support.columns], v.view(size, -1).mT)
            else:
                for tile in support.tiles(x.device):
                    y[:, tile.rows].addmm_(tokens, _fill(tile, v, support.cols).mT)
        return out.to(result)

    @staticmethod
    @once_differentiable
    @no_autograd_no_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_a, lora_b, values, bias, theta = ctx.saved_tensors
        compute, support = ctx.compute, ctx.support
        need_x, need_a, need_b, need_v, need_bias, need_theta = ctx.needs_input_grad[:6]
        tokens, g = _rows(x, compute), _rows(grad, compute)
        grad_x = grad_a = grad_b = grad_v = grad_theta = None
        if lora_a is not None:
            a, b, s = lora_a.to(compute), lora_b.to(compute), _scale(theta, ctx.scale, compute)
            if need_x or need_a or need_theta:
                q = g @ b
            if need_b or need_theta:
                u = tokens @ a.mT
            if need_theta:  # ∂θ = (1 − s²) ∂s
                exact = torch.tanh(theta.to(_sums(compute)))
                inner = (q.to(exact.dtype) * u.to(exact.dtype)).sum()
                grad_theta = (inner * (1 - exact * exact)).to(theta.dtype)
            if need_b:
                grad_b = (g.mT @ u.mul_(s)).to(lora_b.dtype)
            if need_x or need_a:
                q.mul_(s)
            if need_a:
                grad_a = (q.mT @ tokens).to(lora_a.dtype)
            if need_x:
                grad_x = (q @ a).to(_sums(compute))
        if need_x and grad_x is None:
            grad_x = tokens.new_zeros(tokens.shape, dtype=_sums(compute))
        if values is not None:
            grad_v = torch.empty_like(values) if need_v else None
            _sparse_backward(support, values.to(compute), tokens, g, grad_x, grad_v)
        grad_bias = g.sum(0, dtype=_sums(compute)).to(bias.dtype) if need_bias else None
        if grad_x is not None:
            grad_x = grad_x.view(x.shape).to(x.dtype)
        return grad_x, grad_a, grad_b, grad_v, grad_bias, grad_theta, None, None, None, None


def _sparse_backward(
    support: Support, values: Tensor, x: Tensor, grad: Tensor, grad_x: Tensor | None, grad_v: Tensor | None
) -> None:
    """Adds ∂y S to `grad_x` and writes ∂v to `grad_v`, where they are wanted.

    Many tiles add up in `grad_x`, which is float32 for 16-bit types.
    """
    if isinstance(support, ColumnSupport):
        if grad_x is not None:
            grad_x.index_add_(1, support.columns, (grad @ values.view(support.rows, -1)).to(grad_x.dtype))
        if grad_v is not None:
            grad_v.view(support.rows, -1).copy_(grad.mT @ x[:, support.columns])
        return
    if grad_x is None and grad_v is None:
        return
    for tile in support.tiles(x.device):
        part = grad[:, tile.rows]
        if grad_x is not None:
            matrix = _fill(tile, values, support.cols)
            if grad_x.dtype == part.dtype:
                grad_x.addmm_(part, matrix)
            else:
                grad_x.add_(part @ matrix)
        if grad_v is not None:
            grad_v[tile.values] = (part.mT @ x).view(-1)[tile.places].to(grad_v.dtype)


def _fill(tile: Tile, values: Tensor, cols: int) -> Tensor:
    """S_T, |T|×n."""
    rows = tile.rows.stop - tile.rows.start
    matrix = values.new_zeros(rows * cols).scatter_(0, tile.places, values[tile.values])
    return matrix.view(rows, cols)


def _size(lora_b: Tensor | None, support: Support | None) -> int:
    """m."""
    if lora_b is not None:
        return lora_b.shape[0]
    assert support is not None  # a layer has factors or values
    return support.rows


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """N×n, in the compute type."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(dtype)


def _scale(theta: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor | float:
    return scale if theta is None else torch.tanh(theta.to(_sums(dtype))).to(dtype)


def _sums(dtype: torch.dtype) -> torch.dtype:
    """The type in which parts are added up."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
