"""The step that all methods share: groups → project → direct → apply.

    W ← (1 − ηλ) W − η (lift(C) + φ ⊙ E)        lift(C) = C Bᵀ (right), B Cᵀ (left), A C Bᵀ (full)

`LowRankOptimizer` composes a rule (moments and direction), a projector (the subspace), a residual (C, φ and E) and the options of
each param group. It owns the life of the state: made with the optimizer, plain tensors only, exact through a checkpoint.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_optim import kernels, projectors
from lowrank_optim.groups.matrices import matrix_view
from lowrank_optim.groups.options import (
    DEFAULTS,
    SHORTHANDS,
    check_combination,
    check_names,
    check_values,
    expand_shorthands,
    plain_options,
    projector_option,
)
from lowrank_optim.kernels.counter_rng import PURPOSE_BASIS, PURPOSE_ROUNDING, PURPOSE_STATE, make_key
from lowrank_optim.optimizers import checkpoint
from lowrank_optim.optimizers.compiling import outside_graph
from lowrank_optim.optimizers.owners import check_free
from lowrank_optim.projectors import Basis, Projector, Space, Write
from lowrank_optim.projectors.float64_sums import basis_of, refresh, widen
from lowrank_optim.quantization import coded_moments as coding
from lowrank_optim.residuals.base import Reduced, Residual
from lowrank_optim.residuals.registry import residual_from_name
from lowrank_optim.rules import Context, Direction, FusedDense, Rule
from lowrank_optim.sharding.agreement import check_agreement
from lowrank_optim.sharding.dtensor import LocalState, local_grad, place_all
from lowrank_optim.sharding.param_sharding import HERE
from lowrank_optim.step.batching import Later, Waiting, summed
from lowrank_optim.step.entrance import check_gradient, check_members, check_parameter, settle_gradient
from lowrank_optim.step.layout import Layout, check_parts, make_layouts
from lowrank_optim.step.nonfinite import SkippedUpdates, first_norms
from lowrank_optim.step.param_step import Job
from lowrank_optim.step.refresh_schedule import latest_refresh, lengthen_gap, moment_steps, own_gap, stagger_offsets
from lowrank_optim.step.state_names import ACCUMULATORS, HOST_STATE, MEASURED

if TYPE_CHECKING:
    from lowrank_optim.in_backward.hooks import UpdateInBackward

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class LowRankOptimizer(Optimizer):
    """An optimizer from parts: an update rule, a projector and options.

    A param group with a `rank` is trained in a subspace of each matrix's gradients; other groups, matrices whose short side is below
    the rank, and tensors that are no matrices are trained by the rule directly. One step of a low-rank matrix:

        R = G B or Gᵀ B,   N = rule(R),   W ← (1 − ηλ) W − η (lift(C) + φ ⊙ E)

    Args:
        params: tensors, (name, tensor) pairs, or param groups such as `lowrank_optim.param_groups` makes.
        rule: the update rule, such as `Adam(betas=(0.9, 0.999))`. Its fields become options of the groups.
        residual: what becomes of the gradient outside the subspace: a `Residual`, or its name: "none", "sgd", "sign",
            "error_feedback", "norm_scaled", "gradient_scaled". Its fields become options of the groups.
        lr: learning rate η.
        weight_decay: decoupled weight decay λ.
        **options: see `Options`.

    Raises:
        TypeError: an unknown option or group key (the message names the nearest valid one).
        ValueError: a value out of range, or a parameter that cannot be trained (complex, sparse, sharded).
        RuntimeError: another optimizer, which is still alive, updates one of the parameters in backward.

    State (plain tensors; `m×n` the matrix, `r` the rank, 4 bytes an element, 8 for float64 parameters):
        step: 0-d float32 on the CPU, the steps in which the parameter had a gradient (skipped ones included).
        last_refresh: 0-d int64 on the CPU, the step (from 0) of the last successful refresh; −1 before the first.
        basis: d×r, orthonormal columns on the projected side d; `basis_right` besides where both sides are projected; `indices` for
            coordinates; nothing for random bases.
        the rule's moments, of R's shape: m×r (right), n×r (left) or r×r (full).
        with fewer bits, codes in place of basis and moments, and their scales (`lowrank_optim.quantization`); with
        `overlap_threshold`, `gap` and `overlaps` on the CPU; the residual's `limiter_norm` or `error`.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> weight = torch.nn.Parameter(torch.zeros(64, 32))
        >>> optimizer = lo.LowRankOptimizer([weight], rule=lo.Adam(), lr=0.1, rank=4, projector=lo.SVD())
        >>> weight.grad = torch.ones(64, 32)
        >>> optimizer.step()
        >>> optimizer.state[weight]["exp_avg"].shape
        torch.Size([64, 4])
    """

    _in_backward: "UpdateInBackward | None" = None  # set while `lowrank_optim.update_in_backward` is attached
    _group_options: ClassVar[Mapping[str, Any]] = {}  # what a subclass keeps in every group besides, with defaults

    def __init__(
        self,
        params: Params,
        *,
        rule: Rule,
        residual: str | Residual = "none",
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        self._rule = rule
        self._residual = residual if isinstance(residual, Residual) else residual_from_name(residual)
        parts = {**rule.options(), **self._residual.options()}
        valid = plain_options({**DEFAULTS, **parts, **self._group_options, "lr": lr, "weight_decay": weight_decay})
        check_names(options, (*valid, *SHORTHANDS), f"{type(self).__name__}(…)")
        options = expand_shorthands(plain_options(options))
        self._projector = projector_option(options)
        defaults = {**valid, **options, "projector": self._projector.name}
        defaults |= {"rule": rule.name, "residual": self._residual.name}
        self._layouts: dict[Tensor, Layout] = {}
        self._offsets: dict[Tensor, int] = {}
        self._warned: set[str] = set()
        self._skipped = SkippedUpdates()
        super().__init__(params, defaults)
        check_agreement(self)

    # ------------------------------------------------------------------------------------------------------------- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch. Its options and parameters are checked, and their state made, before anything changes."""
        group = dict(param_group)
        if isinstance(group.get("projector"), Projector):
            raise ValueError("projector in a param group must be a name; pass Projector objects to the constructor")
        check_names(group, (*self.defaults, *SHORTHANDS), "a param group")
        group = expand_shorthands(plain_options(group))
        merged = {**self.defaults, **group}
        self._check_options(merged)
        params = merged.pop("params", [])
        if isinstance(params, Tensor):
            params = [params]
        elif not isinstance(params, set):  # torch refuses sets, and says why
            group["params"] = params = list(params)
        tensors = [item[1] if isinstance(item, tuple) else item for item in params]
        if params and isinstance(params[0], tuple):
            merged["param_names"] = [item[0] for item in params]
        layouts: dict[Tensor, Layout] = {}
        if all(isinstance(tensor, Tensor) for tensor in tensors):  # torch refuses anything else, and says why
            layouts = self._make_layouts(merged, tensors, len(self.param_groups), len(self._layouts))
        if self._in_backward is None:
            check_free(layouts)
        else:
            self._in_backward.check(layouts, [merged])
        super().add_param_group(group)
        self._layouts |= layouts
        self._offsets.clear()
        for param, layout in layouts.items():
            self.state[param] = self._init_state(param, self.param_groups[-1], layout)
        if self._in_backward is not None:
            self._in_backward.refresh_hooks()

    def _check_options(self, options: Mapping[str, Any]) -> None:
        check_values(options)
        for part, name in ((self._rule, "rule"), (self._residual, "residual")):
            if options[name] != part.name:
                raise ValueError(
                    f"{name} is {options[name]!r} in a param group, {part.name!r} in the optimizer; it cannot differ"
                )
            part.check(options)
        projector = self._projector_of(options)
        projector.check(options["proj_type"])
        check_combination(projector, options)

    def _projector_of(self, options: Mapping[str, Any]) -> Projector:
        name = options["projector"]
        projector = self._projector if name == self._projector.name else projectors.from_name(name)
        return projector.released() if options["match_reference"] else projector

    def _init_state(self, param: Tensor, group: Mapping[str, Any], layout: Layout) -> dict[str, Tensor]:
        state = {"step": kernels.host_tensor(0.0, torch.float32)}
        device = param.device
        if layout.space is None:
            return self._placed(layout, state | self._init_moments(param, layout, group, state, device))
        state["last_refresh"] = kernels.host_tensor(-1, torch.int64)
        if group["overlap_threshold"] is not None:
            state["gap"] = kernels.host_tensor(group["update_proj_gap"], torch.int64)
            state["overlaps"] = kernels.host_tensor([-1.0] * group["queue_size"], torch.float32)
        state |= layout.projector.init(layout.space, self._key(group, layout, 0), device)
        state |= self._residual.init(layout.space, device)
        return self._placed(layout, state | self._init_moments(param, layout, group, state, device))

    @staticmethod
    def _placed(layout: Layout, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Local parts of state tensors as they are kept: DTensors where the parameter is one."""
        return place_all(state, layout.shards, layout.side, plain=HOST_STATE)

    def local_state(self, param: Tensor) -> dict[str, Tensor]:
        """The state of a parameter as the step sees it: the local parts, where it is sharded."""
        state, layout = self.state[param], self._layouts[param]
        return state if layout.shards is HERE else LocalState(state, layout.shards, layout.side)

    def _init_moments(
        self,
        param: Tensor,
        layout: Layout,
        group: Mapping[str, Any],
        state: Mapping[str, Tensor],
        device: torch.device,
    ) -> dict[str, Tensor]:
        """The rule's state for the subspace that `state` describes, as it is stored, all zero."""
        shape, dtype = self._moment_shape(param, layout, state), kernels.compute_dtype(param.dtype)
        if not self._is_coded(param, layout, group["state_bits"]):
            return self._rule.init(shape, group, dtype, device)
        like = self._rule.init(shape, group, dtype, torch.device("meta"))
        return coding.zeros(like, group["state_bits"], device)

    @staticmethod
    def _moment_shape(param: Tensor, layout: Layout, state: Mapping[str, Tensor] | None) -> tuple[int, ...]:
        """The shape of the gradient that the rule sees here, now."""
        return layout.shards.moment_shape(layout.whole_moment_shape(param, state))

    def _is_coded(self, param: Tensor, layout: Layout, bits: int) -> bool:
        """Whether the moments are stored in few bits; decided from the global shape only."""
        return coding.is_coded(bits, math.prod(layout.whole_moment_shape(param)))

    def state_template(self, param: Tensor, saved: Mapping[str, Tensor], group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Types and shapes of the state that this optimizer has at the step at which `saved` was written, with that `group`."""
        state = self.state.get(param) or self._init_state(param, group, self._layouts[param])
        own: dict[str, Tensor] = {n: t for n, t in state.items() if n not in ACCUMULATORS}
        if self._in_backward is not None:
            own |= self._in_backward.template(param, saved)
        return self._resized(param, own, saved, group)

    def _resized(
        self, param: Tensor, own: dict[str, Tensor], saved: Mapping[str, Tensor], group: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """`own` with moments of the types and shapes that they have beside `saved`, where they change with the subspace."""
        layout = self._layouts[param]
        if layout.space is None or not layout.projector.resizes or "turn" not in saved:
            return own
        moments = self._placed(layout, self._init_moments(param, layout, group, saved, torch.device("meta")))
        return {name: tensor for name, tensor in own.items() if name != "col_scale"} | moments

    @staticmethod
    def _state_device(name: str, param: Tensor, group: Mapping[str, Any]) -> torch.device:
        """Where a state tensor of this name belongs."""
        return torch.device("cpu") if name in HOST_STATE else param.device

    @staticmethod
    def _key(group: Mapping[str, Any], layout: Layout, step: int, purpose: int = PURPOSE_BASIS) -> int:
        return make_key(group["seed"], layout.index, step, purpose)

    # --------------------------------------------------------------------------------------------------------------- step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns the closure's value. The closure runs with gradients enabled.

        With `lowrank_optim.update_in_backward`, backward has updated them, and only what is left is done here. In a function given
        to `torch.compile` the step runs outside of the graph. Autocast changes nothing.
        """
        loss = None if closure is None else outside_graph(torch.enable_grad()(closure))
        outside_graph(self._step)
        return loss

    @kernels.plain_arithmetic
    def _step(self) -> None:
        self.enter(param for group in self.param_groups for param in group["params"])
        if self._in_backward is not None:
            self._in_backward.finish_step()
        else:
            self.param_groups[0].pop(MEASURED, None)  # from a checkpoint written with updates in backward
            norms = first_norms(self.param_groups, self._layouts)
            later = Waiting()
            try:
                for group in self.param_groups:
                    for param in group["params"]:
                        self.step_param(param, group, norms.get(param), later)
            finally:  # whatever a later parameter raises, those before it are updated
                later.run()
                for step in summed(later.matrices):
                    self._finish(step)
        self._skipped.poll()
        self._end_step()

    def check_members(self) -> None:
        """Raise RuntimeError for a parameter in the groups that is another one, or has another shape, than at construction."""
        check_members(self.param_groups, self._layouts)

    @kernels.plain_arithmetic
    def enter(self, params: Iterable[Tensor]) -> None:
        """Let parameters into a step: all are checked before anything changes; state and gradients are then as the step needs them.

        Raises:
            RuntimeError: a parameter is not one that the optimizer was built with, or has another shape than its state is for.
            ValueError: a parameter that cannot be written to, or a gradient that no step can use.
        """
        params = list(params)
        given = [param for param in params if param.grad is not None]
        if any(param not in self._layouts for param in params):
            self.check_members()
        for param in params:
            check_parameter(param, self._layouts[param])
        for param in given:
            check_gradient(param, self._layouts[param])
        self._follow(params)
        for param in given:
            settle_gradient(param)

    def _end_step(self) -> None:
        """Called when every parameter has been updated, by `step` or inside backward."""

    @property
    def last_grad_norm(self) -> Tensor | None:
        """Norm of the whole gradient of the last step that had one, before clipping: 0-d, on the device, so that nothing waits.

        Measured with `lowrank_optim.update_in_backward`, whose docstring says how; None before its first step, and in ordinary
        stepping, where `torch.nn.utils.clip_grad_norm_` measures it.
        """
        norms = self.param_groups[0].get(MEASURED)
        return None if norms is None or self._in_backward is None else norms[0]

    @kernels.plain_arithmetic
    def step_param(
        self,
        param: Tensor,
        group: Mapping[str, Any],
        norm: Tensor | None = None,
        later: Waiting | None = None,
    ) -> None:
        """Update one parameter, which `enter` has let in, from its gradient: what `step` and hooks use. No gradient, no change.

        `norm`, where it is known already, says whether the gradient is finite; of a sharded parameter, it is that of the whole. What
        is better done together with other parameters is left to `later`, if that is given.
        """
        if param.grad is None:
            return
        layout, grad = self._layouts[param], local_grad(param)
        with self._job(param, group, layout) as job:
            if layout.space is None:
                if layout.shards.whole:
                    with job.whole(grad) as dense:
                        self._step_dense(*dense, norm, None)
                else:
                    self._step_dense(job, grad, norm, later)
                return
            weight, grad = (matrix_view(tensor, layout.layout) for tensor in (job.weight, grad))
            self._step_low_rank(job, layout.space, weight, grad, None if layout.shards is HERE else norm, later)

    @kernels.plain_arithmetic
    def project_param(self, param: Tensor, group: Mapping[str, Any]) -> tuple[Tensor, Basis, Tensor]:
        """G, its subspace (the one that stands, or a new one where one is due) and R, for the gradient of a low-rank matrix."""
        layout = self._layouts[param]
        assert param.grad is not None
        assert layout.space is not None
        grad = matrix_view(local_grad(param), layout.layout)
        if self.refresh_is_due(param, group):
            with self._job(param, group, layout) as job:
                self._refresh_if_due(job, layout.space, grad, None)
        basis = self.subspace(param, group)
        return grad, basis, basis.project(grad)

    def subspace(self, param: Tensor, group: Mapping[str, Any]) -> Basis:
        """The subspace of a low-rank matrix that stands."""
        state = self.local_state(param)
        return self._basis(self._layouts[param], group, state, int(state["last_refresh"]))

    @kernels.plain_arithmetic
    def step_projected(self, param: Tensor, group: Mapping[str, Any], reduced: Tensor) -> None:
        """Update a low-rank matrix from R alone, in the subspace that stands; for residuals that use no more of the gradient."""
        layout = self._layouts[param]
        with self._job(param, group, layout) as job:
            weight, unused = matrix_view(job.weight, layout.layout), reduced.new_empty(0)
            basis = self.subspace(param, group)
            self._update(job, weight, unused, basis, reduced, None, self._finite(reduced, job), None)

    @contextmanager
    def _job(self, param: Tensor, group: Mapping[str, Any], layout: Layout) -> Iterator[Job]:
        """What one parameter's step works on; moments that are stored in few bits are decoded if need be, and coded again."""
        state = self.local_state(param)
        bits = group["state_bits"]
        if not self._is_coded(param, layout, bits):
            yield Job(param, group, layout, state, state)
            return
        shape, dtype = self._moment_shape(param, layout, state), kernels.compute_dtype(param.dtype)
        key, start = self._key(group, layout, 0, PURPOSE_STATE), layout.shards.reduced.start
        moments = coding.CodedMoments(state, shape, bits, dtype, key, start)
        yield Job(param, group, layout, state, moments)
        moments.close(int(state["step"]))

    def _step_dense(self, job: Job, grad: Tensor, norm: Tensor | None, later: Waiting | None) -> None:
        """One parameter that is trained directly, in chunks where the rule allows it: no working copy is as large as an embedding."""
        ok = self._finite(grad if norm is None else norm, job)
        job.state["step"] += 1
        if ok is False:
            return
        age, dtype = float(job.state["step"]), kernels.compute_dtype(job.param.dtype)
        job.fit_columns(grad, self._rule, int(age), ok)
        shards = job.layout.shards
        whole = Context(age, age, job.weight, ok, True, age == 1, shards)
        fused = self._rule.fused_dense(job.weight, grad, job.moments, job.group, whole)
        if fused is not None:
            call = fused.call(vars(self._write(job, fused, 1.0, ok)))
            if later is not None and fused.after is None:
                later.dense.setdefault(fused.op, []).append(call)
                return
            kernels.run_many(fused.op, [call])
            if fused.after is not None:
                fused.after()
            return
        for weight, part, moments, start in job.dense_parts(grad, self._rule.elementwise):
            part = part.to(dtype) if ok is None else torch.where(ok, part.to(dtype), 0.0)
            move = self._rule.direction(part, moments, job.group, Context(age, age, weight, ok, True, age == 1, shards))
            kernels.apply_dense_(weight, move.matrix, start=start, **vars(self._write(job, move, 1.0, ok)))

    def _step_low_rank(
        self, job: Job, space: Space, weight: Tensor, grad: Tensor, norm: Tensor | None, later: Waiting | None
    ) -> None:
        """One matrix in its subspace: refresh, project, update."""
        ok: Literal[False] | Tensor | None = None
        if self._residual.feeds_back:
            ok = self._finite(grad if norm is None else norm, job)
            if ok is False:
                job.state["step"] += 1
                return
            grad = self._residual.absorb(grad, job.state, ok)
        self._refresh_if_due(job, space, grad, ok if isinstance(ok, Tensor) else None)
        basis = self.subspace(job.param, job.group)
        reduced, squares = basis.project_with_norms(grad) if self._residual.uses_norms else (basis.project(grad), None)
        if not self._residual.feeds_back:
            # R and the norms show any NaN that a step would use; a residual outside of coordinates uses all of G.
            shows_all = job.layout.projector.sees_all and reduced.numel() > 0
            seen = reduced if shows_all or not self._residual.uses_gradient else grad
            seen = seen if squares is None else squares.sqrt()
            ok = self._finite(seen if norm is None else norm, job)
        self._update(job, weight, grad, basis, reduced, squares, ok, later)

    _mask_on_device = False  # tests set it, to run on the CPU what accelerators run

    def _finite(self, seen: Tensor, job: Job) -> Literal[False] | Tensor | None:
        """Whether this gradient may be used: None for yes, False for no, or, where the host would have to wait, a 0-d bool."""
        return self._skipped.check(seen, job.layout, job.group["on_nonfinite"], self._mask_on_device)

    def _update(
        self,
        job: Job,
        weight: Tensor,
        grad: Tensor,
        basis: Basis,
        reduced: Tensor,
        squares: Tensor | None,
        ok: Literal[False] | Tensor | None,
        later: Waiting | None,
    ) -> None:
        """One low-rank matrix from its projected gradient: direction, sums that its residual needs, weights; now or with others."""
        job.state["step"] += 1
        if ok is False:
            return
        if ok is not None:
            reduced = torch.where(ok, reduced, 0.0)
            squares = None if squares is None else torch.where(ok, squares, 0.0)
        steps, age = moment_steps(job.state, job.group), float(job.state["step"])
        job.fit_columns(reduced, self._rule, int(age) - max(int(job.state["last_refresh"]), 0), ok)
        fresh = (steps if job.layout.projector.resizes else age) == 1
        shards, norms = job.layout.shards, self._residual.uses_norms
        context = Context(steps, age, weight, ok, fresh=fresh, shards=shards, norms=norms)

        def go_on(move: Direction) -> None:
            projected, direction = widen(reduced), widen(move.matrix)
            lines = move.norms if projected is reduced else None
            if norms and lines is None:
                lines = kernels.line_norms(direction, projected)
            step = Reduced(grad, projected, squares, direction, move.correction, move.unit, basis, ok, lines)
            half = Later(job, weight, move, replace(step, sums=self._residual.sums(step, job.group)))
            if later is not None and half.waits:
                later.matrices.append(half)
            else:
                self._finish(*summed([half]))

        seen = (reduced, job.moments, job.group, context)
        fused = self._rule.fused_direction(*seen) if later is not None and later.takes(job) else None
        if later is not None and fused is not None:
            later.directions.append((fused, go_on))
        else:
            go_on(self._rule.direction(*seen))

    def _finish(self, step: Later) -> None:
        """The second half of a matrix' step: residual and weights."""
        job, weight, reduced = step.job, step.weight, step.reduced
        update = self._residual.update(reduced, job.state, job.group)
        reduced.basis.apply_(weight, update.core, self._write(job, step.move, update.factor, reduced.ok), update.term)
        if weight is not job.weight and weight.data_ptr() != job.weight.data_ptr():
            job.weight.copy_(weight.view(job.weight.shape))  # a convolution whose strides allow no matrix view

    def _write(self, job: Job, move: Direction | FusedDense, factor: float, ok: Tensor | None) -> Write:
        """Step size, what is kept of the weights, and how they are rounded."""
        group = job.group
        # Rules and residuals are odd functions of the gradient: to ascend is to descend with the sign turned.
        alpha = -move.step * factor if group["maximize"] else move.step * factor
        decay = group["weight_decay"]
        keep = 1.0 - move.decay * (decay if isinstance(decay, Tensor) else float(decay))
        if group["match_reference"] and self._rule.decays_last:
            alpha *= float(keep)  # decay after the update: (1 − ηλ)(W − ηU)
        key = None
        coded = getattr(job.weight, "rounds_stochastically", False)  # `lowrank_optim.nn.QuantizedWeight`
        if coded or (group["stochastic_rounding"] and job.weight.dtype == torch.bfloat16):
            key = self._key(group, job.layout, int(job.state["step"]), PURPOSE_ROUNDING)
        return Write(alpha, keep, ok, key)

    def skipped_updates(self) -> dict[str, int]:
        """How many updates were left out because a gradient was not finite, by parameter name; waits for the device."""
        return self._skipped.read()

    # ----------------------------------------------------------------------------------------------------------- subspace

    def _basis(self, layout: Layout, group: Mapping[str, Any], state: Mapping[str, Tensor], refreshed: int) -> Basis:
        """The subspace in the state, refreshed last at step `refreshed`."""
        assert layout.space is not None
        key = self._key(group, layout, max(refreshed, 0))
        return basis_of(layout.projector, layout.space, state, key, layout.device)

    def refresh_is_due(self, param: Tensor, group: Mapping[str, Any]) -> bool:
        """Whether this step gives a low-rank matrix a new subspace, if its gradient allows it."""
        space, state = self._layouts[param].space, self.state[param]
        if space is None or space.rank == 0:
            return False
        scheduled = latest_refresh(int(state["step"]), own_gap(state, group), self._offset(param))
        return int(state["last_refresh"]) < scheduled

    def _refresh_if_due(self, job: Job, space: Space, grad: Tensor, ok: Tensor | None) -> None:
        """Give a matrix a new subspace from this gradient if one is due and the gradient (and the 0-d bool `ok`) allows it."""
        state, group, layout = job.state, job.group, job.layout
        if not self.refresh_is_due(job.param, group):
            return
        now, last = int(state["step"]), int(state["last_refresh"])
        momentum = None
        if layout.projector.uses_momentum:
            momentum = self._rule.mean_gradient(job.moments, group, moment_steps(state, group))
        key = self._key(group, layout, now)
        new = refresh(layout.projector, grad, space, state, key, last < 0, momentum)
        if new is None:
            return  # zero or non-finite: keep the old basis and try again on the next step
        if ok is not None:
            new = {n: t if n in HOST_STATE else torch.where(ok, t, state[n]) for n, t in new.items()}
        if last >= 0 and (group["on_refresh"] == "rotate" or "gap" in state):
            old, basis = self._basis(layout, group, state, last), self._basis(layout, group, {**state, **new}, now)
            if "gap" in state:
                lengthen_gap(state, float(basis.overlap(old)), group)
            if group["on_refresh"] == "rotate":
                self._rotate(job, old, basis, now)
        for name, tensor in new.items():
            state[name].copy_(tensor)
        state["last_refresh"].fill_(now)
        if group["on_refresh"] == "reset":
            self._reset(job)

    def _reset(self, job: Job) -> None:
        """Zero moments, of the shape that the new subspace needs."""
        fresh = self._init_moments(job.param, job.layout, job.group, job.state, job.layout.device)
        if "col_scale" in job.state and "col_scale" not in fresh:
            job.state.pop("col_scale")  # of no column, while it was not this tensor's turn
        for name, tensor in fresh.items():
            same = name in job.state and job.state[name].shape == tensor.shape
            job.state[name] = job.state[name].copy_(tensor) if same else tensor
        if isinstance(job.moments, coding.CodedMoments):
            job.moments.forget(self._moment_shape(job.param, job.layout, job.state))

    def _rotate(self, job: Job, old: Basis, new: Basis, steps: float) -> None:
        """Express the moments in a new basis, and hand what momentum loses by it to a residual that feeds back."""
        weight = self._rule.memory(job.group) if self._residual.feeds_back else 0.0
        if weight:
            old.apply_(job.state["error"], job.moments["exp_avg"], Write(-weight, 1.0))
        self._rule.transport(job.moments, lambda moment, power: new.transport(moment, old, power), job.group, steps)
        if weight:
            new.apply_(job.state["error"], job.moments["exp_avg"], Write(weight, 1.0))

    def _offset(self, param: Tensor) -> int:
        """How many steps before a multiple of its gap this parameter is refreshed."""
        if not self._offsets:
            self._offsets = stagger_offsets(self.param_groups, self._layouts)
        return self._offsets[param]

    # -------------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """The state and the options of every group, as in torch: tensors and Python's own numbers only."""
        self.check_members()
        for group in self.param_groups:  # where schedulers put numbers of other kinds
            group.update(plain_options(group, keep_tensors=True))
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved state, every tensor in its own type, on the device of its parameter.

        Learning rates and other hyperparameters come from the checkpoint, as in torch. Also takes a `torch.optim.AdamW` checkpoint
        for groups without `rank`.

        Raises:
            ValueError: a checkpoint of another method, rank or model; the message lists every difference, and the optimizer is as it
                was.
        """
        self.check_members()
        self._follow(list(self._layouts))
        checkpoint.load(self, state_dict)
        self._rebuild_layouts()
        if self._in_backward is not None:
            self._in_backward.restart()

    def __getstate__(self) -> dict[str, Any]:
        parts = {name: getattr(self, name) for name in ("_rule", "_residual", "_projector")}
        return {**super().__getstate__(), **parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_rule" in state:  # unpickled or copied
            self._warned, self._skipped = set(), SkippedUpdates()
        self._rebuild_layouts()

    def layout_of(self, param: Tensor) -> Layout:
        """The layout of a parameter, whose state is where and as it needs it."""
        check_parameter(param, self._layouts[param])
        self._follow([param])
        return self._layouts[param]

    def _follow(self, params: Iterable[Tensor]) -> None:
        """Where the model was moved or converted (`model.to`, `.double()`) after the optimizer was built, let the state follow.

        Moments, stored bases and what residuals keep go to the new device, and into the type of arithmetic on the new type. Codes and
        their scales are the same for every type.
        """
        old = self._layouts
        if all((old[param].device, old[param].dtype) == (param.device, param.dtype) for param in params):
            return
        check_members(self.param_groups, old)
        self._rebuild_layouts()
        for group in self.param_groups:
            for param in group["params"]:
                place = param.device, param.dtype
                if self.state.get(param) and (old[param].device, old[param].dtype) != place:
                    self.state[param] = self._followed(param, group)

    def _followed(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """The state of a parameter on its device, in the types that a state made now would have."""
        state = self.state[param]
        fresh = self._resized(param, self._init_state(param, group, self._layouts[param]), state, group)
        if self._in_backward is not None:
            fresh |= self._in_backward.template(param, state)
        return {
            name: state[name].to(self._state_device(name, param, group), like.dtype) if name in state else like
            for name, like in fresh.items()
        }

    def _rebuild_layouts(self) -> None:
        layouts: dict[Tensor, Layout] = {}
        for number, group in enumerate(self.param_groups):
            layouts |= self._make_layouts(group, group["params"], number, len(layouts))
        self._layouts, self._offsets = layouts, {}

    def _make_layouts(
        self, group: Mapping[str, Any], params: Iterable[Tensor], number: int, first: int
    ) -> dict[Tensor, Layout]:
        """Layouts of one group's parameters; `number` is the group's, `first` the position of its first parameter."""
        params = list(params)
        names = group.get("param_names") or [f"{number}.{i}" for i, _ in enumerate(params)]
        named = zip(names, params, strict=True)
        layouts = make_layouts(named, first, group, self._projector_of(group), self._warned)
        for param, layout in layouts.items():
            check_parts(layout, param, self._rule, self._residual, group)
        return layouts
