"""What a module says of its own parameters: how each is trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import nn

from lowrank_optim.rules import Rule

KINDS = ("matrix", "dense", "no_decay")


@dataclass(frozen=True)
class Role:
    """How one parameter of a module is trained.

    kind: "matrix" (low-rank where a rank is given), "dense", or "no_decay" (dense, without weight decay).
    lr_factor, decay_factor: multiply learning rate and weight decay.
    rule: the update rule, or its name; None takes the optimizer's.
    """

    kind: Literal["matrix", "dense", "no_decay"] = "dense"
    lr_factor: float = 1.0
    decay_factor: float = 1.0
    rule: str | Rule | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; valid values are {', '.join(map(repr, KINDS))}")

    @property
    def options(self) -> dict[str, Any]:
        """Group options that differ from the defaults."""
        options = {"lr_factor": self.lr_factor, "decay_factor": self.decay_factor}
        given: dict[str, Any] = {name: value for name, value in options.items() if value != 1.0}
        return given if self.rule is None else given | {"rule": self.rule}


@runtime_checkable
class HasRoles(Protocol):
    """A module that says how its own parameters are trained."""

    def parameter_roles(self) -> Mapping[str, Role]:
        """The role of each of the module's own parameters, by name (`"weight"`); those left out are treated as usual."""


def roles_of(path: str, module: nn.Module) -> Mapping[str, Role]:
    """What a module says of its own parameters.

    Raises:
        ValueError: it names a parameter that it does not have, or gives something else than a `Role`.
    """
    if not isinstance(module, HasRoles):
        return {}
    roles = module.parameter_roles()
    own = dict(module.named_parameters(recurse=False))
    for name, role in roles.items():
        where = f"parameter_roles() of {path or type(module).__name__}"
        if name not in own:
            raise ValueError(f"{where} names {name!r}, which it does not have; its own parameters are {', '.join(own)}")
        if not isinstance(role, Role):
            raise ValueError(f"{where} gives {role!r} for {name!r}; it must be a lowrank_optim.Role")
    return roles
