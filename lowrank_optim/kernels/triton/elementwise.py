"""Operations of one pass over tensors of one shape: moments and directions, dense updates, rounding, random numbers.

A program takes BLOCK consecutive elements. Moments are contiguous; targets of rounding and dense updates may have any three strides
(matrices of a stack), with positions counted row by row whatever the strides.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_optim.kernels.arguments import adam_numbers
from lowrank_optim.kernels.rounding import lie_alike
from lowrank_optim.kernels.triton.arithmetic import (
    holds,
    lerp,
    load_joined,
    narrow,
    sign,
    store_split,
    to_bfloat16_stochastically,
    uniform,
    widen,
)
from lowrank_optim.kernels.triton.launching import covered, flags, key_and_start, launch

BLOCK = 1024


# -------------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _indices(n, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return index, index < n


@triton.jit
def adam_step(g, m, v, weight1, beta2, weight2, root_factor, root_offset):
    """Adam's new m and v, and N = m/(√v·root_factor + root_offset), for weight1 = 1−β₁ and weight2 = 1−β₂."""
    m = lerp(m, g, weight1)
    v = v * beta2 + (g * weight2) * g
    return m, v, tl.math.div_rn(m, tl.sqrt_rn(v) * root_factor + root_offset)


@triton.jit
def adam_direct_kernel(
    g_ptr, m_ptr, v_ptr, out_ptr, ok_ptr, n, weight1, beta2, weight2, root_factor, root_offset, BLOCK: tl.constexpr
):
    """m, v (n,) in place, N into out."""
    index, inside = _indices(n, BLOCK)
    if ok_ptr is not None:
        if not holds(ok_ptr):
            tl.store(out_ptr + index, tl.zeros([BLOCK], tl.float32), mask=inside)
            return
    g = tl.load(g_ptr + index, mask=inside)
    m = tl.load(m_ptr + index, mask=inside)
    v = tl.load(v_ptr + index, mask=inside)
    m, v, direction = adam_step(g, m, v, weight1, beta2, weight2, root_factor, root_offset)
    tl.store(m_ptr + index, m, mask=inside)
    tl.store(v_ptr + index, v, mask=inside)
    tl.store(out_ptr + index, direction, mask=inside)


@triton.jit(do_not_specialize=["key", "start"])
def adam_dense_kernel(
    w_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    ok_ptr,
    high_ptr,
    low_ptr,
    n,
    weight1,
    beta2,
    weight2,
    root_factor,
    root_offset,
    alpha,
    keep,
    key: tl.int64,
    start: tl.int64,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """m, v and the weights (n,) in place."""
    if ok_ptr is not None:
        if not holds(ok_ptr):
            return
    index, inside = _indices(n, BLOCK)
    g = widen(tl.load(g_ptr + index, mask=inside))
    m = tl.load(m_ptr + index, mask=inside)
    v = tl.load(v_ptr + index, mask=inside)
    m, v, direction = adam_step(g, m, v, weight1, beta2, weight2, root_factor, root_offset)
    tl.store(m_ptr + index, m, mask=inside)
    tl.store(v_ptr + index, v, mask=inside)
    w = load_joined(w_ptr, high_ptr, low_ptr, index, inside) * keep - direction * alpha
    store_weight(w_ptr, high_ptr, low_ptr, index, w, inside, key, start + index, STOCHASTIC)


@triton.jit
def store_weight(w_ptr, high_ptr, low_ptr, at, value, inside, key, positions, STOCHASTIC: tl.constexpr):
    """Store float32 values in the weights' type: to nearest, stochastically on the bfloat16 grid, or with what rounding drops."""
    pointers = w_ptr + at
    if high_ptr is not None:
        store_split(w_ptr, high_ptr, low_ptr, at, value, inside)
    elif STOCHASTIC:
        rounded = to_bfloat16_stochastically(value, key, positions)
        if pointers.dtype.element_ty == tl.bfloat16:
            tl.store(pointers, rounded, mask=inside)
        else:
            tl.store(pointers, widen(rounded), mask=inside)
    else:
        tl.store(pointers, narrow(value, pointers.dtype.element_ty), mask=inside)


@triton.jit
def one_moment_kernel(g_ptr, m_ptr, out_ptr, ok_ptr, n, first, second, third, RULE: tl.constexpr, BLOCK: tl.constexpr):
    """Moment in place, N into out. Lion: first = 1−β₁, second = 1−β₂; SGD, Nesterov: first = μ; RMSprop: α, 1−α, ε."""
    index, inside = _indices(n, BLOCK)
    if ok_ptr is not None:
        if not holds(ok_ptr):
            tl.store(out_ptr + index, tl.zeros([BLOCK], tl.float32), mask=inside)
            return
    g = tl.load(g_ptr + index, mask=inside)
    m = tl.load(m_ptr + index, mask=inside)
    if RULE == "lion":
        direction = sign(lerp(m, g, first))
        m = lerp(m, g, second)
    elif RULE == "rmsprop":
        m = m * first + (g * second) * g
        direction = tl.math.div_rn(g, tl.sqrt_rn(m) + third)
    else:
        m = m * first + g
        direction = m
        if RULE == "nesterov":
            direction = g + m * first
    tl.store(m_ptr + index, m, mask=inside)
    tl.store(out_ptr + index, direction, mask=inside)


@triton.jit(do_not_specialize=["key"])
def gaussian_kernel(out_ptr, n, pairs, key: tl.int64, BLOCK: tl.constexpr):
    """Elements i and pairs + i of out (n,) by Box-Muller, i < pairs = ⌈n/2⌉; in float64, as `counter_rng.fill_gaussian_`."""
    index, inside = _indices(pairs, BLOCK)
    second = index + pairs
    radius = tl.sqrt(tl.log(uniform(key, index)) * -2.0)
    angle = uniform(key, second) * 6.283185307179586  # 2π
    tl.store(out_ptr + index, (radius * tl.cos(angle)).to(tl.float32), mask=inside)
    tl.store(out_ptr + second, (radius * tl.sin(angle)).to(tl.float32), mask=second < n)


@triton.jit
def _offsets(index, rows, cols, by_batch, by_row, by_col, FLAT: tl.constexpr):
    """Where the elements of row-major index lie in a (batch, rows, cols) tensor of these strides."""
    if FLAT:
        return index
    line = index // cols
    return (line // rows) * by_batch + (line % rows) * by_row + (index % cols) * by_col


@triton.jit(do_not_specialize=["key", "start"])
def store_kernel(
    w_ptr,
    x_ptr,
    keep_ptr,
    ok_ptr,
    high_ptr,
    low_ptr,
    n,
    rows,
    cols,
    w_batch,
    w_row,
    w_col,
    x_batch,
    x_row,
    x_col,
    alpha,
    keep,
    key: tl.int64,
    start: tl.int64,
    UPDATE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """w ← keep·w − alpha·x (UPDATE; keep is 1 where `ok` does not hold) or w ← x, for (batch, rows, cols) tensors of any strides."""
    index, inside = _indices(n, BLOCK)
    value = tl.load(x_ptr + _offsets(index, rows, cols, x_batch, x_row, x_col, FLAT), mask=inside)
    at = _offsets(index, rows, cols, w_batch, w_row, w_col, FLAT)
    if UPDATE:
        if keep_ptr is not None:
            keep = tl.load(keep_ptr).to(tl.float32)
        if ok_ptr is not None:
            keep = tl.where(holds(ok_ptr), keep, 1.0)
        value = load_joined(w_ptr, high_ptr, low_ptr, at, inside) * keep - value * alpha
    store_weight(w_ptr, high_ptr, low_ptr, at, value, inside, key, start + index, STOCHASTIC)


# ----------------------------------------------------------------------------------------------------------------- operations


def _grid(n: int) -> tuple[int]:
    return (triton.cdiv(n, BLOCK),)


def _contiguous(*tensors: Tensor) -> bool:
    return all(tensor.is_contiguous() for tensor in tensors)


def adam_direct_(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: Tensor, ok: Tensor | None) -> Any:
    if not covered(grad) or not _contiguous(exp_avg, exp_avg_sq):
        return NotImplemented
    g, out, n = grad.contiguous(), torch.empty_like(exp_avg), grad.numel()
    numbers = adam_numbers(*scalars.tolist())
    launch(adam_direct_kernel, _grid(n), g, g, exp_avg, exp_avg_sq, out, flags(ok), n, *numbers, BLOCK=BLOCK)
    return out


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
) -> Any:
    if not covered(weight, grad, exp_avg, exp_avg_sq):
        return NotImplemented
    *adam, alpha, keep = scalars.tolist()
    stochastic, (key, start, *_) = key_and_start(rounding)
    n = weight.numel()
    launch(
        adam_dense_kernel,
        _grid(n),
        weight,
        weight,
        grad,
        exp_avg,
        exp_avg_sq,
        flags(ok),
        error,
        error_low,
        n,
        *adam_numbers(*adam),
        alpha,
        keep,
        key,
        start,
        STOCHASTIC=stochastic and weight.dtype == torch.bfloat16,
        BLOCK=BLOCK,
    )
    return None


def _one_moment(rule: str, grad: Tensor, moment: Tensor, ok: Tensor | None, *numbers: float) -> Any:
    if not covered(grad) or not moment.is_contiguous():
        return NotImplemented
    g, out, n = grad.contiguous(), torch.empty_like(moment), grad.numel()
    three = (*numbers, 0.0, 0.0)[:3]
    launch(one_moment_kernel, _grid(n), g, g, moment, out, flags(ok), n, *three, RULE=rule, BLOCK=BLOCK)
    return out


def lion_direct_(grad: Tensor, exp_avg: Tensor, scalars: Tensor, ok: Tensor | None) -> Any:
    beta1, beta2 = scalars.tolist()
    return _one_moment("lion", grad, exp_avg, ok, 1.0 - beta1, 1.0 - beta2)


def sgd_direct_(grad: Tensor, exp_avg: Tensor, scalars: Tensor, ok: Tensor | None, nesterov: bool) -> Any:
    (momentum,) = scalars.tolist()
    return _one_moment("nesterov" if nesterov else "sgd", grad, exp_avg, ok, momentum)


def rmsprop_direct_(grad: Tensor, exp_avg_sq: Tensor, scalars: Tensor, ok: Tensor | None) -> Any:
    alpha, eps = scalars.tolist()
    return _one_moment("rmsprop", grad, exp_avg_sq, ok, alpha, 1.0 - alpha, eps)


def gaussian_(out: Tensor, key: Tensor) -> Any:
    if not covered(out):
        return NotImplemented
    n, (word,) = out.numel(), key.tolist()
    pairs = triton.cdiv(n, 2)
    launch(gaussian_kernel, _grid(pairs), out, out, n, pairs, word, BLOCK=BLOCK)
    return None


def _store(
    target: Tensor,
    value: Tensor,
    numbers: tuple[float, float] | None,
    keep: Tensor | None,
    ok: Tensor | None,
    rounding: Tensor | None,
    errors: tuple[Tensor | None, Tensor | None],
) -> Any:
    if not covered(target, value) or not lie_alike(target, *errors):
        return NotImplemented
    flat = _contiguous(target, value)
    if not flat and target.dim() > 3:
        return NotImplemented
    whole = target.view(-1) if flat else target
    source = value.view(-1) if flat else value
    (w, x), n = (t[(None,) * (3 - t.dim())] for t in (whole, source)), target.numel()
    stochastic, (key, start, *_) = key_and_start(rounding)
    alpha, factor = numbers or (0.0, 0.0)
    launch(
        store_kernel,
        _grid(n),
        target,
        w,
        x,
        keep,
        flags(ok),
        *errors,
        n,
        *w.shape[1:],
        *w.stride(),
        *x.stride(),
        alpha,
        factor,
        key,
        start,
        UPDATE=numbers is not None,
        STOCHASTIC=stochastic and (numbers is None or target.dtype == torch.bfloat16),
        FLAT=flat,
        BLOCK=BLOCK,
    )
    return None


def apply_dense_(
    weight: Tensor,
    direction: Tensor,
    scalars: Tensor,
    keep: Tensor | None,
    ok: Tensor | None,
    rounding: Tensor | None,
    error: Tensor | None = None,
    error_low: Tensor | None = None,
) -> Any:
    alpha, factor = scalars.tolist()
    return _store(weight, direction, (alpha, factor), keep, ok, rounding, (error, error_low))


def stochastic_round_(
    target: Tensor,
    value: Tensor,
    rounding: Tensor | None,
    error: Tensor | None = None,
    error_low: Tensor | None = None,
) -> Any:
    return _store(target, value, None, None, None, rounding, (error, error_low))


OPERATIONS = {
    "adam_direct_": adam_direct_,
    "adam_dense_": adam_dense_,
    "lion_direct_": lion_direct_,
    "sgd_direct_": sgd_direct_,
    "rmsprop_direct_": rmsprop_direct_,
    "apply_dense_": apply_dense_,
    "stochastic_round_": stochastic_round_,
    "gaussian_": gaussian_,
}
