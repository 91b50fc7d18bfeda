"""Every operation of every backend that is there, against the definition, on the cases of `op_cases`."""

import os
import re
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_optim.kernels import Loaded, arguments, comparison, compute, dispatch, schemas
from lowrank_optim.kernels import selftest as made
from lowrank_optim.kernels.comparison import Case, answer, compare
from lowrank_optim.kernels.selftest import case
from lowrank_optim.kernels.torch import coded_adam
from tests.oracles.op_cases import CASES

F32, BF16 = torch.float32, torch.bfloat16
DECLINED_LAYOUTS = ("transposed", "strided")
"""Layouts that a backend may leave to the definition."""


def device_of(backend: Loaded) -> str:
    """The device to test on: an accelerator where the backend serves it, else the CPU (Triton under its interpreter)."""
    accelerator = "cuda" in backend.devices and torch.cuda.is_available()
    return "cuda" if accelerator else "cpu"


LOADED = {name: backend for name, backend in dispatch.backends().items() if isinstance(backend, Loaded)}


def repeats(name: str, case: Case, cases: list[Case]) -> bool:
    """Whether Triton's interpreter, which is slow, may leave it out.

    float16 is loaded and stored as bfloat16 is, once is enough. Of the largest products, which take a third of the time of all, each
    type is kept with one of the two operations, whose kernel is the same but for the norms. Of the largest sparse ones, which take
    another third, those of many columns are kept with one operation, and dense rows in one type.
    """
    halves = [other for other in cases if re.search(r"\bfloat16\b", other.label)]
    largest = "() 600 1300 1 " in case.label and ("bfloat16" in case.label) != (case.op == "project_with_norms")
    wide = "20 20 4000" in case.label and case.op != "sltrain_forward"
    filled = "density=0.9" in case.label and "bfloat16" in case.label
    return name == "triton" and (case in halves[1:] or largest or wide or filled)


PAIRS = [
    pytest.param(name, case, id=f"{name}: {case}", marks=[pytest.mark.full] if repeats(name, case, CASES[op]) else [])
    for name, backend in LOADED.items()
    for op, cases in CASES.items()
    if op in backend.operations
    for case in cases
]


@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_every_operation_gives_what_its_definition_gives(name: str, case: Case):
    backend = LOADED[name]
    device = device_of(backend)
    got = answer(backend.operations[case.op], case, device)
    if got is None and case.op in backend.partly:
        return
    if got is None:
        assert any(f"layout={layout}" in case.label for layout in DECLINED_LAYOUTS) or _rarely_used(case), (
            f"{case} is left to the definition"
        )
        return
    want = answer(dispatch._DEFINITIONS[case.op], case, device)
    assert want is not None
    found = compare(case, got, want)
    assert not found.failure, found.failure


@pytest.mark.parametrize(
    "name", [pytest.param(name, id=f"{name}: gaussian_") for name in LOADED if "gaussian_" in LOADED[name].operations]
)
@pytest.mark.parametrize("size", [1, 7, 2049])
def test_an_odd_number_of_normal_numbers_is_written_and_no_more(name: str, size: int):
    """They are drawn in pairs, the last of which then has one."""
    memory = torch.full((size + 9,), 777.0, device=device_of(LOADED[name]))
    LOADED[name].operations["gaussian_"](memory[4 : size + 4], arguments.pack_key(5))
    assert (memory == 777.0).nonzero().flatten().tolist() == [*range(4), *range(size + 4, size + 9)]


LARGE = [
    case(
        "coded_adam_dense_",
        made.coded_adam_dense,
        shape,
        dtype,
        F32,
        bits,
        256,
        "shared",
        start=start,
        rounding=rounded,
    )
    for shape in ((700, 1024), (3, 400, 777))
    for dtype, rounded in ((F32, False), (BF16, True))
    for bits in (8, 4)
    for start in (0, 2**33 - 1001)
]
"""More rows than one chunk has, with a last block that is not full, and positions whose upper half changes."""


@pytest.mark.parametrize("case", [*CASES["coded_adam_direct_"], *CASES["coded_adam_dense_"], *LARGE], ids=str)
@pytest.mark.parametrize("device_waits", [False, True])
def test_torch_in_place_gives_the_bits_of_the_definition(case: Case, device_waits: bool, monkeypatch):
    """Also where the host does not look at the numbers, as on a GPU."""
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    monkeypatch.setattr(compute, "cache_elements", lambda device: 1 << 16)
    want = answer(dispatch._DEFINITIONS[case.op], case)
    if device_waits:
        monkeypatch.setattr(compute, "is_known", lambda condition: False)
        monkeypatch.setattr(coded_adam, "is_read", lambda ok: False)
    got = answer(LOADED["torch"].operations[case.op], case)
    assert got is not None
    assert want is not None
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", sorted(LOADED["torch"].partly))
def test_torch_has_sparse_products_in_float32_and_float64(op: str):
    for dtype in (F32, torch.float64):
        options = (dtype,) if op == "sampled_product" else (3, dtype)
        example = case(op, getattr(made, op), (70,), 20, 33, *options)
        got = answer(LOADED["torch"].operations[op], example)
        if torch.backends.mkl.is_available():
            want = answer(dispatch._DEFINITIONS[op], example)
            torch.testing.assert_close(got, want)
        else:
            assert got is None


def calls_of(op: str) -> list[tuple[Any, ...]]:
    """Arguments for parameters of many sizes, types and options, some of them empty or masked."""
    shapes = [(1 + i % 7, 1 + 37 * i % 600) for i in range(70)] + [(0, 5), (2, 3, 40), (300, 300)]
    calls = []
    for i, shape in enumerate(shapes):
        kind, start, ok, rounding = (F32, BF16)[i % 2], 3 * i, (None, True, False)[i % 3], i % 4 == 1
        coding = ((8, 4)[i // 4 % 2], (256, 3)[i % 5 == 0], (None, "shared")[i // 2 % 2])
        layout = "transposed" if i % 7 == 3 and len(shape) == 2 else "plain"
        if op == "adam_direct_":
            calls.append(made.adam_direct(shape, ok=ok, layout=layout))
        elif op == "coded_adam_direct_":
            calls.append(made.coded_adam_direct(shape, *coding, start=start, ok=ok, layout=layout))
        elif op == "adam_dense_":
            calls.append(made.adam_dense(shape, kind, F32, start=start, ok=ok, rounding=rounding))
        elif op == "folded_adam_dense_":
            calls.append(made.folded_adam_dense(shape, kind, F32, 2 ** (i % 5), start=start, ok=ok, rounding=rounding))
        elif op == "apply_":
            *batch, rows, cols = shape
            rank, phi = (0, 3, 0)[i % 3], ("rows", "columns", "matrix")[i // 2 % 3]
            more = {"subtract": i % 5 == 0, "sign": i % 4 == 0, "ok": ok, "rounding": rounding}
            calls.append(made.apply(tuple(batch), rows, cols, rank, kind, F32, phi, start=start, **more))
        else:
            calls.append(made.coded_adam_dense(shape, kind, F32, *coding, start=start, ok=ok, rounding=rounding))
    return calls


@pytest.mark.parametrize("name", [pytest.param(name, id=f"{name}: rows at rest") for name in LOADED])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_without_gradients_for_long_keeps_no_momentum(name: str, bits: int):
    """m has become 0, and √v has not: blocks whose ratios have scale 0 among others."""
    device = device_of(LOADED[name])
    grad, ratio, ratio_scale, root, *others = made.coded_adam_direct((4, 1024), bits)
    grad[1::2], ratio[1::2], ratio_scale[1::2] = 0.0, 0, 0.0
    calls = [
        [comparison.to_device(x.clone(), device) for x in (grad, ratio, ratio_scale, root, others[0])]
        + list(others[1:])
        for _ in range(2)
    ]
    got = LOADED[name].operations["coded_adam_direct_"](*calls[0])
    want = dispatch._DEFINITIONS["coded_adam_direct_"](*calls[1])
    torch.testing.assert_close(got, want, rtol=4e-6, atol=1e-6)
    level = 0 if bits == 8 else 0x88
    for rows in (calls[0], calls[1]):
        assert rows[1][1::2].eq(level).all()
        assert rows[2][1::2].eq(0.0).all()
        assert rows[2][::2].gt(0.0).all()
        assert rows[4].gt(0.0).all()


@pytest.mark.parametrize("name", [pytest.param(name, id=f"{name}: many") for name in LOADED if LOADED[name].many])
@pytest.mark.parametrize(
    "op",
    [
        "adam_direct_",
        "adam_direct_with_norms_",
        "adam_dense_",
        "coded_adam_direct_",
        "coded_adam_direct_with_norms_",
        "coded_adam_dense_",
        "folded_adam_dense_",
        "apply_",
    ],
)
def test_many_parameters_in_one_launch_come_out_as_one_by_one(name: str, op: str):
    backend = LOADED[name]
    if op not in backend.many:
        pytest.skip(f"{name} does {op} one by one")
    device = device_of(backend)

    def there() -> list[list[Any]]:
        names = [argument.name for argument in getattr(torch.ops.lowrank_optim, op).default._schema.arguments]
        return [
            [
                comparison.to_device(x, device) if isinstance(x, torch.Tensor) and n not in comparison.HOST else x
                for n, x in zip(names, c, strict=False)
            ]
            for c in calls_of(op.replace("with_norms_", ""))
        ]

    def flat(values: tuple[Any, ...]) -> list[Any]:
        return [part for value in values for part in (value if isinstance(value, tuple) else (value,))]

    alone, together = there(), there()
    expected = [backend.operations[op](*call) for call in alone]
    results = backend.many[op](together)
    for one, other, want, got in zip(alone, together, expected, results, strict=True):
        assert got is not NotImplemented
        for a, b in zip(flat((*one, want)), flat((*other, got)), strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert backend.many[op]([]) == []


@pytest.mark.parametrize("forced", ["cpu", "reference"])
def test_what_runs_together_is_sorted_by_kind(forced: str, monkeypatch):
    """float64 and other declined ones go one by one, whatever is between them; every written tensor has a new version."""
    if forced == "cpu" and "cpu" not in LOADED:
        pytest.skip("no library")
    monkeypatch.setenv(dispatch.VARIABLE, forced)
    calls = [*calls_of("coded_adam_dense_")[:6], made.coded_adam_dense((3, 40), torch.float64, torch.float64)]
    calls.insert(2, made.coded_adam_dense((3, 40), torch.float64))
    expected = [
        comparison.answer(
            dispatch._DEFINITIONS["coded_adam_dense_"], Case("coded_adam_dense_", "", lambda c=c: clones(c))
        )
        for c in calls
    ]
    before = [call[0]._version for call in calls]
    dispatch.run_many("coded_adam_dense_", calls)
    for call, want, version in zip(calls, expected, before, strict=True):
        torch.testing.assert_close(call[0], want["weight"], rtol=1e-2 if call[0].dtype == BF16 else 1e-6, atol=1e-6)
        assert call[0].numel() == 0 or call[8 + 1] is not None or call[0]._version > version


@pytest.mark.parametrize("op", ["adam_direct_", "coded_adam_direct_"])
def test_results_come_in_the_order_of_the_calls(op: str):
    """Whatever is left to the definition between them."""
    calls = calls_of(op)[:9]
    for at in (0, 4):
        grad, *others = calls[at]
        wide = [x.double() if op == "adam_direct_" and i < 2 else x for i, x in enumerate(others)]
        calls[at] = (grad.double(), *wide)
    expected = [getattr(torch.ops.lowrank_optim, op)(*clones(call)) for call in calls]
    before = [call[1]._version for call in calls]
    results = dispatch.run_many(op, calls)
    assert [result.dtype for result in results].count(torch.float64) == 2
    for call, result, want, version in zip(calls, results, expected, before, strict=True):
        assert torch.equal(result, want)
        assert call[1]._version > version
    assert dispatch.run_many(op, []) == []


@pytest.mark.parametrize("op", ["adam_direct_", "adam_dense_", "coded_adam_direct_", "coded_adam_dense_"])
def test_tensors_with_a_negative_bit_and_zeros_without_memory_run_together_with_others(op: str):
    """Their addresses hold other values, or nothing."""
    position = 1 if "dense" in op else 0
    plain, odd = calls_of(op)[:6], calls_of(op)[:6]
    changes = {1: torch._neg_view}
    if position == 0:  # dense parameters take contiguous tensors
        changes[3] = lambda grad: torch._efficientzerotensor(grad.shape, dtype=grad.dtype)
    for i, change in changes.items():
        first, grad, rest = odd[i][:position], odd[i][position], odd[i][position + 1 :]
        assert grad.numel() > 1
        odd[i] = (*first, change(grad), *rest)
        plain[i] = (*clones(first), torch.empty_like(grad).copy_(odd[i][position]), *clones(rest))
    want = [getattr(torch.ops.lowrank_optim, op)(*call) for call in plain]
    got = dispatch.run_many(op, odd)
    for one, other in zip([*plain, *map(_listed, want)], [*odd, *map(_listed, got)], strict=True):
        for x, y in zip(one, other, strict=True):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def _listed(value: Any) -> list[Any]:
    return [value]


def test_a_mode_sees_every_operation():
    """Of tensors in the planner's mode there may be nothing in memory."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(str(op))
            return op(*args, **(kwargs or {}))

    with Watch():
        dispatch.run_many("coded_adam_dense_", calls_of("coded_adam_dense_")[:3])
        dispatch.norms([torch.ones(5), torch.ones(6)])
    assert seen.count("lowrank_optim.coded_adam_dense_.default") == 3
    assert seen.count("aten.linalg_vector_norm.default") == 2


def clones(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args)


def test_norms_are_those_of_torch_one_by_one():
    tensors = [torch.randn(n) * 3.0 for n in (0, 1, 17, 1023, 1024, 1025, 100_000, 1 << 20)]
    tensors += [torch.randn(300, 200).to(kind) for kind in (BF16, torch.float16, torch.float64)]
    tensors += [torch.randn(50, 60).T, torch.full((3000,), 1e17), torch.tensor(2.5)]
    for got, x in zip(dispatch.norms(tensors), tensors, strict=True):
        assert got.shape == ()
        torch.testing.assert_close(float(got), float(x.double().norm()), rtol=2e-5, atol=0)
    for bad in (torch.nan, torch.inf, -torch.inf, 1e30):
        spoiled = [torch.ones(100_000) for _ in range(3)]
        spoiled[1][77_777] = bad
        assert [bool(norm.isfinite()) for norm in dispatch.norms(spoiled)] == [True, False, True]


@pytest.mark.parametrize("dim", [-1, -2])
def test_sums_of_squares_of_lines_are_those_of_torch(dim: int):
    shapes = ((0, 5), (5, 0), (1, 1), (3, 17), (4, 1024), (9, 1025), (300, 2100), (3, 20, 33))
    tensors = [torch.randn(shape) * 3.0 for shape in shapes]
    tensors += [torch.randn(70, 300).to(kind) for kind in (BF16, torch.float16, torch.float64)]
    tensors += [torch.randn(50, 60).T, torch.randn(90, 80)[5:70, 3:70], torch._neg_view(torch.randn(20, 30))]
    for x in tensors:
        got, exact = dispatch.line_sums(x, dim, 2), x.double().square().sum(dim, keepdim=True)
        assert got.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got.double(), exact, rtol=2e-6, atol=0)
    for bad in (torch.nan, torch.inf, 1e30):
        spoiled = torch.ones(700, 1100)
        spoiled[333, 1055] = bad
        finite = dispatch.line_sums(spoiled, dim, 2).flatten().isfinite()
        assert (~finite).nonzero().flatten().tolist() == [333 if dim == -1 else 1055]


def _rarely_used(case: Case) -> bool:
    """Float32 targets rounded to the bfloat16 grid: the definition allows them, no optimizer has them."""
    return case.op == "stochastic_round_" and "float32 rounding=True" in case.label


def test_operations_have_cases_and_backends_no_others():
    assert set(CASES) == set(schemas.CHECKS)
    for backend in LOADED.values():
        assert set(backend.operations) <= set(schemas.CHECKS)


def test_the_comparison_sees_one_wrong_element(monkeypatch):
    """The suite above is as good as `compare`."""
    for op, cases in CASES.items():
        small = [case for case in cases if "3x257" in case.label or "20 33" in case.label or "3x301" in case.label]
        case = small[0] if small else cases[0]  # lists of factors
        want = answer(dispatch._DEFINITIONS[op], case)
        assert want is not None
        assert not compare(case, want, want).failure
        for name, tensor in want.items():
            broken = {key: value.clone() for key, value in want.items()}
            flat = broken[name].reshape(-1)
            at = flat.numel() // 2
            flat[at] = flat[at] + (5 if not tensor.is_floating_point() else 0.1 * tensor.abs().max().item())
            broken[name] = flat.view(tensor.shape)
            assert compare(case, broken, want).failure, f"{case}: {name}"


@pytest.mark.skipif("LOWRANK_OPTIM_BACKEND" in os.environ, reason="a backend is forced")
def test_an_unknown_backend_raises_and_names_those_that_are_there(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "cuba")
    with pytest.raises(ValueError, match=r"cuba.*did you mean 'cuda'.*Available for cpu: .*reference"):
        torch.ops.lowrank_optim.stochastic_round_(torch.zeros(3), torch.zeros(3), None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_backend_that_is_not_available_raises_and_says_why(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    with pytest.raises(ValueError, match=r"LOWRANK_OPTIM_BACKEND=cuda: .*Available for cpu: .*reference"):
        torch.ops.lowrank_optim.stochastic_round_(torch.zeros(3), torch.zeros(3), None)


def test_the_reference_can_be_forced(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    target = torch.zeros(3)
    torch.ops.lowrank_optim.stochastic_round_(target, torch.ones(3), None)
    assert target.tolist() == [1.0, 1.0, 1.0]


def test_every_operation_is_defined_within_kernels():
    assert dispatch._DEFINITIONS.keys() == schemas.CHECKS.keys()
    assert {define.__module__.rpartition(".")[0] for define in dispatch._DEFINITIONS.values()} == {
        "lowrank_optim.kernels"
    }


@pytest.mark.parametrize(
    ("op", "place", "bad", "message"),
    [
        ("project", 0, torch.ones(20), r"grad is \(20,\) torch.float32 on cpu; needed: a \(…, rows, cols\) matrix"),
        ("project", 1, torch.ones(7, 3), r"grad is \(20, 33\).* and basis \(7, 3\).*needed on the right"),
        ("project", 1, torch.ones(33, 3, dtype=torch.int32), r"basis is \(33, 3\) torch.int32 on cpu; needed: one of"),
        ("project", 1, torch.ones(33, 3, device="meta"), "basis is on meta, grad on cpu; needed: one device"),
        ("adam_direct_", 1, torch.ones(20, 32), r"exp_avg is \(20, 32\).*needed: \(20, 33\), the gradient's shape"),
        (
            "adam_direct_",
            2,
            torch.ones(20, 33).double(),
            "exp_avg_sq is torch.float64, grad torch.float32; needed: one type",
        ),
        (
            "adam_direct_",
            2,
            torch.ones(20, 33, device="meta"),
            "exp_avg_sq is on meta, grad on cpu; needed: one device",
        ),
        (
            "adam_direct_",
            3,
            torch.ones(4),
            r"scalars is \(4,\) torch.float32.*needed: \(4,\) torch.float64 on cpu, \[beta1",
        ),
        ("adam_direct_", 4, torch.ones(2, dtype=torch.bool), r"ok is \(2,\) torch.bool on cpu; needed: a 0-d bool"),
        ("adam_direct_", 4, torch.ones((), dtype=torch.bool, device="meta"), "ok is on meta, grad on cpu"),
        ("apply_", 1, torch.ones(19, 3), r"left is \(19, 3\).*needed: \(20, 3\), the weight's rows × rank"),
        ("apply_", 2, torch.ones(3, 5), r"right is \(3, 5\).*needed: \(3, 33\), rank × the weight's columns"),
        ("apply_", 4, torch.ones(1), r"keep is \(1,\) torch.float32 on cpu; needed: a 0-d float32 or float64 on cpu"),
        (
            "apply_",
            6,
            torch.ones(2),
            r"rounding is \(2,\) torch.float32 on cpu; needed: \(2,\) torch.int64 on cpu, \[key",
        ),
        ("apply_", 7, torch.ones(20, 33), "grad and phi belong together: pass both or neither"),
        ("apply_", 9, torch.ones(20, 3), "subtract_left and subtract_right belong together, and to a gradient"),
        ("sltrain_forward", 1, None, "belong together: pass both or neither"),
        ("sltrain_forward", 1, torch.ones(70, 4), r"the factor is \(20, 3\).*needed: \(20, 4\)"),
        (
            "sltrain_forward",
            2,
            torch.ones(20, 3).double(),
            "lora_b is torch.float64, x torch.float32; needed: one type",
        ),
        ("sltrain_forward", 4, torch.ones(5), r"values is \(5,\).*one for each column"),
        (
            "sltrain_forward",
            5,
            torch.ones(21),
            r"pointers is \(21,\) torch.float32.*needed: \(rows \+ 1,\) torch.int32",
        ),
        (
            "sltrain_forward",
            6,
            torch.ones(3).long(),
            r"columns is \(3,\) torch.int64.*needed: \(entries,\) torch.int16 or",
        ),
        ("sltrain_backward_input", 0, torch.ones(70, 19), r"grad is \(70, 19\).*needed: \(…, 20\), the rows of S"),
        ("sampled_product", 1, torch.ones(69, 33), r"x is \(69, 33\).*needed: \(70, 'columns of S'\), as grad"),
    ],
)
def test_what_an_operation_cannot_take_is_refused_before_anything_changes(op, place, bad, message):
    make = {
        "project": lambda: made.project((), 20, 33, 3, True, torch.float32),
        "adam_direct_": lambda: made.adam_direct((20, 33)),
        "apply_": lambda: made.apply((), 20, 33, 3, torch.float32),
        "sltrain_forward": lambda: made.sltrain_forward((70,), 20, 33, 3),
        "sltrain_backward_input": lambda: made.sltrain_backward_input((70,), 20, 33, 3),
        "sampled_product": lambda: made.sampled_product((70,), 20, 33),
    }[op]
    args, before = list(make()), make()
    args[place] = bad
    with pytest.raises(ValueError, match=rf"^lowrank_optim\.{op}: .*{message}"):
        schemas.CHECKS[op](*args)
    with pytest.raises(ValueError, match=message):
        dispatch.run_many(op, [tuple(args), tuple(args)])
    assert all(
        torch.equal(now, old)
        for i, (now, old) in enumerate(zip(args, before, strict=True))
        if i != place and isinstance(old, torch.Tensor)
    )


@pytest.mark.parametrize(
    ("op", "place", "number", "bad", "message"),
    [
        ("thin_grams", 0, 0, torch.ones(70, 3).int(), r"left\[0\] is \(70, 3\) torch.int32 on cpu; needed: one of"),
        ("thin_grams", 1, 1, torch.ones(3, 9), r"right\[1\] is \(3, 9\).*needed: \(3, d\).*as large as \(3, 50\)"),
        ("thin_grams", 1, 1, torch.ones(50, 3).mT, r"right\[1\] \(3, 50\) has strides.*needed: a contiguous tensor"),
        ("pair_step_", 0, 1, torch.ones(4, 50), r"weights\[1\] is \(4, 50\).*needed: \(3, d\)"),
        (
            "pair_step_",
            2,
            0,
            torch.ones(70, 3).double(),
            r"momenta\[0\] is \(70, 3\) torch.float64.*needed: \(d, 3\) torch.float32",
        ),
        ("pair_step_", 3, None, torch.ones(2, 3, 4), r"small is \(2, 3, 4\).*needed: \(2, 3, 3\) torch.float32"),
        (
            "pair_step_",
            4,
            None,
            torch.ones(2, 3),
            r"numbers is \(2, 3\) torch.float32.*needed: \(2, 3\) torch.float64 on cpu, share",
        ),
        ("pair_step_", 5, None, [True], "weights has 2 factors, weights 2, wide 1; needed: as many of each"),
        ("thin_turn_", 0, None, [], "forms is empty; needed: one factor at least"),
        ("rite_step_", 3, 1, torch.ones(1, 3, 2), r"moments\[1\] is \(1, 3, 2\).*needed: \(3, 3\) torch.float32"),
        ("rite_step_", 3, None, [], "there are 2 factors, 0 moments and 0 escaped; needed: as many moments"),
        ("rite_step_", 5, None, torch.ones(2, 9).double(), r"known is \(2, 9\).*needed: \(2, 11\) torch.float64"),
        ("rite_step_", 6, None, torch.ones(2, 4), r"numbers is \(2, 4\).*needed: \(2, 5\).*share, square_share"),
        ("inverse_power", 0, None, torch.ones(3, 4), r"matrices is \(3, 4\).*needed: \(…, r, r\)"),
        ("inverse_power", 1, None, torch.ones(4), r"shift is \(4,\) torch.float32.*needed: \(5,\) torch.float64"),
        ("inverse_power", 2, None, torch.ones(2), r"scalars is \(2,\).*\[tolerance, added\]"),
    ],
)
def test_what_an_operation_on_pairs_cannot_take_is_refused_before_anything_changes(op, place, number, bad, message):
    make = {
        "thin_grams": lambda: made.thin_grams((70, 50), 3),
        "pair_step_": lambda: made.pair_step((70, 50), 3),
        "thin_turn_": lambda: made.thin_turn((70, 50), 3),
        "rite_step_": lambda: made.rite_step((70, 50), 3),
        "inverse_power": lambda: made.inverse_power((5,), 3, True, shift=True),
    }[op]
    args = list(make())
    if number is None:
        args[place] = bad
    else:
        args[place] = [bad if i == number else x for i, x in enumerate(args[place])]
    before = [x.clone() for value in args if isinstance(value, list) for x in value if isinstance(x, torch.Tensor)]
    with pytest.raises(ValueError, match=rf"^lowrank_optim\.{op}: .*{message}"):
        dispatch.call(op, *args)
    now = [x for value in args if isinstance(value, list) for x in value if isinstance(x, torch.Tensor)]
    assert all(torch.equal(x, y) for x, y in zip(now, before, strict=True))
