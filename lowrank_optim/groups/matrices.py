"""How a tensor is seen as a matrix, and the low-rank problem that a group makes of it: from shapes and options only."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.projectors import Projector, SubspaceSpec


def matrix_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...] | None:
    """The shape of the parameter's matrix view, or None where it has none: 0-D, 1-D, and tensors without elements.

    "auto": 2-D as it is, 3-D a stack of matrices, 4-D and more (convolutions) first dimension × the rest. "conv": first dimension ×
    the rest, also in 3-D. "transposed": the last two dimensions exchanged.
    """
    if len(shape) < 2 or 0 in shape:
        return None
    if layout == "conv" or len(shape) > 3:
        return (shape[0], shape[1:].numel() if isinstance(shape, torch.Size) else torch.Size(shape[1:]).numel())
    return (*shape[:-2], shape[-1], shape[-2]) if layout == "transposed" else tuple(shape)


def matrix_view(tensor: Tensor, layout: str) -> Tensor:
    """The tensor in the shape of `matrix_shape`; a view wherever strides allow one (a copy for channels-last convolutions)."""
    if layout == "conv" or tensor.dim() > 3:
        return tensor.reshape(tensor.shape[0], tensor.shape[1:].numel())
    return tensor.mT if layout == "transposed" else tensor


def resolve_rank(rank: int | float, short_side: int) -> int:
    """The number of columns of the basis; a float is a fraction of the short side (at least 1)."""
    return max(1, round(rank * short_side)) if isinstance(rank, float) else rank


def is_low_rank(group: Mapping[str, Any]) -> bool:
    """Whether the matrices of a group are trained in subspaces."""
    return group.get("rank") is not None or group.get("density") is not None


def make_space(
    shape: tuple[int, ...], group: Mapping[str, Any], projector: Projector, dtype: torch.dtype
) -> SubspaceSpec | None:
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
