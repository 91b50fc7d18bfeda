"""How a parameter is seen as a matrix, and whether it is trained in a subspace.

Decided from the parameter's global shape and its group's options only, so that the layout of the state never depends on gradients,
devices or the number of processes.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.projectors import Projector, Space

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

    @property
    def low_rank(self) -> bool:
        return self.space is not None


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


def make_layout(
    param: Tensor, name: str, index: int, group: Mapping[str, Any], projector: Projector, warned: set[str]
) -> Layout:
    """The layout of one parameter. Logs once for each reason why a matrix of a low-rank group is dense."""
    space = None
    shape = matrix_shape(param.shape, group["layout"])
    if group["rank"] is not None and shape is not None:
        short = min(shape[-2:])
        rank = resolve_rank(group["rank"], short)
        if group["match_reference"]:
            rank = min(rank, short)  # as the released code: a slice that ends early
        if 1 <= rank <= short:
            space = projector.space(shape, rank, group["proj_type"], kernels.compute_dtype(param.dtype))
        elif "rank" not in warned:
            warned.add("rank")
            _log.info("%s %s is trained densely: its short side is below rank %d", name, tuple(param.shape), rank)
    return Layout(name, index, group["layout"], space, projector, param.device)


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
