"""The operations on the factors of many pairs at once, as `schemas` has the others.

Factors come in lists, all of one rank r, contiguous, of one type of COMPUTE: X is d×r, or where `wide` says so, lies as its
transpose, r×d. All formulas have X tall. Small matrices stand in one stack, (N, r, r), one for each factor of a list.

There are kernels for the CPU; elsewhere the definitions do the work, one matrix after the other.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.kernels.checks import COMPUTE, check_contiguous, check_floating, check_host, refuse, said
from lowrank_optim.kernels.schemas import operation


def _check_factors(op: str, wide: Sequence[bool], **lists: Sequence[Tensor]) -> None:
    (name, first), *_ = lists.items()
    if not first:
        refuse(op, f"{name} is empty; needed: one factor at least")
    seen, dtype, device = first[0], first[0].dtype, first[0].device
    check_floating(op, COMPUTE, **{f"{name}[0]": seen})
    rank = seen.shape[0 if wide and wide[0] else -1] if seen.dim() == 2 else -1
    for other, factors in lists.items():
        if factors is first and other != name:
            continue
        if len(factors) != len(first) or len(wide) != len(first):
            refuse(
                op,
                f"{other} has {len(factors)} factors, {name} {len(first)}, wide {len(wide)}; needed: as many of each",
            )
        for number, (x, like, lies) in enumerate(zip(factors, first, wide, strict=True)):
            shape = x.shape
            if (
                x.dtype is not dtype
                or shape != like.shape
                or len(shape) != 2
                or shape[0 if lies else 1] != rank
                or x.device != device
                or not x.is_contiguous()
            ):
                _refuse_factor(op, f"{other}[{number}]", x, (like, bool(lies), rank), seen)


def _refuse_factor(op: str, name: str, x: Tensor, like: tuple[Tensor, bool, int], first: Tensor) -> None:
    other, wide, rank = like
    check_contiguous(op, **{name: x})
    needed = f"({rank}, d)" if wide else f"(d, {rank})"
    refuse(
        op, f"{name} is {said(x)}; needed: {needed} {first.dtype} on {first.device}, as large as {tuple(other.shape)}"
    )


def _check_small(op: str, small: Tensor, factors: Sequence[Tensor], wide: Sequence[bool]) -> None:
    rank = factors[0].shape[0 if wide[0] else 1]
    needed = (len(factors), rank, rank)
    if small.shape != needed or small.dtype != factors[0].dtype or small.device != factors[0].device:
        refuse(op, f"small is {said(small)}; needed: {needed} {factors[0].dtype} on {factors[0].device}")
    check_contiguous(op, small=small)


def _stack(factors: Sequence[Tensor], wide: Sequence[bool]) -> Tensor:
    rank = factors[0].shape[0 if wide[0] else 1]
    return factors[0].new_empty((len(factors), rank, rank))


def _grams(left: Sequence[Tensor], right: Sequence[Tensor], wide: Sequence[bool]) -> Tensor:
    return _stack(left, wide)


@operation("thin_grams(Tensor[] left, Tensor[] right, bool[] wide) -> Tensor", _grams)
def thin_grams(left: Sequence[Tensor], right: Sequence[Tensor], wide: Sequence[bool]) -> None:
    """XᵀY of every two factors, (N, r, r)."""
    _check_factors("thin_grams", wide, left=left, right=right)


def _two(weights: Sequence[Tensor], *others: Any) -> tuple[Tensor, Tensor]:
    return _stack(weights, others[-1]), _stack(weights, others[-1])


@operation(
    "pair_step_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momenta, Tensor small, Tensor numbers, bool[] wide) -> "
    "(Tensor, Tensor)",
    _two,
)
def pair_step_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    small: Tensor,
    numbers: Tensor,
    wide: Sequence[bool],
) -> None:
    """D ← (1−share)D + share·G S, X ← keep·X − alpha·D; X_newᵀX_new and X_oldᵀX_new. `numbers`: share, alpha, keep of each factor."""
    op = "pair_step_"
    _check_factors(op, wide, weights=weights, grads=grads, momenta=momenta)
    _check_small(op, small, weights, wide)
    if numbers.shape != (len(weights), 3) or numbers.dtype != torch.float64 or not numbers.is_cpu:
        refuse(
            op, f"numbers is {said(numbers)}; needed: ({len(weights)}, 3) torch.float64 on cpu, share, alpha and keep"
        )


@operation("thin_turn_(Tensor(a!)[] forms, Tensor small, bool[] wide) -> ()")
def thin_turn_(forms: Sequence[Tensor], small: Tensor, wide: Sequence[bool]) -> None:
    """X ← X S."""
    _check_factors("thin_turn_", wide, forms=forms)
    _check_small("thin_turn_", small, forms, wide)


RITE_NUMBERS = ("share", "square_share", "decay", "alpha", "keep")


@operation(
    "rite_step_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!)[] moments, Tensor(d!)[] escaped, "
    "Tensor(e!) known, Tensor numbers, Tensor scalars, bool[] wide, Tensor(f!)? finite=None) -> ()"
)
def rite_step_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    moments: Sequence[Tensor],
    escaped: Sequence[Tensor],
    known: Tensor,
    numbers: Tensor,
    scalars: Tensor,
    wide: Sequence[bool],
    finite: Tensor | None = None,
) -> None:
    """A step of LoRA-RITE (`rules.Rite`) for the factors A, B, A, B, … of many pairs.

    `momenta` are D and `moments` V, (…, r, r), of each; `escaped` ρ, (1,), or there are none. `known`, (N, r² + 2)
    float64, is for a backend to keep what saves it work in the next step; zeros where that is nothing. Its last number is 1 where the
    weights are others than those that the step before has written, as far as the backend looks. `numbers`: 1−β̃₁, 1−β̃₂, the decay of
    ρ, α and κ, a row for each A and one for each B. `scalars`: tolerance, added, as of `inverse_power`.
    With `finite`, (N,) bool, it is written there of which gradients the sum of squares is finite in float32 (float64 factors: in
    float64), and pairs with another one stay as they are.
    """
    op = "rite_step_"
    _check_factors(op, wide, weights=weights, grads=grads, momenta=momenta)
    if len(weights) % 2 or len(moments) != len(weights) or len(escaped) not in (0, len(weights)):
        refuse(
            op,
            f"there are {len(weights)} factors, {len(moments)} moments and {len(escaped)} escaped; needed: as many moments as "
            "factors, two of each pair, and as many escaped, or none",
        )
    first = weights[0]
    rank = first.shape[0 if wide[0] else 1]
    for name, others, size in (("moments", moments, (rank, rank)), ("escaped", escaped, (1,))):
        for number, x in enumerate(others):
            if x.dtype is not first.dtype or x.shape[-len(size) :] != size or x.numel() != size[0] ** len(size):
                refuse(op, f"{name}[{number}] is {said(x)}; needed: {size} {first.dtype} on {first.device}")
            if x.device != first.device or not x.is_contiguous():
                check_contiguous(op, **{f"{name}[{number}]": x})
                refuse(op, f"{name}[{number}] is {said(x)}; needed: {size} {first.dtype} on {first.device}")
    if known.shape != (len(weights), rank**2 + 2) or known.dtype != torch.float64 or not known.is_contiguous():
        refuse(op, f"known is {said(known)}; needed: {(len(weights), rank**2 + 2)} torch.float64, contiguous")
    if finite is not None and (
        finite.shape != (len(weights),) or finite.dtype != torch.bool or not finite.is_contiguous()
    ):
        refuse(op, f"finite is {said(finite)}; needed: {(len(weights),)} torch.bool, contiguous")
    needed = (2, len(RITE_NUMBERS))
    if numbers.shape != needed or numbers.dtype != torch.float64 or not numbers.is_cpu:
        refuse(op, f"numbers is {said(numbers)}; needed: {needed} torch.float64 on cpu, {', '.join(RITE_NUMBERS)}")
    check_host(op, "scalars", scalars, torch.float64, ("tolerance", "added"))


def _power(matrices: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(matrices, memory_format=torch.contiguous_format)


@operation("inverse_power(Tensor matrices, Tensor? shift, Tensor scalars, bool root) -> Tensor", _power)
def inverse_power(matrices: Tensor, shift: Tensor | None, scalars: Tensor, root: bool) -> None:
    """Z diag(1/(w + shift)) Zᵀ, or with `root` Z diag(1/(√(w + shift) + added)) Zᵀ, of symmetric K = Z diag(w) Zᵀ, (…, r, r).

    `scalars`: tolerance, added. Eigenvalues below 0, and what is not finite in K, are 0; those up to `tolerance` times the largest,
    with the shift, give 0. `shift` has one number for each matrix.
    """
    op = "inverse_power"
    check_floating(op, COMPUTE, matrices=matrices)
    if matrices.dim() < 2 or matrices.shape[-1] != matrices.shape[-2]:
        refuse(op, f"matrices is {said(matrices)}; needed: (…, r, r)")
    if shift is not None and (shift.shape != matrices.shape[:-2] or shift.dtype != matrices.dtype):
        refuse(
            op, f"shift is {said(shift)}; needed: {tuple(matrices.shape[:-2])} {matrices.dtype}, one for each matrix"
        )
    check_host(op, "scalars", scalars, torch.float64, ("tolerance", "added"))
