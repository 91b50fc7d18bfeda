"""What the step of one parameter works on: its weights, moments, subspace and random numbers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from lowrank_optim import kernels
from lowrank_optim.kernels import WeightError
from lowrank_optim.kernels.counter_rng import PURPOSE_BASIS, PURPOSE_ROUNDING, PURPOSE_STATE, derive_key, make_key
from lowrank_optim.projectors import Basis, StepParams
from lowrank_optim.quantization import scale_is_due
from lowrank_optim.quantization.coded_moments import CodedMoments
from lowrank_optim.rules import Context, Direction, soft_threshold_
from lowrank_optim.sharding.dtensor import local, local_grad
from lowrank_optim.sharding.param_sharding import LOCAL
from lowrank_optim.step.nonfinite import SkippedUpdates
from lowrank_optim.step.param_plan import ParamPlan
from lowrank_optim.step.refresh_schedule import latest_refresh, moment_steps
from lowrank_optim.step.state_names import WEIGHT_ERROR


def param_key(group: Mapping[str, Any], plan: ParamPlan, step: int, purpose: int = PURPOSE_BASIS) -> int:
    """The stream of random numbers of one parameter at one step, for one purpose.

    A layer that sleeps and wakes counts its steps from 0 each time, but its random numbers must not repeat: `born` tells its visits
    apart.
    """
    key, born = make_key(group["seed"], plan.index, step, purpose), group.get("born")
    return derive_key(key, born) if born else key


class Place(NamedTuple):
    """Where a chunk of weights begins in the whole parameter, and what rounding drops from it."""

    start: int
    error: WeightError | None


@dataclass
class ParamStep:
    """One parameter in one step. As a context: moments that were decoded, and master weights, are written back at its end.

    group: of the parameter.
    plan: how it is trained.
    state: the optimizer's state of it, the local parts.
    moments: the rule's tensors in the compute type: the state itself, or, where it is coded, decoded when they are asked for.
    offset: how many steps before a multiple of its gap it is refreshed.
    skipped: the counters of updates that were left out.
    mask_on_device: do on the CPU what accelerators do with gradients that are not finite.
    pull: what is added to R in this step: a function of the subspace and of the weights' matrix view.
    squares: Σ x² of the gradient's lines, where they are known.
    """

    param: Tensor
    group: Mapping[str, Any]
    plan: ParamPlan
    state: dict[str, Tensor]
    moments: dict[str, Tensor] | CodedMoments
    offset: int
    skipped: SkippedUpdates
    mask_on_device: bool = False
    pull: Callable[[Basis, Tensor], Tensor] | None = None
    squares: Tensor | None = None

    def __enter__(self) -> Self:
        if (master := self.state.get("master")) is not None:
            # Where somebody else has changed the weights (loaded others, say), theirs count.
            weight = local(self.param)
            master.copy_(torch.where(master.to(weight.dtype) == weight, master, weight))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(f"in the step of parameter {self.plan.name}")
            return
        if type(self.moments) is CodedMoments:
            self.moments.close(int(self.state["step"]))
        if "master" in self.state:
            local(self.param).copy_(self.state["master"])

    @property
    def error(self) -> WeightError | None:
        """What rounding drops from the weights, as the step works on them; None where it is not kept."""
        error = kept_error(self.state)
        return error and (error.map(self.plan.view) if self.plan.is_matrix else error)

    @property
    def weight(self) -> Tensor:
        """What is updated: the parameter, or its master copy where the state has one."""
        if "master" in self.state:
            return self.state["master"]
        return self.param if self.plan.sharding is LOCAL else local(self.param)

    def local_grad(self) -> Tensor:
        """The gradient's local part, as the step works on it: the matrix view, or its own shape."""
        grad = local_grad(self.param)
        return self.plan.view(grad) if self.plan.is_matrix else grad

    # ----------------------------------------------------------------------------------------------------------- subspace

    def basis(self) -> Basis:
        """The subspace that stands."""
        refreshed = max(int(self.state["last_refresh"]), 0)
        return self.plan.basis(self.state, param_key(self.group, self.plan, refreshed))

    def basis_of(self, state: Mapping[str, Tensor], refreshed: int) -> Basis:
        """The subspace in a state, refreshed last at step `refreshed`."""
        return self.plan.basis(state, self.key(max(refreshed, 0)))

    @property
    def refresh_is_due(self) -> bool:
        """Whether this step gives a matrix a new subspace, if its gradient allows it."""
        space, state = self.plan.space, self.state
        if space is None or space.rank == 0:
            return False
        gap = state["gap"] if "gap" in state else self.group["update_proj_gap"]  # its own, where refreshes are lazy
        scheduled = latest_refresh(int(state["step"]), int(gap), self.offset)
        if (most := self.plan.projector.refreshes) is not None:
            scheduled = min(scheduled, most * int(gap))
        return int(state["last_refresh"]) < scheduled

    def key(self, step: int, purpose: int = PURPOSE_BASIS) -> int:
        """See `param_key`."""
        return param_key(self.group, self.plan, step, purpose)

    # ------------------------------------------------------------------------------------------------- gradient and rule

    def finite(self, seen: Tensor) -> Literal[False] | Tensor | None:
        """Whether this gradient may be used: None for yes, False for no, or, where the host would have to wait, a 0-d bool."""
        return self.skipped.check(seen, self.plan, self.group["on_nonfinite"], self.mask_on_device)

    def context(self, weight: Tensor, ok: Tensor | None, dense: bool, norms: bool = False) -> Context:
        """What the rule may know of this step, which the parameter's counter includes already; `weight` is the matrix view."""
        age = float(self.state["step"])
        steps = age if dense else moment_steps(self.state, self.group)
        fresh = (steps if self.plan.projector.moments_change_shape else age) == 1
        return Context(steps, age, weight, ok, dense, fresh, self.plan.sharding, norms, self.squares)

    def fit_columns(self, moments: CodedMoments, grad: Tensor, since: int, ok: Tensor | None) -> None:
        """Measure the column scales of coded moments where that is due; `since` is the step of their last change of basis."""
        if "col_scale" not in self.state or not scale_is_due(int(self.state["step"]) - since):
            return
        share, sharding = self.plan.rule.gradient_share(self.group), self.plan.sharding.reduced
        grad = self.plan.rule.moment_gradient(grad, self.group)
        rows = sharding.sum(moments.row_sums(grad, share), -1)
        columns = sharding.sum(moments.column_sums(grad, share, rows), -2)
        moments.rescale_(columns, int(self.state["step"]), ok)

    # ------------------------------------------------------------------------------------------------------------ weights

    def write(self, direction: Direction | None, factor: float, ok: Tensor | None) -> StepParams:
        """Step size, what is kept of the weights, and how they are rounded."""
        group = self.group
        lr = float(group["lr"]) * float(group["lr_factor"])
        if self.plan.position % 2 and group.get("pairs"):  # the second factor of a pair
            lr *= float(group["lr_ratio"])
        size = lr if direction is None or direction.step is None else direction.step
        decay = lr if direction is None or direction.decay is None else direction.decay
        # Rules and residuals are odd functions of the gradient: to ascend is to descend with the sign turned.
        alpha = -size * factor if group["maximize"] else size * factor
        kept = group["weight_decay"] if isinstance(group["weight_decay"], Tensor) else float(group["weight_decay"])
        keep = 1.0 - decay * (kept * float(group["decay_factor"]))
        if group["match_reference"] and self.plan.rule.decays_last:
            alpha *= float(keep)  # decay after the update: (1 − ηλ)(W − ηU)
        key, weight = None, self.weight
        coded = getattr(weight, "rounds_stochastically", False)  # `lowrank_optim.nn.QuantizedWeight`
        if coded or (group["stochastic_rounding"] and weight.dtype == torch.bfloat16):
            key = self.key(int(self.state["step"]), PURPOSE_ROUNDING)
        return StepParams(alpha, keep, ok, key, self.error if "weight_error" in self.state else None)

    @property
    def matrix_weight(self) -> Tensor:
        """What is updated, as the step works on it: the matrix view (a copy where strides allow none), or its own shape."""
        return self.plan.view(self.weight) if self.plan.is_matrix else self.weight

    def put_back(self, matrix: Tensor) -> None:
        """Copy a matrix view into the weights where it is none: a convolution whose strides allow no view."""
        weight = self.weight
        if matrix is not weight and matrix.data_ptr() != weight.data_ptr():
            weight.copy_(matrix.view(weight.shape))

    def shrink(self, ok: Literal[False] | Tensor | None) -> None:
        """The proximal step of the option `l1`, after the update: p ← sign(p)·max(|p| − ηξ, 0)."""
        if ok is not False:
            soft_threshold_(self.weight, abs(self.write(None, 1.0, None).alpha) * float(self.group["l1"]), ok)

    @contextmanager
    def gathered(self) -> Iterator[tuple["ParamStep", Tensor]]:
        """The step and the gradient of the whole parameter, where moments are kept whole although the weights are not."""
        weight, sharding = self.weight, self.plan.sharding.matrix
        dims = range(-weight.dim(), 0)
        whole, grad = sharding.gather(weight, *dims), sharding.gather(local_grad(self.param), *dims)
        state = {name: tensor for name, tensor in self.state.items() if name != "master"}
        errors = {name: sharding.gather(state[name], *dims) for name in WEIGHT_ERROR if name in state}
        state |= errors
        yield (
            replace(self, param=whole, plan=replace(self.plan, sharding=LOCAL), state=state),
            self.plan.view(grad) if self.plan.is_matrix else grad,
        )
        weight.copy_(sharding.part(whole))
        for name, error in errors.items():
            self.state[name].copy_(sharding.part(error))

    def dense_parts(
        self, grad: Tensor, elementwise: bool
    ) -> Iterator[tuple[Tensor, Tensor, Mapping[str, Tensor], Place]]:
        """(weights, gradient, moments, where they are) of the whole parameter, or of chunks of it in order.

        Chunks where the rule treats every element for itself and all tensors lie in memory in the same order.
        """
        weight, first, error = self.matrix_weight, self.plan.sharding.matrix.start, self.error
        moments = {name: tensor for name, tensor in self.moments.items() if tensor.shape == weight.shape}
        parted = elementwise and not hasattr(weight, "codes")  # of a quantised weight, parts would be copies
        parted = parted and (error is None or error.is_contiguous())
        if not parted or not all(tensor.is_contiguous() for tensor in (weight, grad, *moments.values())):
            yield weight, grad, self.moments, Place(first, error)
            return
        for chunk in kernels.row_chunks(weight.numel(), 1):
            parts = {name: tensor.view(-1)[chunk] for name, tensor in moments.items()}
            own = error and error.map(lambda part: part.view(-1)).at(chunk)
            yield weight.view(-1)[chunk], grad.view(-1)[chunk], parts, Place(first + chunk.start, own)


def kept_error(state: Mapping[str, Tensor]) -> WeightError | None:
    """What rounding drops from the weights, as it stands in a state."""
    return WeightError(state["weight_error"], state.get("weight_error_low")) if "weight_error" in state else None


def open_moments(
    group: Mapping[str, Any], plan: ParamPlan, state: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor] | CodedMoments:
    """The moments in a state, as the rule sees them."""
    bits = group["state_bits"]
    if bits == 32 or not plan.is_coded(bits):
        return state
    key = param_key(group, plan, 0, PURPOSE_STATE)
    return CodedMoments(
        state, plan.moment_shape(state), bits, kernels.compute_dtype(dtype), key, plan.sharding.reduced.start
    )
