"""A param group whose options change in mid-training: checked first, then its state laid out anew."""

from collections.abc import Mapping
from typing import Any

from lowrank_optim.groups.options import DEFAULTS, SHORTHANDS, check_names, expand_shorthands, plain_options, structure
from lowrank_optim.groups.parts import check_option_names
from lowrank_optim.optimizers.contracts import HasState
from lowrank_optim.step.init_state import init_state
from lowrank_optim.step.joint import check_trainable
from lowrank_optim.step.relayout import carry_over


def change_group(optimizer: HasState, number: int, **options: Any) -> None:
    """Change options of a param group that decide about its state, and lay its state out anew.

    Moments go along where they can (`lowrank_optim.step.relayout`): a rank may grow and shrink in mid-training. Everything else
    begins afresh. A group that becomes low-rank or dense, and has no rule of its own, gets that of a new group like it. To
    resume a run, build the optimizer with the options that held when its checkpoint was written.

    A method of every optimizer of this package.

    Args:
        number: of the group in `param_groups`.
        **options: group options, such as rank=8, rule=lo.Lion(), state_bits=8.

    Raises:
        TypeError, ValueError: as for `add_param_group`; nothing was changed.
        RuntimeError: gradients of an unfinished step are kept (`update_in_backward`).
    """
    groups, plans = optimizer.param_groups, optimizer.plans
    if not 0 <= number < len(groups):
        raise ValueError(f"there is no param group {number}; there are {len(groups)}, numbered from 0")
    own, parts = groups[number], plans.parts
    with parts.tentatively():
        changed = parts.take(expand_shorthands(plain_options(options)))
        brought = {} if "rule" in changed else _usual_rule(optimizer, own, {**own, **changed})
        rules = own["rule"], brought.get("rule", own["rule"])
        for kind in ("rule", "residual"):
            name = changed.get(kind, own[kind])
            brought |= parts.options_of(kind, name) if name != own[kind] else {}
        present = [name for rule in rules for name in parts.options_of("rule", rule)]
        present += parts.options_of("residual", own["residual"])
        valid = ("lr", "weight_decay", *DEFAULTS, *SHORTHANDS, "rule", "residual", *present, *brought)
        check_names(options, valid, "change_group(…)", carried=())
        changed = {**brought, **changed}
        group = {**own, **changed}
        check_option_names(parts.of(group))
        optimizer.check_options(group)
        if any(_keeps_gradients(optimizer, param) for param in own["params"]):
            raise RuntimeError(
                "gradients of an unfinished step are kept: call optimizer.step() first, then change_group"
            )
        first = sum(len(earlier["params"]) for earlier in groups[:number])
        new_plans = plans.of_group(group, own["params"], number, first)
        check_trainable(new_plans)
        if optimizer._in_backward is not None:
            optimizer._in_backward.check(new_plans, [group])
        states = {}
        rule = parts.of(group).rule
        if rule is not parts.of(own).rule or structure(group, rule) != structure(own, rule):
            for param, plan in new_plans.items():
                if optimizer.state.get(param) and optimizer.is_trained(param):
                    states[param] = init_state(param, group, plan)
                    carry_over(optimizer.trained(param), optimizer.trained(param, (group, plan, states[param])))
    own.update(changed)
    plans.set_group(number, own, new_plans)
    for param in own["params"]:
        if param in states:
            optimizer.state[param] = states[param]
        elif not optimizer.is_trained(param):
            optimizer.state.pop(param, None)  # of a layer that sleeps: it begins afresh when it wakes
        if "update_proj_gap" in options and "gap" in optimizer.state.get(param, {}):
            optimizer.state[param]["gap"].fill_(own["update_proj_gap"])


def _usual_rule(optimizer: HasState, own: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """Rule and options that a new group would have now, where a group that becomes low-rank or dense had those of its kind before."""
    before, after = (
        optimizer.plans.parts.complete({name: group[name] for name in ("rank", "density")}, optimizer.defaults)
        for group in (own, changed)
    )
    if own["rule"] != before["rule"]:  # it has a rule of its own
        return {}
    names = ("rule", *optimizer.plans.parts.options_of("rule", after["rule"]))
    return {name: after[name] for name in names if own.get(name) == before.get(name)}


def _keeps_gradients(optimizer: HasState, param: Any) -> bool:
    """Whether hooks keep a sum of gradients, or one for a rule that needs those of other parameters besides."""
    waits = optimizer._in_backward is not None and bool(optimizer.plans[param].unit) and param.grad is not None
    return waits or "micro_batches" in optimizer.state.get(param, {})
