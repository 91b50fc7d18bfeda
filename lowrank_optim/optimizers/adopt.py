"""Parameters that were sharded after the optimizer was built, and put into its groups in the old ones' place, as Accelerate does."""

from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

from torch import Tensor

from lowrank_optim.optimizers.contracts import HasState
from lowrank_optim.sharding.dtensor import is_sharded
from lowrank_optim.step.init_state import init_state

P = ParamSpec("P")
T = TypeVar("T")


def adopting(optimizer: HasState, check: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """check(…). Where it raises for parameters that were sharded before the first step, they are taken in, and it is asked again."""
    try:
        return check(*args, **kwargs)
    except RuntimeError:
        if not adopt_sharded(optimizer):
            raise
    return check(*args, **kwargs)


def adopt_sharded(optimizer: HasState) -> bool:
    """Train the sharded parameters in place of the whole ones, from a state that is made anew; False where that cannot be.

    It can where nothing is lost: no step was taken, no checkpoint loaded, no hook attached, and in the place of each parameter is the
    same one or a DTensor of its global shape.
    """
    before: list[list[Tensor]] = [[] for _ in optimizer.param_groups]
    for param, plan in optimizer.plans.items():
        before[plan.group].append(param)
    now: list[Sequence[Tensor]] = [group["params"] for group in optimizer.param_groups]
    if optimizer._in_backward is not None or [len(group) for group in before] != [len(group) for group in now]:
        return False
    pairs = [pair for old, new in zip(before, now, strict=True) for pair in zip(old, new, strict=True)]
    replaced = {old: new for old, new in pairs if old is not new}
    if not replaced or not all(
        is_sharded(new) and new.shape == optimizer.plans[old].shape and not is_sharded(old)
        for old, new in replaced.items()
    ):
        return False
    if any(state and float(state["step"]) > 0.0 for state in map(optimizer.state.get, optimizer.plans)):
        return False
    had_state = {new for old, new in pairs if optimizer.state.get(old)}
    optimizer.plans.renew(optimizer.param_groups)
    for old, new in replaced.items():
        optimizer.state.pop(old, None)
        if new in had_state:
            plan = optimizer.plans[new]
            optimizer.state[new] = init_state(new, optimizer.param_groups[plan.group], plan)
    return True
