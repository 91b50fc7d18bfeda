"""Codes of `quantization`: rows in 8 or 4 bits, Adam on coded moments, and packed bases.

A program takes ROWS blocks of columns as a tile (ROWS, WIDTH), whose width is that of a block, rounded up to a power of two.
Two columns of 4 bits share a byte: where a block starts in the middle of one, the kernels work on codes of a byte each, which torch
packs and unpacks (`kernels.bytes`); no format of the package is like that.
All launches forbid fused multiply-adds, divisions and roots are the correctly rounded ones: codes have to be the definition's.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_optim.kernels.bytes import KernelCodes, starts_with_bytes
from lowrank_optim.kernels.schemas import coded_shapes
from lowrank_optim.kernels.triton.arithmetic import holds, narrow, nearest_integer, random_bits, widen
from lowrank_optim.kernels.triton.elementwise import adam_numbers, adam_step, store_weight
from lowrank_optim.kernels.triton.launching import covered, flags, key_and_start, launch, power_of_two

TILE = 1024
"""Elements of a program's tile."""

MAX_WIDTH = 4096
"""Blocks of more columns are left to the definition."""

GOLDEN = 0x9E3779B9
STORED = (torch.float32, torch.bfloat16, torch.float16)


# ------------------------------------------------------------------------------------------------------------- parts of kernels


@triton.jit
def _tile(rows, cols, block, blocks, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """ROWS blocks of columns, counted row by row: rows (ROWS, 1), columns (ROWS, WIDTH), the blocks' numbers in their rows (ROWS, 1),
    and which elements are inside the matrix and the block.
    """
    segment = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    row, number = segment // blocks, segment % blocks
    within = tl.arange(0, WIDTH)[None, :]
    col = number * block + within
    return row, col, number, (row < rows) & (col < cols) & (within < block)


@triton.jit
def _bytes(number, row, bytes_per_row, block, rows, WIDTH: tl.constexpr):
    """Offsets of a block's bytes of 4-bit codes, and which of them there are."""
    within = tl.arange(0, WIDTH // 2)[None, :]
    place = number * (block // 2) + within
    inside = (row < rows) & (place < bytes_per_row) & (2 * within < block)
    return row * bytes_per_row + place, inside


@triton.jit
def _load_codes(codes_ptr, number, row, col, inside, rows, cols, block, PACKED: tl.constexpr, WIDTH: tl.constexpr):
    """Codes of a tile as float32, as they are stored."""
    if not PACKED:
        return tl.load(codes_ptr + row * cols + col, mask=inside, other=0).to(tl.float32)
    offsets, there = _bytes(number, row, (cols + 1) // 2, block, rows, WIDTH)
    pair = tl.load(codes_ptr + offsets, mask=there, other=0)
    return tl.interleave(pair & 0xF, pair >> 4).to(tl.float32)


@triton.jit
def _store_codes(
    codes_ptr,
    code,
    number,
    row,
    col,
    inside,
    rows,
    cols,
    block,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store a tile of codes, float32 integers."""
    if not PACKED:
        # From int32: a conversion of 255.0 to uint8 alone would be one to int8.
        tl.store(codes_ptr + row * cols + col, code.to(tl.int32).to(codes_ptr.dtype.element_ty), mask=inside)
    else:
        number_of_code = tl.where(inside, code, 0.0).to(tl.int32)
        low, high = tl.split(tl.reshape(number_of_code, [ROWS, WIDTH // 2, 2]))
        offsets, there = _bytes(number, row, (cols + 1) // 2, block, rows, WIDTH)
        tl.store(codes_ptr + offsets, (low | (high << 4)).to(tl.uint8), mask=there)


@triton.jit
def _load_values(
    codes_ptr,
    scale_ptr,
    number,
    row,
    col,
    inside,
    rows,
    cols,
    block,
    blocks,
    BITS: tl.constexpr,
    PACKED: tl.constexpr,
    SIGNED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The numbers that codes and scales stand for: (level · (1/L)) · s."""
    level = _load_codes(codes_ptr, number, row, col, inside, rows, cols, block, PACKED, WIDTH)
    if SIGNED:
        step: tl.constexpr = 1.0 / 127 if BITS == 8 else 1.0 / 7
        if BITS == 4:
            level = level - 8.0
    else:
        step: tl.constexpr = 1.0 / 256 if BITS == 8 else 1.0 / 16
        level = level + 1.0
    scale = tl.load(scale_ptr + row * blocks + number, mask=row < rows, other=0.0)
    return (level * step) * scale


@triton.jit
def _magnitudes(x, inside):
    """Bits of |x| as int32, 0 outside: integers that order as the magnitudes do, infinity and NaN above all numbers."""
    return tl.where(inside, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)


@triton.jit
def _store_values(
    codes_ptr,
    scale_ptr,
    x,
    number,
    row,
    col,
    inside,
    rows,
    cols,
    block,
    blocks,
    key,
    shift,
    start,
    BITS: tl.constexpr,
    PACKED: tl.constexpr,
    SIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Code a tile and store codes and scales, see `quantization.rows`."""
    if SIGNED:
        levels: tl.constexpr = 127.0 if BITS == 8 else 7.0
        least: tl.constexpr = -levels
        lowest: tl.constexpr = 0.0 if BITS == 8 else -8.0
    else:
        levels: tl.constexpr = 256.0 if BITS == 8 else 16.0
        least: tl.constexpr = 1.0
        lowest: tl.constexpr = 1.0
    largest = tl.max(_magnitudes(x, inside), axis=1)[:, None]
    scale = largest.to(tl.float32, bitcast=True)
    scale = tl.where(scale < 7.888609052210118e-31, 0.0, scale)  # MIN_SCALE
    scale = tl.where(largest < 0x7F800000, scale, float("nan"))
    factor = tl.where(scale > 0.0, tl.math.div_rn(1.0, scale) * levels, 0.0)
    y = x * factor
    y = tl.where(y == y, y, 0.0)
    level = nearest_integer(y)
    if STOCHASTIC:
        lower = tl.floor(y)
        bits = random_bits(key, start + row * cols + col) + shift.to(tl.uint32)
        noise = (bits >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2⁻²⁴
        up = tl.where(noise < y - lower, lower + 1.0, lower)
        close = tl.abs(y - level) <= tl.abs(level) * 4.76837158203125e-07  # 2⁻²¹
        level = tl.where(close, level, up)
    level = tl.minimum(tl.maximum(level, least), levels) - lowest
    _store_codes(codes_ptr, level, number, row, col, inside, rows, cols, block, PACKED, ROWS, WIDTH)
    tl.store(scale_ptr + row * blocks + number, scale, mask=row < rows)


@triton.jit
def _column_scales(c_ptr, row, col, inside, cols, matrix_rows):
    """col_scale of a tile: one vector, or one for every `matrix_rows` rows (0: one for all)."""
    line = row * 0
    if matrix_rows > 0:
        line = row // matrix_rows
    return tl.load(c_ptr + line * cols + col, mask=inside, other=1.0)


# -------------------------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["rows", "matrix_rows", "key", "shift", "start"])
def quantize_kernel(
    x_ptr,
    c_ptr,
    codes_ptr,
    scale_ptr,
    rows,
    cols,
    matrix_rows,
    block,
    blocks,
    key: tl.int64,
    shift: tl.int64,
    start: tl.int64,
    BITS: tl.constexpr,
    PACKED: tl.constexpr,
    SIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Codes and scales of x (rows, cols), each column divided by c."""
    row, col, number, inside = _tile(rows, cols, block, blocks, ROWS, WIDTH)
    x = widen(tl.load(x_ptr + row * cols + col, mask=inside, other=0.0))
    if c_ptr is not None:
        x = tl.math.div_rn(x, _column_scales(c_ptr, row, col, inside, cols, matrix_rows))
    _store_values(
        codes_ptr,
        scale_ptr,
        x,
        number,
        row,
        col,
        inside,
        rows,
        cols,
        block,
        blocks,
        key,
        shift,
        start,
        BITS,
        PACKED,
        SIGNED,
        STOCHASTIC,
        ROWS,
        WIDTH,
    )


@triton.jit(do_not_specialize=["rows", "matrix_rows"])
def dequantize_kernel(
    codes_ptr,
    scale_ptr,
    c_ptr,
    out_ptr,
    rows,
    cols,
    matrix_rows,
    block,
    blocks,
    BITS: tl.constexpr,
    PACKED: tl.constexpr,
    SIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """out (rows, cols) from codes, scales and c."""
    row, col, number, inside = _tile(rows, cols, block, blocks, ROWS, WIDTH)
    x = _load_values(
        codes_ptr, scale_ptr, number, row, col, inside, rows, cols, block, blocks, BITS, PACKED, SIGNED, WIDTH
    )
    if c_ptr is not None:
        x = x * _column_scales(c_ptr, row, col, inside, cols, matrix_rows)
    tl.store(out_ptr + row * cols + col, narrow(x, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "matrix_rows", "key", "shift", "start", "weight_key", "weight_start"])
def coded_adam_kernel(
    out_ptr,
    g_ptr,
    ratio_ptr,
    ratio_scale_ptr,
    root_ptr,
    root_scale_ptr,
    c_ptr,
    ok_ptr,
    rows,
    cols,
    matrix_rows,
    block,
    blocks,
    towards,
    beta2,
    rest2,
    root_factor,
    root_offset,
    alpha,
    keep,
    key: tl.int64,
    shift: tl.int64,
    start: tl.int64,
    weight_key: tl.int64,
    weight_start: tl.int64,
    DENSE: tl.constexpr,
    BITS: tl.constexpr,
    PACKED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    STOCHASTIC_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One step of Adam on coded moments (rows, cols), in place: N into out, or (DENSE) out ← keep·out − alpha·N."""
    row, col, number, inside = _tile(rows, cols, block, blocks, ROWS, WIDTH)
    out_pointers = out_ptr + row * cols + col
    if ok_ptr is not None:
        if not holds(ok_ptr):
            if not DENSE:
                tl.store(out_pointers, tl.zeros([ROWS, WIDTH], tl.float32), mask=inside)
            return
    g = widen(tl.load(g_ptr + row * cols + col, mask=inside, other=0.0))
    root = _load_values(
        root_ptr, root_scale_ptr, number, row, col, inside, rows, cols, block, blocks, BITS, PACKED, False, WIDTH
    )
    if c_ptr is not None:
        column = _column_scales(c_ptr, row, col, inside, cols, matrix_rows)
        root = root * column
    ratio = _load_values(
        ratio_ptr, ratio_scale_ptr, number, row, col, inside, rows, cols, block, blocks, BITS, PACKED, True, WIDTH
    )
    m, v, direction = adam_step(g, ratio * root, root * root, towards, beta2, rest2, root_factor, root_offset)
    if DENSE:
        w = widen(tl.load(out_pointers, mask=inside, other=0.0)) * keep - direction * alpha
        store_weight(out_pointers, w, inside, weight_key, weight_start + row * cols + col, STOCHASTIC_WEIGHT)
    else:
        tl.store(out_pointers, direction, mask=inside)
    root = tl.sqrt_rn(v)
    ratio = tl.where(root > 0.0, tl.math.div_rn(m, root), 0.0)
    if c_ptr is not None:
        root = tl.math.div_rn(root, column)
    _store_values(
        root_ptr,
        root_scale_ptr,
        root,
        number,
        row,
        col,
        inside,
        rows,
        cols,
        block,
        blocks,
        key,
        shift,
        start,
        BITS,
        PACKED,
        False,
        STOCHASTIC,
        ROWS,
        WIDTH,
    )
    _store_values(
        ratio_ptr,
        ratio_scale_ptr,
        ratio,
        number,
        row,
        col,
        inside,
        rows,
        cols,
        block,
        blocks,
        key,
        shift,
        start,
        BITS,
        PACKED,
        True,
        False,
        ROWS,
        WIDTH,
    )


@triton.jit(do_not_specialize=["rows"])
def pack_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    rows,
    cols,
    block,
    blocks,
    BITS: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Codes, scales and zero points of x (rows, cols), see `quantization.basis`."""
    top: tl.constexpr = 255.0 if BITS == 8 else 15.0
    row, col, number, inside = _tile(rows, cols, block, blocks, ROWS, WIDTH)
    x = widen(tl.load(x_ptr + row * cols + col, mask=inside, other=0.0))
    largest = tl.max(_magnitudes(x, inside), axis=1)[:, None]
    x = tl.where(largest < 0x7F800000, x, 0.0)
    zero = tl.min(tl.where(inside, x, float("inf")), axis=1)[:, None]
    greatest = tl.max(tl.where(inside, x, float("-inf")), axis=1)[:, None]
    scale = tl.math.div_rn(greatest - zero, top)
    scale = tl.where(scale < 1.1754943508222875e-38, 0.0, scale)
    finite = (largest < 0x7F800000) & (scale < float("inf"))
    scale, zero = tl.where(finite, scale, float("nan")), tl.where(finite, zero, float("nan"))
    y = tl.where(scale > 0.0, tl.math.div_rn(x - zero, scale), 0.0)
    code = tl.minimum(tl.maximum(nearest_integer(y), 0.0), top)
    _store_codes(codes_ptr, code, number, row, col, inside, rows, cols, block, PACKED, ROWS, WIDTH)
    tl.store(scale_ptr + row * blocks + number, scale, mask=row < rows)
    tl.store(zero_ptr + row * blocks + number, zero, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def unpack_kernel(
    codes_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    rows,
    cols,
    block,
    blocks,
    BITS: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """out (rows, cols): zero + code · scale."""
    row, col, number, inside = _tile(rows, cols, block, blocks, ROWS, WIDTH)
    code = _load_codes(codes_ptr, number, row, col, inside, rows, cols, block, PACKED, WIDTH)
    scale = tl.load(scale_ptr + row * blocks + number, mask=row < rows, other=0.0)
    zero = tl.load(zero_ptr + row * blocks + number, mask=row < rows, other=0.0)
    tl.store(out_ptr + row * cols + col, narrow(code * scale + zero, out_ptr.dtype.element_ty), mask=inside)


# ----------------------------------------------------------------------------------------------------------------- operations


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


def _float32(tensor: Tensor | None) -> bool:
    return tensor is None or tensor.dtype == torch.float32


def _columns(col_scale: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor | None, int]:
    """col_scale as contiguous vectors, and how many rows share one (0: all)."""
    if col_scale is None:
        return None, 0
    if col_scale.numel() == shape[-1]:
        return col_scale.contiguous(), 0
    return col_scale.expand(*shape[:-2], 1, shape[-1]).contiguous(), shape[-2]


def _noise(noise: Tensor | None) -> tuple[bool, tuple[int, int, int]]:
    stochastic, (key, turn, start) = key_and_start(noise)
    return stochastic, (key, turn * GOLDEN & 0xFFFFFFFF, start)


def _new(shape: tuple[int, ...], bits: int, signed: bool, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    codes, scale = coded_shapes(shape, bits, block)
    kind = torch.int8 if bits == 8 and signed else torch.uint8
    return torch.empty(codes, dtype=kind, device=device), torch.empty(scale, dtype=torch.float32, device=device)


def quantize_rows(
    x: Tensor, col_scale: Tensor | None, noise: Tensor | None, bits: int, signed: bool, block: int
) -> Any:
    shape = tuple(x.shape)
    if not covered(x) or not _float32(col_scale):
        return NotImplemented
    codes, scale = _new(shape, bits, signed, block, x.device)
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
    if dtype not in STORED or not _float32(col_scale) or not (codes.is_contiguous() and scale.is_contiguous()):
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
    if not covered(grad) or not _float32(col_scale):
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
    scalars: Tensor,
    noise: Tensor | None,
    ok: Tensor | None,
    rounding: Tensor | None,
    bits: int,
    block: int,
) -> Any:
    if not covered(weight, grad):
        return NotImplemented
    if weight.numel() == 0:
        return None
    c = cut(tuple(weight.shape), bits, block)
    if c is None:
        return NotImplemented
    codes, (*adam, alpha, keep) = (ratio, ratio_scale, root, root_scale), scalars.tolist()
    _coded_adam(weight, grad, codes, None, adam, (alpha, keep), noise, ok, rounding, c)
    return None


def pack_basis(basis: Tensor, bits: int, group: int) -> Any:
    if not covered(basis):
        return NotImplemented
    shape = tuple(basis.shape)
    codes, scale = _new(shape, bits, False, group, basis.device)
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
    if not contiguous or not _float32(scale) or not _float32(zero) or dtype not in STORED:
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
