"""What becomes of the gradient outside the subspace: nothing, a state-free step, or a rescaled copy of the gradient.

With R the projected gradient, N the rule's direction and α the option `scale`, the update of a matrix is η(lift(C) + φ ⊙ E):

    none              C = αN
    sgd               C = α(N − κR)             φ = ακ, E = G                 FRUGAL
    sign              C = αN                    φ = ακ, E = sign(G − lift R)  FRUGAL
    error_feedback    C = αN                    E = 0; G − lift R is added to the next gradient    LDAdam
    norm_scaled       C = αN − φ∘R              φ = (‖N_j‖/‖R_j‖)/ℓ, E = G    Fira
    gradient_scaled   –                         φ = √α (‖N_j‖/‖R_j‖)/ℓ, E = G APOLLO

j runs over rows (right) or columns (left) of G; ℓ is the norm-growth limiter. No residual forms an m×n matrix: the norm that Fira's
limiter needs comes from the norms of the rows or columns, ‖g_j − P r_j‖² = ‖g_j‖² − 2‖r_j‖² + ‖P r_j‖².
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim.projectors import Basis, GradientTerm, Space, Write
from lowrank_optim.projectors.base import row_squares


@dataclass(frozen=True)
class Reduced:
    """What a residual sees of one step.

    grad: G, the matrix view of the gradient, only ever handed on.
    projected: R.
    squares: ‖g_j‖² of every line, (…, d, 1); None unless asked for.
    direction: N.
    correction: the factor of N that is Adam's bias correction; 1 for other rules.
    unit: the learning rate as a multiple of the step size that N is applied with (`Direction.unit`).
    basis: the subspace.
    ok: 0-d bool on the device, false where this gradient is to be ignored (R and N are then 0); None means true.
    norms: ‖N_j‖ and ‖R_j‖ of every line, (…, d, 1); None unless `uses_norms`.
    sums: what `Residual.sums` gave, summed over the processes that share the rows of R; None where it gave nothing.
    """

    grad: Tensor
    projected: Tensor
    squares: Tensor | None
    direction: Tensor
    correction: float
    unit: float | Tensor
    basis: Basis
    ok: Tensor | None
    norms: tuple[Tensor, Tensor] | None = None
    sums: Tensor | None = None


@dataclass(frozen=True)
class Update:
    """W ← keep·W − η·factor·(lift(core) + term)."""

    core: Tensor | None
    factor: float = 1.0
    term: GradientTerm | None = None


class Residual(ABC):
    """A choice of C, φ and E; subclasses are frozen dataclasses whose fields are group options."""

    name: ClassVar[str]
    uses_gradient: ClassVar[bool] = True
    uses_norms: ClassVar[bool] = False
    feeds_back: ClassVar[bool] = False
    """Whether the gradient that the step sees is `absorb(grad)` and not the gradient itself."""
    knows_shards: ClassVar[bool] = False
    """Whether sums over the rows of R go through `sums`; if not, sharded parameters are refused."""

    def options(self) -> dict[str, Any]:
        """Default hyperparameters by name, as they go into the param groups."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise ValueError for hyperparameters out of range, or a projection that the residual cannot use."""
        lineless = options["projector"] == "coordinate:entries" or options["projector"].startswith("blocks")
        if self.uses_norms and (options["proj_type"] == "full" or lineless):
            what = f"projector={options['projector']!r}" if lineless else 'proj_type="full"'
            raise ValueError(
                f"{what} has no rows or columns for residual={self.name!r} to scale; use proj_type std, reverse_std, left or "
                'right, or residual "none", "sgd" or "sign"'
            )

    def init(self, space: Space, device: torch.device) -> dict[str, Tensor]:
        """State tensors of the residual."""
        return {}

    def absorb(self, grad: Tensor, state: Mapping[str, Tensor], ok: Tensor | None) -> Tensor:
        """The gradient that the step works with, where `feeds_back`; `state` is modified in place, `ok` as in `Reduced`."""
        return grad

    def sums(self, step: Reduced, options: Mapping[str, Any]) -> Tensor | None:
        """The sums over the rows of R that `update` needs, (k, …) in float64; None where it needs none."""
        return None

    @abstractmethod
    def update(self, step: Reduced, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Update:
        """C, φ and E of this step; `state` is modified in place."""


@dataclass(frozen=True)
class NoResidual(Residual):
    """The gradient outside the subspace is left out (GaLore)."""

    name: ClassVar[str] = "none"
    uses_gradient: ClassVar[bool] = False
    knows_shards: ClassVar[bool] = True

    def update(self, step: Reduced, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Update:
        return Update(step.direction, options["scale"])


@dataclass(frozen=True)
class SGDResidual(Residual):
    """A step along the gradient outside the subspace: κ(G − lift R)."""

    name: ClassVar[str] = "sgd"
    knows_shards: ClassVar[bool] = True
    residual_lr_scale: float = 1.0

    def check(self, options: Mapping[str, Any]) -> None:
        super().check(options)
        if options["projector"] == "random:gaussian":
            raise ValueError(
                f'projector="random:gaussian" is not orthonormal, so G − lift R is not what lies outside the subspace and '
                f'residual={self.name!r} diverges; use projector="random", or residual "norm_scaled" or "gradient_scaled"'
            )
        if not options["residual_lr_scale"] >= 0.0:
            raise ValueError(f"residual_lr_scale is {options['residual_lr_scale']!r}; it must be at least 0")

    def update(self, step: Reduced, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Update:
        kappa = _uniform(step, float(options["residual_lr_scale"]))
        if step.basis.disjoint:  # nothing to subtract, and so nothing that rounds
            return Update(
                step.direction, options["scale"], GradientTerm(step.grad, kappa, step.ok, subtract=step.projected)
            )
        core = torch.addcmul(step.direction, step.projected, kappa, value=-1.0)
        return Update(core, options["scale"], GradientTerm(step.grad, kappa, step.ok))


@dataclass(frozen=True)
class SignResidual(SGDResidual):
    """A signSGD step outside the subspace: κ·sign(G − lift R)."""

    name: ClassVar[str] = "sign"

    def update(self, step: Reduced, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Update:
        scale = _uniform(step, float(options["residual_lr_scale"]))
        return Update(
            step.direction,
            options["scale"],
            GradientTerm(step.grad, scale, step.ok, subtract=step.projected, sign=True),
        )


@dataclass(frozen=True)
class ErrorFeedback(Residual):
    """The gradient outside the subspace is kept and added to the next one: A = G + e, e ← A − lift R.

    Where the moments are rotated into a new basis, what the momentum loses by that is added to e, too.

    Memory: `error`, 4 bytes for each entry of the matrix (8 in float64).
    """

    name: ClassVar[str] = "error_feedback"
    feeds_back: ClassVar[bool] = True
    knows_shards: ClassVar[bool] = True

    def check(self, options: Mapping[str, Any]) -> None:
        super().check(options)
        if options["projector"] == "random:gaussian":
            raise ValueError(
                'projector="random:gaussian" is not orthonormal, so that the error fed back would grow without bound; use '
                'projector="random", or residual "norm_scaled" or "gradient_scaled"'
            )
        if options["rule"] == "adafactor" and options["beta1"] is not None and options["on_refresh"] == "rotate":
            raise ValueError(
                "Adafactor averages updates, not gradients, so what a rotation loses cannot be fed back; use beta1=None, or "
                'on_refresh "keep"'
            )

    def init(self, space: Space, device: torch.device) -> dict[str, Tensor]:
        shape = space.shards.matrix.local_shape(space.shape)
        return {"error": torch.zeros(shape, dtype=space.dtype, device=device)}

    def absorb(self, grad: Tensor, state: Mapping[str, Tensor], ok: Tensor | None) -> Tensor:
        return state["error"].add_(grad if ok is None else torch.where(ok, grad, 0.0))

    def update(self, step: Reduced, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Update:
        step.basis.apply_(step.grad, step.projected, Write(1.0, 1.0))  # step.grad is state["error"]
        return Update(step.direction, options["scale"])


@dataclass(frozen=True)
class Limited(Residual):
    """Scales that follow the ratio of ‖N‖ to ‖R‖, with a limit on how fast the result may grow.

    limiter: γ, the largest growth of the scaled gradient's norm from one step to the next; None does not limit.
    """

    uses_norms: ClassVar[bool] = True
    knows_shards: ClassVar[bool] = True
    limiter: float | None = 1.01

    def check(self, options: Mapping[str, Any]) -> None:
        super().check(options)
        if options["limiter"] is not None and not options["limiter"] >= 1.0:
            raise ValueError(f"limiter is {options['limiter']!r}; it must be None or at least 1")

    def init(self, space: Space, device: torch.device) -> dict[str, Tensor]:
        shape = space.shards.spread_of("limiter_norm", space.side).local_shape(space.batch)
        return {"limiter_norm": torch.zeros(shape, dtype=space.dtype, device=device)}


@dataclass(frozen=True)
class NormScaled(Limited):
    """The gradient outside the subspace, every row (or column) scaled as the rule scales it inside (Fira).

    With `match_reference`, α multiplies what is subtracted, too: E = G − α lift R, as in the released code.
    """

    name: ClassVar[str] = "norm_scaled"

    @staticmethod
    def _inside(options: Mapping[str, Any]) -> float:
        """How much of the gradient in the subspace is taken out."""
        return float(options["scale"]) if options["match_reference"] else 1.0

    def sums(self, step: Reduced, options: Mapping[str, Any]) -> Tensor:
        assert step.squares is not None
        assert step.norms is not None
        inside, inner = self._inside(options), row_squares(step.projected)
        outside = step.squares - 2.0 * inside * inner + inside**2 * step.basis.lifted_squares(step.projected)
        phi = _ratio(*step.norms, options)
        return (phi.square() * outside.clamp_min(0.0)).double().sum((-2, -1))[None]

    def update(self, step: Reduced, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Update:
        assert step.sums is not None
        assert step.norms is not None
        phi = _ratio(*step.norms, options)
        norm = step.sums[0].sqrt().to(phi.dtype)
        phi = phi / _growth(norm / step.correction, state, options, step.ok)
        core = step.direction * float(options["scale"])
        core = torch.addcmul(core, phi, step.projected, value=-self._inside(options))
        return Update(core, 1.0, GradientTerm(step.grad, phi, step.ok, by_line=True))


@dataclass(frozen=True)
class GradientScaled(Limited):
    """The gradient itself, scaled as the rule scales it in a (random) subspace (APOLLO).

    scale_type: "channel" scales every row (or column) for itself, "tensor" the whole matrix.

    The option `scale` enters as its square root, as published.
    """

    name: ClassVar[str] = "gradient_scaled"
    scale_type: str = "channel"

    def check(self, options: Mapping[str, Any]) -> None:
        super().check(options)
        if options["scale_type"] not in ("channel", "tensor"):
            raise ValueError(f"scale_type is {options['scale_type']!r}; valid values are 'channel', 'tensor'")
        if not options["scale"] >= 0.0:
            raise ValueError(f"scale is {options['scale']!r}; its square root is taken, so it must be at least 0")

    def sums(self, step: Reduced, options: Mapping[str, Any]) -> Tensor:
        assert step.squares is not None
        assert step.norms is not None
        above, below = step.norms
        if options["scale_type"] == "channel":
            phi = _ratio(above, below, options)
            return (phi.square() * step.squares).double().sum((-2, -1))[None]
        squares = (above.double().square(), below.double().square(), step.squares.double())
        return torch.stack([each.sum((-2, -1)) for each in squares])

    def update(self, step: Reduced, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Update:
        assert step.sums is not None
        assert step.norms is not None
        by_line, dtype = options["scale_type"] == "channel", step.projected.dtype
        norms = step.sums.sqrt()
        if by_line:
            phi = _ratio(*step.norms, options)
            norm = norms[0].to(dtype)
        else:
            above, below, whole = norms.to(dtype)
            ratio = _ratio(above, below, options)
            phi, norm = ratio[..., None, None], ratio * whole
        phi = phi / _growth(norm / step.correction, state, options, step.ok)
        return Update(None, options["scale"] ** 0.5, GradientTerm(step.grad, phi, step.ok, by_line=by_line))


def _uniform(step: Reduced, value: float) -> Tensor:
    """A step size κη that is the same for the whole matrix, (…, 1, 1), in units of the direction's."""
    scale = torch.full(
        (*step.projected.shape[:-2], 1, 1), value, dtype=step.projected.dtype, device=step.projected.device
    )
    scale = scale * step.unit
    return scale if step.ok is None else scale * step.ok


def _ratio(above: Tensor, below: Tensor, options: Mapping[str, Any]) -> Tensor:
    """‖N‖/‖R‖, and 0 where R is 0: there is no direction to scale."""
    if options["match_reference"]:
        return above / (below + 1e-8)
    return torch.where(below > 0, above / below, 0.0)


def _growth(norm: Tensor, state: Mapping[str, Tensor], options: Mapping[str, Any], ok: Tensor | None) -> Tensor:
    """ℓ = max(‖S‖/(γc), 1), c the limited norm of the step before, as (…, 1, 1); c ← ‖S‖/ℓ.

    A step without a scaled gradient (zero or ignored) leaves c alone, so that it cannot hold the next ones down.
    """
    gamma, last = options["limiter"], state["limiter_norm"]
    if gamma is None:
        return torch.ones((*norm.shape, 1, 1), dtype=norm.dtype, device=norm.device)
    before = last + 1e-8 if options["match_reference"] else last
    growth = torch.where(last > 0, (norm / before).clamp_min(gamma) / gamma, 1.0)
    usable = (norm > 0) & (norm < math.inf)
    last.copy_(torch.where(usable if ok is None else usable & ok, norm / growth, last))
    return growth[..., None, None]


RESIDUALS: dict[str, type[Residual]] = {
    kind.name: kind for kind in (NoResidual, SGDResidual, SignResidual, ErrorFeedback, NormScaled, GradientScaled)
}


def residual_from_name(name: str) -> Residual:
    """The residual with its defaults.

    Raises:
        ValueError: for an unknown name; the message names the nearest valid one.
    """
    if name not in RESIDUALS:
        near = get_close_matches(str(name), RESIDUALS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"residual is {name!r}: {hint}valid names are {', '.join(RESIDUALS)}, or pass a Residual")
    return RESIDUALS[name]()
