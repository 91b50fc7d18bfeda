"""Subspaces as the step uses them: dense, two-sided, coordinate columns or rows, single entries, and the whole matrix.

Each projects a gradient, applies an update to the weight, and carries moments over from an older basis. All products go through
`lowrank_optim.kernels`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lowrank_optim import kernels
from lowrank_optim.distributed import HERE, Shards, Spread
from lowrank_optim.projectors.base import GradientTerm, Write, row_squares

LIFT = Write(alpha=-1.0, keep=1.0)
"""W ← W + lift(core)."""


def _change_of_basis(new: Tensor, old: Tensor, orthonormal: bool, spread: Spread) -> Tensor:
    """C with coordinates_new = coordinates_old C: P_oldᵀ P_new, with the pseudo-inverse of P_old where it is not orthonormal."""
    overlap = spread.sum(old.mT @ new, -2)
    return overlap if orthonormal else torch.linalg.solve(spread.sum(old.mT @ old, -2), overlap)


def _inverse_gram(basis: Tensor, orthonormal: bool, spread: Spread) -> Tensor:
    """(PᵀP)⁻¹: the identity where P is orthonormal."""
    if orthonormal:
        return torch.eye(basis.shape[-1], dtype=basis.dtype, device=basis.device)
    inverse: Tensor = torch.linalg.inv(spread.sum(basis.mT @ basis, -2))
    return inverse


def _overlap(new: Tensor, old: Tensor, spread: Spread) -> Tensor:
    """‖P_oldᵀP_new‖²/r, at most 1, the mean over a stack. Unlike the angle of single vectors, it knows no signs and no order."""
    squares = spread.sum(old.mT @ new, -2).square().sum((-2, -1))
    shares = squares.div(max(new.shape[-1], 1)).clamp_max(1.0)
    return shares.mean() if not spread.splits(-3) else spread.drop(-1).drop(-1).mean(shares, -1)


def lifted(shards: Shards, core: Tensor | None, term: GradientTerm | None) -> tuple[Tensor | None, GradientTerm | None]:
    """All that an update has for the rows of R, brought to the processes whose weights need it, in one message."""
    if shards is HERE:
        return core, term
    parts = {"core": core}
    if term is not None:
        parts |= {"scale": term.scale if term.by_line else None, "subtract": term.subtract}
    given = {name: part for name, part in parts.items() if part is not None}
    if not given:
        return core, term
    widths = [part.shape[-1] for part in given.values()]
    together = shards.lift(torch.cat(list(given.values()), -1) if len(given) > 1 else next(iter(given.values())))
    found = dict(zip(given, together.split(widths, -1), strict=True))
    core = found.pop("core", None)
    return core, None if term is None else replace(term, **found)


def _nothing(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors of a zero matrix of the weight's shape: rank 0, no memory."""
    *batch, rows, cols = weight.shape
    return weight.new_empty((*batch, rows, 0), dtype=dtype), weight.new_empty((*batch, 0, cols), dtype=dtype)


@dataclass(frozen=True)
class DenseBasis:
    """One basis on one side of the matrix, stored as a (…, d, r) tensor in the compute type; the local part where that is split."""

    matrix: Tensor
    side: str
    orthonormal: bool = True
    shards: Shards = field(default=HERE, compare=False)
    disjoint: ClassVar[bool] = False

    def project(self, grad: Tensor) -> Tensor:
        if grad.shape[0] == 0 and grad.dim() > 2:  # no expert of the stack is here
            return grad.new_empty(
                (0, grad.shape[-2 if self.side == "right" else -1], self.matrix.shape[-1]), dtype=self.matrix.dtype
            )
        return self.shards.collect(kernels.project(grad, self.matrix, self.side))

    def project_with_norms(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        if grad.shape[0] == 0 and grad.dim() > 2:
            reduced = self.project(grad)
            return reduced, row_squares(reduced)
        reduced, squares = kernels.project_with_norms(grad, self.matrix, self.side)
        return self.shards.collect_with(reduced, squares)

    def lifted_squares(self, reduced: Tensor) -> Tensor:
        if self.orthonormal:
            return row_squares(reduced)
        gram = self._spread.sum(self.matrix.mT @ self.matrix, -2)
        return ((reduced @ gram) * reduced).sum(-1, keepdim=True)

    @property
    def _spread(self) -> Spread:
        return self.shards.rows if self.side == "left" else self.shards.cols

    def _factors(self, core: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """Two factors whose product is lift(core)."""
        if core is None:
            return _nothing(like, self.matrix.dtype)
        return (core, self.matrix.mT) if self.side == "right" else (self.matrix, core.mT)

    def apply_(self, weight: Tensor, core: Tensor | None, write: Write, term: GradientTerm | None = None) -> None:
        core, term = lifted(self.shards, core, term)
        residual = None
        if term is not None:
            scale = term.scale if self.side == "right" else term.scale.mT
            left, right = (None, None) if term.subtract is None else self._factors(term.subtract, weight)
            residual = kernels.ResidualTerm(term.grad, scale, term.ok, term.sign, left, right)
        left, right = self._factors(core, weight)
        kernels.apply_(weight, left, right, residual=residual, start=self.shards.matrix.start, **vars(write))

    def lift_(self, grad: Tensor, reduced: Tensor) -> None:
        self.apply_(grad.zero_(), reduced @ _inverse_gram(self.matrix, self.orthonormal, self._spread), LIFT)

    def transport(self, moment: Tensor, old: Self, power: int) -> Tensor:
        return moment @ _change_of_basis(self.matrix, old.matrix, self.orthonormal, self._spread).pow(power)

    def overlap(self, old: Self) -> Tensor:
        return _overlap(self.matrix, old.matrix, self._spread)


@dataclass(frozen=True)
class TwoSidedBasis:
    """Bases on both sides: `left` (…, m, r) and `right` (…, n, r). It has no rows or columns of its own to take norms of."""

    left: Tensor
    right: Tensor
    orthonormal: bool = True
    shards: Shards = field(default=HERE, compare=False)
    disjoint: ClassVar[bool] = False

    def project(self, grad: Tensor) -> Tensor:
        # (AᵀG)B and not Aᵀ(GB): on a refresh step R is diagonal but for rounding, which Adam blows up to full size, so that only the
        # order of the released code follows it.
        if grad.dtype == self.left.dtype:
            return self.shards.collect((self.left.mT @ grad) @ self.right)
        return self.shards.collect(kernels.project(grad, self.left, "left").mT @ self.right)

    def project_with_norms(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        raise ValueError("a projection of both sides has no row or column norms; use proj_type std, left or right")

    def lifted_squares(self, reduced: Tensor) -> Tensor:
        raise ValueError("a projection of both sides has no rows or columns; use proj_type std, left or right")

    def apply_(self, weight: Tensor, core: Tensor | None, write: Write, term: GradientTerm | None = None) -> None:
        if term is not None and term.subtract is not None:
            term = replace(term, subtract=self.left @ term.subtract)
        core = None if core is None else self.left @ core
        one_sided = DenseBasis(self.right, "right", self.orthonormal, Shards(matrix=self.shards.matrix))
        one_sided.apply_(weight, core, write, term)

    def lift_(self, grad: Tensor, reduced: Tensor) -> None:
        left = _inverse_gram(self.left, self.orthonormal, self.shards.rows)
        right = _inverse_gram(self.right, self.orthonormal, self.shards.cols)
        self.apply_(grad.zero_(), left @ reduced @ right, LIFT)

    def transport(self, moment: Tensor, old: Self, power: int) -> Tensor:
        left = _change_of_basis(self.left, old.left, self.orthonormal, self.shards.rows).pow(power)
        right = _change_of_basis(self.right, old.right, self.orthonormal, self.shards.cols).pow(power)
        return left.mT @ moment @ right

    def overlap(self, old: Self) -> Tensor:
        left = _overlap(self.left, old.left, self.shards.rows)
        return (left + _overlap(self.right, old.right, self.shards.cols)) / 2.0


class _SelectedEntries(ABC):
    """What coordinate bases share: some entries of the matrix get the rule's update, all others at most the residual.

    The entries are read in the compute type before anything changes and stored, rounded once, after everything else was updated.
    """

    disjoint: ClassVar[bool] = True
    shards: Shards

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

    def _line_scale(self, scale: Tensor) -> Tensor:
        """φ for a whole matrix (or its rows), from φ for the rows of R."""
        return scale

    def project(self, grad: Tensor) -> Tensor:
        return self.shards.collect(self._get(grad).to(kernels.compute_dtype(grad.dtype)))

    def lifted_squares(self, reduced: Tensor) -> Tensor:
        return row_squares(reduced)

    def apply_(self, weight: Tensor, core: Tensor | None, write: Write, term: GradientTerm | None = None) -> None:
        dtype, start = kernels.compute_dtype(weight.dtype), self.shards.matrix.start
        core, term = lifted(self.shards, core, term)
        selected = None if core is None else self._get(weight).to(dtype)
        residual = None
        if term is not None:
            # E = G − lift R is 0 on the selected entries and G elsewhere, where nothing has to be subtracted.
            residual = kernels.ResidualTerm(term.grad, self._line_scale(term.scale), term.ok, term.sign)
        if residual is not None or isinstance(write.keep, Tensor) or write.keep != 1.0:
            left, right = _nothing(weight, dtype)
            kernels.apply_(weight, left, right, residual=residual, start=start, **vars(write))
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
        self._set(weight, selected.to(weight.dtype))


@dataclass(frozen=True)
class CoordinateBasis(_SelectedEntries):
    """Some columns (side "right") or rows (side "left") of the matrix: `indices` (…, r), ascending."""

    indices: Tensor
    side: str
    shards: Shards = field(default=HERE, compare=False)

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

    def _line_scale(self, scale: Tensor) -> Tensor:
        return scale if self.side == "right" else scale.mT

    def project_with_norms(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        dim = -1 if self.side == "right" else -2
        dtype = kernels.compute_dtype(grad.dtype)
        squares = torch.linalg.vector_norm(grad, dim=dim, keepdim=True, dtype=dtype).square_()
        return self.shards.collect_with(self._get(grad).to(dtype), squares if self.side == "right" else squares.mT)

    def transport(self, moment: Tensor, old: Self, power: int) -> Tensor:
        shared = old.indices.unsqueeze(-1) == self.indices.unsqueeze(-2)
        return moment @ shared.to(moment.dtype)


@dataclass(frozen=True)
class EntryBasis(_SelectedEntries):
    """Single entries of the matrix: `indices` (…, k), ascending positions in row-major order. R is a (…, k, 1) column."""

    indices: Tensor
    shards: Shards = field(default=HERE, compare=False)

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

    def project_with_norms(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        raise ValueError("single entries have no row or column norms; use coordinates columns or rows")

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
        offsets = self.shards.matrix.offsets[-2:]  # type: ignore[attr-defined]
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
        matrix, index = self.shards.matrix, self.indices.to(torch.int64).unsqueeze(-2)
        line = -2 if self.side == "right" else -1
        shape, offsets = matrix.local_shape(matrix.shape), matrix.offsets  # type: ignore[attr-defined]
        lines = (torch.arange(shape[line], device=index.device) + offsets[line]).unsqueeze(-1)
        return (lines, index) if self.side == "right" else (index, lines)


class ScatteredEntries(_Scattered, EntryBasis):
    """Single entries, of a matrix that is split."""

    def _coordinates(self) -> tuple[Tensor, Tensor]:
        index, cols = self.indices.to(torch.int64).unsqueeze(-1), self.shards.matrix.shape[-1]  # type: ignore[attr-defined]
        return index // cols, index % cols


@dataclass(frozen=True)
class WholeBasis:
    """The whole matrix: R is G itself, and nothing lies outside."""

    shards: Shards = field(default=HERE, compare=False)
    disjoint: ClassVar[bool] = True

    def project(self, grad: Tensor) -> Tensor:
        return grad.to(kernels.compute_dtype(grad.dtype))

    def project_with_norms(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        reduced = self.project(grad)
        return reduced, self.shards.matrix.sum(row_squares(reduced), -1)

    def lifted_squares(self, reduced: Tensor) -> Tensor:
        return self.shards.matrix.sum(row_squares(reduced), -1)

    def apply_(self, weight: Tensor, core: Tensor | None, write: Write, term: GradientTerm | None = None) -> None:
        update = torch.zeros_like(weight, dtype=kernels.compute_dtype(weight.dtype)) if core is None else core
        if term is not None and term.subtract is None:  # else E = G − lift R, which is 0
            gradient = self.project(term.grad)
            gradient = gradient if term.ok is None else torch.where(term.ok, gradient, 0.0)
            update = torch.addcmul(update, gradient.sign() if term.sign else gradient, term.scale)
        kernels.apply_dense_(weight, update, start=self.shards.matrix.start, **vars(write))

    def lift_(self, grad: Tensor, reduced: Tensor) -> None:
        grad.copy_(reduced)

    def transport(self, moment: Tensor, old: Self, power: int) -> Tensor:
        return moment

    def overlap(self, old: Self) -> Tensor:
        return kernels.host_tensor(1.0, torch.float32)
