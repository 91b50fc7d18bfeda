"""SubTrack++'s subspace: a step along a geodesic of the Grassmann manifold, which turns one direction of the old basis."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowrank_optim.projectors.base import Refresh
from lowrank_optim.projectors.randomized_svd import RandomizedSVD, eigenvectors, orthonormalize
from lowrank_optim.projectors.stored_projector import StoredProjector
from lowrank_optim.sharding.tensor_sharding import TensorSharding


@dataclass(frozen=True)
class GrassmannTracking(StoredProjector):
    """P ← P + (P v (cos θ − 1) + u sin θ) vᵀ: the steepest way to less error ‖G − P PᵀG‖², of which the largest part is taken.

        T = 2 (I − P Pᵀ) G GᵀP/‖G‖² ≈ σ u vᵀ,   θ = η σ ≤ η

    (for the left side) with σ, u, v the leading singular value and vectors of T. One direction of the basis turns towards what it
    misses of the gradient, all others stay, so that moments that are rotated along lose nearly nothing. The first basis is that of
    `RandomizedSVD`.

    The paper does not divide by ‖G‖², so that its η depends on the size of gradients: 10 to 10,000 in its runs. Its released code
    projects T with r×r matrices for tall and square gradients, which makes it 0: their basis stays the first one. Here both sides
    move.

    Args:
        step_size: η, the largest angle of a step in radians, in (0, π/2].

    Memory: 4·d·r bytes for the basis. A refresh costs two products with G; where rows or columns of G are split, sums of D·r or
    d·r, and of r² numbers go over the wire (D the long side).

    Paper: Rajabi et al., "SubTrack++: Gradient Subspace Tracking for Scalable LLM Training", NeurIPS 2025, arXiv:2502.01586.
    """

    step_size: float = 1.0
    knows_shards: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.step_size <= torch.pi / 2:
            raise ValueError(f"step_size is {self.step_size!r}; it must be in (0, π/2]")

    @property
    def name(self) -> str:
        usual = self.step_size == GrassmannTracking.step_size
        return "grassmann_tracking" if usual else f"grassmann_tracking:{self.step_size!r}"

    def compute(self, request: Refresh) -> dict[str, Tensor]:
        if request.first:
            return RandomizedSVD().compute(request)
        space, basis, sharding = request.space, request.state["basis"], request.space.sharding
        grad = request.grad.mT if space.side == "left" else request.grad
        long, short = (sharding.cols, sharding.rows) if space.side == "left" else (sharding.rows, sharding.cols)
        if space.basis_bits != 32:  # rounded vectors are not orthonormal
            basis = orthonormalize(basis, sharding=short)
        unit = sharding.matrix.norm(torch.linalg.vector_norm(grad, dim=(-2, -1), keepdim=True), -2, -1).reciprocal()
        unit = torch.where(unit.isfinite(), unit, 0.0)  # matrices of a stack that have no gradient stay as they are
        image = short.sum(grad @ basis, -2).mul_(unit)
        pull = long.sum(grad.mT @ image, -2).mul_(2.0 * unit)
        tangent = torch.sub(pull, basis @ short.sum(basis.mT @ pull, -2))
        new = _turned(basis, tangent, self.step_size, short)
        return {"basis": orthonormalize(new, 1, short)}  # rounding must not add up over thousands of steps


def _turned(basis: Tensor, tangent: Tensor, step_size: float, sharding: TensorSharding) -> Tensor:
    """P + (P v (cos θ − 1) + u sin θ) vᵀ for the leading σ u vᵀ of a tangent T and θ = ησ; `sharding` is that of their rows."""
    gram = sharding.sum(tangent.mT @ tangent, -2)
    right = eigenvectors(gram)[..., -1:]
    image = tangent @ right
    size = sharding.norm(torch.linalg.vector_norm(image, dim=-2, keepdim=True), -2)
    left = torch.where(size > 0.0, image / size, 0.0)
    angle = step_size * size
    return basis + (basis @ right * (angle.cos() - 1.0) + left * angle.sin()) @ right.mT
