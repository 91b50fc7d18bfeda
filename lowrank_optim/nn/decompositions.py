"""Closed-form decompositions of matrices: the best of a rank, for the matrix itself or for the outputs that data gives.

For a matrix D (m×n) and inputs x with second moment H = E[x xᵀ] (or their covariance), the best rank-r map in the place of x ↦ D x,
in the mean square over the data, is the projection of the outputs on the r leading eigenvectors U of D H Dᵀ: B A = U (Uᵀ D), with
error Σ_{k>r} λ_k. No inverse and no root of H stands in it, so that H may be singular.

All in float64 on a CPU, float32 elsewhere.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def widened(tensor: Tensor) -> Tensor:
    """In the type that decompositions are computed in."""
    return tensor.detach().to(torch.float64 if tensor.device.type == "cpu" else torch.float32)


def best_of_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(U Σ^½, Σ^½ Vᵀ) of the leading singular triplets."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    roots = values[:rank].sqrt()
    return left[:, :rank] * roots, roots.unsqueeze(1) * right[:rank]


def leading_triplets(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U_r, σ_1 … σ_r, V_rᵀ) of a weight.

    Raises:
        ValueError: it is not finite.
    """
    left, values, right = torch.linalg.svd(_finite(weight), full_matrices=False)
    return left[:, :rank], values[:rank], right[:rank]


def leading_ldu(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(P L_r, the first r pivots, U_r) of W = P L D U: columns of L (m×r), rows of U (r×n), P from partial pivoting.

    Raises:
        ValueError: the weight is not finite, or has a pivot of 0 among the first r.
    """
    matrix = _finite(weight)
    packed, swaps = torch.linalg.lu_factor(matrix)
    pivots = packed.diagonal()[:rank].clone()
    usable = pivots.abs() > max(matrix.shape) * torch.finfo(matrix.dtype).eps * pivots.abs().amax()
    if not matrix.is_meta and not bool(usable.all()):
        number = int(usable.logical_not().nonzero()[0]) + 1
        raise ValueError(
            f"pivot {number} of the weight is 0 to rounding, and rows of U from there on are not finite; take a rank below {number}, "
            "or another method"
        )
    lower = packed[:, :rank].tril(-1)
    lower.diagonal().fill_(1)
    permutation = torch.lu_unpack(packed, swaps, unpack_data=False)[0]
    return lower[permutation.argmax(1)], pivots, packed[:rank].triu() / pivots.unsqueeze(1)


def _finite(weight: Tensor) -> Tensor:
    """A weight in the type of decompositions, if it is finite."""
    if not weight.is_meta and not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight is not finite, and has no decomposition")
    return widened(weight)


def principal_axes(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first and none below zero, and eigenvectors (columns) of a symmetric matrix."""
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def output_axes(matrix: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of D H Dᵀ, those that may differ from zero: min(m, n) of them, largest first.

    Of a matrix with more rows than columns they are left singular vectors of D F for H = F Fᵀ, which costs n²·m and not m³.
    """
    m, n = matrix.shape
    if m <= n:
        return principal_axes(matrix @ moment @ matrix.mT)
    values, vectors = principal_axes(moment)
    left, singular, _ = torch.linalg.svd(matrix @ (vectors * values.sqrt()), full_matrices=False)
    return singular.square(), left


def project_outputs(matrix: Tensor, axes: Tensor) -> tuple[Tensor, Tensor]:
    """(B, A) = (U, Uᵀ D) for orthonormal columns U (m×r)."""
    return axes, axes.mT @ matrix


def rank_for_energy(values: Tensor, energy: float) -> int:
    """The smallest rank, at least 1, whose leading values have at least this share of the sum."""
    sums = values.cumsum(0)
    return min(count(sums < energy * sums[-1] * (1 - 1e-12)) + 1, len(values))


def count(mask: Tensor) -> int:
    """How many elements are true; the host waits for them. A plan, whose tensors have no numbers, goes on with the most."""
    return len(mask.nonzero())


def nuclear_subgradient(
    matrix: Tensor, ranks: Sequence[int] | None = None, precision: torch.dtype | None = None
) -> Tensor:
    """U Vᵀ of the singular triplets with σ > 0: the smallest of the subgradients of ‖M‖_* (0 for M = 0), in the matrix's type.

    Args:
        matrix: (…, m, n).
        ranks: of a stack (N, m, n), at most how many triplets each matrix has.
        precision: the type that the numbers were stored in, whose rounding leaves values that stand for 0.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    rounding = torch.finfo(matrix.dtype).eps * max(matrix.shape[-2:])
    if precision is not None:
        rounding = max(rounding, torch.finfo(precision).eps)
    taken = values > values[..., :1] * rounding
    most = values.shape[-1]
    if ranks is not None:
        taken &= leading(ranks, values)
        most = max(ranks)
    left = left[..., :most] * taken[..., :most].to(matrix.dtype).unsqueeze(-2)
    product: Tensor = left @ right[..., :most, :]
    return product


def leading(ranks: Sequence[int], values: Tensor) -> Tensor:
    """Which of the singular values (N, d) are among the first k of their row, for N numbers k."""
    places = torch.arange(values.shape[-1], device=values.device)
    return places < torch.tensor(ranks, device=values.device).unsqueeze(-1)
