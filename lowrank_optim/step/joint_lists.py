"""The step of all units of a group at once, where their rule writes plain weights itself.

A step of each unit (`step.joint`) takes longer for Python than small factors take to be computed. Where anything about a group is not
as usual, its units are stepped one by one, with the same numbers.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.rules import JointRule
from lowrank_optim.rules.joint import PLAIN, UnitLists
from lowrank_optim.sharding.param_sharding import LOCAL
from lowrank_optim.step.batching import Shared, Step
from lowrank_optim.step.caution import is_cautious
from lowrank_optim.step.nonfinite import SkippedUpdates
from lowrank_optim.step.param_plan import ParamPlan
from lowrank_optim.step.trained_param import TrainedParam

_COMPUTE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class PlainGroup:
    """A group all of whose units are plain, and have gradients that can be used, as far as the rule does not find out by itself.

    params, states: of all units, in order.
    plan: of the first one.
    memos: `Unit.memo` of each unit.
    """

    params: Sequence[Tensor]
    states: Sequence[Mapping[str, Tensor]]
    group: Mapping[str, Any]
    plan: ParamPlan
    memos: Sequence[dict[str, Any]]

    @staticmethod
    def of(
        group: Mapping[str, Any], plans: Mapping[Tensor, ParamPlan], states: Mapping[Any, Any]
    ) -> "PlainGroup | None":
        """Of a group all of whose gradients may be used; None where its units are to be stepped one by one."""
        params = group["params"]
        rule = plans[params[0]].rule if params else None
        if not isinstance(rule, JointRule) or not rule.writes_lists(group) or not _is_usual(group):
            return None
        held, memos, grads = [], [], []
        for number, param in enumerate(params):
            plan, state, grad = plans[param], states.get(param), param.grad
            if (
                not state
                or grad is None
                or plan.sharding is not LOCAL
                or type(param) not in PLAIN
                or type(grad) not in PLAIN
                or param.dtype not in _COMPUTE
                or param.dtype is not grad.dtype
                or not (param.is_cpu and param.is_contiguous() and grad.is_contiguous())
            ):
                return None
            held.append(state)
            grads.append(grad)
            if number % rule.arity == 0:
                memos.append(plan.memo)
        known = group["on_nonfinite"] == "propagate" or (group["on_nonfinite"] == "skip" and rule.finds_nonfinite)
        if not known and not bool(torch.stack(kernels.norms(grads)).isfinite().all()):
            return None
        return PlainGroup(params, held, group, plans[params[0]], memos)

    @property
    def rule(self) -> JointRule:
        """Of all units."""
        assert isinstance(self.plan.rule, JointRule)
        return self.plan.rule

    def step(self, members: Iterable[TrainedParam], skipped: SkippedUpdates, plans: Mapping[Tensor, ParamPlan]) -> Step:
        """The step of all units; `members` are those of the first one, `skipped` counts units that are left out."""
        writes = [member.write(None, 1.0, None) for member in members]
        sizes = tuple((write.alpha, float(write.keep)) for write in writes)
        counters = [state["step"] for state in self.states]
        torch._foreach_add_(counters, 1.0)
        said: str | None = None
        left_out = False
        for units in self._kinds(torch.stack(counters).tolist(), sizes):
            key = id(self.rule), self.plan.group, "lists", *units.counts
            said = (yield Shared(_write, key, (self.rule, units), 0)) or said
            if units.finite is not None and not bool(units.finite.all()):
                for number in (~units.finite).nonzero().flatten().tolist():
                    skipped.add(plans[units.weights[number]].name, kernels.cpu_tensor(True, torch.bool))
                    left_out = True
        if left_out:
            skipped.warn()
        if said:
            warnings.warn(said, RuntimeWarning, stacklevel=2)

    def _kinds(self, counts: Sequence[float], sizes: tuple[tuple[float, float], ...]) -> Iterator[UnitLists]:
        """Units of one rank and type that have seen as many steps."""
        arity = self.rule.arity
        alike: dict[tuple[Any, ...], list[int]] = {}
        for unit in range(len(self.memos)):
            first = self.params[unit * arity]
            key = first.shape[0], first.dtype, *counts[unit * arity : (unit + 1) * arity]
            alike.setdefault(key, []).append(unit)
        checks = self.group["on_nonfinite"] == "skip" and self.rule.finds_nonfinite
        scalings = self.group.get("scalings") or [1.0] * len(self.memos)
        for (_, _, *seen), numbers in alike.items():
            places = [unit * arity + k for unit in numbers for k in range(arity)]
            params = [self.params[place] for place in places]
            yield UnitLists(
                params,
                [param.grad for param in params if param.grad is not None],
                [self.states[place] for place in places],
                self.group,
                tuple(seen),
                sizes,
                [float(scalings[unit]) for unit in numbers],
                [self.memos[unit] for unit in numbers],
                torch.ones(len(places), dtype=torch.bool) if checks else None,
            )


def plain_groups(
    groups: Sequence[Mapping[str, Any]],
    plans: Mapping[Tensor, ParamPlan],
    states: Mapping[Any, Any],
    admits: Callable[[Tensor, Mapping[str, Any]], bool],
) -> dict[int, PlainGroup]:
    """The groups that are stepped whole, by number; `admits` says of a parameter and its group whether its gradient may be used."""
    found = {n: plain for n, group in enumerate(groups) if (plain := PlainGroup.of(group, plans, states))}
    return {n: plain for n, plain in found.items() if all(admits(param, plain.group) for param in plain.params)}


def _is_usual(group: Mapping[str, Any]) -> bool:
    """Whether nothing in a group asks for more than the rule's own step."""
    return not (
        group["l1"]
        or is_cautious(group)
        or isinstance(group["weight_decay"], Tensor)
        or any(experts != 1 for experts in group.get("experts") or ())
        or kernels.is_watched()
    )


def _write(requests: Sequence[tuple[JointRule, UnitLists]]) -> list[str | None]:
    return [rule.write_lists(units) for rule, units in requests]
