"""How a parameter is seen as a matrix, and whether it is trained in a subspace.

Decided from the parameter's global shape and its group's options only, so that the layout of the state never depends on gradients,
devices or the number of processes.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.groups.matrices import is_low_rank, make_space, matrix_shape, matrix_view
from lowrank_optim.kernels.counter_rng import PURPOSE_BLOCKS, make_key
from lowrank_optim.projectors import Coordinate, Projector, Space
from lowrank_optim.quantization.coded_moments import is_coded
from lowrank_optim.residuals.base import Residual
from lowrank_optim.rules import Rule
from lowrank_optim.sharding.dtensor import (
    check_owner,
    check_placements,
    dense_shards,
    dense_spread,
    is_sharded,
    local,
    low_rank_shards,
    matrix_spread,
)
from lowrank_optim.sharding.param_sharding import HERE, Shards

_log = logging.getLogger("lowrank_optim")


@dataclass(frozen=True)
class Layout:
    """What the step needs to know of one parameter besides its state."""

    name: str  # for messages
    index: int  # position in the param groups: the parameter's stream of random numbers
    layout: str
    space: Space | None  # None: dense
    projector: Projector
    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...] = ()
    shards: Shards = HERE  # where the rest of a sharded parameter lies

    @property
    def side(self) -> str | None:
        return None if self.space is None else self.space.side

    def view(self, tensor: Tensor) -> Tensor:
        """The matrix view of a tensor of the parameter's shape."""
        return matrix_view(tensor, self.layout)

    def whole_moment_shape(self, param: Tensor, state: Mapping[str, Tensor] | None = None) -> tuple[int, ...]:
        """The shape of the gradient that the rule sees, on all processes together: now, or, without a state, at its largest."""
        return tuple(param.shape) if self.space is None else self.projector.reduced_shape(self.space, state)


def make_layouts(
    named: Iterable[tuple[str, Tensor]],
    first: int,
    group: Mapping[str, Any],
    projector: Projector,
    warned: set[str],
) -> dict[Tensor, Layout]:
    """The layouts of a group's parameters, the first of which has position `first` in the optimizer.

    Logs once for each reason why a matrix of a low-rank group is dense.
    """
    layouts: dict[Tensor, Layout] = {}
    for index, (name, param) in enumerate(named, first):
        check_parameter(param, name, group)
        space = None
        shape = matrix_shape(param.shape, group["layout"])
        if is_low_rank(group) and shape is not None:
            space = make_space(shape, group, projector, kernels.compute_dtype(param.dtype))
            if space is None and "rank" not in warned:
                warned.add("rank")
                _log.info(
                    "%s %s is trained densely: its short side is below rank %s", name, tuple(param.shape), group["rank"]
                )
        own = projector
        if space is not None and space.rank == 0 and not projector.resizes:  # density 0: no subspace of any kind
            own, space = Coordinate("columns"), replace(space, side="right", basis_bits=32)
        shards = make_shards(param, space, own, group)
        space = None if space is None else replace(space, shards=shards)
        place = param.device, param.dtype, tuple(param.shape)
        layouts[param] = Layout(name, index, group["layout"], space, own, *place, shards)
    low_rank = {param: layout.space for param, layout in layouts.items() if layout.space is not None}
    key = make_key(group["seed"], first, 0, PURPOSE_BLOCKS)
    arranged = projector.arrange(list(low_rank.values()), group["density"], key)
    for param, space in zip(low_rank, arranged, strict=True):
        layouts[param] = replace(layouts[param], space=space)
    return layouts


def make_shards(param: Tensor, space: Space | None, projector: Projector, group: Mapping[str, Any]) -> Shards:
    """Where the parts of a sharded parameter and of its state lie."""
    if not is_sharded(param):
        return HERE
    bits = group["state_bits"]
    if space is None:
        return replace(dense_shards(param, bits in (8, 4) and is_coded(bits, param.numel())), param=dense_spread(param))
    reduced = projector.reduced_shape(space)
    coded = bits in (8, 4) and is_coded(bits, torch.Size(reduced).numel())
    matrix = matrix_spread(param, group["layout"], space.shape)
    return replace(low_rank_shards(matrix, reduced, projector.contracted(space), coded), param=dense_spread(param))


def check_parts(layout: Layout, param: Tensor, rule: Rule, residual: Residual, group: Mapping[str, Any]) -> None:
    """Raise ValueError where a sharded parameter meets a part of the method that needs all of it."""
    if layout.shards is HERE:
        return
    projector, low_rank = layout.projector, layout.space is not None
    kind = f"parameter {layout.name} {tuple(param.shape)} lies on a mesh as {tuple(param.placements)}"  # type: ignore[attr-defined]
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
    if low_rank and rule.name == "adafactor" and group["on_refresh"] == "rotate":
        raise ValueError(
            f'{kind}; Adafactor cannot rotate the moments of sharded matrices: use on_refresh "keep" or "reset"'
        )
    coded = group["state_bits"] in (8, 4) and low_rank and not projector.contracted(layout.space)  # type: ignore[arg-type]
    if coded and layout.shards.matrix.splits(-1):
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


def check_memory(param: Tensor, kind: str) -> None:
    """Raise ValueError for a parameter that cannot be written to as its memory lies; `kind` names it in the message."""
    if param.is_neg() or param._is_zerotensor() or shares_elements(local(param)):
        raise ValueError(
            f"{kind} is a view with a negative bit (of a complex conjugate, say), or its elements share memory (expand); only a copy "
            "of it can be trained: param.data = param.data.contiguous().resolve_neg(), or a new parameter"
        )


def check_parameter(param: Tensor, name: str, group: Mapping[str, Any]) -> None:
    """Raise ValueError for a parameter that cannot be trained, naming it and what to use instead."""
    kind = f"parameter {name} {tuple(param.shape)}"
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
    if hasattr(param, "codes") and str(group["projector"]).startswith("coordinate"):
        raise ValueError(
            f"{kind} is stored in 8 bits, where single columns, rows or entries cannot be written; use another projector "
            "(FRUGAL: coordinates=None with projector='svd'), or lowrank_optim.nn.dequantize_weights_(model)"
        )
    if group["stochastic_rounding"] and param.dtype == torch.float16:
        raise ValueError(f"{kind} is float16; stochastic rounding is for bfloat16 weights: use those, or float32")
