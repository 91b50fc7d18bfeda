"""Parameters whose rule sees all their gradients at once: which ones they are, and their step."""

import warnings
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.rules import Context, FusedDense, JointRule, Unit
from lowrank_optim.rules.joint import Written
from lowrank_optim.step.batching import Launch, Shared, Step
from lowrank_optim.step.caution import cautiously_, is_cautious
from lowrank_optim.step.param_plan import ParamPlan
from lowrank_optim.step.param_step import ParamStep


def make_units(plans: dict[Tensor, ParamPlan], rule: JointRule, group: Mapping[str, Any]) -> None:
    """Tell the parameters of a group which ones are stepped together; `plans` is modified in place.

    Raises:
        ValueError: their number is no multiple of the rule's, they have a rank, or the rule cannot step them together.
    """
    params, arity = list(plans), rule.arity
    if len(params) % arity:
        raise ValueError(
            f"{type(rule).__name__} steps {arity} parameters at a time, and its group has {len(params)}: "
            f"{', '.join(plan.name for plan in plans.values())}; give a multiple of {arity}, in order"
        )
    for start in range(0, len(params), arity):
        unit = tuple(params[start : start + arity])
        for param in unit:
            if plans[param].space is not None:
                raise ValueError(
                    f"{type(rule).__name__} works on {arity} parameters at once, so that its groups can have no rank or density"
                )
        options = rule.unit_options(group, start // arity)
        rule.check_unit([plans[param].name for param in unit], unit, options)
        shapes = rule.unit_shapes(unit)
        shardings = rule.unit_shardings(unit, options) or [plans[param].sharding for param in unit]
        local = tuple(sharding.moment_shape(tuple(shape)) for sharding, shape in zip(shardings, shapes, strict=True))
        for param, sharding in zip(unit, shardings, strict=True):
            plans[param] = replace(plans[param], unit=unit, unit_shapes=local, sharding=sharding)


def check_trainable(plans: Mapping[Tensor, ParamPlan]) -> None:
    """Raise ValueError where some parameters that are stepped together are frozen, and their rule cannot do without a gradient."""
    for plan in plans.values():
        frozen = [plans[param].name for param in plan.unit if not param.requires_grad]
        one_sided = isinstance(plan.rule, JointRule) and plan.rule.takes_frozen
        if frozen and not one_sided:
            raise ValueError(
                f"{type(plan.rule).__name__} steps {', '.join(plans[param].name for param in plan.unit)} together, but "
                f"{', '.join(frozen)} does not require a gradient; train all of them, or give the others another rule"
            )


def check_unit(
    plan: ParamPlan, plans: Mapping[Tensor, ParamPlan], group: Mapping[str, Any], states: Mapping[Any, Any]
) -> None:
    """Raise where parameters that are stepped together cannot take this step; nothing has changed.

    Raises:
        RuntimeError: some have a gradient and others have none.
        ValueError: their first step would leave nothing of them (option `l1`).
    """
    trained = [param for param in plan.unit if param.requires_grad]
    without = [plans[param].name for param in trained if param.grad is None]
    if without and len(without) < len(trained):
        raise RuntimeError(
            f"{type(plan.rule).__name__} steps {', '.join(plans[param].name for param in plan.unit)} together, but "
            f"{', '.join(without)} got no gradient, so that none of them was changed. All of them have to take part in the loss"
        )
    if group["l1"] and not any(int(state["step"]) for p in plan.unit if (state := states.get(p))):
        assert isinstance(plan.rule, JointRule)
        options = plan.rule.unit_options(group, plan.position // plan.rule.arity)
        plan.rule.check_start([plans[param].name for param in plan.unit], plan.unit, options)


def check_units(
    plans: Mapping[Tensor, ParamPlan],
    groups: Sequence[Mapping[str, Any]],
    states: Mapping[Any, Any],
    left_out: Container[int],
) -> None:
    """`check_unit` of every unit but those of the groups of these numbers."""
    for param, plan in plans.items():
        if plan.unit and plan.unit[0] is param and plan.group not in left_out:
            check_unit(plan, plans, groups[plan.group], states)


def is_last_of_unit(param: Tensor, plan: ParamPlan) -> bool:
    """Whether this is the last parameter of its unit that has a gradient: the step of the unit is due."""
    return next(member for member in reversed(plan.unit) if member.grad is not None) is param


def joint_step(members: Sequence[ParamStep], norms: Sequence[Tensor | None] = ()) -> Step:
    """W ← (1 − ηλ) W − η N for several parameters whose rule sees all their gradients at once; frozen ones stay as they are."""
    rule, group, plan = members[0].plan.rule, members[0].group, members[0].plan
    assert isinstance(rule, JointRule)
    trained = [member for member in members if member.param.grad is not None]
    grads = [None if member.param.grad is None else member.local_grad() for member in members]
    with _Entered(trained):
        ok, usable = _finite(members, grads, norms)
        for member in trained:
            member.state["step"] += 1
        if not usable:
            return
        options, cautious = rule.unit_options(group, plan.position // rule.arity), is_cautious(group)
        writes = [
            None if grad is None else member.write(None, 1.0, ok) for member, grad in zip(members, grads, strict=True)
        ]
        unit = Unit(
            tuple(None if grad is None else _wide(grad, ok) for grad in grads),
            tuple(member.state for member in members),
            options,
            tuple(
                Context(0.0, 0.0, member.weight, ok, dense=True, sharding=member.plan.sharding)
                if grad is None
                else member.context(member.weight, ok, dense=True)
                for member, grad in zip(members, grads, strict=True)
            ),
            tuple((0.0, 1.0) if write is None else (write.alpha, write.keep) for write in writes),
            cautious,
            plan.memo,
        )
        key = (id(rule), plan.group, plan.device, plan.dtype)
        elements = 0 if rule.writes(unit) else rule.unit_elements(plan.unit, options)
        directions, kept = yield Shared(rule.directions_of, (*key, "directions"), unit, elements)
        if len(directions) != len(members):
            raise ValueError(
                f"{type(rule).__name__}.directions gave {len(directions)} directions for {len(members)} parameters"
            )
        if any(isinstance(direction, Written) for direction in directions):
            if kept is not None:
                warnings.warn(kept, RuntimeWarning, stacklevel=2)
            return
        steps = [0.0] * len(members)
        for number, (member, direction) in enumerate(zip(members, directions, strict=True)):
            if direction is None or grads[number] is None:
                continue
            fused, write, sharding = isinstance(direction, FusedDense), writes[number], member.plan.sharding.matrix
            if write is None or not (fused or direction.step is direction.decay is None):
                write = member.write(direction, 1.0, ok)
            steps[number] = abs(write.alpha)
            if fused:
                yield Launch(direction.op, direction.call(vars(write)))
                if direction.after is not None:
                    direction.after()
            elif cautious:
                cautiously_(member.weight, direction.matrix, member.local_grad(), write, group, sharding)
            else:
                kernels.apply_dense_(member.weight, direction.matrix, start=sharding.start, **vars(write))
        if group["l1"]:
            rule.shrink_(unit, steps, float(group["l1"]))
        if rule.finishes:
            yield Shared(rule.finish, (*key, "finish"), (unit, kept), elements)


class _Entered:
    """Several parameters as one context; `ExitStack` takes as long as the launch of an operation for each."""

    def __init__(self, members: Sequence[ParamStep]) -> None:
        self.members = members

    def __enter__(self) -> None:
        for member in self.members:
            member.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in reversed(self.members):
            member.__exit__(kind, error, trace)


def _wide(grad: Tensor, ok: Tensor | None) -> Tensor:
    """A gradient in the compute type, 0 where it is to be ignored."""
    dtype = kernels.compute_dtype(grad.dtype)
    wide = grad if grad.dtype == dtype else grad.to(dtype)
    return wide if ok is None else torch.where(ok, wide, 0.0)


def _finite(
    members: Sequence[ParamStep], grads: Sequence[Tensor | None], norms: Sequence[Tensor | None]
) -> tuple[Tensor | None, bool]:
    """The mask of the device, and whether the host knows of nothing that forbids the step: one bad gradient stops all members."""
    flags = [
        member.finite(grad if norm is None else norm)
        for member, grad, norm in zip(members, grads, norms or [None] * len(grads), strict=True)
        if grad is not None
    ]
    masks = [flag for flag in flags if isinstance(flag, Tensor)]
    return (torch.stack(masks).all() if masks else None), not any(flag is False for flag in flags)
