"""Codes of `quantization`: rows in 8 or 4 bits, Adam on coded moments, and packed bases.

A program takes ROWS blocks of columns as a tile (ROWS, WIDTH), whose width is that of a block, rounded up to a power of two.
Two columns of 4 bits share a byte: where a block starts in the middle of one, the kernels work on codes of a byte each, which torch
packs and unpacks (`kernels.nibbles`); no format of the package is like that.
All launches forbid fused multiply-adds, divisions and roots are the correctly rounded ones: codes have to be the definition's.
"""

import triton
import triton.language as tl

from lowrank_optim.kernels.triton.arithmetic import holds, load_joined, narrow, nearest_integer, random_halves, widen
from lowrank_optim.kernels.triton.elementwise import adam_step, store_weight

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
def _halves(key, shift, start, number, row, cols, block, WIDTH: tl.constexpr):
    """`counter_rng.random_halves` of a tile, moved by `shift`: an even position and the odd one after it share a word."""
    first = start + row * cols + number * block
    pair = (first >> 1) + tl.arange(0, WIDTH // 2)[None, :]
    word = random_halves(key, pair)
    after = word
    if ((start | cols | block) & 1) != 0:  # a block may start in the middle of a word
        after = random_halves(key, pair + 1)
    odd = (first & 1) != 0
    halves = tl.interleave(tl.where(odd, word >> 16, word), tl.where(odd, after, word >> 16))
    return (halves + shift.to(tl.uint32)) & 0xFFFF


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
    """Code a tile and store codes and scales, see `quantization.row_codes`."""
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
    if STOCHASTIC:
        random = _halves(key, shift, start, number, row, cols, block, WIDTH)
        part = random.to(tl.float32) * 1.52587890625e-05 - 0.49999237060546875  # 2⁻¹⁶, 1/2 − 2⁻¹⁷
        y = y + part * (1.0 - tl.abs(y) * 1.9073486328125e-06)  # 2⁻¹⁹
    level = tl.minimum(tl.maximum(nearest_integer(y), least), levels) - lowest
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
    """Codes and scales of x (rows, cols), each column times 1/c."""
    row, col, number, inside = _tile(rows, cols, block, blocks, ROWS, WIDTH)
    x = widen(tl.load(x_ptr + row * cols + col, mask=inside, other=0.0))
    if c_ptr is not None:
        x = x * tl.math.div_rn(1.0, _column_scales(c_ptr, row, col, inside, cols, matrix_rows))
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
    high_ptr,
    low_ptr,
    rows,
    cols,
    matrix_rows,
    block,
    blocks,
    weight1,
    beta2,
    weight2,
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
    at = row * cols + col
    if ok_ptr is not None:
        if not holds(ok_ptr):
            if not DENSE:
                tl.store(out_ptr + at, tl.zeros([ROWS, WIDTH], tl.float32), mask=inside)
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
    m, v, direction = adam_step(g, ratio * root, root * root, weight1, beta2, weight2, root_factor, root_offset)
    if DENSE:
        w = load_joined(out_ptr, high_ptr, low_ptr, at, inside) * keep - direction * alpha
        store_weight(out_ptr, high_ptr, low_ptr, at, w, inside, weight_key, weight_start + at, STOCHASTIC_WEIGHT)
    else:
        tl.store(out_ptr + at, direction, mask=inside)
    root = tl.sqrt_rn(v)
    ratio = tl.where(root > 0.0, tl.math.div_rn(m, root), 0.0)
    if c_ptr is not None:
        root = root * tl.math.div_rn(1.0, column)
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
