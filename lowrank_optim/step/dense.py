"""The step of one parameter that is trained directly: the rule sees its gradient as it is."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.quantization.coded_moments import CodedMoments
from lowrank_optim.rules import JointRule, masked_direction, masked_directions
from lowrank_optim.step.batching import Launch, Step
from lowrank_optim.step.param_step import ParamStep


def dense_step(step: ParamStep, norm: Tensor | None = None) -> Step:
    """W ← (1 − ηλ) W − η N. `norm`, where it is known, is finite where the gradient is."""
    grad = step.local_grad()
    with step:
        if not step.plan.sharding.whole:
            yield from _dense(step, grad, norm)
            return
        with step.gathered() as (whole, gradient):
            yield from _dense(whole, gradient, norm, copied=True)


def joint_step(members: Sequence[ParamStep], norms: Sequence[Tensor | None] = ()) -> Step:
    """W ← (1 − ηλ) W − η N for several parameters whose rule sees all their gradients at once."""
    rule, group = members[0].plan.rule, members[0].group
    assert isinstance(rule, JointRule)
    grads = [member.local_grad() for member in members]
    seen = [grad if norm is None else norm for grad, norm in zip(grads, norms or [None] * len(grads), strict=True)]
    with ExitStack() as stack:
        for member in members:
            stack.enter_context(member)
        flags = [member.finite(each) for member, each in zip(members, seen, strict=True)]
        for member in members:
            member.state["step"] += 1
        if any(flag is False for flag in flags):
            return
        masks = [flag for flag in flags if isinstance(flag, Tensor)]
        ok = torch.stack(masks).all() if masks else None
        wide = [grad.to(kernels.compute_dtype(grad.dtype)) for grad in grads]
        wide = wide if ok is None else [torch.where(ok, grad, 0.0) for grad in wide]
        contexts = [member.context(member.weight, ok, dense=True) for member in members]
        states = [member.state for member in members]
        directions = list(masked_directions(rule, wide, states, group, contexts))
        if len(directions) != len(members):
            raise ValueError(
                f"{type(rule).__name__}.directions gave {len(directions)} directions for {len(members)} parameters"
            )
        for member, direction in zip(members, directions, strict=True):
            write = member.write(direction, 1.0, ok)
            kernels.apply_dense_(member.weight, direction.matrix, start=0, **vars(write))
    yield from ()


def _dense(step: ParamStep, grad: Tensor, norm: Tensor | None, copied: bool = False) -> Step:
    """One operation where the rule has one; else in chunks where it can: no working copy is as large as an embedding."""
    rule, group = step.plan.rule, step.group
    ok = step.finite(grad if norm is None else norm)
    step.state["step"] += 1
    if ok is False:
        return
    if type(step.moments) is CodedMoments:
        step.fit_columns(step.moments, grad, 0, ok)
    context = step.context(step.weight, ok, dense=True)
    weight = step.matrix_weight
    fused = rule.fused_dense(weight, grad, step.moments, group, context)
    if fused is not None:
        # Copies must not wait with others: together they could be as large as the model.
        elements = grad.numel() if copied or fused.after is not None or step.plan.is_matrix else 0
        yield Launch(fused.op, fused.call(vars(step.write(None, 1.0, ok))), elements)
        if step.plan.is_matrix:
            step.put_back(weight)
        if fused.after is not None:
            fused.after()
        return
    dtype = kernels.compute_dtype(step.param.dtype)
    for weight, part, moments, start in step.dense_parts(grad, rule.elementwise):
        part = part.to(dtype) if ok is None else torch.where(ok, part.to(dtype), 0.0)
        direction = masked_direction(rule, part, moments, group, context.at(weight))
        kernels.apply_dense_(weight, direction.matrix, start=start, **vars(step.write(direction, 1.0, ok)))
        if step.plan.is_matrix:
            step.put_back(weight)
