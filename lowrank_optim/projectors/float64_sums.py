"""The same bits on any number of processes, with the option `exact_sums`.

A sum over shards, and a product whose shape depends on them, is rounded in another order than on one process. The difference is an
ulp, but an ulp of R can turn a code of its moments. So every sum of a subspace is then carried out in float64 and rounded to float32
once: an order changes the result only where a float64 error crosses a tie, for about one element in 10⁸.

    refresh    grad.double() → the projector in float64 → its state, in its own types
    project    R = round(Σ over processes of G B),   apply   W ← round(keep·W − α(lift(C) + φ ⊙ E))

Memory: float64 copies of the gradient and of the weight, of one matrix at a time. Parameters of float64 are left as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import Self

from lowrank_optim import kernels
from lowrank_optim.projectors.base import Basis, GradientTerm, Projector, Refresh, StepParams, SubspaceSpec
from lowrank_optim.sharding.param_sharding import ParamSharding


def basis_of(
    projector: Projector, space: SubspaceSpec, state: Mapping[str, Tensor], key: int, device: torch.device
) -> Basis:
    """`Projector.basis`, exact."""
    return ExactBasis(projector.basis(replace(space, dtype=torch.float64), state, key, device), space.dtype)


def refresh(projector: Projector, request: Refresh) -> dict[str, Tensor] | None:
    """`Projector.refresh`, exact."""
    space = replace(request.space, dtype=torch.float64)
    momentum = None if request.momentum is None else request.momentum.double()
    new = projector.refresh(replace(request, grad=request.grad.double(), space=space, momentum=momentum))
    return None if new is None else {name: tensor.to(request.state[name].dtype) for name, tensor in new.items()}


@dataclass(frozen=True)
class ExactBasis:
    """A basis whose operations are those of `inner`, in float64, each rounded to `dtype` once."""

    inner: Basis
    dtype: torch.dtype

    @property
    def sharding(self) -> ParamSharding:
        return self.inner.sharding

    @property
    def disjoint(self) -> bool:
        return self.inner.disjoint

    @property
    def splits_rows(self) -> bool:
        return getattr(self.inner, "splits_rows", False)

    def project(self, grad: Tensor) -> Tensor:
        return self.inner.project(grad.double()).to(self.dtype)

    def project_with_norms(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        reduced, squares = self.inner.project_with_norms(grad.double())
        return reduced.to(self.dtype), squares

    def lifted_squares(self, reduced: Tensor) -> Tensor:
        return self.inner.lifted_squares(reduced.double())

    def apply_(self, weight: Tensor, core: Tensor | None, write: StepParams, term: GradientTerm | None = None) -> None:
        if term is not None:
            subtract = None if term.subtract is None else term.subtract.double()
            term = replace(term, grad=term.grad.double(), scale=term.scale.double(), subtract=subtract)
        updated = kernels.joined(weight, write.error).double()
        core = None if core is None else core.double()
        self.inner.apply_(updated, core, replace(write, rounding_key=None, error=None), term)
        kernels.store_(weight, updated.to(self.dtype), write.rounding_key, self.sharding.matrix.start, write.error)

    def lift_(self, grad: Tensor, reduced: Tensor) -> None:
        wide = torch.empty_like(grad, dtype=torch.float64)
        self.inner.lift_(wide, reduced.double())
        grad.copy_(wide)

    def transport(self, moment: Tensor, old: Self, power: int) -> Tensor:
        return self.inner.transport(moment.double(), old.inner, power).to(moment.dtype)

    def overlap(self, old: Self) -> Tensor:
        return self.inner.overlap(old.inner)
