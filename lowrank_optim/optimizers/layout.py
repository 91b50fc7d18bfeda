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
from lowrank_optim.kernels.counter_rng import PURPOSE_BLOCKS, make_key
from lowrank_optim.projectors import Coordinate, Projector, Space

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


def matrix_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...] | None:
    """The shape of the parameter's matrix view, or None where it has none (0-D and 1-D).

    "auto": 2-D as it is, 3-D a stack of matrices, 4-D and more (convolutions) first dimension × the rest. "conv": first dimension ×
    the rest, also in 3-D. "transposed": the last two dimensions exchanged.
    """
    if len(shape) < 2:
        return None
    if layout == "conv" or len(shape) > 3:
        return (shape[0], shape[1:].numel() if isinstance(shape, torch.Size) else torch.Size(shape[1:]).numel())
    return (*shape[:-2], shape[-1], shape[-2]) if layout == "transposed" else tuple(shape)


def matrix_view(tensor: Tensor, layout: str) -> Tensor:
    """The tensor in the shape of `matrix_shape`; a view wherever strides allow one (a copy for channels-last convolutions)."""
    if layout == "conv" or tensor.dim() > 3:
        return tensor.reshape(tensor.shape[0], -1)
    return tensor.mT if layout == "transposed" else tensor


def resolve_rank(rank: int | float, short_side: int) -> int:
    """The number of columns of the basis; a float is a fraction of the short side (at least 1)."""
    return max(1, round(rank * short_side)) if isinstance(rank, float) else rank


def is_low_rank(group: Mapping[str, Any]) -> bool:
    """Whether the matrices of a group are trained in subspaces."""
    return group.get("rank") is not None or group.get("density") is not None


def make_space(
    shape: tuple[int, ...], group: Mapping[str, Any], projector: Projector, dtype: torch.dtype
) -> Space | None:
    """The low-rank problem of a matrix in a low-rank group; None where the rank exceeds its short side, so that it is dense."""
    if group["density"] is not None:
        space = projector.space_of_density(shape, float(group["density"]), group["proj_type"], dtype)
    else:
        short = min(shape[-2:])
        rank = resolve_rank(group["rank"], short)
        if group["match_reference"]:
            rank = min(rank, short)  # as the released code: a slice that ends early
        if not 1 <= rank <= short:
            return None
        space = projector.space(shape, rank, group["proj_type"], dtype)
    return replace(space, basis_bits=group["basis_bits"])


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
        layouts[param] = Layout(name, index, group["layout"], space, own, param.device)
    low_rank = {param: layout.space for param, layout in layouts.items() if layout.space is not None}
    key = make_key(group["seed"], first, 0, PURPOSE_BLOCKS)
    arranged = projector.arrange(list(low_rank.values()), group["density"], key)
    for param, space in zip(low_rank, arranged, strict=True):
        layouts[param] = replace(layouts[param], space=space)
    return layouts


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
    if hasattr(param, "device_mesh"):
        raise ValueError(
            f"{kind} is a DTensor; sharded parameters are not supported by this version: use DDP, or one process"
        )
    if group["stochastic_rounding"] and param.dtype == torch.float16:
        raise ValueError(f"{kind} is float16; stochastic rounding is for bfloat16 weights: use those, or float32")
