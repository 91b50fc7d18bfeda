"""The operations of `schemas` by the functions of the library: arguments sorted out here, arithmetic there.

A function declines with NotImplemented, before it changes anything, what the library does not do: float64, and matrices whose rows
are not of unit stride where a copy would be large. `ok` is read on the host: these tensors are there.
"""

from collections.abc import Callable, Sequence
from ctypes import c_float, c_int64
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.kernels.counter_rng import turn_offset, unsigned_key
from lowrank_optim.kernels.cpu.library import Library
from lowrank_optim.kernels.reference import line_norms, row_chunks

F32 = torch.float32
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The numbers of the storage types in csrc/cpu/ops.h."""

LION, SGD, NESTEROV, RMSPROP = range(4)
NO_WORDS = (0, 0, 0)

Declined = Any  # NotImplemented


def operations(ops: "Operations") -> dict[str, Callable[..., Any]]:
    """The kernels by the names of their operations."""
    names = (
        "adam_direct_",
        "adam_direct_with_norms_",
        "adam_dense_",
        "lion_direct_",
        "sgd_direct_",
        "rmsprop_direct_",
        "coded_adam_direct_",
        "coded_adam_direct_with_norms_",
        "coded_adam_dense_",
        "apply_",
        "apply_dense_",
        "stochastic_round_",
        "quantize_rows",
        "dequantize_rows",
        "pack_basis",
        "unpack_basis",
        "gaussian_",
    )
    return {name: getattr(ops, name) for name in names}


def many(ops: "Operations") -> dict[str, Callable[..., Any]]:
    """Those that take several tensors in one go (`dispatch.run_many`, `dispatch.norms`)."""
    return {
        "coded_adam_direct_": ops.many_coded_adam_direct_,
        "coded_adam_direct_with_norms_": ops.many_coded_adam_direct_with_norms_,
        "coded_adam_dense_": ops.many_coded_adam_dense_,
        "norm": ops.norms,
    }


class Operations:
    """The operations, with their arguments, on one library."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def _call(self, name: str, *args: Any) -> None:
        self.library.call(name, *args, torch.get_num_threads())

    def gaussian_(self, out: Tensor, key: Tensor) -> Declined | None:
        if out.dtype != F32:
            return NotImplemented
        (word,) = key.tolist()
        self._call("gaussian", out.numel(), out.data_ptr(), unsigned_key(word))
        return None

    # -------------------------------------------------------------------------------------------------- moments and directions

    def adam_direct_(
        self, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: Tensor, ok: Tensor | None
    ) -> Tensor | Declined:
        if grad.dtype != F32 or not (exp_avg.is_contiguous() and exp_avg_sq.is_contiguous()):
            return NotImplemented
        if _off(ok):
            return torch.zeros_like(grad, memory_format=torch.contiguous_format)
        g, out = grad.contiguous(), torch.empty_like(grad, memory_format=torch.contiguous_format)
        self._adam_direct(g, exp_avg, exp_avg_sq, scalars, out, ())
        return out

    def adam_direct_with_norms_(
        self, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: Tensor, ok: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor] | Declined:
        if grad.dtype != F32 or not (exp_avg.is_contiguous() and exp_avg_sq.is_contiguous()):
            return NotImplemented
        if grad.numel() == 0 or _off(ok):
            return _nothing(grad)
        g, out = grad.contiguous(), torch.empty_like(grad, memory_format=torch.contiguous_format)
        lengths = _lengths(grad)
        self._adam_direct(g, exp_avg, exp_avg_sq, scalars, out, lengths)
        return out, *lengths

    def _adam_direct(
        self, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: Tensor, out: Tensor, lengths: Sequence[Tensor]
    ) -> None:
        cols = g.shape[-1] if g.dim() else 1
        moments, adam = (exp_avg.data_ptr(), exp_avg_sq.data_ptr()), _adam(*scalars.tolist())
        results = (out.data_ptr(), *_addresses(lengths))
        self._call("adam", g.numel(), cols, g.data_ptr(), 0, *moments, *results, None, 0, *adam, 1.0, 0.0, *NO_WORDS)

    def adam_dense_(
        self,
        weight: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        scalars: Tensor,
        ok: Tensor | None,
        rounding: Tensor | None,
    ) -> Declined | None:
        if not _storable(weight, grad) or exp_avg.dtype != F32 or exp_avg_sq.dtype != F32:
            return NotImplemented
        if _off(ok):
            return None
        *adam, alpha, keep = scalars.tolist()
        self._call(
            "adam",
            weight.numel(),
            weight.numel(),
            *_flat(grad),
            exp_avg.data_ptr(),
            exp_avg_sq.data_ptr(),
            None,
            *_addresses(()),
            *_flat(weight),
            *_adam(*adam),
            keep,
            alpha,
            *_rounding(rounding),
        )
        return None

    def lion_direct_(self, grad: Tensor, exp_avg: Tensor, scalars: Tensor, ok: Tensor | None) -> Tensor | Declined:
        beta1, beta2 = scalars.tolist()
        return self._rule(LION, grad, exp_avg, ok, 1.0 - beta1, 1.0 - beta2)

    def sgd_direct_(
        self, grad: Tensor, exp_avg: Tensor, scalars: Tensor, ok: Tensor | None, nesterov: bool
    ) -> Tensor | Declined:
        return self._rule(NESTEROV if nesterov else SGD, grad, exp_avg, ok, *scalars.tolist())

    def rmsprop_direct_(
        self, grad: Tensor, exp_avg_sq: Tensor, scalars: Tensor, ok: Tensor | None
    ) -> Tensor | Declined:
        alpha, eps = scalars.tolist()
        return self._rule(RMSPROP, grad, exp_avg_sq, ok, alpha, 1.0 - alpha, eps)

    def _rule(self, rule: int, grad: Tensor, moment: Tensor, ok: Tensor | None, *numbers: float) -> Tensor | Declined:
        if grad.dtype != F32 or not moment.is_contiguous():
            return NotImplemented
        if _off(ok):
            return torch.zeros_like(grad, memory_format=torch.contiguous_format)
        g, out = grad.contiguous(), torch.empty_like(grad, memory_format=torch.contiguous_format)
        three = (*numbers, 0.0, 0.0)[:3]
        self._call("rule", rule, g.numel(), g.data_ptr(), moment.data_ptr(), out.data_ptr(), *three)
        return out

    def coded_adam_direct_(self, *args: Any) -> Tensor | Declined:
        return self.many_coded_adam_direct_([args])[0]

    def coded_adam_direct_with_norms_(self, *args: Any) -> tuple[Tensor, Tensor, Tensor] | Declined:
        return self.many_coded_adam_direct_with_norms_([args])[0]

    def many_coded_adam_direct_(self, calls: Sequence[Sequence[Any]]) -> list[Tensor | Declined]:
        """`coded_adam_direct_` of several gradients in one go."""
        found = self._coded_directions(calls, lambda grad: ())
        return [result if result is NotImplemented else result[0] for result in found]

    def many_coded_adam_direct_with_norms_(
        self, calls: Sequence[Sequence[Any]]
    ) -> list[tuple[Tensor, Tensor, Tensor] | Declined]:
        """`coded_adam_direct_with_norms_` of several gradients in one go."""
        return self._coded_directions(calls, _lengths)

    def _coded_directions(
        self, calls: Sequence[Sequence[Any]], make_lengths: Callable[[Tensor], tuple[Tensor, ...]]
    ) -> list[tuple[Tensor, ...] | Declined]:
        """The direction, and its and the gradient's lengths where there is room for them."""
        results: list[Any] = []
        rows, alive = [], []
        for grad, *four, col_scale, scalars, noise, ok, bits, block in calls:
            columns = _columns(col_scale, grad.shape)
            if grad.dtype != F32 or columns is None:
                results.append(NotImplemented)
                continue
            lengths = make_lengths(grad)
            if grad.numel() == 0 or _off(ok):
                results.append(_nothing(grad)[: 1 + len(lengths)])
                continue
            g, out = grad.contiguous(), torch.empty_like(grad, memory_format=torch.contiguous_format)
            words = _coded_words(g, four, bits, block, columns, (out.data_ptr(), 0, 0), noise)
            rows.append(((*words, *NO_WORDS, *_addresses(lengths)), (*_adam(*scalars.tolist()), 1.0, 0.0)))
            results.append((out, *lengths))
            alive.append((g, columns))  # what may be copies
        self._coded_adam(rows)
        return results

    def coded_adam_dense_(self, *args: Any) -> Declined | None:
        return self.many_coded_adam_dense_([args])[0]

    def many_coded_adam_dense_(self, calls: Sequence[Sequence[Any]]) -> list[Declined | None]:
        """`coded_adam_dense_` of several parameters in one go."""
        results: list[Any] = []
        rows, alive = [], []
        for weight, grad, *four, col_scale, scalars, noise, ok, rounding, bits, block in calls:
            columns = _columns(col_scale, grad.shape)
            if not _storable(weight, grad) or columns is None:
                results.append(NotImplemented)
                continue
            results.append(None)
            if _off(ok):
                continue
            *adam, alpha, keep = scalars.tolist()
            words = _coded_words(grad, four, bits, block, columns, (0, *_flat(weight)), noise)
            rows.append(((*words, *_rounding(rounding), *_addresses(())), (*_adam(*adam), keep, alpha)))
            alive.append(columns)  # what may be a copy
        self._coded_adam(rows)
        return results

    def _coded_adam(self, rows: Sequence[tuple[tuple[int, ...], tuple[float, ...]]]) -> None:
        if not rows:
            return
        words = [word for row, _ in rows for word in row]
        numbers = [number for _, row in rows for number in row]
        self._call("coded_adam", len(rows), (c_int64 * len(words))(*words), (c_float * len(numbers))(*numbers))

    def norms(self, tensors: Sequence[Tensor]) -> Tensor:
        """‖x‖ of contiguous tensors, (count,) float32, summed in float32."""
        words = [word for x in tensors for word in (x.data_ptr(), TYPES[x.dtype], x.numel())]
        found = tensors[0].new_empty(len(tensors), dtype=F32)
        self._call("norms", len(tensors), (c_int64 * len(words))(*words), found.data_ptr())
        return found

    # ----------------------------------------------------------------------------------------------------------------- weights

    def apply_(
        self,
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
    ) -> Declined | None:
        if not _storable(weight, grad) or left.dtype != F32 or right.dtype != F32 or weight.dim() > 3:
            return NotImplemented
        alpha, number = scalars.tolist()
        factor = number if keep is None else float(keep)
        if weight.dtype == F32 and grad is None:  # the matrix product does it all
            if not _off(ok):
                multiply_add = weight.addmm_ if weight.dim() == 2 else weight.baddbmm_
                multiply_add(left, right, beta=factor, alpha=-alpha)
            return None
        *_, rows, cols = weight.shape
        weights, grads = _matrices(weight), _matrices(grad)
        if not all(_unit_rows(matrix) for matrix in (*weights, *grads)):
            return NotImplemented
        if _off(ok) or weight.numel() == 0:
            return None
        on, key, start = _rounding(rounding)
        lefts, rights, phis = _matrices(left), _matrices(right), _matrices(phi)
        minuends, subtrahends = _matrices(subtract_left), _matrices(subtract_right)
        buffers: list[Tensor] = []  # of the products, made once: fresh memory costs as much as the pass over it
        for i, w in enumerate(weights):
            g, scale = (grads[i], phis[i].contiguous()) if grad is not None else (None, None)
            for chunk in row_chunks(rows, cols):
                at, part = chunk.start, w[chunk]
                if not buffers:
                    buffers = [left.new_empty(len(part), cols) for _ in range(2 if minuends else 1)]
                product = subtract = None
                if w.dtype == F32:  # decay and product in one go, then the residual
                    part.addmm_(lefts[i][chunk], rights[i], beta=factor, alpha=-alpha)
                elif left.shape[-1]:
                    product = torch.mm(lefts[i][chunk], rights[i], out=buffers[0][: len(part)])
                if minuends:
                    subtract = torch.mm(minuends[i][chunk], subtrahends[i], out=buffers[1][: len(part)])
                self._call(
                    "update",
                    len(part),
                    cols,
                    *_matrix(part),
                    _pointer(product),
                    cols,
                    *_matrix(None if g is None else g[chunk]),
                    _pointer(subtract),
                    cols,
                    sign,
                    *_phi(scale, at),
                    1.0 if w.dtype == F32 else factor,
                    alpha,
                    on,
                    key,
                    start + i * rows * cols + at * cols,
                )
        return None

    def apply_dense_(
        self,
        weight: Tensor,
        direction: Tensor,
        scalars: Tensor,
        keep: Tensor | None,
        ok: Tensor | None,
        rounding: Tensor | None,
    ) -> Declined | None:
        if not _storable(weight) or direction.dtype != F32:
            return NotImplemented
        pairs = _pairs(weight, direction)
        if pairs is None:
            return NotImplemented
        if _off(ok):
            return None
        alpha, number = scalars.tolist()
        factor = number if keep is None else float(keep)
        on, key, start = _rounding(rounding)
        for rows, cols, w, w_stride, d, d_stride, first in pairs:
            self._call(
                "update",
                rows,
                cols,
                *(w.data_ptr(), TYPES[w.dtype], w_stride),
                *(d.data_ptr(), d_stride),
                *(None, 0, 0),
                *(None, 0),
                False,
                *(None, 0, 0),
                factor,
                alpha,
                on,
                key,
                start + first,
            )
        return None

    def stochastic_round_(self, target: Tensor, value: Tensor, rounding: Tensor | None) -> Declined | None:
        # Float32 that is rounded to the grid of bfloat16 is left to the definition.
        if not _storable(target) or value.dtype != F32 or (rounding is not None and target.dtype == F32):
            return NotImplemented
        pairs = _pairs(target, value)
        if pairs is None:
            return NotImplemented
        on, key, start = _rounding(rounding)
        for rows, cols, t, t_stride, v, v_stride, first in pairs:
            place = (t.data_ptr(), TYPES[t.dtype], t_stride)
            self._call("store", rows, cols, *place, v.data_ptr(), v_stride, on, key, start + first)
        return None

    # ------------------------------------------------------------------------------------------------------------------- codes

    def quantize_rows(
        self, x: Tensor, col_scale: Tensor | None, noise: Tensor | None, bits: int, signed: bool, block: int
    ) -> tuple[Tensor, Tensor] | Declined:
        columns = _columns(col_scale, x.shape)
        if not _storable(x) or columns is None:
            return NotImplemented
        x, stride = _readable(x)
        codes, scale = _coded(x, bits, block, torch.int8 if bits == 8 and signed else torch.uint8)
        source, rows_per_scale = columns
        self._call(
            "quantize_rows",
            *_coding(x.shape, block, bits),
            signed,
            *(*_flat(x), stride),
            _pointer(source),
            rows_per_scale,
            codes.data_ptr(),
            scale.data_ptr(),
            *_noise(noise),
        )
        return codes, scale

    def dequantize_rows(
        self,
        codes: Tensor,
        scale: Tensor,
        col_scale: Tensor | None,
        bits: int,
        signed: bool,
        block: int,
        cols: int,
        dtype: torch.dtype,
    ) -> Tensor | Declined:
        shape = torch.Size((*codes.shape[:-1], cols))
        columns = _columns(col_scale, shape)
        if dtype not in TYPES or columns is None:
            return NotImplemented
        codes, scale = codes.contiguous(), scale.contiguous()
        out = codes.new_empty(shape, dtype=dtype)
        source, rows_per_scale = columns
        pointers = (codes.data_ptr(), scale.data_ptr(), _pointer(source), rows_per_scale)
        self._call("dequantize_rows", *_coding(shape, block, bits), signed, *pointers, *_flat(out))
        return out

    def pack_basis(self, basis: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor] | Declined:
        if not _storable(basis):
            return NotImplemented
        basis, stride = _readable(basis)
        codes, scale = _coded(basis, bits, group, torch.uint8)
        zero = torch.zeros_like(scale)
        results = (codes.data_ptr(), scale.data_ptr(), zero.data_ptr())
        self._call(
            "pack_basis",
            *_coding(basis.shape, group, bits),
            *(*_flat(basis), stride),
            *results,
        )
        return codes, scale, zero

    def unpack_basis(
        self, codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int, cols: int, dtype: torch.dtype
    ) -> Tensor | Declined:
        if dtype not in TYPES or scale.dtype != F32 or zero.dtype != F32:
            return NotImplemented
        codes, scale, zero = codes.contiguous(), scale.contiguous(), zero.contiguous()
        out = codes.new_empty((*codes.shape[:-1], cols), dtype=dtype)
        pointers = (codes.data_ptr(), scale.data_ptr(), zero.data_ptr())
        self._call("unpack_basis", *_coding(out.shape, group, bits), *pointers, *_flat(out))
        return out


# ------------------------------------------------------------------------------------- arguments as the library wants them


def _storable(*tensors: Tensor | None) -> bool:
    return all(tensor is None or tensor.dtype in TYPES for tensor in tensors)


def _off(ok: Tensor | None) -> bool:
    return ok is not None and not bool(ok)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _flat(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), TYPES[tensor.dtype]


def _matrix(tensor: Tensor | None) -> tuple[int | None, int, int]:
    """Address, type and row stride."""
    return (None, 0, 0) if tensor is None else (tensor.data_ptr(), TYPES[tensor.dtype], tensor.stride(0))


def _phi(scale: Tensor | None, first_row: int) -> tuple[int | None, int, int]:
    """Address and strides of a contiguous φ, from a row on."""
    if scale is None:
        return None, 0, 0
    row, col = (int(size > 1) for size in scale.shape)
    return scale.data_ptr() + 4 * first_row * row, row, col


def _nothing(grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A direction of zeros, and its and the gradient's norms."""
    direction = torch.zeros_like(grad, memory_format=torch.contiguous_format)
    return direction, *line_norms(direction, grad)


def _lengths(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Room for ‖N_j‖ and ‖g_j‖ of every row, (…, rows, 1)."""
    above, below = (grad.new_empty((*grad.shape[:-1], 1)) for _ in range(2))
    return above, below


def _addresses(lengths: Sequence[Tensor]) -> tuple[int, int]:
    """Of both `_lengths`; 0 where they are not wanted."""
    above, below = (tensor.data_ptr() for tensor in lengths) if lengths else (0, 0)
    return above, below


def _adam(beta1: float, beta2: float, eps: float, step: float) -> tuple[float, float, float, float, float]:
    """1 − β₁, β₂, 1 − β₂; N = m / (√v·correction + floor)."""
    bc1, bc2 = 1.0 - beta1**step, 1.0 - beta2**step
    return 1.0 - beta1, beta2, 1.0 - beta2, bc1 / bc2**0.5, bc1 * eps


def _rounding(rounding: Tensor | None) -> tuple[int, int, int]:
    if rounding is None:
        return NO_WORDS
    key, start = rounding.tolist()
    return 1, key, start


def _noise(noise: Tensor | None) -> tuple[int, int, int, int]:
    if noise is None:
        return 0, 0, 0, 0
    key, turn, start = noise.tolist()
    return 1, key, start, turn_offset(turn)


def _coding(shape: torch.Size, block: int, bits: int) -> tuple[int, int, int, int]:
    """Rows, columns, block and bits."""
    cols = shape[-1]
    return (shape.numel() // cols if cols else 0), cols, block, bits


def _coded_words(
    grad: Tensor,
    codes: Sequence[Tensor],
    bits: int,
    block: int,
    columns: tuple[Tensor | None, int],
    to: tuple[int, int, int],
    noise: Tensor | None,
) -> tuple[int, ...]:
    """The row of a matrix for the library's coded_adam, but for how weights are rounded.

    `columns` is from `_columns`; `to` the address of the direction, that of the weight and its type.
    """
    col_scale, rows_per_scale = columns
    return (
        *_coding(grad.shape, block, bits),
        *_flat(grad),
        *(tensor.data_ptr() for tensor in codes),
        _pointer(col_scale) or 0,
        rows_per_scale,
        *to,
        *_noise(noise),
    )


def _coded(x: Tensor, bits: int, block: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    *rows, cols = x.shape
    codes = x.new_empty((*rows, cols if bits == 8 else (cols + 1) // 2), dtype=dtype)
    return codes, x.new_empty((*rows, -(-cols // block)), dtype=F32)


def _columns(col_scale: Tensor | None, shape: torch.Size) -> tuple[Tensor | None, int] | None:
    """Contiguous column scales and the number of rows that share them; None for what is not one number per column."""
    if col_scale is None:
        return None, 1
    if col_scale.dtype != F32 or col_scale.dim() > len(shape):
        return None
    rows = shape.numel() // max(shape[-1], 1)
    if col_scale.dim() == 1 or col_scale.numel() == shape[-1]:
        return col_scale.contiguous(), max(rows, 1)
    return col_scale.expand(*shape[:-2], 1, shape[-1]).contiguous(), max(shape[-2], 1)


def _unit_rows(matrix: Tensor) -> bool:
    return matrix.shape[1] <= 1 or matrix.stride(1) == 1


def _matrices(tensor: Tensor | None) -> list[Tensor]:
    """The matrices of a stack; none of None."""
    if tensor is None:
        return []
    return [tensor] if tensor.dim() == 2 else list(tensor.unbind())


def _collapse(tensor: Tensor) -> tuple[int, int, int] | None:
    """Rows, columns and row stride of a tensor seen as one matrix with rows of unit stride; None if it is not one."""
    if tensor.is_contiguous():
        cols = tensor.shape[-1] if tensor.dim() else 1
        return (tensor.numel() // cols if cols else 0), cols, cols
    *sizes, cols = tensor.shape
    *strides, unit = tensor.stride()
    if not sizes or (cols > 1 and unit != 1):
        return None
    rows, stride = sizes[-1], strides[-1]
    for size, outer in zip(reversed(sizes[:-1]), reversed(strides[:-1]), strict=True):
        if size > 1 and rows > 1 and outer != rows * stride:
            return None
        stride = outer if rows == 1 else stride
        rows *= size
    return rows, cols, stride


def _readable(tensor: Tensor) -> tuple[Tensor, int]:
    """The tensor, or a contiguous copy, as a matrix with rows of unit stride, and its row stride."""
    view = _collapse(tensor)
    return (tensor, view[2]) if view is not None else (tensor.contiguous(), tensor.shape[-1])


def _pairs(a: Tensor, b: Tensor) -> list[tuple[int, int, Tensor, int, Tensor, int, int]] | None:
    """Two tensors of one shape as matrices with rows of unit stride: rows, columns, each with its row stride, and the number of the
    first element; one matrix, or one for each of a stack. None if they are not such.
    """
    if a.is_contiguous() and b.is_contiguous():
        return [(1, a.numel(), a, 0, b, 0, 0)]
    first, second = _collapse(a), _collapse(b)
    if first is not None and second is not None:
        return [(*first[:2], a, first[2], b, second[2], 0)]
    if a.dim() < 3:
        return None
    found = []
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        below = _pairs(x, y)
        if below is None:
            return None
        found += [(*pair[:-1], pair[-1] + i * x.numel()) for pair in below]
    return found
