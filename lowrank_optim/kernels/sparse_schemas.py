"""The operations on a sparse plus low-rank matrix, as `schemas` has the others.

S (rows × cols) comes in compressed sparse rows: `pointers` (rows + 1,) int32, how many entries lie before each row, and `columns`
(entries,), int16 or int32, ascending in each row. Their numbers are not checked: a column that S does not have is read from
whatever lies there. All else is of one type.
"""

from typing import Any

import torch
from torch import Tensor

from lowrank_optim.kernels.checks import (
    FLOATS,
    check_contiguous,
    check_floating,
    check_same_device,
    check_shape,
    refuse,
    said,
)
from lowrank_optim.kernels.schemas import operation


def _check_sparse(op: str, pointers: Tensor, columns: Tensor, **others: Tensor | None) -> None:
    (name, first), *rest = ((name, tensor) for name, tensor in others.items() if tensor is not None)
    check_floating(op, FLOATS, **{name: first})
    for other, tensor in rest:
        if tensor.dtype != first.dtype:
            refuse(op, f"{other} is {tensor.dtype}, {name} {first.dtype}; needed: one type")
    if pointers.dim() != 1 or not pointers.numel() or pointers.dtype != torch.int32:
        refuse(op, f"pointers is {said(pointers)}; needed: (rows + 1,) torch.int32")
    if columns.dim() != 1 or columns.dtype not in (torch.int16, torch.int32):
        refuse(op, f"columns is {said(columns)}; needed: (entries,) torch.int16 or torch.int32")
    check_same_device(op, **others, pointers=pointers, columns=columns)
    check_contiguous(op, pointers=pointers, columns=columns)


def _check_low_rank(op: str, x: Tensor, inner: Tensor | None, factor: Tensor | None, shape: tuple[int, ...]) -> None:
    """That `inner` (…, rank) and `factor`, whose shape is this but for a −1 in place of the rank, belong together."""
    if (inner is None) != (factor is None):
        refuse(op, "the factor and what it is multiplied by belong together: pass both or neither")
    if inner is None or factor is None:
        return
    if inner.dim() == 0 or inner.shape[:-1] != x.shape[:-1]:
        refuse(op, f"{said(inner)} is multiplied by the factor; needed: {(*x.shape[:-1], 'rank')}")
    needed = tuple(inner.shape[-1] if size == -1 else size for size in shape)
    check_shape(op, "the factor", factor, needed, "the side of the matrix and the rank")


def _check_features(op: str, name: str, x: Tensor, features: int, why: str) -> None:
    if x.shape[-1:] != (features,):
        refuse(op, f"{name} is {said(x)}; needed: (…, {features}), {why}")


def _forward(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], others[-2].shape[0] - 1))


@operation(
    "sltrain_forward(Tensor x, Tensor? u, Tensor? lora_b, Tensor? bias, Tensor values, Tensor pointers, Tensor columns) -> Tensor",
    _forward,
)
def sltrain_forward(
    x: Tensor,
    u: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None,
    values: Tensor,
    pointers: Tensor,
    columns: Tensor,
) -> None:
    """y = u Bᵀ + x Sᵀ + b, (…, rows)."""
    op = "sltrain_forward"
    _check_sparse(op, pointers, columns, x=x, u=u, lora_b=lora_b, bias=bias, values=values)
    rows = pointers.shape[0] - 1
    if x.dim() == 0:
        refuse(op, f"x is {said(x)}; needed: (…, columns of S)")
    _check_low_rank(op, x, u, lora_b, (rows, -1))
    check_shape(op, "bias", bias, (rows,), "the rows of S")
    check_shape(op, "values", values, tuple(columns.shape), "one for each column")


def _backward_input(grad: Tensor, *others: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], others[-1]))


@operation(
    "sltrain_backward_input(Tensor grad, Tensor? q, Tensor? lora_a, Tensor values, Tensor pointers, Tensor columns, SymInt cols) "
    "-> Tensor",
    _backward_input,
)
def sltrain_backward_input(
    grad: Tensor, q: Tensor | None, lora_a: Tensor | None, values: Tensor, pointers: Tensor, columns: Tensor, cols: int
) -> None:
    """∂x = q A + ∂y S, (…, cols)."""
    op = "sltrain_backward_input"
    _check_sparse(op, pointers, columns, grad=grad, q=q, lora_a=lora_a, values=values)
    _check_features(op, "grad", grad, pointers.shape[0] - 1, "the rows of S")
    _check_low_rank(op, grad, q, lora_a, (-1, cols))
    check_shape(op, "values", values, tuple(columns.shape), "one for each column")


def _sampled(grad: Tensor, x: Tensor, pointers: Tensor, columns: Tensor) -> Tensor:
    return x.new_empty(columns.shape)


@operation("sampled_product(Tensor grad, Tensor x, Tensor pointers, Tensor columns) -> Tensor", _sampled)
def sampled_product(grad: Tensor, x: Tensor, pointers: Tensor, columns: Tensor) -> None:
    """∂v_k = Σ_t ∂y[t, i_k] x[t, j_k], (entries,)."""
    op = "sampled_product"
    _check_sparse(op, pointers, columns, grad=grad, x=x)
    _check_features(op, "grad", grad, pointers.shape[0] - 1, "the rows of S")
    if x.shape[:-1] != grad.shape[:-1] or x.dim() == 0:
        refuse(op, f"x is {said(x)}; needed: {(*grad.shape[:-1], 'columns of S')}, as grad")
