"""The nearest matrix with orthonormal rows or columns: Newton–Schulz on the matrix, or on its Gram matrix where rows are elsewhere.

With M = U S Vᵀ:

    exact            U Vᵀ = M (MᵀM)^(−1/2), by the eigenvalues of MᵀM
    Newton–Schulz    X₀ = M/‖M‖, then X ← a X + b (XXᵀ) X + c (XXᵀ)² X: U f(S) Vᵀ with f(s) near 1, far from it for the smallest s
    on Gram          A₀ = XᵀX, P = a I + b A + c A², Q ← Q P, A ← P A P: the same polynomial, as M Q

The last two lines need of M's rows nothing but the d² numbers of MᵀM, which are a sum over the processes that hold rows.
"""

import torch
from torch import Tensor

from lowrank_optim.sharding.tensor_sharding import TensorSharding

Coefficients = tuple[float, float, float]

COEFFICIENTS: Coefficients = (3.4445, -4.7750, 2.0315)
"""Of Jordan et al. (2024): the steepest at 0 among those that keep 1 near 1."""


def newton_schulz(matrix: Tensor, coefficients: Coefficients, steps: int, eps: float, dtype: torch.dtype) -> Tensor:
    """U f(S) Vᵀ of a matrix, or of each of a stack, with products in `dtype`; of a matrix of norm below `eps`, nearly 0."""
    a, b, c = coefficients
    add = torch.addmm if matrix.dim() == 2 else torch.baddbmm
    x = matrix.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = add(x, add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrix.dtype)


def gram_newton_schulz(gram: Tensor, coefficients: Coefficients, steps: int, eps: float) -> Tensor:
    """Q with M Q = U f(S) Vᵀ, from MᵀM (or with Q M, from MMᵀ)."""
    a, b, c = coefficients
    norm = gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(0.0).sqrt().clamp_min(eps)[..., None, None]
    x, factor = gram / norm / norm, torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device) / norm
    for step in range(steps):
        step_factor = b * x + c * (x @ x)
        step_factor.diagonal(dim1=-2, dim2=-1).add_(a)
        factor = factor @ step_factor
        if step + 1 < steps:
            x = step_factor @ x @ step_factor
    return factor


def growth(coefficients: Coefficients, steps: int, dtype: torch.dtype) -> float:
    """How large a rounding error in a zero eigenvalue of the Gram matrix becomes: ‖A‖ is 1, and A ← a² A there."""
    return float(torch.finfo(dtype).eps * coefficients[0] ** (2.0 * steps))


def inverse_root(gram: Tensor, tolerance: float) -> Tensor:
    """(MᵀM)^(−1/2); eigenvalues up to `tolerance` times the largest count as 0, and so does what is not finite."""
    values, vectors = torch.linalg.eigh(gram.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
    roots = torch.where(values > tolerance * values[..., -1:], values.clamp_min(0.0).rsqrt(), 0.0)
    return (vectors * roots.unsqueeze(-2)) @ vectors.mT


def gram_dtype(inner: torch.dtype, device: torch.device) -> torch.dtype:
    """The type of Gram matrices, which square what they are of: one wider than that of the products they stand for."""
    return torch.float32 if inner == torch.bfloat16 or device.type == "mps" else torch.float64


def orthogonalize(
    matrix: Tensor,
    spread: TensorSharding,
    *,
    exact: bool,
    coefficients: Coefficients,
    steps: int,
    eps: float,
    inner: torch.dtype,
) -> Tensor:
    """U f(S) Vᵀ, or U Vᵀ where `exact`, of the matrix whose local rows or columns these are.

    Sends the Gram matrix of the side that is not split: d² numbers of 8 bytes (4 with `inner` bfloat16), in one sum.
    """
    across = [dim for dim in (-2, -1) if spread.splits(dim)]
    if not exact and not across:
        return newton_schulz(matrix, coefficients, steps, eps, inner)
    rows_add_up = across == [-2] or (not across and matrix.shape[-2] >= matrix.shape[-1])
    wide = matrix.to(gram_dtype(matrix.dtype if exact else inner, matrix.device))
    gram = wide.mT @ wide if rows_add_up else wide @ wide.mT
    if across:
        gram = spread.sum(gram, *across)
    if exact:
        noise = max(spread.whole_shape(matrix)[-2:]) * torch.finfo(matrix.dtype).eps
        factor = inverse_root(gram, max(noise**2, gram.shape[-1] * torch.finfo(gram.dtype).eps))
    else:
        factor = gram_newton_schulz(gram, coefficients, steps, eps)
    return (wide @ factor if rows_add_up else factor @ wide).to(matrix.dtype)
