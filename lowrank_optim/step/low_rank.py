"""The step of one matrix in its subspace.

W ← (1 − ηλ) W − η (lift(C) + φ ⊙ E)        lift(C) = C Bᵀ (right), B Cᵀ (left), A C Bᵀ (full)
"""

import sys
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.projectors import Basis
from lowrank_optim.projectors.dense_basis import LIFT
from lowrank_optim.quantization.coded_moments import CodedMoments
from lowrank_optim.residuals.base import ResidualInput
from lowrank_optim.rules import Context, Direction, masked_direction
from lowrank_optim.sharding.dtensor import local_grad
from lowrank_optim.sharding.param_sharding import LOCAL
from lowrank_optim.step.batching import Launch, Step, Sum
from lowrank_optim.step.caution import cautiously_, is_cautious
from lowrank_optim.step.param_step import ParamStep
from lowrank_optim.step.refresh import refresh_if_due


@dataclass(frozen=True)
class Projected:
    """A gradient in its subspace.

    grad: G, the matrix view, with what was kept of earlier ones.
    basis: the subspace.
    reduced: R.
    squares: ‖g_j‖² of the row or column of G behind each row of R; None unless the residual asks for them.
    ok: None if the gradient may be used, False if not, or a 0-d bool on the device.
    """

    grad: Tensor
    basis: Basis
    reduced: Tensor
    squares: Tensor | None
    ok: Literal[False] | Tensor | None


def low_rank_step(step: ParamStep, norm: Tensor | None = None, reduced: Tensor | None = None) -> Step:
    """Refresh if due → project → direction → residual → apply.

    Args:
        step: of the matrix.
        norm: a number that is finite where the whole gradient is, if it is known.
        reduced: R, where only that was kept of the gradient: then the subspace stands.
    """
    residual, group, state = step.plan.residual, step.group, step.state
    if group["cautious"] and reduced is not None:
        raise ValueError(f"{step.plan.name} is cautious, which takes the whole gradient, and only R was kept of it")
    with step:
        whole = step.weight
        weight = step.plan.view(whole)
        if reduced is None:
            seen = project(step, norm)
        else:
            seen = Projected(reduced.new_empty(0), step.basis(), reduced, None, step.finite(reduced))
        state["step"] += 1
        ok = seen.ok
        if ok is False:
            return
        reduced, squares = seen.reduced, seen.squares
        if step.pull is not None:
            reduced = reduced + step.pull(seen.basis, weight)
        if ok is not None:
            reduced = torch.where(ok, reduced, 0.0)
            squares = None if squares is None else torch.where(ok, squares, 0.0)
        if type(step.moments) is CodedMoments:
            step.fit_columns(step.moments, reduced, max(int(state["last_refresh"]), 0), ok)
        direction = yield from _direction(
            step, reduced, step.context(weight, ok, dense=False, norms=residual.uses_norms)
        )
        inputs = _residual_input(step, seen, reduced, squares, direction, ok)
        if (sums := residual.sums(inputs, state, group)) is not None:
            if step.plan.sharding.reduced.splits(-2):
                sums = yield Sum(sums, step.plan.sharding.reduced, step.plan.elements)
            inputs = replace(inputs, sums=sums)
        update = residual.update(inputs, state, group)
        write = step.write(direction, update.factor, ok)
        if (group["cautious"] or group["cautious_decay"]) and is_cautious(group):
            lifted = torch.zeros_like(weight, dtype=kernels.compute_dtype(weight.dtype))
            seen.basis.apply_(lifted, update.core, replace(LIFT, ok=ok), update.term)
            grad = step.local_grad() if group["cautious"] else lifted
            cautiously_(weight, lifted, grad, write, group, step.plan.sharding.matrix)
        else:
            seen.basis.apply_(weight, update.core, write, update.term)
        if weight is not whole:
            step.put_back(weight)
        if group["l1"]:
            step.shrink(ok)


def project(step: ParamStep, norm: Tensor | None) -> Projected:
    """The gradient in its subspace, which is a new one where that is due; and whether it may be used."""
    plan, residual = step.plan, step.plan.residual
    grad = plan.view(local_grad(step.param))
    norm = None if plan.sharding is LOCAL else norm  # R shows as much as a pass over all of G
    ok: Literal[False] | Tensor | None = None
    if residual.feeds_back:
        ok = step.finite(grad if norm is None else norm)
        if ok is False:
            return Projected(grad, step.basis(), grad, None, ok)
        grad = residual.absorb(grad, step.state, ok)
    refresh_if_due(step, grad, ok if isinstance(ok, Tensor) else None)
    basis = step.basis()
    reduced, squares = basis.project_with_norms(grad) if residual.uses_norms else (basis.project(grad), None)
    if not residual.feeds_back:
        # R and the norms show any NaN that a step would use; a residual outside of coordinates uses all of G.
        shows_all = plan.projector.sees_all and reduced.numel() > 0
        seen = reduced if shows_all or not residual.uses_gradient else grad
        seen = seen if squares is None else squares.sqrt()
        ok = step.finite(seen if norm is None else norm)
    return Projected(grad, basis, reduced, squares, ok)


def _direction(step: ParamStep, reduced: Tensor, context: Context) -> Generator[Launch, Any, Direction]:
    """The rule's direction for R, as one operation where the rule has one."""
    seen = (reduced, step.moments, step.group, context)
    fused = step.plan.rule.fused_direction(*seen)
    if fused is None:
        return masked_direction(step.plan.rule, *seen)
    return fused.direction((yield Launch(fused.op, fused.args, step.plan.elements if _may_wait(step) else sys.maxsize)))


def _residual_input(
    step: ParamStep, seen: Projected, reduced: Tensor, squares: Tensor | None, direction: Direction, ok: Tensor | None
) -> ResidualInput:
    """What the residual sees, in the type that sums are carried out in."""
    assert step.plan.space is not None
    matrix, norms, wide = direction.matrix, direction.norms, step.plan.sum_dtype
    if wide is not None:
        reduced, matrix, norms = reduced.to(wide), matrix.to(wide), None
    if step.plan.residual.uses_norms and norms is None:
        norms = kernels.row_norms(matrix, reduced)
    return ResidualInput(
        seen.grad,
        reduced,
        squares,
        matrix,
        direction.correction,
        direction.unit,
        seen.basis,
        step.plan.space,
        ok,
        norms,
    )


def _may_wait(step: ParamStep) -> bool:
    """Whether little but R waits: moments that are decoded do not, nor convolutions that may be copies, to be matrices."""
    plan, param, moments = step.plan, step.param, step.moments
    if type(moments) is CodedMoments and moments.codes() is None:
        return False
    if plan.layout != "conv" and param.dim() <= 3:
        return True
    contiguous = param.grad is not None and step.weight.is_contiguous() and param.grad.is_contiguous()
    return plan.sharding is LOCAL and contiguous
