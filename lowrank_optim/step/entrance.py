"""The entrance of a step: what parameters and gradients have to be, checked before anything changes.

Behind it, every parameter is the one that the optimizer was built with, in the shape that its state is for, and the local part of
every gradient is an ordinary dense tensor in memory: operations may read its address and write to it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from lowrank_optim.kernels import compute_dtype, is_watched
from lowrank_optim.sharding.dtensor import dense_sharding, local, local_grad
from lowrank_optim.step.param_plan import ParamPlan, check_memory, shares_elements

_PLAIN = (Tensor, torch.nn.Parameter)


def enter(
    params: Sequence[Tensor], plans: Mapping[Tensor, ParamPlan], groups: Iterable[Mapping[str, Any]]
) -> tuple[bool, list[Tensor]]:
    """Let parameters into a step, all of which are checked before anything changes.

    Returns:
        Whether some were moved or converted since their plans were made, so that their state has to follow; and those whose gradients
        are no ordinary tensors, to be settled then.
    """
    moved, unsettled = False, []
    for param in params:
        plan = plans.get(param)
        if plan is None:
            check_members(groups, plans)  # raises, and says what to do
            raise RuntimeError(f"a parameter {tuple(param.shape)} is none of this optimizer's")
        if not _is_ordinary(param) or param.shape != plan.shape:
            check_parameter(param, plan)
        moved = moved or plan.device != param.device or plan.dtype != param.dtype
        grad = param.grad
        if grad is not None and not _is_like(grad, param):
            check_gradient(param, plan)
            unsettled.append(param)
    return moved, unsettled


def _is_ordinary(tensor: Tensor) -> bool:
    """Whether a tensor lies in memory for all to see, every element in a place of its own."""
    return type(tensor) in _PLAIN and tensor.is_contiguous() and not (tensor.is_neg() or tensor._is_zerotensor())


def _is_like(grad: Tensor, param: Tensor) -> bool:
    """Whether a gradient is an ordinary tensor of the type and shape of its parameter: nothing else need be looked at."""
    return (
        grad.layout is torch.strided
        and grad.dtype is param.dtype
        and grad.shape == param.shape
        and grad.device == param.device
        and not torch._C._functorch.is_functorch_wrapped_tensor(grad)
        and _is_ordinary(grad)
        and grad.data_ptr() != 0
    )


# ---------------------------------------------------------------------------------------------------------------- parameters


def check_members(groups: Iterable[Mapping[str, Any]], plans: Mapping[Tensor, ParamPlan]) -> None:
    """Raise RuntimeError for a parameter that has come into the groups, or has another shape, since the optimizer was built."""
    groups = list(groups)
    for number, group in enumerate(groups):
        for position, param in enumerate(group["params"]):
            plan = plans.get(param)
            if plan is None:
                _refuse_stranger(param, number, position, groups, plans)
            check_parameter(param, plan)


def check_parameter(param: Tensor, plan: ParamPlan) -> None:
    """Raise RuntimeError for a parameter whose state is for another shape, ValueError for one that cannot be written to."""
    if param.shape != plan.shape:
        raise RuntimeError(
            f"{plan.name} has shape {tuple(param.shape)}, and had {plan.shape} when the optimizer was built (param.data was set, "
            "or embeddings were resized), so its state does not fit. Nothing has changed; build a new optimizer, with new groups"
        )
    check_memory(param, f"parameter {plan.name} {plan.shape}")


def _refuse_stranger(
    param: Tensor, number: int, position: int, groups: list[Mapping[str, Any]], plans: Mapping[Tensor, ParamPlan]
) -> NoReturn:
    """Raise RuntimeError for a parameter in the groups that the optimizer was not built with."""
    names = groups[number].get("param_names") or ()
    name = names[position] if position < len(names) else f"{number}.{position}"
    members = {member for group in groups for member in group["params"]}
    gone = next((plan for known, plan in plans.items() if known not in members and plan.name == name), None)
    kind = f"a parameter {tuple(param.shape)} {param.dtype} in param group {number}"
    if gone is None:
        raise RuntimeError(
            f"{kind} has no state: it was put into the group after the optimizer was built. Nothing has changed; use "
            "optimizer.add_param_group, or build a new optimizer"
        )
    flat = (
        ". DeepSpeed ZeRO (stages 1 and 2) puts flat parts of parameters there, of which no matrix is left to project: use "
        "torch.distributed.fsdp.fully_shard (FSDP2), DistributedDataParallel, or DeepSpeed with zero_optimization stage 0"
    )
    raise RuntimeError(
        f"{name} {gone.shape} was replaced by {kind} after the optimizer was built. Nothing has changed; build the optimizer when "
        "the model has its final parameters, or write new values into the old one: with torch.no_grad(): param.copy_(values)"
        f"{flat if param.dim() == 1 < len(gone.shape) else ''}"
    )


# ----------------------------------------------------------------------------------------------------------------- gradients


def check_gradient(param: Tensor, plan: ParamPlan) -> None:
    """Raise ValueError for a gradient that no step can use, and say what to do; sum it, if its parts are not summed yet."""
    grad = param.grad
    assert grad is not None
    kind = f"the gradient of {plan.name}"
    if grad.layout != torch.strided or grad.is_nested:
        raise ValueError(
            f"{kind} is {'sparse' if grad.is_sparse else f'of layout {grad.layout}'}; make it dense (nn.Embedding(sparse=False), "
            "grad.to_dense()), or give the parameter to torch.optim.SparseAdam"
        )
    if grad.shape != plan.shape or grad.device != param.device:
        raise ValueError(
            f"{kind} is {tuple(grad.shape)} on {grad.device}, the parameter {plan.shape} on {param.device}; they must be alike"
        )
    if not grad.is_floating_point() or compute_dtype(grad.dtype) != compute_dtype(param.dtype):
        raise ValueError(
            f"{kind} is {grad.dtype}, the parameter {param.dtype}; convert it: param.grad = param.grad.to(param.dtype)"
        )
    part, own = local_grad(param), local(param)
    if torch._C._functorch.is_functorch_wrapped_tensor(part):
        raise ValueError(
            f"{kind} belongs to a transform of torch.func (grad, vmap), inside of which no optimizer can step; step outside of it"
        )
    if _is_wrapper(part) and type(part) is not type(own) and not _is_awaited(part):
        raise ValueError(
            f"{kind} is a {type(part).__name__}, whose numbers the step cannot read, the parameter a {type(own).__name__}; set "
            "param.grad to a plain tensor"
        )
    if part.numel() and type(part) in _PLAIN and not is_watched() and not (part.data_ptr() or part._is_zerotensor()):
        raise ValueError(f"{kind} has no memory: its storage was freed; compute it again")


def _is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor's numbers lie elsewhere: in other tensors, or nowhere."""
    kind = type(tensor)
    return kind not in _PLAIN and kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl


def _is_awaited(tensor: Tensor) -> bool:
    """Whether a tensor is the result of a collective operation that may not have ended yet."""
    return _is_wrapper(tensor) and hasattr(tensor, "trigger_wait")


def settle_gradient(param: Tensor) -> None:
    """Make `param.grad` an ordinary tensor, of the same values, where it is one that only torch's dispatcher can read.

    Those are views with a negative bit (`z.conj().imag`), zeros without memory, results of collective operations that may not have
    ended, and tensors some elements of which share memory (`expand`), which cannot be scaled in place.
    """
    part = local_grad(param)
    if part.is_neg() or part._is_zerotensor() or _is_awaited(part) or shares_elements(part):
        plain = torch.empty(part.shape, dtype=part.dtype, device=part.device)
        plain.copy_(part)
    elif type(part) in _PLAIN or _is_wrapper(part):
        return
    else:
        plain = part.as_subclass(Tensor)
    param.grad = dense_sharding(param).wrap(plain)
