"""Products with a sparse matrix by torch's own, on the CPU in float32 and float64, which it has there for whole matrices.

Against dense slices of rows (`sparse_reference`) the product that samples takes half the time, the others four fifths. 16-bit types,
other devices and builds of torch without MKL, where these products are missing, are left to the definitions.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.kernels.checks import COMPUTE
from lowrank_optim.kernels.sparse_reference import low_rank, token_rows


def _matrix(values: Tensor, pointers: Tensor, columns: Tensor, cols: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        size = (pointers.numel() - 1, cols)
        return torch.sparse_csr_tensor(pointers, columns.int(), values, size, check_invariants=False)


def _covered(x: Tensor, columns: Tensor) -> bool:
    there = x.device.type == "cpu" and x.dtype in COMPUTE and torch.backends.mkl.is_available()
    return there and x.numel() > 0 and columns.numel() > 0


def sltrain_forward(
    x: Tensor,
    u: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None,
    values: Tensor,
    pointers: Tensor,
    columns: Tensor,
) -> Any:
    if not _covered(x, columns):
        return NotImplemented
    out = low_rank(x, u, None if lora_b is None else lora_b.mT, bias, pointers.numel() - 1)
    turned = token_rows(out).mT
    torch.addmm(turned, _matrix(values, pointers, columns, x.shape[-1]), token_rows(x).mT, out=turned)
    return out


def sltrain_backward_input(
    grad: Tensor, q: Tensor | None, lora_a: Tensor | None, values: Tensor, pointers: Tensor, columns: Tensor, cols: int
) -> Any:
    if not _covered(grad, columns):
        return NotImplemented
    out = low_rank(grad, q, lora_a, None, cols)
    token_rows(out).addmm_(token_rows(grad), _matrix(values, pointers, columns, cols))
    return out


def sampled_product(grad: Tensor, x: Tensor, pointers: Tensor, columns: Tensor) -> Any:
    if not _covered(x, columns):
        return NotImplemented
    places = _matrix(x.new_zeros(columns.numel()), pointers, columns, x.shape[-1])
    return torch.sparse.sampled_addmm(places, token_rows(grad).mT, token_rows(x), beta=0.0).values()
