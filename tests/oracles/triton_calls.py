"""Calls of operations in shapes of LLaMA-7B that together launch every Triton kernel, for compiling ahead of time; nothing is run."""

from collections.abc import Callable

import torch
from torch import Tensor

from lowrank_optim.kernels import arguments
from lowrank_optim.kernels import selftest as made
from lowrank_optim.kernels.triton import coded, elementwise, folded, products, sparse

F32, BF16 = torch.float32, torch.bfloat16
ROWS, COLS, RANK = 4096, 11008, 512
OPS = elementwise.OPERATIONS | folded.OPERATIONS | coded.OPERATIONS | products.OPERATIONS | sparse.OPERATIONS


def empty(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def calls() -> list[Callable[[], object]]:
    """One for each kernel, and for each way of using it that the compiler sees as a different one."""
    ok, numbers = torch.tensor(True), arguments.pack_scalars(0.1, 0.9)
    found: list[Callable[[], object]] = []

    def add(op: str, *args: object) -> None:
        found.append(lambda: OPS[op](*args))

    left, right, none = empty(ROWS, RANK), empty(COLS, RANK).mT, (None, None, None, None)
    for dtype in (F32, BF16):
        grad, weight = empty(ROWS, COLS, dtype=dtype), empty(ROWS, COLS, dtype=dtype)
        options = (numbers, None, ok, arguments.pack_key(3, 0) if dtype == BF16 else None)
        add("project_with_norms", grad, empty(ROWS, RANK), False)
        add("apply_", weight, left, right, *options, grad, empty(1, COLS), None, None, False)
        if dtype == BF16:
            add("project", grad, empty(COLS, RANK), True)
            add("apply_", weight, left, right, *options, *none, False)
            add("apply_", weight, left, right, *options, grad, empty(1, 1), left, right, True)
    shape = (512, 512)
    for bits in (8, 4):
        add("coded_adam_direct_", *made.coded_adam_direct(shape, bits, col_scale="shared", ok=True))
        add(
            "coded_adam_dense_",
            *made.coded_adam_dense(shape, BF16, BF16, bits, col_scale="shared", ok=True, rounding=True),
        )
        add("quantize_rows", *made.quantize_rows(shape, bits=bits, signed=False, turn=3, col_scale="shared"))
        add("dequantize_rows", *made.dequantize_rows(shape, BF16, bits))
        add("pack_basis", *made.pack_basis(shape, bits=bits))
        add("unpack_basis", *made.unpack_basis(shape, bits=bits))
    add("adam_direct_", *made.adam_direct(shape, ok=True))
    add("adam_dense_", *made.adam_dense(shape, BF16, BF16, ok=True, rounding=True))
    for fold in (4, 256, 1024):
        add("folded_adam_dense_", *made.folded_adam_dense(shape, BF16, BF16, fold, ok=True, rounding=True))
    add("lion_direct_", *made.lion_direct(shape, ok=True))
    for nesterov in (True, False):
        add("sgd_direct_", *made.sgd_direct(shape, ok=True, nesterov=nesterov))
    add("rmsprop_direct_", *made.rmsprop_direct(shape, ok=True))
    add("apply_dense_", *made.apply_dense(shape, BF16, rounding=True, layout="transposed"))
    for kept in (8, 16):
        add("apply_dense_", *made.apply_dense(shape, BF16, error_bits=kept))
        add("adam_dense_", *made.adam_dense(shape, BF16, BF16, error_bits=kept))
        add("coded_adam_dense_", *made.coded_adam_dense(shape, BF16, BF16, error_bits=kept))
        add("apply_", *made.apply((), 512, 512, 64, BF16, BF16, error_bits=kept))
    add("stochastic_round_", *made.stochastic_round(shape))
    add("gaussian_", *made.gaussian(shape))
    for dtype, columns in ((BF16, torch.int16), (F32, torch.int32)):
        size = (512,), 512, 768
        add("sltrain_forward", *made.sltrain_forward(*size, 64, dtype, columns=columns))
        add("sltrain_backward_input", *made.sltrain_backward_input(*size, 64, dtype, columns=columns))
        add("sampled_product", *made.sampled_product(*size, dtype, columns=columns))
    return found
