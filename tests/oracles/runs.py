"""A run of a small model, stopped and resumed, and with updates in backward: all must end at the same bits."""

import io
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

import lowrank_optim as lo


def run(
    model: nn.Module, optimizer: lo.LowRankOptimizer, steps: Iterable[int], in_backward: bool = False
) -> list[Tensor]:
    """The weights after these steps; inputs of 96 features."""
    handle = lo.update_in_backward(optimizer) if in_backward else None
    for step in steps:
        x = torch.randn(16, 96, generator=torch.Generator().manual_seed(step))
        (model(x) - x.flip(1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if handle is not None:
        handle.remove()
    return [p.detach().clone() for p in model.parameters()]


def check_resume_and_in_backward(
    make: Callable[[], nn.Module], build: Callable[[nn.Module], lo.LowRankOptimizer]
) -> tuple[nn.Module, lo.LowRankOptimizer]:
    """Six steps at once, in backward, and in two halves with a file between them; returns model and optimizer of the first half.

    Args:
        make: a model whose weights are always the same.
        build: its optimizer.
    """
    whole, backward, stopped, resumed = make(), make(), make(), make()
    expected = run(whole, build(whole), range(6))
    assert not all(map(torch.equal, expected, make().parameters()))
    assert all(map(torch.equal, run(backward, build(backward), range(6), in_backward=True), expected))
    first = build(stopped)
    run(stopped, first, range(3))
    file = io.BytesIO()
    torch.save((stopped.state_dict(), first.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    second = build(resumed)
    resumed.load_state_dict(weights)
    second.load_state_dict(state)
    assert all(map(torch.equal, run(resumed, second, range(3, 6)), expected))
    return stopped, first
