"""Subspaces as the step uses them: dense, two-sided, coordinate columns or rows, and single entries.

Each projects a gradient, applies an update to the weight, and carries moments over from an older basis. All products go through
`lowrank_optim.kernels`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

from lowrank_optim import kernels


def _overlap(new: Tensor, old: Tensor, orthonormal: bool) -> Tensor:
    """C with coordinates_new = coordinates_old C: P_oldᵀ P_new, with the pseudo-inverse of P_old where it is not orthonormal."""
    overlap = old.mT @ new
    return overlap if orthonormal else torch.linalg.solve(old.mT @ old, overlap)


@dataclass(frozen=True)
class DenseBasis:
    """One basis on one side of the matrix, stored as a (…, d, r) tensor in the compute type."""

    matrix: Tensor
    side: str
    orthonormal: bool = True

    def project(self, grad: Tensor) -> Tensor:
        return kernels.project(grad, self.matrix, self.side)

    def apply_(
        self,
        weight: Tensor,
        core: Tensor,
        *,
        alpha: float,
        keep: float | Tensor,
        ok: Tensor | None,
        rounding_key: int | None,
    ) -> None:
        left, right = (core, self.matrix.mT) if self.side == "right" else (self.matrix, core.mT)
        kernels.apply_(weight, left, right, alpha=alpha, keep=keep, ok=ok, rounding_key=rounding_key)

    def transport(self, moment: Tensor, old: Self, power: int) -> Tensor:
        return moment @ _overlap(self.matrix, old.matrix, self.orthonormal).pow(power)


@dataclass(frozen=True)
class TwoSidedBasis:
    """Bases on both sides: `left` (…, m, r) and `right` (…, n, r)."""

    left: Tensor
    right: Tensor
    orthonormal: bool = True

    def project(self, grad: Tensor) -> Tensor:
        return self.left.mT @ kernels.project(grad, self.right, "right")

    def apply_(
        self,
        weight: Tensor,
        core: Tensor,
        *,
        alpha: float,
        keep: float | Tensor,
        ok: Tensor | None,
        rounding_key: int | None,
    ) -> None:
        kernels.apply_(
            weight, self.left @ core, self.right.mT, alpha=alpha, keep=keep, ok=ok, rounding_key=rounding_key
        )

    def transport(self, moment: Tensor, old: Self, power: int) -> Tensor:
        left = _overlap(self.left, old.left, self.orthonormal).pow(power)
        right = _overlap(self.right, old.right, self.orthonormal).pow(power)
        return left.mT @ moment @ right


@dataclass(frozen=True)
class CoordinateBasis:
    """Some columns (side "right") or rows (side "left") of the matrix: `indices` (…, r), ascending."""

    indices: Tensor
    side: str

    def _columns(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """The matrix with the selected dimension last, and the indices expanded to gather from it (no memory)."""
        view = matrix if self.side == "right" else matrix.mT
        index = self.indices.to(torch.int64).unsqueeze(-2)
        return view, index.expand(*view.shape[:-1], index.shape[-1])

    def project(self, grad: Tensor) -> Tensor:
        view, index = self._columns(grad)
        return view.gather(-1, index).to(kernels.compute_dtype(grad.dtype))

    def apply_(
        self,
        weight: Tensor,
        core: Tensor,
        *,
        alpha: float,
        keep: float | Tensor,
        ok: Tensor | None,
        rounding_key: int | None,
    ) -> None:
        if weight.dtype != core.dtype:
            # Decay and rounding touch every weight, in float32: a product with unit vectors does all of it by chunks.
            dense = DenseBasis(self.one_hot(weight, core.dtype), self.side)
            dense.apply_(weight, core, alpha=alpha, keep=keep, ok=ok, rounding_key=rounding_key)
            return
        kernels.decay_(weight, keep, ok)
        view, index = self._columns(weight)
        view.scatter_add_(-1, index, core * -alpha)

    def one_hot(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """The unit vectors as a dense (…, d, r) basis."""
        size = like.shape[-1] if self.side == "right" else like.shape[-2]
        positions = torch.arange(size, device=like.device).unsqueeze(-1)
        return (positions == self.indices.to(torch.int64).unsqueeze(-2)).to(dtype)

    def transport(self, moment: Tensor, old: Self, power: int) -> Tensor:
        shared = old.indices.unsqueeze(-1) == self.indices.unsqueeze(-2)
        return moment @ shared.to(moment.dtype)


@dataclass(frozen=True)
class EntryBasis:
    """Single entries of the matrix: `indices` (…, k), ascending positions in row-major order. R is a (…, k, 1) column."""

    indices: Tensor

    def _flat(self, matrix: Tensor) -> list[tuple[Tensor, tuple[Tensor, Tensor]]]:
        """For each matrix of the stack, the matrix and the (row, column) of its entries."""
        cols = matrix.shape[-1]
        stack = matrix.unsqueeze(0) if matrix.dim() == 2 else matrix
        indices = self.indices.to(torch.int64).view(stack.shape[0], -1)
        return [(m, (i // cols, i % cols)) for m, i in zip(stack, indices, strict=True)]

    def project(self, grad: Tensor) -> Tensor:
        values = torch.stack([matrix[where] for matrix, where in self._flat(grad)])
        return values.view(*self.indices.shape, 1).to(kernels.compute_dtype(grad.dtype))

    def apply_(
        self,
        weight: Tensor,
        core: Tensor,
        *,
        alpha: float,
        keep: float | Tensor,
        ok: Tensor | None,
        rounding_key: int | None,
    ) -> None:
        if weight.dtype != core.dtype:
            dense = torch.zeros(weight.shape, dtype=core.dtype, device=weight.device)
            EntryBasis(self.indices).apply_(dense, core, alpha=-1.0, keep=1.0, ok=None, rounding_key=None)
            kernels.apply_dense_(weight, dense, alpha=alpha, keep=keep, ok=ok, rounding_key=rounding_key)
            return
        kernels.decay_(weight, keep, ok)
        values = core.reshape(-1, self.indices.shape[-1]) * -alpha
        for (matrix, where), value in zip(self._flat(weight), values, strict=True):
            matrix.index_put_(where, value, accumulate=True)

    def transport(self, moment: Tensor, old: Self, power: int) -> Tensor:
        position = torch.searchsorted(old.indices, self.indices).clamp_(max=old.indices.shape[-1] - 1)
        shared = old.indices.gather(-1, position) == self.indices
        carried = moment.squeeze(-1).gather(-1, position)
        return torch.where(shared, carried, 0.0).unsqueeze(-1)
