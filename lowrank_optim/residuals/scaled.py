"""What scales the gradient by norms: the residuals of Fira and Alice, APOLLO's gradient, and the norm-growth limiter."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim.projectors import GradientTerm, SubspaceSpec
from lowrank_optim.projectors.base import row_squares
from lowrank_optim.residuals.base import Residual, ResidualInput, Update


@dataclass(frozen=True)
class Limited(Residual):
    """A scaled gradient, with a limit on how fast its norm may grow.

    limiter: γ, the largest growth of the scaled gradient's norm from one step to the next; None does not limit.
    """

    uses_norms: ClassVar[bool] = True
    knows_shards: ClassVar[bool] = True
    state_lies: ClassVar[Mapping[str, str]] = {"limiter_norm": "stack"}
    limiter: float | None = 1.01

    def check(self, options: Mapping[str, Any]) -> None:
        if options["limiter"] is not None and not options["limiter"] >= 1.0:
            raise ValueError(f"limiter is {options['limiter']!r}; it must be None or at least 1")

    def init(self, space: SubspaceSpec, device: torch.device) -> dict[str, Tensor]:
        shape = space.sharding.sharding_of("stack", space.side).local_shape(space.batch)
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

    def sums(self, step: ResidualInput, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
        outside = outside_squares(step, self._inside(options))
        return outside.mul_(_ratio(step, options).square()).double().sum((-2, -1))[None]

    def update(self, step: ResidualInput, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Update:
        assert step.sums is not None
        phi = _ratio(step, options)
        norm = step.sums[0].sqrt().to(phi.dtype)
        phi = phi / growth_of(norm / step.correction, state, options, step.ok)
        core = step.direction * float(options["scale"])
        core = torch.addcmul(core, phi, step.projected, value=-self._inside(options))
        return Update(core, 1.0, GradientTerm(step.grad, phi, step.ok, by_channel=True))


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

    def sums(self, step: ResidualInput, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
        assert step.squares is not None
        assert step.norms is not None
        if options["scale_type"] == "channel":
            return _ratio(step, options).square().mul_(step.squares).double().sum((-2, -1))[None]
        above, below = step.norms
        squares = (above.double().square(), below.double().square(), step.squares.double())
        return torch.stack([each.sum((-2, -1)) for each in squares])

    def update(self, step: ResidualInput, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Update:
        assert step.sums is not None
        by_channel, dtype = options["scale_type"] == "channel", step.projected.dtype
        norms = step.sums.sqrt()
        if by_channel:
            phi = _ratio(step, options)
            norm = norms[0].to(dtype)
        else:
            above, below, whole = norms.to(dtype)
            ratio = _quotient(above, below, options)
            phi, norm = ratio[..., None, None], ratio * whole
        phi = phi / growth_of(norm / step.correction, state, options, step.ok)
        return Update(None, options["scale"] ** 0.5, GradientTerm(step.grad, phi, step.ok, by_channel=by_channel))


def outside_squares(step: ResidualInput, inside: float = 1.0) -> Tensor:
    """‖g_j − κ P r_j‖² of every channel, (…, d, 1), κ being `inside`."""
    assert step.squares is not None
    inner = row_squares(step.projected)
    lifted = inner if getattr(step.basis, "splits_rows", False) else step.basis.lifted_squares(step.projected)
    return torch.sub(step.squares, inner, alpha=2.0 * inside).add_(lifted, alpha=inside**2).clamp_min_(0.0)


def _ratio(step: ResidualInput, options: Mapping[str, Any]) -> Tensor:
    """‖N_j‖/‖R_j‖ of every channel, computed once."""
    if "ratio" not in step.kept:
        assert step.norms is not None
        step.kept["ratio"] = _quotient(*step.norms, options)
    return step.kept["ratio"]


def _quotient(above: Tensor, below: Tensor, options: Mapping[str, Any]) -> Tensor:
    """‖N‖/‖R‖, and 0 where R is 0: there is no direction to scale."""
    if options["match_reference"]:
        return above / (below + 1e-8)
    return torch.where(below > 0, above / below, 0.0)


def growth_of(norm: Tensor, state: Mapping[str, Tensor], options: Mapping[str, Any], ok: Tensor | None) -> Tensor:
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
