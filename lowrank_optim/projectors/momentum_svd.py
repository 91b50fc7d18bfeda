"""Conda's subspace: the singular vectors of the momentum, with the gradient of the step in it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowrank_optim.projectors.base import Refresh, align_signs
from lowrank_optim.projectors.randomized_svd import eigenvectors
from lowrank_optim.projectors.stored_projector import MomentumMixture


@dataclass(frozen=True)
class MomentumSVD(MomentumMixture):
    """The leading r singular vectors of A = ρ lift(m̂) + (1−ρ) G, m̂ the bias-corrected momentum in the old basis.

    With ρ = β₁, A is the momentum of the step up to a factor, exactly where the bias correction before it is 1; m̂ stands for all of
    the momentum where it lies in the old basis, so always at full rank (`rank=1.0`). Rules without momentum have A = G.

    The vectors are eigenvectors of AᵀA (for the right side), in float64.

    Args:
        rho: ρ in [0, 1].

    Memory: 4·d·r bytes for the basis. A refresh works with A, as large as the gradient, and a few d×d matrices in float64, d the
    projected side. Where rows of G are split, a sum of d² numbers goes over the wire, where columns are, A.
    """

    kind: ClassVar[str] = "momentum_svd"
    rho: float = 0.9

    def compute(self, request: Refresh) -> dict[str, Tensor]:
        space, basis, sharding = request.space, request.state["basis"], request.space.sharding
        grad = request.grad.mT if space.side == "left" else request.grad
        long, short = (sharding.cols, sharding.rows) if space.side == "left" else (sharding.rows, sharding.cols)
        mixed = grad
        if request.momentum is not None and not request.first:
            mixed = (sharding.lift(request.momentum) @ basis.mT).mul_(self.rho).add_(grad, alpha=1.0 - self.rho)
        # The Gram matrix of all columns: those of other processes come here.
        whole = short.gather(mixed.mT, -2).mT
        size = long.sum(torch.linalg.vector_norm(whole, dim=(-2, -1), keepdim=True), -2)
        unit = size.clamp_min(torch.finfo(whole.dtype).tiny).reciprocal()
        wide = (whole * unit).double()
        vectors = eigenvectors(long.sum(wide.mT @ wide, -2)).to(grad.dtype)
        new = short.part(vectors.flip(-1)[..., : space.rank], -2).contiguous()
        return {"basis": new if request.first else align_signs(new, basis, short)}
