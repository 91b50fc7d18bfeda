"""Frozen-base adapters on several processes: the numbers of one, under DDP and under fully_shard."""

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


def build() -> nn.Sequential:
    """One layer for each method; a convolution first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 5, 3, padding=1), nn.Flatten(), nn.Linear(35, 24), nn.Tanh())
    model.extend([nn.Linear(24, 42), nn.Tanh(), nn.Linear(42, 24), nn.Linear(24, 15)])
    lo.nn.tucker_adapters_(model, rank=3, kernel_rank=2, include="0")
    for place, function, options in (
        (2, lo.nn.svfit_, {"rank": 7}),
        (4, lo.nn.salt_, {"rank": 5, "lora_rank": 3}),
        (6, lo.nn.loldu_, {"rank": 5}),
        (7, lo.nn.nola_, {"rank": 3, "bases": 9}),
    ):
        function(model, include=str(place), freeze_rest=False, **options)
    return model


def train(model: nn.Module, rows: slice, in_backward: bool = False) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(ROWS, 2, 7, generator=generator), torch.randn(ROWS, 15, generator=generator)
    optimizer = lo.GaLoreAdamW(lo.param_groups(model, rank=None, weight_decay=0.1), lr=1e-2)
    handle = lo.update_in_backward(optimizer) if in_backward else None
    for _ in range(4):
        (model(x[rows]) - y[rows]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if handle is not None:
        handle.remove()


def sharded_model() -> nn.Sequential:
    model = build()
    for place in (0, 2, 4, 6, 7):
        fully_shard(model[place])
    fully_shard(model)
    return model


def compare() -> None:
    size = ROWS // dist.get_world_size()
    rows = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
    alone, start, replicated = build(), build(), DistributedDataParallel(build())
    train(alone, slice(None))
    train(replicated, rows)
    sharded, in_backward = sharded_model(), sharded_model()
    assert isinstance(sharded[2].left, DTensor)
    train(sharded, rows)
    train(in_backward, rows, in_backward=True)
    state: dict[str, Tensor] = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    for name, expected in alone.named_parameters():
        assert expected.requires_grad != torch.equal(expected, start.get_parameter(name)), name
        for found in (
            replicated.module.get_parameter(name),
            in_backward.get_parameter(name).full_tensor(),
            state[name],
        ):
            torch.testing.assert_close(found.detach(), expected.detach(), atol=1e-5, rtol=1e-4, msg=name)
    again = build()
    again.load_state_dict(state, strict=True)
    with pytest.raises(ValueError, match="is sharded"):
        lo.nn.merge_(sharded)
    with pytest.raises(RuntimeError, match="are sharded"):
        _ = sharded[2].weight
    other = fully_shard(nn.Sequential(nn.Linear(8, 8), nn.Conv1d(4, 4, 3)))
    with pytest.raises(ValueError, match=r"0\.weight is sharded"):
        lo.nn.svfit_(other, rank=2, include="0")
    with pytest.raises(ValueError, match=r"1\.weight is sharded"):
        lo.nn.tucker_adapters_(other, rank=2, include="1")


@pytest.mark.long
def test_four_processes_train_as_one():
    """Four, more than some tensors have rows: shards without any, too."""
    spawn(4, compare)
