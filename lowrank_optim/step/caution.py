"""Cautious updates: elements of an update that the gradient disagrees with are left out, and so is decay against the update.

With the update U (the step is W − αU), the gradient G and the decay λ,

    cautious         U ← U ⊙ φ · d/(nnz(φ) + 1),  φ = 1(U ⊙ G > 0), d elements        (Liang et al., 2024, arXiv:2411.16085)
    cautious_decay   W ← W − η λ 1(U ⊙ W ≥ 0) ⊙ W − α U                               (Chen et al., 2025, arXiv:2510.12402)

The released code of the first divides by max(nnz(φ)/d, 10⁻³), which is the same but where hardly anything agrees.

Both need the whole update of a parameter before any of it is applied. It is made as a tensor of its own, in the compute type, of one
parameter at a time: fused operations, which apply an update while it is computed, are not used then.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.projectors import StepParams
from lowrank_optim.sharding.tensor_sharding import TensorSharding


def is_cautious(group: Mapping[str, Any]) -> bool:
    """Whether a group's updates are looked at before they are applied."""
    decays = isinstance(group["weight_decay"], Tensor) or float(group["weight_decay"]) != 0.0
    return bool(group["cautious"]) or (bool(group["cautious_decay"]) and decays)


def cautiously_(
    weight: Tensor, update: Tensor, grad: Tensor, write: StepParams, group: Mapping[str, Any], sharding: TensorSharding
) -> None:
    """W ← keep·W − αU, cautiously; the local parts of a parameter that lies as `sharding` says.

    Args:
        weight: in any view, modified in place.
        update: U in the same view and the compute type, modified in place.
        grad: G, or what is left of it, in any floating type.
        write: α, keep, and how weights are stored.
        group: of the parameter.
    """
    if group["cautious"]:
        mask_(update, grad, sharding)
    if group["cautious_decay"]:
        write = _decay_where_agreed(weight, update, write)
    kernels.apply_dense_(weight, update, start=sharding.start, **vars(write))


def mask_(update: Tensor, grad: Tensor, sharding: TensorSharding) -> None:
    """U ← U ⊙ φ · d/(nnz(φ) + 1), in place; one number is summed over the processes that hold parts of U."""
    kept = torch.zeros((), dtype=torch.int64, device=update.device)
    for chunk in _chunks(update):
        part = update[chunk]
        agree = grad[chunk] * part.sign() > 0  # a product of both could vanish
        part.mul_(agree)
        kept += agree.sum()
    update.mul_(sharding.numel(update) / (sharding.sum(kept).to(update.dtype) + 1.0))


def _decay_where_agreed(weight: Tensor, update: Tensor, write: StepParams) -> StepParams:
    """The decay becomes part of the update, U ← αU + (1 − keep)·W where αU ⊙ W ≥ 0, in place; what is left is a step of 1."""
    dropped = 1.0 - write.keep
    if write.ok is not None:
        dropped = kernels.masked_scalar(write.ok, dropped, 0.0, update.dtype)
    update.mul_(write.alpha)
    for chunk in _chunks(update):
        part = update[chunk]
        value = kernels.joined(weight[chunk], write.error and write.error.at(chunk)).to(update.dtype)
        part.add_(torch.where(part * value.sign() >= 0, value, 0.0) * dropped)
    return replace(write, alpha=1.0, keep=1.0)


def _chunks(tensor: Tensor) -> Any:
    """Some of the leading dimension at a time."""
    if tensor.dim() == 0:
        return [...]
    return kernels.row_chunks(tensor.shape[0], tensor[:1].numel())
