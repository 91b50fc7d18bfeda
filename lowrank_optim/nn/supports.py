"""Where a sparse matrix has its entries: fixed supports, read in compressed sparse rows.

A support is m×n with `count` entries, whose values lie in a vector in row-major order. `compressed` says where they stand:

    pointers    (m + 1,) int32, how many entries lie before each row
    columns     (count,), ascending in each row; int16 where n ≤ 32768, else int32

Nothing of the size of the whole matrix is made.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from lowrank_optim.kernels.counter_rng import PURPOSE_SUPPORT, Stratified, choose, make_key

DRAWN = 1 << 18
"""Entries of a support that are drawn at a time: 2 MiB for each of a few tensors of int64."""

NARROW = 1 << 15
"""Columns that int16 can number."""


def column_type(cols: int) -> torch.dtype:
    """The type of the columns of an m×n support."""
    return torch.int16 if cols <= NARROW else torch.int32


@dataclass(frozen=True)
class SeededSupport:
    """A support that a key says: one entry from each of `count` equal strata, made again wherever it is needed.

    Every element of the matrix is as likely as any other, and rows have nearly equal numbers of entries. Nothing is stored.
    """

    rows: int
    cols: int
    count: int
    key: int

    def parts(self, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        """row·n + column of the entries, int64 and ascending, some at a time."""
        draw = _stratified(self.key, self.rows * self.cols, self.count)
        for first in range(0, self.count, DRAWN):
            part = slice(first, min(first + DRAWN, self.count))
            yield part, draw.indices(part.start, part.stop, device)

    def compressed(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Pointers and columns."""
        columns = torch.empty(self.count, dtype=column_type(self.cols), device=device)
        edges = torch.arange(0, (self.rows + 1) * self.cols, self.cols, device=device)
        pointers = torch.zeros(self.rows + 1, dtype=torch.int32, device=device)
        for part, index in self.parts(device):
            pointers += torch.searchsorted(index, edges, out_int32=True)
            columns[part] = index.remainder_(self.cols)
        return pointers, columns


@lru_cache(maxsize=1 << 14)
def _stratified(key: int, population: int, count: int) -> Stratified:
    return Stratified(key, population, count)


@dataclass(frozen=True)
class StoredSupport:
    """A support in compressed sparse rows."""

    rows: int
    cols: int
    pointers: Tensor
    columns: Tensor

    @property
    def count(self) -> int:
        """How many entries there are."""
        return self.columns.numel()

    def compressed(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Pointers and columns."""
        return self.pointers, self.columns


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
    return StoredSupport(rows, cols, pointers.int(), (indices % cols).to(column_type(cols)))


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


def stored_columns(support: StoredSupport) -> Tensor:
    """The columns as a buffer: (count,) int32, or (count, 2) bytes of int16, which process groups cannot send as such."""
    narrow = support.columns.dtype == torch.int16
    return support.columns.unsqueeze(1).view(torch.uint8) if narrow else support.columns


def linear_indices(support: Support, device: torch.device) -> Tensor:
    """row·n + column of every entry, in the order of the values; int64: 8 bytes for each entry."""
    if isinstance(support, SeededSupport):
        return torch.cat([index for _, index in support.parts(device)])
    first = torch.arange(0, support.rows * support.cols, support.cols, device=device)
    if isinstance(support, ColumnSupport):
        return (first.unsqueeze(1) + support.columns).view(-1)
    rows = first.repeat_interleave(support.pointers.diff(), output_size=support.count)
    return rows.add_(support.columns)


def support_key(seed: int, position: int) -> int:
    """The key of the support of the layer at a position in the model."""
    return make_key(seed, position, 0, PURPOSE_SUPPORT)
