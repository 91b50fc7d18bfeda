"""A matrix in 8 or 4 bits: codes of its own shape and one scale per block of a row.

A block is `block` consecutive columns of one row (the last one of a row may be shorter), so any split of the rows, even or not,
splits codes and scales alike: a shard holds what it would hold had it been coded alone. With the largest magnitude s of the block,
an element is x = level/L · s, with

    signed      level ∈ {−L, …, L},  L = 127 or 7
    unsigned    level ∈ {1, …, L},   L = 256 or 16        (for √v)

Unsigned levels have no 0, by which m/√v would explode: nothing is stored as less than s/L. Only a block that is zero throughout
decodes to zero (s = 0). Elements are divided by a scale of their column first, where there is one.

    |decoded − x| ≤ s/(2L), below s/L for unsigned elements under s/(2L); twice that for stochastic rounding

All arithmetic is float32 and every operation is rounded once, in the order written here, so that compiled kernels can give the same
bits (without contraction to fused multiply-adds).
"""

import math

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.kernels import cache_elements, row_chunks
from lowrank_optim.kernels.counter_rng import consecutive_halves, turn_offset
from lowrank_optim.kernels.schemas import check_coding, coded_shapes
from lowrank_optim.quantization.packing import pack_nibbles, unpack_nibbles

BLOCK = 256
"""Columns that share a scale."""

MIN_SCALE = 2.0**-100
"""Blocks of smaller magnitude are stored as zeros, so that no division overflows and denormal numbers play no part."""

LEVELS = {(8, True): 127, (4, True): 7, (8, False): 256, (4, False): 16}
"""L by bits and sign."""


def quantize_rows(
    x: Tensor,
    bits: int = 8,
    signed: bool = True,
    *,
    block: int = BLOCK,
    col_scale: Tensor | None = None,
    key: int | None = None,
    turn: int = 0,
    start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix.

        s = max |x·(1/c)| over a block,   y = (x·(1/c))·(L/s),   level = round(y)

    Encoding a decoded matrix gives the same codes and scales (the same up to the last bit of the scale, where `col_scale` is not a
    power of two). NaN and infinity are for the caller to mask: a block that holds one decodes to NaN throughout.

    Args:
        x: (…, cols), floating; one row for a 1-D tensor.
        bits: 8 or 4.
        signed: False for elements that are all ≥ 0.
        block: columns that share a scale.
        col_scale: c, (cols,) or broadcastable (…, 1, cols), positive; None means 1.
        key: round stochastically with this key (`counter_rng.make_key`): up with a probability equal to the distance from the lower
            level, so that the decoded value is x in expectation (between the lowest and the highest level, and up to 2⁻²⁰ of x).
            None rounds to nearest.
        turn: number of the draw. Draws with one key and consecutive turns are spread evenly for every element, golden-ratio steps
            from a random phase: a value that is rounded again and again is rounded up as often as it should be within a few times,
            not within √turns.
        start: row-major index of the first element in the whole matrix, so that the noise does not depend on shards.

    Returns:
        codes: bits = 8: (…, cols), int8 (signed) or uint8; bits = 4: (…, ⌈cols/2⌉) uint8, see `pack_nibbles`.
        scale: s, (…, ⌈cols/block⌉) float32.

    Raises:
        ValueError: a 0-d tensor, bits other than 8 and 4, or block < 1.

    Memory: bits/8 + 4/block bytes per element, see `quantized_bytes`.
    """
    noise = kernels.words(key, turn, start)
    codes, scale = torch.ops.lowrank_optim.quantize_rows(x, col_scale, noise, bits, signed, block)
    return codes, scale


@kernels.definition("quantize_rows")
def _quantize_rows(
    x: Tensor, col_scale: Tensor | None, noise: Tensor | None, bits: int, signed: bool, block: int
) -> tuple[Tensor, Tensor]:
    key, (turn, start) = kernels.key_of(noise)
    codes, scale = zero_rows(tuple(x.shape), bits, signed, block=block, device=x.device)
    cols = x.shape[-1]
    if x.numel() == 0:
        return codes, scale
    matrix, factor = x.reshape(-1, cols), None if col_scale is None else _per_row(col_scale.reciprocal(), x)
    flat_codes, flat_scale = codes.view(-1, codes.shape[-1]), scale.view(-1, scale.shape[-1])
    for chunk in row_chunks(len(matrix), cols, cache_elements(x.device)):
        part = matrix[chunk].to(torch.float32)
        if factor is not None:
            part = part * (factor if factor.dim() == 1 else factor[chunk])
        first = start + chunk.start * cols
        flat_codes[chunk], flat_scale[chunk] = _encode(part, bits, signed, block, (key, turn, first))
    return codes, scale


def dequantize_rows(
    codes: Tensor,
    scale: Tensor,
    bits: int = 8,
    signed: bool = True,
    *,
    cols: int | None = None,
    block: int = BLOCK,
    col_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The matrix that codes and scales stand for: x = ((level · (1/L)) · s) · c.

    Args:
        codes: from `quantize_rows`.
        scale: from `quantize_rows`.
        bits: as in `quantize_rows`; so are `signed`, `block` and `col_scale`.
        cols: columns of the matrix; needed for 4 bits where it is odd.
        dtype: of the result; the arithmetic is float32.

    Returns:
        (…, cols) tensor.

    Raises:
        ValueError: shapes or types that do not belong together.
    """
    if cols is None:
        cols = codes.shape[-1] * (1 if bits == 8 else 2)
    x: Tensor = torch.ops.lowrank_optim.dequantize_rows(codes, scale, col_scale, bits, signed, block, cols, dtype)
    return x


@kernels.definition("dequantize_rows")
def _dequantize_rows(
    codes: Tensor,
    scale: Tensor,
    col_scale: Tensor | None,
    bits: int,
    signed: bool,
    block: int,
    cols: int,
    dtype: torch.dtype,
) -> Tensor:
    levels = LEVELS[bits, signed]
    level = (codes if bits == 8 else unpack_nibbles(codes, cols)).to(torch.float32)
    # In float32, L · (1/L) is exactly 1 for each of the L: the largest element decodes to s. The unsigned L are powers of two.
    if signed:
        x = (level if bits == 8 else level.sub_(8.0)).mul_(1.0 / levels)
    else:
        x, scale = level.add_(1.0), scale / levels
    _multiply_blocks_(x, scale, block)
    return (x if col_scale is None else x.mul_(col_scale)).to(dtype)


def _multiply_blocks_(x: Tensor, factors: Tensor, block: int) -> None:
    """x (…, cols) ← x · the factor of its block (…, ⌈cols/block⌉), in place."""
    whole = x.shape[-1] // block
    if whole:
        x[..., : whole * block].unflatten(-1, (whole, block)).mul_(factors[..., :whole].unsqueeze(-1))
    if whole < factors.shape[-1]:
        x[..., whole * block :].mul_(factors[..., whole:])


def zero_rows(
    shape: tuple[int, ...],
    bits: int = 8,
    signed: bool = True,
    *,
    block: int = BLOCK,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes and scales of a zero matrix (…, cols): moments before the first step."""
    codes, scale = quantized_shapes(shape, bits, block)
    zero = 0x88 if signed and bits == 4 else 0
    return (
        torch.full(codes, zero, dtype=_code_dtype(bits, signed), device=device),
        torch.zeros(scale, dtype=torch.float32, device=device),
    )


def quantized_shapes(
    shape: tuple[int, ...], bits: int = 8, block: int = BLOCK
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of codes and scales of a (…, cols) matrix."""
    check_coding(bits, block)
    if not shape:
        raise ValueError("a 0-d tensor has no rows; keep it in float32")
    return coded_shapes(shape, bits, block)


def quantized_bytes(shape: tuple[int, ...], bits: int = 8, block: int = BLOCK) -> int:
    """Exact bytes of codes and scales of a (…, cols) matrix: rows · (⌈cols·bits/8⌉ + 4·⌈cols/block⌉).

    Example:
        >>> quantized_bytes((4096, 256), 8), quantized_bytes((4096, 256), 4)
        (1064960, 540672)
    """
    codes, scale = quantized_shapes(shape, bits, block)
    return math.prod(codes) + 4 * math.prod(scale)


def _code_dtype(bits: int, signed: bool) -> torch.dtype:
    return torch.int8 if bits == 8 and signed else torch.uint8


def _per_row(col_scale: Tensor, x: Tensor) -> Tensor:
    """The column scales of each row of x seen as a matrix, or of all of them, (cols,)."""
    if col_scale.dim() == 1:
        return col_scale
    return col_scale.expand(x.shape).reshape(-1, x.shape[-1])


def _encode(
    x: Tensor, bits: int, signed: bool, block: int, noise: tuple[int | None, int, int]
) -> tuple[Tensor, Tensor]:
    """Codes and scales of a float32 (rows, cols) matrix."""
    rows, cols = x.shape
    width, levels = min(block, cols), LEVELS[bits, signed]
    padded = torch.nn.functional.pad(x, (0, -cols % width)) if cols % width else x
    blocks = padded.view(rows, -1, width)
    scale, factor = block_factors((blocks.abs() if signed else blocks).amax(-1), levels)
    y = (blocks * factor.unsqueeze(-1)).view(rows, -1)[:, :cols]
    if not kernels.is_known(scale == scale):
        y = y.nan_to_num_(nan=0.0)
    key, turn, start = noise
    level = y.round_() if key is None else _round_stochastically_(y, key, turn, start)
    # No |y| is so far above L that it would be rounded to more.
    if not signed:
        level.clamp_min_(1.0).sub_(1.0)
    if bits == 8:
        return _bytes(level, signed), scale
    return pack_nibbles(_bytes(level.add_(8.0) if signed else level, True)), scale


def block_factors(greatest: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The scale s of blocks with these largest magnitudes, and L/s, or 0 where there is none."""
    scale = greatest.masked_fill(greatest < MIN_SCALE, 0.0)
    scale.add_(greatest - greatest)  # 0, or NaN where it is not finite
    return scale, (levels / scale).nan_to_num_(nan=0.0, posinf=0.0)


def _bytes(level: Tensor, signed: bool) -> Tensor:
    """Whole numbers as int8 or uint8. Torch converts float32 to int8 several at a time, and to uint8 one by one."""
    return level.to(torch.int8) if signed else level.sub_(128.0).to(torch.int8).view(torch.uint8).bitwise_xor_(128)


def _round_stochastically_(y: Tensor, key: int, turn: int, start: int) -> Tensor:
    """⌊y⌋ or ⌊y⌋ + 1, in place; the latter with probability y − ⌊y⌋ up to 2⁻²⁰ |y|, in multiples of 2⁻¹⁶.

    With a random r of 16 bits, ρ = (r + 1/2)/2¹⁶ − 1/2 lies evenly in (−1/2, 1/2), and the level nearest to y + ρ is y on average.
    What was decoded comes back as y within four roundings of its level, 2⁻²² |y|, and has to stay what it was: the factor of ρ keeps
    it from being moved.
    """
    # In int16, where sums wrap around, r − 2¹⁵ = 2¹⁶ρ − 1/2 has the bits of r + 2¹⁵.
    centred = consecutive_halves(key, start, y.numel(), y.device).add_(turn_offset(turn) - (1 << 15))
    part = centred.to(torch.float32).add_(0.5).view(y.shape).mul_(torch.rsub(y.abs(), 1.0, alpha=2.0**-19))
    return y.add_(part, alpha=2.0**-16).round_()
