"""Functions of the r×r matrices of pairs: Gram matrices of factors, their inverses and roots.

Matrices come as (N, r, r), in any number, and those of one size are decomposed together (`in_batches`). Arithmetic is float64
wherever the device has it. Eigenvalues up to r·ε times the largest count as 0, with ε of the type in which the Gram matrix was
summed; what is not finite counts as 0 too, so that nothing raises in the middle of a step.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.kernels import widened
from lowrank_optim.sharding.tensor_sharding import TensorSharding

Function: TypeAlias = Callable[..., Tensor]


def by_kind(kinds: Sequence[Hashable], function: Callable[[list[int]], Sequence[Any]]) -> list[Any]:
    """function(positions) for the positions of each kind, one answer for each of them; the answers in the order of `kinds`."""
    alike: dict[Hashable, list[int]] = {}
    for number, kind in enumerate(kinds):
        alike.setdefault(kind, []).append(number)
    found: list[Any] = [None] * len(kinds)
    for numbers in alike.values():
        for number, answer in zip(numbers, function(numbers), strict=True):
            found[number] = answer
    return found


def in_batches(function: Function, *lists: Sequence[Tensor]) -> list[Tensor]:
    """function(a, b, …) for each position of the lists; positions whose matrices have one size are computed in one call."""

    def together(numbers: list[int]) -> Sequence[Tensor]:
        found: Tensor = function(*(torch.cat([column[n] for n in numbers]) for column in lists))
        parts: Sequence[Tensor] = found.split([lists[0][n].shape[0] for n in numbers])
        return parts

    return by_kind([tuple(m.shape[1:] for m in matrices) for matrices in zip(*lists, strict=True)], together)


def sum_together(parts: Sequence[Tensor], shardings: Sequence[tuple[TensorSharding, int]]) -> list[Tensor]:
    """Each part summed over the processes that split a dimension of another tensor: one message for those of the same processes."""
    sums = list(parts)
    alike: dict[tuple[object, ...], list[int]] = {}
    for number, (sharding, dim) in enumerate(shardings):
        if groups := sharding.groups(dim):
            alike.setdefault((parts[number].dtype, *groups), []).append(number)
    for numbers in alike.values():
        sharding, dim = shardings[numbers[0]]
        flat = sharding.sum(torch.cat([parts[n].flatten() for n in numbers]), dim)
        for n, part in zip(numbers, flat.split([parts[n].numel() for n in numbers]), strict=True):
            sums[n] = part.view(parts[n].shape)
    return sums


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, at least 0, and eigenvectors."""
    wide = widened(matrix)
    wide = ((wide + wide.mT) / 2.0).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    values, vectors = torch.linalg.eigh(wide)
    return values.clamp_min(0.0), vectors


def _composed(vectors: Tensor, values: Tensor) -> Tensor:
    """Z diag(values) Zᵀ."""
    product: Tensor = (vectors * values.unsqueeze(-2)) @ vectors.mT
    return product


def pseudo_inverse(gram: Tensor, eps: float) -> Tensor:
    """K⁺."""
    return kernels.inverse_power(widened(gram), gram.shape[-1] * eps, root=False)


def pseudo_inverse_root(gram: Tensor, eps: float, shift: Tensor | None = None, added: float = 0.0) -> Tensor:
    """Z diag(1/(√(w + shift) + added)) Zᵀ for K = Z diag(w) Zᵀ; 0 where w + shift counts as 0.

    Args:
        gram: K.
        eps: of the type that K was summed in.
        shift: a number for each matrix, (N,); None for 0.
        added: to the roots.
    """
    wide = widened(gram)
    shift = None if shift is None else shift.to(wide.dtype)
    return kernels.inverse_power(wide, gram.shape[-1] * eps, root=True, shift=shift, added=added)


def damped_inverse(gram: Tensor, damping: float, absolute: bool) -> Tensor:
    """(K + δI)⁻¹; δ is `damping`, times tr(K)/r unless it is `absolute`. 0 where K is 0 and δ too."""
    values, vectors = _eigen(gram)
    size = damping if absolute else damping * values.mean(-1, keepdim=True)
    shifted = values + size
    return _composed(vectors, torch.where(shifted > 0.0, shifted.reciprocal(), 0.0))


def sylvester(left: Tensor, right: Tensor, target: Tensor, eps: float) -> Tensor:
    """X with K X + X M = C for symmetric K and M, by their eigenvalues λ and μ; X is 0 where λᵢ + μⱼ counts as 0."""
    own, q = _eigen(left)
    other, z = _eigen(right)
    sums = own.unsqueeze(-1) + other.unsqueeze(-2)
    largest = (own[..., -1:] + other[..., -1:]).unsqueeze(-1)
    inside = q.mT @ widened(target) @ z
    counts = sums > left.shape[-1] * eps * largest
    solution: Tensor = q @ torch.where(counts, inside / sums, 0.0) @ z.mT
    return solution
