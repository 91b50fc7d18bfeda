"""Every operation of every backend that is there, against the definition, on the cases of `op_cases`."""

import os

import pytest
import torch
from op_cases import CASES

from lowrank_optim.kernels import Loaded, api, dispatch, schemas
from lowrank_optim.kernels.selftest import Case, answer, compare

DECLINED_LAYOUTS = ("transposed", "strided")
"""Layouts that a backend may leave to the definition."""


def device_of(backend: Loaded) -> str:
    """The device to test on: an accelerator where the backend serves it, else the CPU (Triton under its interpreter)."""
    accelerator = "cuda" in backend.devices and torch.cuda.is_available()
    return "cuda" if accelerator else "cpu"


LOADED = {name: backend for name, backend in dispatch.backends().items() if isinstance(backend, Loaded)}
PAIRS = [
    pytest.param(name, case, id=f"{name}: {case}")
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
    if got is None:
        assert any(f"layout={layout}" in case.label for layout in DECLINED_LAYOUTS) or _rarely_used(case), (
            f"{case} is left to the definition"
        )
        return
    want = answer(dispatch._DEFINITIONS[case.op], case, device)
    assert want is not None
    found = compare(case, got, want)
    assert not found.failure, found.failure


@pytest.mark.parametrize("name", [pytest.param(name, id=f"{name}: gaussian_") for name in LOADED])
@pytest.mark.parametrize("size", [1, 7, 2049])
def test_an_odd_number_of_normal_numbers_is_written_and_no_more(name: str, size: int):
    """They are drawn in pairs, the last of which then has one."""
    memory = torch.full((size + 9,), 777.0, device=device_of(LOADED[name]))
    LOADED[name].operations["gaussian_"](memory[4 : size + 4], api.words(5))
    assert (memory == 777.0).nonzero().flatten().tolist() == [*range(4), *range(size + 4, size + 9)]


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
        case = next(case for case in cases if "3x257" in case.label or "20 33" in case.label or "3x301" in case.label)
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
