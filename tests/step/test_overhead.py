"""What Python does around the work of a step: calls of the package for one matrix, and frames between `step()` and the library."""

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import lowrank_optim as lo
from lowrank_optim.kernels.cpu.library import Library

PACKAGE = str(Path(lo.__file__).parent)
METHODS = [lo.GaLoreAdamW, lo.FiraAdamW, lo.APOLLOAdamW]


def profiled_step(method: Any, matrices: int = 1) -> tuple[int, list[int]]:
    """Calls of functions of the package in a step without a refresh, and the package's frames around each call of the library."""
    params = [torch.nn.Parameter(torch.randn(64, 96)) for _ in range(matrices)]
    optimizer = method(params, lr=1e-3, rank=16)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    stack: list[bool] = []
    calls, depths = 0, []

    def watch(frame: FrameType, event: str, arg: object) -> None:
        nonlocal calls
        if event == "call":
            own = frame.f_code.co_filename.startswith(PACKAGE)
            stack.append(own)
            calls += own
            at_library = frame.f_code in (Library.call.__code__, Library.call_many.__code__)
            if at_library and frame.f_locals["name"] != "gaussian":  # which draws a basis anew, deep in the projector
                depths.append(sum(stack) - 1)  # without `step` itself
        elif event == "return" and stack:
            stack.pop()

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        optimizer.step()
    finally:
        sys.setprofile(before)
    return calls, depths


def test_calls_of_one_matrix() -> None:
    calls, _ = profiled_step(lo.GaLoreAdamW)
    assert 50 < calls <= 100


@pytest.mark.parametrize("matrices", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_frames_between_step_and_the_library(method: Any, matrices: int) -> None:
    _, depths = profiled_step(method, matrices)
    if not depths:
        pytest.skip("the C++ library was not built, or another backend is in use")
    assert max(depths) <= 8
