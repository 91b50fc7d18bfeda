"""Low-rank decompositions in float64, written from their definitions: regressions and whitened SVDs, where the package projects.

Also the matrices in closed form that golden numbers belong to.
"""

import torch
from torch import Tensor

F64 = torch.float64


def closed_form_weight(rows: int, cols: int) -> Tensor:
    """W[i, j] = cos(i + 2j + 0.3ij)."""
    i, j = torch.arange(rows, dtype=F64).unsqueeze(1), torch.arange(cols, dtype=F64)
    return torch.cos(i + 2 * j + 0.3 * i * j)


def closed_form_inputs(rows: int = 12, cols: int = 8) -> Tensor:
    """X[t, j] = sin(0.37 (t + 1)(j + 2))."""
    t, j = torch.arange(rows, dtype=F64).unsqueeze(1), torch.arange(cols, dtype=F64)
    return torch.sin(0.37 * (t + 1) * (j + 2))


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """The best matrix of a rank: projection on eigenvectors of the smaller Gram matrix."""
    if matrix.shape[0] < matrix.shape[1]:
        return truncated(matrix.mT, rank).mT
    vectors = torch.linalg.eigh(matrix.mT @ matrix).eigenvectors[:, -rank:]
    return matrix @ vectors @ vectors.mT


def best_affine_of_rank(inputs: Tensor, outputs: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(M, c) of reduced-rank regression: the affine map of a rank with the least squares, where inputs have full rank.

    The fitted values of ordinary least squares, cut to their leading right singular vectors.
    """
    ones = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=F64)], 1)
    fitted = ones @ torch.linalg.lstsq(ones, outputs).solution
    mean = fitted.mean(0)
    right = torch.linalg.svd(fitted - mean, full_matrices=False).Vh[:rank]
    slope = torch.linalg.lstsq(inputs - inputs.mean(0), (fitted - mean) @ right.mT @ right).solution.mT
    return slope, mean - slope @ inputs.mean(0)


def eora_pair(lost: Tensor, inputs: Tensor, rank: int) -> Tensor:
    """B A as the paper of EoRA has it: Δ times a root of E[x xᵀ], its SVD, and the inverse of the root; H must be regular."""
    values, vectors = torch.linalg.eigh(inputs.mT @ inputs / len(inputs))
    root = vectors * values.sqrt()
    return truncated(lost @ root, rank) @ torch.linalg.inv(root)


def mean_square(matrix: Tensor, inputs: Tensor) -> float:
    """E‖M x‖² over the rows."""
    return (inputs @ matrix.mT).square().sum(1).mean().item()
