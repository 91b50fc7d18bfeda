"""LDAdam's subspace: one step of power iteration from the old basis, at every step or as often as wanted."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowrank_optim.projectors.base import Projector, Refresh, SubspaceSpec, align_signs, choose_side, usable
from lowrank_optim.projectors.randomized_svd import RandomizedSVD, householder, unit_columns
from lowrank_optim.projectors.stored_projector import MomentumMixture, agree, load, store
from lowrank_optim.projectors.svd import SVD


@dataclass(frozen=True)
class PowerIteration(MomentumMixture):
    """P ← qf(B (BᵀP)) with B = ρ lift(m̂) + (1−ρ) G, m̂ the bias-corrected momentum: B is never formed.

    The first basis is that of `RandomizedSVD`, or of `SVD` under `match_reference`, where square matrices are projected on the left
    as in the released code.

    Args:
        rho: ρ in [0, 1], how much the momentum counts; without momentum the gradient alone counts.

    Memory: 4·d·r bytes for the basis. A refresh costs two products with G and a Householder QR, and never waits for the device but
    for the first one.
    """

    kind: ClassVar[str] = "power_iteration"
    rho: float = 0.908
    square_side: str = "right"
    first_basis: str = "randomized_svd"

    def released(self) -> Projector:
        return replace(self, square_side="left", first_basis="svd")

    def space(self, shape: tuple[int, ...], rank: int, proj_type: str, dtype: torch.dtype) -> SubspaceSpec:
        *_, rows, cols = shape
        square = rows == cols and proj_type == "std"
        return super().space(shape, rank, self.square_side if square else choose_side(proj_type, rows, cols), dtype)

    def refresh(self, request: Refresh) -> dict[str, Tensor] | None:
        if request.first:
            return super().refresh(request)
        space = request.space
        request = replace(request, grad=request.grad.to(space.dtype), state=load(request.state, space))
        return store(agree(self.compute(request), space), space)

    def compute(self, request: Refresh) -> dict[str, Tensor]:
        if request.first:
            return (SVD() if self.first_basis == "svd" else RandomizedSVD()).compute(request)
        space, basis, momentum = request.space, request.state["basis"], request.momentum
        rho = self.rho if momentum is not None else 0.0
        # m̂, as all low-rank matrices, is tall: B = ρ m̂ Pᵀ + (1−ρ) G
        grad = request.grad.mT if space.side == "left" else request.grad
        sharding = space.sharding
        long, short = (sharding.cols, sharding.rows) if space.side == "left" else (sharding.rows, sharding.cols)
        image = short.sum(grad @ basis, -2).mul_(1.0 - rho)
        if momentum is not None:
            momentum = sharding.lift(momentum)
            image.add_(momentum, alpha=rho)  # PᵀP = I
        iterate = long.sum(grad.mT @ image, -2).mul_(1.0 - rho)
        if momentum is not None:
            iterate.add_(basis @ long.sum(momentum.mT @ image, -2), alpha=rho)
        ok = usable(iterate, short)
        columns = householder(unit_columns(torch.where(ok, iterate, basis), short), short)
        return {"basis": torch.where(ok, align_signs(columns, basis, short), basis)}
