"""The definitions of the operations on codes, in torch ops, for any device; the formats are explained in `quantization`.

All arithmetic is float32 and every operation is rounded once, in the order written here, so that compiled kernels can give the same
bits (without contraction to fused multiply-adds).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.kernels.api import apply_dense_
from lowrank_optim.kernels.arguments import pack_key, unpack_key
from lowrank_optim.kernels.checks import coded_shapes, empty_codes
from lowrank_optim.kernels.compute import cache_elements, compute_dtype, is_known, row_chunks, row_norms
from lowrank_optim.kernels.counter_rng import consecutive_halves, turn_offset
from lowrank_optim.kernels.dispatch import definition
from lowrank_optim.kernels.nibbles import pack_nibbles, unpack_nibbles
from lowrank_optim.kernels.reference import flat_error
from lowrank_optim.kernels.rounding import weight_error

_ops = torch.ops.lowrank_optim

LEVELS = {(8, True): 127, (4, True): 7, (8, False): 256, (4, False): 16}
"""L by bits and sign."""

MIN_SCALE = 2.0**-100
"""Blocks of smaller magnitude are stored as zeros, so that no division overflows and denormal numbers play no part."""


# ----------------------------------------------------------------------------------------------------------- blocks of a row


@definition("quantize_rows")
def quantize_rows(
    x: Tensor, col_scale: Tensor | None, noise: Tensor | None, bits: int, signed: bool, block: int
) -> tuple[Tensor, Tensor]:
    key, (turn, start) = unpack_key(noise)
    (codes, scale), cols = empty_codes(x, bits, signed, block), x.shape[-1]
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


@definition("dequantize_rows")
def dequantize_rows(
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
    if not is_known(scale == scale):
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


# ---------------------------------------------------------------------------------------------------------------------- bases


@definition("pack_basis")
def pack_basis(basis: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    _, scale_shape = coded_shapes(tuple(basis.shape), bits, group)
    *rows, cols = basis.shape
    top = 2**bits - 1
    if basis.numel() == 0:
        scale = torch.zeros(scale_shape, dtype=torch.float32, device=basis.device)
        codes = basis.to(torch.uint8).contiguous()
        return (codes if bits == 8 else pack_nibbles(codes)), scale, scale.clone()
    width = min(group, cols)
    x = basis.to(torch.float32)
    # The last column once more is in no group's way.
    padded = torch.cat([x, x[..., -1:].expand(*rows, -cols % width)], -1) if cols % width else x
    groups = padded.reshape(*rows, -1, width)
    zero, greatest = groups.aminmax(dim=-1)
    scale = (greatest - zero) / top
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 0.0, scale)
    ok = torch.isfinite(scale)
    zero, scale = torch.where(ok, zero, torch.nan), torch.where(ok, scale, torch.nan)
    step = scale.unsqueeze(-1)
    y = torch.where(step > 0.0, (groups - zero.unsqueeze(-1)) / step, 0.0)
    codes = y.round_().clamp_(0, top).to(torch.uint8).reshape(*rows, -1)[..., :cols]
    return (codes.contiguous() if bits == 8 else pack_nibbles(codes)), scale, zero


@definition("unpack_basis")
def unpack_basis(
    codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int, cols: int, dtype: torch.dtype
) -> Tensor:
    code = (codes if bits == 8 else unpack_nibbles(codes, cols)).to(torch.float32)
    steps, offset = (t.repeat_interleave(group, -1)[..., :cols] for t in (scale, zero))
    return code.mul_(steps).add_(offset).to(dtype)


# ------------------------------------------------------------------------------------------------------------ Adam on codes


def encode_adam(
    exp_avg: Tensor, exp_avg_sq: Tensor, col_scale: Tensor | None, noise: Tensor | None, bits: int, block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales of m/√v, and those of √v, for moments m and v (…, cols)."""
    root = exp_avg_sq.to(torch.float32).sqrt()
    ratio = torch.where(root > 0.0, exp_avg.to(torch.float32) / root, 0.0)
    return *_ops.quantize_rows(ratio, None, None, bits, True, block), *_ops.quantize_rows(
        root, col_scale, noise, bits, False, block
    )


def decode_adam(
    codes: Sequence[Tensor], col_scale: Tensor | None, bits: int, block: int, cols: int
) -> tuple[Tensor, Tensor]:
    """m and v, float32 (…, cols), from what `encode_adam` returned."""
    ratio_codes, ratio_scale, root_codes, root_scale = codes
    root = _ops.dequantize_rows(root_codes, root_scale, col_scale, bits, False, block, cols, torch.float32)
    ratio = _ops.dequantize_rows(ratio_codes, ratio_scale, None, bits, True, block, cols, torch.float32)
    return ratio.mul_(root), root.square_()


@definition("coded_adam_direct_")
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
) -> Tensor:
    codes = (ratio, ratio_scale, root, root_scale)
    exp_avg, exp_avg_sq = decode_adam(codes, col_scale, bits, block, grad.shape[-1])
    g = grad.to(torch.float32) if ok is None else torch.where(ok, grad.to(torch.float32), 0.0)
    direction: Tensor = _ops.adam_direct_(g, exp_avg, exp_avg_sq, scalars, ok)
    new = encode_adam(exp_avg, exp_avg_sq, col_scale, noise, bits, block)
    for old, value in zip(codes, new, strict=True):
        old.copy_(value if ok is None else torch.where(ok, value, old))
    return direction.to(grad.dtype)


@definition("coded_adam_direct_with_norms_")
def coded_adam_direct_with_norms_(grad: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    direction: Tensor = _ops.coded_adam_direct_(grad, *others)
    return direction, *row_norms(direction, grad)


@definition("coded_adam_dense_")
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
) -> None:
    if weight.numel() == 0:
        return
    rest = flat_error(weight_error(error, error_low))
    *_, alpha, keep = scalars.tolist()
    key, (turn, start) = unpack_key(noise)
    rounding_key, (first, *_) = unpack_key(rounding)
    rows, cols = weight.shape[-2] if weight.dim() > 1 else 1, weight.shape[-1]
    stacks = [
        tensor.view(-1, rows, tensor.shape[-1]) for tensor in (weight, grad, ratio, ratio_scale, root, root_scale)
    ]
    columns = None if col_scale is None else col_scale.expand(*weight.shape[:-2], 1, cols).reshape(-1, cols)
    for i, matrices in enumerate(zip(*stacks, strict=True)):
        for chunk in row_chunks(rows, cols):
            w, g, *codes = (matrix[chunk] for matrix in matrices)
            own, element = None if columns is None else columns[i], (i * rows + chunk.start) * cols
            part = None if noise is None else pack_key(key, turn, start + element)
            direction = coded_adam_direct_(g.to(torch.float32), *codes, own, scalars[:4], part, ok, bits, block)
            apply_dense_(
                w,
                direction.to(compute_dtype(w.dtype)),
                alpha=alpha,
                keep=keep,
                ok=ok,
                rounding_key=rounding_key,
                start=first + element,
                error=rest and rest.part(element, w),
            )
