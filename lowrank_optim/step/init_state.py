"""The state that a parameter begins with: plain tensors only, made from its plan and its group."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.projectors import Refresh
from lowrank_optim.quantization import coded_moments as coding
from lowrank_optim.rules import JointRule
from lowrank_optim.sharding.dtensor import local
from lowrank_optim.step.param_plan import ParamPlan
from lowrank_optim.step.param_step import param_key


def init_state(param: Tensor, group: Mapping[str, Any], plan: ParamPlan) -> dict[str, Tensor]:
    """Counters, subspace, residual and zero moments of one parameter, as they are kept.

    Raises:
        ValueError: two parts of the method call a tensor by the same name.
    """
    device, dtype = param.device, param.dtype
    parts: dict[str, dict[str, Tensor]] = {"the step": {"step": kernels.cpu_tensor(0.0, torch.float32)}}
    if plan.space is not None:
        parts["the step"] |= {"last_refresh": kernels.cpu_tensor(-1, torch.int64)}
        if group["overlap_threshold"] is not None:
            parts["the step"]["gap"] = kernels.cpu_tensor(group["update_proj_gap"], torch.int64)
            parts["the step"]["overlaps"] = kernels.cpu_tensor([-1.0] * group["queue_size"], torch.float32)
        parts["the projector"] = _init_projector(param, group, plan)
        parts["the residual"] = plan.residual.init(plan.space, device)
    state = _joined(parts)
    parts["the rule"] = init_moments(group, plan, state, dtype, device)
    state = _joined(parts)
    if group.get("master_weights") and dtype in (torch.bfloat16, torch.float16):
        state["master"] = param.detach().float()
    if group["weight_error_bits"] and dtype == torch.bfloat16:
        shape = local(param).shape
        state["weight_error"] = torch.zeros(shape, dtype=torch.int8, device=device)
        if group["weight_error_bits"] == 16:
            state["weight_error_low"] = torch.zeros(shape, dtype=torch.uint8, device=device)
    return placed(plan, state)


def _init_projector(param: Tensor, group: Mapping[str, Any], plan: ParamPlan) -> dict[str, Tensor]:
    """The projector's state before the first gradient, chosen from the weights where it chooses by them."""
    assert plan.space is not None
    key = param_key(group, plan, 0)
    state = plan.projector.init(plan.space, key, param.device)
    if not plan.projector.uses_weights:
        return state
    weight = plan.view(local(param).detach())
    return plan.refresh(Refresh(weight, plan.space, state, key, first=True, weight=weight)) or state


def _joined(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    for part, tensors in parts.items():
        for name in tensors:
            if name in owner:
                raise ValueError(
                    f"state tensor {name!r} belongs to {owner[name]}, and {part} has one of that name; rename one"
                )
            owner[name] = part
        state |= tensors
    return state


def init_moments(
    group: Mapping[str, Any], plan: ParamPlan, state: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """The rule's state for the subspace that `state` describes, as it is stored, all zero; `dtype` is the parameter's."""
    shape, dtype = plan.gradient_shape(state), kernels.compute_dtype(dtype)
    if isinstance(plan.rule, JointRule):
        options = plan.rule.unit_options(group, plan.position // plan.rule.arity)
        made = plan.rule.init_joint(plan.unit_shapes, options, dtype, device)
        return made[plan.place_in_unit]
    if not plan.is_coded(group["state_bits"]):
        return plan.rule.init(shape, group, dtype, device)
    like = plan.rule.init(shape, group, dtype, torch.device("meta"))
    return coding.zeros(like, group["state_bits"], device)


def placed(plan: ParamPlan, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Local parts of state tensors as they are kept: DTensors where the parameter is one."""
    return {name: plan.placed(name, tensor) for name, tensor in state.items()}
