"""How kernels are started: on the tensor's device and torch's current stream, with fixed numbers of warps.

`launch` is the one place that calls a kernel, so that everything else can be recorded instead of run (`ahead`).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED_PROCESSORS = 8
"""How many multiprocessors the interpreter pretends to have: enough that its small matrices take the split paths too."""

Grid = tuple[int, ...]
Recorder = Callable[[Any, Grid, tuple[Any, ...], dict[str, Any]], object]

_recorder: Recorder | None = None


def record(recorder: Recorder | None) -> None:
    """Hand every launch to `recorder` (kernel, grid, arguments, options) from now on, and run none; None runs them again."""
    global _recorder
    _recorder = recorder


def launch(
    kernel: Any,
    grid: Grid,
    on: Tensor,
    *args: Any,
    warps: int = 4,
    stages: int = 3,
    fuse: bool = False,
    **constants: Any,
) -> None:
    """Start a kernel over a grid; one with no programs is not started.

    Args:
        on: the kernel runs on this tensor's device.
        warps: of 32 threads in a program.
        stages: of the software pipeline of loops.
        fuse: allow multiply-adds to be fused; the formats of `quantization` forbid it.
    """
    if 0 in grid:
        return
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fuse, **constants}
    if _recorder is not None:
        _recorder(kernel, grid, args, options)
        return
    with _device(on.device):
        kernel[grid](*args, **options)


def _device(device: torch.device) -> AbstractContextManager[object]:
    if device.type == "cuda":
        return torch.cuda.device(device)
    return torch.xpu.device(device) if device.type == "xpu" else nullcontext()


@cache
def _processors(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return INTERPRETED_PROCESSORS if device.type == "cpu" else 64


def processors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's device."""
    return _processors(tensor.device)


@cache
def _shared_kib(device: torch.device) -> int:
    if device.type != "cuda" or torch.version.hip:
        return 64
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 * 1024)) // 1024


def shared_kib(tensor: Tensor) -> int:
    """KiB of shared memory that a program may have on the tensor's device."""
    return _shared_kib(tensor.device)


def power_of_two(number: int) -> int:
    """The least power of two that is not below `number`."""
    return int(triton.next_power_of_2(max(number, 1)))


def flags(ok: Tensor | None) -> Tensor | None:
    """`ok` as a pointer that every kernel can read: bytes."""
    return None if ok is None else ok.view(torch.uint8)


def key_and_start(words: Tensor | None) -> tuple[bool, list[int]]:
    """Whether there is a key, and the integers of `noise` or `rounding` (or zeros)."""
    return (False, [0, 0, 0]) if words is None else (True, words.tolist())


def covered(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these tensors: float64 is left to the definition."""
    return all(t is None or t.dtype != torch.float64 for t in tensors)


def matrices(tensor: Tensor) -> tuple[Tensor, int] | None:
    """A (…, rows, cols) tensor as one (batch, rows, cols) view and its batch; None where the leading dimensions do not merge."""
    if tensor.dim() == 2:
        return tensor[None], 1
    if tensor.dim() == 3:
        return tensor, tensor.shape[0]
    try:
        view = tensor.view(-1, *tensor.shape[-2:])
    except RuntimeError:
        return None
    return view, view.shape[0]
