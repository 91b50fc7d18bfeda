"""The operations of `schemas` by the functions of the library, on torch's current stream; and several of a kind in one launch.

A function declines with NotImplemented, before it changes anything, what the library does not do: float64, and moments that are not
contiguous. Nothing waits for the device.
"""

import ctypes
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.kernels.arguments import LION, NESTEROV, RMSPROP, SGD, TYPES, adam_numbers, all_float32, storable
from lowrank_optim.kernels.checks import empty_codes
from lowrank_optim.kernels.compute import row_norms
from lowrank_optim.kernels.counter_rng import turn_offset, unsigned_key
from lowrank_optim.kernels.cuda.library import (
    Adam,
    AdamElement,
    CodedAdamBlock,
    Coding,
    DequantizeBlock,
    GaussianElement,
    Library,
    Noise,
    PackBlock,
    QuantizeBlock,
    RuleElement,
    StepParams,
    StoreElement,
    Strided,
    UnpackBlock,
)
from lowrank_optim.kernels.dispatch import for_one
from lowrank_optim.kernels.nibbles import KernelCodes, starts_with_bytes
from lowrank_optim.kernels.rounding import lie_alike


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _stream(library: Library, tensor: Tensor) -> int | None:
    return None if library.on_host else torch.cuda.current_stream(tensor.device).cuda_stream


def _device(library: Library, tensor: Tensor) -> AbstractContextManager[object]:
    return nullcontext() if library.on_host else torch.cuda.device(tensor.device)


def _call(library: Library, on: Tensor, name: str, *args: Any) -> None:
    with _device(library, on):
        library.call(name, *args, _stream(library, on))


def _noise(words: Tensor | None, to_bfloat16: bool = True) -> Noise:
    """`noise` [key, turn, start] or `rounding` [key, start]; off for targets of other types than bfloat16."""
    if words is None or not to_bfloat16:
        return Noise()
    key, *turn, start = words.tolist()
    shift = turn_offset(*turn) if turn else 0
    return Noise(1, shift, unsigned_key(key), start)


def _coding(shape: tuple[int, ...], bits: int, block: int, col_scale: Tensor | None) -> tuple[Coding, Tensor | None]:
    """The description of a matrix that is not empty, and the tensor that its column scales lie in."""
    cols = shape[-1]
    rows = torch.Size(shape[:-1]).numel()
    per_scale = 0
    if col_scale is not None and col_scale.numel() != cols:
        col_scale, per_scale = col_scale.expand(*shape[:-2], 1, cols), shape[-2]
    columns = None if col_scale is None else col_scale.contiguous()
    block, packed = min(block, cols), starts_with_bytes(cols, bits, block)
    return Coding(rows, cols, block, _pointer(columns), per_scale, bits, packed), columns


# -------------------------------------------------------------------------------------------------------------------- elements


def _rule(library: Library, rule: int, grad: Tensor, moment: Tensor, ok: Tensor | None, *numbers: float) -> Any:
    if not all_float32(grad) or not moment.is_contiguous():
        return NotImplemented
    g, out = grad.contiguous(), torch.empty_like(moment)
    op = RuleElement(g.data_ptr(), moment.data_ptr(), out.data_ptr(), _pointer(ok), rule, *numbers)
    _call(library, grad, "rule", op, grad.numel())
    return out


def lion_direct_(library: Library, grad: Tensor, exp_avg: Tensor, scalars: Tensor, ok: Tensor | None) -> Any:
    beta1, beta2 = scalars.tolist()
    return _rule(library, LION, grad, exp_avg, ok, 1.0 - beta1, 1.0 - beta2)


def sgd_direct_(
    library: Library, grad: Tensor, exp_avg: Tensor, scalars: Tensor, ok: Tensor | None, nesterov: bool
) -> Any:
    (momentum,) = scalars.tolist()
    return _rule(library, NESTEROV if nesterov else SGD, grad, exp_avg, ok, momentum)


def rmsprop_direct_(library: Library, grad: Tensor, exp_avg_sq: Tensor, scalars: Tensor, ok: Tensor | None) -> Any:
    alpha, eps = scalars.tolist()
    return _rule(library, RMSPROP, grad, exp_avg_sq, ok, alpha, 1.0 - alpha, eps)


def gaussian_(library: Library, out: Tensor, key: Tensor) -> Any:
    if not all_float32(out):
        return NotImplemented
    (word,) = key.tolist()
    _call(library, out, "gaussian", GaussianElement(out.data_ptr(), out.numel(), unsigned_key(word)))
    return None


def _store(
    library: Library,
    target: Tensor,
    value: Tensor,
    numbers: tuple[float, ...] | None,
    keep: Tensor | None,
    ok: Tensor | None,
    rounding: Noise,
    errors: tuple[Tensor | None, Tensor | None],
) -> Any:
    if not lie_alike(target, *errors):
        return NotImplemented
    flat = target.is_contiguous() and value.is_contiguous()
    if not storable(target) or not all_float32(value) or (not flat and target.dim() > 3):
        return NotImplemented
    if target.numel() == 0:
        return None
    w, x = (t.view(-1) if flat else t for t in (target, value))
    w, x = (t[(None,) * (3 - t.dim())] for t in (w, x))
    op = StoreElement(
        target.data_ptr(),
        value.data_ptr(),
        _pointer(keep),
        _pointer(ok),
        *w.shape[1:],
        Strided(*w.stride()),
        Strided(*x.stride()),
        TYPES[target.dtype],
        flat,
        numbers is not None,
        keep is not None and keep.dtype == torch.float64,
        StepParams(*(numbers or (0.0, 0.0)), *map(_pointer, errors)),
        rounding,
    )
    _call(library, target, "store", op, target.numel())
    return None


def apply_dense_(
    library: Library,
    weight: Tensor,
    direction: Tensor,
    scalars: Tensor,
    keep: Tensor | None,
    ok: Tensor | None,
    rounding: Tensor | None,
    error: Tensor | None = None,
    error_low: Tensor | None = None,
) -> Any:
    noise = _noise(rounding, weight.dtype == torch.bfloat16)
    return _store(library, weight, direction, tuple(scalars.tolist()), keep, ok, noise, (error, error_low))


def stochastic_round_(
    library: Library,
    target: Tensor,
    value: Tensor,
    rounding: Tensor | None,
    error: Tensor | None = None,
    error_low: Tensor | None = None,
) -> Any:
    return _store(library, target, value, None, None, None, _noise(rounding), (error, error_low))


# ----------------------------------------------------------------------------------------------------------------------- codes


def quantize_rows(
    library: Library,
    x: Tensor,
    col_scale: Tensor | None,
    noise: Tensor | None,
    bits: int,
    signed: bool,
    block: int,
) -> Any:
    if not storable(x) or not all_float32(col_scale):
        return NotImplemented
    shape = tuple(x.shape)
    codes, scale = empty_codes(x, bits, signed, block)
    if x.numel() == 0:
        return codes, scale
    source, (coding, columns) = x.contiguous(), _coding(shape, bits, block, col_scale)
    target = KernelCodes.of(codes, shape[-1], bits, coding.packed)
    op = QuantizeBlock(
        coding, source.data_ptr(), target.whole.data_ptr(), scale.data_ptr(), TYPES[x.dtype], signed, _noise(noise)
    )
    _call(library, x, "quantize_rows", op)
    target.store()
    del columns  # alive until here
    return codes, scale


def dequantize_rows(
    library: Library,
    codes: Tensor,
    scale: Tensor,
    col_scale: Tensor | None,
    bits: int,
    signed: bool,
    block: int,
    cols: int,
    dtype: torch.dtype,
) -> Any:
    if dtype not in TYPES or not all_float32(col_scale) or not (codes.is_contiguous() and scale.is_contiguous()):
        return NotImplemented
    shape = (*codes.shape[:-1], cols)
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    if out.numel() == 0:
        return out
    coding, columns = _coding(shape, bits, block, col_scale)
    source = KernelCodes.of(codes, cols, bits, coding.packed)
    op = DequantizeBlock(coding, source.whole.data_ptr(), scale.data_ptr(), out.data_ptr(), TYPES[dtype], signed)
    _call(library, codes, "dequantize_rows", op)
    del columns
    return out


def pack_basis(library: Library, basis: Tensor, bits: int, group: int) -> Any:
    if not storable(basis):
        return NotImplemented
    shape = tuple(basis.shape)
    codes, scale = empty_codes(basis, bits, False, group)
    zero = torch.empty_like(scale)
    if basis.numel() == 0:
        return codes, scale, zero
    source, (coding, _) = basis.contiguous(), _coding(shape, bits, group, None)
    target = KernelCodes.of(codes, shape[-1], bits, coding.packed)
    results = (target.whole.data_ptr(), scale.data_ptr(), zero.data_ptr())
    _call(library, basis, "pack_basis", PackBlock(coding, source.data_ptr(), *results, TYPES[basis.dtype]))
    target.store()
    return codes, scale, zero


def unpack_basis(
    library: Library,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group: int,
    cols: int,
    dtype: torch.dtype,
) -> Any:
    contiguous = codes.is_contiguous() and scale.is_contiguous() and zero.is_contiguous()
    if dtype not in TYPES or not all_float32(scale, zero) or not contiguous:
        return NotImplemented
    out = torch.empty((*codes.shape[:-1], cols), dtype=dtype, device=codes.device)
    if out.numel() == 0:
        return out
    coding, _ = _coding(tuple(out.shape), bits, group, None)
    source = KernelCodes.of(codes, cols, bits, coding.packed).whole
    pointers = (source.data_ptr(), scale.data_ptr(), zero.data_ptr(), out.data_ptr())
    _call(library, codes, "unpack_basis", UnpackBlock(coding, *pointers, TYPES[dtype]))
    return out


class _CodedAdam:
    """One matrix's step: its description, and the tensors that have to live until the kernel is launched."""

    def __init__(
        self,
        out: Tensor,
        weight: Tensor | None,
        grad: Tensor,
        codes: Sequence[Tensor],
        col_scale: Tensor | None,
        adam: list[float],
        write: StepParams,
        noise: Tensor | None,
        ok: Tensor | None,
        rounding: Tensor | None,
        bits: int,
        block: int,
    ) -> None:
        coding, self.columns = _coding(tuple(grad.shape), bits, block, col_scale)
        ratio, ratio_scale, root, root_scale = codes
        self.grad = grad.contiguous()
        self.codes = [KernelCodes.of(t, grad.shape[-1], bits, coding.packed) for t in (ratio, root)]
        self.op = CodedAdamBlock(
            coding,
            self.grad.data_ptr(),
            self.codes[0].whole.data_ptr(),
            ratio_scale.data_ptr(),
            self.codes[1].whole.data_ptr(),
            root_scale.data_ptr(),
            out.data_ptr() if weight is None else None,
            _pointer(weight),
            _pointer(ok),
            TYPES[grad.dtype],
            TYPES[out.dtype],
            Adam(*adam_numbers(*adam)),
            write,
            _noise(noise),
            _noise(rounding, out.dtype == torch.bfloat16),
        )

    def store(self) -> None:
        for codes in self.codes:
            codes.store()


# ---------------------------------------------------------------------------------------------------------------- many at once


# All tensors of one device: one launch for about thirty of them, twenty where moments are coded.


def _launch(library: Library, on: Tensor, steps: list[AdamElement], sizes: list[int]) -> None:
    ops, numbers = (AdamElement * len(steps))(*steps), (ctypes.c_int64 * len(sizes))(*sizes)
    _call(library, on, "adam", ops, numbers, len(steps))


def _launch_coded(library: Library, on: Tensor, steps: list[_CodedAdam]) -> None:
    _call(library, on, "coded_adam", (CodedAdamBlock * len(steps))(*(step.op for step in steps)), len(steps))
    for step in steps:
        step.store()


def many_adam_direct_(library: Library, calls: Sequence[Sequence[Any]]) -> list[Any]:
    """`adam_direct_` of several gradients."""
    results: list[Any] = []
    steps, grads = [], []
    for grad, exp_avg, exp_avg_sq, scalars, ok in calls:
        if not all_float32(grad) or not (exp_avg.is_contiguous() and exp_avg_sq.is_contiguous()):
            results.append(NotImplemented)
            continue
        grads.append(grad.contiguous())  # what may be a copy lives until the launch
        results.append(out := torch.empty_like(exp_avg))
        steps.append(
            AdamElement(
                *(tensor.data_ptr() for tensor in (grads[-1], exp_avg, exp_avg_sq, out)),
                ok=_pointer(ok),
                grad_dtype=TYPES[grad.dtype],
                adam=Adam(*adam_numbers(*scalars.tolist())),
            )
        )
    if steps:
        _launch(library, grads[0], steps, [grad.numel() for grad in grads])
    return results


def many_adam_dense_(library: Library, calls: Sequence[Sequence[Any]]) -> list[Any]:
    """`adam_dense_` of several parameters."""
    results: list[Any] = []
    steps, weights = [], []
    for weight, grad, exp_avg, exp_avg_sq, scalars, ok, rounding, *errors in calls:
        if not storable(weight, grad) or not all_float32(exp_avg, exp_avg_sq):
            results.append(NotImplemented)
            continue
        results.append(None)
        weights.append(weight)
        *adam, alpha, keep = scalars.tolist()
        steps.append(
            AdamElement(
                *(tensor.data_ptr() for tensor in (grad, exp_avg, exp_avg_sq)),
                None,
                weight.data_ptr(),
                _pointer(ok),
                TYPES[grad.dtype],
                TYPES[weight.dtype],
                Adam(*adam_numbers(*adam)),
                StepParams(alpha, keep, *map(_pointer, errors)),
                _noise(rounding, weight.dtype == torch.bfloat16),
            )
        )
    if steps:
        _launch(library, weights[0], steps, [weight.numel() for weight in weights])
    return results


def many_coded_adam_direct_(library: Library, calls: Sequence[Sequence[Any]]) -> list[Any]:
    """`coded_adam_direct_` of several gradients."""
    results: list[Any] = []
    steps = []
    for grad, *codes, col_scale, scalars, noise, ok, bits, block in calls:
        if not all_float32(grad, col_scale):
            results.append(NotImplemented)
            continue
        results.append(out := torch.empty_like(grad, memory_format=torch.contiguous_format))
        if grad.numel():
            adam, write = scalars.tolist(), StepParams()
            steps.append(_CodedAdam(out, None, grad, codes, col_scale, adam, write, noise, ok, None, bits, block))
    if steps:
        _launch_coded(library, steps[0].grad, steps)
    return results


def many_coded_adam_dense_(library: Library, calls: Sequence[Sequence[Any]]) -> list[Any]:
    """`coded_adam_dense_` of several parameters."""
    results: list[Any] = []
    steps = []
    for weight, grad, ratio, ratio_scale, root, root_scale, *more in calls:
        col_scale, scalars, noise, ok, rounding, bits, block, *errors = more
        if not storable(weight, grad) or not all_float32(col_scale):
            results.append(NotImplemented)
            continue
        results.append(None)
        if weight.numel():
            codes, (*adam, alpha, keep) = (ratio, ratio_scale, root, root_scale), scalars.tolist()
            write = StepParams(alpha, keep, *map(_pointer, errors))
            steps.append(
                _CodedAdam(weight, weight, grad, codes, col_scale, adam, write, noise, ok, rounding, bits, block)
            )
    if steps:
        _launch_coded(library, steps[0].grad, steps)
    return results


def many_adam_direct_with_norms_(library: Library, calls: Sequence[Sequence[Any]]) -> list[Any]:
    """`adam_direct_with_norms_` of several gradients: one launch, and two reductions for each."""
    return _with_norms(calls, many_adam_direct_(library, calls))


def many_coded_adam_direct_with_norms_(library: Library, calls: Sequence[Sequence[Any]]) -> list[Any]:
    """`coded_adam_direct_with_norms_` of several gradients: one launch, and two reductions for each."""
    return _with_norms(calls, many_coded_adam_direct_(library, calls))


def _with_norms(calls: Sequence[Sequence[Any]], directions: list[Any]) -> list[Any]:
    pairs = zip(directions, calls, strict=True)
    return [done if done is NotImplemented else (done, *row_norms(done, grad)) for done, (grad, *_) in pairs]


def many(library: Library) -> dict[str, Callable[..., Any]]:
    """What takes several tensors in one launch (`dispatch.run_many`)."""
    return {
        "adam_direct_": partial(many_adam_direct_, library),
        "adam_direct_with_norms_": partial(many_adam_direct_with_norms_, library),
        "adam_dense_": partial(many_adam_dense_, library),
        "coded_adam_direct_": partial(many_coded_adam_direct_, library),
        "coded_adam_direct_with_norms_": partial(many_coded_adam_direct_with_norms_, library),
        "coded_adam_dense_": partial(many_coded_adam_dense_, library),
    }


_OPERATIONS: tuple[Callable[..., Any], ...] = (
    lion_direct_,
    sgd_direct_,
    rmsprop_direct_,
    apply_dense_,
    stochastic_round_,
    gaussian_,
    quantize_rows,
    dequantize_rows,
    pack_basis,
    unpack_basis,
)


def operations(library: Library) -> dict[str, Callable[..., Any]]:
    """The operations of `schemas` that the library does, by name."""
    alone = {name: partial(for_one, function) for name, function in many(library).items()}
    return alone | {function.__name__: partial(function, library) for function in _OPERATIONS}
