"""Products with W = B A + S, S in compressed sparse rows: `sltrain_forward`, `sltrain_backward_input`, `sampled_product`.

A program makes a tile of the result. It multiplies the factor's columns for the tile first, then goes through S: a tile of S is built
in registers, from the entries that a table of windows says are in it, and goes to the tensor cores as a dense one. Neither W nor S
exists anywhere. Building a tile of W itself, B A in it, would repeat the product of the factors for every tile of tokens; u Bᵀ costs
rank/n of what the tile of S costs.

The table says for each row of S which entry is the first of each window of columns: an integer for 64 or 128 elements of W, made anew
for each call, in which searches run side by side. Without it each program would search for itself, one load after the other.

`sampled_product` makes a tile of ∂yᵀ x, and writes those elements of it that S has. Precision as in `products`, for float32 operands.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_optim.kernels.sparse_reference import token_rows
from lowrank_optim.kernels.triton.arithmetic import matrix_product, narrow, widen
from lowrank_optim.kernels.triton.launching import covered, launch, power_of_two
from lowrank_optim.kernels.triton.products import factor_product

SEARCH_BLOCK = 256


# -------------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def windows_kernel(
    pointers_ptr, columns_ptr, starts_ptr, count, windows, steps, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """starts (rows, windows + 1): the first entry of each row at or beyond column window · WIDTH, found by halving `steps` times."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    row, bound = index // (windows + 1), (index % (windows + 1)) * WIDTH
    low = tl.load(pointers_ptr + row, mask=inside, other=0)
    high = tl.load(pointers_ptr + row + 1, mask=inside, other=0)
    for _ in range(steps):
        middle = low + (high - low) // 2
        open_ = low < high
        below = open_ & (tl.load(columns_ptr + middle, mask=open_, other=0) < bound)
        high = tl.where(open_ & (below == 0), middle, high)
        low = tl.where(below, middle + 1, low)
    tl.store(starts_ptr + index, low, mask=inside)


@triton.jit
def _entries(starts_ptr, row, rows, window, windows):
    """The entries of some rows in a window: the first of each row, and the first that is not in it."""
    place = starts_ptr + row.to(tl.int64) * (windows + 1) + window
    return tl.load(place, mask=row < rows, other=0), tl.load(place + 1, mask=row < rows, other=0)


@triton.jit
def _sparse_tile(
    values_ptr, columns_ptr, starts_ptr, row, rows, window, windows, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """A tile of S, (ROWS, WIDTH), in the type of the values: one entry of each row after the other."""
    begin, end = _entries(starts_ptr, row, rows, window, windows)
    place = tl.arange(0, WIDTH)[None, :]
    tile = tl.zeros([ROWS, WIDTH], values_ptr.dtype.element_ty)
    for step in range(tl.max(end - begin, axis=0)):
        at = begin + step
        there = at < end
        column = tl.load(columns_ptr + at, mask=there, other=0).to(tl.int32) - window * WIDTH
        value = tl.load(values_ptr + at, mask=there, other=0.0)
        tile = tl.where((place == column[:, None]) & there[:, None], value[:, None], tile)
    return tile


@triton.jit
def sparse_kernel(
    x_ptr,
    inner_ptr,
    factor_ptr,
    bias_ptr,
    values_ptr,
    columns_ptr,
    starts_ptr,
    out_ptr,
    tokens,
    rows,
    cols,
    windows,
    rank,
    x_token,
    x_feature,
    inner_token,
    inner_rank,
    factor_rank,
    factor_feature,
    FORWARD: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out = inner @ factor + bias + x Sᵀ (FORWARD: tokens × rows), or inner @ factor + x S (tokens × cols)."""
    across = tl.cdiv(tokens, TOKENS)
    # Neighbouring programs build the same tiles of S: their entries come from the cache.
    token = (tl.program_id(0) % across).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    number = tl.program_id(0) // across
    size: tl.constexpr = ROWS if FORWARD else WIDTH
    features = rows if FORWARD else cols
    feature = number.to(tl.int64) * size + tl.arange(0, size)
    inside = (token < tokens)[:, None] & (feature < features)[None, :]
    if inner_ptr is not None:
        total = factor_product(
            inner_ptr,
            factor_ptr,
            None,
            None,
            inner_token,
            inner_rank,
            factor_rank,
            factor_feature,
            token,
            feature,
            tokens,
            features,
            rank,
            PRECISION,
            TOKENS,
            size,
            DEPTH,
        )
    else:
        total = tl.zeros([TOKENS, size], tl.float32)
    x_rows = x_ptr + (token * x_token)[:, None]
    if FORWARD:
        row = number * ROWS + tl.arange(0, ROWS)
        for window in range(windows):
            col = window * WIDTH + tl.arange(0, WIDTH)
            x = tl.load(
                x_rows + col.to(tl.int64)[None, :] * x_feature,
                mask=(token < tokens)[:, None] & (col < cols)[None, :],
                other=0.0,
            )
            tile = _sparse_tile(values_ptr, columns_ptr, starts_ptr, row, rows, window, windows, ROWS, WIDTH)
            total = matrix_product(x, tl.trans(tile), total, PRECISION)
    else:
        for first in range(0, rows, ROWS):
            row = first + tl.arange(0, ROWS)
            x = tl.load(
                x_rows + row.to(tl.int64)[None, :] * x_feature,
                mask=(token < tokens)[:, None] & (row < rows)[None, :],
                other=0.0,
            )
            tile = _sparse_tile(values_ptr, columns_ptr, starts_ptr, row, rows, number, windows, ROWS, WIDTH)
            total = matrix_product(x, tile, total, PRECISION)
    if bias_ptr is not None:
        total += widen(tl.load(bias_ptr + feature, mask=feature < features, other=0.0))[None, :]
    out = out_ptr + token[:, None] * features + feature[None, :]
    tl.store(out, narrow(total, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sampled_kernel(
    g_ptr,
    x_ptr,
    columns_ptr,
    starts_ptr,
    out_ptr,
    tokens,
    rows,
    cols,
    windows,
    g_token,
    g_feature,
    x_token,
    x_feature,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """out[k] = Σ_t g[t, i_k] x[t, j_k] for the entries of some rows in one window."""
    window = tl.program_id(0) % windows
    row = (tl.program_id(0) // windows) * ROWS + tl.arange(0, ROWS)
    col = window * WIDTH + tl.arange(0, WIDTH)
    g_lines = g_ptr + (row.to(tl.int64) * g_feature)[:, None]
    x_lines = x_ptr + (col.to(tl.int64) * x_feature)[None, :]
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, tokens, TOKENS):
        token = first + tl.arange(0, TOKENS)
        there, far = token < tokens, token.to(tl.int64)
        g = tl.load(g_lines + (far * g_token)[None, :], mask=(row < rows)[:, None] & there[None, :], other=0.0)
        x = tl.load(x_lines + (far * x_token)[:, None], mask=there[:, None] & (col < cols)[None, :], other=0.0)
        total = matrix_product(g, x, total, PRECISION)
    begin, end = _entries(starts_ptr, row, rows, window, windows)
    place = tl.arange(0, WIDTH)[None, :]
    for step in range(tl.max(end - begin, axis=0)):
        at = begin + step
        column = tl.load(columns_ptr + at, mask=at < end, other=0).to(tl.int32) - window * WIDTH
        found = tl.sum(tl.where(place == column[:, None], total, 0.0), axis=1)
        tl.store(out_ptr + at, narrow(found, out_ptr.dtype.element_ty), mask=at < end)


# ------------------------------------------------------------------------------------------------------------------ operations


@dataclass(frozen=True)
class Tile:
    """Tokens, and rows and columns of S, of a program; and its warps."""

    tokens: int
    rows: int
    width: int
    warps: int


def tile_of(x: Tensor, tokens: int, rows: int, forward: bool) -> Tile:
    """Tiles of 128 × 128 at depth 64; half as many tokens, and half the depth, in float32."""
    short = x.dtype != torch.float32
    depth = 64 if short else 32
    side = min(128, max(16, power_of_two(rows)))
    height = min(128 if short else 64, max(16, power_of_two(tokens)))
    return Tile(height, side, depth, 8) if forward else Tile(height, min(depth, side), 128, 8)


def _windows(pointers: Tensor, columns: Tensor, cols: int, width: int) -> tuple[Tensor, int]:
    """The table of windows, and the number of windows."""
    rows, windows = pointers.numel() - 1, -(-cols // width)
    starts = torch.empty((rows, windows + 1), dtype=torch.int32, device=pointers.device)
    launch(
        windows_kernel,
        (-(-starts.numel() // SEARCH_BLOCK),),
        pointers,
        pointers,
        columns,
        starts,
        starts.numel(),
        windows,
        cols.bit_length(),
        WIDTH=width,
        BLOCK=SEARCH_BLOCK,
    )
    return starts, windows


def _precision() -> str:
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _product(
    forward: bool,
    x: Tensor,
    inner: Tensor | None,
    factor: Tensor | None,
    bias: Tensor | None,
    values: Tensor,
    pointers: Tensor,
    columns: Tensor,
    cols: int,
) -> Any:
    """inner @ factor + bias + x Sᵀ or x S, where `factor` is rank × features."""
    if not covered(x):
        return NotImplemented
    rows = pointers.numel() - 1
    out = x.new_empty((*x.shape[:-1], rows if forward else cols))
    lines, values = token_rows(x), values.contiguous()
    inner = None if inner is None else token_rows(inner)
    tile = tile_of(x, len(lines), rows, forward)
    starts, windows = _windows(pointers, columns, cols, tile.width)
    launch(
        sparse_kernel,
        (-(-len(lines) // tile.tokens) * (-(-rows // tile.rows) if forward else windows),),
        x,
        lines,
        inner,
        factor,
        None if bias is None else bias.contiguous(),
        values,
        columns,
        starts,
        out,
        len(lines),
        rows,
        cols,
        windows,
        0 if inner is None else inner.shape[1],
        *lines.stride(),
        *((0, 0) if inner is None else inner.stride()),
        *((0, 0) if factor is None else factor.stride()),
        FORWARD=forward,
        PRECISION=_precision(),
        TOKENS=tile.tokens,
        ROWS=tile.rows,
        WIDTH=tile.width,
        DEPTH=32,
        warps=tile.warps,
        stages=2,
        fuse=True,
    )
    return out


def sltrain_forward(
    x: Tensor,
    u: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None,
    values: Tensor,
    pointers: Tensor,
    columns: Tensor,
) -> Any:
    factor = None if lora_b is None else lora_b.mT
    return _product(True, x, u, factor, bias, values, pointers, columns, x.shape[-1])


def sltrain_backward_input(
    grad: Tensor, q: Tensor | None, lora_a: Tensor | None, values: Tensor, pointers: Tensor, columns: Tensor, cols: int
) -> Any:
    return _product(False, grad, q, lora_a, None, values, pointers, columns, cols)


def sampled_product(grad: Tensor, x: Tensor, pointers: Tensor, columns: Tensor) -> Any:
    if not covered(x):
        return NotImplemented
    out, g, lines = x.new_empty(columns.numel()), token_rows(grad), token_rows(x)
    rows, cols = pointers.numel() - 1, x.shape[-1]
    short = x.dtype != torch.float32
    height, width = (min(128 if short else 64, max(16, power_of_two(side))) for side in (rows, cols))
    starts, windows = _windows(pointers, columns, cols, width)
    launch(
        sampled_kernel,
        (-(-rows // height) * windows,),
        x,
        g,
        lines,
        columns,
        starts,
        out,
        len(lines),
        rows,
        cols,
        windows,
        *g.stride(),
        *lines.stride(),
        PRECISION=_precision(),
        TOKENS=64 if short else 32,
        ROWS=height,
        WIDTH=width,
        warps=8 if short else 4,
        stages=3,
        fuse=True,
    )
    return out


OPERATIONS = {
    "sltrain_forward": sltrain_forward,
    "sltrain_backward_input": sltrain_backward_input,
    "sampled_product": sampled_product,
}
