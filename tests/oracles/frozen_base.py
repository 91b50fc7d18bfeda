"""ΔW of the frozen-base adapters, written down once more: dense, in float64, from the weight and the trained parameters.

Singular vectors are numpy's, the LDU is elimination by hand, random bases are made entry by entry, Tucker products are one einsum.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from lowrank_optim.kernels.counter_rng import PURPOSE_FACTOR, derive_key, make_key, random_bits

Parameters = Mapping[str, Tensor]


def triplets(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U_r, σ, V_rᵀ."""
    left, values, right = np.linalg.svd(weight.numpy())
    return torch.tensor(left[:, :rank]), torch.tensor(values[:rank]), torch.tensor(right[:rank])


def svfit(weight: Tensor, p: Parameters) -> Tensor:
    left, _, right = triplets(weight, len(p["shift"]))
    return left @ torch.diag(p["shift"]) @ right


def salt(weight: Tensor, p: Parameters, s: float = 1.0) -> Tensor:
    (m, n), r = weight.shape, len(p["shift"])
    left, values, right = triplets(weight, r)
    changed = torch.diag((1 + p["scale"]) * values + p["shift"]) - torch.diag(values)
    outside_left = torch.eye(m, dtype=torch.float64) - left @ left.T
    outside_right = torch.eye(n, dtype=torch.float64) - right.T @ right
    return left @ changed @ right + s * outside_left @ p["lora_B"] @ p["lora_A"] @ outside_right


def ldu(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P L (m×k), the diagonal (k) and U (k×n) of W = P L D U, k = min(m, n)."""
    rest = weight.clone()
    m, n = weight.shape
    free = list(range(m))
    columns, pivots, rows = [], [], []
    for k in range(min(m, n)):
        chosen = max(free, key=lambda i: abs(float(rest[i, k])))
        pivot = rest[chosen, k].clone()
        column = torch.zeros(m, dtype=weight.dtype)
        column[free] = rest[free, k] / pivot
        row = rest[chosen] / pivot
        free.remove(chosen)
        rest = rest - pivot * torch.outer(column, row)
        columns.append(column)
        pivots.append(pivot)
        rows.append(row)
    return torch.stack(columns, 1), torch.stack(pivots), torch.stack(rows)


def loldu(weight: Tensor, p: Parameters) -> Tensor:
    r = len(p["shift"])
    left, _, right = ldu(weight)
    return left[:, :r] @ torch.diag(p["shift"]) @ right[:r]


def basis(key: int, number: int, shape: tuple[int, int], bound: float) -> Tensor:
    """Random basis number `number`: each entry is a signed 32-bit word, as a share of 2³¹."""
    size = shape[0] * shape[1]
    words = random_bits(key, torch.arange(number * size, (number + 1) * size)).tolist()
    entries = [bound * ((word - 2**32 if word >= 2**31 else word) / 2**31) for word in words]
    return torch.tensor(entries, dtype=torch.float64).view(shape)


def nola(weight: Tensor, p: Parameters, rank: int, s: float, seed: int = 0, position: int = 0) -> Tensor:
    (m, n), key = weight.shape, make_key(seed, position, 0, PURPOSE_FACTOR)
    a, b = p["coefficients_A"], p["coefficients_B"]
    first = sum(a[i] * basis(derive_key(key, 0), i, (rank, n), n**-0.5) for i in range(len(a)))
    second = sum(b[i] * basis(derive_key(key, 1), i, (m, rank), rank**-0.5) for i in range(len(b)))
    return s * second @ first


def tucker(weight: Tensor, p: Parameters, s: float = 1.0) -> Tensor:
    """For two sides of a kernel, with factors of their own or without."""
    core, out, into = p["core"], p["output_factor"], p["input_factor"]
    if "kernel_factor_0" not in p:
        return s * torch.einsum("opxy,ao,pb->abxy", core, out, into)
    return s * torch.einsum("opqr,ao,pb,xq,yr->abxy", core, out, into, p["kernel_factor_0"], p["kernel_factor_1"])


DENSE: dict[str, Callable[..., Tensor]] = {"svfit": svfit, "salt": salt, "loldu": loldu, "nola": nola, "tucker": tucker}
