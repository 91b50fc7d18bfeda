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
from lowrank_optim.kernels.checks import check_coding, code_dtype, coded_shapes

BLOCK = 256
"""Columns that share a scale."""


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
    noise = kernels.pack_key(key, turn, start)
    codes, scale = kernels.call("quantize_rows", x, col_scale, noise, bits, signed, block)
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
    x: Tensor = kernels.call("dequantize_rows", codes, scale, col_scale, bits, signed, block, cols, dtype)
    return x


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
        torch.full(codes, zero, dtype=code_dtype(bits, signed), device=device),
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
