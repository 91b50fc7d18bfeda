"""Checkpoints of other versions: the number of their format, and the way from each format to the next.

Every param group holds the number under "state_format" (`lowrank_optim.groups.complete`), so that every checkpoint does. A change
after which a saved state means something else, or lacks a tensor, raises `STATE_FORMAT` by one and adds a function to MIGRATIONS. A
new option needs neither: a checkpoint without it takes the optimizer's value.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lowrank_optim.groups.complete import FORMAT_KEY, STATE_FORMAT


def _from_0(state_dict: dict[str, Any]) -> None:
    """Checkpoints without a number, of torch.optim.AdamW say: steps may be Python's numbers, as torch wrote them before 1.12."""
    for state in state_dict["state"].values():
        if isinstance(state, dict) and isinstance(state.get("step"), (int, float)):
            state["step"] = torch.tensor(float(state["step"]), dtype=torch.float32)


MIGRATIONS: dict[int, Callable[[dict[str, Any]], None]] = {0: _from_0}
"""For each older format n, what makes n + 1 of it, in place. Groups and states are copies, tensors are not: put new ones in."""


def migrate(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict in today's format; what was given is not changed.

    Raises:
        ValueError: it is no optimizer's state dict, or has a format that this version does not know.
    """
    number = _format_of(state_dict)
    groups = [{**group, FORMAT_KEY: STATE_FORMAT} for group in state_dict["param_groups"]]
    states = {k: dict(v) if isinstance(v, Mapping) else v for k, v in state_dict["state"].items()}
    migrated = {**state_dict, "param_groups": groups, "state": states}
    for older in range(number, STATE_FORMAT):
        MIGRATIONS[older](migrated)
    return migrated


def _format_of(state_dict: Mapping[str, Any]) -> int:
    """The format of a state dict; 0 for one without a number."""
    if not {"state", "param_groups"} <= state_dict.keys():
        keys = ", ".join(map(str, list(state_dict)[:5])) or "none"
        raise ValueError(
            f"this is no state dict of an optimizer: it needs the keys state and param_groups, and has {keys}. Give "
            "load_state_dict what optimizer.state_dict() returned"
        )
    found = [group.get(FORMAT_KEY, 0) for group in state_dict["param_groups"]] or [0]
    number = found[0]
    if type(number) is not int or number < 0 or any(other != number for other in found):
        raise ValueError(
            f"{FORMAT_KEY} is {', '.join(dict.fromkeys(map(repr, found)))} in the groups of the checkpoint; it must be one number "
            "of at least 0, the same in all groups. Load the checkpoint as it was saved"
        )
    if number > STATE_FORMAT:
        raise ValueError(
            f"the checkpoint has format {number}, and this version of lowrank_optim reads formats up to {STATE_FORMAT}: a newer "
            "version saved it. Update with `pip install --upgrade lowrank-optim`. The optimizer is unchanged"
        )
    return number
