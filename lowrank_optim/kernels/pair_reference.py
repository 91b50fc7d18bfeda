"""The definitions of the operations on many pairs (`pair_schemas`), in torch ops, for any device.

thin_grams       XᵀY
pair_step_       D ← (1−share)D + share·G S,  X ← keep·X − alpha·D;  X_newᵀX_new and X_oldᵀX_new
thin_turn_       X ← X S
inverse_power    Z f(diag(w)) Zᵀ, f(w) = 1/(w + shift) or 1/(√(w + shift) + added), 0 where w counts as 0
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_optim.kernels import pair_schemas  # noqa: F401 (defines the operations)
from lowrank_optim.kernels.dispatch import definition


def _across(left: Tensor, right: Tensor, wide: bool) -> Tensor:
    return left @ right.mT if wide else left.mT @ right


@definition("thin_grams")
def thin_grams(left: Sequence[Tensor], right: Sequence[Tensor], wide: Sequence[bool]) -> Tensor:
    """XᵀY of every two factors, (N, r, r)."""
    return torch.stack([_across(x, y, lies) for x, y, lies in zip(left, right, wide, strict=True)])


@definition("pair_step_")
def pair_step_(
    weights: Sequence[Tensor],  # modified in place
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],  # modified in place
    small: Tensor,
    numbers: Tensor,
    wide: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """The step of every factor, and the Gram matrices of the new weights with themselves and with the old ones, (N, r, r)."""
    after, cross = [], []
    each = zip(weights, grads, momenta, small, numbers.tolist(), wide, strict=True)
    for weight, grad, momentum, change, (share, alpha, keep), lies in each:
        pair = (change.mT, grad) if lies else (grad, change)
        momentum.addmm_(*pair, beta=1.0 - share, alpha=share)
        old = weight.clone()
        weight.mul_(keep).add_(momentum, alpha=-alpha)
        after.append(_across(weight, weight, lies))
        cross.append(_across(old, weight, lies))
    return torch.stack(after), torch.stack(cross)


@definition("thin_turn_")
def thin_turn_(forms: Sequence[Tensor], small: Tensor, wide: Sequence[bool]) -> None:
    """X ← X S."""
    for form, change, lies in zip(forms, small, wide, strict=True):
        form.copy_(change.mT @ form if lies else form @ change)


@definition("inverse_power")
def inverse_power(matrices: Tensor, shift: Tensor | None, scalars: Tensor, root: bool) -> Tensor:
    """The function of every matrix of a stack, by its eigenvalues."""
    tolerance, added = scalars.tolist()
    values, vectors = torch.linalg.eigh(((matrices + matrices.mT) / 2.0).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
    values = values.clamp_min(0.0)
    if shift is not None:
        values = values + shift.unsqueeze(-1)
    counts = values > tolerance * values[..., -1:]
    power = ((values.sqrt() + added) if root else values).reciprocal()
    result: Tensor = (vectors * torch.where(counts, power, 0.0).unsqueeze(-2)) @ vectors.mT
    return result
