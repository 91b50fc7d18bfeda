"""Training a large model in the host's memory: what its allocator keeps, and how it multiplies bfloat16."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lowrank_optim.kernels import MULTIPLIES_BFLOAT16
from lowrank_optim.nn import QuantizedWeight

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
BLOCK = 1 << 20  # bytes
TILE = 1 << 24  # elements of a weight that are float32 at a time: 64 MB


def give_blocks_back() -> str:
    """Let freed blocks of a megabyte and more go back to the system at once; returns what was done.

    glibc keeps freed blocks in its heap otherwise, which grows beyond what is in use.
    """
    libc = None if os.name == "nt" else ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not libc.mallopt(MMAP_THRESHOLD, BLOCK):
        return "this is not glibc: its allocator may keep memory that was freed"
    libc.mallopt(TRIM_THRESHOLD, BLOCK)
    return f"glibc's allocator gives blocks from {BLOCK >> 20} MB on back to the system"


def available() -> int | None:
    """Bytes of memory that the machine has for another process; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def resident() -> int:
    """Bytes of memory that this process has, without files that are only mapped (Linux)."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


def multiplies_bfloat16() -> bool:
    """Whether the processor has fast products of bfloat16. Without, torch's are several times slower than those of float32."""
    return MULTIPLIES_BFLOAT16


def fast_products(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """`float32_products` where they are the faster ones: bfloat16 on a processor without units for it."""
    slow = device.type == "cpu" and dtype == torch.bfloat16 and not multiplies_bfloat16()
    return float32_products() if slow else nullcontext()


@contextmanager
def float32_products() -> Iterator[None]:
    """Linear layers and attention of bfloat16 tensors are computed in float32, and their results rounded to bfloat16.

    Of a weight, one tile of 64 MB is float32 at a time, and of an 8-bit weight one tile is decoded. The two functions of
    `torch.nn.functional` are replaced, for all threads, until the end: a mode would not be seen by layers that checkpointing computes
    again in backward.
    """
    linear, attention = F.linear, F.scaled_dot_product_attention

    def wide_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _Linear.apply(input, weight, bias) if input.dtype == torch.bfloat16 else linear(input, weight, bias)

    def wide_attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **options: Any
    ) -> Tensor:
        if query.dtype != torch.bfloat16:
            return attention(query, key, value, attn_mask, *rest, **options)
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.float()

        def product(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attention(query.float(), key.float(), value.float(), attn_mask, *rest, **options).to(query.dtype)

        # What is kept for backward is 16-bit, as planned: float32 is made again there.
        return checkpoint(product, query, key, value, use_reentrant=False)

    F.linear, F.scaled_dot_product_attention = wide_linear, wide_attention
    try:
        yield
    finally:
        F.linear, F.scaled_dot_product_attention = linear, attention


def _tiles(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a weight, and what stands in them as float32."""
    rows = max(1, TILE // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        part = slice(start, min(start + rows, weight.shape[0]))
        yield part, weight.decoded(torch.float32, part) if isinstance(weight, QuantizedWeight) else weight[part].float()


class _Linear(torch.autograd.Function):
    """x Wᵀ + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        wide = x.reshape(-1, x.shape[-1]).float()
        result = x.new_empty(wide.shape[0], weight.shape[0])
        for part, tile in _tiles(weight):
            result[:, part] = wide @ tile.mT if bias is None else torch.addmm(bias[part].float(), wide, tile.mT)
        return result.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grads[0].reshape(-1, weight.shape[0])
        for_x, for_weight = ctx.needs_input_grad[:2]
        wide = x.reshape(-1, x.shape[-1]).float() if for_weight else None
        grad_x = rows.new_zeros(len(rows), weight.shape[1], dtype=torch.float32) if for_x else None
        grad_weight = torch.empty(weight.shape, dtype=weight.dtype) if for_weight else None
        for part, tile in _tiles(weight):
            outer = rows[:, part].float()
            if grad_x is not None:
                grad_x.addmm_(outer, tile)
            if grad_weight is not None and wide is not None:
                grad_weight[part] = outer.mT @ wide
        grad_bias = rows.float().sum(0).to(rows.dtype) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return None if grad_x is None else grad_x.to(x.dtype).view(x.shape), grad_weight, grad_bias
