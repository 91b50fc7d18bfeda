"""What the compiled backends are given alike: the numbers that stand for types and rules, and those of a step of Adam."""

import torch

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The numbers of the storage types, in csrc/cpu/ops.h and csrc/cuda/arithmetic.h."""

LION, SGD, NESTEROV, RMSPROP = range(4)
"""The numbers of the rules, in csrc/cpu/ops.h and csrc/cuda/operations.h."""


def adam_numbers(beta1: float, beta2: float, eps: float, step: float) -> tuple[float, float, float, float, float]:
    """1 − β₁, β₂, 1 − β₂, and the factor and the offset of √v in N = m / (√v·factor + offset), see `reference.adam_direct_`."""
    bc1, bc2 = 1.0 - beta1**step, 1.0 - beta2**step
    return 1.0 - beta1, beta2, 1.0 - beta2, bc1 / bc2**0.5, bc1 * eps
