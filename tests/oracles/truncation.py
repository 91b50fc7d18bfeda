"""Trained Rank Pruning on one matrix, in float64 with numpy."""

from collections.abc import Callable

import numpy as np

Array = np.ndarray


def kept(values: Array, energy: float) -> int:
    """The smallest k with Σ_{i≤k} σ_i² ≥ energy·Σσ_i²."""
    total, k = 0.0, 0
    while total < energy * float((values**2).sum()) * (1 - 1e-12):
        total += float(values[k] ** 2)
        k += 1
    return k


def truncate(matrix: Array, energy: float, shrinkage: float = 0.0) -> tuple[Array, Array]:
    """U_k Σ_k V_kᵀ of the matrix with singular values max(σ − shrinkage, 0), and U_k V_kᵀ."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    s = np.maximum(s - shrinkage, 0.0)
    k = kept(s, energy)
    return u[:, :k] * s[:k] @ vt[:k], u[:, :k] @ vt[:k]


def reference_sgd(
    weight: Array,
    gradient: Callable[[Array], Array],
    steps: int,
    *,
    energy: float,
    period: int,
    nuclear_weight: float,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> Array:
    """SGD with momentum; before steps 0, period, … the weight is truncated, and its nuclear subgradient added to their gradients."""
    weight, buffer = weight.astype(np.float64).copy(), None
    for step in range(steps):
        pull = np.zeros_like(weight)
        if step % period == 0:
            weight, pull = truncate(weight, energy)
        grad = gradient(weight) + nuclear_weight * pull + weight_decay * weight
        buffer = grad if buffer is None else momentum * buffer + grad
        weight = weight - lr * buffer
    return weight
