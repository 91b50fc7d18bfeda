"""Tensors that the host reads: counters, keys, numbers."""

from typing import Any

import torch
from torch import Tensor


def host_tensor(values: Any, dtype: torch.dtype | None) -> Tensor:
    """`torch.tensor(values, dtype=dtype)` on the CPU, whatever the default device is (which is a mode of torch functions, too)."""
    with torch._C.DisableTorchFunction():
        return torch.tensor(values, dtype=dtype)
