"""What rules for pairs compute with the two sides of each: products with r×r matrices, Gram matrices, and stacks of these."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_optim.kernels import widened
from lowrank_optim.kernels.compute import CACHE_ELEMENTS
from lowrank_optim.rules.pairs import Pair, Side
from lowrank_optim.rules.small_matrices import sum_together


def across(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right of tall forms, (E, r, r): what this process holds of the sum over d."""
    return torch.mm(left[0].mT, right[0])[None] if left.shape[0] == 1 else torch.bmm(left.mT, right)


def times(form: Tensor, small: Tensor) -> Tensor:
    """A tall form times an r×r matrix for each expert, which may be of a wider type."""
    small = small.to(form.dtype)
    if form.shape[0] > 1:
        return torch.bmm(form, small)
    # In the order of memory of the factor: A is stored transposed.
    return (
        torch.mm(small[0].mT, form[0].mT).mT.unsqueeze(0) if form[0].mT.is_contiguous() else form[0].mm(small[0])[None]
    )


def blend_(target: Tensor, form: Tensor, small: Tensor, share: float, ok: Tensor | None) -> None:
    """target ← (1 − share)·target + share·(form times small), in place; nothing where `ok` is false."""
    small = small.to(form.dtype)
    if ok is not None or target.shape[0] > 1:
        moved = target.lerp(times(form, small), share)
        target.copy_(moved if ok is None else torch.where(ok, moved, target))
        return
    own = target[0]
    if own.is_contiguous():
        own.addmm_(form[0], small[0], beta=1.0 - share, alpha=share)
    else:
        own.mT.addmm_(small[0].mT, form[0].mT, beta=1.0 - share, alpha=share)


def turn_(target: Tensor, small: Tensor) -> None:
    """target ← target times small, in place: through a buffer that stays in the caches, where there is one product."""
    small = small.to(target.dtype)
    if target.shape[0] > 1:
        target.copy_(torch.bmm(target, small))
        return
    rank, upright = target.shape[-1], target.stride(-1) == 1
    for part in target[0].split(max(1, CACHE_ELEMENTS // rank)):
        if upright:
            part.copy_(torch.mm(part, small[0]))
        else:
            part.mT.copy_(torch.mm(small[0].mT, part.mT))


def mean_decay(beta: float, step: float) -> float:
    """β̃ = β(1−β^(t−1))/(1−β^t): a mean of t numbers with weights β^age, without bias."""
    return float(beta * (1.0 - beta ** (step - 1.0)) / (1.0 - beta**step))


def grams(pairs: Sequence[Pair]) -> list[Tensor]:
    """K = BᵀB and M = AAᵀ of all pairs: [M₁, K₁, M₂, K₂, …], each (E, r, r)."""
    sides = [side for pair in pairs for side, _ in pair.sides]
    return sum_together([across(side.weight, side.weight) for side in sides], [side.sharding for side in sides])


def copy_before(side: Side, pair: Pair) -> Tensor | None:
    """The weights of a factor that is about to be written; None where they can be told from those after it (`grams_after`)."""
    if pair.linear:
        return None
    mine = side.weight.untyped_storage().data_ptr() != side.context.weight.untyped_storage().data_ptr()
    return side.weight if mine else side.weight.clone()


def grams_after(
    sides: Sequence[Side], old: Sequence[Tensor | None], directions: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """X_newᵀX_new and X_oldᵀX_new of factors X that were written, in the type of small decompositions.

    Where X_old was not kept, X_new = κX_old − αN with the direction N in tall form, so that X_oldᵀX_new = (X_newᵀX_new + αNᵀX_new)/κ.
    """
    new = [side.written() for side in sides]
    other = [n if x is None else x for x, n in zip(old, directions, strict=True)]
    parts = [part for x, y in zip(new, other, strict=True) for part in (across(x, x), across(y, x))]
    sums = sum_together(parts, [side.sharding for side in sides for _ in range(2)])
    after, cross = [widened(each) for each in sums[::2]], [widened(each) for each in sums[1::2]]
    linear = [number for number, known in enumerate(old) if known is None]
    if linear:
        alphas, keeps = zip(*(sides[number].step for number in linear), strict=True)
        told = torch._foreach_mul([cross[number] for number in linear], alphas)
        torch._foreach_add_(told, [after[number] for number in linear])
        torch._foreach_div_(told, keeps)
        for number, each in zip(linear, told, strict=True):
            cross[number] = each
    return after, cross


def identity_where(matrix: Tensor, ok: Tensor | None) -> Tensor:
    """The identity where `ok` is false: what is multiplied with it then keeps its bits."""
    if ok is None:
        return matrix
    return torch.where(ok, matrix, torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device))


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """(pairs, 2, E, …) from (E, …) for A and B of each pair."""
    return torch.stack(list(parts)).view(-1, 2, *parts[0].shape)


def oks_of(pairs: Sequence[Pair]) -> Tensor | None:
    """Which pairs may change, for a stack."""
    oks = [pair.a.ok for pair in pairs if pair.a.ok is not None]
    return torch.stack(oks).view(-1, 1, 1, 1, 1) if oks else None


def where_ok(ok: Tensor | None, changed: Tensor, kept: Tensor) -> Tensor:
    """`changed`, or where `ok` is false, `kept`."""
    return changed if ok is None else torch.where(ok, changed, kept)
