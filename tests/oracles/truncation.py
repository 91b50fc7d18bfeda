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


def kernel_places(shape: tuple[int, ...], view: str, groups: int = 1, transposed: bool = False) -> list[Array]:
    """The matrices of a convolution's kernels, entry by entry: where each of their numbers stands in the flat kernels.

    shape: (a, c/groups, …) of a convolution from c to a channels, (c, a/groups, …) of a transposed one.
    """
    places = np.arange(np.prod(shape)).reshape(shape)
    matrices = []
    for part in np.split(places, groups):
        kernels = part.swapaxes(0, 1) if transposed else part  # outputs, inputs, …
        outputs, inputs, *extent = kernels.shape
        if view == "channel":
            matrices.append(part.reshape(len(part), -1))
        elif view == "filter":
            matrices += [kernels[i].reshape(inputs, -1) for i in range(outputs)]
        else:
            height, width = extent
            matrix = np.empty((inputs * height, outputs * width), dtype=int)
            for i, j, y, x in np.ndindex(outputs, inputs, height, width):
                matrix[j * height + y, i * width + x] = kernels[i, j, y, x]
            matrices.append(matrix)
    return matrices


def truncate_kernels(weight: Array, energy: float, *how: object) -> tuple[Array, int]:
    """Kernels of which each matrix is truncated, and the largest rank; `how` as of `kernel_places`."""
    flat, most = weight.flatten(), 0
    for places in kernel_places(weight.shape, *how):
        matrix = flat[places]
        most = max(most, kept(np.linalg.svd(matrix, compute_uv=False), energy))
        flat[places] = truncate(matrix, energy)[0]
    return flat.reshape(weight.shape), most


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
