"""Subspaces of single columns, rows or entries: bases that are only indices."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lowrank_optim import kernels
from lowrank_optim.projectors.base import GradientTerm, StepParams, row_squares
from lowrank_optim.projectors.dense_basis import LIFT, lifted
from lowrank_optim.sharding.param_sharding import LOCAL, ParamSharding


class _SelectedEntries(ABC):
    """What coordinate bases share: some entries of the matrix get the rule's update, all others at most the residual.

    The entries are read in the compute type before anything changes and stored, rounded once, after everything else was updated.
    """

    disjoint: ClassVar[bool] = True
    decays_rest: ClassVar[bool] = True
    sharding: ParamSharding

    @abstractmethod
    def _get(self, matrix: Tensor) -> Tensor:
        """The selected entries, in the shape of R; those that lie on other processes are 0."""

    @abstractmethod
    def _set(self, matrix: Tensor, values: Tensor) -> None:
        """Write the selected entries, in place."""

    @abstractmethod
    def _positions(self, matrix: Tensor) -> Tensor:
        """Their row-major positions in the local part, in the shape of R."""

    def lift_(self, grad: Tensor, reduced: Tensor) -> None:
        self.apply_(grad.zero_(), reduced, LIFT)

    def overlap(self, old: Self) -> Tensor:
        raise ValueError("coordinates are drawn at random; their overlap says nothing")

    def _channel_scale(self, scale: Tensor) -> Tensor:
        """φ for a whole matrix (or its rows), from φ for the rows of R."""
        return scale

    def project(self, grad: Tensor) -> Tensor:
        return self.sharding.collect(self._get(grad).to(kernels.compute_dtype(grad.dtype)))

    def project_with_norms(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        raise ValueError("single entries have no row or column norms; use coordinates columns or rows")

    def lifted_squares(self, reduced: Tensor) -> Tensor:
        return row_squares(reduced)

    def apply_(self, weight: Tensor, core: Tensor | None, write: StepParams, term: GradientTerm | None = None) -> None:
        dtype, start = kernels.compute_dtype(weight.dtype), self.sharding.matrix.start
        core, term = lifted(self.sharding, core, term)
        rest = write.error and write.error.map(self._get)
        selected = None if core is None else kernels.joined(self._get(weight), rest).to(dtype)
        residual = None
        if term is not None:
            # E = G − lift R is 0 on the selected entries and G elsewhere, where nothing has to be subtracted.
            residual = kernels.ResidualTerm(term.grad, self._channel_scale(term.scale), term.ok, term.sign)
        rest_of_all = write if self.decays_rest else replace(write, keep=1.0)
        if residual is not None or isinstance(rest_of_all.keep, Tensor) or rest_of_all.keep != 1.0:
            left, right = kernels.no_factors(weight, dtype)
            kernels.apply_(weight, left, right, residual=residual, start=start, **vars(rest_of_all))
        if core is None or selected is None:
            return
        kernels.decay_(selected, write.keep, write.ok)
        selected.add_(core, alpha=-write.alpha)
        if term is not None and term.subtract is None:
            gradient = self._get(term.grad).to(dtype)
            gradient = gradient if term.ok is None else torch.where(term.ok, gradient, 0.0)
            selected.addcmul_(gradient.sign() if term.sign else gradient, term.scale, value=-write.alpha)
        if write.rounding_key is not None:
            selected = kernels.stochastic_round(selected, write.rounding_key, self._positions(weight) + start)
        if write.error is None or rest is None:
            self._set(weight, selected.to(weight.dtype))
            return
        stored = torch.empty_like(selected, dtype=weight.dtype)
        kernels.store_(stored, selected, None, error=rest)
        for whole, part in zip((weight, *write.error), (stored, *rest), strict=True):
            if whole is not None and part is not None:
                self._set(whole, part)


@dataclass(frozen=True)
class CoordinateBasis(_SelectedEntries):
    """Some columns (side "right") or rows (side "left") of the matrix: `indices` (…, r), ascending."""

    indices: Tensor
    side: str
    sharding: ParamSharding = field(default=LOCAL, compare=False)
    splits_rows: ClassVar[bool] = True

    def _columns(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """The matrix with the selected dimension last, and the indices expanded to gather from it (no memory)."""
        view = matrix if self.side == "right" else matrix.mT
        index = self.indices.to(torch.int64).unsqueeze(-2)
        return view, index.expand(*view.shape[:-1], index.shape[-1])

    def _get(self, matrix: Tensor) -> Tensor:
        view, index = self._columns(matrix)
        return view.gather(-1, index)

    def _set(self, matrix: Tensor, values: Tensor) -> None:
        view, index = self._columns(matrix)
        view.scatter_(-1, index, values)

    def _positions(self, matrix: Tensor) -> Tensor:
        *batch, rows, cols = matrix.shape
        index = self.indices.to(torch.int64).unsqueeze(-2)
        if self.side == "right":
            positions = torch.arange(rows, device=matrix.device).unsqueeze(-1) * cols + index
        else:
            positions = torch.arange(cols, device=matrix.device).unsqueeze(-1) + index * cols
        return (
            positions + torch.arange(batch[0], device=matrix.device).view(-1, 1, 1) * rows * cols
            if batch
            else positions
        )

    def _channel_scale(self, scale: Tensor) -> Tensor:
        return scale if self.side == "right" else scale.mT

    def project_with_norms(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        dim = -1 if self.side == "right" else -2
        dtype = kernels.compute_dtype(grad.dtype)
        squares = torch.linalg.vector_norm(grad, dim=dim, keepdim=True, dtype=dtype).square_()
        return self.sharding.collect_with(self._get(grad).to(dtype), squares if self.side == "right" else squares.mT)

    def transport(self, moment: Tensor, old: Self, power: int) -> Tensor:
        shared = old.indices.unsqueeze(-1) == self.indices.unsqueeze(-2)
        return moment @ shared.to(moment.dtype)


@dataclass(frozen=True)
class EntryBasis(_SelectedEntries):
    """Single entries of the matrix: `indices` (…, k), ascending positions in row-major order. R is a (…, k, 1) column."""

    indices: Tensor
    sharding: ParamSharding = field(default=LOCAL, compare=False)

    def _flat(self, matrix: Tensor) -> list[tuple[Tensor, tuple[Tensor, Tensor]]]:
        """For each matrix of the stack, the matrix and the (row, column) of its entries."""
        cols = matrix.shape[-1]
        stack = matrix.unsqueeze(0) if matrix.dim() == 2 else matrix
        indices = self.indices.to(torch.int64).view(stack.shape[0], self.indices.shape[-1])
        return [(m, (i // cols, i % cols)) for m, i in zip(stack, indices, strict=True)]

    def _get(self, matrix: Tensor) -> Tensor:
        values = [part[where] for part, where in self._flat(matrix)]
        entries = torch.stack(values) if values else matrix.new_empty(0)  # no expert of the stack is here
        return entries.view(*self.indices.shape, 1)

    def _set(self, matrix: Tensor, values: Tensor) -> None:
        rows = values.reshape(-1, self.indices.shape[-1])
        for (part, where), row in zip(self._flat(matrix), rows, strict=True):
            part.index_put_(where, row)

    def _positions(self, matrix: Tensor) -> Tensor:
        size = matrix.shape[-2] * matrix.shape[-1]
        first = torch.arange(self.indices.shape[0], device=matrix.device).unsqueeze(-1) if matrix.dim() > 2 else 0
        return (self.indices.to(torch.int64) + first * size).unsqueeze(-1)

    def transport(self, moment: Tensor, old: Self, power: int) -> Tensor:
        position = torch.searchsorted(old.indices, self.indices).clamp_(max=old.indices.shape[-1] - 1)
        shared = old.indices.gather(-1, position) == self.indices
        carried = moment.squeeze(-1).gather(-1, position)
        return torch.where(shared, carried, 0.0).unsqueeze(-1)


class _Scattered(_SelectedEntries):
    """Selected entries of a matrix that is split along what they are selected by, so that some of them lie on other processes."""

    @abstractmethod
    def _coordinates(self) -> tuple[Tensor, Tensor]:
        """Row and column of each entry in the whole matrix, broadcastable to the shape of R."""

    def _here(self, matrix: Tensor) -> tuple[torch.Size, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The shape of R, where in it the entries of the local part are, and where in the local part.

        Which entries those are has to be counted, so that an accelerator makes the host wait here.
        """
        offsets = self.sharding.matrix.offsets[-2:]  # type: ignore[attr-defined]
        row, col = torch.broadcast_tensors(
            *(place - offset for place, offset in zip(self._coordinates(), offsets, strict=True))
        )
        inside = (row >= 0) & (row < matrix.shape[-2]) & (col >= 0) & (col < matrix.shape[-1])
        found = inside.nonzero(as_tuple=True)
        return inside.shape, found, (*found[:-2], row[found], col[found])

    def _get(self, matrix: Tensor) -> Tensor:
        shape, found, places = self._here(matrix)
        return matrix.new_zeros(shape).index_put_(found, matrix[places])

    def _set(self, matrix: Tensor, values: Tensor) -> None:
        _, found, places = self._here(matrix)
        matrix.index_put_(places, values[found])

    def _positions(self, matrix: Tensor) -> Tensor:
        shape, found, places = self._here(matrix)
        position = places[-2] * matrix.shape[-1] + places[-1]
        if matrix.dim() > 2:
            position = position + places[0] * (matrix.shape[-2] * matrix.shape[-1])
        return position.new_zeros(shape).index_put_(found, position)


class ScatteredCoordinates(_Scattered, CoordinateBasis):
    """Columns or rows, of a matrix that is split along them."""

    def _coordinates(self) -> tuple[Tensor, Tensor]:
        matrix, index = self.sharding.matrix, self.indices.to(torch.int64).unsqueeze(-2)
        line = -2 if self.side == "right" else -1
        shape, offsets = matrix.local_shape(matrix.shape), matrix.offsets  # type: ignore[attr-defined]
        lines = (torch.arange(shape[line], device=index.device) + offsets[line]).unsqueeze(-1)
        return (lines, index) if self.side == "right" else (index, lines)


class ScatteredEntries(_Scattered, EntryBasis):
    """Single entries, of a matrix that is split."""

    def _coordinates(self) -> tuple[Tensor, Tensor]:
        index, cols = self.indices.to(torch.int64).unsqueeze(-1), self.sharding.matrix.shape[-1]  # type: ignore[attr-defined]
        return index // cols, index % cols


@dataclass(frozen=True)
class ChosenEntries(_SelectedEntries):
    """Single entries of a matrix or of a stack: `indices` (k,), ascending positions in row-major order of its `shape`.

    R is a (k, 1) column, on all processes. Of a sharded parameter, each process reads and writes the entries that lie in its part.
    """

    indices: Tensor
    shape: tuple[int, ...]
    sharding: ParamSharding = field(default=LOCAL, compare=False)
    decays_rest: ClassVar[bool] = False

    @property
    def places(self) -> tuple[Tensor, ...]:
        """The index of each entry along each dimension of the whole matrix or stack."""
        rest, places = self.indices.to(torch.int64), []
        for size in reversed(self.shape[1:]):  # torch.unravel_index copies the shape to the device
            places.append(rest % size)
            rest = rest // size
        return rest, *reversed(places)

    def _here(self, matrix: Tensor) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Which of the entries lie in this part (None: all), and their index there along each dimension."""
        places = self.places
        whole = self.sharding.matrix
        if not whole.splits():
            return None, places
        local = [place - whole.offset(dim - matrix.dim()) for dim, place in enumerate(places)]
        inside = torch.ones_like(places[0], dtype=torch.bool)
        for place, size in zip(local, matrix.shape, strict=True):
            inside &= (place >= 0) & (place < size)
        found = inside.nonzero().squeeze(-1)  # how many there are has to be counted: an accelerator makes the host wait
        return found, tuple(place[found] for place in local)

    def _get(self, matrix: Tensor) -> Tensor:
        found, places = self._here(matrix)
        if found is None:
            return matrix[places].unsqueeze(-1)
        return matrix.new_zeros(self.indices.shape).index_put_((found,), matrix[places]).unsqueeze(-1)

    def _set(self, matrix: Tensor, values: Tensor) -> None:
        found, places = self._here(matrix)
        values = values.squeeze(-1)
        matrix.index_put_(places, values if found is None else values[found])

    def _positions(self, matrix: Tensor) -> Tensor:
        found, places = self._here(matrix)
        if found is None:
            return self.indices.to(torch.int64).unsqueeze(-1)
        position = torch.zeros_like(places[0])
        for place, size in zip(places, matrix.shape, strict=True):
            position = position * size + place
        return position.new_zeros(self.indices.shape).index_put_((found,), position).unsqueeze(-1)

    def transport(self, moment: Tensor, old: Self, power: int) -> Tensor:
        if old.indices.numel() == 0:
            return moment.new_zeros(self.indices.shape[0], 1)
        position = torch.searchsorted(old.indices, self.indices).clamp_(max=old.indices.shape[0] - 1)
        return torch.where((old.indices[position] == self.indices).unsqueeze(-1), moment[position], 0.0)
