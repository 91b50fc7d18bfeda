"""Updates inside backward: every parameter is updated, and its gradient freed, as soon as its gradient is complete.

Only when and with what a parameter is updated is decided here; how, by the optimizer (`step_param`, and `step_projected` for a matrix
of which only R was kept). There is one optimizer and one scheduler. Hooks, handle and optimizer hold each other weakly where it
matters: whoever drops the model and the optimizer frees both.
"""

import gc
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from lowrank_optim import kernels
from lowrank_optim.in_backward import accumulation
from lowrank_optim.in_backward.checks import check_arguments, check_kind, check_layouts
from lowrank_optim.in_backward.clipping import clip_factor, on_device, record_norms, scale_
from lowrank_optim.kernels.counter_rng import PURPOSE_SKETCH, make_key
from lowrank_optim.optimizers.compiling import outside_graph
from lowrank_optim.optimizers.owners import WAY_OUT, GradientHook, StepHook, check_free, owner, two_optimizers
from lowrank_optim.sharding.dtensor import local, local_grad, wait_for_host_copy
from lowrank_optim.sharding.param_sharding import HERE
from lowrank_optim.step.state_names import ACCUMULATORS, MEASURED

if TYPE_CHECKING:
    from lowrank_optim.optimizers import LowRankOptimizer
    from lowrank_optim.step.layout import Layout


def update_in_backward(
    optimizer: "LowRankOptimizer",
    accumulate: int = 1,
    max_grad_norm: float | None = None,
    clip: str = "previous",
    grad_scaler: GradScaler | None = None,
    *,
    last_micro_batch: Callable[[], bool] | None = None,
) -> "UpdateInBackward":
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
    have in common is estimated from a random sketch (`layerwise/accumulation.py`).

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


class UpdateInBackward:
    """What `update_in_backward` returns. The optimizer calls `check`, `refresh_hooks`, `finish_step`, `template` and `restart`."""

    def __init__(
        self,
        optimizer: "LowRankOptimizer",
        accumulate: int,
        max_grad_norm: float | None,
        clip: str,
        grad_scaler: GradScaler | None,
        last_micro_batch: Callable[[], bool] | None,
    ) -> None:
        self.accumulate, self.max_grad_norm, self.clip = accumulate, max_grad_norm, clip
        self._scaler, self._last_micro_batch = grad_scaler, last_micro_batch
        self._optimizer = weakref.ref(optimizer)
        self._hooks: list[RemovableHandle] = []
        self.restart()

    # -------------------------------------------------------------------------------------------------------- attachment

    def attach(self) -> None:
        """Register the hooks; raises before anything changes, and leaves nothing attached whatever is raised meanwhile."""
        optimizer = self._require_optimizer()
        check_kind(optimizer)
        if optimizer._in_backward is not None:
            raise RuntimeError(
                "update_in_backward is attached to this optimizer already; call remove() on its handle first. If no variable holds "
                "it any more, lowrank_optim.UpdateInBackward.find(model.parameters()) returns it"
            )
        self.check(optimizer._layouts, optimizer.param_groups)
        try:
            optimizer._in_backward = self
            if self._scaler is not None:  # so that scaler.step calls step(), with or without infinities
                optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
            self.refresh_hooks()
            watch = register_optimizer_step_pre_hook(StepHook(self))
            self._hooks.append(watch)
            weakref.finalize(optimizer, watch.remove).atexit = False  # torch keeps the hook for all optimizers
        except BaseException:
            self._detach()
            raise

    def check(self, layouts: "Mapping[Tensor, Layout]", groups: Iterable[Mapping[str, Any]]) -> None:
        """Raise where these parameters, and the options of their groups, cannot be updated in backward by this handle."""
        check_layouts(self._require_optimizer(), layouts, self.accumulate)
        if self._scaler is not None and any(group["on_nonfinite"] != "skip" for group in groups):
            raise ValueError(
                'a GradScaler finds its scale by infinities, which only on_nonfinite="skip" leaves out; use it in every group'
            )
        check_free(layouts, self)

    def refresh_hooks(self) -> None:
        """Register hooks on parameters that have none yet, frozen ones included."""
        for number, group in enumerate(self._require_optimizer().param_groups):
            for param in group["params"]:
                if owner(param) is not self:
                    self._register(param, number)

    def _register(self, param: Tensor, number: int) -> None:
        frozen = not param.requires_grad
        param.requires_grad_(True)  # torch registers on no others; a hook outlives the change back
        try:
            self._hooks.append(param.register_post_accumulate_grad_hook(GradientHook(self, number)))
        finally:
            param.requires_grad_(not frozen)

    def _detach(self) -> None:
        """Remove whatever `attach` has put anywhere."""
        optimizer = self._optimizer()
        if optimizer is not None and optimizer._in_backward is self:
            del optimizer._in_backward
            if self._scaler is not None:
                vars(optimizer).pop("_step_supports_amp_scaling", None)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @staticmethod
    def find(params: Iterable[Tensor]) -> "list[UpdateInBackward]":
        """The handles that update any of these parameters in backward, for one that no variable holds any more.

        Example:
            >>> import torch, lowrank_optim as lo
            >>> model = torch.nn.Linear(64, 32)
            >>> optimizer = lo.GaLoreAdamW(lo.param_groups(model, rank=8), lr=1e-2)
            >>> _ = lo.update_in_backward(optimizer)
            >>> for handle in lo.UpdateInBackward.find(model.parameters()):
            ...     handle.discard()  # the gradients of a step that was broken off, if there are any
            ...     handle.remove()
        """
        return list({handle: None for param in params if (handle := owner(param)) is not None})

    def refuse_step_of(self, other: Optimizer) -> None:
        """Raise RuntimeError where `other` is about to take a step on parameters that are updated in backward here."""
        if other is not self._optimizer():
            outside_graph(self._refuse_step_of, other)  # a traced parameter shows no hooks

    def _refuse_step_of(self, other: Optimizer) -> None:
        optimizer = self._optimizer()
        if optimizer is None:
            return
        groups = {id(group) for group in optimizer.param_groups}
        if not hasattr(type(other), "step_projected") and any(id(group) in groups for group in other.param_groups):
            return  # a wrapper, which hands the step on
        held = [param for group in other.param_groups for param in group["params"] if owner(param) is self]
        if not held:
            return
        told = two_optimizers([optimizer._layouts[param].name for param in held], optimizer)
        taken = bool(self._done) or any("micro_batches" in optimizer.state.get(param, {}) for param in held)
        del optimizer
        gc.collect()
        if self.active:
            raise RuntimeError(f"{type(other).__name__} takes no step: {told}")
        if taken:
            warnings.warn(
                "the gradients of the last backward pass went to an optimizer with update_in_backward that was dropped but not yet "
                f"freed; this step of {type(other).__name__} has none. It is freed now; call remove() on the handle before an "
                "optimizer is dropped",
                RuntimeWarning,
                stacklevel=6,
            )

    @property
    def optimizer(self) -> "LowRankOptimizer | None":
        """The optimizer that updates in backward; None once it does not exist any more."""
        return self._optimizer()

    @property
    def active(self) -> bool:
        """Whether parameters are updated in backward."""
        optimizer = self._optimizer()
        return optimizer is not None and optimizer._in_backward is self

    def remove(self) -> None:
        """Restore ordinary stepping. Nothing happens where that was done.

        Raises:
            RuntimeError: gradients of an unfinished step are kept; `optimizer.step()` applies them, `discard()` drops them.
        """
        optimizer = self._optimizer()
        if optimizer is not None and optimizer._in_backward is self:
            waiting = [p for p, _, _ in _parameters(optimizer) if "micro_batches" in optimizer.state.get(p, {})]
            if waiting:
                raise RuntimeError(
                    f"{len(waiting)} parameters keep gradients of an unfinished step: call optimizer.step() to apply them or "
                    "discard() to drop them, then remove()"
                )
            optimizer.param_groups[0].pop(MEASURED, None)
        self._detach()

    def discard(self) -> None:
        """Drop the gradients that are kept of an unfinished step."""
        for param, _, _ in _parameters(self._require_optimizer()):
            _take_sums(self._require_optimizer(), param)
        self.restart()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None and self.active:
            self.discard()
        self.remove()

    def _require_optimizer(self) -> "LowRankOptimizer":
        optimizer = self._optimizer()
        if optimizer is None:
            raise RuntimeError("the optimizer of this handle does not exist any more")
        return optimizer

    # -------------------------------------------------------------------------------------------------------- in backward

    def restart(self) -> None:
        """Forget what is known of the step that is under way; its sums are state, and stay."""
        self._done: set[int] = set()  # parameters that this step has updated, by position
        self._norms: dict[int, Tensor] = {}
        self._found_inf: Tensor | None = None

    @kernels.plain_arithmetic
    def on_gradient(self, param: Tensor, number: int) -> None:
        """Take the gradient of a parameter of group `number`, which was just accumulated, and free it."""
        optimizer = self._optimizer()
        if optimizer is None or param.grad is None:
            return
        optimizer.enter([param])
        layout, group = optimizer._layouts[param], optimizer.param_groups[number]
        if layout.index in self._done:
            raise RuntimeError(
                f"{layout.name} got another gradient, but was updated in this step already. A step has {self.accumulate} backward "
                "passes (accumulate) and ends with optimizer.step(). If that was kept to: a weight that is used in two segments of "
                "reentrant activation checkpointing gets its gradient in parts; use checkpoint(..., use_reentrant=False). If "
                f"another optimizer steps in place of this one ({type(optimizer).__name__}): {WAY_OUT}"
            )
        wait_for_host_copy(param)
        self._take(param, group, layout, None)

    def _take(self, param: Tensor, group: Mapping[str, Any], layout: "Layout", last: bool | None) -> None:
        """Keep or apply the gradient in `param.grad`; `last` says whether it is the step's last, None that it has to be found out."""
        optimizer = self._require_optimizer()
        assert param.grad is not None
        if not optimizer.state.get(param):  # a layer that sleeps: the optimizer says so and drops the gradient
            optimizer.step_param(param, group)
            param.grad = None
            return
        if self._scaler is not None:
            self._unscale(local_grad(param), layout)
        if last is None:
            last = self.accumulate == 1 or (self._last_micro_batch is not None and bool(self._last_micro_batch()))
        kept = "micro_batches" in optimizer.state[param]
        if last and not kept:
            self._step_whole(param, group, layout)
        else:
            counted = self._keep(param, group, layout)
            if last or (self._last_micro_batch is None and counted >= self.accumulate):
                self._step_kept(param, group, layout)
        param.grad = None

    def _keep(self, param: Tensor, group: Mapping[str, Any], layout: "Layout") -> int:
        """Add the gradient to the parameter's sum; returns the number of micro-batches in it."""
        optimizer, state = self._require_optimizer(), self._require_optimizer().local_state(param)
        grad = local_grad(param)
        first = "micro_batches" not in state
        whole = layout.space is None or optimizer._residual.uses_gradient or "grad_sum" in state
        whole = whole or layout.shards is not HERE  # the norm of a sum of R's takes a sketch of whole lines
        if first and not whole and layout.projector.needs_gradient and int(state["last_refresh"]) >= 0:
            whole = optimizer.refresh_is_due(param, group)
        if whole:
            accumulation.add(state, "grad_sum", grad.detach())
        else:
            assert layout.space is not None
            grad, basis, reduced = optimizer.project_param(param, group)
            key = make_key(group["seed"], layout.index, int(state["step"]), PURPOSE_SKETCH)
            accumulation.add_projected(state, grad, reduced, basis, layout.space, key)
        return accumulation.count(state)

    def _step_kept(self, param: Tensor, group: Mapping[str, Any], layout: "Layout") -> None:
        """Update a parameter from the sum of its micro-batches, which is freed."""
        optimizer = self._require_optimizer()
        sums = _take_sums(optimizer, param)
        if "grad_sum" in sums:
            param.grad = sums["grad_sum"]
            self._step_whole(param, group, layout)
            param.grad = None
            return
        reduced = sums["projected_sum"]
        norm = accumulation.accumulated_norm(sums, optimizer.subspace(param, group))
        self._step_projected(param, group, layout, reduced, norm)

    def _step_whole(self, param: Tensor, group: Mapping[str, Any], layout: "Layout") -> None:
        """Update a parameter from the whole gradient in `param.grad`."""
        optimizer, grad = self._require_optimizer(), local_grad(param)
        norm = layout.shards.matrix.norm(kernels.norm(grad))
        within = norm
        if self.max_grad_norm is not None and self.clip == "subspace" and layout.space is not None:
            _, _, reduced = optimizer.project_param(param, group)
            if not optimizer._residual.uses_gradient:
                self._step_projected(param, group, layout, reduced, norm)
                return
            within = layout.shards.reduced.norm(torch.linalg.vector_norm(reduced))
        self._scale(grad, within)
        self._record(layout, norm)
        optimizer.step_param(param, group, norm if self._scaler is None else None)  # which may have made NaN of it

    def _step_projected(
        self, param: Tensor, group: Mapping[str, Any], layout: "Layout", reduced: Tensor, norm: Tensor
    ) -> None:
        """Update a matrix from R, where ‖G‖ is `norm`."""
        within = norm
        if self.clip == "subspace":
            within = layout.shards.reduced.norm(torch.linalg.vector_norm(reduced))
        self._scale(reduced, within)
        self._record(layout, norm)
        self._require_optimizer().step_projected(param, group, reduced)

    def _record(self, layout: "Layout", norm: Tensor) -> None:
        self._norms[layout.index] = norm
        self._done.add(layout.index)

    def _scale(self, tensor: Tensor, norm: Tensor) -> None:
        """Clip in place by the factor that `norm` or the last step gives; make NaN what the GradScaler has found to be skipped."""
        optimizer = self._require_optimizer()
        wait = tensor.device.type == "cpu" and not optimizer._mask_on_device
        if self.max_grad_norm is not None:
            factor: Tensor | None = None
            if self.clip != "previous":
                factor = clip_factor(norm, self.max_grad_norm)
            elif (measured := optimizer.param_groups[0].get(MEASURED)) is not None:
                factor = clip_factor(measured[1], self.max_grad_norm).nan_to_num(nan=1.0)
            scale_(tensor, factor, wait)
        if self._found_inf is not None and not (wait and not bool(self._found_inf)):
            tensor.masked_fill_(on_device(self._found_inf, tensor.device), torch.nan)

    def _unscale(self, grad: Tensor, layout: "Layout") -> None:
        """Divide a gradient by the GradScaler's scale, in place, and see whether it is finite."""
        assert self._scaler is not None
        scale = self._scaler._get_scale_async()
        if scale is None:
            raise RuntimeError("the GradScaler has no scale yet; call scaler.scale(loss).backward()")
        grad.mul_(on_device(scale.double().reciprocal().float(), grad.device))
        bad = ~torch.isfinite(layout.shards.matrix.sum(kernels.norm(grad)))
        self._found_inf = bad if self._found_inf is None else self._found_inf.to(bad.device) | bad

    # ----------------------------------------------------------------------------------------------------- for the optimizer

    @kernels.plain_arithmetic
    def finish_step(self) -> None:
        """End a step: update parameters that got fewer than `accumulate` gradients, and write down the norm."""
        optimizer = self._require_optimizer()
        for param, group, layout in _parameters(optimizer):
            if param.grad is not None and layout.index in self._done:
                raise RuntimeError(
                    f"{layout.name} was updated in backward, but has a gradient again. DistributedDataParallel puts one there after "
                    "its hooks: call handle.remove() and step as usual, or train without DistributedDataParallel"
                )
            if param.grad is not None:  # from before the hooks, or set by hand
                self._take(param, group, layout, last=True)
            elif "micro_batches" in optimizer.state.get(param, {}):
                self._step_kept(param, group, layout)
        if self._norms:
            first = optimizer.param_groups[0]
            norms = [self._norms[index] for index in sorted(self._norms)]
            first[MEASURED] = record_norms(norms, first.get(MEASURED))
        if self._scaler is not None:
            found = kernels.host_tensor(False, torch.bool) if self._found_inf is None else self._found_inf
            self._scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = {found.device: found.float()}
        self.restart()

    def template(self, param: Tensor, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Types and shapes of the sums in a checkpoint, as far as they can be continued here."""
        if "micro_batches" not in saved or self.accumulate == 1:
            return {}
        if self._last_micro_batch is None and int(saved["micro_batches"]) >= self.accumulate:
            return {}
        optimizer = self._require_optimizer()
        layout = optimizer._layouts[param]
        shape = () if layout.space is None else layout.projector.reduced_shape(layout.space, saved)
        return accumulation.template(param, saved, layout.space, shape)

    def memory(self) -> dict[str, int]:
        """Exact bytes: the largest gradient, and what is kept between micro-batches in a step in which nothing is refreshed."""
        optimizer = self._require_optimizer()
        largest = kept = 0
        for param, _, layout in _parameters(optimizer):
            if not param.requires_grad:
                continue
            gradient = local(param).numel() * param.element_size()
            largest = max(largest, gradient)
            if layout.space is None or optimizer._residual.uses_gradient or layout.shards is not HERE:
                kept += gradient + 8
            else:
                reduced = layout.projector.reduced_shape(layout.space, optimizer.state.get(param))
                numbers = math.prod(reduced) + math.prod(accumulation.sketch_shape(layout.space)) + 1
                kept += numbers * layout.space.dtype.itemsize + 8
        return {"gradient": largest, "accumulated": kept if self.accumulate > 1 else 0}


def _parameters(optimizer: "LowRankOptimizer") -> Iterator[tuple[Tensor, dict[str, Any], "Layout"]]:
    for group in optimizer.param_groups:
        for param in group["params"]:
            yield param, group, optimizer._layouts[param]


def _take_sums(optimizer: "LowRankOptimizer", param: Tensor) -> dict[str, Tensor]:
    """Remove the sums from a parameter's state and return them."""
    state = optimizer.state.get(param, {})
    return {name: state.pop(name) for name in ACCUMULATORS if name in state}
