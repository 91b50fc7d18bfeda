"""The matrix products of a step: `project` (with or without norms) and `apply_`.

Both read the large matrix once and accumulate in float32. Their other operands are float32, so how much of them a tensor core sees is
a choice; it follows `torch.set_float32_matmul_precision` (relative errors of an operand in brackets):

                                        "highest", torch's default      "high"               "medium"
    project, bfloat16 gradient          2 bfloat16 products (2⁻¹⁷)      the same             1 (2⁻⁹)
    project, float32, float16 gradient  3 tf32 products (2⁻²¹)          1 in tf32 (2⁻¹¹)     1 in tf32
    apply_, 16-bit weights              3 bfloat16 products (2⁻¹⁷)      1 in tf32 (2⁻¹¹)     1 in bfloat16 (2⁻⁹)
    apply_, float32 weights             3 tf32 products (2⁻²¹)          1 in tf32            1 in tf32

A float32 number is nearly the sum of two bfloat16 ones, its nearest and the nearest to the rest. A bfloat16 gradient times a basis so
split is two products at the bfloat16 rate: the cost of one in tf32, 64 times as accurate. Of a product of two split factors, that of
the two small parts is left out. What is split is small, and split once by a kernel of its own, so that the product reads operands as
the tensor cores take them.

Tiles come from a table by shape and shared memory, not from tuning: a kernel that works in place cannot be timed by running it.
Short projections are split along the contracted side, so that every multiprocessor has work; the parts are added in a fixed order.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_optim.kernels.rounding import lie_alike
from lowrank_optim.kernels.triton.arithmetic import (
    holds,
    load_joined,
    matrix_product,
    sign,
    to_bfloat16,
    widen,
)
from lowrank_optim.kernels.triton.elementwise import store_weight
from lowrank_optim.kernels.triton.launching import (
    covered,
    flags,
    key_and_start,
    launch,
    matrices,
    power_of_two,
    processors,
    shared_kib,
)

MAX_BATCH = 65535
"""Of a stack; the grid's second and third dimensions go no further."""

SPLIT_BLOCK = 1024
GROUP = 8
"""Rows of tiles that are worked on together, so that the columns' operand stays in the cache."""


# -------------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def split_kernel(x_ptr, high_ptr, low_ptr, n, BLOCK: tl.constexpr):
    """float32 x (n,) as the sum of two bfloat16: the nearest one, and the nearest to what is left."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < n)
    high = to_bfloat16(x)
    rest = x - widen(high)
    tl.store(high_ptr + index, high, mask=index < n)
    # Infinity less infinity: what is not finite is in the upper part alone.
    tl.store(low_ptr + index, to_bfloat16(tl.where(tl.abs(rest) < float("inf"), rest, 0.0)), mask=index < n)


@triton.jit
def project_kernel(
    g_ptr,
    b_ptr,
    low_ptr,
    out_ptr,
    squares_ptr,
    lines,
    rank,
    depth,
    part,
    g_batch,
    g_line,
    g_depth,
    b_batch,
    b_depth,
    b_rank,
    NORMS: tl.constexpr,
    PRECISION: tl.constexpr,
    LINES: tl.constexpr,
    RANK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out (parts, batch, lines, rank): g (lines × depth) @ b (depth × rank) over one part of the depth; `low` is added to b.

    squares (parts, batch, lines): with NORMS, sums of squares of the lines of g.
    """
    tiles = tl.maximum(tl.cdiv(rank, RANK), 1)  # rank 0: the norms alone
    tile, number, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    # Neighbouring programs read the same lines of g: they come from memory once.
    line = (tile // tiles).to(tl.int64) * LINES + tl.arange(0, LINES)
    col = (tile % tiles) * RANK + tl.arange(0, RANK)
    first = number.to(tl.int64) * part
    step = tl.arange(0, DEPTH)
    g_pointers = g_ptr + batch * g_batch + line[:, None] * g_line + (first + step)[None, :] * g_depth
    b_offsets = batch * b_batch + (first + step)[:, None] * b_depth + col.to(tl.int64)[None, :] * b_rank
    b_pointers = b_ptr + b_offsets
    if low_ptr is not None:
        low_pointers = low_ptr + b_offsets
    left = tl.minimum(part, depth - first).to(tl.int32)
    total = tl.zeros([LINES, RANK], tl.float32)
    squares = tl.zeros([LINES], tl.float32)
    for at in range(0, left, DEPTH):
        there = step < left - at
        g = tl.load(g_pointers, mask=(line < lines)[:, None] & there[None, :], other=0.0)
        b = tl.load(b_pointers, mask=there[:, None] & (col < rank)[None, :], other=0.0)
        if b.dtype == tl.float32:
            total = matrix_product(widen(g), b, total, PRECISION)
        else:
            total = matrix_product(g, b, total, PRECISION)
        if low_ptr is not None:
            low = tl.load(low_pointers, mask=there[:, None] & (col < rank)[None, :], other=0.0)
            total = matrix_product(g, low, total, PRECISION)
            low_pointers += DEPTH * b_depth
        if NORMS:
            squares += tl.sum(widen(g) * widen(g), axis=1)
        g_pointers += DEPTH * g_depth
        b_pointers += DEPTH * b_depth
    place = number.to(tl.int64) * tl.num_programs(2) + batch
    inside = (line < lines)[:, None] & (col < rank)[None, :]
    tl.store(out_ptr + (place * lines + line)[:, None] * rank + col[None, :], total, mask=inside)
    if NORMS:
        if tile % tiles == 0:
            tl.store(squares_ptr + place * lines + line, squares, mask=line < lines)


@triton.jit
def factor_product(
    a_ptr,
    b_ptr,
    a_low_ptr,
    b_low_ptr,
    a_row,
    a_depth,
    b_depth,
    b_col,
    row,
    col,
    rows,
    cols,
    depth,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A tile of a (rows × depth) @ b (depth × cols), float32; the low parts, of the same strides, are added to a and b."""
    step = tl.arange(0, DEPTH)
    a_offsets = row[:, None] * a_row + step.to(tl.int64)[None, :] * a_depth
    b_offsets = step.to(tl.int64)[:, None] * b_depth + col[None, :] * b_col
    a_pointers, b_pointers = a_ptr + a_offsets, b_ptr + b_offsets
    if a_low_ptr is not None:
        a_low_pointers, b_low_pointers = a_low_ptr + a_offsets, b_low_ptr + b_offsets
    total = tl.zeros([ROWS, COLS], tl.float32)
    for at in range(0, depth, DEPTH):
        there = step < depth - at
        a = tl.load(a_pointers, mask=(row < rows)[:, None] & there[None, :], other=0.0)
        b = tl.load(b_pointers, mask=there[:, None] & (col < cols)[None, :], other=0.0)
        total = matrix_product(a, b, total, PRECISION)
        if a_low_ptr is not None:
            b_low = tl.load(b_low_pointers, mask=there[:, None] & (col < cols)[None, :], other=0.0)
            total = matrix_product(a, b_low, total, PRECISION)
            a_low = tl.load(a_low_pointers, mask=(row < rows)[:, None] & there[None, :], other=0.0)
            total = matrix_product(a_low, b, total, PRECISION)
            a_low_pointers += DEPTH * a_depth
            b_low_pointers += DEPTH * b_depth
        a_pointers += DEPTH * a_depth
        b_pointers += DEPTH * b_depth
    return total


@triton.jit(do_not_specialize=["key", "start"])
def apply_kernel(
    w_ptr,
    left_ptr,
    right_ptr,
    left_low_ptr,
    right_low_ptr,
    keep_ptr,
    ok_ptr,
    high_ptr,
    low_ptr,
    g_ptr,
    phi_ptr,
    from_left_ptr,
    from_right_ptr,
    from_left_low_ptr,
    from_right_low_ptr,
    rows,
    cols,
    rank,
    inner,
    w_batch,
    w_row,
    w_col,
    left_batch,
    left_row,
    left_depth,
    right_batch,
    right_depth,
    right_col,
    g_batch,
    g_row,
    g_col,
    phi_batch,
    phi_row,
    phi_col,
    from_left_batch,
    from_left_row,
    from_left_depth,
    from_right_batch,
    from_right_depth,
    from_right_col,
    alpha,
    keep,
    key: tl.int64,
    start: tl.int64,
    SIGN: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A tile of w ← keep·w − alpha·(left @ right + φ ⊙ E), see `reference.apply_`: one read and one write of w, one read of g."""
    if ok_ptr is not None:
        if not holds(ok_ptr):
            return
    # Tiles in groups of GROUP rows, column by column within a group.
    tile, down, across = tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(cols, COLS)
    group = tile // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    row_tile = group * GROUP + (tile % (GROUP * across)) % height
    col_tile = (tile % (GROUP * across)) // height
    first_row, first_col = row_tile.to(tl.int64) * ROWS, col_tile.to(tl.int64) * COLS
    row, col = first_row + tl.arange(0, ROWS), first_col + tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    batch = tl.program_id(1).to(tl.int64)
    # From the tile's corner on, 32 bits are enough for an offset: 64 would take twice the registers.
    r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    if WIDE:
        r, c = r.to(tl.int64), c.to(tl.int64)

    if left_low_ptr is not None:
        left_low_ptr += batch * left_batch
        right_low_ptr += batch * right_batch
    lift = factor_product(
        left_ptr + batch * left_batch,
        right_ptr + batch * right_batch,
        left_low_ptr,
        right_low_ptr,
        left_row,
        left_depth,
        right_depth,
        right_col,
        row,
        col,
        rows,
        cols,
        rank,
        PRECISION,
        ROWS,
        COLS,
        DEPTH,
    )
    if g_ptr is not None:
        corner = batch * g_batch + first_row * g_row + first_col * g_col
        e = widen(tl.load(g_ptr + corner + (r * g_row + c * g_col), mask=inside, other=0.0))
        if from_left_ptr is not None:
            if from_left_low_ptr is not None:
                from_left_low_ptr += batch * from_left_batch
                from_right_low_ptr += batch * from_right_batch
            e -= factor_product(
                from_left_ptr + batch * from_left_batch,
                from_right_ptr + batch * from_right_batch,
                from_left_low_ptr,
                from_right_low_ptr,
                from_left_row,
                from_left_depth,
                from_right_depth,
                from_right_col,
                row,
                col,
                rows,
                cols,
                inner,
                PRECISION,
                ROWS,
                COLS,
                DEPTH,
            )
        if SIGN:
            e = sign(e)
    if keep_ptr is not None:
        keep = tl.load(keep_ptr).to(tl.float32)
    corner = batch * w_batch + first_row * w_row + first_col * w_col
    w_ptr, at = w_ptr + corner, r * w_row + c * w_col
    if high_ptr is not None:
        high_ptr += corner
    if low_ptr is not None:
        low_ptr += corner
    w = load_joined(w_ptr, high_ptr, low_ptr, at, inside) * keep - lift * alpha
    if g_ptr is not None:
        corner = batch * phi_batch + first_row * phi_row + first_col * phi_col
        w -= (e * alpha) * tl.load(phi_ptr + corner + (r * phi_row + c * phi_col), mask=inside, other=0.0)
    positions = start + ((batch * rows + first_row) * cols + first_col) + (r * cols + c)
    store_weight(w_ptr, high_ptr, low_ptr, at, w, inside, key, positions, STOCHASTIC)


# -------------------------------------------------------------------------------------------------------------------- project


Halves = tuple[Tensor | None, Tensor | None]


def halves(x: Tensor) -> Halves:
    """A float32 tensor as the sum of two bfloat16 ones, in its order of storage."""
    if x.dim() > 1 and not x.is_contiguous() and x.mT.is_contiguous():
        high, low = halves(x.mT)
        return (None, None) if high is None or low is None else (high.mT, low.mT)
    x, n = x.contiguous(), x.numel()
    upper, lower = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x, dtype=torch.bfloat16)
    if n:
        launch(split_kernel, (-(-n // SPLIT_BLOCK),), x, x, upper, lower, n, BLOCK=SPLIT_BLOCK)
    return upper, lower


@dataclass(frozen=True)
class Tile:
    """What a program computes, and with how many warps and stages."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


def project_tile(lines: int, rank: int, halved: bool, norms: bool, kib: int) -> Tile:
    """Tiles 128 wide; a stage of 128 × 64 bfloat16 and two 64 × 128 is 48 KiB, one of float32 at half the depth 32 KiB.

    Sums of squares take registers beside the operands, which lie in them before Hopper: the full depth would spill.
    """
    tall = halved or kib >= 220
    rows, cols = min(128 if tall else 64, max(16, power_of_two(lines))), min(128, max(16, power_of_two(rank)))
    depth = 64 if halved and kib >= (220 if norms else 160) else 32
    stages = 4 if kib >= 220 and halved else 3 if kib > 64 else 2
    return Tile(rows, cols, depth, 8 if rows * cols >= 64 * 128 else 4, stages)


def tiles(lines: int, rank: int, tile: Tile) -> int:
    return -(-lines // tile.rows) * max(1, -(-rank // tile.cols))


def parts(lines: int, rank: int, depth: int, batch: int, tile: Tile, units: int) -> int:
    """Into how many parts the contracted side is cut: enough for two programs on each multiprocessor, of at least 512 elements
    each, and no more than lets their results be a quarter of the gradient."""
    programs = tiles(lines, rank, tile) * batch
    most = max(1, min(depth // 512, depth // (8 * max(rank, 1))))
    return max(1, min(2 * units // programs, most))


def _projected(grad: Tensor, basis: Tensor, right: bool, norms: bool) -> Any:
    if not covered(grad, basis):
        return NotImplemented
    oriented = matrices(grad if right else grad.mT)
    flat_basis = matrices(basis)
    if oriented is None or flat_basis is None or oriented[1] > MAX_BATCH:
        return NotImplemented
    (g, batch), (b, _) = oriented, flat_basis
    (_, lines, depth), rank = g.shape, b.shape[-1]
    shape = (*grad.shape[:-2], lines)
    if grad.numel() == 0 or (rank == 0 and not norms):
        nothing = basis.new_zeros(*shape, rank)
        return (nothing, grad.new_zeros(*shape, 1, dtype=torch.float32)) if norms else nothing
    precision = torch.get_float32_matmul_precision()
    high, low = (
        (b, None) if grad.dtype != torch.bfloat16 else (b.bfloat16(), None) if precision == "medium" else halves(b)
    )
    tile = project_tile(lines, rank, grad.dtype == torch.bfloat16, norms, shared_kib(grad))
    count = parts(lines, rank, depth, batch, tile, processors(grad))
    part = -(-depth // (count * tile.depth)) * tile.depth
    count = -(-depth // part)
    out = torch.empty((count, batch, lines, rank), dtype=torch.float32, device=grad.device)
    squares = torch.empty((count, batch, lines), dtype=torch.float32, device=grad.device) if norms else None
    launch(
        project_kernel,
        (tiles(lines, rank, tile), count, batch),
        grad,
        g,
        high,
        low,
        out,
        squares,
        lines,
        rank,
        depth,
        part,
        *g.stride(),
        *_strides(high),
        NORMS=norms,
        PRECISION="tf32x3" if precision == "highest" else "tf32",
        LINES=tile.rows,
        RANK=tile.cols,
        DEPTH=tile.depth,
        warps=tile.warps,
        stages=tile.stages,
        fuse=True,
    )
    reduced = (out[0] if count == 1 else out.sum(0)).view(*shape, rank)
    if squares is None:
        return reduced
    return reduced, (squares[0] if count == 1 else squares.sum(0)).view(*shape, 1)


def project(grad: Tensor, basis: Tensor, right: bool) -> Any:
    return _projected(grad, basis, right, False)


def project_with_norms(grad: Tensor, basis: Tensor, right: bool) -> Any:
    return _projected(grad, basis, right, True)


# --------------------------------------------------------------------------------------------------------------------- apply_


def apply_tile(rows: int, cols: int, kib: int, halved: bool, narrow: bool, short: bool) -> Tile:
    """Tiles of 128 × 128, or `narrow` 128 × 64 or `short` 64 × 64; a stage of factors at depth 32, float32 or halved, is 32 or
    24 KiB for the largest."""
    height, width = (
        min(64 if less else 128, max(16, power_of_two(size))) for size, less in ((rows, short), (cols, narrow))
    )
    depth = 64 if halved and kib >= 220 else 32
    stages = 3 if depth == 64 else 4 if kib >= 160 else 3 if kib > 96 else 2
    return Tile(height, width, depth, 8 if height * width >= 128 * 64 else 4, stages)


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    """Strides of a (batch, rows, cols) tensor, 0 along dimensions of one element."""
    if tensor is None:
        return (0, 0, 0)
    return tuple(0 if size == 1 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _factors(tensors: list[Tensor | None], weight: torch.dtype, precision: str) -> list[Halves]:
    """The factors as the tensor cores take them: whole, or as the sum of two parts."""
    if weight == torch.float32 or precision == "high":
        return [(t, None) for t in tensors]
    if precision == "medium":
        return [(None if t is None else t.bfloat16(), None) for t in tensors]
    return [(None, None) if t is None else halves(t) for t in tensors]


def apply_(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    scalars: Tensor,
    keep: Tensor | None,
    ok: Tensor | None,
    rounding: Tensor | None,
    grad: Tensor | None,
    phi: Tensor | None,
    subtract_left: Tensor | None,
    subtract_right: Tensor | None,
    sign: bool,
    error: Tensor | None = None,
    error_low: Tensor | None = None,
) -> Any:
    if not covered(weight, left, grad) or not lie_alike(weight, error, error_low):
        return NotImplemented
    if weight.numel() == 0:
        return None
    views = []
    for tensor in (weight, left, right, grad, phi, subtract_left, subtract_right):
        view = None if tensor is None else matrices(tensor)
        if tensor is not None and (view is None or view[1] > MAX_BATCH):
            return NotImplemented
        views.append(None if view is None else view[0])
    w, a, b, g, scale, from_a, from_b = views
    assert w is not None
    precision = torch.get_float32_matmul_precision()
    stored = weight.dtype if error is None else torch.float32  # what the numbers are, whatever they lie in
    (a, a_low), (b, b_low), (from_a, from_a_low), (from_b, from_b_low) = _factors(
        [a, b, from_a, from_b], stored, precision
    )
    batch, rows, cols = w.shape
    kib = shared_kib(weight)
    # What has to stay in registers beside the sum: a gradient, float32 weights, what was rounded off, a second sum (before Hopper
    # operands, too). A larger tile would spill.
    narrow = g is not None or stored == torch.float32
    short = from_a is not None and kib < 220
    tile = apply_tile(rows, cols, kib, a is not None and a.dtype == torch.bfloat16, narrow, short)
    steps = [step for t in (w, a, b, g, scale, from_a, from_b) for step in _strides(t)]
    alpha, factor = scalars.tolist()
    stochastic, (key, start, *_) = key_and_start(rounding)
    launch(
        apply_kernel,
        (-(-rows // tile.rows) * -(-cols // tile.cols), batch),
        weight,
        w,
        a,
        b,
        a_low,
        b_low,
        keep,
        flags(ok),
        error,
        error_low,
        g,
        scale,
        from_a,
        from_b,
        from_a_low,
        from_b_low,
        rows,
        cols,
        left.shape[-1],
        0 if subtract_left is None else subtract_left.shape[-1],
        *steps,
        alpha,
        factor,
        key,
        start,
        SIGN=sign,
        STOCHASTIC=stochastic and weight.dtype == torch.bfloat16,
        PRECISION="tf32x3" if precision == "highest" else "tf32",
        ROWS=tile.rows,
        COLS=tile.cols,
        DEPTH=tile.depth,
        GROUP=GROUP,
        WIDE=128 * max(cols, *map(abs, steps)) >= 2**31,
        warps=tile.warps,
        stages=tile.stages,
        fuse=True,
    )
    return None


OPERATIONS = {"project": project, "project_with_norms": project_with_norms, "apply_": apply_}
