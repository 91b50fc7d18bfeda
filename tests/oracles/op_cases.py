"""The cases that every backend answers as the definition does: ragged sizes, storage types, layouts, NaN and infinity, large steps.

`CASES[op]` lists them by operation; `lowrank_optim.kernels.selftest` makes the arguments, runs a kernel and compares.
"""

from collections.abc import Iterator

import torch

from lowrank_optim.kernels import selftest as made
from lowrank_optim.kernels.comparison import Case
from lowrank_optim.kernels.selftest import case

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
STORED = (F32, BF16, F16)

SHAPES = [(1, 1), (1, 7), (7, 1), (3, 20), (5, 64), (3, 257), (2, 3, 300), (1, 5000), (33, 3), (0, 5), (4, 0), (600,)]
"""One row, one column, fewer columns than a block, not a multiple of it, a stack, empty, one dimension."""

LAYOUTS = ("unaligned", "window", "transposed", "strided")
LARGE = {"keep": 1.0 - 0.9, "alpha": 30.0}
"""Learning rate times weight decay near 1, and a step that dwarfs the weights."""


def _products() -> Iterator[Case]:
    for op in ("project", "project_with_norms"):
        for right in (True, False):
            for batch, rows, cols, rank in [((), 20, 33, 3), ((), 1, 40, 1), ((3,), 9, 70, 5), ((), 64, 64, 64)]:
                for dtype in (F32, BF16):
                    yield case(op, made.project, batch, rows, cols, rank, right, dtype)
            yield case(op, made.project, (), 0, 5, 2, right)
            yield case(op, made.project, (), 70, 300, 20, right, F16)
            for layout in LAYOUTS:
                yield case(op, made.project, (), 20, 33, 3, right, BF16, layout=layout)
                yield case(op, made.project, (2,), 20, 33, 1, right, F32, layout=layout)
            for batch, rows, cols in [((), 1, 1), ((3,), 9, 70), ((), 600, 1300), ((), 5, 0), ((), 0, 5)]:
                for dtype in STORED:
                    yield case(op, made.project, batch, rows, cols, 1, right, dtype)
            yield case(op, made.project, (), 20, 33, 0, right)


def _apply() -> Iterator[Case]:
    for weight in STORED:
        for batch, rows, cols, rank in [((), 20, 33, 3), ((), 1, 1, 1), ((3,), 9, 70, 5), ((), 3, 1000, 20)]:
            rounding = {"rounding": weight == BF16, "start": 5}
            yield case("apply_", made.apply, batch, rows, cols, rank, weight, **rounding)
            for grad in STORED:
                yield case("apply_", made.apply, batch, rows, cols, rank, weight, grad, **rounding)
        for phi in ("rows", "columns", "matrix"):
            for sign, subtract in ((False, False), (True, False), (True, True)):
                more = {"phi": phi, "sign": sign, "subtract": subtract}
                yield case("apply_", made.apply, (2,), 9, 70, 5, weight, F32, **more)
        for ok in (True, False):
            yield case("apply_", made.apply, (), 20, 33, 3, weight, ok=ok)
            yield case("apply_", made.apply, (), 20, 33, 3, weight, BF16, ok=ok)
        yield case("apply_", made.apply, (), 20, 33, 3, weight, BF16, **LARGE)
        yield case("apply_", made.apply, (), 20, 33, 3, weight, keep=torch.tensor(0.75))
        yield case("apply_", made.apply, (), 20, 33, 3, weight, ok=True, keep=torch.tensor(0.75, dtype=F64))
        for layout in LAYOUTS:
            yield case("apply_", made.apply, (2,), 9, 70, 5, weight, BF16, layout=layout)
            yield case("apply_", made.apply, (), 20, 33, 3, weight, layout=layout)
        yield case("apply_", made.apply, (), 0, 5, 2, weight)
        yield case("apply_", made.apply, (), 5, 0, 2, weight, F32)
    yield case("apply_", made.apply, (2,), 9, 70, 5, BF16, BF16, rounding=True, start=2**32 - 100, layout="window")


def _dense() -> Iterator[Case]:
    for op, make in (("apply_dense_", made.apply_dense), ("adam_dense_", made.adam_dense)):
        for weight in STORED:
            for shape in SHAPES:
                yield case(op, make, shape, weight, rounding=weight == BF16, start=3)
            for ok in (True, False):
                yield case(op, make, (3, 257), weight, ok=ok)
            yield case(op, make, (3, 257), weight, **LARGE)
            yield case(op, make, (3, 257), weight, keep=1.0)
            yield case(op, make, (3, 257), weight, rounding=weight == BF16, fill="nonfinite")
            yield case(op, make, (3, 257), weight, layout="unaligned")
        yield case(op, make, (3, 257), BF16, rounding=True, start=2**32 - 300)
        yield case(op, make, (3, 257), BF16, rounding=True, start=2**40 + 5)
        yield case(op, make, (3, 257), BF16, rounding=True, fill="huge")
    for weight in STORED:
        for grad in STORED:
            yield case("adam_dense_", made.adam_dense, (3, 257), weight, grad)
        for layout in LAYOUTS:
            yield case("apply_dense_", made.apply_dense, (2, 3, 257), weight, layout=layout)
        yield case("apply_dense_", made.apply_dense, (), weight)
        yield case("apply_dense_", made.apply_dense, (3, 257), weight, keep=torch.tensor(0.75))


def _folded() -> Iterator[Case]:
    op, make = "folded_adam_dense_", made.folded_adam_dense
    for weight in STORED:
        for shape in SHAPES:
            yield case(op, make, shape, weight, rounding=weight == BF16, start=3)
        for grad in STORED:
            yield case(op, make, (3, 258), weight, grad)
        for ok in (True, False):
            yield case(op, make, (3, 258), weight, ok=ok)
        yield case(op, make, (3, 258), weight, ok=False, fill="nonfinite")
        yield case(op, make, (3, 258), weight, **LARGE)
        yield case(op, make, (3, 258), weight, rounding=weight == BF16, fill="nonfinite")
        yield case(op, make, (3, 258), weight, layout="unaligned")
        yield case(op, make, (3, 258), weight, layout="unaligned", fold=1)
    for fold in (1, 2, 8, 32, 256, 1024):
        for shape in [(3, 257), (2, 3, 2048), (2, 2500)]:
            for residual in (0.5, 1.0):
                yield case(op, make, shape, fold=fold, residual=residual)
    yield case(op, make, (3, 257), BF16, rounding=True, start=2**32 - 300)
    yield case(op, make, (4, 256), BF16, rounding=True, start=2**40 + 5)


def _stochastic_round() -> Iterator[Case]:
    op, make = "stochastic_round_", made.stochastic_round
    for shape in [(), *SHAPES]:
        yield case(op, make, shape)
        for target in STORED:
            yield case(op, make, shape, target, rounding=False)
    for fill in ("nonfinite", "tiny", "huge", "zeros", "halfway"):
        yield case(op, make, (3, 257), fill=fill)
        yield case(op, make, (3, 257), F16, rounding=False, fill=fill)
        yield case(op, make, (3, 257), BF16, rounding=False, fill=fill)
    for start in (5, 2**32 - 300, 2**33 + 1, 2**62):
        yield case(op, make, (3, 257), start=start)
    for layout in LAYOUTS:
        yield case(op, make, (2, 3, 257), layout=layout)
    yield case(op, make, (3, 257), F32, rounding=True)


def _errors() -> Iterator[Case]:
    """bfloat16 weights with what rounding drops from them."""
    for bits in (8, 16):
        kept = {"error_bits": bits}
        for shape in SHAPES:
            yield case("apply_dense_", made.apply_dense, shape, BF16, **kept)
            yield case("adam_dense_", made.adam_dense, shape, BF16, BF16, **kept)
            yield case("stochastic_round_", made.stochastic_round, shape, rounding=False, **kept)
            yield case("coded_adam_dense_", made.coded_adam_dense, shape, BF16, BF16, 4 if bits == 16 else 8, **kept)
        for fill in ("nonfinite", "tiny", "huge", "zeros", "halfway"):
            yield case("stochastic_round_", made.stochastic_round, (3, 257), rounding=False, fill=fill, **kept)
        for ok in (True, False):
            yield case("apply_dense_", made.apply_dense, (3, 257), BF16, ok=ok, **kept)
            yield case("adam_dense_", made.adam_dense, (3, 257), BF16, F32, ok=ok, **kept)
            yield case("apply_", made.apply, (), 20, 33, 3, BF16, ok=ok, **kept)
        yield case("apply_dense_", made.apply_dense, (3, 257), BF16, keep=torch.tensor(0.75), **kept)
        for layout in LAYOUTS:
            yield case("apply_dense_", made.apply_dense, (2, 3, 257), BF16, layout=layout, **kept)
            yield case("stochastic_round_", made.stochastic_round, (2, 3, 257), rounding=False, layout=layout, **kept)
            yield case("apply_", made.apply, (2,), 9, 70, 5, BF16, BF16, layout=layout, **kept)
        yield case("adam_dense_", made.adam_dense, (3, 257), BF16, layout="unaligned", **kept)
        for phi in ("rows", "columns", "matrix"):
            for sign, subtract in ((False, False), (True, True)):
                more = {"phi": phi, "sign": sign, "subtract": subtract, **kept}
                yield case("apply_", made.apply, (2,), 9, 70, 5, BF16, F32, **more)
        for batch, rows, cols, rank in [
            ((), 20, 33, 3),
            ((), 1, 1, 1),
            ((), 300, 1000, 20),
            ((), 0, 5, 2),
            ((), 5, 0, 2),
        ]:
            yield case("apply_", made.apply, batch, rows, cols, rank, BF16, **kept)


def _direct() -> Iterator[Case]:
    for shape in [(), *SHAPES]:
        yield case("adam_direct_", made.adam_direct, shape)
        yield case("lion_direct_", made.lion_direct, shape)
        yield case("sgd_direct_", made.sgd_direct, shape)
        yield case("rmsprop_direct_", made.rmsprop_direct, shape)
    for ok in (True, False):
        yield case("adam_direct_", made.adam_direct, (3, 257), ok=ok)
        yield case("lion_direct_", made.lion_direct, (3, 257), ok=ok)
        yield case("rmsprop_direct_", made.rmsprop_direct, (3, 257), ok=ok)
        for nesterov in (True, False):
            yield case("sgd_direct_", made.sgd_direct, (3, 257), ok=ok, nesterov=nesterov)
    for layout in LAYOUTS:
        yield case("adam_direct_", made.adam_direct, (3, 257), layout=layout)
        yield case("lion_direct_", made.lion_direct, (3, 257), layout=layout)
        yield case("sgd_direct_", made.sgd_direct, (3, 257), layout=layout, nesterov=True)
        yield case("rmsprop_direct_", made.rmsprop_direct, (3, 257), layout=layout)
    yield case("adam_direct_", made.adam_direct, (3, 257), step=1.0)
    yield case("rmsprop_direct_", made.rmsprop_direct, (3, 257), alpha=0.9999)
    yield case("adam_direct_", made.adam_direct, (3, 257), fill="nonfinite")
    yield case("lion_direct_", made.lion_direct, (3, 257), fill="nonfinite")
    yield case("sgd_direct_", made.sgd_direct, (3, 257), fill="nonfinite", nesterov=True)
    yield case("rmsprop_direct_", made.rmsprop_direct, (3, 257), fill="nonfinite")


def _direct_with_norms() -> Iterator[Case]:
    """Rows of many lengths, and of more than a tile; NaN and infinity stay in their own row."""
    op, make = "adam_direct_with_norms_", made.adam_direct
    for shape in [shape for shape in SHAPES if len(shape) > 1] + [(7, 33), (3, 2500), (300, 128), (2000, 1)]:
        yield case(op, make, shape)
    for ok in (True, False):
        yield case(op, make, (3, 257), ok=ok)
    for layout in LAYOUTS:
        yield case(op, make, (3, 257), layout=layout)
    yield case(op, make, (3, 257), step=1.0)
    for fill in ("nonfinite", "zeros", "tiny", "huge"):
        yield case(op, make, (3, 257), fill=fill)
    op, coded = "coded_adam_direct_with_norms_", made.coded_adam_direct
    for bits in (8, 4):
        for shape in [shape for shape in SHAPES if len(shape) > 1] + [(7, 33), (3, 2500), (300, 128), (2000, 1)]:
            yield case(op, coded, shape, bits)
        for block in (1, 3, 64, 255, 5000):
            yield case(op, coded, (2, 3, 301), bits, block, col_scale="batch", start=11)
        for fill in ("nonfinite", "zeros", "tiny", "huge"):
            yield case(op, coded, (4, 600), bits, fill=fill)
        for ok in (True, False):
            yield case(op, coded, (4, 600), bits, ok=ok)
        for layout in LAYOUTS:
            yield case(op, coded, (2, 3, 301), bits, layout=layout, col_scale="batch")


def _coded_adam() -> Iterator[Case]:
    direct, dense = "coded_adam_direct_", "coded_adam_dense_"
    for bits in (8, 4):
        for shape in SHAPES:
            yield case(direct, made.coded_adam_direct, shape, bits)
            yield case(direct, made.coded_adam_direct, shape, bits, turn=None, col_scale="shared", fresh=True)
            yield case(dense, made.coded_adam_dense, shape, BF16, BF16, bits, rounding=True, start=9)
            yield case(dense, made.coded_adam_dense, shape, bits=bits, col_scale="shared")
        for block in (1, 3, 64, 255, 1000, 5000):
            yield case(direct, made.coded_adam_direct, (2, 3, 301), bits, block, col_scale="batch", start=11)
            yield case(dense, made.coded_adam_dense, (3, 301), F32, BF16, bits, block)
            yield case(dense, made.coded_adam_dense, (2, 3, 301), F32, BF16, bits, block, col_scale="batch", start=11)
        for fill in ("nonfinite", "zeros", "tiny", "huge"):
            yield case(direct, made.coded_adam_direct, (4, 600), bits, fill=fill)
            yield case(direct, made.coded_adam_direct, (4, 600), bits, fill=fill, fresh=True, turn=None)
            yield case(dense, made.coded_adam_dense, (4, 600), bits=bits, fill=fill)
        for ok in (True, False):
            yield case(direct, made.coded_adam_direct, (4, 600), bits, ok=ok)
            yield case(dense, made.coded_adam_dense, (4, 600), BF16, F32, bits, ok=ok)
        yield case(direct, made.coded_adam_direct, (4, 600), bits, ok=False, fill="nonfinite")
        for layout in LAYOUTS:
            yield case(direct, made.coded_adam_direct, (2, 3, 301), bits, layout=layout, col_scale="batch")
        yield case(dense, made.coded_adam_dense, (3, 301), BF16, BF16, bits, layout="unaligned", rounding=True)
        for weight in STORED:
            for grad in STORED:
                yield case(dense, made.coded_adam_dense, (3, 301), weight, grad, bits)
            yield case(dense, made.coded_adam_dense, (3, 301), weight, bits=bits, **LARGE)
        yield case(direct, made.coded_adam_direct, (3, 301), bits, start=2**33 - 401, turn=2**31 + 7)


def _codes() -> Iterator[Case]:
    for bits in (8, 4):
        for signed in (True, False):
            coding = {"bits": bits, "signed": signed}
            for shape in SHAPES:
                yield case("quantize_rows", made.quantize_rows, shape, **coding)
                yield case("quantize_rows", made.quantize_rows, shape, **coding, turn=4, start=7, col_scale="shared")
                yield case("dequantize_rows", made.dequantize_rows, shape, **coding)
            for block in (1, 3, 64, 255, 1000):
                more = {**coding, "block": block, "col_scale": "batch"}
                yield case("quantize_rows", made.quantize_rows, (2, 3, 301), **more, turn=9)
                yield case("dequantize_rows", made.dequantize_rows, (2, 3, 301), **more)
            for fill in ("nonfinite", "zeros", "tiny", "huge", "ties"):
                yield case("quantize_rows", made.quantize_rows, (4, 600), **coding, fill=fill)
                yield case("quantize_rows", made.quantize_rows, (4, 600), **coding, fill=fill, turn=1)
            for dtype in (BF16, F16):
                yield case("quantize_rows", made.quantize_rows, (3, 301), dtype, **coding)
                yield case("dequantize_rows", made.dequantize_rows, (3, 301), dtype, **coding)
            for layout in LAYOUTS:
                yield case("quantize_rows", made.quantize_rows, (2, 3, 301), **coding, layout=layout)
            yield case("quantize_rows", made.quantize_rows, (3, 301), **coding, start=2**33 - 401, turn=2**40 + 3)
            yield case("quantize_rows", made.quantize_rows, (3, 301), **coding, start=2**33 - 400, turn=1)


def _bases() -> Iterator[Case]:
    for bits in (8, 4):
        for shape in (shape for shape in SHAPES if len(shape) > 1):
            yield case("pack_basis", made.pack_basis, shape, bits=bits)
            yield case("unpack_basis", made.unpack_basis, shape, bits=bits)
        for group in (1, 3, 64, 255, 1000):
            yield case("pack_basis", made.pack_basis, (2, 3, 301), bits=bits, group=group)
            yield case("unpack_basis", made.unpack_basis, (2, 3, 301), bits=bits, group=group)
        for fill in ("nonfinite", "zeros", "tiny", "huge", "ties", "between"):
            yield case("pack_basis", made.pack_basis, (4, 600), bits=bits, fill=fill)
        for dtype in (BF16, F16):
            yield case("pack_basis", made.pack_basis, (3, 301), dtype, bits)
            yield case("unpack_basis", made.unpack_basis, (3, 301), dtype, bits)
        for layout in LAYOUTS:
            yield case("pack_basis", made.pack_basis, (2, 3, 301), bits=bits, layout=layout)


def _gaussian() -> Iterator[Case]:
    for shape in SHAPES:
        yield case("gaussian_", made.gaussian, shape)
    yield case("gaussian_", made.gaussian, (300, 257), key=(1 << 64) - 5)


def _sparse() -> Iterator[Case]:
    for op, make, rank in [
        ("sltrain_forward", made.sltrain_forward, (3,)),
        ("sltrain_backward_input", made.sltrain_backward_input, (3,)),
        ("sampled_product", made.sampled_product, ()),
    ]:
        for dtype in STORED:
            for tokens, rows, cols in [((70,), 20, 33), ((1,), 40, 17), ((3, 30), 140, 48), ((5,), 1, 1), ((), 20, 33)]:
                yield case(op, make, tokens, rows, cols, *rank, dtype)
            yield case(op, make, (70,), 20, 33, *rank, dtype, columns=torch.int16)
            yield case(op, make, (130,), 20, 600, *rank, dtype, density=0.9)
        yield case(op, make, (20,), 20, 4000, *rank, columns=torch.int16)
        yield case(op, make, (0,), 20, 33, *rank)
        yield case(op, make, (0, 3), 20, 33, *rank, BF16)
        yield case(op, make, (9,), 20, 33, *rank, density=0.0)
        for layout in LAYOUTS:
            yield case(op, make, (70,), 20, 33, *rank, BF16, layout=layout)
    for dtype in STORED:
        yield case("sltrain_forward", made.sltrain_forward, (70,), 20, 33, 0, dtype, bias=False)
        yield case("sltrain_forward", made.sltrain_forward, (70,), 20, 33, 5, dtype, bias=False)
        yield case("sltrain_backward_input", made.sltrain_backward_input, (70,), 20, 33, 0, dtype)


def _pairs() -> Iterator[Case]:
    sizes = (70, 1, 2048, 4100, 64, 129)  # ragged tiles, whole ones, several units
    for rank in (1, 8, 16, 20, 48):
        for same in (True, False):
            yield case("thin_grams", made.thin_grams, sizes, rank, same)
        yield case("pair_step_", made.pair_step, sizes, rank)
        yield case("thin_turn_", made.thin_turn, sizes, rank)
    for rank in (1, 5, 16, 20):
        yield case("rite_step_", made.rite_step, (70, 129, 2048, 4100, 64, 300), rank)
    for root, shift in ((True, False), (True, True), (False, False)):
        for rank in (1, 2, 3, 16, 40):
            yield case("inverse_power", made.inverse_power, (7,), rank, root, shift)
    for fill in ("nonfinite", "zeros", "tiny"):
        yield case("inverse_power", made.inverse_power, (2, 3), 5, True, fill=fill)


CASES: dict[str, list[Case]] = {}
MAKERS = (
    _products,
    _apply,
    _dense,
    _folded,
    _stochastic_round,
    _errors,
    _direct,
    _direct_with_norms,
    _coded_adam,
    _codes,
    _bases,
    _gaussian,
    _sparse,
    _pairs,
)
for _cases in MAKERS:
    for _case in _cases():
        CASES.setdefault(_case.op, []).append(_case)
