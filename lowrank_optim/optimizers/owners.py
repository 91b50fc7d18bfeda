"""Which handle updates a parameter inside backward: read off the parameter's hooks, so that no list can be out of date."""

import gc
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lowrank_optim.optimizers.contracts import Attachment
from lowrank_optim.step.param_plan import ParamPlan


class GradientHook:
    """A hook on a parameter; it keeps neither the handle nor the optimizer alive."""

    def __init__(self, handle: Attachment) -> None:
        self.handle = weakref.ref(handle)

    def __call__(self, param: Tensor) -> None:
        """Called by autograd and by `fully_shard` when the gradient of `param` is complete."""
        handle = self.handle()
        if handle is not None:
            handle.on_gradient(param)


class StepHook:
    """Called before every step of every optimizer: refuses those whose parameters `handle` updates in backward."""

    def __init__(self, handle: Attachment) -> None:
        self._handle = weakref.ref(handle)

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        """Raise RuntimeError before another optimizer takes a step on these parameters."""
        handle = self._handle()
        if handle is not None:
            handle.refuse_step_of(optimizer)


def owner(param: Tensor) -> Attachment | None:
    """The handle that updates a parameter in backward; handles that were removed, or whose optimizer is gone, do not count."""
    for hook in (param._post_accumulate_grad_hooks or {}).values():
        handle = hook.handle() if isinstance(hook, GradientHook) else None
        if handle is not None and handle.active:
            return handle
    return None


def check_free(plans: Mapping[Tensor, ParamPlan], mine: Attachment | None = None) -> None:
    """Raise RuntimeError where another handle than `mine` updates one of these parameters in backward."""
    if not _held(plans, mine):
        return
    gc.collect()  # an optimizer that was dropped, but is part of a cycle, is alive until now
    held = _held(plans, mine)
    if held:
        first = owner(held[0])
        names = [plans[param].name for param in held]
        raise RuntimeError(two_optimizers(names, None if first is None else first.optimizer))


def two_optimizers(names: list[str], first: Optimizer | None) -> str:
    """The message about parameters that `first` updates in backward: what goes wrong, and the way out."""
    which = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more parameters"
    return (
        f"{which}: updated in backward by another {type(first).__name__}, which is still alive (an interrupted notebook cell keeps "
        f"it). Two optimizers would train the same weights. {WAY_OUT}"
    )


def _held(params: Iterable[Tensor], mine: Attachment | None) -> list[Tensor]:
    return [param for param in params if (handle := owner(param)) is not None and handle is not mine]


WAY_OUT = (
    "Call remove() on the handle that update_in_backward returned. If no variable holds it any more: for handle in "
    "lowrank_optim.UpdateInBackward.find(model.parameters()): handle.discard(); handle.remove()"
)
"""How to restore ordinary stepping, in messages."""
