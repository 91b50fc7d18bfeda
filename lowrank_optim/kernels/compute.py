"""What definitions and backends share: types of arithmetic, masks and numbers on the device, chunks of rows, norms."""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 20
"""Elements that a float32 working copy of a low-precision matrix may have (4 MiB)."""

CACHE_ELEMENTS = 1 << 17
"""Elements of a chunk for each thread of the CPU: few enough for its caches, and so many that calls of torch cost little."""

MULTIPLIES_BFLOAT16 = torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
"""Whether the processor has units for products of bfloat16."""

NORM_RUN = 256
"""Elements whose norm is taken in a low-precision type; tensors of fewer than its square are converted."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that arithmetic on a parameter of this type is done in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def masked_scalar(ok: Tensor, value: float | Tensor, otherwise: float, dtype: torch.dtype) -> Tensor:
    """0-d tensor on the device: `value` where `ok` holds, else `otherwise`; in `dtype`, which torch.where on two numbers is not."""
    return torch.where(ok, scalar(value, dtype, ok.device), scalar(otherwise, dtype, ok.device))


def scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0-d tensor on the device, made there: a copy from the host would wait."""
    return value.to(dtype) if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=device)


def row_chunks(rows: int, cols: int, elements: int | None = None) -> Iterator[slice]:
    """Slices of rows that together cover a rows×cols matrix, each of at most `elements` elements (at least one row)."""
    size = max(1, (CHUNK_ELEMENTS if elements is None else elements) // max(cols, 1))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def cache_elements(device: torch.device) -> int:
    """Elements of a chunk that is read and written by dozens of operations: on the CPU so few that they stay in the caches."""
    return min(CACHE_ELEMENTS * torch.get_num_threads(), CHUNK_ELEMENTS) if device.type == "cpu" else CHUNK_ELEMENTS


def is_known(condition: Tensor) -> bool:
    """Whether the host knows that a condition holds for all elements: not where it would have to wait for a device."""
    return condition.device.type == "cpu" and bool(condition.all())


def is_slow_product(x: Tensor) -> bool:
    """Whether torch multiplies a matrix of this type slowly where it lies: bfloat16 on a processor without units for it."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not MULTIPLIES_BFLOAT16


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b, for a matrix b of the type of `a`.

    Where bfloat16 is slow, it is one of float32, rounded: torch's own of two row-major matrices takes a hundred times as long.
    """
    return (a.float() @ b.float()).to(a.dtype) if is_slow_product(a) else a @ b


def norm(tensor: Tensor) -> Tensor:
    """‖tensor‖, 0-d, in the compute type, in one pass and without a copy of a whole large tensor in that type.

    Large bfloat16 tensors on the CPU: the norms of runs of 256 elements, summed in float32, are rounded to bfloat16 on their way;
    the error of the result is a few parts in 10⁵ (and no sum over- or underflows for it).
    """
    dtype = compute_dtype(tensor.dtype)
    total: Tensor
    if tensor.dtype == dtype or tensor.device.type != "cpu" or tensor.numel() < NORM_RUN**2:
        total = torch.linalg.vector_norm(tensor, dtype=dtype)
        return total
    flat = tensor.reshape(-1)
    if tensor.dtype == torch.bfloat16:
        whole = flat.numel() - flat.numel() % NORM_RUN
        runs = torch.linalg.vector_norm(flat[:whole].view(-1, NORM_RUN), dim=-1).to(dtype)
        parts = torch.cat([runs, flat[whole:].to(dtype)])
    else:
        chunks = row_chunks(flat.numel(), 1)
        parts = torch.stack([torch.linalg.vector_norm(flat[chunk].to(dtype)) for chunk in chunks])
    total = torch.linalg.vector_norm(parts)
    return total


def row_norms(direction: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """‖N_j‖ and ‖g_j‖ of every row, (…, rows, 1)."""
    above: Tensor = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
    below: Tensor = torch.linalg.vector_norm(grad, dim=-1, keepdim=True)
    return above, below


def line_sums(tensor: Tensor, dim: int, power: int) -> Tensor:
    """Σ |x| (`power` 1) or Σ x² (2) of every row (`dim` −1, (…, rows, 1)) or column (−2), without a copy of the whole tensor."""
    dtype = compute_dtype(tensor.dtype)
    if tensor.device.type != "cpu" or (dim == -1 and tensor.dtype == dtype):
        norms: Tensor = torch.linalg.vector_norm(tensor, ord=power, dim=dim, keepdim=True, dtype=dtype)
        return norms if power == 1 else norms.square_()
    *batch, rows, cols = tensor.shape
    sums = tensor.new_zeros((*batch, rows, 1) if dim == -1 else (*batch, 1, cols), dtype=dtype)
    for chunk in row_chunks(rows, tensor[..., :1, :].numel(), cache_elements(tensor.device)):
        part = tensor[..., chunk, :].to(dtype)
        found = (part.abs() if power == 1 else part.square()).sum(dim, keepdim=True)
        (sums[..., chunk, :] if dim == -1 else sums).add_(found)
    return sums
