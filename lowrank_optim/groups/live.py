"""A param group between two steps: what was edited in it since it was last seen, and whether that can be."""

from collections.abc import Mapping
from operator import itemgetter
from typing import Any

from lowrank_optim.groups.complete import check_group
from lowrank_optim.groups.options import (
    DEFAULTS,
    LARGEST,
    SHORTHANDS,
    check_group_names,
    check_structure,
    plain_options,
    structure,
)
from lowrank_optim.groups.parts import Parts

_SCHEDULED = ("lr", "weight_decay")
"""Changed in every step by many schedulers, and perhaps tensors."""


class LiveGroup:
    """What a param group was when it was last checked; a group that nobody has edited costs one comparison.

    Args:
        group: complete, and checked.
        parts: of the group.
    """

    def __init__(self, group: Mapping[str, Any], parts: Parts) -> None:
        self.parts = parts
        self._valid = (*DEFAULTS, *_SCHEDULED, "rule", "residual", *parts.rule.options(), *parts.residual.options())
        self._values = itemgetter(*(name for name in self._valid if name not in _SCHEDULED and name in group))
        self._made_for = structure(group, parts.rule)
        self._see(group)

    def _see(self, group: Mapping[str, Any]) -> None:
        # Lists may be changed in place.
        self._seen = tuple(list(v) if type(v) is list else v for v in self._values(group))
        self._keys, self._size = frozenset(group), len(group)

    def check(self, group: Mapping[str, Any], number: int) -> None:
        """Raise for what was edited and cannot be.

        Raises:
            TypeError: a new key that is nearly an option's name.
            ValueError: an option that decides about the state has another value, or a value is out of range.
        """
        lr = group["lr"]
        if type(lr) is float and not 0.0 <= lr <= LARGEST:
            raise ValueError(
                f"lr is {lr!r} in param group {number}; it must be a number from 0 to {LARGEST:g}. Nothing was changed"
            )
        if len(group) == self._size and self._values(group) == self._seen:
            return
        check_structure(group, self._made_for, self.parts.rule, number)
        check_group_names(group.keys() - self._keys, (*self._valid, *SHORTHANDS))
        try:
            check_group(plain_options(group, keep_tensors=True), self.parts)
        except ValueError as error:
            raise ValueError(f"{error}. Param group {number} was edited; nothing was changed in this step") from error
        self._see(group)
