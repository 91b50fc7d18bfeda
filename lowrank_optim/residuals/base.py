"""What becomes of the gradient outside the subspace: nothing, a state-free step, or a rescaled copy of the gradient.

With R the projected gradient, N the rule's direction and α the option `scale`, the update of a matrix is η(lift(C) + φ ⊙ E):

    none              C = αN
    sgd               C = α(N − κR)             φ = ακ, E = G                 FRUGAL
    sign              C = αN                    φ = ακ, E = sign(G − lift R)  FRUGAL
    error_feedback    C = αN                    E = 0; G − lift R is added to the next gradient    LDAdam
    norm_scaled       C = αN − φ∘R              φ = (‖N_j‖/‖R_j‖)/ℓ, E = G    Fira
    complement_scaled C = α(N − φ∘R)            φ = α α_c √(d−r)/√p_j / ℓ, E = G  Alice
    gradient_scaled   –                         φ = √α (‖N_j‖/‖R_j‖)/ℓ, E = G APOLLO

j runs over rows (right) or columns (left) of G; ℓ is the norm-growth limiter, p_j a running ‖g_j − P r_j‖². No residual forms an m×n
matrix: the norms that limiters need come from those of the rows or columns, ‖g_j − P r_j‖² = ‖g_j‖² − 2‖r_j‖² + ‖P r_j‖².
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim.projectors import Basis, GradientTerm, SubspaceSpec


@dataclass(frozen=True)
class ResidualInput:
    """What a residual sees of one step.

    grad: G, the matrix view of the gradient, only ever handed on.
    projected: R.
    squares: ‖g_j‖² of every channel, (…, d, 1); None unless asked for.
    direction: N.
    correction: `Direction.correction`, by which norms that limit growth are divided; 1 for all rules but the released Adam.
    unit: the learning rate as a multiple of the step size that N is applied with (`Direction.unit`).
    basis: the subspace.
    space: its shape, and that of the matrix.
    ok: 0-d bool on the device, false where this gradient is to be ignored (R and N are then 0); None means true.
    norms: ‖N_j‖ and ‖R_j‖ of every channel, (…, d, 1); None unless `uses_norms`.
    sums: what `Residual.sums` gave, summed over the processes that share the rows of R; None where it gave nothing.
    kept: what `Residual.sums` has computed and `Residual.update` needs again.
    """

    grad: Tensor
    projected: Tensor
    squares: Tensor | None
    direction: Tensor
    correction: float
    unit: float | Tensor
    basis: Basis
    space: SubspaceSpec
    ok: Tensor | None
    norms: tuple[Tensor, Tensor] | None = None
    sums: Tensor | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """W ← keep·W − η·factor·(lift(core) + term). Nothing else applies α: the factor is `options["scale"]`, or `core` holds it."""

    core: Tensor | None
    factor: float = 1.0
    term: GradientTerm | None = None


class Residual(ABC):
    """A choice of C, φ and E; subclasses are frozen dataclasses whose fields are group options.

    The attributes are of the class. Subclasses set them without a type.

    Attributes:
        name: in groups and checkpoints.
        uses_gradient: `update` reads G; if False, R is all that it needs.
        uses_norms: `ResidualInput` has `squares` and `norms`, so that the projector needs channels.
        feeds_back: the step sees `absorb(grad)` in place of the gradient.
        needs_orthonormal: G − lift R has to be what lies outside of the subspace.
        linear: the update of a sum is the sum of the updates, so that those of micro-batches may be summed first.
        knows_shards: sums over the rows of R go through `sums`. If False, sharded parameters are refused.
        state_lies: where each state tensor lies if parameters are sharded, as in `Rule`; has to name all if `knows_shards`.
    """

    name: ClassVar[str]
    uses_gradient: ClassVar[bool] = True
    uses_norms: ClassVar[bool] = False
    feeds_back: ClassVar[bool] = False
    state_lies: ClassVar[Mapping[str, str]] = {}
    needs_orthonormal: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    knows_shards: ClassVar[bool] = False

    def options(self) -> dict[str, Any]:
        """Default hyperparameters by name, as they go into the param groups."""
        return {each.name: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]

    def check(self, options: Mapping[str, Any]) -> None:  # noqa: B027 (nothing to check is common)
        """Raise ValueError for hyperparameters out of range: name, value, valid range."""

    def init(self, space: SubspaceSpec, device: torch.device) -> dict[str, Tensor]:
        """State tensors of the residual."""
        return {}

    def absorb(self, grad: Tensor, state: Mapping[str, Tensor], ok: Tensor | None) -> Tensor:
        """The gradient that the step works with, where `feeds_back`; `state` is modified in place, `ok` as in `ResidualInput`."""
        return grad

    def sums(self, step: ResidualInput, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor | None:
        """The sums over the rows of R that `update` needs, (k, …) in float64; None where it needs none. Nothing is modified."""
        return None

    @abstractmethod
    def update(self, step: ResidualInput, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Update:
        """C, φ and E of this step; `state` is modified in place."""
