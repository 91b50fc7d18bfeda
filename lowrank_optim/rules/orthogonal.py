"""The nearest matrix with orthonormal rows or columns: Newton–Schulz on the matrix, or on its Gram matrix where rows are elsewhere.

With M = U S Vᵀ:

    exact            U Vᵀ = M (MᵀM)^(−1/2), by the eigenvalues of MᵀM
    Newton–Schulz    X₀ = M/‖M‖, then X ← a X + b (XXᵀ) X + c (XXᵀ)² X: U f(S) Vᵀ with f(s) near 1, far from it for the smallest s
    on Gram          A₀ = XᵀX, P = a I + b A + c A², Q ← Q P, A ← P A P: the same polynomial, as M Q

The last two lines need of M's rows nothing but the d² numbers of MᵀM, which are a sum over the processes that hold rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    root: Tensor = (vectors * roots.unsqueeze(-2)) @ vectors.mT
    return root


def gram_dtype(inner: torch.dtype, device: torch.device) -> torch.dtype:
    """The type of Gram matrices, which square what they are of: one wider than that of the products they stand for."""
    return torch.float32 if inner == torch.bfloat16 or device.type == "mps" else torch.float64


@dataclass(frozen=True)
class Orthogonalization:
    """How a matrix is orthogonalised.

    exact: U Vᵀ by eigenvalues, in place of U f(S) Vᵀ by Newton–Schulz.
    coefficients, steps, eps: of Newton–Schulz.
    inner: the type of its products on whole matrices.
    """

    exact: bool
    coefficients: Coefficients
    steps: int
    eps: float
    inner: torch.dtype

    def __call__(self, matrix: Tensor, sharding: TensorSharding, exchange: bool = True) -> Tensor:
        """The orthogonal factor of the matrix whose local rows or columns these are.

        Sends d² numbers of the Gram matrix of the side that is not split. Where that is the longer side by much, parts of rows are
        exchanged for parts of columns, and back, so that it is the shorter one (`exchange`).
        """
        across = [dim for dim in (-2, -1) if sharding.splits(dim)]
        if not across:
            if self.exact:
                return self._by_gram(matrix, matrix.shape[-2] >= matrix.shape[-1], lambda gram: gram)
            return newton_schulz(matrix, self.coefficients, self.steps, self.eps, self.inner)
        (held,) = across
        if exchange and saves(sharding.whole_shape(matrix), held, [group.size() for group in sharding.groups(held)]):
            other = -3 - held
            parts = sharding.exchange(matrix, held, other)
            found = self._by_gram(parts, other == -2, lambda gram: sharding.sum(gram, held))
            return sharding.exchange(found, other, held)
        return self._by_gram(matrix, held == -2, lambda gram: sharding.sum(gram, held))

    def _by_gram(self, matrix: Tensor, of_columns: bool, total: Callable[[Tensor], Tensor]) -> Tensor:
        """M Q with Q from MᵀM, or Q M with Q from MMᵀ; `total` sums the Gram matrix over processes."""
        wide = matrix.to(gram_dtype(matrix.dtype if self.exact else self.inner, matrix.device))
        gram = total(wide.mT @ wide if of_columns else wide @ wide.mT)
        if self.exact:
            noise = gram.shape[-1] * torch.finfo(matrix.dtype).eps
            factor = inverse_root(gram, max(noise**2, gram.shape[-1] * torch.finfo(gram.dtype).eps))
        else:
            factor = gram_newton_schulz(gram, self.coefficients, self.steps, self.eps)
        return (wide @ factor if of_columns else factor @ wide).to(matrix.dtype)


def saves(shape: tuple[int, ...], held: int, processes: Sequence[int]) -> bool:
    """Whether to send two exchanges (4 bytes an element) and the split side's Gram matrix (8), and not that of the other side."""
    mine, other = shape[held], shape[-3 - held]
    return len(processes) == 1 and 16 * mine**2 + 8 * mine * other / processes[0] < 16 * other**2
