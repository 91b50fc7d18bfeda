"""The residuals by name."""

from difflib import get_close_matches

from lowrank_optim.kernels import check_no_class
from lowrank_optim.residuals.base import Residual
from lowrank_optim.residuals.complement import ComplementScaled
from lowrank_optim.residuals.gradient import ErrorFeedback, NoResidual, SGDResidual, SignResidual
from lowrank_optim.residuals.scaled import GradientScaled, NormScaled

RESIDUALS: dict[str, type[Residual]] = {
    kind.name: kind
    for kind in (
        NoResidual,
        SGDResidual,
        SignResidual,
        ErrorFeedback,
        NormScaled,
        GradientScaled,
        ComplementScaled,
    )
}


def residual_from_name(name: str) -> Residual:
    """The residual with its defaults.

    Raises:
        TypeError: for a class.
        ValueError: for an unknown name; the message names the nearest valid one.
    """
    check_no_class("residual", name)
    if name not in RESIDUALS:
        near = get_close_matches(str(name), RESIDUALS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"residual is {name!r}: {hint}valid names are {', '.join(RESIDUALS)}, or pass a Residual")
    return RESIDUALS[name]()
