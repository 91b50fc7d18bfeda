"""The default subspace: a randomized range finder, warm-started from the previous basis.

A refresh is a few matrix products (Halko, Martinsson and Tropp, "Finding structure with randomness", 2011): subspace iteration on
GᵀG from a sketch V of k = r + oversample columns,

    rounds before the last     Y = orth(G V),  V ← orth(Gᵀ Y)
    last round                 Y = G V,  YᵀY = U Λ Uᵀ,  V ← orth(Gᵀ Y U_r)

where U_r are the leading r eigenvectors: the Rayleigh-Ritz step orders the vectors by singular value, and it costs no product with
G of its own. The first refresh of a parameter starts from Gaussian columns, later ones from the old basis. Orthonormal columns come
from Cholesky-QR, with Householder QR where the columns are (nearly) dependent.

A basis of leading vectors that is refreshed from its own gradients tends to stand still. With `explore` a part of it is drawn: random
vectors of the complement take the place of all but the first (Alice), or r of the vectors are drawn by their singular values (SARA).
"""

from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim.kernels.counter_rng import derive_key, gaussian, uniform
from lowrank_optim.projectors.base import Refresh, SubspaceSpec, align_signs
from lowrank_optim.projectors.stored_projector import StoredProjector, basis_shardings
from lowrank_optim.sharding.tensor_sharding import UNSHARDED, TensorSharding


def cholesky_qr(matrix: Tensor, passes: int, sharding: TensorSharding = UNSHARDED) -> tuple[Tensor, Tensor]:
    """Orthonormal columns with the span of `matrix` (…, d, k), by `passes` rounds of Q ← Q L⁻ᵀ with QᵀQ = L Lᵀ.

    The columns are scaled to unit length first: in a warm start those of GᵀGV differ by σ² in length and in little else. The error of
    one pass is about ε over the smallest squared pivot, which is enough between power iterations; a second pass brings it to ε.

    Returns:
        The columns, and a 0-d bool: whether they can be trusted, which is where every squared pivot is above 100·ε.
    """
    eps = torch.finfo(matrix.dtype).eps
    q = unit_columns(matrix, sharding)
    ok = torch.ones((), dtype=torch.bool, device=matrix.device)
    for _ in range(passes):
        factor, info = torch.linalg.cholesky_ex(sharding.sum(q.mT @ q, -2))
        pivots = factor.diagonal(dim1=-2, dim2=-1).square()
        ok = ok & (info == 0).all() & (pivots > 100.0 * eps).all()
        q = torch.linalg.solve_triangular(factor.mT, q, upper=True, left=False)
    return q, ok


def unit_columns(matrix: Tensor, sharding: TensorSharding = UNSHARDED) -> Tensor:
    """The columns at unit length; those that are rounding errors beside the longest one become exactly 0.

    (Householder QR of denormal columns gives NaN on some processors, and such columns have nothing to say.)
    """
    norms = sharding.norm(torch.linalg.vector_norm(matrix, dim=-2, keepdim=True), -2)
    limits = torch.finfo(matrix.dtype)
    floor = norms.amax(-1, keepdim=True).mul_(limits.eps).clamp_min_(limits.tiny)
    return torch.where(norms > floor, matrix / norms, 0.0)


def householder(matrix: Tensor, sharding: TensorSharding = UNSHARDED) -> Tensor:
    """The orthonormal factor of a QR decomposition. Rows that lie on other processes are gathered: a tall matrix is small."""
    q: Tensor = torch.linalg.qr(sharding.gather(matrix, -2))[0]
    return sharding.part(q, -2)


def orthonormalize(matrix: Tensor, passes: int = 2, sharding: TensorSharding = UNSHARDED) -> Tensor:
    """Orthonormal columns whose span contains that of `matrix` (…, d, k), d ≥ k: Cholesky-QR, or Householder QR where it fails."""
    q, ok = cholesky_qr(matrix, passes, sharding)
    # All processes that share the rows see the same Gram matrices, and so take the same branch.
    if not bool(ok):
        q = householder(unit_columns(matrix, sharding), sharding)
    return q


def eigenvectors(gram: Tensor) -> Tensor:
    """Eigenvectors of a symmetric matrix (…, k, k), by ascending eigenvalue; the largest entry of each is positive.

    A float32 matrix is taken in float32 from k = 128 on, in half the time, and in float64 where that has failed: the float32
    divide and conquer does so, sometimes silently, on Gram matrices of low rank. Below, float64 costs little. Of a Gram matrix MMᵀ in
    float32, directions with σ below about 1e-3·σ₁ are decided by its rounding, and differ between the two ways; the others are the
    same to rounding.

    The sign of the largest entry is fixed because that of a raw eigenvector would turn with the last bit of the matrix, and the codes
    of a basis in few bits with it.
    """
    vectors = _trusted_eigenvectors(gram) if gram.shape[-1] >= 128 and gram.dtype == torch.float32 else None
    if vectors is None:
        vectors = torch.linalg.eigh(gram.double())[1]
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return (vectors * largest.sign()).to(gram.dtype)


def _trusted_eigenvectors(gram: Tensor) -> Tensor | None:
    """Eigenvectors in the matrix's precision, or None where an entry of UᵀU − I or ‖A U − U Λ‖ / ‖A‖ is above 1e-3.

    Those of a failure are of the order of 1, those of a success below 1e-5, and 1e-4 where products are taken in TF32.
    """
    try:
        values, vectors = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    angles = vectors.mT @ vectors
    angles.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    left = torch.linalg.vector_norm(gram @ vectors - vectors * values.unsqueeze(-2), dim=(-2, -1))
    is_pair = left <= 1e-3 * torch.linalg.vector_norm(gram, dim=(-2, -1))  # false for NaN
    return vectors if bool((is_pair & (angles.abs().amax((-2, -1)) <= 1e-3)).all()) else None


def drawn(vectors: Tensor, gram: Tensor, count: int, chances: Tensor) -> Tensor:
    """`count` eigenvectors of `gram` (…, k, k), drawn without replacement with probabilities ∝ √λ, in the order that they came in.

    The largest of u^(1/√λ) win, with `chances` u (…, k) uniform in (0, 1), float64 (Efraimidis and Spirakis, 2006).
    """
    values = (vectors * (gram @ vectors)).sum(-2).double().clamp_min_(0.0).sqrt_()
    chosen = (chances.log() / values).topk(count).indices.sort().values
    return vectors.gather(-1, chosen.unsqueeze(-2).expand(*vectors.shape[:-1], count))


def range_finder(
    grad: Tensor,
    sketch: Tensor,
    rank: int,
    iterations: int,
    long: TensorSharding = UNSHARDED,
    short: TensorSharding = UNSHARDED,
    chances: Tensor | None = None,
) -> Tensor:
    """Approximate leading right singular vectors of `grad` (…, m, n) from a sketch (…, n, k), k ≥ rank: (…, n, rank).

    Columns are orthonormal and ordered by singular value. With one iteration the sketch must have orthonormal columns already. With
    `chances` they are `rank` of the k vectors, see `drawn`.
    Cost: 4·m·n·k flops an iteration. Where rows lie on several processes, `long`, a sum of n·k numbers over them, and of k² for each
    orthonormalisation; where columns do, `short`, of m·k.
    """
    # Products of a gradient of any size must neither overflow nor vanish.
    size = long.sum(short.sum(torch.linalg.vector_norm(grad, dim=(-2, -1), keepdim=True), -2), -2)
    unit = size.clamp_min(torch.finfo(grad.dtype).tiny).reciprocal()
    v = sketch
    for _ in range(iterations - 1):
        y = orthonormalize(short.sum(grad @ v, -2).mul_(unit), 1, long)
        v = orthonormalize(long.sum(grad.mT @ y, -2), 1, short)
    y = short.sum(grad @ v, -2).mul_(unit)
    gram = long.sum(y.mT @ y, -2)
    vectors = eigenvectors(gram).flip(-1)
    chosen = vectors[..., :rank] if chances is None else drawn(vectors, gram, rank, chances)
    return orthonormalize(long.sum(grad.mT @ (y @ chosen), -2).mul_(unit), sharding=short)


@dataclass(frozen=True)
class RandomizedSVD(StoredProjector):
    """Nearly the leading r singular vectors of the gradient, for the price of a few matrix products.

    Args:
        oversample: extra columns of the sketch.
        power_iterations: rounds of the first refresh, which starts from random columns.
        warm_iterations: rounds of every later one, which starts from the old basis.
        explore: None takes the leading vectors. "complement" keeps the share `leading` of them and draws the rest of the basis, a
            uniformly random subspace of what is orthogonal to those (Alice's switching). "sample" draws r of 2r + oversample vectors
            without replacement, with probabilities ∝ their singular values (SARA).
        leading: that share, in (0, 1], at least one vector; 40 of 256 as published.

    Memory: 4·d·r bytes for the basis; a refresh works with a few d×(r + oversample) matrices, d×(2r + oversample) with "sample".

    Papers: Gong et al., arXiv:2502.07752 (Alice); Zhang et al., "Breaking the Frozen Subspace: Importance Sampling for Low-Rank
    Optimization in LLM Pretraining", NeurIPS 2025, arXiv:2502.05790 (SARA).
    """

    sides: ClassVar[tuple[str, ...]] = ("left", "right", "full")
    knows_shards: ClassVar[bool] = True
    oversample: int = 8
    power_iterations: int = 2
    warm_iterations: int = 1
    explore: str | None = None
    leading: float = 0.15625

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.oversample < 0:
            raise ValueError(f"oversample is {self.oversample}; it must be at least 0")
        for field in ("power_iterations", "warm_iterations"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1")
        if self.explore not in (None, "complement", "sample"):
            raise ValueError(f"explore is {self.explore!r}; valid values are None, 'complement', 'sample'")
        if not 0.0 < self.leading <= 1.0:
            raise ValueError(f"leading is {self.leading!r}; it must be in (0, 1]")

    @property
    def name(self) -> str:
        chosen = (self.oversample, self.power_iterations, self.warm_iterations)
        default = (RandomizedSVD.oversample, RandomizedSVD.power_iterations, RandomizedSVD.warm_iterations)
        words = [] if chosen == default else [*map(str, chosen)]
        if self.explore is not None or self.leading != RandomizedSVD.leading:
            words.append(str(self.explore))
        if self.leading != RandomizedSVD.leading:
            words.append(repr(self.leading))
        return ":".join(["randomized_svd", *filter(None, [",".join(words)])])

    @classmethod
    def from_variant(cls, variant: str) -> "RandomizedSVD":
        """What the part of a name behind the colon stands for: "8,2,1", "complement", "4,2,1,sample", "complement,0.25"."""
        words = variant.split(",") if variant else []
        numbers = [*map(int, takewhile(lambda word: word.lstrip("-").isdigit(), words))]
        explore, leading, *more = [*words[len(numbers) :], "", ""]
        if len(numbers) > 3 or any(more):
            raise ValueError("it has too many parts")
        given: dict[str, Any] = dict(zip(("oversample", "power_iterations", "warm_iterations"), numbers, strict=False))
        if explore not in ("", "None"):
            given["explore"] = explore
        if leading:
            given["leading"] = float(leading)
        return cls(**given)

    def compute(self, request: Refresh) -> dict[str, Tensor]:
        grad, space, old, key, first = request.grad, request.space, request.state, request.key, request.first
        if space.basis_bits != 32 and not first:  # rounded vectors are not orthonormal, which a warm start needs
            shardings = basis_shardings(space)
            old = {name: orthonormalize(basis, sharding=shardings[name]) for name, basis in old.items()}
        if space.side != "full":
            return {"basis": self._vectors(grad, old["basis"], space, space.side, key, first)}
        right = self._vectors(grad, old["basis_right"], space, "right", key, first)
        # G B has orthogonal columns after Rayleigh-Ritz: made orthonormal, they are the left singular vectors.
        rows, cols = space.sharding.rows, space.sharding.cols
        left = orthonormalize(cols.sum(grad @ right, -2), sharding=rows)
        return {"basis": left if first else align_signs(left, old["basis"], rows), "basis_right": right}

    def _vectors(self, grad: Tensor, old: Tensor, space: SubspaceSpec, side: str, key: int, first: bool) -> Tensor:
        """Leading singular vectors on one side; `grad` and `old` are local parts."""
        rank, size, long, short = space.rank, space.cols, space.sharding.rows, space.sharding.cols
        if side == "left":
            grad, size, long, short = grad.mT, space.rows, short, long
        columns = min(rank * (2 if self.explore == "sample" else 1) + self.oversample, space.rows, space.cols)
        fresh = columns if first else columns - rank
        chances = None
        if self.explore == "sample":
            chances = uniform(derive_key(key, 2), (*space.batch, columns), grad.device, torch.float64)
            chances = space.sharding.sharding_of("chosen", side).part(chances)
        sketch = short.part(gaussian(key, (*space.batch, size, fresh), grad.device, grad.dtype))
        if first:
            sketch = sketch if self.power_iterations > 1 else orthonormalize(sketch, sharding=short)
        else:
            sketch = torch.cat([old, householder(sketch - old @ short.sum(old.mT @ sketch, -2), short)], -1)
        iterations = self.power_iterations if first else self.warm_iterations
        kept = max(1, round(self.leading * rank)) if self.explore == "complement" else rank
        found = range_finder(grad, sketch, kept, iterations, long, short, chances)
        if kept < rank:
            random = gaussian(derive_key(key, 2), (*space.batch, size, rank - kept), grad.device, grad.dtype)
            found = orthonormalize(torch.cat([found, short.part(random)], -1), sharding=short)
        return found if first else align_signs(found, old, short)
