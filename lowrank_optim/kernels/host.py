"""What the host reads: tensors of counters, keys and numbers, and numbers that come as other types than Python's own."""

from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def host_tensor(values: Any, dtype: torch.dtype | None) -> Tensor:
    """`torch.tensor(values, dtype=dtype)` on the CPU, whatever the default device is (which is a mode of torch functions, too)."""
    with torch._C.DisableTorchFunction():
        return torch.tensor(values, dtype=dtype)


def as_python(value: Any, keep_tensors: bool = False) -> Any:
    """Numbers, truth values and strings of numpy and others (0-d arrays and tensors, too) as Python's own, within tuples and lists.

    `torch.load(weights_only=True)` reads no others. Whatever else it is, is handed on.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        return value if keep_tensors or value.dim() else value.item()
    if type(value) in (tuple, list):
        return type(value)(as_python(each, keep_tensors) for each in value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (Integral, Real)):
        return int(value) if isinstance(value, Integral) else float(value)
    return value.tolist() if hasattr(value, "tolist") else value
