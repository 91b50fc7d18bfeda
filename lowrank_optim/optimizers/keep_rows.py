"""Parameters that become smaller in mid-training: their first rows are kept, and those of their state."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lowrank_optim.groups.matrices import matrix_shape
from lowrank_optim.optimizers.contracts import HasState
from lowrank_optim.sharding.dtensor import is_sharded
from lowrank_optim.step.init_state import init_state
from lowrank_optim.step.param_plan import check_matrix
from lowrank_optim.step.relayout import fill_rows, keep_rows_, opened_rows
from lowrank_optim.step.state_names import WEIGHT_ERROR


@torch.no_grad()
def keep_rows(optimizer: HasState, rows: Mapping[Tensor, int]) -> None:
    """Keep the first rows of some parameters, of their gradients and of their state, and go on training what is left.

    Parameters stay the same objects. Moments, master copies and errors of rounding are cut alike; what is projected, begins afresh.
    `lowrank_optim.nn.OrderedRanks.shrink_` calls this.

    Args:
        rows: {parameter: how many of its first rows are kept, from 0}.

    Raises:
        ValueError: a parameter that is not held, is sharded, or is stepped together with others; a number out of range.
        RuntimeError: gradients of an unfinished step are kept (`update_in_backward`). Nothing was changed.
    """
    for param, count in rows.items():
        _check(optimizer, param, count)
    changed = {param: count for param, count in rows.items() if count != param.shape[0]}
    if not changed:
        return
    before = {}
    for param, count in changed.items():
        if optimizer.state.get(param) and optimizer.is_trained(param):
            moments = opened_rows(optimizer.trained(param), count) if optimizer.plans[param].space is None else None
            before[param] = dict(optimizer.state[param]), moments
    for param, count in changed.items():
        keep_rows_(param, count)
        optimizer.state.pop(param, None)  # of a layer that sleeps: it begins afresh when it wakes
    optimizer.plans.renew(optimizer.param_groups)
    for param, (state, moments) in before.items():
        plan = optimizer.plans[param]
        optimizer.state[param] = init_state(param, optimizer.param_groups[plan.group], plan)
        if moments is not None and plan.space is None:
            fill_rows(state, moments, optimizer.trained(param))
            continue
        for name in ("master", *WEIGHT_ERROR):  # they are of the weights, however these are trained
            if name in state and name in optimizer.state[param]:
                optimizer.state[param][name].copy_(state[name][: param.shape[0]])


def _check(optimizer: HasState, param: Tensor, count: int) -> None:
    """Raise where a parameter cannot be cut to `count` rows."""
    plan = optimizer.plans.get(param)
    if plan is None:
        raise ValueError(f"a parameter {tuple(param.shape)} is none of this optimizer's")
    if is_sharded(param):
        raise ValueError(
            f"{plan.name} is sharded (DTensor), and its rows lie on several processes; cut the unsharded model"
        )
    if plan.unit:
        raise ValueError(
            f"{plan.name} is stepped together with other parameters (rule {plan.rule.name!r}) and cannot be cut"
        )
    if isinstance(count, bool) or not isinstance(count, int) or param.dim() == 0 or not 0 <= count <= param.shape[0]:
        raise ValueError(f"{plan.name} is {tuple(param.shape)} and cannot be cut to {count!r} rows")
    if "micro_batches" in optimizer.state.get(param, {}):
        raise RuntimeError("gradients of an unfinished step are kept: call optimizer.step() first, then keep_rows")
    group, cut = optimizer.param_groups[plan.group], (count, *param.shape[1:])
    matrix = matrix_shape(cut, plan.layout)
    rule = optimizer.plans.parts.of(group).rule_for(matrix)
    if rule.on_matrices:
        check_matrix(replace(plan, rule=rule, shape=cut), matrix, group)
