"""Weight-normalised and ordered layers on several processes: the numbers of one, under DDP and under fully_shard."""

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
    model = nn.Sequential(nn.Linear(24, 43), nn.GELU(), nn.Linear(43, 24), nn.GELU(), nn.Linear(24, 15))
    lo.nn.weight_normalized_(model, rank=3, include="0")
    lo.nn.weight_normalized_(model, rank=3, norm="row", include="2")
    return lo.nn.ordered_(model, include="4")


def train(model: nn.Module, rows: slice) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(ROWS, 24, generator=generator), torch.randn(ROWS, 15, generator=generator)
    groups = lo.param_groups(model, rank=1, include=["lora_A", "lora_B"], proj_type="full", weight_decay=0.1)
    optimizer = lo.GaLoreAdamW(groups, lr=1e-2, eps=1e-6, update_proj_gap=2, projector="svd")
    ranks = lo.nn.OrderedRanks(model, seed=4)
    for _ in range(4):
        with ranks.sample():
            loss = (model(x[rows]) - y[rows]).square().mean() + 0.01 * lo.nn.ordered_penalty(model)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ranks.prox_(2e-3)


def compare() -> None:
    size = ROWS // dist.get_world_size()
    rows = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
    alone, replicated, sharded = build(), DistributedDataParallel(build()), build()
    train(alone, slice(None))
    train(replicated, rows)
    for layer in (sharded[0], sharded[2], sharded[4], sharded):
        fully_shard(layer)
    assert isinstance(sharded[4].in_factor, DTensor)
    train(sharded, rows)
    state: dict[str, Tensor] = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    for name, expected in alone.named_parameters():
        torch.testing.assert_close(replicated.module.get_parameter(name), expected, atol=2e-5, rtol=1e-4, msg=name)
        torch.testing.assert_close(state[name].view_as(expected), expected.detach(), atol=2e-5, rtol=1e-4, msg=name)
    again = build()
    again.load_state_dict(state, strict=True)
    with pytest.raises(ValueError, match=r"4 is sharded \(DTensor\); shrink the unsharded model"):
        lo.nn.OrderedRanks(sharded).shrink_(1.0)
    with pytest.raises(ValueError, match="wrapped in DistributedDataParallel"):
        lo.nn.OrderedRanks(replicated).shrink_(1.0)
    with pytest.raises(ValueError, match="is sharded"):
        lo.nn.merge_(sharded)
    base = build()
    fully_shard(base[0].base)
    with pytest.raises(RuntimeError, match="its base is sharded by itself"):
        base(torch.zeros(2, 24))
    other = fully_shard(nn.Sequential(nn.Linear(8, 8)))
    for convert in (lo.nn.weight_normalized_, lo.nn.ordered_):
        with pytest.raises(ValueError, match=r"0\.weight is sharded"):
            convert(other, include="0")


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2])
def test_several_processes_train_as_one(world):
    spawn(world, compare)
