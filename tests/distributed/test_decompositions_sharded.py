"""Low-rank layers and pairs on several processes: the numbers of one, under DDP and under fully_shard."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import lowrank_optim as lo
from lowrank_optim.nn import Moments
from tests.oracles.distributed_harness import spawn

ROWS = 8


def moments(width: int) -> Moments:
    return Moments("input", 1000, torch.zeros(width), torch.diag(torch.logspace(0, -2, width)))


def build() -> nn.Module:
    """Two factors, and a pruned layer with a pair beside it."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(40, 24), "up": nn.Linear(24, 43), "down": nn.Linear(43, 24)})
    reference = copy.deepcopy(model)
    lo.nn.factorize_(model, rank=3, include=["embed", "up"])
    with torch.no_grad():
        model["down"].weight[:, ::2] = 0
    lo.nn.compensate_(model, reference, rank=3, statistics={"down": moments(43)})
    return nn.Sequential(*model.values())


def train(model: nn.Module, rows: slice) -> None:
    generator = torch.Generator().manual_seed(1)
    ids, y = torch.randint(40, (ROWS, 5), generator=generator), torch.randn(ROWS, 5, 24, generator=generator)
    optimizer = lo.GaLoreAdamW(lo.param_groups(model, rank=None, weight_decay=0.1), lr=1e-2)
    for _ in range(4):
        (model(ids[rows]) - y[rows]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def compare() -> None:
    size = ROWS // dist.get_world_size()
    rows = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
    alone, replicated, sharded = build(), DistributedDataParallel(build()), build()
    train(alone, slice(None))
    train(replicated, rows)
    for layer in (*sharded, sharded):
        fully_shard(layer)
    assert isinstance(sharded[1].lora_A, DTensor)
    train(sharded, rows)
    state: dict[str, Tensor] = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    for name, expected in alone.named_parameters():
        torch.testing.assert_close(replicated.module.get_parameter(name), expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(state[name].view_as(expected), expected.detach(), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="is sharded"):
        lo.nn.merge_(sharded)
    with pytest.raises(RuntimeError, match="are sharded"):
        _ = sharded[2].weight
    other = fully_shard(nn.Sequential(nn.Linear(8, 8)))
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    found = lo.nn.collect_statistics(other, [x], include="0", side="input")["0"]  # of this process's rows
    torch.testing.assert_close(found.covariance.float(), torch.cov(x.mT, correction=0), atol=1e-5, rtol=1e-5)
    for call in (
        lambda: lo.nn.factorize_(other, ranks={"0": 2}),
        lambda: lo.nn.select_ranks(other, reduction=0.5, include="0"),
        lambda: lo.nn.compensate_(other, other, rank=2, statistics={"0": moments(8)}),
    ):
        with pytest.raises(ValueError, match=r"^0(\.weight)? is sharded"):
            call()


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2])
def test_several_processes_train_as_one(world):
    spawn(world, compare)
