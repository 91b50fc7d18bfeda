"""The operations of `quantization` on the kernels of `coded_kernels`: how matrices are cut into tiles, and the launches."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.kernels.arguments import TYPES, adam_numbers, all_float32
from lowrank_optim.kernels.checks import empty_codes
from lowrank_optim.kernels.counter_rng import turn_offset
from lowrank_optim.kernels.nibbles import KernelCodes, starts_with_bytes
from lowrank_optim.kernels.triton.coded_kernels import (
    coded_adam_kernel,
    dequantize_kernel,
    pack_kernel,
    quantize_kernel,
    unpack_kernel,
)
from lowrank_optim.kernels.triton.launching import covered, flags, key_and_start, launch, power_of_two

TILE = 1024
"""Elements of a program's tile."""

MAX_WIDTH = 4096
"""Blocks of more columns are left to the definition."""


@dataclass(frozen=True)
class Cut:
    """How a (rows, cols) matrix is cut into tiles."""

    rows: int
    cols: int
    block: int
    blocks: int
    tile_rows: int
    width: int
    bits: int
    packed: bool

    @property
    def grid(self) -> tuple[int]:
        return (-(-self.rows * self.blocks // self.tile_rows),)

    @property
    def sizes(self) -> tuple[int, int]:
        return self.rows, self.cols

    @property
    def constants(self) -> dict[str, Any]:
        return {"BITS": self.bits, "PACKED": self.packed, "ROWS": self.tile_rows, "WIDTH": self.width}


def cut(shape: tuple[int, ...], bits: int, block: int) -> Cut | None:
    """Tiles of a (…, cols) matrix that is not empty; None for blocks wider than MAX_WIDTH."""
    cols = shape[-1]
    rows = torch.Size(shape[:-1]).numel()
    packed, block = starts_with_bytes(cols, bits, block), min(block, cols)
    blocks = -(-cols // block)
    width = max(power_of_two(block), 2)
    if width > MAX_WIDTH:
        return None
    tile_rows = max(1, min(TILE // width, power_of_two(rows * blocks)))
    return Cut(rows, cols, block, blocks, tile_rows, width, bits, packed)


def _columns(col_scale: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor | None, int]:
    """col_scale as contiguous vectors, and how many rows share one (0: all)."""
    if col_scale is None:
        return None, 0
    if col_scale.numel() == shape[-1]:
        return col_scale.contiguous(), 0
    return col_scale.expand(*shape[:-2], 1, shape[-1]).contiguous(), shape[-2]


def _noise(noise: Tensor | None) -> tuple[bool, tuple[int, int, int]]:
    stochastic, (key, turn, start) = key_and_start(noise)
    return stochastic, (key, turn_offset(turn), start)


def quantize_rows(
    x: Tensor, col_scale: Tensor | None, noise: Tensor | None, bits: int, signed: bool, block: int
) -> Any:
    shape = tuple(x.shape)
    if not covered(x) or not all_float32(col_scale):
        return NotImplemented
    codes, scale = empty_codes(x, bits, signed, block)
    if x.numel() == 0:
        return codes, scale
    c = cut(shape, bits, block)
    if c is None:
        return NotImplemented
    stochastic, words = _noise(noise)
    columns, matrix_rows = _columns(col_scale, shape)
    target = KernelCodes.of(codes, shape[-1], bits, c.packed)
    launch(
        quantize_kernel,
        c.grid,
        x,
        x.contiguous(),
        columns,
        target.whole,
        scale,
        *c.sizes,
        matrix_rows,
        c.block,
        c.blocks,
        *words,
        SIGNED=signed,
        STOCHASTIC=stochastic,
        **c.constants,
    )
    target.store()
    return codes, scale


def dequantize_rows(
    codes: Tensor,
    scale: Tensor,
    col_scale: Tensor | None,
    bits: int,
    signed: bool,
    block: int,
    cols: int,
    dtype: torch.dtype,
) -> Any:
    if dtype not in TYPES or not all_float32(col_scale) or not (codes.is_contiguous() and scale.is_contiguous()):
        return NotImplemented
    shape = (*codes.shape[:-1], cols)
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    if out.numel() == 0:
        return out
    c = cut(shape, bits, block)
    if c is None:
        return NotImplemented
    columns, matrix_rows = _columns(col_scale, shape)
    launch(
        dequantize_kernel,
        c.grid,
        codes,
        KernelCodes.of(codes, cols, bits, c.packed).whole,
        scale,
        columns,
        out,
        *c.sizes,
        matrix_rows,
        c.block,
        c.blocks,
        SIGNED=signed,
        **c.constants,
    )
    return out


def _coded_adam(
    out: Tensor,
    grad: Tensor,
    codes: tuple[Tensor, Tensor, Tensor, Tensor],
    col_scale: Tensor | None,
    adam: list[float],
    update: tuple[float, float] | None,
    noise: Tensor | None,
    ok: Tensor | None,
    rounding: Tensor | None,
    c: Cut,
    errors: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    ratio, ratio_scale, root, root_scale = codes
    stochastic, words = _noise(noise)
    stochastic_weight, (weight_key, weight_start, *_) = key_and_start(rounding)
    columns, matrix_rows = _columns(col_scale, tuple(grad.shape))
    targets = [KernelCodes.of(t, grad.shape[-1], c.bits, c.packed) for t in (ratio, root)]
    launch(
        coded_adam_kernel,
        c.grid,
        out,
        out,
        grad,
        targets[0].whole,
        ratio_scale,
        targets[1].whole,
        root_scale,
        columns,
        flags(ok),
        *errors,
        *c.sizes,
        matrix_rows,
        c.block,
        c.blocks,
        *adam_numbers(*adam),
        *(update or (0.0, 0.0)),
        *words,
        weight_key,
        weight_start,
        DENSE=update is not None,
        STOCHASTIC=stochastic,
        STOCHASTIC_WEIGHT=stochastic_weight and out.dtype == torch.bfloat16,
        **c.constants,
    )
    for target in targets:
        target.store()


def coded_adam_direct_(
    grad: Tensor,
    ratio: Tensor,
    ratio_scale: Tensor,
    root: Tensor,
    root_scale: Tensor,
    col_scale: Tensor | None,
    scalars: Tensor,
    noise: Tensor | None,
    ok: Tensor | None,
    bits: int,
    block: int,
) -> Any:
    if not covered(grad) or not all_float32(col_scale):
        return NotImplemented
    out = torch.empty_like(grad, memory_format=torch.contiguous_format)
    if grad.numel() == 0:
        return out
    c = cut(tuple(grad.shape), bits, block)
    if c is None:
        return NotImplemented
    codes = (ratio, ratio_scale, root, root_scale)
    _coded_adam(out, grad.contiguous(), codes, col_scale, scalars.tolist(), None, noise, ok, None, c)
    return out


def coded_adam_dense_(
    weight: Tensor,
    grad: Tensor,
    ratio: Tensor,
    ratio_scale: Tensor,
    root: Tensor,
    root_scale: Tensor,
    col_scale: Tensor | None,
    scalars: Tensor,
    noise: Tensor | None,
    ok: Tensor | None,
    rounding: Tensor | None,
    bits: int,
    block: int,
    error: Tensor | None = None,
    error_low: Tensor | None = None,
) -> Any:
    if not covered(weight, grad) or not all_float32(col_scale):
        return NotImplemented
    if weight.numel() == 0:
        return None
    c = cut(tuple(weight.shape), bits, block)
    if c is None:
        return NotImplemented
    codes, (*adam, alpha, keep) = (ratio, ratio_scale, root, root_scale), scalars.tolist()
    _coded_adam(weight, grad, codes, col_scale, adam, (alpha, keep), noise, ok, rounding, c, (error, error_low))
    return None


def pack_basis(basis: Tensor, bits: int, group: int) -> Any:
    if not covered(basis):
        return NotImplemented
    shape = tuple(basis.shape)
    codes, scale = empty_codes(basis, bits, False, group)
    zero = torch.empty_like(scale)
    if basis.numel() == 0:
        return codes, scale, zero
    c = cut(shape, bits, group)
    if c is None:
        return NotImplemented
    target, sizes = KernelCodes.of(codes, shape[-1], bits, c.packed), (*c.sizes, c.block, c.blocks)
    launch(pack_kernel, c.grid, basis, basis.contiguous(), target.whole, scale, zero, *sizes, **c.constants)
    target.store()
    return codes, scale, zero


def unpack_basis(
    codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int, cols: int, dtype: torch.dtype
) -> Any:
    contiguous = codes.is_contiguous() and scale.is_contiguous() and zero.is_contiguous()
    if not contiguous or not all_float32(scale, zero) or dtype not in TYPES:
        return NotImplemented
    out = torch.empty((*codes.shape[:-1], cols), dtype=dtype, device=codes.device)
    if out.numel() == 0:
        return out
    c = cut(tuple(out.shape), bits, group)
    if c is None:
        return NotImplemented
    whole, sizes = KernelCodes.of(codes, cols, bits, c.packed).whole, (*c.sizes, c.block, c.blocks)
    launch(unpack_kernel, c.grid, codes, whole, scale, zero, out, *sizes, **c.constants)
    return out


OPERATIONS = {
    "quantize_rows": quantize_rows,
    "dequantize_rows": dequantize_rows,
    "coded_adam_direct_": coded_adam_direct_,
    "coded_adam_dense_": coded_adam_dense_,
    "pack_basis": pack_basis,
    "unpack_basis": unpack_basis,
}
