"""What uses the gradient outside of the subspace as it is: none, SGD, sign, error feedback."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim.projectors import GradientTerm, StepParams, SubspaceSpec
from lowrank_optim.residuals.base import Residual, ResidualInput, Update


@dataclass(frozen=True)
class NoResidual(Residual):
    """The gradient outside the subspace is left out (GaLore)."""

    name: ClassVar[str] = "none"
    uses_gradient: ClassVar[bool] = False
    linear: ClassVar[bool] = True
    knows_shards: ClassVar[bool] = True

    def update(self, step: ResidualInput, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Update:
        return Update(step.direction, options["scale"])


@dataclass(frozen=True)
class SGDResidual(Residual):
    """A step along the gradient outside the subspace: κ(G − lift R)."""

    name: ClassVar[str] = "sgd"
    needs_orthonormal: ClassVar[bool] = True
    linear: ClassVar[bool] = True
    knows_shards: ClassVar[bool] = True
    residual_lr_scale: float = 1.0

    def check(self, options: Mapping[str, Any]) -> None:
        if not options["residual_lr_scale"] >= 0.0:
            raise ValueError(f"residual_lr_scale is {options['residual_lr_scale']!r}; it must be at least 0")

    def update(self, step: ResidualInput, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Update:
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
    linear: ClassVar[bool] = False

    def update(self, step: ResidualInput, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Update:
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
    state_lies: ClassVar[Mapping[str, str]] = {"error": "matrix"}
    needs_orthonormal: ClassVar[bool] = True
    knows_shards: ClassVar[bool] = True

    def init(self, space: SubspaceSpec, device: torch.device) -> dict[str, Tensor]:
        shape = space.sharding.matrix.local_shape(space.shape)
        return {"error": torch.zeros(shape, dtype=space.dtype, device=device)}

    def absorb(self, grad: Tensor, state: Mapping[str, Tensor], ok: Tensor | None) -> Tensor:
        return state["error"].add_(grad if ok is None else torch.where(ok, grad, 0.0))

    def update(self, step: ResidualInput, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> Update:
        step.basis.apply_(step.grad, step.projected, StepParams(1.0, 1.0))  # step.grad is state["error"]
        return Update(step.direction, options["scale"])


def _uniform(step: ResidualInput, value: float) -> Tensor:
    """A step size κη that is the same for the whole matrix, (…, 1, 1), in units of the direction's."""
    scale = torch.full(
        (*step.projected.shape[:-2], 1, 1), value, dtype=step.projected.dtype, device=step.projected.device
    )
    scale = scale * step.unit
    return scale if step.ok is None else scale * step.ok
