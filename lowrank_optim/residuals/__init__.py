"""What becomes of the gradient outside of the subspace: the third part of a method, beside rule and projector."""

from lowrank_optim.residuals.base import Residual, ResidualInput, Update
from lowrank_optim.residuals.complement import ComplementScaled
from lowrank_optim.residuals.gradient import ErrorFeedback, NoResidual, SGDResidual, SignResidual
from lowrank_optim.residuals.registry import RESIDUALS, residual_from_name
from lowrank_optim.residuals.scaled import GradientScaled, Limited, NormScaled

__all__ = [
    "RESIDUALS",
    "ComplementScaled",
    "ErrorFeedback",
    "GradientScaled",
    "Limited",
    "NoResidual",
    "NormScaled",
    "Residual",
    "ResidualInput",
    "SGDResidual",
    "SignResidual",
    "Update",
    "residual_from_name",
]
