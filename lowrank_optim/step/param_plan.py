"""How each parameter is trained: as which matrix, in which subspace, by which parts. Resolved once from its group.

Decided from the parameter's global shape and its group's options only, so that the state never depends on gradients,
devices or the number of processes.
"""

import hashlib
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.groups.matrices import is_low_rank, make_space, matrix_shape, matrix_view
from lowrank_optim.groups.names import plain_name
from lowrank_optim.groups.parts import Parts
from lowrank_optim.kernels.counter_rng import PURPOSE_BLOCKS, make_key
from lowrank_optim.projectors import Basis, Coordinate, Projector, Refresh, SubspaceSpec, float64_sums
from lowrank_optim.quantization.coded_moments import is_coded
from lowrank_optim.residuals.base import Residual
from lowrank_optim.rules import Rule
from lowrank_optim.sharding.dtensor import (
    check_owner,
    check_placements,
    dense_param_sharding,
    dense_sharding,
    is_sharded,
    local,
    low_rank_sharding,
    matrix_sharding,
    placed,
)
from lowrank_optim.sharding.param_sharding import LOCAL, ParamSharding
from lowrank_optim.step.state_names import STEP_STATE

_log = logging.getLogger("lowrank_optim")


@dataclass(frozen=True)
class ParamPlan:
    """How one parameter is trained: what its group says of it, resolved once.

    name: for messages.
    index: the parameter's stream of random numbers: from its name where it has one, else its position.
    layout: how it is seen as a matrix.
    space: the low-rank problem; None where it is trained densely.
    rule, projector, residual: the parts of its method.
    device, dtype, shape: of the parameter.
    shards: where the rest of a sharded parameter lies.
    group: number of its param group.
    position: in its group.
    named: whether its name is its own, and not made of positions.
    unit: the parameters that a joint rule steps together, this one among them; empty for other rules.
    unit_shapes: of what this process holds of each of them, as the rule sees them.
    folded: the shape of its moments on all processes, where that is not the gradient's (`Rule.moment_shape`).
    sum_dtype: the type that sums of the subspace are carried out in, where that is not the compute type (`exact_sums`).
    memo: `rules.Unit.memo` of a unit, with its first parameter.
    """

    name: str
    index: int
    layout: str
    space: SubspaceSpec | None
    rule: Rule
    projector: Projector
    residual: Residual
    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...] = ()
    sharding: ParamSharding = LOCAL
    group: int = 0
    position: int = 0
    named: bool = False
    unit: tuple[Tensor, ...] = ()
    unit_shapes: tuple[tuple[int, ...], ...] = ()
    sum_dtype: torch.dtype | None = None
    folded: tuple[int, ...] | None = None
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def side(self) -> str | None:
        return None if self.space is None else self.space.side

    @property
    def place_in_unit(self) -> int:
        """The position of this parameter among those of its unit."""
        return self.position % max(len(self.unit), 1)

    @property
    def place(self) -> tuple[int, int]:
        """Group and position, which no other parameter has."""
        return self.group, self.position

    def lies(self, name: str) -> str:
        """Where a state tensor of this name lies, as the part that owns it says."""
        owners = (STEP_STATE, self.rule.state_lies, self.projector.state_lies, self.residual.state_lies)
        for known in (name, name.removesuffix("_scale").removesuffix("_zero")):  # codes have scales
            for owner in owners:
                if known in owner:
                    return owner[known]
        return "reduced"

    def is_on_host(self, name: str) -> bool:
        """Whether the host reads a state tensor in every step, so that it is kept on the CPU wherever the parameter lives."""
        return self.lies(name) == "host"

    def placed(self, name: str, tensor: Tensor) -> Tensor:
        """The local part of a state tensor as it is kept: a DTensor where the parameter is one."""
        if self.sharding is LOCAL or self.is_on_host(name):
            return tensor
        return placed(tensor, self.sharding.sharding_of(self.lies(name), self.side))

    def view(self, tensor: Tensor) -> Tensor:
        """The matrix view of a tensor of the parameter's shape."""
        return tensor if self.layout == "auto" and len(self.shape) == 2 else matrix_view(tensor, self.layout)

    @property
    def is_matrix(self) -> bool:
        """Whether the step works on the matrix view."""
        return self.space is not None or self.rule.on_matrices

    def whole_moment_shape(self, state: Mapping[str, Tensor] | None = None) -> tuple[int, ...]:
        """The shape of the moments on all processes together: now, or, without a state, at its largest."""
        if self.space is not None:
            return self.projector.reduced_shape(self.space, state)
        return self.folded or self._dense_shape

    @property
    def _dense_shape(self) -> tuple[int, ...]:
        """The shape of the whole gradient that the rule sees, if it is not projected."""
        return (matrix_shape(self.shape, self.layout) or self.shape) if self.rule.on_matrices else self.shape

    @cached_property
    def elements(self) -> int:
        """What a waiting step keeps in memory: elements of R as a whole, at its largest, or of the largest basis if that has more."""
        assert self.space is not None
        *batch, lines, cols = self.whole_moment_shape()
        return math.prod(batch) * max(lines, self.space.rows, self.space.cols) * cols

    def moment_shape(self, state: Mapping[str, Tensor] | None) -> tuple[int, ...]:
        """The shape of the part of them that this process holds."""
        return self.sharding.moment_shape(self.whole_moment_shape(state))

    def gradient_shape(self, state: Mapping[str, Tensor] | None) -> tuple[int, ...]:
        """The shape of the gradient of which they are the moments."""
        if self.folded is None:
            return self.moment_shape(state)
        whole = self._dense_shape
        return whole if self.sharding.whole else self.sharding.matrix.local_shape(whole)

    def is_coded(self, bits: int) -> bool:
        """Whether the moments are stored in few bits; decided from the global shape only."""
        return not self.unit and is_coded(bits, math.prod(self.whole_moment_shape()))

    def basis(self, state: Mapping[str, Tensor], key: int) -> Basis:
        """The subspace that a state stands for."""
        assert self.space is not None
        if self.sum_dtype is not None:
            return float64_sums.basis_of(self.projector, self.space, state, key, self.device)
        return self.projector.basis(self.space, state, key, self.device)

    def refresh(self, request: Refresh) -> dict[str, Tensor] | None:
        """The projector's tensors for a new subspace, see `Projector.refresh`."""
        if self.sum_dtype is not None:
            return float64_sums.refresh(self.projector, request)
        return self.projector.refresh(request)


def plan_group(
    named: Iterable[tuple[str | None, Tensor]],
    first: int,
    number: int,
    group: Mapping[str, Any],
    parts: Parts,
    warned: set[str],
    taken: Iterable[int] = (),
) -> dict[Tensor, ParamPlan]:
    """The plans of a group's parameters, with their names where these are known.

    Logs once why a matrix of a low-rank group is dense, and warns where all are.

    Args:
        first: position of the first parameter in the optimizer.
        number: of the group.
        warned: reasons that were logged, modified in place.
        taken: streams of random numbers of other groups; of two parameters of one name, the second has that of its position.

    Raises:
        ValueError: a parameter that cannot be trained, or not by these parts.
    """
    plans: dict[Tensor, ParamPlan] = {}
    projector, first_key, used = parts.projector, first, set(taken)
    for position, (given, param) in enumerate(named):
        name, index = given or f"{number}.{position}", first + position if given is None else name_key(given)
        index = first + position if index in used else index
        used.add(index)
        first_key = index if position == 0 else first_key
        check_parameter(param, name, group, projector)
        space = None
        shape = matrix_shape(param.shape, group["layout"])
        if is_low_rank(group) and shape is not None:
            space = make_space(shape, group, projector, kernels.compute_dtype(param.dtype))
            if space is None and "rank" not in warned:
                warned.add("rank")
                _log.info(
                    "%s %s is trained densely: its short side is below rank %s", name, tuple(param.shape), group["rank"]
                )
        wide = torch.float64 if group["exact_sums"] and kernels.compute_dtype(param.dtype) == torch.float32 else None
        own = projector
        if space is not None and space.rank == 0 and not projector.moments_change_shape:
            # Density 0: no subspace of any kind.
            own, space = Coordinate("columns"), replace(space, side="right", basis_bits=32)
        rule = parts.rule_for(shape)
        if space is not None and not rule.in_subspaces:
            raise ValueError(
                f"parameter {name} {tuple(param.shape)} is in a group with rank={group['rank']!r}, density={group['density']!r}, and "
                f"the rule {rule.name!r} works on whole gradients only: leave rank and density out, or give the group another rule"
            )
        folded = None if shape is None or space is not None else rule.moment_shape(shape, group)
        folded = folded if folded != shape else None
        sharding = make_sharding(param, space, own, group, rule, folded)
        space = None if space is None else replace(space, sharding=sharding)
        plan = ParamPlan(name, index, group["layout"], space, rule, own, parts.residual, param.device, param.dtype)
        plan = replace(plan, shape=tuple(param.shape), sharding=sharding, group=number, position=position)
        plan = replace(plan, named=given is not None, sum_dtype=wide, folded=folded)
        check_sharding(plan, param, group)
        if rule.on_matrices:
            check_matrix(plan, shape, group)
        plans[param] = plan
    low_rank = {param: plan.space for param, plan in plans.items() if plan.space is not None}
    sides = [min(view[-2:]) for param in plans if (view := matrix_shape(param.shape, group["layout"])) is not None]
    if is_low_rank(group) and sides and not low_rank and "all" not in warned:
        warned.add("all")
        _log.warning(
            "rank is %s, and the short sides of the %d matrices in group %d have %d elements at most: all are trained densely; take "
            "a smaller rank, or a fraction of the short side (rank=0.25)",
            *(group["rank"], len(sides), number, max(sides)),
        )
    key = make_key(group["seed"], first_key, 0, PURPOSE_BLOCKS)
    arranged = projector.arrange(list(low_rank.values()), group["density"], key)
    for param, space in zip(low_rank, arranged, strict=True):
        plans[param] = replace(plans[param], space=space)
    return plans


def name_key(name: str) -> int:
    """The stream of random numbers of a parameter of this name, whatever has wrapped its module."""
    return int.from_bytes(hashlib.blake2b(plain_name(name).encode(), digest_size=8).digest(), "little")


def make_sharding(
    param: Tensor,
    space: SubspaceSpec | None,
    projector: Projector,
    group: Mapping[str, Any],
    rule: Rule,
    folded: tuple[int, ...] | None = None,
) -> ParamSharding:
    """Where the parts of a sharded parameter and of its state lie; `folded` as in the plan."""
    if not is_sharded(param):
        return LOCAL
    bits = group["state_bits"]
    if space is None:
        coded = bits in (8, 4) and is_coded(bits, math.prod(folded or param.shape))
        shape = matrix_shape(param.shape, group["layout"]) if rule.on_matrices else None
        matrix = None if shape is None else matrix_sharding(param, group["layout"], shape)
        return replace(dense_param_sharding(param, coded, matrix, folded), param=dense_sharding(param))
    reduced = projector.reduced_shape(space)
    coded = bits in (8, 4) and is_coded(bits, torch.Size(reduced).numel())
    matrix = matrix_sharding(param, group["layout"], space.shape)
    return replace(low_rank_sharding(matrix, reduced, projector.contracted(space), coded), param=dense_sharding(param))


def check_matrix(plan: ParamPlan, shape: tuple[int, ...] | None, group: Mapping[str, Any]) -> None:
    """Raise ValueError where a rule for matrices meets a parameter that is none, or one that it cannot train."""
    kind, rule = f"parameter {plan.name} {plan.shape}", plan.rule
    if shape is None:
        raise ValueError(
            f"{kind} is no matrix, and the rule {rule.name!r} trains matrices only: give it a group with another rule "
            f'({{"params": …, "rule": lo.Adam()}}), or let lo.param_groups(model, rule={rule.name!r}) and the dense_rule of '
            "lo.LowRankOptimizer, or lo.MuonAdamW, see to it"
        )
    try:
        rule.check_matrix(shape, plan.side, plan.sharding, group)
    except ValueError as error:
        raise ValueError(f"{kind} {error}") from None


def check_sharding(plan: ParamPlan, param: Tensor, group: Mapping[str, Any]) -> None:
    """Raise ValueError where a sharded parameter meets a part of the method that needs all of it."""
    if plan.sharding is LOCAL:
        return
    rule, projector, residual, low_rank = plan.rule, plan.projector, plan.residual, plan.space is not None
    kind = f"parameter {plan.name} {tuple(param.shape)} lies on a mesh as {tuple(param.placements)}"  # type: ignore[attr-defined]
    for part, knows in (
        (rule, rule.elementwise or rule.knows_shards),
        (projector, projector.knows_shards or not low_rank),
        (residual, residual.knows_shards or not low_rank),
    ):
        if not knows:
            raise ValueError(
                f"{kind}, but {type(part).__name__} does not say that it works on parts of a matrix (knows_shards = True); use one "
                "of the package's, DistributedDataParallel, or one process"
            )
    if low_rank and not rule.rotates_shards and group["on_refresh"] == "rotate":
        raise ValueError(
            f'{kind}; {type(rule).__name__} cannot rotate the moments of sharded matrices: use on_refresh "keep" or "reset"'
        )
    coded = group["state_bits"] in (8, 4) and low_rank and not projector.contracted(plan.space)  # type: ignore[arg-type]
    if coded and plan.sharding.matrix.splits(-1):
        raise ValueError(
            f"{kind}, along its rows' elements, which {projector.name!r} with state_bits={group['state_bits']} codes in blocks of "
            "256: use state_bits 32 or 16, or Shard(0)"
        )


def shares_elements(tensor: Tensor) -> bool:
    """Whether some elements share memory (`expand`), as far as strides tell."""
    if tensor.is_contiguous():
        return False
    span = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < span:
                return True
            span += stride * (size - 1)
    return False


def check_proximal(plans: Iterable[ParamPlan], group: Mapping[str, Any]) -> None:
    """Raise ValueError where the option `l1` meets parameters that it cannot shrink."""
    if not group["l1"]:
        return
    for plan in plans:
        if group.get("pairs") and not plan.unit:
            raise ValueError(
                f"l1 is {group['l1']!r} in a group of pairs, but its rule {plan.rule.name!r} steps the factors one by one; use "
                'lowrank_optim.LoRAOptimizer(groups, preconditioner="none"), whose l1 shrinks rank-one terms'
            )
        if plan.dtype not in (torch.float32, torch.float64) and not group.get("master_weights"):
            raise ValueError(
                f"l1 is {group['l1']!r}, but parameter {plan.name} is {plan.dtype}, in which a small threshold is rounded away; keep "
                "such parameters in float32 (param.float())"
            )


def check_memory(param: Tensor, kind: str) -> None:
    """Raise ValueError for a parameter that cannot be written to as its memory lies; `kind` names it in the message."""
    if param.is_neg() or param._is_zerotensor() or shares_elements(local(param)):
        raise ValueError(
            f"{kind} is a view with a negative bit (of a complex conjugate, say), or its elements share memory (expand); only a copy "
            "of it can be trained: param.data = param.data.contiguous().resolve_neg(), or a new parameter"
        )


def check_parameter(param: Tensor, name: str, group: Mapping[str, Any], projector: Projector) -> None:
    """Raise ValueError for a parameter that cannot be trained, naming it and what to use instead."""
    kind = f"parameter {name} {tuple(param.shape)}"
    if not param.requires_grad and not param.is_floating_point():
        return  # frozen, such as weights that another package stores in few bits
    if param.is_complex():
        raise ValueError(
            f"{kind} is {param.dtype}; complex parameters are not supported: optimize torch.view_as_real(parameter), "
            "or give it to torch.optim.AdamW"
        )
    if not param.is_floating_point():
        raise ValueError(f"{kind} is {param.dtype}; an optimizer needs floating-point parameters")
    if param.is_sparse or param.layout != torch.strided:
        raise ValueError(f"{kind} has layout {param.layout}; only dense (strided) parameters can be trained")
    check_memory(param, kind)
    check_owner(param, kind)
    check_placements(param, kind, group["layout"])
    if hasattr(param, "codes") and projector.writes_entries and is_low_rank(group):
        raise ValueError(
            f"{kind} is stored in 8 bits, where single columns, rows or entries cannot be written; use another projector "
            "(FRUGAL: coordinates=None with projector='svd'), or lowrank_optim.nn.dequantize_weights_(model)"
        )
    if group["stochastic_rounding"] and param.dtype == torch.float16:
        raise ValueError(f"{kind} is float16; stochastic rounding is for bfloat16 weights: use those, or float32")
    if group["weight_error_bits"] and (param.dtype == torch.float16 or hasattr(param, "codes")):
        raise ValueError(
            f"{kind} is {'stored in 8 bits' if hasattr(param, 'codes') else 'float16'}; weight_error_bits is for bfloat16 weights: "
            "use those, or weight_error_bits=None in a group of its own"
        )
