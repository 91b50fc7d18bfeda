"""Directions of small matrices are computed together in an ordinary step, and every number is the one that a matrix gets alone."""

import itertools
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo
from lowrank_optim import kernels
from lowrank_optim.kernels import Loaded, dispatch
from lowrank_optim.kernels.cpu.library import Library as CpuLibrary
from lowrank_optim.kernels.cuda.build import build_for_host
from lowrank_optim.kernels.cuda.library import VARIABLE as CUDA_LIBRARY
from lowrank_optim.kernels.cuda.library import Library as CudaLibrary
from lowrank_optim.quantization import coded_moments as coding
from lowrank_optim.step import batching as later

SHAPES = [(40, 24), (24, 40), (2, 30, 20), (30, 5, 3, 3), (33, 21), (17,), (64, 48)]
LOW_RANK = len(SHAPES) - 1
RANK = 5


@pytest.fixture(scope="module")
def host_build(tmp_path_factory) -> str:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    return str(build_for_host(tmp_path_factory.mktemp("cuda")))


@pytest.fixture
def backend(request, monkeypatch) -> Iterator[str]:
    """The backend of CPU tensors: "cuda" is its host build."""
    monkeypatch.setattr(coding, "MIN_CODED", 1)
    if request.param == "cuda":
        monkeypatch.setenv(CUDA_LIBRARY, request.getfixturevalue("host_build"))
    elif request.param == "cpu" and not isinstance(dispatch.backends()["cpu"], Loaded):
        pytest.skip("no library")
    monkeypatch.setenv(dispatch.VARIABLE, request.param)
    dispatch.forget()
    yield request.param
    monkeypatch.undo()
    dispatch.forget()


def parameters(shapes: list[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter((torch.randn(shape, generator=generator) * 0.1).to(dtype)) for shape in shapes]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    for number, param in enumerate(params):
        generator = torch.Generator().manual_seed(100 * step + number)
        param.grad = (torch.randn(param.shape, generator=generator) * (1.0 + number)).to(param.dtype)


def build(params: list[nn.Parameter], **options: Any) -> lo.LowRankOptimizer:
    options = {"rule": lo.Adam(), "lr": 1e-2, "weight_decay": 0.1, "rank": RANK, "update_proj_gap": 3, **options}
    return lo.LowRankOptimizer(params, **options)


def step_alone(optimizer: lo.LowRankOptimizer) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            optimizer.step_param(param)


def assert_same(one: lo.LowRankOptimizer, other: lo.LowRankOptimizer) -> None:
    for (p, state), (q, twin) in zip(one.state.items(), other.state.items(), strict=True):
        assert torch.equal(p, q), tuple(p.shape)
        assert state.keys() == twin.keys()
        for name, tensor in state.items():
            assert torch.equal(tensor, twin[name]), (tuple(p.shape), name)


def matrices_of(monkeypatch) -> list[list[int]]:
    """The elements of R of each matrix in every call of a rule's operation from now on, low-rank ones only."""
    calls, run_many, call = [], kernels.run_many, kernels.call
    monkeypatch.setattr(kernels, "batches", lambda *_: True)  # as where a backend runs them faster together

    def spy(op: str, given: list[tuple[Any, ...]]) -> list[Any]:
        if "direct" in op:
            calls.append([args[0].numel() for args in given])
        return run_many(op, given)

    def spy_alone(op: str, *args: Any) -> Any:
        if "direct" in op:
            calls.append([args[0].numel()])
        return call(op, *args)

    monkeypatch.setattr(kernels, "run_many", spy)
    monkeypatch.setattr(kernels, "call", spy_alone)
    return calls


RESIDUALS = ["none", "norm_scaled", "gradient_scaled", "sgd", "sign", "error_feedback"]
VARIANTS = [{"residual": residual} for residual in RESIDUALS] + [
    {"on_refresh": "rotate"},
    {"on_refresh": "reset", "projector": "coordinate"},
    {"proj_type": "reverse_std", "projector": "random", "basis_bits": 32},
    {"proj_type": "full", "match_reference": True},
    {"rule": lo.Lion()},
]


@pytest.mark.parametrize("backend", ["cpu", "cuda", "reference"], indirect=True)
@pytest.mark.parametrize("on_device", [False, True], ids=["host branch", "device mask"])
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_step_together_is_the_steps_of_each_parameter_alone(options, bits, on_device, backend, monkeypatch):
    """To the bit, also in the step in which one matrix has no finite gradient, and where moments are opened by a rotation."""
    monkeypatch.setattr(lo.LowRankOptimizer, "_mask_on_device", on_device)
    dtype = torch.bfloat16 if bits == 4 else torch.float32
    options = {"state_bits": bits, "stochastic_rounding": bits == 4, **options}
    if options.get("proj_type") == "full":
        options["rank"] = 3
    twins = [build(parameters(dtype=dtype), **options) for _ in range(2)]
    start = [param.detach().clone() for param in twins[0].state]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(5):
            for optimizer in twins:
                set_gradients(list(optimizer.state), step)
                if step == 2:
                    list(optimizer.state)[2].grad[0, 3] = torch.nan
            twins[0].step()
            step_alone(twins[1])
            assert_same(*twins)
    assert twins[0].skipped_updates() == twins[1].skipped_updates() == {"0.2": 1}
    assert not any(torch.equal(param, before) for param, before in zip(twins[0].state, start, strict=True))


@pytest.mark.parametrize(
    ("backend", "bits", "call"),
    [("cpu", 8, "coded_adam"), ("cpu", 4, "coded_adam"), ("cuda", 32, "adam"), ("cuda", 8, "coded_adam")],
    indirect=["backend"],
)
def test_all_small_matrices_of_a_step_are_one_call_of_the_library(backend, bits, call, monkeypatch):
    names = []
    for kind, function in ((CpuLibrary, "call"), (CpuLibrary, "call_many"), (CudaLibrary, "call")):
        real = getattr(kind, function)
        monkeypatch.setattr(
            kind, function, lambda self, name, *args, real=real: (names.append(name), real(self, name, *args))
        )
    params = parameters([(40, 24), (24, 40), (2, 30, 20), (33, 21), (64, 48)])
    optimizer = build(params, state_bits=bits, residual="norm_scaled")
    for step in range(4):
        set_gradients(params, step)
        names.clear()
        optimizer.step()
        assert names.count(call) == 1
    set_gradients(params, 4)
    names.clear()
    step_alone(optimizer)
    assert names.count(call) == len(params)


def test_what_waits_is_bounded(monkeypatch):
    calls = matrices_of(monkeypatch)
    params = parameters([(40, 24)] * 7)
    optimizer = build(params)
    monkeypatch.setattr(later, "TOGETHER", 3 * 40 * RANK)
    set_gradients(params, 0)
    optimizer.step()
    assert calls == [[40 * RANK] * 3, [40 * RANK] * 3, [40 * RANK]]


def test_large_matrices_go_on_at_once(monkeypatch):
    """Those with a large R, and those with a large basis, which may be held by nothing but the step."""
    calls = matrices_of(monkeypatch)
    monkeypatch.setattr(later, "SMALL", 40 * RANK)
    params = parameters([(40, 24), (48, 41), (24, 40), (41, 24)])
    optimizer = build(params, proj_type="std")
    set_gradients(params, 0)
    optimizer.step()
    assert calls == [[48 * RANK], [41 * RANK], [40 * RANK] * 2]
    calls.clear()
    wide = build(parameters([(8, 41), (8, 40), (40, 8)]), proj_type="reverse_std", projector="random")
    set_gradients(list(wide.state), 0)
    wide.step()
    assert calls == [[8 * RANK], [8 * RANK] * 2]


def test_copies_of_convolutions_do_not_wait(monkeypatch):
    calls = matrices_of(monkeypatch)
    params = parameters([(30, 5, 3, 3)] * 4)
    with torch.no_grad():
        params[1].data = params[1].to(memory_format=torch.channels_last)
    optimizer = build(params)
    set_gradients(params, 0)
    params[2].grad = params[2].grad.to(memory_format=torch.channels_last)
    optimizer.step()
    assert [len(call) for call in calls] == [1, 1, 2]


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_moments_that_are_open_do_not_wait(bits, monkeypatch):
    """They are coded again when their parameter's turn is over: those of 16 bits always, others after a rotation."""
    monkeypatch.setattr(coding, "MIN_CODED", 1)
    params = parameters([(40, 24)] * 3)
    optimizer = build(params, state_bits=bits, on_refresh="rotate", stagger=False)
    found = []
    for step in range(5):
        calls = matrices_of(monkeypatch)
        set_gradients(params, step)
        optimizer.step()
        found.append([len(call) for call in calls])
        monkeypatch.undo()
        monkeypatch.setattr(coding, "MIN_CODED", 1)
    alone = [1, 1, 1]
    assert found == ([alone] * 5 if bits == 16 else [[3], [3], [3], alone, [3]])


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_parameters_before_one_that_raises_are_updated_and_later_ones_are_not(residual, bits, monkeypatch):
    monkeypatch.setattr(coding, "MIN_CODED", 1)
    twins = [build(parameters(), residual=residual, state_bits=bits, on_nonfinite="raise") for _ in range(2)]
    for optimizer in twins:
        set_gradients(list(optimizer.state), 0)
        step_alone(optimizer)
        set_gradients(list(optimizer.state), 1)
        list(optimizer.state)[3].grad[0, 0, 0, 0] = torch.inf
    with pytest.raises(RuntimeError, match=r"the gradient of 0\.3"):
        twins[0].step()
    for param in list(twins[1].state)[:3]:
        twins[1].step_param(param)
    assert_same(*twins)
    assert [float(state["step"]) for state in twins[0].state.values()] == [2.0] * 3 + [1.0] * 4


def test_inside_backward_nothing_waits(monkeypatch):
    calls = matrices_of(monkeypatch)
    params = parameters([(40, 24), (24, 40), (33, 21)])
    optimizer = build(params)
    lo.update_in_backward(optimizer)
    sum(param.square().sum() for param in params).backward()
    assert [len(call) for call in calls] == [1, 1, 1]
    optimizer.step()
    assert len(calls) == 3


@dataclass(frozen=True)
class Halved(lo.Adam):
    """A rule of somebody else's, who knows nothing of fused operations."""

    name: ClassVar[str] = "halved"

    def direction(self, grad: Tensor, state: Any, options: Any, context: Any) -> Any:
        move = super().direction(grad, state, options, context)
        return replace(move, matrix=move.matrix / 2)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_rule_that_changes_only_the_direction_is_heard(bits, monkeypatch):
    monkeypatch.setattr(coding, "MIN_CODED", 1)
    moved = []
    for rule in (lo.Adam(), Halved()):
        params = parameters()
        before = [param.detach().clone() for param in params]
        optimizer = build(params, rule=rule, weight_decay=0.0, state_bits=bits)
        set_gradients(params, 0)
        optimizer.step()
        moved.append([param - old for param, old in zip(params, before, strict=True)])
    for whole, half in zip(*moved, strict=True):
        torch.testing.assert_close(half, whole / 2, rtol=1e-3, atol=1e-6)


def test_groups_and_types_are_mixed_in_order(monkeypatch):
    """Coded and plain moments, float64, dense ones between: one call for each operation."""
    calls, run_many, call = [], kernels.run_many, kernels.call
    monkeypatch.setattr(kernels, "batches", lambda *_: True)
    monkeypatch.setattr(kernels, "run_many", lambda op, given: (calls.append((op, len(given))), run_many(op, given))[1])
    monkeypatch.setattr(kernels, "call", lambda op, *args: ("adam" in op and calls.append((op, 1)), call(op, *args))[1])
    monkeypatch.setattr(coding, "MIN_CODED", 1000)

    def mixed() -> lo.LowRankOptimizer:
        small, wide = parameters([(40, 24)] * 4 + [(700, 24)] * 3), parameters([(40, 24)] * 2, torch.float64)
        low = [small[0], small[4], wide[0], small[1], small[5]]
        return build(
            [{"params": low}, {"params": [small[2], small[6], wide[1]], "rank": None}, {"params": [small[3]]}],
            state_bits=8,
        )

    twins = [mixed(), mixed()]
    for step, optimizer in itertools.product(range(3), twins):
        set_gradients(list(optimizer.state), step)
        calls.clear()
        optimizer.step() if optimizer is twins[0] else step_alone(optimizer)
        if optimizer is twins[0]:
            assert sorted(calls) == [
                ("adam_dense_", 2),
                ("adam_direct_", 4),
                ("coded_adam_dense_", 1),
                ("coded_adam_direct_", 2),
            ]
    assert_same(*twins)
