"""Subspaces whose bases are matrices: one side, both sides, and the whole space."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lowrank_optim import kernels
from lowrank_optim.projectors.base import GradientTerm, StepParams, row_squares
from lowrank_optim.sharding.param_sharding import LOCAL, ParamSharding
from lowrank_optim.sharding.tensor_sharding import TensorSharding

LIFT = StepParams(alpha=-1.0, keep=1.0)
"""W ← W + lift(core)."""


def _change_of_basis(new: Tensor, old: Tensor, orthonormal: bool, sharding: TensorSharding) -> Tensor:
    """C with coordinates_new = coordinates_old C: P_oldᵀ P_new, with the pseudo-inverse of P_old where it is not orthonormal."""
    overlap = sharding.sum(old.mT @ new, -2)
    return overlap if orthonormal else torch.linalg.solve(sharding.sum(old.mT @ old, -2), overlap)


def _inverse_gram(basis: Tensor, orthonormal: bool, sharding: TensorSharding) -> Tensor:
    """(PᵀP)⁻¹: the identity where P is orthonormal."""
    if orthonormal:
        return torch.eye(basis.shape[-1], dtype=basis.dtype, device=basis.device)
    inverse: Tensor = torch.linalg.inv(sharding.sum(basis.mT @ basis, -2))
    return inverse


def _overlap(new: Tensor, old: Tensor, sharding: TensorSharding) -> Tensor:
    """‖P_oldᵀP_new‖²/r, at most 1, the mean over a stack. Unlike the angle of single vectors, it knows no signs and no order."""
    squares = sharding.sum(old.mT @ new, -2).square().sum((-2, -1))
    shares = squares.div(max(new.shape[-1], 1)).clamp_max(1.0)
    return shares.mean() if not sharding.splits(-3) else sharding.drop(-1).drop(-1).mean(shares, -1)


def lifted(
    sharding: ParamSharding, core: Tensor | None, term: GradientTerm | None
) -> tuple[Tensor | None, GradientTerm | None]:
    """All that an update has for the rows of R, brought to the processes whose weights need it, in one message."""
    if sharding is LOCAL:
        return core, term
    parts = {"core": core}
    if term is not None:
        parts |= {"scale": term.scale if term.by_channel else None, "subtract": term.subtract}
    given = {name: part for name, part in parts.items() if part is not None}
    if not given:
        return core, term
    widths = [part.shape[-1] for part in given.values()]
    together = sharding.lift(torch.cat(list(given.values()), -1) if len(given) > 1 else next(iter(given.values())))
    found = dict(zip(given, together.split(widths, -1), strict=True))
    core = found.pop("core", None)
    return core, None if term is None else replace(term, **found)


@dataclass(frozen=True)
class DenseBasis:
    """One basis on one side of the matrix, stored as a (…, d, r) tensor in the compute type; the local part where that is split."""

    matrix: Tensor
    side: str
    orthonormal: bool = True
    sharding: ParamSharding = field(default=LOCAL, compare=False)
    disjoint: ClassVar[bool] = False

    @property
    def splits_rows(self) -> bool:
        return self.orthonormal

    def project(self, grad: Tensor) -> Tensor:
        if grad.shape[0] == 0 and grad.dim() > 2:  # no expert of the stack is here
            return grad.new_empty(
                (0, grad.shape[-2 if self.side == "right" else -1], self.matrix.shape[-1]), dtype=self.matrix.dtype
            )
        reduced: Tensor = kernels.call("project", grad, self.matrix, self.side == "right")
        return reduced if self.sharding is LOCAL else self.sharding.collect(reduced)

    def project_with_norms(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        if grad.shape[0] == 0 and grad.dim() > 2:
            reduced = self.project(grad)
            return reduced, row_squares(reduced)
        reduced, squares = kernels.call("project_with_norms", grad, self.matrix, self.side == "right")
        return self.sharding.collect_with(reduced, squares)

    def lifted_squares(self, reduced: Tensor) -> Tensor:
        if self.orthonormal:
            return row_squares(reduced)
        gram = self._spread.sum(self.matrix.mT @ self.matrix, -2)
        return ((reduced @ gram) * reduced).sum(-1, keepdim=True)

    @property
    def _spread(self) -> TensorSharding:
        return self.sharding.rows if self.side == "left" else self.sharding.cols

    def _factors(self, core: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """Two factors whose product is lift(core)."""
        if core is None:
            return kernels.no_factors(like, self.matrix.dtype)
        return (core, self.matrix.mT) if self.side == "right" else (self.matrix, core.mT)

    def apply_(self, weight: Tensor, core: Tensor | None, write: StepParams, term: GradientTerm | None = None) -> None:
        if self.sharding is not LOCAL:
            core, term = lifted(self.sharding, core, term)
        residual = None
        if term is not None:
            scale = term.scale if self.side == "right" else term.scale.mT
            left, right = (None, None) if term.subtract is None else self._factors(term.subtract, weight)
            residual = kernels.ResidualTerm(term.grad, scale, term.ok, term.sign, left, right)
        start = self.sharding.matrix.start
        kernels.call("apply_", *kernels.apply_call(weight, self._factors(core, weight), residual, start, vars(write)))

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
    sharding: ParamSharding = field(default=LOCAL, compare=False)
    disjoint: ClassVar[bool] = False

    def project(self, grad: Tensor) -> Tensor:
        # (AᵀG)B and not Aᵀ(GB): on a refresh step R is diagonal but for rounding, which Adam blows up to full size, so that only the
        # order of the released code follows it.
        if grad.dtype == self.left.dtype:
            return self.sharding.collect((self.left.mT @ grad) @ self.right)
        return self.sharding.collect(kernels.project(grad, self.left, "left").mT @ self.right)

    def project_with_norms(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        raise ValueError("a projection of both sides has no row or column norms; use proj_type std, left or right")

    def lifted_squares(self, reduced: Tensor) -> Tensor:
        raise ValueError("a projection of both sides has no rows or columns; use proj_type std, left or right")

    def apply_(self, weight: Tensor, core: Tensor | None, write: StepParams, term: GradientTerm | None = None) -> None:
        if term is not None and term.subtract is not None:
            term = replace(term, subtract=self.left @ term.subtract)
        core = None if core is None else self.left @ core
        one_sided = DenseBasis(self.right, "right", self.orthonormal, ParamSharding(matrix=self.sharding.matrix))
        one_sided.apply_(weight, core, write, term)

    def lift_(self, grad: Tensor, reduced: Tensor) -> None:
        left = _inverse_gram(self.left, self.orthonormal, self.sharding.rows)
        right = _inverse_gram(self.right, self.orthonormal, self.sharding.cols)
        self.apply_(grad.zero_(), left @ reduced @ right, LIFT)

    def transport(self, moment: Tensor, old: Self, power: int) -> Tensor:
        left = _change_of_basis(self.left, old.left, self.orthonormal, self.sharding.rows).pow(power)
        right = _change_of_basis(self.right, old.right, self.orthonormal, self.sharding.cols).pow(power)
        return left.mT @ moment @ right

    def overlap(self, old: Self) -> Tensor:
        left = _overlap(self.left, old.left, self.sharding.rows)
        return (left + _overlap(self.right, old.right, self.sharding.cols)) / 2.0
