"""State of single parameters that begins afresh, for whoever has put other numbers into them."""

from collections.abc import Iterable

from torch import Tensor

from lowrank_optim.optimizers.contracts import HasState
from lowrank_optim.step.init_state import init_state


def reset_state(optimizer: HasState, params: Iterable[Tensor]) -> None:
    """Let the state of some parameters begin afresh, as at their first step: moments 0, no step counted, no subspace.

    A method of every optimizer of this package: `optimizer.reset_state([param])`.

    Raises:
        ValueError: a parameter that is none of the optimizer's; nothing was changed.
        RuntimeError: gradients of an unfinished step are kept (`update_in_backward`); nothing was changed.
    """
    chosen = list(params)
    for param in chosen:
        if param not in optimizer.plans:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} is none of the optimizer's; its state cannot be reset"
            )
        if "micro_batches" in optimizer.state.get(param, {}):
            raise RuntimeError(
                f"{optimizer.plans[param].name}: gradients of an unfinished step are kept; call optimizer.step() first"
            )
    for param in chosen:
        if optimizer.state.pop(param, None) and optimizer.is_trained(param):
            plan = optimizer.plans[param]
            optimizer.state[param] = init_state(param, optimizer.param_groups[plan.group], plan)
