"""`update_in_backward`, which attaches the hooks."""

from collections.abc import Callable

from torch.amp.grad_scaler import GradScaler

from lowrank_optim import kernels
from lowrank_optim.in_backward.checks import check_arguments
from lowrank_optim.in_backward.hooks import UpdateInBackward
from lowrank_optim.optimizers.base import LowRankOptimizer


def update_in_backward(
    optimizer: LowRankOptimizer,
    accumulate: int = 1,
    max_grad_norm: float | None = None,
    clip: str = "previous",
    grad_scaler: GradScaler | None = None,
    *,
    last_micro_batch: Callable[[], bool] | None = None,
) -> UpdateInBackward:
    """Update each parameter inside backward, as soon as its gradient is there, and free the gradient.

    The loop does not change: `optimizer.step()`, the scheduler and `zero_grad()` stay where they are. `step()` has to be called once
    a step, and finishes what backward left over. Gradients cannot be looked at after backward, nor a step be left out because of
    them. Weights are those of ordinary stepping, to the bit.

    Accumulation: with `accumulate=k`, k backward passes make a step, their gradients summed (divide each loss by k, as usual).
    A parameter is updated by its k-th gradient, or by `step()` if it got fewer. Between two passes a matrix of a method without
    residual (GaLore, LDAdam without error feedback) keeps R only, which is exact while its basis stands; on its own refresh step it
    keeps the whole sum (staggering makes those few), and the very first basis comes from the first micro-batch alone. Dense
    parameters keep the whole sum, as `p.grad` would, and so do matrices with the SGD residual: what is outside of the subspace
    could only be put into the weights at once, and the next micro-batch would see it. The sums are part of the optimizer's state:
    a checkpoint between two micro-batches resumes to the bit, if this function is called before `load_state_dict`. A non-finite
    micro-batch makes its sum non-finite, and the parameter's `on_nonfinite` decides what becomes of that step.

    Clipping: the norm of the whole gradient is known only after all updates. With `max_grad_norm`,

        "previous"  G ← G·min(1, max_grad_norm/‖G‖ of the last step with a finite norm); the first step is not clipped
        "tensor"    each parameter's gradient by its own norm
        "subspace"  the same, a low-rank matrix by ‖R‖

    `optimizer.last_grad_norm` is the norm of the last step's gradient before clipping; "previous" resumes with it from a checkpoint.
    It is exact, but for matrices that keep R only between micro-batches: what the parts of their gradients outside of the subspace
    have in common is estimated from a random sketch (`in_backward/accumulation.py`).

    fully_shard (FSDP2): updates come after the gradients' reduction, one small message each for whether they are finite. With
    `set_requires_gradient_sync(False)` on all but the last micro-batch, hooks run on the last one only: leave `accumulate` at 1. With
    `accumulate`, sharded parameters keep the sum of their part of the gradient. With `CPUOffloadPolicy`, each hook waits until the
    copy of its gradient has arrived on the host: some versions of torch call hooks before it has, where the memory is pinned.

    One optimizer trains a parameter. While this one is alive and its handle is attached, no other one of this package can be built
    or attached over its parameters, and none at all takes a step on them: an error names them and the way out. A handle that no
    variable holds any more (an interrupted notebook cell) is found by `UpdateInBackward.find(model.parameters())`.

    GradScaler: gradients are unscaled here, `scaler.step(optimizer)` and `scaler.update()` work as usual (`unscale_` does nothing).
    An infinity skips the updates that come after it in the same backward pass, and lowers the scale; updates before it have
    happened. With `accumulate`, one before the last micro-batch skips the whole step. Skipped updates count as steps of their
    parameters.

    Args:
        optimizer: any of this package. Groups that are added and parameters that are unfrozen later are included.
        accumulate: backward passes in a step.
        max_grad_norm: largest norm, see above; None does not clip.
        clip: which norm: "previous", "tensor" or "subspace".
        grad_scaler: the `torch.amp.GradScaler` that scales the loss.
        last_micro_batch: asked during each backward pass whether it is the last of its step, in place of counting to `accumulate`.

    Returns:
        A handle: `remove()` restores ordinary stepping. Also a context manager that removes itself.

    Raises:
        TypeError: the optimizer is not of this package, or its parameters belong to FSDP1, or several processes train: gradients are
            complete only after they were reduced, later than the hooks run.
        ValueError: an argument out of range; error feedback; `accumulate` above 1 with a residual that needs the whole gradient; a
            GradScaler with another `on_nonfinite` than "skip".
        RuntimeError: called twice for one optimizer, or another optimizer updates some of its parameters in backward. In backward: a
            parameter got more gradients than `accumulate` before `step()` (a weight that is used in two segments of reentrant
            activation checkpointing gets two in one pass).

    Memory: the largest gradient in place of all of them. With accumulation also, between micro-batches: for an m×n matrix with
    D = max(m, n), 4·D·(r + 8) bytes; for a dense parameter its gradient.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = torch.nn.Linear(64, 32)
        >>> optimizer = lo.GaLoreAdamW(lo.param_groups(model, rank=8), lr=1e-2)
        >>> handle = lo.update_in_backward(optimizer, max_grad_norm=1.0)
        >>> model(torch.randn(4, 64)).square().mean().backward()
        >>> model.weight.grad is None
        True
        >>> optimizer.step()
        >>> handle.remove()
    """
    accumulate, max_grad_norm = map(kernels.as_python, (accumulate, max_grad_norm))
    check_arguments(accumulate, max_grad_norm, clip, last_micro_batch)
    if grad_scaler is not None and not grad_scaler.is_enabled():
        grad_scaler = None
    handle = UpdateInBackward(optimizer, accumulate, max_grad_norm, clip, grad_scaler, last_micro_batch)
    handle.attach()
    return handle
