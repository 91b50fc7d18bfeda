"""What can be updated in backward: whatever cannot is refused, with the reason and the way out, before a hook is registered.

The steps of other optimizers on the same parameters are refused, too.
"""

import gc
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from lowrank_optim.groups.matrices import is_low_rank
from lowrank_optim.in_backward.clipping import CLIPS
from lowrank_optim.optimizers.base import LowRankOptimizer
from lowrank_optim.optimizers.contracts import Attachment
from lowrank_optim.optimizers.owners import owner, two_optimizers
from lowrank_optim.residuals import Residual
from lowrank_optim.step.param_plan import ParamPlan


def check_arguments(
    accumulate: int, max_grad_norm: float | None, clip: str, last_micro_batch: Callable[[], bool] | None
) -> None:
    """Raise ValueError for a value out of range: name, value, valid range."""
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(
            f"accumulate is {accumulate!r}; it must be an int of at least 1, the backward passes in a step"
        )
    if clip not in CLIPS:
        near = get_close_matches(str(clip), CLIPS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"clip is {clip!r}: {hint}valid values are {', '.join(map(repr, CLIPS))}")
    if max_grad_norm is not None:
        number = isinstance(max_grad_norm, (int, float)) and not isinstance(max_grad_norm, bool)
        if not number or not 0.0 < max_grad_norm < math.inf:
            raise ValueError(f"max_grad_norm is {max_grad_norm!r}; it must be None or a finite number above 0")
    if last_micro_batch is not None and not callable(last_micro_batch):
        raise ValueError(f"last_micro_batch is {last_micro_batch!r}; it must be None or a function without arguments")
    if last_micro_batch is not None and accumulate == 1:
        raise ValueError("last_micro_batch is given, but accumulate is 1: every backward pass is the last of its step")


def check_kind(optimizer: LowRankOptimizer) -> None:
    """Raise TypeError for an optimizer that is not of this package."""
    if not hasattr(optimizer, "trained"):
        inner = getattr(optimizer, "optimizer", None)
        hint = "pass its .optimizer" if hasattr(inner, "trained") else "lo.GaLoreAdamW without rank is AdamW"
        raise TypeError(
            f"update_in_backward needs an optimizer of this package, got {type(optimizer).__name__}; {hint}"
        )
    optimizer.check_members()


def check_plans(optimizer: LowRankOptimizer, plans: Mapping[Tensor, ParamPlan], accumulate: int) -> None:
    """Raise TypeError or ValueError where the optimizer cannot update these parameters in backward."""
    for residual in {plan.residual for plan in plans.values() if plan.space is not None}:
        _check_residual(residual, optimizer, accumulate)
    replicated = _replicated()
    for param, plan in plans.items():
        _check_parallel(param, plan.name, id(param) in replicated)


def check_cautious(groups: Iterable[Mapping[str, Any]], accumulate: int) -> None:
    """Raise ValueError for cautious groups that keep only the part of a gradient in the subspace."""
    if accumulate > 1 and any(group["cautious"] and is_low_rank(group) for group in groups):
        raise ValueError(
            f"accumulate is {accumulate}, but cautious=True compares updates with the whole gradient of a step, of which low-rank "
            "groups keep only the part in the subspace: use accumulate=1 with a larger batch, cautious=False, or ordinary stepping"
        )


def _check_residual(residual: Residual, optimizer: LowRankOptimizer, accumulate: int) -> None:
    """Raise ValueError for a residual whose matrices cannot be updated in backward."""
    if residual.feeds_back:
        raise ValueError(
            f"residual={residual.name!r} ({type(optimizer).__name__}) keeps the error of each matrix, as large as the gradient that "
            "updates in backward would free: use error_feedback=False (LDAdamW), another residual, or ordinary stepping"
        )
    if accumulate > 1 and not residual.linear:
        raise ValueError(
            f"accumulate is {accumulate}, but residual={residual.name!r} ({type(optimizer).__name__}) needs the whole gradient of a "
            "step, of which only the part in the subspace would be kept: use accumulate=1 with a larger batch, GaLoreAdamW (or "
            'residual "none" or "sgd"), or accumulate with ordinary stepping'
        )


def _check_parallel(param: Tensor, name: str, replicated: bool) -> None:
    """Raise TypeError where the gradient that a hook sees is not yet reduced over the processes."""
    if getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False):
        raise TypeError(
            f"{name} belongs to FullyShardedDataParallel (FSDP1), which reduces and reshards gradients after the hooks of parameters "
            "have run; use torch.distributed.fsdp.fully_shard (FSDP2) with an optimizer that takes DTensors, or ordinary stepping"
        )
    if replicated or (_grouped() and distributed.get_world_size() > 1 and not hasattr(param, "device_mesh")):
        owner = "belongs to DistributedDataParallel" if replicated else "is no DTensor, and several processes train"
        raise TypeError(
            f"{name} {owner}: DistributedDataParallel reduces gradients after the hooks of parameters have run, so every process "
            "would take a step of its own. Use ordinary stepping with DistributedDataParallel, fully_shard (FSDP2), whose hooks run "
            "after the reduction, or one process without either"
        )


def refuse_step(other: Optimizer, handle: Attachment, under_way: bool) -> None:
    """Raise RuntimeError where `other` is about to step parameters that `handle` updates in backward.

    A wrapper of the handle's own optimizer may step. An optimizer that was dropped, but is part of a cycle, is freed here; `other`
    then steps, and is warned where gradients of its parameters are lost: some were kept, or the step was `under_way`.
    """
    optimizer = handle.optimizer
    if not isinstance(optimizer, LowRankOptimizer):
        return
    groups = {id(group) for group in optimizer.param_groups}
    if not isinstance(other, LowRankOptimizer) and any(id(group) in groups for group in other.param_groups):
        return
    held = [param for group in other.param_groups for param in group["params"] if owner(param) is handle]
    if not held:
        return
    message = two_optimizers([optimizer.plan_of(param).name for param in held], optimizer)
    lost = under_way or any("micro_batches" in optimizer.state.get(param, {}) for param in held)
    del optimizer
    gc.collect()
    if handle.active:
        raise RuntimeError(f"{type(other).__name__} takes no step: {message}")
    if lost:
        warnings.warn(
            "the gradients of the last backward pass went to an optimizer with update_in_backward that was dropped but not yet "
            f"freed; this step of {type(other).__name__} has none. It is freed now; call remove() on the handle before an "
            "optimizer is dropped",
            RuntimeWarning,
            stacklevel=6,
        )


def _grouped() -> bool:
    """Whether this process belongs to a process group."""
    return distributed.is_available() and distributed.is_initialized()


def _replicated() -> set[int]:
    """The ids of all parameters of DistributedDataParallel modules, which leave no mark on them; none without a process group."""
    if not _grouped():
        return set()
    kind = nn.parallel.DistributedDataParallel
    return {id(p) for found in gc.get_objects() if issubclass(type(found), kind) for p in found.parameters()}
