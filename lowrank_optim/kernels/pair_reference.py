"""The definitions of the operations on many pairs (`pair_schemas`), in torch ops, for any device.

thin_grams       XᵀY
pair_step_       D ← (1−share)D + share·G S,  X ← keep·X − alpha·D;  X_newᵀX_new and X_oldᵀX_new
thin_turn_       X ← X S
inverse_power    Z f(diag(w)) Zᵀ, f(w) = 1/(w + shift) or 1/(√(w + shift) + added), 0 where w counts as 0
rite_step_       a step of LoRA-RITE (`rules.Rite`), from those
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


@definition("rite_step_")
def rite_step_(
    weights: Sequence[Tensor],  # modified in place
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],  # modified in place
    moments: Sequence[Tensor],  # modified in place
    escaped: Sequence[Tensor],  # modified in place
    known: Tensor,
    numbers: Tensor,
    scalars: Tensor,
    wide: Sequence[bool],
    finite: Tensor | None = None,
) -> None:
    """With stacks (pairs, 2, r, r), in which the other factor of a pair is at the other place; formulas as in `rules.Rite`."""
    if finite is not None:
        finite.copy_(torch.stack([torch.linalg.vector_norm(grad) for grad in grads]).isfinite())
        good = finite.view(-1, 2).all(1).repeat_interleave(2).tolist()
        if not all(good):
            places = [n for n, is_good in enumerate(good) if is_good]
            lists = [[each[n] for n in places if each] for each in (weights, grads, momenta, moments, escaped)]
            if places:
                rite_step_(*lists, known[places], numbers, scalars, [wide[n] for n in places])
            return
    count, rank, device = len(weights) // 2, moments[0].shape[-1], weights[0].device
    share, square_share, decay, alpha, keep = numbers.T
    plain = scalars * torch.tensor([1.0, 0.0], dtype=torch.float64)

    def stack(matrices: Tensor) -> Tensor:
        return widened(matrices).view(count, 2, rank, rank)

    roots = inverse_power(stack(thin_grams(weights, weights, wide)), None, plain, True)
    sizes = roots.new_tensor([x.shape[lies] for x, lies in zip(weights, wide, strict=True)])
    means = stack(thin_grams(grads, grads, wide)) / sizes.view(count, 2, 1, 1)
    duals = roots.flip(1)
    old = stack(torch.stack([moment.view(rank, rank) for moment in moments]))
    before = old.lerp(duals @ means @ duals, square_share.to(old).view(2, 1, 1))
    shift = widened(torch.stack(list(escaped))).view(count, 2) if escaped else None
    scalers = duals @ inverse_power(before, shift, scalars, True) @ duals
    three = torch.stack([share, alpha, keep], -1).repeat(count, 1)
    after, cross = map(stack, pair_step_(weights, grads, momenta, scalers.flatten(0, 1).to(weights[0]), three, wide))
    now = inverse_power(after, None, plain, True)
    thin_turn_(momenta, (cross @ now @ now).flip(1).flatten(0, 1).to(weights[0]), wide)
    turns = (now @ cross.mT @ roots).flip(1)
    carried = turns @ before @ turns.mT
    for moment, each in zip(moments, carried.flatten(0, 1), strict=True):
        moment.copy_(each.view(moment.shape))
    if shift is not None:
        grown = (shift + escaped_of(before, carried)) * decay.to(device, shift.dtype)
        for floor, each in zip(escaped, grown.flatten(), strict=True):
            floor.copy_(each)


def widened(matrices: Tensor) -> Tensor:
    """In the type of small decompositions."""
    return matrices.to(torch.float32 if matrices.device.type == "mps" else torch.float64)


def escaped_of(before: Tensor, after: Tensor) -> Tensor:
    """What a change of coordinates loses of V: the less of the largest loss of an eigenvalue and the loss of the trace."""
    values = [torch.linalg.eigvalsh((each + each.mT).nan_to_num() / 2.0) for each in (before, after)]
    losses = values[0] - values[1]
    return torch.minimum(losses.amax(-1).clamp_min(0.0), losses.sum(-1).clamp_min(0.0))
