"""The definitions of the products with W = B A + S, in torch ops, for any device; S is a sparse matrix in compressed sparse rows.

    sltrain_forward          y  = u Bᵀ + x Sᵀ + b          u = x Aᵀ, with the scale of B A in it
    sltrain_backward_input   ∂x = q A + ∂y S               q = ∂y B, with the scale
    sampled_product          ∂v_k = Σ_t ∂y[t, i_k] x[t, j_k]

Slices of rows of S are filled one after the other, and of ∂yᵀ x one slice of rows is made at a time: nothing is as large as W. The
host reads where slices begin, for which it waits once on an accelerator.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_optim.kernels import sparse_schemas  # noqa: F401 (defines the operations)
from lowrank_optim.kernels.compute import compute_dtype, is_slow_product, product
from lowrank_optim.kernels.dispatch import definition

TILE_ELEMENTS = 1 << 20
"""Elements of a slice on the CPU; on accelerators four times as many."""


class Tile(NamedTuple):
    """Some rows of S: rows `rows` have the values `values`, which stand at `places` in the flattened slice."""

    rows: slice
    values: slice
    places: Tensor

    def filled(self, values: Tensor, cols: int) -> Tensor:
        """The slice as a dense matrix."""
        rows = self.rows.stop - self.rows.start
        return values.new_zeros(rows * cols).scatter_(0, self.places, values[self.values]).view(rows, cols)


def tiles(pointers: Tensor, columns: Tensor, cols: int) -> Iterator[Tile]:
    """S in slices of rows: of at most a quarter of the matrix each, and of at most `TILE_ELEMENTS` elements."""
    rows = pointers.numel() - 1
    elements = TILE_ELEMENTS if pointers.device.type == "cpu" else 4 * TILE_ELEMENTS
    size = max(1, min(elements // max(cols, 1), -(-rows // 4)))
    starts = [*range(0, rows, size), rows]
    bounds = pointers[torch.tensor(starts, device=pointers.device)].tolist()
    for (first, end), (begin, stop) in zip(pairwise(starts), pairwise(bounds), strict=True):
        offsets = torch.arange(0, (end - first) * cols, cols, device=pointers.device)
        places = offsets.repeat_interleave(pointers[first : end + 1].diff(), output_size=stop - begin)
        yield Tile(slice(first, end), slice(begin, stop), places.add_(columns[begin:stop]))


def token_rows(x: Tensor) -> Tensor:
    """(…, features) as tokens × features."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def low_rank(x: Tensor, inner: Tensor | None, factor: Tensor | None, bias: Tensor | None, features: int) -> Tensor:
    """inner @ factor + bias, (…, features), in x's type; without a factor the bias alone."""
    out = x.new_empty((*x.shape[:-1], features))
    y = token_rows(out)
    if inner is None or factor is None:
        y.zero_() if bias is None else y.copy_(bias)
    elif bias is None:
        if is_slow_product(x):
            y.copy_(product(token_rows(inner), factor))
        else:
            torch.mm(token_rows(inner), factor, out=y)
    else:
        torch.addmm(bias, token_rows(inner), factor, out=y)
    return out


@definition("sltrain_forward")
def sltrain_forward(
    x: Tensor,
    u: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None,
    values: Tensor,
    pointers: Tensor,
    columns: Tensor,
) -> Tensor:
    """y = u Bᵀ + x Sᵀ + b, (…, m), in x's type; the sum of the first and last part is rounded before the other is added."""
    cols = x.shape[-1]
    out = low_rank(x, u, None if lora_b is None else lora_b.mT, bias, pointers.numel() - 1)
    y, tokens = token_rows(out), token_rows(x)
    for tile in tiles(pointers, columns, cols):
        y[:, tile.rows].addmm_(tokens, tile.filled(values, cols).mT)
    return out


@definition("sltrain_backward_input")
def sltrain_backward_input(
    grad: Tensor, q: Tensor | None, lora_a: Tensor | None, values: Tensor, pointers: Tensor, columns: Tensor, cols: int
) -> Tensor:
    """∂x = q A + ∂y S, (…, n), in ∂y's type; many slices add up, in float32 for 16-bit types."""
    wide, g = compute_dtype(grad.dtype), token_rows(grad)
    out = low_rank(grad, q, lora_a, None, cols).to(wide)
    total = token_rows(out)
    for tile in tiles(pointers, columns, cols):
        total.addmm_(g[:, tile.rows].to(wide), tile.filled(values, cols).to(wide))
    return out.to(grad.dtype)


@definition("sampled_product")
def sampled_product(grad: Tensor, x: Tensor, pointers: Tensor, columns: Tensor) -> Tensor:
    """∂v, one number for each entry of S, in x's type: elements of ∂yᵀ x."""
    out, g, tokens = x.new_empty(columns.numel()), token_rows(grad), token_rows(x)
    for tile in tiles(pointers, columns, x.shape[-1]):
        out[tile.values] = (g[:, tile.rows].mT @ tokens).view(-1)[tile.places]
    return out
