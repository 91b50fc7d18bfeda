"""The step of one parameter that is trained directly: the rule sees its gradient as it is."""

from collections.abc import Generator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.quantization.coded_moments import CodedMoments
from lowrank_optim.rules import masked_direction
from lowrank_optim.step.batching import Launch, Request, Step
from lowrank_optim.step.caution import cautiously_, is_cautious
from lowrank_optim.step.param_step import ParamStep


def dense_step(step: ParamStep, norm: Tensor | None = None) -> Step:
    """W ← (1 − ηλ) W − η N. `norm`, where it is known, is finite where the gradient is."""
    grad = step.local_grad()
    with step:
        if not step.plan.sharding.whole:
            ok = yield from _dense(step, grad, norm)
        else:
            with step.gathered() as (whole, gradient):
                ok = yield from _dense(whole, gradient, norm, copied=True)
        if step.group["l1"]:
            step.shrink(ok)


def _dense(
    step: ParamStep, grad: Tensor, norm: Tensor | None, copied: bool = False
) -> Generator[Request, Any, Literal[False] | Tensor | None]:
    """One operation where the rule has one; else in chunks where it can: no working copy is as large as an embedding.

    Cautious updates are neither: they are made as a whole, and looked at, before they are applied.

    Returns whether the gradient was used, as `ParamStep.finite` says it.
    """
    rule, group = step.plan.rule, step.group
    ok = step.finite(grad if norm is None else norm)
    step.state["step"] += 1
    if ok is False:
        return ok
    if type(step.moments) is CodedMoments:
        step.fit_columns(step.moments, grad, 0, ok)
    context = step.context(step.weight, ok, dense=True)
    weight, error, cautious = step.matrix_weight, step.error, is_cautious(group)
    kept = error is None or (rule.keeps_errors and weight.is_contiguous() and error.is_contiguous())
    alone = cautious or not kept
    fused = None if alone else rule.fused_dense(weight, grad, step.moments, group, context)
    if fused is not None:
        # Copies must not wait with others: together they could be as large as the model.
        viewed = not step.plan.is_matrix or (_is_view(weight, step.weight) and _is_view(grad, step.param.grad))
        elements = 0 if viewed and not copied and fused.after is None else grad.numel()
        yield Launch(fused.op, fused.call(vars(step.write(None, 1.0, ok))), elements)
        if step.plan.is_matrix:
            step.put_back(weight)
        if fused.after is not None:
            fused.after()
        return ok
    dtype = kernels.compute_dtype(step.param.dtype)
    for weight, part, moments, place in step.dense_parts(grad, rule.elementwise and not cautious):
        part = part.to(dtype) if ok is None else torch.where(ok, part.to(dtype), 0.0)
        direction = masked_direction(rule, part, moments, group, context.at(weight))
        write = replace(step.write(direction, 1.0, ok), error=place.error)
        if cautious:
            cautiously_(weight, direction.matrix, grad, write, group, step.plan.sharding.matrix)
        else:
            kernels.apply_dense_(weight, direction.matrix, start=place.start, **vars(write))
        if step.plan.is_matrix:
            step.put_back(weight)
    return ok


def _is_view(tensor: Tensor, source: Tensor | None) -> bool:
    """Whether a step keeps no memory for a tensor, beside that of its source."""
    if tensor is source or source is None:
        return source is not None
    return tensor._base is not None and tensor._base is (source if source._base is None else source._base)
