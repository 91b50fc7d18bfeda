"""Sparse Spectral Training on several processes: the numbers of one, under DDP and under fully_shard."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import lowrank_optim as lo
from tests.oracles.distributed_harness import spawn

ROWS = 8


def build() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 43), nn.GELU(), nn.Linear(43, 15)).double()
    return lo.nn.spectral_(model, rank=3, include=["0", "2"])


def train(model: nn.Module, rows: slice, in_backward: bool = False) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(ROWS, size, generator=generator, dtype=torch.float64) for size in (24, 15))
    optimizer = lo.GaLoreAdamW(lo.param_groups(model, rank=None, weight_decay=0.1), lr=1e-2)
    handle = lo.update_in_backward(optimizer) if in_backward else None
    schedule = lo.SpectralSchedule(model, optimizer, period=2, iterations=2, warmup=2)
    for _ in range(7):
        (model(x[rows]) - y[rows]).square().mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    if handle is not None:
        handle.remove()


def weights(state: dict[str, Tensor]) -> list[Tensor]:
    """The merged weights: signs and order of triplets of equal values are the decomposition's."""
    again = build()
    again.load_state_dict(state, strict=True)
    return [again[number].weight for number in (0, 2)]


def compare() -> None:
    size = ROWS // dist.get_world_size()
    rows = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
    alone, replicated = build(), DistributedDataParallel(build())
    train(alone, slice(None))
    train(replicated, rows)
    expected = weights(alone.state_dict())
    assert (expected[0] - build()[0].weight).abs().max() > 1e-3
    for found, want in zip(weights(replicated.module.state_dict()), expected, strict=True):
        torch.testing.assert_close(found, want, atol=1e-8, rtol=1e-8)
    for in_backward in (False, True):
        sharded = build()
        for layer in (sharded[0], sharded[2], sharded):
            fully_shard(layer)
        assert isinstance(sharded[0].u_active, DTensor)
        train(sharded, rows, in_backward)
        state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
        for found, want in zip(weights(state), expected, strict=True):
            torch.testing.assert_close(found, want, atol=1e-8, rtol=1e-8)
    with pytest.raises(ValueError, match="is sharded"):
        lo.nn.merge_(sharded)
    with pytest.raises(ValueError, match=r"0\.weight is sharded"):
        lo.nn.spectral_(fully_shard(nn.Sequential(nn.Linear(8, 8))), rank=2, include="0")
    if dist.get_world_size() > 1:
        refused = build()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        refused[0].u_active = nn.Parameter(distribute_tensor(refused[0].u_active.detach(), mesh, [Shard(1)]))
        with pytest.raises(ValueError, match="tensor parallelism"):
            lo.SpectralSchedule(refused, torch.optim.SGD(refused.parameters(), lr=0.1))


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2])
def test_several_processes_train_as_one(world):
    spawn(world, compare)
