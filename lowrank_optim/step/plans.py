"""The plans of all parameters of an optimizer, made from its groups: when they are made, and when they no longer hold."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lowrank_optim.groups.live import LiveGroup
from lowrank_optim.groups.parts import PartRegistry
from lowrank_optim.rules import JointRule
from lowrank_optim.step.joint import make_units
from lowrank_optim.step.param_plan import ParamPlan, check_proximal, plan_group
from lowrank_optim.step.refresh_schedule import stagger_offset, stagger_ordinals

Group = Mapping[str, Any]


class Plans(dict[Tensor, ParamPlan]):
    """Each parameter's plan."""

    def __init__(self, parts: PartRegistry) -> None:
        super().__init__()
        self.parts = parts
        self.has_units = False  # rules of groups step several parameters at once
        self.warned: set[str] = set()  # reasons that were logged
        self._live: list[LiveGroup] = []  # each group as it was last seen
        self._groups: list[int] = []  # which they were, by id
        self._ordinals: dict[Tensor, tuple[int, int]] = {}

    def of_group(self, group: Group, params: Iterable[Tensor], number: int, first: int) -> dict[Tensor, ParamPlan]:
        """How the parameters of one group are trained; `first` is the position of its first parameter in the optimizer."""
        params = list(params)
        names = group.get("param_names") or [None] * len(params)
        taken = {plan.index for plan in self.values() if plan.group != number}
        parts = self.parts.of(group)
        plans = plan_group(zip(names, params, strict=True), first, number, group, parts, self.warned, taken)
        if isinstance(parts.rule, JointRule):
            make_units(plans, parts.rule, group)
            self.has_units = True
        check_proximal(plans.values(), group)
        return plans

    def set_group(self, number: int, group: Group, plans: Mapping[Tensor, ParamPlan]) -> None:
        """Take in the plans of a group that is new, or was changed."""
        self |= plans
        self._live[number:] = [LiveGroup(group, self.parts.of(group)), *self._live[number + 1 :]]
        self._groups[number:] = [id(group), *self._groups[number + 1 :]]
        self._ordinals.clear()

    def renew(self, groups: Sequence[Group]) -> None:
        """Make all plans anew; if that cannot be, they stay as they are."""
        fresh = Plans(self.parts)
        fresh.warned = self.warned
        for number, group in enumerate(groups):
            fresh.set_group(number, group, fresh.of_group(group, group["params"], number, len(fresh)))
        self.clear()
        self |= fresh
        self._live, self._groups, self.has_units = fresh._live, fresh._groups, fresh.has_units
        self._ordinals.clear()

    def check_structure(self, groups: Sequence[Group]) -> None:
        """Raise TypeError or ValueError for what was edited in a live group and cannot be (`LiveGroup.check`)."""
        if self._groups != list(map(id, groups)):  # somebody has sorted them, or taken one out
            self.renew(groups)
        for number, (group, live) in enumerate(zip(groups, self._live, strict=True)):
            live.check(group, number)
            if group["l1"]:
                check_proximal((plan for plan in self.values() if plan.group == number), group)

    def offset(self, param: Tensor, plan: ParamPlan, group: Group) -> int:
        """How many steps before a multiple of its gap a parameter of this plan and group is refreshed."""
        if not group["stagger"] or group["match_reference"] or plan.space is None:
            return 0
        if not self._ordinals:
            self._ordinals = stagger_ordinals(self)
        return stagger_offset(*self._ordinals.get(param, (0, 1)), group["update_proj_gap"])
