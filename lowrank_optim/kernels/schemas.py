"""The operations, each defined once: schema, what it checks, and what it returns.

Every operation is `torch.ops.lowrank_optim.<name>`. Its check raises ValueError before anything is computed, with what came and what
is needed; the same check runs for real tensors, under fake tensors (`torch.compile`, the memory planner) and in every backend.

Numbers that change from step to step (learning rate, bias corrections, keys, step numbers) come as small tensors on the CPU, so that
a compiled graph never specialises on them:

    scalars    float64, the numbers that the operation names, in its order
    noise      int64 [key, turn, start] or None: rounding of codes, see `quantization.row_codes`; None rounds to nearest
    rounding   int64 [key, start] or None: stochastic rounding of bfloat16 weights, see `rounding.stochastic_round`
    error      int8, and error_low uint8, of the weight's shape, or None: what rounding to bfloat16 drops, see `rounding`; they are
               modified with the weight, which is then not rounded stochastically
    keep       0-d tensor on the device or None: the factor of the weights, in place of the number of that name
    ok         0-d bool on the device or None: where false, moments and weights stay and a direction is 0 (what `apply_` and
               `apply_dense_` are given must then be 0, as the operations before them return it)

Matrices are (…, rows, cols); `right` says which side of the gradient the basis multiplies.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.kernels.checks import (
    COMPUTE,
    FLOATS,
    LARGEST_FOLD,
    NAMESPACE,
    check_codes,
    check_coding,
    check_col_scale,
    check_contiguous,
    check_error,
    check_floating,
    check_host,
    check_keep,
    check_matrix,
    check_noise,
    check_rounding,
    check_same_device,
    check_shape,
    check_step_params,
    coded_shapes,
    empty_codes,
    refuse,
    said,
)

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

Check = Callable[..., Any]
CHECKS: dict[str, Check] = {}
"""By name of the operation, the function that checks its arguments."""


def operation(schema: str, results: Callable[..., Any] | None = None) -> Callable[[Check], Check]:
    """Define an operation by its schema; the decorated function checks the arguments.

    `results` makes the (uninitialised) results from them; without it, the check does.
    """

    def register(check: Check) -> Check:
        name = schema.split("(")[0]

        def fake(*args: Any) -> Any:
            made = check(*args)
            return made if results is None else results(*args)

        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        CHECKS[name] = check
        return check

    return register


def implement(name: str, function: Callable[..., Any]) -> None:
    """Give an operation its kernel, for every device."""
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")


# --------------------------------------------------------------------------------------------------------------- matrix products


def _check_product(op: str, grad: Tensor, basis: Tensor, right: bool) -> None:
    if grad.dim() < 2 or basis.dim() < 2 or grad.dtype not in FLOATS or basis.dtype not in COMPUTE:
        check_matrix(op, "grad", grad)
        check_matrix(op, "basis", basis)
        check_floating(op, grad=grad)
        check_floating(op, COMPUTE, basis=basis)
    if grad.device != basis.device:
        check_same_device(op, grad=grad, basis=basis)
    *batch, rows, cols = grad.shape
    *stack, contracted, _ = basis.shape
    if contracted != (cols if right else rows) or stack != batch:
        side, needed = ("right", (*batch, cols, "r")) if right else ("left", (*batch, rows, "r"))
        refuse(op, f"grad is {said(grad)} and basis {said(basis)}; needed on the {side}: a basis of {needed}")


def _projection(grad: Tensor, basis: Tensor, right: bool) -> Tensor:
    return basis.new_empty((*grad.shape[:-2], grad.shape[-2 if right else -1], basis.shape[-1]))


def _projection_with_squares(grad: Tensor, basis: Tensor, right: bool) -> tuple[Tensor, Tensor]:
    return _projection(grad, basis, right), basis.new_empty((*grad.shape[:-2], grad.shape[-2 if right else -1], 1))


project = operation("project(Tensor grad, Tensor basis, bool right) -> Tensor", _projection)(
    partial(_check_product, "project")
)
"""R = G B (right) or Gᵀ B, in the basis' type."""


project_with_norms = operation(
    "project_with_norms(Tensor grad, Tensor basis, bool right) -> (Tensor, Tensor)", _projection_with_squares
)(partial(_check_product, "project_with_norms"))
"""R, and the squared norm of every row (right) or column of G, (…, rows or columns, 1)."""


@operation(
    "apply_(Tensor(a!) weight, Tensor left, Tensor right, Tensor scalars, Tensor? keep, Tensor? ok, Tensor? rounding, "
    "Tensor? grad, Tensor? phi, Tensor? subtract_left, Tensor? subtract_right, bool sign, "
    "Tensor(y!)? error=None, Tensor(z!)? error_low=None) -> ()"
)
def apply_(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    scalars: Tensor,
    keep: Tensor | None,
    ok: Tensor | None,
    rounding: Tensor | None,
    grad: Tensor | None,
    phi: Tensor | None,
    subtract_left: Tensor | None,
    subtract_right: Tensor | None,
    sign: bool,
    error: Tensor | None = None,
    error_low: Tensor | None = None,
) -> None:
    """W ← keep·W − alpha·(left @ right + φ ⊙ E), E = G, sign(G) or sign(G − subtract_left @ subtract_right)."""
    op = "apply_"
    _check_product_on_weight(op, weight, left, right)
    check_step_params(op, op, scalars, ok, rounding, weight)
    if keep is not None:
        check_keep(op, keep, weight)
    if ok is not None:
        check_same_device(op, weight=weight, ok=ok)
    if error is not None or error_low is not None:
        check_error(op, weight, error, error_low, rounding)
    if not (grad is phi is subtract_left is subtract_right):  # all are None
        _check_residual(op, weight, grad, phi, subtract_left, subtract_right)


def _check_product_on_weight(op: str, weight: Tensor, left: Tensor, right: Tensor) -> None:
    if weight.dim() < 2 or weight.dtype not in FLOATS or left.dtype not in COMPUTE or right.dtype not in COMPUTE:
        check_matrix(op, "weight", weight)
        check_floating(op, weight=weight)
        check_floating(op, COMPUTE, left=left, right=right)
    if weight.device != left.device or weight.device != right.device:
        check_same_device(op, weight=weight, left=left, right=right)
    *batch, rows, cols = weight.shape
    rank = left.shape[-1]
    if left.shape != (*batch, rows, rank) or right.shape != (*batch, rank, cols):
        check_shape(op, "left", left, (*batch, rows, rank), "the weight's rows × rank")
        check_shape(op, "right", right, (*batch, rank, cols), "rank × the weight's columns")


def _check_residual(
    op: str,
    weight: Tensor,
    grad: Tensor | None,
    phi: Tensor | None,
    subtract_left: Tensor | None,
    subtract_right: Tensor | None,
) -> None:
    check_floating(op, grad=grad)
    check_floating(op, COMPUTE, phi=phi, subtract_left=subtract_left, subtract_right=subtract_right)
    check_same_device(op, weight=weight, grad=grad, phi=phi)
    *batch, rows, cols = weight.shape
    check_shape(op, "grad", grad, tuple(weight.shape), "the weight's shape")
    if (grad is None) != (phi is None):
        refuse(op, "grad and phi belong together: pass both or neither")
    if phi is not None:
        fits = phi.dim() == weight.dim() and phi.shape[:-2] == weight.shape[:-2]
        if not fits or tuple(phi.shape[-2:]) not in ((rows, 1), (1, cols), (1, 1)):
            refuse(op, f"phi is {said(phi)}; needed: (…, {rows}, 1), (…, 1, {cols}) or (…, 1, 1)")
    if (subtract_left is None) != (subtract_right is None) or (subtract_left is not None and grad is None):
        refuse(op, "subtract_left and subtract_right belong together, and to a gradient")
    if subtract_left is not None and subtract_right is not None:
        inner = subtract_left.shape[-1]
        check_shape(op, "subtract_left", subtract_left, (*batch, rows, inner), "the weight's rows × rank")
        check_shape(op, "subtract_right", subtract_right, (*batch, inner, cols), "rank × the weight's columns")


# ----------------------------------------------------------------------------------------------------------- elementwise, in place


@operation(
    "apply_dense_(Tensor(a!) weight, Tensor direction, Tensor scalars, Tensor? keep, Tensor? ok, Tensor? rounding, "
    "Tensor(y!)? error=None, Tensor(z!)? error_low=None) -> ()"
)
def apply_dense_(
    weight: Tensor,
    direction: Tensor,
    scalars: Tensor,
    keep: Tensor | None,
    ok: Tensor | None,
    rounding: Tensor | None,
    error: Tensor | None = None,
    error_low: Tensor | None = None,
) -> None:
    """W ← keep·W − alpha·N."""
    op = "apply_dense_"
    if weight.dtype not in FLOATS or direction.dtype not in COMPUTE:
        check_floating(op, weight=weight)
        check_floating(op, COMPUTE, direction=direction)
    if ok is not None or weight.device != direction.device:
        check_same_device(op, weight=weight, direction=direction, ok=ok)
    if direction.shape != weight.shape:
        check_shape(op, "direction", direction, tuple(weight.shape), "the weight's shape")
    check_step_params(op, "apply_", scalars, ok, rounding, weight)
    if error is not None or error_low is not None:
        check_error(op, weight, error, error_low, rounding)
    if keep is not None:
        check_keep(op, keep, weight)


@operation(
    "stochastic_round_(Tensor(a!) target, Tensor value, Tensor? rounding, Tensor(y!)? error=None, "
    "Tensor(z!)? error_low=None) -> ()"
)
def stochastic_round_(
    target: Tensor,
    value: Tensor,
    rounding: Tensor | None,
    error: Tensor | None = None,
    error_low: Tensor | None = None,
) -> None:
    """target ← value, rounded to the target's type; to nearest without `rounding`."""
    op = "stochastic_round_"
    check_floating(op, target=target)
    check_floating(op, COMPUTE, value=value)
    check_same_device(op, target=target, value=value)
    check_shape(op, "value", value, tuple(target.shape), "the target's shape")
    if rounding is not None:
        check_rounding(op, rounding, target)
    if error is not None or error_low is not None:
        check_error(op, target, error, error_low, rounding)
        check_floating(op, (torch.float32,), value=value)


def _check_direct(op: str, like: str, grad: Tensor, scalars: Tensor, ok: Tensor | None, **moments: Tensor) -> None:
    if grad.dtype not in COMPUTE:
        check_floating(op, COMPUTE, grad=grad)
    if ok is not None:
        check_same_device(op, grad=grad, ok=ok)
    check_step_params(op, like, scalars, ok)
    for name, moment in moments.items():
        if moment.device != grad.device:
            check_same_device(op, grad=grad, **{name: moment})
        if moment.shape != grad.shape:
            check_shape(op, name, moment, tuple(grad.shape), "the gradient's shape")
        if moment.dtype != grad.dtype:
            refuse(op, f"{name} is {moment.dtype}, grad {grad.dtype}; needed: one type")


def _direction(grad: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def _direction_with_norms(grad: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    lines = (*grad.shape[:-1], 1)
    return _direction(grad), grad.new_empty(lines), grad.new_empty(lines)


@operation(
    "adam_direct_(Tensor grad, Tensor(a!) exp_avg, Tensor(b!) exp_avg_sq, Tensor scalars, Tensor? ok) -> Tensor",
    _direction,
)
def adam_direct_(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: Tensor, ok: Tensor | None) -> None:
    """m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g²; N = (m/bc₁) / (√(v/bc₂) + ε)."""
    op = "adam_direct_"
    _check_direct(op, op, grad, scalars, ok, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)


@operation(
    "adam_direct_with_norms_(Tensor grad, Tensor(a!) exp_avg, Tensor(b!) exp_avg_sq, Tensor scalars, Tensor? ok) -> "
    "(Tensor, Tensor, Tensor)",
    _direction_with_norms,
)
def adam_direct_with_norms_(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: Tensor, ok: Tensor | None
) -> None:
    """`adam_direct_`, and ‖N_j‖ and ‖g_j‖ of every row, (…, rows, 1)."""
    op = "adam_direct_with_norms_"
    check_matrix(op, "grad", grad)
    _check_direct(op, "adam_direct_", grad, scalars, ok, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)


@operation("lion_direct_(Tensor grad, Tensor(a!) exp_avg, Tensor scalars, Tensor? ok) -> Tensor", _direction)
def lion_direct_(grad: Tensor, exp_avg: Tensor, scalars: Tensor, ok: Tensor | None) -> None:
    """N = sign(β₁m + (1−β₁)g), m ← β₂m + (1−β₂)g."""
    op = "lion_direct_"
    _check_direct(op, op, grad, scalars, ok, exp_avg=exp_avg)


@operation(
    "sgd_direct_(Tensor grad, Tensor(a!) exp_avg, Tensor scalars, Tensor? ok, bool nesterov) -> Tensor", _direction
)
def sgd_direct_(grad: Tensor, exp_avg: Tensor, scalars: Tensor, ok: Tensor | None, nesterov: bool) -> None:
    """m ← μm + g; N = m, or g + μm (Nesterov)."""
    op = "sgd_direct_"
    _check_direct(op, op, grad, scalars, ok, exp_avg=exp_avg)


@operation("rmsprop_direct_(Tensor grad, Tensor(a!) exp_avg_sq, Tensor scalars, Tensor? ok) -> Tensor", _direction)
def rmsprop_direct_(grad: Tensor, exp_avg_sq: Tensor, scalars: Tensor, ok: Tensor | None) -> None:
    """v ← αv + (1−α)g²; N = g / (√v + ε)."""
    op = "rmsprop_direct_"
    _check_direct(op, op, grad, scalars, ok, exp_avg_sq=exp_avg_sq)


@operation(
    "adam_dense_(Tensor(a!) weight, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor scalars, Tensor? ok, "
    "Tensor? rounding, Tensor(y!)? error=None, Tensor(z!)? error_low=None) -> ()"
)
def adam_dense_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    ok: Tensor | None,
    rounding: Tensor | None,
    error: Tensor | None = None,
    error_low: Tensor | None = None,
) -> None:
    """`adam_direct_` and `apply_dense_` in one pass: W ← keep·W − alpha·N."""
    op = "adam_dense_"
    if not (
        weight.dtype in FLOATS and grad.dtype in FLOATS and exp_avg.dtype in COMPUTE and exp_avg_sq.dtype in COMPUTE
    ):
        check_floating(op, weight=weight, grad=grad)
        check_floating(op, COMPUTE, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    if ok is not None or not weight.device == grad.device == exp_avg.device == exp_avg_sq.device:
        check_same_device(op, weight=weight, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, ok=ok)
    if not weight.shape == grad.shape == exp_avg.shape == exp_avg_sq.shape:
        for name, tensor in (("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
            check_shape(op, name, tensor, tuple(weight.shape), "the weight's shape")
    for tensor in (weight, grad, exp_avg, exp_avg_sq):
        if not tensor.is_contiguous():
            check_contiguous(op, weight=weight, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    check_step_params(op, op, scalars, ok, rounding, weight)
    if error is not None or error_low is not None:
        check_error(op, weight, error, error_low, rounding)
        check_contiguous(op, error=error, error_low=error_low)


@operation(
    "folded_adam_dense_(Tensor(a!) weight, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor scalars, Tensor? ok, "
    "Tensor? rounding, int fold) -> ()"
)
def folded_adam_dense_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    ok: Tensor | None,
    rounding: Tensor | None,
    fold: int,
) -> None:
    """`adam_dense_` with moments (…, ⌈cols/fold⌉) of the means of `fold` neighbours in a row, and the rest of each element."""
    op = "folded_adam_dense_"
    check_floating(op, weight=weight, grad=grad)
    check_floating(op, COMPUTE, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    check_same_device(op, weight=weight, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, ok=ok)
    if weight.dim() == 0:
        refuse(op, f"weight is {said(weight)}; needed: at least one dimension")
    if not 1 <= fold <= LARGEST_FOLD or fold & (fold - 1):
        refuse(op, f"fold is {fold}; needed: a power of two from 1 to {LARGEST_FOLD}")
    check_shape(op, "grad", grad, tuple(weight.shape), "the weight's shape")
    folded = (*weight.shape[:-1], -(-weight.shape[-1] // fold))
    for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        check_shape(op, name, moment, folded, f"one column for each {fold} of the weight's")
    if exp_avg.dtype != exp_avg_sq.dtype:
        refuse(op, f"exp_avg is {exp_avg.dtype}, exp_avg_sq {exp_avg_sq.dtype}; needed: one type")
    check_contiguous(op, weight=weight, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    check_step_params(op, op, scalars, ok, rounding, weight)


def _check_coded(
    op: str,
    grad: Tensor,
    codes: tuple[Tensor, ...],
    col_scale: Tensor | None,
    noise: Tensor | None,
    bits: int,
    block: int,
) -> None:
    ratio, ratio_scale, root, root_scale = codes
    check_coding(bits, block)
    if grad.dim() == 0:
        refuse(op, f"grad is {said(grad)}; needed: at least one dimension")
    shape = tuple(grad.shape)
    check_codes(op, f"lowrank_optim.{op}: ratio", ratio, ratio_scale, shape, (bits, True, block))
    check_codes(op, f"lowrank_optim.{op}: root", root, root_scale, shape, (bits, False, block))
    check_col_scale(op, col_scale, shape)
    moments = {"ratio": ratio, "ratio_scale": ratio_scale, "root": root, "root_scale": root_scale}
    check_same_device(op, grad=grad, **moments, col_scale=col_scale)
    check_contiguous(op, **moments)
    check_noise(op, noise)


@operation(
    "coded_adam_direct_(Tensor grad, Tensor(a!) ratio, Tensor(b!) ratio_scale, Tensor(c!) root, Tensor(d!) root_scale, "
    "Tensor? col_scale, Tensor scalars, Tensor? noise, Tensor? ok, int bits, int block) -> Tensor",
    _direction,
)
def coded_adam_direct_(
    grad: Tensor,
    ratio: Tensor,
    ratio_scale: Tensor,
    root: Tensor,
    root_scale: Tensor,
    col_scale: Tensor | None,
    scalars: Tensor,
    noise: Tensor | None,
    ok: Tensor | None,
    bits: int,
    block: int,
) -> None:
    """`adam_direct_` on coded moments (`quantization.adam_codes`): decode, update, N, encode."""
    op = "coded_adam_direct_"
    check_floating(op, COMPUTE, grad=grad)
    _check_coded(op, grad, (ratio, ratio_scale, root, root_scale), col_scale, noise, bits, block)
    check_step_params(op, "adam_direct_", scalars, ok)


@operation(
    "coded_adam_direct_with_norms_(Tensor grad, Tensor(a!) ratio, Tensor(b!) ratio_scale, Tensor(c!) root, "
    "Tensor(d!) root_scale, Tensor? col_scale, Tensor scalars, Tensor? noise, Tensor? ok, int bits, int block) -> "
    "(Tensor, Tensor, Tensor)",
    _direction_with_norms,
)
def coded_adam_direct_with_norms_(grad: Tensor, *others: Any) -> None:
    """`coded_adam_direct_`, and ‖N_j‖ and ‖g_j‖ of every row, (…, rows, 1)."""
    check_matrix("coded_adam_direct_with_norms_", "grad", grad)
    coded_adam_direct_(grad, *others)


@operation(
    "coded_adam_dense_(Tensor(a!) weight, Tensor grad, Tensor(b!) ratio, Tensor(c!) ratio_scale, Tensor(d!) root, "
    "Tensor(e!) root_scale, Tensor? col_scale, Tensor scalars, Tensor? noise, Tensor? ok, Tensor? rounding, int bits, int block, "
    "Tensor(y!)? error=None, Tensor(z!)? error_low=None) -> ()"
)
def coded_adam_dense_(
    weight: Tensor,
    grad: Tensor,
    ratio: Tensor,
    ratio_scale: Tensor,
    root: Tensor,
    root_scale: Tensor,
    col_scale: Tensor | None,
    scalars: Tensor,
    noise: Tensor | None,
    ok: Tensor | None,
    rounding: Tensor | None,
    bits: int,
    block: int,
    error: Tensor | None = None,
    error_low: Tensor | None = None,
) -> None:
    """`adam_dense_` on coded moments, one pass over weights, gradient and codes."""
    op = "coded_adam_dense_"
    check_floating(op, weight=weight, grad=grad)
    _check_coded(op, grad, (ratio, ratio_scale, root, root_scale), col_scale, noise, bits, block)
    check_same_device(op, weight=weight, grad=grad, ok=ok)
    check_shape(op, "grad", grad, tuple(weight.shape), "the weight's shape")
    check_contiguous(op, weight=weight, grad=grad)
    check_step_params(op, "adam_dense_", scalars, ok, rounding, weight)
    if error is not None or error_low is not None:
        check_error(op, weight, error, error_low, rounding)
        check_contiguous(op, error=error, error_low=error_low)


# ------------------------------------------------------------------------------------------------------------------------- codes


@operation(
    "quantize_rows(Tensor x, Tensor? col_scale, Tensor? noise, int bits, bool signed, int block) -> (Tensor, Tensor)"
)
def quantize_rows(
    x: Tensor, col_scale: Tensor | None, noise: Tensor | None, bits: int, signed: bool, block: int
) -> tuple[Tensor, Tensor]:
    """Codes and scales of a (…, cols) matrix by blocks of a row."""
    op = "quantize_rows"
    check_coding(bits, block)
    if x.dim() == 0:
        raise ValueError("a 0-d tensor has no rows; keep it in float32")
    check_floating(op, x=x)
    check_col_scale(op, col_scale, tuple(x.shape))
    check_noise(op, noise)
    return empty_codes(x, bits, signed, block)


@operation(
    "dequantize_rows(Tensor codes, Tensor scale, Tensor? col_scale, int bits, bool signed, int block, SymInt cols, "
    "ScalarType dtype) -> Tensor"
)
def dequantize_rows(
    codes: Tensor,
    scale: Tensor,
    col_scale: Tensor | None,
    bits: int,
    signed: bool,
    block: int,
    cols: int,
    dtype: torch.dtype,
) -> Tensor:
    """The (…, cols) matrix that codes and scales stand for."""
    op = "dequantize_rows"
    check_coding(bits, block)
    shape = (*codes.shape[:-1], cols)
    check_codes(op, "dequantize_rows", codes, scale, shape, (bits, signed, block))
    check_col_scale(op, col_scale, shape)
    return codes.new_empty(shape, dtype=dtype)


@operation("pack_basis(Tensor basis, int bits, int group) -> (Tensor, Tensor, Tensor)")
def pack_basis(basis: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points of a basis."""
    check_coding(bits, group, "group")
    if basis.dim() < 2:
        raise ValueError(f"a basis is a (…, d, r) matrix; got shape {tuple(basis.shape)}")
    check_floating("pack_basis", basis=basis)
    codes, scale = empty_codes(basis, bits, False, group)
    return codes, scale, torch.empty_like(scale)


@operation(
    "unpack_basis(Tensor codes, Tensor scale, Tensor zero, int bits, int group, SymInt cols, ScalarType dtype) -> Tensor"
)
def unpack_basis(
    codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int, cols: int, dtype: torch.dtype
) -> Tensor:
    """The basis (…, d, r) that `pack_basis` stored."""
    check_coding(bits, group, "group")
    expected = coded_shapes((*codes.shape[:-1], cols), bits, group)
    if (tuple(codes.shape), tuple(scale.shape)) != expected or zero.shape != scale.shape or codes.dtype != torch.uint8:
        raise ValueError(
            f"codes {tuple(codes.shape)}, scale {tuple(scale.shape)} and zero {tuple(zero.shape)} do not hold {cols} columns in "
            f"{bits} bits; expected {expected[0]}, {expected[1]} and {expected[1]}"
        )
    return codes.new_empty((*codes.shape[:-1], cols), dtype=dtype)


# ---------------------------------------------------------------------------------------------------------------- random numbers


@operation("gaussian_(Tensor(a!) out, Tensor key) -> ()")
def gaussian_(out: Tensor, key: Tensor) -> None:
    """Fill with standard normal numbers, a function of the key and of the positions (`counter_rng.gaussian`)."""
    check_floating("gaussian_", COMPUTE, out=out)
    check_contiguous("gaussian_", out=out)
    check_host("gaussian_", "key", key, torch.int64, ("key",))
