"""Subspaces as the step uses them: dense, two-sided, coordinate columns or rows, single entries, and the whole matrix.

Each projects a gradient, applies an update to the weight, and carries moments over from an older basis. All products go through
`lowrank_optim.kernels`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lowrank_optim import kernels
from lowrank_optim.projectors.base import GradientTerm, Write, row_squares


def _change_of_basis(new: Tensor, old: Tensor, orthonormal: bool) -> Tensor:
    """C with coordinates_new = coordinates_old C: P_oldᵀ P_new, with the pseudo-inverse of P_old where it is not orthonormal."""
    overlap = old.mT @ new
    return overlap if orthonormal else torch.linalg.solve(old.mT @ old, overlap)


def _overlap(new: Tensor, old: Tensor) -> Tensor:
    """‖P_oldᵀP_new‖²/r, at most 1, the mean over a stack. Unlike the angle of single vectors, it knows no signs and no order."""
    return (old.mT @ new).square().sum((-2, -1)).div(max(new.shape[-1], 1)).clamp_max(1.0).mean()


def _nothing(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors of a zero matrix of the weight's shape: rank 0, no memory."""
    *batch, rows, cols = weight.shape
    return weight.new_empty((*batch, rows, 0), dtype=dtype), weight.new_empty((*batch, 0, cols), dtype=dtype)


@dataclass(frozen=True)
class DenseBasis:
    """One basis on one side of the matrix, stored as a (…, d, r) tensor in the compute type."""

    matrix: Tensor
    side: str
    orthonormal: bool = True
    disjoint: ClassVar[bool] = False

    def project(self, grad: Tensor) -> Tensor:
        return kernels.project(grad, self.matrix, self.side)

    def project_with_norms(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.project_with_norms(grad, self.matrix, self.side)

    def lifted_squares(self, reduced: Tensor) -> Tensor:
        if self.orthonormal:
            return row_squares(reduced)
        return ((reduced @ (self.matrix.mT @ self.matrix)) * reduced).sum(-1, keepdim=True)

    def _factors(self, core: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """Two factors whose product is lift(core)."""
        if core is None:
            return _nothing(like, self.matrix.dtype)
        return (core, self.matrix.mT) if self.side == "right" else (self.matrix, core.mT)

    def apply_(self, weight: Tensor, core: Tensor | None, write: Write, term: GradientTerm | None = None) -> None:
        residual = None
        if term is not None:
            scale = term.scale if self.side == "right" else term.scale.mT
            left, right = (None, None) if term.subtract is None else self._factors(term.subtract, weight)
            residual = kernels.ResidualTerm(term.grad, scale, term.ok, term.sign, left, right)
        left, right = self._factors(core, weight)
        kernels.apply_(weight, left, right, residual=residual, **vars(write))

    def transport(self, moment: Tensor, old: Self, power: int) -> Tensor:
        return moment @ _change_of_basis(self.matrix, old.matrix, self.orthonormal).pow(power)

    def overlap(self, old: Self) -> Tensor:
        return _overlap(self.matrix, old.matrix)


@dataclass(frozen=True)
class TwoSidedBasis:
    """Bases on both sides: `left` (…, m, r) and `right` (…, n, r). It has no rows or columns of its own to take norms of."""

    left: Tensor
    right: Tensor
    orthonormal: bool = True
    disjoint: ClassVar[bool] = False

    def project(self, grad: Tensor) -> Tensor:
        # (AᵀG)B and not Aᵀ(GB): on a refresh step R is diagonal but for rounding, which Adam blows up to full size, so that only the
        # order of the released code follows it.
        if grad.dtype == self.left.dtype:
            return (self.left.mT @ grad) @ self.right
        return kernels.project(grad, self.left, "left").mT @ self.right

    def project_with_norms(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        raise ValueError("a projection of both sides has no row or column norms; use proj_type std, left or right")

    def lifted_squares(self, reduced: Tensor) -> Tensor:
        raise ValueError("a projection of both sides has no rows or columns; use proj_type std, left or right")

    def _one_sided(self) -> DenseBasis:
        return DenseBasis(self.right, "right", self.orthonormal)

    def apply_(self, weight: Tensor, core: Tensor | None, write: Write, term: GradientTerm | None = None) -> None:
        if term is not None and term.subtract is not None:
            term = replace(term, subtract=self.left @ term.subtract)
        core = None if core is None else self.left @ core
        self._one_sided().apply_(weight, core, write, term)

    def transport(self, moment: Tensor, old: Self, power: int) -> Tensor:
        left = _change_of_basis(self.left, old.left, self.orthonormal).pow(power)
        right = _change_of_basis(self.right, old.right, self.orthonormal).pow(power)
        return left.mT @ moment @ right

    def overlap(self, old: Self) -> Tensor:
        return (_overlap(self.left, old.left) + _overlap(self.right, old.right)) / 2.0


class _SelectedEntries(ABC):
    """What coordinate bases share: some entries of the matrix get the rule's update, all others at most the residual.

    The entries are read in the compute type before anything changes and stored, rounded once, after everything else was updated.
    """

    disjoint: ClassVar[bool] = True

    @abstractmethod
    def _get(self, matrix: Tensor) -> Tensor:
        """The selected entries, in the shape of R."""

    @abstractmethod
    def _set(self, matrix: Tensor, values: Tensor) -> None:
        """Write the selected entries, in place."""

    @abstractmethod
    def _positions(self, matrix: Tensor) -> Tensor:
        """Their row-major positions, in the shape of R."""

    def overlap(self, old: Self) -> Tensor:
        raise ValueError("coordinates are drawn at random; their overlap says nothing")

    def _line_scale(self, scale: Tensor) -> Tensor:
        """φ for a whole matrix (or its rows), from φ for the rows of R."""
        return scale

    def project(self, grad: Tensor) -> Tensor:
        return self._get(grad).to(kernels.compute_dtype(grad.dtype))

    def lifted_squares(self, reduced: Tensor) -> Tensor:
        return row_squares(reduced)

    def apply_(self, weight: Tensor, core: Tensor | None, write: Write, term: GradientTerm | None = None) -> None:
        dtype = kernels.compute_dtype(weight.dtype)
        selected = None if core is None else self._get(weight).to(dtype)
        residual = None
        if term is not None:
            # E = G − lift R is 0 on the selected entries and G elsewhere, where nothing has to be subtracted.
            residual = kernels.ResidualTerm(term.grad, self._line_scale(term.scale), term.ok, term.sign)
        if residual is not None or isinstance(write.keep, Tensor) or write.keep != 1.0:
            left, right = _nothing(weight, dtype)
            kernels.apply_(weight, left, right, residual=residual, **vars(write))
        if core is None or selected is None:
            return
        kernels.decay_(selected, write.keep, write.ok)
        selected.add_(core, alpha=-write.alpha)
        if term is not None and term.subtract is None:
            gradient = self.project(term.grad)
            gradient = gradient if term.ok is None else torch.where(term.ok, gradient, 0.0)
            selected.addcmul_(gradient.sign() if term.sign else gradient, term.scale, value=-write.alpha)
        if write.rounding_key is not None:
            selected = kernels.stochastic_round(selected, write.rounding_key, self._positions(weight))
        self._set(weight, selected.to(weight.dtype))


@dataclass(frozen=True)
class CoordinateBasis(_SelectedEntries):
    """Some columns (side "right") or rows (side "left") of the matrix: `indices` (…, r), ascending."""

    indices: Tensor
    side: str

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
        return self.project(grad), squares if self.side == "right" else squares.mT

    def transport(self, moment: Tensor, old: Self, power: int) -> Tensor:
        shared = old.indices.unsqueeze(-1) == self.indices.unsqueeze(-2)
        return moment @ shared.to(moment.dtype)


@dataclass(frozen=True)
class EntryBasis(_SelectedEntries):
    """Single entries of the matrix: `indices` (…, k), ascending positions in row-major order. R is a (…, k, 1) column."""

    indices: Tensor

    def _flat(self, matrix: Tensor) -> list[tuple[Tensor, tuple[Tensor, Tensor]]]:
        """For each matrix of the stack, the matrix and the (row, column) of its entries."""
        cols = matrix.shape[-1]
        stack = matrix.unsqueeze(0) if matrix.dim() == 2 else matrix
        indices = self.indices.to(torch.int64).view(stack.shape[0], -1)
        return [(m, (i // cols, i % cols)) for m, i in zip(stack, indices, strict=True)]

    def _get(self, matrix: Tensor) -> Tensor:
        values = [part[where] for part, where in self._flat(matrix)]
        return torch.stack(values).view(*self.indices.shape, 1)

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


@dataclass(frozen=True)
class WholeBasis:
    """The whole matrix: R is G itself, and nothing lies outside."""

    disjoint: ClassVar[bool] = True

    def project(self, grad: Tensor) -> Tensor:
        return grad.to(kernels.compute_dtype(grad.dtype))

    def project_with_norms(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        reduced = self.project(grad)
        return reduced, row_squares(reduced)

    def lifted_squares(self, reduced: Tensor) -> Tensor:
        return row_squares(reduced)

    def apply_(self, weight: Tensor, core: Tensor | None, write: Write, term: GradientTerm | None = None) -> None:
        update = torch.zeros_like(weight, dtype=kernels.compute_dtype(weight.dtype)) if core is None else core
        if term is not None and term.subtract is None:  # else E = G − lift R, which is 0
            gradient = self.project(term.grad)
            gradient = gradient if term.ok is None else torch.where(term.ok, gradient, 0.0)
            update = torch.addcmul(update, gradient.sign() if term.sign else gradient, term.scale)
        kernels.apply_dense_(weight, update, **vars(write))

    def transport(self, moment: Tensor, old: Self, power: int) -> Tensor:
        return moment

    def overlap(self, old: Self) -> Tensor:
        return torch.ones(())
