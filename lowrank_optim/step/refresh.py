"""A new subspace for one matrix, and what becomes of its moments."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank_optim.projectors import Basis, Refresh, StepParams
from lowrank_optim.quantization.coded_moments import CodedMoments
from lowrank_optim.step.init_state import init_moments
from lowrank_optim.step.param_step import ParamStep
from lowrank_optim.step.refresh_schedule import lengthen_gap, moment_steps


def refresh_if_due(step: ParamStep, grad: Tensor, ok: Tensor | None) -> None:
    """Give a matrix a new subspace from this gradient if one is due and the gradient (and the 0-d bool `ok`) allows it."""
    if not step.refresh_is_due:
        return
    state, group = step.state, step.group
    now, last = int(state["step"]), int(state["last_refresh"])
    new = _new_basis(step, grad, now, last)
    if new is None:
        return  # zero or non-finite: keep the old basis and try again on the next step
    if ok is not None and not step.plan.projector.narrows:  # which look at no gradient
        new = {n: t if step.plan.is_on_host(n) else torch.where(ok, t, state[n]) for n, t in new.items()}
    kept: dict[str, Tensor] = {}
    if last >= 0 and (group["on_refresh"] == "rotate" or "gap" in state):
        old, basis = step.basis(), step.basis_of({**state, **new}, now)
        if "gap" in state:
            lengthen_gap(state, float(basis.overlap(old)), group)
        if group["on_refresh"] == "rotate" and step.plan.projector.narrows:
            kept = _narrowed(step, old, basis)
        elif group["on_refresh"] == "rotate":
            _rotate(step, old, basis, now)
    for name, tensor in new.items():
        state[name] = state[name].copy_(tensor) if state[name].shape == tensor.shape else tensor
    state["last_refresh"].fill_(now)
    if group["on_refresh"] == "reset" or step.plan.projector.narrows:
        reset_moments(step)
    for name, moment in kept.items():
        step.moments[name].copy_(moment)


def _new_basis(step: ParamStep, grad: Tensor, now: int, last: int) -> Mapping[str, Tensor] | None:
    """The projector's tensors for a new subspace, or None where this gradient gives none."""
    plan, momentum = step.plan, None
    if plan.projector.uses_momentum:
        momentum = plan.rule.mean_gradient(step.moments, step.group, moment_steps(step.state, step.group))
    assert plan.space is not None
    weight = step.matrix_weight.detach() if plan.projector.uses_weights else None
    return plan.refresh(Refresh(grad, plan.space, step.state, step.key(now), last < 0, momentum, weight))


def _rotate(step: ParamStep, old: Basis, new: Basis, steps: float) -> None:
    """Express the moments in a new basis, and hand what momentum loses by it to a residual that feeds back."""
    rule, moments, group, state = step.plan.rule, step.moments, step.group, step.state
    weight = rule.memory(group) if step.plan.residual.feeds_back else 0.0
    if weight:
        old.apply_(state["error"], moments["exp_avg"], StepParams(-weight, 1.0))
    rule.transport(moments, lambda moment, power: new.transport(moment, old, power), group, steps)
    if weight:
        new.apply_(state["error"], moments["exp_avg"], StepParams(weight, 1.0))


def _narrowed(step: ParamStep, old: Basis, new: Basis) -> dict[str, Tensor]:
    """The moments of what is left of a subspace, to the bit; those that are not of R's shape begin anew."""
    shape = step.plan.moment_shape(step.state)
    names = step.plan.rule.init(shape, step.group, torch.float32, torch.device("meta"))
    moments = {name: step.moments[name] for name in names}
    return {name: new.transport(m, old, 1) for name, m in moments.items() if tuple(m.shape) == tuple(shape)}


def reset_moments(step: ParamStep) -> None:
    """Zero moments, of the shape that the new subspace needs."""
    state = step.state
    fresh = init_moments(step.group, step.plan, state, step.param.dtype, step.plan.device)
    if "col_scale" in state and "col_scale" not in fresh:
        state.pop("col_scale")  # of no column, while it was not this tensor's turn
    for name, tensor in fresh.items():
        same = name in state and state[name].shape == tensor.shape
        state[name] = state[name].copy_(tensor) if same else tensor
    if isinstance(step.moments, CodedMoments):
        step.moments.forget(step.plan.moment_shape(state))
