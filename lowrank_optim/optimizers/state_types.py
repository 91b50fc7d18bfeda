"""Types and shapes of an optimizer's state: what a checkpoint has to have, and what becomes of them when a model is converted."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.optimizers.contracts import HasState
from lowrank_optim.sharding.dtensor import as_tensor
from lowrank_optim.step.entrance import check_members
from lowrank_optim.step.init_state import init_moments, init_state, placed
from lowrank_optim.step.state_names import ACCUMULATORS


def state_template(
    optimizer: HasState, param: Tensor, saved: Mapping[str, Tensor], group: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The state that the optimizer has at the step at which `saved` was written, with that `group`: its types and shapes count."""
    if not saved and optimizer.may_begin(group) and not (optimizer.state.get(param) or param.requires_grad):
        return {}  # frozen, here and there
    state = optimizer.state.get(param) or init_state(param, group, optimizer.plans[param])
    own = {name: tensor for name, tensor in state.items() if name not in ACCUMULATORS}
    if optimizer._in_backward is not None:
        own |= optimizer._in_backward.template(param, saved)
    return _resized(optimizer, param, own, saved, group)


def _resized(
    optimizer: HasState, param: Tensor, own: dict[str, Tensor], saved: Mapping[str, Tensor], group: Mapping[str, Any]
) -> dict[str, Tensor]:
    """`own` with moments of the types and shapes that they have beside `saved`, where they change with the subspace."""
    plan = optimizer.plans[param]
    if plan.space is None or not plan.projector.moments_change_shape or not saved:
        return own
    meta = torch.device("meta")
    if plan.projector.narrows:  # whose own tensors have fewer elements then
        most = plan.whole_moment_shape()[-2]
        fewer = {n: as_tensor(saved[n]).shape for n in plan.projector.state_lies if n in own and n in saved}
        fewer = {n: shape for n, shape in fewer.items() if len(shape) == 1 and shape[0] <= most}
        own |= placed(plan, {n: torch.empty(shape, dtype=own[n].dtype, device=meta) for n, shape in fewer.items()})
        saved = own
    moments = placed(plan, init_moments(group, plan, saved, param.dtype, meta))
    return {name: tensor for name, tensor in own.items() if name != "col_scale"} | moments


def follow(optimizer: HasState, params: Iterable[Tensor]) -> None:
    """Where the model was moved or converted (`model.to`, `.double()`) after the optimizer was built, let the state follow.

    Moments, stored bases and what residuals keep go to the new device, and into the type of arithmetic on the new type. Codes and
    their scales are the same for every type.
    """
    old = dict(optimizer.plans)
    if all((old[param].device, old[param].dtype) == (param.device, param.dtype) for param in params):
        return
    check_members(optimizer.param_groups, old)
    optimizer.plans.renew(optimizer.param_groups)
    for group in optimizer.param_groups:
        for param in group["params"]:
            place = param.device, param.dtype
            if optimizer.state.get(param) and (old[param].device, old[param].dtype) != place:
                optimizer.state[param] = optimizer.followed(param, group)


def followed(optimizer: HasState, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of a parameter on its device, in the types that a state made now would have."""
    state = optimizer.state[param]
    fresh = _resized(optimizer, param, init_state(param, group, optimizer.plans[param]), state, group)
    if optimizer._in_backward is not None:
        fresh |= optimizer._in_backward.template(param, state)
    return {
        name: state[name].to(optimizer.state_device(name, param, group), like.dtype) if name in state else like
        for name, like in fresh.items()
    }
