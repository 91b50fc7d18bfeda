"""The rule, the projector and the residual of a param group: objects, which the optimizer keeps under the names in its groups.

A group holds names only, so that checkpoints are plain. An object that stands in a group, or is given to the constructor, is kept
under its name; other names stand for the package's own parts with their defaults.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from inspect import get_annotations
from typing import Any, TypeAlias

from lowrank_optim.groups.matrices import is_low_rank
from lowrank_optim.groups.options import DEFAULTS
from lowrank_optim.kernels import check_no_class
from lowrank_optim.projectors import Projector, from_name
from lowrank_optim.residuals import Residual, residual_from_name
from lowrank_optim.rules import Rule, rule_from_name

Part: TypeAlias = Rule | Projector | Residual

KINDS: dict[str, type[Any]] = {"rule": Rule, "projector": Projector, "residual": Residual}
"""The group key of each kind of part."""

_RESERVED = (
    *("lr", "initial_lr", "weight_decay", "params", "param_names", "state_format"),  # keys of torch's groups, and ours
    *("rule", "dense_rule", "residual", "parts"),  # arguments of the constructor
)
"""Names beside those of `DEFAULTS` that no field of a part may have."""

_BY_NAME: dict[str, Callable[[str], Part]] = {
    "rule": rule_from_name,
    "projector": from_name,
    "residual": residual_from_name,
}
"""What gives the package's own part of each kind by its name."""


@dataclass(frozen=True)
class Parts:
    """The parts of one group.

    dense_rule: the optimizer's, for tensors that are no matrices, where the group's rule trains matrices only.
    """

    rule: Rule
    projector: Projector
    residual: Residual
    dense_rule: Rule | None = None

    def rule_for(self, shape: tuple[int, ...] | None) -> Rule:
        """The rule of a parameter whose matrix view has this shape, None for those that are no matrices.

        The group has the options of both rules then; where they call one by the same name, the dense rule cannot stand in.
        """
        other = self.dense_rule
        if shape is not None or not self.rule.on_matrices or other is None or other.on_matrices:
            return self.rule
        return self.rule if self.rule.options().keys() & other.options().keys() else other


class PartRegistry:
    """Parts by kind and name.

    Args:
        rule: of groups with `rank` or `density`.
        dense_rule: of the others.
        projector, residual: of groups that name none.
        more: parts that groups may name.
    """

    def __init__(
        self, rule: Rule, dense_rule: Rule, projector: Projector, residual: Residual, more: Iterable[Part] = ()
    ) -> None:
        self.rule, self.dense_rule, self.projector, self.residual = rule, dense_rule, projector, residual
        self._known: dict[tuple[str, str], Part] = {}
        for part in (rule, dense_rule, projector, residual, *more):
            self._keep(part)

    def _keep(self, part: Part) -> None:
        kind = _kind_of(part)
        check_part(kind, part)
        known = self._known.setdefault((kind, part.name), part)
        # The package's own variants of a rule stand for it: TorchAdam for Adam.
        variant = isinstance(known, type(part)) and type(known).__module__.startswith("lowrank_optim.")
        if not (variant or type(known) is type(part)) or (kind == "projector" and known != part):
            raise ValueError(
                f"{kind} {part.name!r} is {known!r} already, and {part!r} has the same name; give one of them another name"
            )

    def take(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A group in which every part is a name: objects are kept here, and their fields become options of the group."""
        group = dict(given)
        for kind, base in KINDS.items():
            part = group.get(kind)
            if not isinstance(part, base):
                continue
            self._keep(part)
            group[kind] = part.name
            if kind != "projector":
                group = {**part.options(), **group}
        return group

    @contextmanager
    def tentatively(self) -> Iterator[None]:
        """Forget what is taken inside, if anything raises."""
        known = dict(self._known)
        try:
            yield
        except BaseException:
            self._known = known
            raise

    def get(self, kind: str, name: str) -> Part:
        """The part of this kind and name.

        Raises:
            ValueError: there is none.
        """
        known = self._known.get((kind, name))
        return _BY_NAME[kind](name) if known is None else known

    def projector_of(self, name: str) -> Projector:
        """The projector of this name."""
        projector = self.get("projector", name)
        assert isinstance(projector, Projector)
        return projector

    def options_of(self, kind: str, name: str) -> dict[str, Any]:
        """The options that a rule or a residual brings."""
        part = self.get(kind, name)
        return {} if isinstance(part, Projector) else part.options()

    def of(self, group: Mapping[str, Any]) -> Parts:
        """The parts that a complete group names."""
        rule, projector, residual = (self.get(kind, group[kind]) for kind in KINDS)
        assert isinstance(rule, Rule)
        assert isinstance(projector, Projector)
        assert isinstance(residual, Residual)
        return Parts(rule, projector.released() if group["match_reference"] else projector, residual, self.dense_rule)

    def complete(self, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
        """A group with a value for every option: its own, those of its parts, then the optimizer's `defaults`."""
        group = dict(given)
        own: dict[str, Any] = {}
        if "rule" not in group:
            rule = self.rule if is_low_rank({**defaults, **group}) else self.dense_rule
            group["rule"] = rule.name
            own = {} if rule is self.rule else rule.options()
        group = {**{kind: defaults[kind] for kind in KINDS}, **group}
        for kind, usual in (("rule", self.rule), ("residual", self.residual)):
            if self.get(kind, group[kind]) is not usual:
                own |= self.options_of(kind, group[kind])
        return {**defaults, **own, **group}


def check_option_names(parts: Parts, also: Iterable[str] = ()) -> None:
    """Raise ValueError where two parts, or a part and the package, call an option by the same name."""
    owners = dict.fromkeys((*DEFAULTS, *_RESERVED, *also), "an option of every optimizer")
    for kind, part in (("rule", parts.rule), ("residual", parts.residual)):
        for name in part.options():
            if name in owners:
                raise ValueError(
                    f"{name!r} is a field of the {kind} {type(part).__name__}, and {owners[name]} as well; rename the field"
                )
            owners[name] = f"a field of the {kind} {type(part).__name__}"


def _kind_of(part: object) -> str:
    for kind, base in KINDS.items():
        if isinstance(part, base):
            return kind
        check_no_class(kind, part)
    raise TypeError(f"parts must be rules, projectors or residuals, got {type(part).__name__}")


def package_part(kind: str, name: str) -> Part | None:
    """The package's own part of this kind and name, with its defaults; None where there is none."""
    try:
        return _BY_NAME[kind](name)
    except ValueError:
        return None


def as_part(kind: str, part: str | Rule | Residual) -> Any:
    """A rule or a residual, given as such or by its name, checked."""
    if not isinstance(part, (Rule, Residual)):
        return _BY_NAME[kind](part)
    check_part(kind, part)
    return part


def check_part(kind: str, part: object) -> None:
    """Raise TypeError for a part that is no dataclass or has no name, ValueError for one with the name of another of the package."""
    own = type(part)
    if own.__module__.startswith("lowrank_optim."):
        return
    typed = [name for name, value in get_annotations(own).items() if "ClassVar" not in str(value)]
    if not is_dataclass(part) or (typed and "__dataclass_params__" not in vars(own)):
        raise TypeError(f"{own.__name__} is no dataclass: write @dataclass(frozen=True) above the class")
    name: Any = getattr(part, "name", None)
    if not isinstance(name, str) or not name:
        raise TypeError(f'{own.__name__} has no name: write name = "…", without a type, in the class')
    taken = package_part(kind, name)
    if taken is not None and type(taken) is not own:
        raise ValueError(
            f"{kind} {name!r} of {own.__name__} has the name of {type(taken).__name__}, a part of the package, for which checkpoints "
            "would take it; give it another name"
        )
