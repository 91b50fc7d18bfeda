"""A process group of a few gloo processes, and the model that they train.

`spawn(world, function, *arguments)` runs a function in every process and raises what the failing ones raised. They meet in a file,
not at a port, so that tests may run side by side.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import lowrank_optim as lo
from tests.oracles.processes import preload

SHAPES: dict[str, tuple[int, ...]] = {
    "tall": (26, 10),
    "wide": (10, 33),
    "square": (16, 16),
    "uneven": (18, 12),  # on 4 ranks: 5, 5, 5, 3
    "three": (3, 40),  # on 4 ranks: 1, 1, 1, 0
    "experts": (3, 14, 9),
    "conv": (6, 4, 3, 3),
    "embedding": (50, 8),
    "vector": (13,),
}
DENSE = ("embedding", "vector")


class Model(nn.Module):
    """Parameters of many shapes with full-rank gradients that change from step to step: ∂loss/∂p = T(step) + p/10."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for number, (name, shape) in enumerate(shapes.items()):
            generator = torch.Generator().manual_seed(number)
            self.register_parameter(name, nn.Parameter((0.25 * torch.randn(shape, generator=generator)).to(dtype)))

    def forward(self, step: int) -> Tensor:
        return sum(
            (p * target(tuple(p.shape), number, step).to(p.dtype)).sum() + 0.05 * p.square().sum()
            for number, p in enumerate(self.parameters())
        )


@cache
def target(shape: tuple[int, ...], number: int, step: int) -> Tensor:
    """Low rank (for matrices) and noise; not to be written to."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    noise = 0.1 * torch.randn(shape, generator=generator)
    if len(shape) < 2:
        return noise
    fixed = torch.Generator().manual_seed(7 * number + 1)
    rows = torch.randn(shape[0], 3, generator=fixed) * torch.tensor([3.0, 1.0, 0.3])
    cols = torch.randn(3, torch.Size(shape[1:]).numel(), generator=fixed)
    return noise + (rows @ cols).view(shape) * (1.0 + 0.1 * step)


def groups(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    low = [(n, p) for n, p in named if n not in DENSE]
    dense = [(n, p) for n, p in named if n in DENSE]
    return [{"params": low, **options}, *([{"params": dense, "rank": None}] if dense else [])]


def layers(model: nn.Module) -> list[dict[str, Any]]:
    """The groups of a layerwise method: every parameter is a layer."""
    return [
        {"params": [(name, p)], "layer": number, "rank": None if name in DENSE else 2}
        for number, (name, p) in enumerate(model.named_parameters())
    ]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        model(step).backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: Tensor) -> Tensor:
    if hasattr(tensor, "full_tensor") and tensor.numel() == 0:  # torch 2.8 pads the parts of these, and raises
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p) for name, p in model.named_parameters()}


def states(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    return {n: {k: whole(t) for k, t in optimizer.state[p].items()} for n, p in model.named_parameters()}


def shard(model: nn.Module, mesh: DeviceMesh | None = None, **options: Any) -> nn.Module:
    mesh = mesh or init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    sharded = fully_shard(model, mesh=mesh, **options)
    sharded.set_force_sum_reduction_for_comms(True)  # gloo in torch 2.8 takes AVG for SUM
    return sharded


def distance(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    return max(float((got[name].double() - expected[name].double()).abs().max()) for name in expected)


def _process(rank: int, world: int, store: str, errors: str, function: Callable[..., None], arguments: tuple) -> None:
    torch.set_num_threads(1)
    try:
        late = timedelta(minutes=3)  # a process that has failed must not keep the others waiting for half an hour
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=late
        )
        function(*arguments)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        import traceback

        Path(errors, str(rank)).write_text(traceback.format_exc())
        os._exit(1)
    # Leave without tearing the interpreter down: a thread of torch's asynchronous save that is still winding up inside
    # C++ is killed there by Python's finalisation, and takes the process with it ("terminate called without…").
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def spawn(world: int, function: Callable[..., None], *arguments: Any) -> None:
    """Run `function(*arguments)` in `world` processes of one group, forked from a server that has imported torch once."""
    preload()
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder, "errors")
        errors.mkdir()
        try:
            passed = (world, f"{folder}/store", str(errors), function, arguments)
            mp.start_processes(_process, passed, nprocs=world, start_method="forkserver")
        except Exception as error:
            told = sorted(errors.iterdir(), key=lambda path: path.stat().st_mtime)
            raise AssertionError("\n".join(f"process {p.name}:\n{p.read_text()}" for p in told) or str(error)) from None


METHODS = {**lo.METHODS, **lo.LAYERWISE_METHODS}
