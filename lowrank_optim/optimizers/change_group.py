"""A param group whose options change in mid-training: checked first, then its state laid out anew."""

from collections.abc import Mapping
from typing import Any

from lowrank_optim.groups.options import SHORTHANDS, check_names, expand_shorthands, plain_options
from lowrank_optim.optimizers.contracts import HasState
from lowrank_optim.step.init_state import init_state
from lowrank_optim.step.relayout import carry_over


def change_group(optimizer: HasState, number: int, options: Mapping[str, Any]) -> None:
    """See `LowRankOptimizer.change_group`."""
    own, plans = optimizer.param_groups[number], optimizer.plans
    parts, params = plans.parts, own["params"]
    changed = parts.take(expand_shorthands(plain_options(options)))
    brought: dict[str, Any] = {}
    for kind in ("rule", "residual"):
        if changed.get(kind, own[kind]) != own[kind]:
            brought |= parts.options_of(kind, changed[kind])
    check_names(options, (*own, *brought, *SHORTHANDS), "change_group(…)")
    changed = {**brought, **changed}
    group = {**own, **changed}
    optimizer.check_options(group)
    if any("micro_batches" in optimizer.state.get(param, {}) for param in params):
        raise RuntimeError("gradients of an unfinished step are kept: call optimizer.step() first, then change_group")
    first = sum(len(earlier["params"]) for earlier in optimizer.param_groups[:number])
    new_plans = plans.of_group(group, params, number, first)
    states = {}
    for param, plan in new_plans.items():
        if optimizer.state.get(param) and optimizer.is_trained(param):
            states[param] = init_state(param, group, plan)
            carry_over(optimizer.trained(param), optimizer.trained(param, (group, plan, states[param])))
    own.update(changed)
    plans.set_group(number, own, new_plans)
    optimizer.state.update(states)
