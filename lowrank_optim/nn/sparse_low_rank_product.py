"""y = x Wᵀ + b for W = s·B A + S, forward and backward: neither W nor its gradient is ever made.

With x (N×n), A (r×n), B (m×r), S on a fixed support with values v, u = x Aᵀ and q = s·∂y B (both N×r):

    y  = s·u Bᵀ + x Sᵀ + b      ∂x = q A + ∂y S         ∂B = s·∂yᵀ u      ∂A = qᵀ x
    ∂v_k = Σ_t ∂y[t, i_k] x[t, j_k]                     ∂b = Σ_t ∂y_t     ∂s = Σ_t ⟨(∂y B)_t, u_t⟩

y, ∂x and ∂v are operations (`kernels.schemas`): `sltrain_forward`, `sltrain_backward_input`, `sampled_product`. Saved for backward: x
and the parameters, and u where it is asked for; a support that a seed says is drawn anew.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowrank_optim.kernels import call, compute_dtype, low_rank, no_autograd_no_autocast, product, token_rows
from lowrank_optim.nn.supports import ColumnSupport, SeededSupport, StoredSupport, Support


class SparseLowRankProduct(torch.autograd.Function):
    """apply(x, A, B, v, b, θ, s, support, whether to save u, compute type, result type); A with B, v, b, θ may be None.

    With a θ, s = tanh θ.
    """

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
        save_projection: bool,
        compute: torch.dtype,
        result: torch.dtype,
    ) -> Tensor:
        tokens = x.to(compute)
        a, b, v, offset = (None if p is None else p.to(compute) for p in (lora_a, lora_b, values, bias))
        u = None if a is None else product(tokens, a.mT)
        ctx.save_for_backward(x, lora_a, lora_b, values, bias, theta, u if save_projection else None)
        ctx.scale, ctx.support, ctx.compute = scale, support, compute
        scaled = None if u is None else _times(u, _scale(theta, scale, compute))
        if v is not None and isinstance(support, (SeededSupport, StoredSupport)):
            y: Tensor = call("sltrain_forward", tokens, scaled, b, offset, v, *support.compressed(x.device))
        else:
            m = support.rows if lora_b is None else lora_b.shape[0]  # type: ignore[union-attr]  # there is one of both
            y = low_rank(tokens, scaled, None if b is None else b.mT, offset, m)
            if v is not None and isinstance(support, ColumnSupport):
                token_rows(y).addmm_(token_rows(tokens)[:, support.columns], v.view(support.rows, -1).mT)
        return y.to(result)

    @staticmethod
    @once_differentiable
    @no_autograd_no_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_a, lora_b, values, bias, theta, u = ctx.saved_tensors
        compute, support = ctx.compute, ctx.support
        need_x, need_a, need_b, need_v, need_bias, need_theta = ctx.needs_input_grad[:6]
        tokens, g = token_rows(x).to(compute), token_rows(grad).to(compute)
        q: Any = None
        a: Any = None
        grad_a = grad_b = grad_theta = None
        if lora_a is not None:
            a, b, s = lora_a.to(compute), lora_b.to(compute), _scale(theta, ctx.scale, compute)
            if need_x or need_a or need_theta:
                q = product(g, b)
            if need_b or need_theta:
                u = product(tokens, a.mT) if u is None else token_rows(u)
            if need_theta:  # ∂θ = (1 − s²) ∂s
                exact = torch.tanh(theta.to(compute_dtype(compute)))
                inner = (q.to(exact.dtype) * u.to(exact.dtype)).sum()
                grad_theta = (inner * (1 - exact * exact)).to(theta.dtype)
            if need_b:
                grad_b = product(g.mT, _times(u, s)).to(lora_b.dtype)
            if need_x or need_a:
                q = _times(q, s)
            if need_a:
                grad_a = product(q.mT, tokens).to(lora_a.dtype)
        grad_x, grad_v = _sparse_backward(support, values, tokens, g, q, a, need_x, need_v)
        grad_bias = g.sum(0, dtype=compute_dtype(compute)).to(bias.dtype) if need_bias else None
        if grad_x is not None:
            grad_x = grad_x.view(x.shape).to(x.dtype)
        return grad_x, grad_a, grad_b, grad_v, grad_bias, grad_theta, None, None, None, None, None


def _sparse_backward(
    support: Support | None,
    values: Tensor | None,
    x: Tensor,
    grad: Tensor,
    q: Tensor | None,
    a: Tensor | None,
    need_x: bool,
    need_v: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """∂x and ∂v, where they are wanted."""
    if values is None or support is None:
        return (product(q, a) if need_x and q is not None and a is not None else None), None
    v = values.to(x.dtype)
    grad_x = grad_v = None
    if isinstance(support, ColumnSupport):
        if need_x:
            grad_x = x.new_zeros(x.shape) if q is None or a is None else q @ a
            grad_x.index_add_(1, support.columns, grad @ v.view(support.rows, -1))
        if need_v:
            grad_v = (grad.mT @ x[:, support.columns]).view(-1)
    elif need_x or need_v:
        compressed = support.compressed(x.device)
        if need_x:
            grad_x = call("sltrain_backward_input", grad, q, a, v, *compressed, support.cols)
        if need_v:
            grad_v = call("sampled_product", grad, x, *compressed)
    return grad_x, None if grad_v is None else grad_v.to(values.dtype)


def _times(x: Tensor, scale: Tensor | float) -> Tensor:
    return x if isinstance(scale, float) and scale == 1.0 else x * scale


def _scale(theta: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor | float:
    return scale if theta is None else torch.tanh(theta.to(compute_dtype(dtype))).to(dtype)
