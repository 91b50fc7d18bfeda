"""What the C++ backend promises beyond the answers of the definitions (`test_backends`): the same bits from every instruction set,
thread count and address, the noise of a shard, no use of a library that is not its own, and an installation without one.
"""

import ctypes
import hashlib
import json
import math
import mmap
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_optim import cli
from lowrank_optim.kernels import Loaded, Unavailable, arguments, comparison, dispatch
from lowrank_optim.kernels import selftest as made
from lowrank_optim.kernels.comparison import Case, answer
from lowrank_optim.kernels.counter_rng import fill_gaussian_, make_key
from lowrank_optim.kernels.cpu import library, structures
from lowrank_optim.kernels.selftest import case
from tests.kernels.test_backends import calls_of
from tests.oracles.op_cases import CASES

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
ROOT = Path(__file__).parents[2]
CC = shutil.which("gcc") or shutil.which("cc")
CXX = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")

backend = dispatch.backends()["cpu"]
built = pytest.mark.skipif(not isinstance(backend, Loaded), reason=f"backend cpu: {backend}")
with_cc = pytest.mark.skipif(CC is None, reason="no C compiler")
OPERATIONS = backend.operations if isinstance(backend, Loaded) else {}
MANY = backend.many if isinstance(backend, Loaded) else {}


@pytest.mark.skipif(CXX is None, reason="no C++ compiler")
def test_the_library_is_there_where_there_is_a_compiler():
    assert isinstance(backend, Loaded), f"{backend} Run `python setup.py build_ext --inplace`."


@pytest.fixture(params=["of torch", "our own"])
def threads(request):
    """Sets the number of threads; which threads they are."""
    used, before = OPERATIONS["apply_"].__self__.library, torch.get_num_threads()
    if request.param == "our own":
        used.use_openmp(None)
    elif library.openmp_of_torch() is None:
        pytest.skip("torch's OpenMP was not found")
    yield torch.set_num_threads
    torch.set_num_threads(before)
    used.use_openmp(library.openmp_of_torch())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """To the bit; NaN may be any NaN."""
    return a.keys() == b.keys() and all(torch.equal(a[name].nan_to_num(1.5), b[name].nan_to_num(1.5)) for name in a)


# ------------------------------------------------------------------------------------------------------------------ same bits


FUSED = ("thin_grams", "pair_step_", "thin_turn_", "rite_step_")
"""Products that are fused with their additions, which the baseline cannot do."""


@pytest.mark.long
@built
@pytest.mark.parametrize("op", OPERATIONS)
def test_every_instruction_set_gives_the_same_bits(op: str):
    opened = library.open_library()
    best = opened.simd
    others = [name for name in ("baseline", "avx2", "avx512") if name != best]
    try:
        for example in CASES[op]:
            want = answer(OPERATIONS[op], example)
            for name in others:
                if opened.use_simd(name):
                    got = answer(OPERATIONS[op], example)
                    if op in FUSED and name == "baseline":
                        found = comparison.compare(example, got or {}, want or {})
                        assert not found.failure, f"{example}: {name}: {found.failure}"
                        assert opened.use_simd(best)
                        continue
                    assert (got is None and want is None) or same(got or {}, want or {}), f"{example}: {name}, {best}"
                    assert opened.use_simd(best)
    finally:
        opened.use_simd(best)


def test_an_unknown_instruction_set_is_refused():
    if isinstance(backend, Loaded):
        assert not library.open_library().use_simd("mmx")


@pytest.mark.skipif(CXX is None, reason="no C++ compiler")
def test_structures_lie_in_memory_as_those_of_the_library(tmp_path: Path):
    kinds = [kind for kind in vars(structures).values() if isinstance(kind, type(ctypes.Structure))]
    kinds.remove(ctypes.Structure)
    places = {
        f"offsetof({kind.__name__}, {name.lstrip('_')})": getattr(kind, name).offset
        for kind in kinds
        for name, *_ in kind._fields_
    }
    places |= {f"sizeof({kind.__name__})": ctypes.sizeof(kind) for kind in kinds}
    asserts = "".join(f'static_assert({place} == {size}, "");\n' for place, size in places.items())
    source = tmp_path / "layout.cpp"
    source.write_text(f'#include <cstddef>\n#include "ops.h"\nusing namespace lowrank;\n{asserts}')
    command = [str(CXX), "-std=c++17", "-fsyntax-only", f"-I{ROOT / 'csrc' / 'cpu'}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(kinds) == 28


def test_a_structure_is_packed_with_its_padding_and_without_the_fields_of_the_library():
    packed = structures.NormArgs.from_buffer_copy(structures.packer(structures.NormArgs)(5, 7, 1, 64, 11))
    assert (packed.numel, packed.x.data, packed.x.dtype, packed.x.stride, packed.norm) == (5, 7, 1, 64, 11)
    assert packed._sums is None
    with pytest.raises(structures.struct.error, match="expected 5 items"):
        structures.packer(structures.NormArgs)(5, 7, 1, 64, 11, 0)


LARGE = [
    case("adam_direct_", made.adam_direct, (301, 400)),
    case("adam_dense_", made.adam_dense, (301, 400), BF16, BF16, rounding=True),
    case("folded_adam_dense_", made.folded_adam_dense, (301, 402), BF16, BF16, rounding=True),
    *(case("folded_adam_dense_", made.folded_adam_dense, (301, 400), fold=fold) for fold in (1, 2, 4, 8, 32)),
    case("lion_direct_", made.lion_direct, (301, 400)),
    case("sgd_direct_", made.sgd_direct, (301, 400)),
    case("rmsprop_direct_", made.rmsprop_direct, (301, 400)),
    case("coded_adam_direct_", made.coded_adam_direct, (2, 301, 401), 4, 25, "batch"),
    case("coded_adam_direct_", made.coded_adam_direct, (120_000,), 8),
    case("coded_adam_dense_", made.coded_adam_dense, (301, 401), BF16, F32, 8, rounding=True),
    case("apply_dense_", made.apply_dense, (301, 400), BF16, rounding=True, layout="window"),
    case("apply_", made.apply, (), 301, 1100, 3, BF16, BF16, rounding=True, layout="window"),
    case("stochastic_round_", made.stochastic_round, (301, 400)),
    case("quantize_rows", made.quantize_rows, (301, 401), bits=4, turn=2, block=25),
    case("dequantize_rows", made.dequantize_rows, (301, 401), BF16, 4, block=25),
    case("pack_basis", made.pack_basis, (301, 401), bits=4),
    case("unpack_basis", made.unpack_basis, (301, 401), bits=4),
    case("gaussian_", made.gaussian, (301, 401)),
    case("project_with_norms", made.project, (), 301, 1100, 1, True, BF16),
    case("project_with_norms", made.project, (2,), 301, 1100, 1, False, layout="window"),
    case("sltrain_forward", made.sltrain_forward, (301,), 140, 700, 3, BF16),
    case("sltrain_backward_input", made.sltrain_backward_input, (301,), 140, 700, 3, columns=torch.int16),
    case("sampled_product", made.sampled_product, (301,), 140, 700),
    case("thin_grams", made.thin_grams, (5000, 4100, 70), 16, True),
    case("pair_step_", made.pair_step, (5000, 4100, 70), 16),
    case("thin_turn_", made.thin_turn, (5000, 4100, 70), 20),
    case("inverse_power", made.inverse_power, (41,), 16, True),
    case("rite_step_", made.rite_step, (5000, 4100, 70, 300, 129, 2048), 16),
]
"""More elements than one thread keeps to itself."""


@built
@pytest.mark.parametrize("example", LARGE, ids=str)
def test_threads_change_no_bit(example: Case, threads):
    outcomes = []
    for count in (1, 2, 5):
        threads(count)
        outcomes.append(answer(OPERATIONS[example.op], example) or {})
    assert outcomes[0]
    assert same(outcomes[0], outcomes[1])
    assert same(outcomes[0], outcomes[2])


@pytest.mark.long
@built
@pytest.mark.parametrize("op", [name for name in MANY if name not in ("norm", "line_squares")])
def test_threads_change_no_bit_of_many_matrices(op: str, threads):
    outcomes = []
    for count in (1, 2, 5):
        threads(count)
        calls = calls_of(op.replace("with_norms_", ""))
        if op == "apply_":  # its products are torch's
            calls = [call for call in calls if not call[1].shape[-1] and call[9] is None]
        outcomes.append([*calls, *map(tensors_of, MANY[op](calls))])
    for one, *others in zip(*outcomes, strict=True):
        for other in others:
            assert same(*(dict(enumerate(x for x in y if isinstance(x, Tensor))) for y in (one, other)))


@built
def test_threads_and_instruction_sets_change_no_bit_of_sums(threads):
    """However many rows, or parts of a tensor, are read at a time."""
    grad, outcomes = made.draw(1, (301, 2100)), []
    opened = OPERATIONS["apply_"].__self__.library
    best = opened.simd
    try:
        for name in ("avx512", "avx2", "baseline"):
            if not opened.use_simd(name):
                continue
            for count in (1, 2, 5):
                threads(count)
                rows, columns = (MANY["line_squares"](grad, by_row) for by_row in (True, False))
                outcomes.append({"norm": MANY["norm"]([grad]), "rows": rows, "columns": columns})
    finally:
        opened.use_simd(best)
    assert len(outcomes) >= 3
    assert all(same(outcomes[0], other) for other in outcomes[1:])
    alone = torch.stack([MANY["line_squares"](row, True)[0] for row in grad.split(1)])
    assert torch.equal(outcomes[0]["rows"], alone)
    alone = torch.cat([MANY["line_squares"](part, False) for part in grad.split(7, dim=1)], dim=1)
    assert torch.equal(outcomes[0]["columns"], alone)


def tensors_of(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


@built
@pytest.mark.parametrize("op", ["adam_direct_", "adam_direct_with_norms_", "adam_dense_"])
def test_matrices_of_adam_are_declined_masked_and_empty_each_for_itself(op: str):
    make, first = (made.adam_dense, 1) if op == "adam_dense_" else (made.adam_direct, 0)
    usual, masked, empty = make((3, 40)), make((3, 40), ok=False), make((0, 5))
    wide = tuple(x.double() if i < first + 3 else x for i, x in enumerate(make((3, 40))))
    calls = [wide, usual, masked, empty, make((3, 40))]
    if first == 0:  # dense parameters are contiguous
        grad, exp_avg, *others = make((3, 40))
        calls.append((grad, exp_avg.T.contiguous().T, *others))
    before = [[x.clone() if isinstance(x, Tensor) else x for x in call] for call in calls]
    got = MANY[op](calls)
    declined = [result is NotImplemented for result in got]
    assert declined == [True, False, False, False, False, True][: len(calls)]
    for number, (call, old) in enumerate(zip(calls, before, strict=True)):
        changes = [not torch.equal(x, y) for x, y in zip(call, old, strict=True) if isinstance(x, Tensor)]
        assert any(changes) == (number in (1, 4))
    for x, y in zip((*usual, *tensors_of(got[1])), (*calls[4], *tensors_of(got[4])), strict=True):
        assert torch.equal(x, y) if isinstance(x, Tensor) else x is y
    if first == 0:
        assert tensors_of(got[1])[0].count_nonzero() == 120
        assert tensors_of(got[2])[0].count_nonzero() == 0
        assert [tuple(x.shape) for x in tensors_of(got[3])] == [(0, 5), (0, 1), (0, 1)][: len(tensors_of(got[3]))]


@pytest.mark.long
@built
def test_large_cases_are_those_of_the_definition(threads):
    threads(2)
    for example in LARGE:
        got, want = (answer(kernel, example) for kernel in (OPERATIONS[example.op], dispatch._DEFINITIONS[example.op]))
        assert got is not None
        assert want is not None
        assert not comparison.compare(example, got, want).failure


@built
def test_normal_numbers_do_not_change_between_releases(threads):
    """Those of the kernel before it had vector instructions, of which a resumed run may have a part."""
    threads(2)
    numbers = torch.empty(2**20 + 1)
    OPERATIONS["gaussian_"](numbers, arguments.pack_key(make_key(0, 0, 0, 1)))
    digest = hashlib.sha256(ctypes.string_at(numbers.data_ptr(), 4 * numbers.numel())).hexdigest()
    assert digest == "29bc8e903ab03ae8d58c9213b2ee657fe500f6cb40055bd365a4466400c204cc"


@built
def test_normal_numbers_are_those_of_float64_rounded_once():
    """But for about one in 10⁸, where float64 itself is rounded to another side."""
    got, exact = torch.empty(2**21), torch.empty(2**21, dtype=F64)
    for key in (5, 2**64 - 5):
        OPERATIONS["gaussian_"](got, arguments.pack_key(key))
        fill_gaussian_(exact, key)
        wrong = got != exact.float()
        assert int(wrong.sum()) <= 1
        torch.testing.assert_close(got[wrong], exact.float()[wrong], rtol=1.2e-7, atol=0.0)


@built
@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("rank", [1, 2])
def test_nan_and_infinity_stay_in_their_own_line(rank: int, right: bool):
    grad = made.draw(1, (300, 1500))
    grad[7, 1400], grad[290, 3] = float("nan"), float("inf")
    basis = made.positive(2, (1500 if right else 300, rank))
    reduced, squares = OPERATIONS["project_with_norms"](grad, basis, right)
    lines = grad if right else grad.mT
    finite = lines.isfinite().all(-1)
    assert int((~finite).sum()) == 2
    assert torch.equal(squares.isfinite().flatten(), finite)
    exact = lines[finite].double()
    torch.testing.assert_close(squares[finite].double(), exact.square().sum(-1, keepdim=True), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(reduced[finite].double(), exact @ basis.double(), rtol=1e-5, atol=1e-2)


@built
def test_calls_from_several_python_threads_do_not_disturb_each_other(threads):
    threads(2)
    example = LARGE[7]
    want = answer(OPERATIONS[example.op], example) or {}
    wrong = []

    def work() -> None:
        right = [same(answer(OPERATIONS[example.op], example) or {}, want) for _ in range(10)]
        wrong.extend(i for i, good in enumerate(right) if not good)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@built
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_works(threads):
    threads(3)
    target, value = torch.zeros(200_000, dtype=BF16), made.draw(1, (200_000,))
    rounding = arguments.pack_key(7, 0)
    OPERATIONS["stochastic_round_"](target, value, rounding)  # starts the threads, which a child does not have
    want = ctypes.string_at(target.data_ptr(), 400_000)
    child = os.fork()
    if child == 0:
        ctypes.memset(target.data_ptr(), 0, 400_000)
        OPERATIONS["stochastic_round_"](target, value, rounding)
        os._exit(0 if ctypes.string_at(target.data_ptr(), 400_000) == want else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@built
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_tensors_at_odd_addresses(dtype: torch.dtype):
    """Parameters may be views of a byte buffer, of a memory-mapped file say."""
    values = made.draw(1, (3, 257), dtype)
    memory = torch.zeros(values.numel() * values.element_size() + 3, dtype=torch.uint8).numpy()
    odd = torch.frombuffer(memory, dtype=dtype, offset=3).view(3, 257)
    if odd.data_ptr() % 2 == 0:
        pytest.skip("the buffer starts at an odd address")
    direction = made.draw(2, (3, 257))
    outcomes = []
    for weight in (values.clone(), odd):
        weight.copy_(values)
        OPERATIONS["apply_dense_"](weight, direction, arguments.pack_scalars(0.1, 0.9), None, None, None)
        codes, scale = OPERATIONS["quantize_rows"](weight, None, None, 8, True, 64)
        outcomes.append({"weight": weight, "codes": codes, "scale": scale})
    assert same(*outcomes)


def strided(rows: int, cols: int, stride: int, dtype: torch.dtype) -> Tensor:
    """A matrix whose rows lie far apart: address space, and memory for the rows only."""
    try:
        return torch.empty_strided((rows, cols), (stride, 1), dtype=dtype)
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")


@built
def test_offsets_beyond_two_to_the_31():
    far = 2**31 + 5
    for op, make in [
        ("apply_", lambda: made.apply((), 2, 300, 3, BF16, BF16, rounding=True)),
        ("apply_dense_", lambda: made.apply_dense((2, 300), BF16, rounding=True)),
        ("stochastic_round_", lambda: made.stochastic_round((2, 300))),
    ]:
        near = list(make())
        OPERATIONS[op](*near)
        args = list(make())
        wide = strided(2, 300, far, BF16)
        args[0] = wide.copy_(args[0])
        if op == "apply_":
            args[7] = strided(2, 300, far, BF16).copy_(args[7])
        assert OPERATIONS[op](*args) is not NotImplemented
        assert torch.equal(wide, near[0]), op
    x = strided(2, 300, far, BF16).copy_(made.draw(1, (2, 300), BF16))
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            OPERATIONS["quantize_rows"](x, None, None, 8, True, 256),
            OPERATIONS["quantize_rows"](x.contiguous(), None, None, 8, True, 256),
            strict=True,
        )
    )


# ---------------------------------------------------------------------------------------------------------------------- noise


@built
def test_stochastic_rounding_is_unbiased():
    """Mean over positions and keys of 1 + f/128, f the fraction of a bfloat16 step: the standard error is √(f(1−f)/n) steps."""
    n = 400_000
    for fraction in (0.1, 0.5, 0.9):
        for sign in (1.0, -1.0):
            value = torch.full((n,), sign * (1.0 + fraction / 128))
            target = torch.empty(n, dtype=BF16)
            OPERATIONS["stochastic_round_"](target, value, arguments.pack_key(make_key(1, 2, 3, 4), 0))
            assert set(target.tolist()) == {sign * 1.0, sign * (1.0 + 1 / 128)}
            up = (target.to(F64).abs().mean().item() - 1.0) * 128
            assert abs(up - fraction) < 5 * (fraction * (1 - fraction) / n) ** 0.5 + 2**-16


@built
@pytest.mark.parametrize(("bits", "signed", "levels"), [(8, True, 127), (8, False, 256), (4, True, 7), (4, False, 16)])
def test_coding_with_noise_is_unbiased(bits: int, signed: bool, levels: int):
    x = torch.full((1000, 256), 0.4321)
    x[:, 0] = 1.0  # the scale of each block
    codes, scale = OPERATIONS["quantize_rows"](x, None, arguments.pack_key(99, 3, 0), bits, signed, 256)
    decoded = OPERATIONS["dequantize_rows"](codes, scale, None, bits, signed, 256, 256, F32)
    fraction = 0.4321 * levels % 1.0
    error = (decoded[:, 1:].to(F64).mean().item() - 0.4321) * levels
    assert abs(error) < 5 * (fraction * (1 - fraction) / x.numel()) ** 0.5


def untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written."""
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


@pytest.mark.long
@built
@pytest.mark.skipif(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 18 * 2**30, reason="takes 13 GiB")
def test_coded_adam_beyond_two_to_the_31_elements():
    """The last row of a matrix of 2³¹ elements and some, all of whose other gradients are 0, is what it is alone."""
    rows, cols = 2**31 // 65536 + 2, 65536
    weight, grad = (untouched((rows, cols), BF16) for _ in range(2))
    ratio, root = untouched((rows, cols), torch.int8), untouched((rows, cols), torch.uint8)
    scales = [torch.zeros(rows, cols // 256) for _ in range(2)]
    grad[-1] = made.draw(1, (cols,), BF16)
    last = [tensor[-1:].clone() for tensor in (weight, grad, ratio, scales[0], root, scales[1])]
    numbers, more = arguments.pack_scalars(0.9, 0.999, 1e-8, 1.0, 0.01, 1.0), (None, None, 8, 256)
    OPERATIONS["coded_adam_dense_"](
        weight, grad, ratio, scales[0], root, scales[1], None, numbers, arguments.pack_key(5, 3, 0), *more
    )
    alone = arguments.pack_key(5, 3, (rows - 1) * cols)
    OPERATIONS["coded_adam_dense_"](*last, None, numbers, alone, *more)
    for tensor, want in zip((weight, grad, ratio, scales[0], root, scales[1]), last, strict=True):
        assert torch.equal(tensor[-1:], want)
    assert last[0].count_nonzero() > 0.9 * cols
    assert not weight[-2].any()
    assert not scales[1][:-1].any()


@built
def test_noise_belongs_to_the_position_not_to_the_shard():
    whole = made.stochastic_round((6, 300), start=2**32 - 500)
    OPERATIONS["stochastic_round_"](*whole)
    for first in (0, 1, 4):
        target, value, _ = made.stochastic_round((6, 300))
        words = arguments.pack_key(made.ROUNDING_KEY, 2**32 - 500 + first * 300)
        OPERATIONS["stochastic_round_"](target[first:], value[first:], words)
        assert torch.equal(target[first:], whole[0][first:])
    whole = made.coded_adam_dense((6, 301), BF16, rounding=True)
    OPERATIONS["coded_adam_dense_"](*whole)
    for first in (1, 4):
        part = list(made.coded_adam_dense((6, 301), BF16, rounding=True))
        for i in range(6):
            part[i] = part[i][first:].clone()
        part[8], part[10] = (
            arguments.pack_key(made.KEY, 5, first * 301),
            arguments.pack_key(made.ROUNDING_KEY, first * 301),
        )
        OPERATIONS["coded_adam_dense_"](*part)
        for i in range(6):
            assert torch.equal(part[i], whole[i][first:])


# ------------------------------------------------------------------------------------------------------- what is left to torch


@built
def test_float64_is_declined_unchanged_and_done_by_the_definition():
    weight, direction = torch.ones(5, dtype=F64), torch.ones(5, dtype=F64)
    args = (weight, direction, arguments.pack_scalars(0.25, 1.0), None, None, None)
    assert OPERATIONS["apply_dense_"](*args) is NotImplemented
    assert weight.tolist() == [1.0] * 5
    torch.ops.lowrank_optim.apply_dense_(*args)
    assert weight.tolist() == [0.75] * 5


@built
def test_autograd_notices_that_a_saved_weight_has_changed():
    for op, make in [
        ("apply_dense_", lambda w: (w, torch.ones(4, 6), arguments.pack_scalars(0.1, 1.0), None, None, None)),
        ("stochastic_round_", lambda w: (w, torch.ones(4, 6), None)),
        ("adam_dense_", lambda w: (w, *made.adam_dense((4, 6), BF16)[1:])),
        ("coded_adam_dense_", lambda w: (w, *made.coded_adam_dense((4, 6), BF16)[1:])),
        ("apply_", lambda w: (w, *made.apply((), 4, 6, 2, BF16)[1:])),
    ]:
        weight = torch.ones(4, 6, dtype=BF16, requires_grad=True)
        loss = weight.square().sum()
        with torch.no_grad():
            getattr(torch.ops.lowrank_optim, op)(*make(weight))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_every_written_argument_has_a_new_version():
    seen = set()
    for one in made.quick_cases():
        operation = getattr(torch.ops.lowrank_optim, one.op)
        args = one.make()
        written = [
            tensor
            for a, said in zip(args, operation.default._schema.arguments, strict=False)
            for tensor in (a if isinstance(a, list | tuple) else [a])
            if tensor is not None and (said.is_out or (said.alias_info and said.alias_info.is_write))
        ]
        if one.op in seen or not written or any(tensor.numel() == 0 for tensor in written):
            continue
        before = [tensor._version for tensor in written]
        operation(*args)
        assert all(tensor._version > old for tensor, old in zip(written, before, strict=True)), one.op
        seen.add(one.op)
    assert len(seen) == 17


# ------------------------------------------------------------------------------------------------------------ other libraries


def compiled(source: str, directory: Path) -> Path:
    assert CC is not None
    path = directory / "other.so"
    (directory / "other.c").write_text(source)
    subprocess.run([CC, "-shared", "-fPIC", "-o", str(path), str(directory / "other.c")], check=True)
    return path


def refusal(path: Path, monkeypatch) -> str:
    monkeypatch.setenv(library.VARIABLE, str(path))
    with pytest.raises(Unavailable) as caught:
        library.open_library()
    return str(caught.value)


@with_cc
def test_a_library_of_another_version_is_not_used(tmp_path: Path, monkeypatch):
    path = compiled("int lowrank_optim_abi_version(void) { return 999; }", tmp_path)
    message = refusal(path, monkeypatch)
    assert str(path) in message
    assert f"its ABI number is 999, this version has {library.ABI_VERSION}" in message
    dispatch.forget()
    try:  # the package goes on without it
        assert isinstance(dispatch.backends()["cpu"], Unavailable)
        torch.ops.lowrank_optim.stochastic_round_(torch.zeros(3), torch.ones(3), None)
        monkeypatch.setenv(dispatch.VARIABLE, "cpu")
        with pytest.raises(ValueError, match=r"ABI number is 999.*Available for cpu: .*reference"):
            torch.ops.lowrank_optim.stochastic_round_(torch.zeros(3), torch.ones(3), None)
    finally:
        dispatch.forget()


@with_cc
def test_a_foreign_library_is_not_used(tmp_path: Path, monkeypatch):
    assert "is some other library" in refusal(compiled("int answer(void) { return 42; }", tmp_path), monkeypatch)


@with_cc
def test_a_library_that_lacks_a_function_is_not_used(tmp_path: Path, monkeypatch):
    source = f"int lowrank_optim_abi_version(void) {{ return {library.ABI_VERSION}; }}"
    assert "lacks a function" in refusal(compiled(source, tmp_path), monkeypatch)


def test_a_file_that_is_no_library_is_not_used(tmp_path: Path, monkeypatch):
    (tmp_path / "text.so").write_text("not an ELF file")
    assert "cannot be loaded" in refusal(tmp_path / "text.so", monkeypatch)
    assert "no such file" in refusal(tmp_path / "nothing.so", monkeypatch)


# ----------------------------------------------------------------------------------------------------------------- the build


@pytest.mark.long
@pytest.mark.parametrize(
    ("compiler", "reason"), [("no-such-compiler", "there is no C++ compiler"), ("false", "`false .*` failed")]
)
def test_without_a_compiler_the_package_builds_and_says_why(tmp_path: Path, monkeypatch, compiler: str, reason: str):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)]
    env = {**os.environ, "CXX": compiler, "LOWRANK_OPTIM_BUILD_CUDA": "0"}  # nvcc, where it is there, takes long
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    directory = tmp_path / "lowrank_optim/kernels/cpu"
    assert not (directory / library.NAME).exists()
    assert "error" in json.loads((directory / library.RECORD).read_text())
    monkeypatch.delenv(library.VARIABLE, raising=False)
    monkeypatch.setattr(library, "HERE", directory)
    with pytest.raises(Unavailable, match=f"could not be built: {reason.replace('+', '.')}"):
        library.open_library()


# ---------------------------------------------------------------------------------------------------------------------- doctor


def test_doctor_reports_every_backend_and_passes(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "cpu", "triton", "cuda", "reference", "Self-test"):
        assert word in out
    if isinstance(backend, Loaded):
        assert "-ffp-contract=off" in out
        assert out.count(" ok ") >= len(OPERATIONS)


@built
def test_doctor_fails_where_an_operation_is_wrong(capsys, monkeypatch):
    def wrong(x: Tensor, *args) -> tuple[Tensor, Tensor]:
        codes, scale = OPERATIONS["quantize_rows"].__func__(OPERATIONS["quantize_rows"].__self__, x, *args)  # type: ignore[attr-defined]
        return codes + 1, scale

    monkeypatch.setitem(dispatch.backends()["cpu"].operations, "quantize_rows", wrong)  # type: ignore[union-attr]
    assert cli.main(["doctor"]) == 1
    assert re.search(r"quantize_rows +FAILED", capsys.readouterr().out)


@built
def test_openmp_is_found_whatever_else_is_mapped(tmp_path: Path, monkeypatch):
    """Files with names in any encoding, and runtimes of others."""
    torch_has = library.openmp_of_torch()
    if torch_has is None:
        pytest.skip("torch's OpenMP was not found")
    for other in (
        b"/srv/donn\xe9es.omp",
        b"/home/u/torch-env/lib/scikit_learn.libs/libgomp-a1.so.1",
        b"/a/faiss/libomp.so",
    ):
        maps = tmp_path / "maps"
        maps.write_bytes(b"00-01 r-xp 0 0 0 " + other + b"\n" + library.MAPS.read_bytes())
        with monkeypatch.context() as patch:
            patch.setattr(library, "MAPS", maps)
            assert library.openmp_of_torch()._name == torch_has._name
            maps.write_bytes(b"00-01 r-xp 0 0 0 " + other + b"\n")
            assert library.openmp_of_torch() is None
