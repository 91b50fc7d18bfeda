"""Which layers a plan puts in the place of plain linear ones: a function of `lowrank_optim.nn` by name and options, or any other."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lowrank_optim.nn import (
    loldu_,
    nola_,
    ordered_,
    salt_,
    sltrain_,
    spectral_,
    svfit_,
    tucker_adapters_,
    weight_normalized_,
)
from lowrank_optim.planner.choices import with_options
from lowrank_optim.planner.errors import PlanError, did_you_mean

PARAMETRIZATIONS: dict[str, Callable[..., nn.Module]] = {
    "sltrain": sltrain_,
    "spectral": spectral_,
    "weight_normalized": weight_normalized_,
    "ordered": ordered_,
    "svfit": svfit_,
    "salt": salt_,
    "loldu": loldu_,
    "nola": nola_,
    "tucker": tucker_adapters_,
}
"""By name."""

KEEP_WEIGHTS = frozenset({"weight_normalized", "svfit", "salt", "loldu", "nola"})
"""Those beside whose layers the weights stay, which may have 8 bits."""

PLANNED_WITH: dict[str, dict[str, Any]] = {"sltrain": {"init": "fresh"}}
"""Options that a plan gives: as for training from scratch, since weights without numbers have no others."""


@dataclass(frozen=True)
class ParametrizationChoice:
    """What becomes of the linear layers of a model.

    name: for people.
    convert: changes a model in place and returns it.
    options: those that were given.
    """

    name: str
    convert: Callable[[nn.Module], nn.Module]
    options: dict[str, Any] = field(default_factory=dict)


def resolve_parametrization(parametrization: Any) -> ParametrizationChoice | None:
    """The parametrization that an argument means: None, a name, (name, options), or a function of the model.

    Raises:
        PlanError: an unknown name, with the nearest one; something else.
    """
    if parametrization is None:
        return None
    parametrization, options = with_options(parametrization)
    if isinstance(parametrization, str):
        if parametrization not in PARAMETRIZATIONS:
            hint = did_you_mean(parametrization, PARAMETRIZATIONS, most=1)
            raise PlanError(
                f"there is no parametrization {parametrization!r}: {hint}names are {', '.join(PARAMETRIZATIONS)}"
            )
        name, function = parametrization, PARAMETRIZATIONS[parametrization]
        return ParametrizationChoice(name, lambda model: _convert(name, function, model, options), options)
    if callable(parametrization) and not options:
        name = getattr(parametrization, "__name__", "parametrization")
        return ParametrizationChoice(name, lambda model: _convert(name, parametrization, model, {}))
    raise PlanError(
        f"parametrization is {parametrization!r}; give a name ({', '.join(PARAMETRIZATIONS)}), (name, options), or a function that "
        "changes a model and returns it"
    )


def _convert(name: str, function: Callable[..., Any], model: nn.Module, options: dict[str, Any]) -> nn.Module:
    try:
        made = function(model, **PLANNED_WITH.get(name, {}) | options)
    except (TypeError, ValueError) as error:
        raise PlanError(f"{name}: {error}") from error
    if not isinstance(made, nn.Module):
        raise PlanError(f"{name} returned {type(made).__name__}, not the model")
    return made
