"""A param group as the user gives it, made complete: a value for every option, a name for every part; and whether it can be."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lowrank_optim.groups.options import (
    SHORTHANDS,
    check_combination,
    check_group_names,
    check_names,
    check_parts,
    check_values,
    expand_shorthands,
    plain_options,
    projector_option,
)
from lowrank_optim.groups.parts import PartRegistry, Parts, check_option_names
from lowrank_optim.projectors import Projector

STATE_FORMAT = 1
"""Format of the state in this version. `lowrank_optim.optimizers.migrations` says when it is raised, and reads older ones."""

FORMAT_KEY = "state_format"
"""Key of a param group, and so of every checkpoint."""


def take_options(given: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> tuple[dict[str, Any], Projector]:
    """The options that an optimizer was given, without shorthands, and the projector that they name.

    Raises:
        TypeError: an option that is none of `defaults`; `where` is what was called.
    """
    check_names(given, (*defaults, *SHORTHANDS), where)
    options = expand_shorthands(plain_options(given))
    return options, projector_option(options)


def complete_group(
    given: Mapping[str, Any], registry: PartRegistry, defaults: Mapping[str, Any], reserved: Iterable[str] = ()
) -> dict[str, Any]:
    """The group with all options; objects among its parts are kept in the registry.

    Args:
        reserved: options of the optimizer that no part may use the names of.

    Raises:
        TypeError: a key is nearly an option's name.
        ValueError: an unknown part, or two parts that call an option by the same name.
    """
    group = registry.complete(registry.take(expand_shorthands(plain_options(given))), defaults)
    parts = registry.of(group)
    check_option_names(parts, reserved)
    check_group_names(given, (*defaults, *parts.rule.options(), *parts.residual.options(), *SHORTHANDS))
    return {**group, FORMAT_KEY: STATE_FORMAT}


def list_params(group: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The tensors of a group, and the group with the names of (name, tensor) pairs; its `params` are a list then, in place.

    What is no tensor is handed on, and sets stay sets: torch refuses them, and says why.
    """
    params = group.get("params", [])
    if isinstance(params, Tensor):
        params = [params]
    elif not isinstance(params, set):
        group["params"] = params = list(params)
    paired = [item for item in params if isinstance(item, tuple)]
    named = {**group, "param_names": [item[0] for item in paired]} if paired else group
    return [item[1] if isinstance(item, tuple) else item for item in params], named


def check_group(group: Mapping[str, Any], parts: Parts) -> None:
    """Raise ValueError for a complete group with a value out of range, or with parts that do not go together."""
    check_values(group)
    parts.rule.check(group)
    parts.residual.check(group)
    parts.projector.check(group["proj_type"])
    parts.projector.check_group(group)
    check_parts(parts.rule, parts.projector, parts.residual, group)
    check_combination(parts.projector, group)
