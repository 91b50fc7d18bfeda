"""The optimizer that all methods share: groups, the life of the state, and the step of all parameters.

It composes a rule (moments and direction), a projector (the subspace), a residual (C, φ and E) and the options of each param group.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_optim import kernels
from lowrank_optim.groups.complete import check_group, complete_group, list_params, take_options
from lowrank_optim.groups.options import DEFAULTS, plain_options
from lowrank_optim.groups.parts import Part, PartRegistry, as_part
from lowrank_optim.optimizers import checkpoint
from lowrank_optim.optimizers.adopt import adopting
from lowrank_optim.optimizers.change_group import change_group
from lowrank_optim.optimizers.contracts import Attachment, Watch
from lowrank_optim.optimizers.keep_rows import keep_rows
from lowrank_optim.optimizers.owners import check_free
from lowrank_optim.optimizers.reset_state import reset_state
from lowrank_optim.optimizers.state_types import follow, followed, state_template
from lowrank_optim.residuals import Residual
from lowrank_optim.rules import Rule
from lowrank_optim.sharding.agreement import check_agreement
from lowrank_optim.sharding.dtensor import LocalState
from lowrank_optim.sharding.param_sharding import LOCAL
from lowrank_optim.step.batching import Step, alone, together
from lowrank_optim.step.entrance import check_members, enter, settle_gradient
from lowrank_optim.step.init_state import init_state
from lowrank_optim.step.joint import check_trainable, check_unit, check_units, is_last_of_unit, joint_step
from lowrank_optim.step.joint_lists import plain_groups
from lowrank_optim.step.nonfinite import SkippedUpdates, first_norms
from lowrank_optim.step.param_plan import ParamPlan
from lowrank_optim.step.param_step import open_moments
from lowrank_optim.step.plans import Plans
from lowrank_optim.step.state_names import MEASURED
from lowrank_optim.step.trained_param import TrainedParam

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class LowRankOptimizer(Optimizer):
    """An optimizer from parts: an update rule, a projector and options.

    A param group with a `rank` is trained in a subspace of each matrix's gradients; other groups, matrices whose short side is below
    the rank, and tensors that are no matrices are trained by the rule directly. One step of a low-rank matrix:

        R = G B or Gᵀ B,   N = rule(R),   W ← (1 − ηλ) W − η (lift(C) + φ ⊙ E)

    Each group may name a rule, a projector and a residual of its own: `{"params": …, "rank": 64, "rule": lo.Lion()}`.

    Args:
        params: tensors, (name, tensor) pairs, or param groups such as `lowrank_optim.param_groups` makes.
        rule: the update rule of groups with `rank` or `density`, such as `Adam(betas=(0.9, 0.999))`, or its name. Its fields become
            options of the groups.
        dense_rule: the rule of the other groups; None takes `rule`.
        residual: what becomes of the gradient outside the subspace: a `Residual`, or its name: "none", "sgd", "sign",
            "error_feedback", "norm_scaled", "gradient_scaled", "complement_scaled". Its fields become options of the groups.
        parts: rules, projectors and residuals of your own that no group holds yet, but `change_group` may name.
        lr, weight_decay: learning rate η and decoupled weight decay λ.
        **options: rank, density, update_proj_gap, scale, projector, …: all are in `help(lowrank_optim.groups.options.Options)`.

    Raises:
        TypeError: an unknown option, or a group key that is nearly an option's name (the message names it).
        ValueError: a value out of range; a parameter that cannot be trained (complex, sparse); parts that do not go together.
        RuntimeError: another optimizer, which is still alive, updates one of the parameters in backward.

    State: plain tensors, made for parameters that require a gradient, and at the first step for others. `m×n` is the matrix, `r` the
    rank, an element has 4 bytes (8 for float64 parameters).

    * `step`: 0-d float32 on the CPU, the steps in which the parameter had a gradient (skipped ones included).
    * `last_refresh`: 0-d int64 on the CPU, the step (from 0) of the last successful refresh; −1 before the first.
    * `basis`: d×r, orthonormal columns on the projected side d; `basis_right` besides where both sides are projected; `indices` for
      coordinates; nothing for random bases.
    * the rule's moments, of R's shape: m×r (right), n×r (left) or r×r (full).
    * with fewer bits, codes in place of basis and moments, and their scales (`lowrank_optim.quantization`).
    * with `overlap_threshold`, `gap` and `overlaps` on the CPU; the residual's `limiter_norm` or `error`.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> weight = torch.nn.Parameter(torch.zeros(64, 32))
        >>> optimizer = lo.LowRankOptimizer([weight], rule=lo.Adam(), lr=0.1, rank=4, projector=lo.SVD())
        >>> weight.grad = torch.ones(64, 32)
        >>> optimizer.step()
        >>> optimizer.state[weight]["exp_avg"].shape
        torch.Size([64, 4])
    """

    matrix_options: ClassVar[Mapping[str, Any]] = {}
    """What `param_groups` is told of the matrices where no rank is asked for; nothing for optimizers that need one."""

    _in_backward: Attachment | None = None  # set while `lowrank_optim.update_in_backward` is attached
    _watch: Watch | None = None  # set while `lowrank_optim.watch_step` reports
    _group_options: ClassVar[Mapping[str, Any]] = {}  # what a subclass keeps in every group besides, with defaults
    _mask_on_device = False  # tests set it, to run on the CPU what accelerators run

    def __init__(
        self,
        params: Params,
        *,
        rule: str | Rule,
        dense_rule: str | Rule | None = None,
        residual: str | Residual = "none",
        parts: Iterable[Part] = (),
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        main: Rule = as_part("rule", rule)
        dense: Rule = main if dense_rule is None else as_part("rule", dense_rule)
        rest: Residual = as_part("residual", residual)
        own = {**dense.options(), **main.options(), **rest.options()}
        valid = plain_options({**DEFAULTS, **own, **self._group_options, "lr": lr, "weight_decay": weight_decay})
        options, projector = take_options(options, valid, f"{type(self).__name__}(…)")
        self.parts = PartRegistry(main, dense, projector, rest, parts)
        defaults = {**valid, **options, "projector": projector.name, "rule": main.name, "residual": rest.name}
        self.plans, self._skipped = Plans(self.parts), SkippedUpdates()
        super().__init__(params, defaults)
        check_agreement(self)

    # ------------------------------------------------------------------------------------------------------------- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch. Its options and parameters are checked, and their state made, before anything changes."""
        with self.parts.tentatively():
            self._add_param_group(param_group)

    def _add_param_group(self, param_group: Mapping[str, Any]) -> None:
        group = complete_group(param_group, self.parts, self.defaults, self._group_options)
        self.check_options(group)
        tensors, named = list_params(group)
        plans: dict[Tensor, ParamPlan] = {}
        if all(isinstance(tensor, Tensor) for tensor in tensors):  # torch refuses anything else, and says why
            plans = self.plans.of_group(named, tensors, len(self.param_groups), len(self.plans))
        check_trainable(plans)
        if self._in_backward is None:
            check_free(plans)
        else:
            self._in_backward.check(plans, [named])
        states = {
            p: init_state(p, named, plan) for p, plan in plans.items() if p.requires_grad and self._is_trained(named)
        }
        super().add_param_group(group)
        self.plans.set_group(len(self.param_groups) - 1, self.param_groups[-1], plans)
        self.state.update(states)
        if self._in_backward is not None:
            self._in_backward.refresh_hooks()

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise ValueError where a complete group says what cannot be."""
        check_group(options, self.parts.of(options))

    change_group = change_group
    reset_state = reset_state
    keep_rows = keep_rows

    # -------------------------------------------------------------------------------------------------------------- plans

    def plan_of(self, param: Tensor) -> ParamPlan:
        """How a parameter is trained."""
        return self.plans[param]

    def check_members(self) -> None:
        """Raise RuntimeError for a parameter in the groups that is another one, or has another shape, than at construction."""
        adopting(self, check_members, self.param_groups, self.plans)

    # --------------------------------------------------------------------------------------------------------------- step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns the closure's value. The closure runs with gradients enabled.

        With `lowrank_optim.update_in_backward`, backward has updated them, and only what is left is done here. In a function given
        to `torch.compile` the step runs outside of the graph. Autocast changes nothing.
        """
        if torch.compiler.is_compiling():
            return kernels.outside_graph(LowRankOptimizer.step, self, closure)
        loss = None if closure is None else torch.enable_grad()(closure)()
        with kernels.PlainModes():
            self.plans.check_structure(self.param_groups)
            self._enter([param for group in self.param_groups for param in group["params"]])
            if self._in_backward is not None:
                self._in_backward.finish_step()
            else:
                self.param_groups[0].pop(MEASURED, None)  # from a checkpoint written with updates in backward
                together(self._steps())
            self._skipped.poll()
            self._end_step()
            if self._watch is not None:
                self._watch.end()
        return loss

    @kernels.no_autograd_no_autocast
    def enter(self, params: Iterable[Tensor]) -> None:
        """Let parameters into a step: all are checked before anything changes; state and gradients are then as the step needs them.

        Raises:
            RuntimeError: a parameter is not one that the optimizer was built with, or has another shape than its state is for.
            ValueError: a parameter that cannot be written to, or a gradient that no step can use.
        """
        self._enter(list(params))

    def _enter(self, params: list[Tensor]) -> None:
        moved, unsettled = adopting(self, enter, params, self.plans, self.param_groups)
        if moved:
            follow(self, params)
        for param in unsettled:
            settle_gradient(param)

    def _steps(self) -> Iterator[Step]:
        """The steps of all parameters that have a gradient."""
        at_once = self.plans.has_units and self._watch is None and not self._mask_on_device
        whole = plain_groups(self.param_groups, self.plans, self.state, self._admits) if at_once else {}
        (norms, squares), watch = first_norms(self.param_groups, self.plans, whole), self._watch
        if self.plans.has_units:
            check_units(self.plans, self.param_groups, self.state, whole)
        for number, group in enumerate(self.param_groups):
            if (plain := whole.get(number)) is not None:
                yield plain.step(self._members(plain.plan), self._skipped, self.plans)
                continue
            for param in group["params"]:
                plan = self.plans[param]
                usable = param.grad is not None and self._admits(param, group)
                if not usable or (plan.unit and not is_last_of_unit(param, plan)):
                    continue
                if plan.unit:
                    step = joint_step(self._members(plan), [norms.get(member) for member in plan.unit])
                else:
                    step = self.trained(param).begin(norms.get(param), squares.get(param))
                yield step if watch is None else watch.follow(step, plan.unit or (param,))

    def _members(self, plan: ParamPlan) -> list[TrainedParam]:
        """The parameters that are stepped together; those without a gradient have no state here."""
        group, plans = self.param_groups[plan.group], self.plans
        return [self.trained(p, (group, plans[p], {}) if p.grad is None else None) for p in plan.unit]

    @kernels.no_autograd_no_autocast
    def step_param(self, param: Tensor, norm: Tensor | None = None) -> None:
        """Update one parameter from its gradient, and no other but those that its rule steps with it. No gradient, no change.

        `norm`, where it is known already, is finite where the gradient is.
        """
        self.enter([param])
        plan = self.plan_of(param)
        if param.grad is None or not self._admits(param, self.param_groups[plan.group]):
            return
        if plan.unit:
            check_unit(plan, self.plans, self.param_groups[plan.group], self.state)
        alone(joint_step(self._members(plan)) if plan.unit else self.trained(param).begin(norm))

    def trained(
        self, param: Tensor, changed: tuple[Mapping[str, Any], ParamPlan, dict[str, Tensor]] | None = None
    ) -> TrainedParam:
        """One parameter in the step that comes: its plan, its state (made if there is none), what can be done with its gradient.

        `changed`: group, plan and state in place of those that it has.
        """
        if changed is None:
            plan, state = self.plans[param], self.state.get(param, {})
            group: Mapping[str, Any] = self.param_groups[plan.group]
            if not state:
                self.state[param] = state = init_state(param, group, plan)
        else:
            group, plan, state = changed
        if plan.sharding is not LOCAL:
            state = LocalState(state, plan.placed)
        moments, offset = open_moments(group, plan, state, param.dtype), self.plans.offset(param, plan, group)
        return TrainedParam(param, group, plan, state, moments, offset, self._skipped, self._mask_on_device)

    def _admits(self, param: Tensor, group: Mapping[str, Any]) -> bool:
        """Whether a gradient may be used; subclasses drop those of parameters that sleep."""
        return True

    def is_trained(self, param: Tensor) -> bool:
        """Whether the optimizer trains this parameter now: it is one of its own, and does not sleep."""
        plan = self.plans.get(param)
        return plan is not None and self._is_trained(self.param_groups[plan.group])

    def may_begin(self, group: Mapping[str, Any]) -> bool:
        """Whether a parameter without state in a checkpoint, which was frozen then, begins afresh."""
        return True

    def _is_trained(self, group: Mapping[str, Any]) -> bool:
        return True

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

    def skipped_updates(self) -> dict[str, int]:
        """How many updates were left out because a gradient was not finite, by parameter name; waits for the device."""
        return self._skipped.read()

    # -------------------------------------------------------------------------------------------------------------- state

    def state_device(self, name: str, param: Tensor, group: Mapping[str, Any]) -> torch.device:
        """Where a state tensor of this name belongs."""
        return torch.device("cpu") if self.plans[param].is_on_host(name) else param.device

    state_template = state_template
    followed = followed

    def state_dict(self) -> dict[str, Any]:
        """The state and the options of every group, as in torch: tensors and Python's own numbers only."""
        self.check_members()
        for group in self.param_groups:  # where schedulers put numbers of other kinds
            group.update(plain_options(group, keep_tensors=True))
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved state, every tensor in its own type, on the device of its parameter.

        Learning rates and other hyperparameters come from the checkpoint, as in torch. Parameters are matched by their names where
        both sides know them, else by their order. Also takes a `torch.optim.AdamW` checkpoint for groups without `rank`.

        Raises:
            ValueError: a checkpoint of another method, rank or model; the message lists every difference, and the optimizer is as it
                was.
        """
        self.check_members()
        follow(self, list(self.plans))
        checkpoint.load(self, state_dict)
        self.plans.renew(self.param_groups)
        if self._in_backward is not None:
            self._in_backward.restart()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "parts": self.parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "parts" in state:  # unpickled or copied
            self.plans, self._skipped = Plans(self.parts), SkippedUpdates()
        self.plans.renew(self.param_groups)
