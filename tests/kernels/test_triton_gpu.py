"""On a GPU: every operation of every backend that serves it, on the op suite's cases, against the definition on the CPU."""

import os

import pytest
import torch
from torch import Tensor

import lowrank_optim as lo
from lowrank_optim.kernels import Loaded, arguments, dispatch
from lowrank_optim.kernels.comparison import Case, answer, compare
from tests.oracles.op_cases import CASES

pytestmark = pytest.mark.gpu

BF16, F16 = torch.bfloat16, torch.float16
BACKENDS = ("triton", "cuda")
PAIRS = [(name, op) for name in BACKENDS for op in CASES]


def backend(name: str) -> Loaded:
    loaded = dispatch.backends()[name]
    if not isinstance(loaded, Loaded) or "cuda" not in loaded.devices:
        pytest.skip(f"{name}: {loaded}")
    return loaded


def wrong(kernel: object, case: Case) -> str:
    got, want = answer(kernel, case, "cuda"), answer(dispatch._DEFINITIONS[case.op], case)
    assert want is not None
    return "left to the definition" if got is None else compare(case, got, want).failure


@pytest.mark.parametrize(("name", "op"), PAIRS, ids=[f"{name}: {op}" for name, op in PAIRS])
def test_every_operation_gives_what_its_definition_gives_on_the_cpu(name, op):
    operations = backend(name).operations
    if op not in operations:
        pytest.skip(f"{name} leaves {op} to the definition")
    # A third of the cases where most of the time goes into compiling for each of them.
    cases = CASES[op][::3] if name == "triton" and "LOWRANK_OPTIM_ALL_CASES" not in os.environ else CASES[op]
    failures = [f"{case}: {failure}" for case in cases if (failure := wrong(operations[op], case))]
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize(("rows", "cols", "rank"), [(4096, 4096, 128), (1024, 2816, 512), (300, 5000, 40)])
def test_large_products_are_as_accurate_as_on_the_cpu(rows, cols, rank, right):
    operations = backend("triton").operations
    grad = torch.randn(rows, cols, device="cuda").to(BF16)
    basis = torch.randn(cols if right else rows, rank, device="cuda")
    reduced, squares = operations["project_with_norms"](grad, basis, right)
    oriented = (grad if right else grad.mT).double()
    exact, size = oriented @ basis.double(), oriented.abs() @ basis.double().abs()
    assert float(((reduced.double() - exact).abs() / size).max()) < 2**-17
    torch.testing.assert_close(squares.double(), oriented.square().sum(1, keepdim=True), rtol=1e-4, atol=0)

    for dtype, allowed in ((torch.float32, 1e-5), (F16, 2**-10), (BF16, 2**-7)):
        weight = torch.randn(rows, cols, device="cuda").to(dtype)
        left, factor = torch.randn(rows, rank, device="cuda"), torch.randn(cols, rank, device="cuda").mT
        expected = 0.9 * weight.double() - 0.1 * (left.double() @ factor.double())
        operations["apply_"](weight, left, factor, arguments.pack_scalars(0.1, 0.9), *(None,) * 7, False)
        error = (weight.double() - expected).abs().max() / expected.abs().max()
        assert float(error) < allowed


def test_offsets_beyond_32_bits():
    operations = backend("triton").operations
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("less than 6 GiB of memory")
    memory = torch.empty(2**31 + 2**20, dtype=BF16, device="cuda")
    near = torch.randn(5, 40, device="cuda").to(BF16)
    far = memory.as_strided((5, 40), ((2**31 + 2**19) // 4, 1)).copy_(near)
    left, right = torch.randn(5, 3, device="cuda"), torch.randn(3, 40, device="cuda")
    for weight in (near, far):
        operations["apply_"](weight, left, right, arguments.pack_scalars(0.1, 0.9), *(None,) * 7, False)
    assert torch.equal(near, far)


def test_kernels_run_on_the_tensors_device_and_torchs_current_stream():
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    for name in BACKENDS:
        loaded = dispatch.backends()[name]
        if not isinstance(loaded, Loaded):
            continue
        stream = torch.cuda.Stream(device)
        value = torch.zeros(1 << 20, device=device)
        target = torch.zeros(1 << 20, dtype=BF16, device=device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            value.fill_(3.0)  # after the sleep: a kernel on another stream would see zeros
            loaded.operations["stochastic_round_"](target, value, None)
        stream.synchronize()
        assert bool((target == 3.0).all()), name


@pytest.mark.parametrize("state_bits", [32, 8, 4])
def test_steps_on_the_gpu_follow_those_on_the_cpu_and_never_wait_for_it(state_bits):
    def run(device: str) -> Tensor:
        torch.manual_seed(0)
        model = torch.nn.Linear(300, 200, bias=True).to(device)
        groups = lo.param_groups(model, rank=16)
        optimizer = lo.GaLoreAdamW(groups, lr=1e-2, state_bits=state_bits, update_proj_gap=4)
        for step in range(6):
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(device)
            waits = device == "cuda" and step > 1 and step % 4 != 0
            torch.cuda.set_sync_debug_mode("error" if waits else "default")
            optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
        return model.weight.detach().cpu()

    torch.testing.assert_close(run("cuda"), run("cpu"), rtol=2e-2, atol=2e-3)
