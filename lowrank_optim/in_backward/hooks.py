"""Updates inside backward: every parameter is updated, and its gradient freed, as soon as its gradient is complete.

Only when and with what a parameter is updated is decided here; how, by the optimizer (`step_param`, and `step_projected` for a matrix
of which only R was kept). There is one optimizer and one scheduler. Hooks, handle and optimizer hold each other weakly where it
matters: whoever drops the model and the optimizer frees both.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from lowrank_optim import kernels
from lowrank_optim.in_backward import accumulation
from lowrank_optim.in_backward.checks import check_cautious, check_kind, check_plans, refuse_step
from lowrank_optim.in_backward.clipping import clip_factor, on_device, record_norms, scale_
from lowrank_optim.kernels.counter_rng import PURPOSE_SKETCH, make_key
from lowrank_optim.optimizers.base import LowRankOptimizer
from lowrank_optim.optimizers.owners import WAY_OUT, GradientHook, StepHook, check_free, owner
from lowrank_optim.sharding.dtensor import local, local_grad, wait_for_host_copy
from lowrank_optim.step.joint import check_unit
from lowrank_optim.step.param_plan import ParamPlan
from lowrank_optim.step.state_names import ACCUMULATORS, MEASURED
from lowrank_optim.step.trained_param import TrainedParam


class UpdateInBackward:
    """What `update_in_backward` returns. The optimizer calls `check`, `refresh_hooks`, `finish_step`, `template` and `restart`."""

    def __init__(
        self,
        optimizer: LowRankOptimizer,
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
        self.check(optimizer.plans, optimizer.param_groups)
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

    def check(self, plans: Mapping[Tensor, ParamPlan], groups: Iterable[Mapping[str, Any]]) -> None:
        """Raise where these parameters, and the options of their groups, cannot be updated in backward by this handle."""
        groups = list(groups)
        check_plans(self._require_optimizer(), plans, self.accumulate)
        check_cautious(groups, self.accumulate)
        if self._scaler is not None and any(group["on_nonfinite"] != "skip" for group in groups):
            raise ValueError(
                'a GradScaler finds its scale by infinities, which only on_nonfinite="skip" leaves out; use it in every group'
            )
        check_free(plans, self)

    def refresh_hooks(self) -> None:
        """Register hooks on parameters that have none yet, frozen ones included."""
        for group in self._require_optimizer().param_groups:
            for param in group["params"]:
                if owner(param) is not self:
                    self._register(param)

    def _register(self, param: Tensor) -> None:
        if not param.is_floating_point():
            return  # frozen for ever, such as codes of another package
        frozen = not param.requires_grad
        param.requires_grad_(True)  # torch registers on no others; a hook outlives the change back
        try:
            self._hooks.append(param.register_post_accumulate_grad_hook(GradientHook(self)))
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
        found = dict.fromkeys(owner(param) for param in params)
        return [handle for handle in found if isinstance(handle, UpdateInBackward)]

    def refuse_step_of(self, other: Optimizer) -> None:
        """Raise RuntimeError where `other` is about to take a step on parameters that are updated in backward here."""
        if other is not self._optimizer():
            kernels.outside_graph(refuse_step, other, self, bool(self._done))  # a traced parameter shows no hooks

    @property
    def optimizer(self) -> LowRankOptimizer | None:
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
            waiting = [p for p, _ in _parameters(optimizer) if "micro_batches" in optimizer.state.get(p, {})]
            if waiting:
                raise RuntimeError(
                    f"{len(waiting)} parameters keep gradients of an unfinished step: call optimizer.step() to apply them or "
                    "discard() to drop them, then remove()"
                )
            optimizer.param_groups[0].pop(MEASURED, None)
        self._detach()

    def discard(self) -> None:
        """Drop the gradients that are kept of an unfinished step."""
        for param, _ in _parameters(self._require_optimizer()):
            _take_sums(self._require_optimizer(), param)
        self.restart()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None and self.active:
            self.discard()
        self.remove()

    def _require_optimizer(self) -> LowRankOptimizer:
        optimizer = self._optimizer()
        if optimizer is None:
            raise RuntimeError("the optimizer of this handle does not exist any more")
        return optimizer

    # -------------------------------------------------------------------------------------------------------- in backward

    def restart(self) -> None:
        """Forget what is known of the step that is under way; its sums are state, and stay."""
        self._done: set[tuple[int, int]] = set()  # places of parameters that this step has updated
        self._norms: dict[tuple[int, int], Tensor] = {}
        self._found_inf: Tensor | None = None

    @kernels.no_autograd_no_autocast
    def on_gradient(self, param: Tensor) -> None:
        """Take the gradient of a parameter, which was just accumulated, and free it."""
        optimizer = self._optimizer()
        if optimizer is None or param.grad is None:
            return
        optimizer.enter([param])
        plan = optimizer.plan_of(param)
        if plan.place in self._done:
            raise RuntimeError(
                f"{plan.name} got another gradient, but was updated in this step already. A step has {self.accumulate} backward "
                "passes (accumulate) and ends with optimizer.step(). If that was kept to: a weight that is used in two segments of "
                "reentrant activation checkpointing gets its gradient in parts; use checkpoint(..., use_reentrant=False). If "
                f"another optimizer steps in place of this one ({type(optimizer).__name__}): {WAY_OUT}"
            )
        wait_for_host_copy(param)
        self._take(param, None)
        if optimizer._watch is not None and plan.place in self._done:
            optimizer._watch.updated(param)

    def _take(self, param: Tensor, last: bool | None) -> None:
        """Keep or apply the gradient in `param.grad`; `last` says whether it is the step's last, None that it has to be found out."""
        optimizer = self._require_optimizer()
        assert param.grad is not None
        if not optimizer.is_trained(param):  # a layer that sleeps: the optimizer says so and drops the gradient
            optimizer.step_param(param)
            param.grad = None
            return
        trained = optimizer.trained(param)
        if self._scaler is not None:
            self._unscale(local_grad(param), trained.plan)
        if last is None:
            last = self.accumulate == 1 or (self._last_micro_batch is not None and bool(self._last_micro_batch()))
        if last and "micro_batches" not in trained.state:
            self._step_whole(trained)
        else:
            counted = self._keep(trained)
            if last or (self._last_micro_batch is None and counted >= self.accumulate):
                self._step_kept(optimizer, param)
        if not self._waits(trained.plan):
            param.grad = None

    def _keep(self, trained: TrainedParam) -> int:
        """Add the gradient to the parameter's sum; returns the number of micro-batches in it."""
        state, plan = trained.state, trained.plan
        first = "micro_batches" not in state
        whole = accumulation.keeps_whole(plan) or "grad_sum" in state
        if first and not whole and plan.projector.needs_gradient and int(state["last_refresh"]) >= 0:
            whole = trained.refresh_is_due
        if whole:
            accumulation.add(state, "grad_sum", local_grad(trained.param).detach())
        else:
            assert plan.space is not None
            grad, basis, reduced = trained.project()
            key = make_key(trained.group["seed"], plan.index, int(state["step"]), PURPOSE_SKETCH)
            accumulation.add_projected(state, grad, reduced, basis, plan.space, key)
        return accumulation.count(state)

    def _step_kept(self, optimizer: LowRankOptimizer, param: Tensor) -> None:
        """Update a parameter from the sum of its micro-batches, which is freed."""
        sums = _take_sums(optimizer, param)
        trained = optimizer.trained(param)
        if "grad_sum" not in sums:
            norm = accumulation.accumulated_norm(sums, trained.basis())
            self._step_projected(trained, sums["projected_sum"], norm)
            return
        param.grad = sums["grad_sum"]
        self._step_whole(trained)
        if not self._waits(trained.plan):
            param.grad = None

    def _step_whole(self, trained: TrainedParam) -> None:
        """Update a parameter from the whole gradient in `param.grad`."""
        plan, grad = trained.plan, local_grad(trained.param)
        norm = plan.sharding.matrix.norm(kernels.norm(grad))
        within = norm
        if self.max_grad_norm is not None and self.clip == "subspace" and plan.space is not None:
            _, _, reduced = trained.project()
            if not plan.residual.uses_gradient:
                self._step_projected(trained, reduced, norm)
                return
            within = plan.sharding.reduced.norm(torch.linalg.vector_norm(reduced))
        self._scale(grad, within)
        self._record(plan, norm)
        if plan.unit:
            self._step_unit(plan)
        else:
            trained.step(norm if self._scaler is None else None)  # which may have made NaN of it

    def _step_unit(self, plan: ParamPlan) -> None:
        """Update parameters whose rule needs all their gradients at once, when the last one is there; they are freed together."""
        optimizer = self._require_optimizer()
        trained = [param for param in plan.unit if param.requires_grad]
        if all(optimizer.plan_of(param).place in self._done for param in trained):
            optimizer.step_param(trained[0])
            for param in plan.unit:
                param.grad = None

    def _waits(self, plan: ParamPlan) -> bool:
        """Whether a gradient that is complete has to be kept, until those that its rule needs besides are there."""
        places = {self._require_optimizer().plan_of(param).place for param in plan.unit if param.requires_grad}
        return plan.place in self._done and not places <= self._done

    def _step_projected(self, trained: TrainedParam, reduced: Tensor, norm: Tensor) -> None:
        """Update a matrix from R, where ‖G‖ is `norm`."""
        within = norm
        if self.clip == "subspace":
            within = trained.plan.sharding.reduced.norm(torch.linalg.vector_norm(reduced))
        self._scale(reduced, within)
        self._record(trained.plan, norm)
        trained.step_projected(reduced)

    def _record(self, plan: ParamPlan, norm: Tensor) -> None:
        self._norms[plan.place] = norm
        self._done.add(plan.place)
        if (watch := self._require_optimizer()._watch) is not None:
            watch.begin()

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

    def _unscale(self, grad: Tensor, plan: ParamPlan) -> None:
        """Divide a gradient by the GradScaler's scale, in place, and see whether it is finite."""
        assert self._scaler is not None
        scale = self._scaler._get_scale_async()
        if scale is None:
            raise RuntimeError("the GradScaler has no scale yet; call scaler.scale(loss).backward()")
        grad.mul_(on_device(scale.double().reciprocal().float(), grad.device))
        bad = ~torch.isfinite(plan.sharding.matrix.sum(kernels.norm(grad)))
        self._found_inf = bad if self._found_inf is None else self._found_inf.to(bad.device) | bad

    # ----------------------------------------------------------------------------------------------------- for the optimizer

    @kernels.no_autograd_no_autocast
    def finish_step(self) -> None:
        """End a step: update parameters that got fewer than `accumulate` gradients, and write down the norm."""
        optimizer = self._require_optimizer()
        for param, plan in _parameters(optimizer):
            if param.grad is None:
                if "micro_batches" in optimizer.state.get(param, {}):
                    self._step_kept(optimizer, param)
                continue
            if self._waits(plan):
                self.restart()
                check_unit(plan, optimizer.plans, optimizer.param_groups[plan.group], optimizer.state)
            elif plan.place in self._done:
                raise RuntimeError(
                    f"{plan.name} was updated in backward, but has a gradient again. DistributedDataParallel puts one there after "
                    "its hooks: call handle.remove() and step as usual, or train without DistributedDataParallel"
                )
            self._take(param, last=True)  # from before the hooks, or set by hand
        if self._norms:
            first = optimizer.param_groups[0]
            norms = [self._norms[plan.place] for _, plan in _parameters(optimizer) if plan.place in self._norms]
            first[MEASURED] = record_norms(norms, first.get(MEASURED))
        if self._scaler is not None:
            found = kernels.cpu_tensor(False, torch.bool) if self._found_inf is None else self._found_inf
            self._scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = {found.device: found.float()}
        self.restart()

    def template(self, param: Tensor, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Types and shapes of the sums in a checkpoint, as far as they can be continued here."""
        if "micro_batches" not in saved or self.accumulate == 1:
            return {}
        if self._last_micro_batch is None and int(saved["micro_batches"]) >= self.accumulate:
            return {}
        return accumulation.template(param, saved, self._require_optimizer().plan_of(param))

    def memory(self) -> dict[str, int]:
        """Exact bytes: the largest gradient, and what is kept between micro-batches in a step in which nothing is refreshed."""
        optimizer = self._require_optimizer()
        largest = kept = 0
        for param, plan in _parameters(optimizer):
            if not param.requires_grad:
                continue
            gradient = local(param).numel() * param.element_size()
            largest = max(largest, gradient)
            kept += accumulation.kept_bytes(plan, gradient, optimizer.state.get(param))
        return {"gradient": largest, "accumulated": kept if self.accumulate > 1 else 0}


def _parameters(optimizer: LowRankOptimizer) -> Iterator[tuple[Tensor, ParamPlan]]:
    for group in optimizer.param_groups:
        for param in group["params"]:
            yield param, optimizer.plan_of(param)


def _take_sums(optimizer: LowRankOptimizer, param: Tensor) -> dict[str, Tensor]:
    """Remove the sums from a parameter's state and return them."""
    state = optimizer.state.get(param, {})
    return {name: state.pop(name) for name in ACCUMULATORS if name in state}
