"""torch.compile around a step, and the operations in compiled code."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import lowrank_optim as lo
from lowrank_optim import kernels


def train(compiled: bool, steps: int, whole_loop: bool = False, backend: str = "inductor") -> tuple[nn.Module, float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 96), nn.GELU(), nn.Linear(96, 40))
    groups = lo.param_groups(model, rank=8, include=["0", "2"])
    optimizer = lo.GaLoreAdamW8bit(groups, lr=1e-2, update_proj_gap=10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / 100)
    x = torch.randn(32, 40)

    def make_step() -> torch.Tensor:
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    step = optimizer.step
    if compiled:
        step = torch.compile(step)
        make_step = torch.compile(make_step, backend=backend) if whole_loop else make_step
    for _ in range(steps):
        if whole_loop:
            loss = make_step()
        else:
            loss = (model(x) - x).square().mean()
            loss.backward()
            step()
        optimizer.zero_grad()
        scheduler.step()
    return model, float(loss.detach())


def test_compiled_step_is_the_step_and_never_recompiles() -> None:
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled, loss = train(True, 50)
    plain, expected = train(False, 50)
    assert loss == expected
    for mine, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])  # 20 s of g++
def test_step_inside_a_compiled_loop(backend: str) -> None:
    torch._dynamo.reset()
    _, loss = train(True, 12, whole_loop=True, backend=backend)
    _, expected = train(False, 12)
    assert loss == pytest.approx(expected, rel=1e-3)


def test_operations_stand_in_compiled_code_without_specialising() -> None:
    """Rates, step numbers and keys change from call to call; there is one graph."""
    torch._dynamo.reset()
    ops = torch.ops.lowrank_optim

    @torch.compile(backend="aot_eager", fullgraph=True)
    def update(weight, grad, m, v, basis, scalars, applied, rounding):  # type: ignore[no-untyped-def]
        reduced = ops.project(grad, basis, True)
        direction = ops.adam_direct_(reduced, m, v, scalars, None)
        ops.apply_(weight, direction, basis.mT, applied, None, None, rounding, None, None, None, None, False)
        return direction.square().sum()

    def run(function) -> torch.Tensor:  # type: ignore[no-untyped-def]
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(24, 16, generator=generator).bfloat16()
        m, v = torch.zeros(24, 4), torch.zeros(24, 4)
        basis = torch.linalg.qr(torch.randn(16, 4, generator=generator)).Q.contiguous()
        for step in range(1, 51):
            grad = torch.randn(24, 16, generator=generator).bfloat16()
            numbers, applied = (
                kernels.pack_scalars(0.9, 0.999, 1e-8, step),
                kernels.pack_scalars(0.1 / step, 1.0 - 0.01 / step),
            )
            function(weight, grad, m, v, basis, numbers, applied, kernels.pack_key(step, 0))
        return weight

    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = run(update)
    assert torch.equal(compiled, run(update._torchdynamo_orig_callable))
