"""The default subspace: a randomized range finder, warm-started from the previous basis.

A refresh is a few matrix products (Halko, Martinsson and Tropp, "Finding structure with randomness", 2011): subspace iteration on
GᵀG from a sketch V of k = r + oversample columns,

    rounds before the last     Y = orth(G V),  V ← orth(Gᵀ Y)
    last round                 Y = G V,  YᵀY = U Λ Uᵀ,  V ← orth(Gᵀ Y U_r)

where U_r are the leading r eigenvectors: the Rayleigh-Ritz step orders the vectors by singular value, and it costs no product with
G of its own. The first refresh of a parameter starts from Gaussian columns, later ones from the old basis. Orthonormal columns come
from Cholesky-QR, with Householder QR where the columns are (nearly) dependent.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_optim.kernels.counter_rng import gaussian
from lowrank_optim.projectors.base import Space, align_signs
from lowrank_optim.projectors.stored import StoredProjector


def cholesky_qr(matrix: Tensor, passes: int) -> tuple[Tensor, Tensor]:
    """Orthonormal columns with the span of `matrix` (…, d, k), by `passes` rounds of Q ← Q L⁻ᵀ with QᵀQ = L Lᵀ.

    The columns are scaled to unit length first: in a warm start those of GᵀGV differ by σ² in length and in little else. The error of
    one pass is about ε over the smallest squared pivot, which is enough between power iterations; a second pass brings it to ε.

    Returns:
        The columns, and a 0-d bool: whether they can be trusted, which is where every squared pivot is above 100·ε.
    """
    eps = torch.finfo(matrix.dtype).eps
    q = unit_columns(matrix)
    ok = torch.ones((), dtype=torch.bool, device=matrix.device)
    for _ in range(passes):
        factor, info = torch.linalg.cholesky_ex(q.mT @ q)
        pivots = factor.diagonal(dim1=-2, dim2=-1).square()
        ok = ok & (info == 0).all() & (pivots > 100.0 * eps).all()
        q = torch.linalg.solve_triangular(factor.mT, q, upper=True, left=False)
    return q, ok


def unit_columns(matrix: Tensor) -> Tensor:
    """The columns at unit length; those that are rounding errors beside the longest one become exactly 0.

    (Householder QR of denormal columns gives NaN on some processors, and such columns have nothing to say.)
    """
    norms = torch.linalg.vector_norm(matrix, dim=-2, keepdim=True)
    limits = torch.finfo(matrix.dtype)
    floor = norms.amax(-1, keepdim=True).mul_(limits.eps).clamp_min_(limits.tiny)
    return torch.where(norms > floor, matrix / norms, 0.0)


def orthonormalize(matrix: Tensor, passes: int = 2) -> Tensor:
    """Orthonormal columns whose span contains that of `matrix` (…, d, k), d ≥ k: Cholesky-QR, or Householder QR where it fails."""
    q, ok = cholesky_qr(matrix, passes)
    if not bool(ok):
        q = torch.linalg.qr(unit_columns(matrix))[0]
    return q


def eigenvectors(gram: Tensor) -> Tensor:
    """Eigenvectors of a symmetric matrix (…, k, k), by ascending eigenvalue.

    In float64: the float32 divide and conquer fails, sometimes silently, on Gram matrices of low rank.
    """
    vectors: Tensor = torch.linalg.eigh(gram.double())[1]
    return vectors.to(gram.dtype)


def range_finder(grad: Tensor, sketch: Tensor, rank: int, iterations: int) -> Tensor:
    """Approximate leading right singular vectors of `grad` (…, m, n) from a sketch (…, n, k), k ≥ rank: (…, n, rank).

    Columns are orthonormal and ordered by singular value. With one iteration the sketch must have orthonormal columns already.
    Cost: 4·m·n·k flops an iteration.
    """
    # Products of a gradient of any size must neither overflow nor vanish.
    unit = (
        torch.linalg.vector_norm(grad, dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(grad.dtype).tiny).reciprocal()
    )
    v = sketch
    for _ in range(iterations - 1):
        v = orthonormalize(grad.mT @ orthonormalize((grad @ v).mul_(unit), passes=1), passes=1)
    y = (grad @ v).mul_(unit)
    leading = eigenvectors(y.mT @ y)[..., -rank:].flip(-1)
    return orthonormalize((grad.mT @ (y @ leading)).mul_(unit))


@dataclass(frozen=True)
class RandomizedSVD(StoredProjector):
    """Nearly the leading r singular vectors of the gradient, for the price of a few matrix products.

    Args:
        oversample: extra columns of the sketch.
        power_iterations: rounds of the first refresh, which starts from random columns.
        warm_iterations: rounds of every later one, which starts from the old basis.

    Memory: 4·d·r bytes for the basis; a refresh works with a few d×(r + oversample) matrices.
    """

    oversample: int = 8
    power_iterations: int = 2
    warm_iterations: int = 1

    def __post_init__(self) -> None:
        if self.oversample < 0:
            raise ValueError(f"oversample is {self.oversample}; it must be at least 0")
        for field in ("power_iterations", "warm_iterations"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1")

    @property
    def name(self) -> str:
        chosen = (self.oversample, self.power_iterations, self.warm_iterations)
        default = (RandomizedSVD.oversample, RandomizedSVD.power_iterations, RandomizedSVD.warm_iterations)
        return "randomized_svd" if chosen == default else "randomized_svd:" + ",".join(map(str, chosen))

    def compute(
        self,
        grad: Tensor,
        space: Space,
        old: Mapping[str, Tensor],
        key: int,
        first: bool,
        momentum: Tensor | None = None,
    ) -> dict[str, Tensor]:
        if space.basis_bits != 32 and not first:  # rounded vectors are not orthonormal, which a warm start needs
            old = {name: orthonormalize(basis) for name, basis in old.items()}
        if space.side == "left":
            return {"basis": self._vectors(grad.mT, old["basis"], space.rank, key, first)}
        if space.side == "right":
            return {"basis": self._vectors(grad, old["basis"], space.rank, key, first)}
        right = self._vectors(grad, old["basis_right"], space.rank, key, first)
        # G B has orthogonal columns after Rayleigh-Ritz: made orthonormal, they are the left singular vectors.
        left = orthonormalize(grad @ right)
        return {"basis": left if first else align_signs(left, old["basis"]), "basis_right": right}

    def _vectors(self, grad: Tensor, old: Tensor, rank: int, key: int, first: bool) -> Tensor:
        *batch, rows, cols = grad.shape
        columns = min(rank + self.oversample, rows, cols)
        if first:
            sketch = gaussian(key, (*batch, cols, columns), grad.device, grad.dtype)
            sketch = sketch if self.power_iterations > 1 else orthonormalize(sketch)
            return range_finder(grad, sketch, rank, self.power_iterations)
        fresh = gaussian(key, (*batch, cols, columns - rank), grad.device, grad.dtype)
        fresh = torch.linalg.qr(fresh - old @ (old.mT @ fresh))[0]
        return align_signs(range_finder(grad, torch.cat([old, fresh], -1), rank, self.warm_iterations), old)
