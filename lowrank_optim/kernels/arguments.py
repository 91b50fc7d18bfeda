"""What operations are given besides tensors: numbers and keys as small tensors, and what compiled backends make of them."""

from functools import lru_cache

import torch
from torch import Tensor

from lowrank_optim.kernels.counter_rng import signed_key, unsigned_key
from lowrank_optim.kernels.host import cpu_tensor

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The numbers of the storage types, in csrc/cpu/ops.h and csrc/cuda/arithmetic.h."""

LION, SGD, NESTEROV, RMSPROP = range(4)
"""The numbers of the rules, in csrc/cpu/ops.h and csrc/cuda/operations.h."""


def storable(*tensors: Tensor | None) -> bool:
    """Whether compiled backends take the types of these tensors; not float64."""
    return all(tensor is None or tensor.dtype in TYPES for tensor in tensors)


def all_float32(*tensors: Tensor | None) -> bool:
    return all(tensor is None or tensor.dtype == torch.float32 for tensor in tensors)


def adam_numbers(beta1: float, beta2: float, eps: float, step: float) -> tuple[float, float, float, float, float]:
    """1 − β₁, β₂, 1 − β₂, and the factor and the offset of √v in N = m / (√v·factor + offset), see `reference.adam_direct_`."""
    bc1, bc2 = 1.0 - beta1**step, 1.0 - beta2**step
    return 1.0 - beta1, beta2, 1.0 - beta2, bc1 / bc2**0.5, bc1 * eps


def pack_scalars(*values: float) -> Tensor:
    """The `scalars` of an operation, which none changes: parameters of one step share them."""
    if torch._C._len_torch_dispatch_stack():  # a mode may make tensors of its own
        return cpu_tensor(values, torch.float64)
    return _pack_scalars(values)


@lru_cache(maxsize=64)
def _pack_scalars(values: tuple[float, ...]) -> Tensor:
    return cpu_tensor(values, torch.float64)


def pack_key(key: int | None, *more: int) -> Tensor | None:
    """The `noise` or `rounding` of an operation; the key's 64 bits as a signed integer. None without a key."""
    if key is None:
        return None
    return cpu_tensor((signed_key(key), *more), torch.int64)


def unpack_key(words: Tensor | None) -> tuple[int | None, list[int]]:
    """The inverse of `pack_key`."""
    if words is None:
        return None, [0, 0]
    key, *more = words.tolist()
    return unsigned_key(key), more
