"""Where a sparse matrix has its entries: fixed supports, read in row tiles.

A support is m×n with `count` entries, whose values lie in a vector in row-major order. `tiles` cuts it into slices of rows; each
tile says which values are its own, and where they stand in it. Nothing of the size of the whole matrix is made.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lowrank_optim.kernels.counter_rng import PURPOSE_SUPPORT, Stratified, choose, make_key

TILE_ELEMENTS = 1 << 20
"""Elements of a tile on the CPU; on accelerators four times as many."""


class Tile(NamedTuple):
    """Some rows of a support: rows `rows` have the values `values`, which stand at `places` in the flattened slice."""

    rows: slice
    values: slice
    places: Tensor


def tile_rows(rows: int, cols: int, device: torch.device) -> int:
    """Rows of a tile: at most a quarter of the matrix, and at most `TILE_ELEMENTS` elements."""
    elements = TILE_ELEMENTS if device.type == "cpu" else 4 * TILE_ELEMENTS
    return max(1, min(elements // max(cols, 1), -(-rows // 4)))


def tile_starts(rows: int, size: int) -> tuple[int, ...]:
    """The first row of each tile, and the end."""
    return (*range(0, rows, size), rows)


@dataclass(frozen=True)
class SeededSupport:
    """A support that a key says: one entry from each of `count` equal strata, made again wherever it is needed.

    Every element of the matrix is as likely as any other, and rows have nearly equal numbers of entries. Nothing is stored.
    """

    rows: int
    cols: int
    count: int
    key: int

    def tiles(self, device: torch.device) -> Iterator[Tile]:
        """The support in slices of rows, from the first to the last."""
        size = tile_rows(self.rows, self.cols, device)
        draw, bounds = _stratified(self.key, self.rows, self.cols, self.count, size)
        starts = tile_starts(self.rows, size)
        for i, first in enumerate(starts[:-1]):
            places = draw.indices(bounds[i], bounds[i + 1], device).sub_(first * self.cols)
            yield Tile(slice(first, starts[i + 1]), slice(bounds[i], bounds[i + 1]), places)


@lru_cache(maxsize=1 << 14)
def _stratified(key: int, rows: int, cols: int, count: int, size: int) -> tuple[Stratified, tuple[int, ...]]:
    """The draw, and how many entries lie before each tile of `size` rows."""
    draw = Stratified(key, rows * cols, count)
    return draw, tuple(draw.below(first * cols) for first in tile_starts(rows, size))


@dataclass(frozen=True)
class StoredSupport:
    """A support in compressed sparse rows.

    pointers: (m + 1,) int32, how many entries lie before each row.
    columns: (count,) int32, ascending in each row.
    bounds: the pointers at the ends of tiles, by the number of rows of a tile; filled once, so that the host need not wait again.
    """

    rows: int
    cols: int
    pointers: Tensor
    columns: Tensor
    bounds: dict[int, list[int]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many entries there are."""
        return self.columns.numel()

    def tiles(self, device: torch.device) -> Iterator[Tile]:
        """The support in slices of rows, from the first to the last."""
        size = tile_rows(self.rows, self.cols, device)
        starts = tile_starts(self.rows, size)
        if size not in self.bounds:
            self.bounds[size] = [int(self.pointers[first]) for first in starts]
        bounds = self.bounds[size]
        for i, (first, end) in enumerate(pairwise(starts)):
            values = slice(bounds[i], bounds[i + 1])
            lengths = self.pointers[first : end + 1].diff().long()
            offsets = torch.arange(0, (end - first) * self.cols, self.cols, device=device)
            places = offsets.repeat_interleave(lengths, output_size=values.stop - values.start)
            yield Tile(slice(first, end), values, places.add_(self.columns[values]))


@dataclass(frozen=True)
class ColumnSupport:
    """Whole columns: `columns` is (k,) int32, ascending; the values are an m×k matrix, flattened."""

    rows: int
    cols: int
    columns: Tensor

    @property
    def count(self) -> int:
        """How many entries there are."""
        return self.rows * self.columns.numel()


Support: TypeAlias = SeededSupport | StoredSupport | ColumnSupport


def uniform_support(rows: int, cols: int, count: int, key: int, device: torch.device) -> StoredSupport:
    """A subset of exactly `count` elements, each subset as likely as any other. Sorts m·n hashes once: 24·m·n bytes."""
    return support_from_indices(rows, cols, choose(key, rows * cols, count, device))


def column_support(rows: int, cols: int, count: int, key: int, device: torch.device) -> ColumnSupport:
    """`count` columns drawn at random."""
    return ColumnSupport(rows, cols, choose(key, cols, count, device).int())


def support_from_indices(rows: int, cols: int, indices: Tensor) -> StoredSupport:
    """The support of sorted, distinct linear indices row·n + column, int64.

    Raises:
        ValueError: they are not one-dimensional integers, sorted, distinct and in range.
    """
    if indices.dim() != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(
            f"indices must be a vector of integers row·{cols} + column, got {tuple(indices.shape)} {indices.dtype}"
        )
    indices = indices.detach().long()
    if indices.numel() and (
        int(indices[0]) < 0 or int(indices[-1]) >= rows * cols or bool((indices.diff() <= 0).any())
    ):
        raise ValueError(f"indices must be ascending, distinct and in [0, {rows}·{cols})")
    lengths = torch.bincount(indices // cols, minlength=rows)
    pointers = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return StoredSupport(rows, cols, pointers.int(), (indices % cols).int())


def support_from_rows(rows: int, cols: int, pointers: Tensor, columns: Tensor) -> StoredSupport:
    """The support of row pointers and columns out of a checkpoint.

    Raises:
        ValueError: they are not compressed sparse rows of an m×n matrix.
    """
    if (
        pointers.shape != (rows + 1,)
        or columns.dim() != 1
        or pointers.is_floating_point()
        or columns.is_floating_point()
    ):
        raise ValueError(
            f"row pointers must be ({rows + 1},) integers and columns a vector of integers, got {tuple(pointers.shape)} "
            f"{pointers.dtype} and {tuple(columns.shape)} {columns.dtype}"
        )
    lengths = pointers.long().diff()
    if int(pointers[0]) != 0 or int(pointers[-1]) != columns.numel() or bool((lengths < 0).any()):
        raise ValueError(f"row pointers must ascend from 0 to the number of columns, {columns.numel()}")
    if columns.numel() and (int(columns.min()) < 0 or int(columns.max()) >= cols):
        raise ValueError(f"columns must be in [0, {cols})")
    offsets = torch.arange(rows, device=columns.device) * cols
    return support_from_indices(rows, cols, offsets.repeat_interleave(lengths) + columns)


def linear_indices(support: Support, device: torch.device) -> Tensor:
    """row·n + column of every entry, in the order of the values; int64: 8 bytes for each entry."""
    if isinstance(support, ColumnSupport):
        return (torch.arange(support.rows, device=device).unsqueeze(1) * support.cols + support.columns).view(-1)
    tiles = [tile.places + tile.rows.start * support.cols for tile in support.tiles(device)]
    return torch.cat(tiles)


def support_key(seed: int, position: int) -> int:
    """The key of the support of the layer at a position in the model."""
    return make_key(seed, position, 0, PURPOSE_SUPPORT)
