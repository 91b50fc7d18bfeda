"""What the operations check of their arguments: types, shapes, devices. Each raises ValueError with what came and what is needed."""

from typing import NoReturn

import torch
from torch import Tensor

NAMESPACE = "lowrank_optim"

SCALARS = {
    "adam_direct_": ("beta1", "beta2", "eps", "step"),
    "adam_dense_": ("beta1", "beta2", "eps", "step", "alpha", "keep"),
    "folded_adam_dense_": ("beta1", "beta2", "eps", "step", "residual", "alpha", "keep"),
    "lion_direct_": ("beta1", "beta2"),
    "sgd_direct_": ("momentum",),
    "rmsprop_direct_": ("alpha", "eps"),
    "apply_": ("alpha", "keep"),
}
"""What `scalars` holds, in order; the coded forms of an operation take those of the plain one."""

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPUTE = (torch.float64, torch.float32)

LARGEST_FOLD = 1024
"""Neighbours that may share a moment: a tile of the compiled kernels (TILE of csrc/cpu/ops.h)."""


def refuse(op: str, what: str) -> NoReturn:
    raise ValueError(f"{NAMESPACE}.{op}: {what}")


def said(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"


def check_floating(op: str, kinds: tuple[torch.dtype, ...] = FLOATS, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in kinds:
            refuse(op, f"{name} is {said(tensor)}; needed: one of {', '.join(map(str, kinds))}")


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    first, device = "", None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if device is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            refuse(op, f"{name} is on {tensor.device}, {first} on {device}; needed: one device")


def check_shape(op: str, name: str, tensor: Tensor | None, shape: tuple[int, ...], why: str) -> None:
    if tensor is not None and tensor.shape != shape:
        refuse(op, f"{name} is {said(tensor)}; needed: {tuple(shape)}, {why}")


def check_matrix(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dim() < 2:
        refuse(op, f"{name} is {said(tensor)}; needed: a (…, rows, cols) matrix")


def check_contiguous(op: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            refuse(op, f"{name} {tuple(tensor.shape)} has strides {tensor.stride()}; needed: a contiguous tensor")


def check_host(op: str, name: str, tensor: Tensor | None, dtype: torch.dtype, holds: tuple[str, ...]) -> None:
    if tensor is None:
        return
    if tensor.dtype != dtype or tensor.shape != (len(holds),) or not tensor.is_cpu:
        refuse(op, f"{name} is {said(tensor)}; needed: ({len(holds)},) {dtype} on cpu, [{', '.join(holds)}]")


def check_step_params(
    op: str, like: str, scalars: Tensor, ok: Tensor | None, rounding: Tensor | None = None, target: Tensor | None = None
) -> None:
    """The arguments that say how a step goes, whatever the tensors are; `target` is what `rounding` rounds."""
    if scalars.dtype != torch.float64 or scalars.shape != (len(SCALARS[like]),) or not scalars.is_cpu:
        check_host(op, "scalars", scalars, torch.float64, SCALARS[like])
    if ok is not None and (ok.dtype != torch.bool or ok.dim() != 0):
        refuse(op, f"ok is {said(ok)}; needed: a 0-d bool")
    if rounding is not None and target is not None:
        check_rounding(op, rounding, target)


def check_rounding(op: str, rounding: Tensor, target: Tensor) -> None:
    check_host(op, "rounding", rounding, torch.int64, ("key", "start"))
    if target.dtype == torch.float16:
        refuse(op, "float16 cannot be rounded stochastically; use bfloat16, or leave rounding out")


def check_error(
    op: str, weight: Tensor, error: Tensor | None, error_low: Tensor | None, rounding: Tensor | None
) -> None:
    """What is kept beside bfloat16 weights (`rounding.WeightError`)."""
    if error is None or weight.dtype != torch.bfloat16 or rounding is not None:
        refuse(
            op, f"error is for bfloat16 weights without rounding, error_low only beside it; weight is {said(weight)}"
        )
    for name, tensor, kind in (("error", error, torch.int8), ("error_low", error_low, torch.uint8)):
        if tensor is not None and (tensor.dtype != kind or tensor.shape != weight.shape):
            refuse(op, f"{name} is {said(tensor)}; needed: {tuple(weight.shape)} {kind}, the weight's shape")
    check_same_device(op, weight=weight, error=error, error_low=error_low)


def check_keep(op: str, keep: Tensor, weight: Tensor) -> None:
    if keep.dim() != 0 or keep.dtype not in COMPUTE or keep.device != weight.device:
        refuse(op, f"keep is {said(keep)}; needed: a 0-d float32 or float64 on {weight.device}")


def check_noise(op: str, noise: Tensor | None) -> None:
    check_host(op, "noise", noise, torch.int64, ("key", "turn", "start"))


def coded_shapes(shape: tuple[int, ...], bits: int, block: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the codes and of the scales of a (…, cols) matrix."""
    *rows, cols = shape
    return (*rows, cols if bits == 8 else (cols + 1) // 2), (*rows, -(-cols // block))


def code_dtype(bits: int, signed: bool) -> torch.dtype:
    """The type of codes."""
    return torch.int8 if bits == 8 and signed else torch.uint8


def empty_codes(x: Tensor, bits: int, signed: bool, block: int) -> tuple[Tensor, Tensor]:
    """Room for the codes and the scales of a (…, cols) matrix."""
    codes, scale = coded_shapes(tuple(x.shape), bits, block)
    return x.new_empty(codes, dtype=code_dtype(bits, signed)), x.new_empty(scale, dtype=torch.float32)


def check_coding(bits: int, block: int, name: str = "block") -> None:
    """Raise ValueError for bits and sizes of blocks (or groups) that no code has."""
    if bits not in (8, 4):
        raise ValueError(f"bits is {bits!r}; valid values are 8 and 4")
    if block < 1:
        raise ValueError(f"{name} is {block!r}; it must be at least 1")


def check_codes(
    op: str, name: str, codes: Tensor, scale: Tensor, shape: tuple[int, ...], coding: tuple[int, bool, int]
) -> None:
    bits, signed, block = coding
    expected, kind = coded_shapes(shape, bits, block), code_dtype(bits, signed)
    if (codes.shape, scale.shape) != expected or codes.dtype != kind or scale.dtype != torch.float32:
        raise ValueError(
            f"{name}: codes {tuple(codes.shape)} {codes.dtype} and scale {tuple(scale.shape)} {scale.dtype} do not hold {shape[-1]} "
            f"columns in {bits} bits; expected {expected[0]} {kind} and {expected[1]} {torch.float32}"
        )


def check_col_scale(op: str, col_scale: Tensor | None, shape: tuple[int, ...]) -> None:
    if col_scale is None:
        return
    if col_scale.shape[-1] != shape[-1] or (col_scale.dim() > 1 and col_scale.shape[-2] != 1):
        needed = f"({shape[-1]},) or (…, 1, {shape[-1]}), one number for each column"
        refuse(op, f"col_scale is {said(col_scale)}; needed: {needed}")
