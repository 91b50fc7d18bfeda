"""Sparse plus low-rank layers on several processes: the numbers of one, under DDP and under fully_shard."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import lowrank_optim as lo
from tests.oracles.distributed_harness import spawn

ROWS = 8


def build() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 42), nn.GELU(), nn.Linear(42, 15))
    lo.nn.sltrain_(model, rank=3, density=0.1, alpha=10, init="fresh", include="0")
    return lo.nn.sltrain_(model, rank=3, density=0.1, alpha=10, init="fresh", support="uniform", include="2")


def train(model: nn.Module, rows: slice, in_backward: bool = False) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(ROWS, 24, generator=generator), torch.randn(ROWS, 15, generator=generator)
    optimizer = lo.GaLoreAdamW(lo.param_groups(model, rank=None, weight_decay=0.1), lr=1e-2)
    handle = lo.update_in_backward(optimizer) if in_backward else None
    for _ in range(4):
        (model(x[rows]) - y[rows]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if handle is not None:
        handle.remove()


def compare() -> None:
    size = ROWS // dist.get_world_size()
    rows = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
    alone, replicated, sharded = build(), DistributedDataParallel(build()), build()
    train(alone, slice(None))
    train(replicated, rows)
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer)
    assert isinstance(sharded[0].sparse_value, DTensor)
    train(sharded, rows)
    state: dict[str, Tensor] = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    in_backward = build()
    for layer in (in_backward[0], in_backward[2], in_backward):
        fully_shard(layer)
    train(in_backward, rows, in_backward=True)
    for name, expected in sharded.named_parameters():
        torch.testing.assert_close(in_backward.get_parameter(name).full_tensor(), expected.full_tensor())
    for name, expected in alone.named_parameters():
        torch.testing.assert_close(replicated.module.get_parameter(name), expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(state[name].view_as(expected), expected.detach(), atol=1e-6, rtol=1e-5)
    again = build()
    again.load_state_dict(state, strict=True)
    assert again[0].entries == alone[0].entries
    with pytest.raises(ValueError, match="is sharded"):
        lo.nn.merge_(sharded)
    with pytest.raises(RuntimeError, match="are sharded"):
        _ = sharded[0].weight
    other = fully_shard(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match=r"0\.weight is sharded"):
        lo.nn.sltrain_(other, rank=2, init="fresh", include="0")


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2, 4])
def test_several_processes_train_as_one(world):
    spawn(world, compare)
