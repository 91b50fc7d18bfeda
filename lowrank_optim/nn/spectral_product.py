"""y = x Wᵀ + b for W = U Σ Vᵀ, with gradients for Σ and for the vectors of some triplets; neither W nor its gradient is ever made.

Columns are in two parts, those that are trained (a) and those that are not (f). With x (N×n), P = x V, Q = ∂y U (N×d):

    y   = (P ∘ Σ) Uᵀ + b                          ∂x  = (Q ∘ Σ) Vᵀ              ∂b = Σ_t ∂y_t
    ∂Σ_i = Σ_t Q_ti P_ti          all i
    ∂u_i = ∂yᵀ P_i                ∂v_i = xᵀ Q_i    i trained

The gradients of the vectors lack the factor Σ_i of the true ones: a direction learns as fast whether its value is large or small.
`enhanced=False` keeps the factor. `tangent=True` takes the part along the vector away, which a normalisation would undo.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowrank_optim.kernels import compute_dtype, no_autograd_no_autocast, token_rows


class SpectralProduct(torch.autograd.Function):
    """apply(x, Σ, u, v, b, U, V, order, enhanced, tangent, whether to save P, compute type, result type); b may be None.

    Σ (d) is in an order of its own: entries order[:r] belong to u (m×r) and v (n×r), order[r:] to U (m×(d−r)) and V (n×(d−r)).
    """

    @staticmethod
    @no_autograd_no_autocast
    def forward(
        ctx: Any,
        x: Tensor,
        sigma: Tensor,
        u: Tensor,
        v: Tensor,
        bias: Tensor | None,
        u_frozen: Tensor,
        v_frozen: Tensor,
        order: Tensor,
        enhanced: bool,
        tangent: bool,
        save_projection: bool,
        compute: torch.dtype,
        result: torch.dtype,
    ) -> Tensor:
        tokens = token_rows(x).to(compute)
        values, values_frozen = _two_parts(sigma, order, u.shape[1], compute)
        p, p_frozen = tokens @ v.to(compute), tokens @ v_frozen.to(compute)
        y = (p * values) @ u.to(compute).mT
        y.addmm_(p_frozen * values_frozen, u_frozen.to(compute).mT)
        if bias is not None:
            y += bias.to(compute)
        kept = (p, p_frozen) if save_projection else (None, None)
        ctx.save_for_backward(x, sigma, u, v, bias, u_frozen, v_frozen, order, *kept)
        ctx.enhanced, ctx.tangent, ctx.compute = enhanced, tangent, compute
        return y.view(*x.shape[:-1], u.shape[0]).to(result)

    @staticmethod
    @once_differentiable
    @no_autograd_no_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, sigma, u, v, bias, u_frozen, v_frozen, order, p, p_frozen = ctx.saved_tensors
        compute, rank = ctx.compute, u.shape[1]
        need_x, need_sigma, need_u, need_v, need_bias = ctx.needs_input_grad[:5]
        tokens, g = token_rows(x).to(compute), token_rows(grad).to(compute)
        values, values_frozen = _two_parts(sigma, order, rank, compute)
        grad_x = grad_sigma = grad_u = grad_v = None
        q: Any = None
        q_frozen: Any = None
        if need_x or need_sigma or need_v:
            q = g @ u.to(compute)
        if need_x or need_sigma:
            q_frozen = g @ u_frozen.to(compute)
        if p is None and (need_sigma or need_u):
            p = tokens @ v.to(compute)
        if need_sigma:
            p_frozen = tokens @ v_frozen.to(compute) if p_frozen is None else p_frozen
            parts = torch.cat([_inner(q, p), _inner(q_frozen, p_frozen)])
            grad_sigma = torch.empty_like(parts).index_copy_(0, order.long(), parts).to(sigma.dtype)
        if need_u:
            grad_u = _of_vectors(g.mT @ p, u, values, ctx.enhanced, ctx.tangent)
        if need_v:
            grad_v = _of_vectors(tokens.mT @ q, v, values, ctx.enhanced, ctx.tangent)
        if need_x:
            grad_x = (q * values) @ v.to(compute).mT
            grad_x.addmm_(q_frozen * values_frozen, v_frozen.to(compute).mT)
            grad_x = grad_x.view(x.shape).to(x.dtype)
        grad_bias = g.sum(0, dtype=compute_dtype(compute)).to(bias.dtype) if need_bias else None
        return grad_x, grad_sigma, grad_u, grad_v, grad_bias, *(None,) * 8


def _two_parts(sigma: Tensor, order: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Σ of the triplets that are trained, and of the others."""
    values = sigma.index_select(0, order).to(dtype)
    return values[:rank], values[rank:]


def _inner(q: Tensor, p: Tensor) -> Tensor:
    """Σ_t Q_ti P_ti for every column i."""
    return (q * p).sum(0, dtype=compute_dtype(q.dtype))


def _of_vectors(grad: Tensor, vectors: Tensor, values: Tensor, enhanced: bool, tangent: bool) -> Tensor:
    """The gradient of unit vectors, from that of Σ_i times them over Σ_i."""
    if not enhanced:
        grad = grad * values
    if tangent:  # (I − u uᵀ) ∂u
        wide, unit = grad.to(compute_dtype(grad.dtype)), vectors.to(compute_dtype(grad.dtype))
        grad = wide - unit * (unit * wide).sum(0)
    return grad.to(vectors.dtype)
