"""Arguments of operations as the values of the library's structures (`structures`): addresses, types, sizes, numbers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_optim.kernels.arguments import TYPES
from lowrank_optim.kernels.compute import row_norms
from lowrank_optim.kernels.counter_rng import turn_offset, unsigned_key
from lowrank_optim.kernels.rounding import lie_alike

F32 = torch.float32

NO_ROWS = (0, 0, 0)
NO_NOISE = (False, 0, 0, 0)
NO_ERROR = (0, 0)
NO_WRITE = (1.0, 0.0, *NO_NOISE, *NO_ERROR)
NO_NUMBERS = (0.0, 0.0, 0.0, 0.0, 0.0)
NO_NORMS = (0, 0)
NO_PHI = (0, 0, 0)
"""Of the structures Rows, Noise, WeightError, StepParams and Adam, of the fields `norms`, `grad_norms`, and of φ and its strides."""


def off(ok: Tensor | None) -> bool:
    return ok is not None and not bool(ok)


def rows_of(matrix: Tensor | None) -> tuple[int, int, int]:
    """The structure Rows of a matrix."""
    return NO_ROWS if matrix is None else (matrix.data_ptr(), TYPES[matrix.dtype], matrix.stride(0))


def flat(tensor: Tensor) -> tuple[int, int, int]:
    """The structure Rows of a contiguous tensor, as one row."""
    return tensor.data_ptr(), TYPES[tensor.dtype], 0


def support_of(pointers: Tensor, columns: Tensor, cols: int) -> tuple[int, int, int, int, bool]:
    """The structure Support of a matrix in compressed sparse rows."""
    narrow = columns.dtype == torch.int16
    return pointers.numel() - 1, cols, pointers.data_ptr(), columns.data_ptr(), narrow


def phi_of(scale: Tensor | None, first_row: int) -> tuple[int, int, int]:
    """Address and strides of a contiguous φ, from a row on."""
    if scale is None:
        return NO_PHI
    row, col = (int(size > 1) for size in scale.shape)
    return scale.data_ptr() + 4 * first_row * row, row, col


def no_direction(grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A direction of zeros, and its and the gradient's norms."""
    direction = torch.zeros_like(grad, memory_format=torch.contiguous_format)
    return direction, *row_norms(direction, grad)


def rounding_of(rounding: Tensor | None) -> tuple[bool, int, int, int]:
    """The structure Noise of an operation's `rounding`."""
    if rounding is None:
        return NO_NOISE
    key, start = rounding.tolist()
    return True, unsigned_key(key), start, 0


def error_of(weight: Tensor, errors: Sequence[Tensor | None]) -> tuple[int, int] | None:
    """The structure WeightError of an operation's `error` and `error_low`; None where they do not lie as the weight does."""
    if not errors or errors[0] is None:
        return NO_ERROR
    if not lie_alike(weight, *errors):
        return None
    high, low = (*errors, None)[:2]
    return 0 if high is None else high.data_ptr(), 0 if low is None else low.data_ptr()


def room_for_norms(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Room for ‖N_j‖ and ‖g_j‖ of every row, (…, rows, 1)."""
    norms = grad.new_empty(*grad.shape[:-1], 1)
    return norms, torch.empty_like(norms)


def noise_of(noise: Tensor | None) -> tuple[bool, int, int, int]:
    """The structure Noise of an operation's `noise`."""
    if noise is None:
        return NO_NOISE
    key, turn, start = noise.tolist()
    return True, unsigned_key(key), start, turn_offset(turn)


def coding_of(
    shape: torch.Size, block: int, bits: int, columns: tuple[Tensor | None, int] = (None, 1)
) -> tuple[int, int, int, int, int, int]:
    """The structure Coding; `columns` is from `columns_of`."""
    cols = shape[-1]
    col_scale, rows_per_scale = columns
    source = 0 if col_scale is None else col_scale.data_ptr()
    return (shape.numel() // cols if cols else 0), cols, block, bits, source, rows_per_scale


def columns_of(col_scale: Tensor | None, shape: torch.Size) -> tuple[Tensor | None, int] | None:
    """Contiguous column scales and the number of rows that share them; None for what is not one number per column."""
    if col_scale is None:
        return None, 1
    if col_scale.dtype != F32 or col_scale.dim() > len(shape):
        return None
    rows = shape.numel() // max(shape[-1], 1)
    if col_scale.dim() == 1 or col_scale.numel() == shape[-1]:
        return col_scale.contiguous(), max(rows, 1)
    return col_scale.expand(*shape[:-2], 1, shape[-1]).contiguous(), max(shape[-2], 1)


def has_unit_rows(matrix: Tensor) -> bool:
    return matrix.shape[1] <= 1 or matrix.stride(1) == 1


def matrices_of(tensor: Tensor | None) -> list[Tensor]:
    """The matrices of a stack; none of None."""
    if tensor is None:
        return []
    return [tensor] if tensor.dim() == 2 else list(tensor.unbind())


def collapsed(tensor: Tensor) -> tuple[int, int, int] | None:
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


def readable(tensor: Tensor) -> tuple[Tensor, int]:
    """The tensor, or a contiguous copy, as a matrix with rows of unit stride, and its row stride."""
    view = collapsed(tensor)
    return (tensor, view[2]) if view is not None else (tensor.contiguous(), tensor.shape[-1])


def pairs_of(a: Tensor, b: Tensor) -> list[tuple[int, int, Tensor, int, Tensor, int, int]] | None:
    """Two tensors of one shape as matrices with rows of unit stride: rows, columns, each with its row stride, and the number of the
    first element; one matrix, or one for each of a stack. None if they are not such.
    """
    if a.is_contiguous() and b.is_contiguous():
        return [(1, a.numel(), a, 0, b, 0, 0)]
    first, second = collapsed(a), collapsed(b)
    if first is not None and second is not None:
        return [(*first[:2], a, first[2], b, second[2], 0)]
    if a.dim() < 3:
        return None
    found = []
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        below = pairs_of(x, y)
        if below is None:
            return None
        found += [(*pair[:-1], pair[-1] + i * x.numel()) for pair in below]
    return found
