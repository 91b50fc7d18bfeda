"""SaRA's low-rank term and truncated ranks on several processes: the numbers of one, and checkpoints that go on."""

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import lowrank_optim as lo
from tests.oracles.distributed_harness import distance, shard, spawn, train, weights

SHAPES = {"tall": (90, 70), "wide": (66, 90), "few": (80, 80), "experts": (3, 20, 14)}


class Layers(nn.Module):
    """Linear layers of SHAPES, which is where matrices are looked for, a convolution, and a stack."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, (rows, cols) in list(SHAPES.items())[:3]:
            setattr(self, name, nn.Linear(cols, rows, bias=False))
        self.kernels = nn.Conv2d(8, 12, (3, 2), bias=False)
        self.grouped = nn.Conv2d(8, 12, (3, 2), groups=2, bias=False)
        self.experts = nn.Parameter(0.1 * torch.randn(SHAPES["experts"]))

    def forward(self, step: int):
        generator = torch.Generator().manual_seed(step)
        loss = 0.0
        for p in self.parameters():
            goal = torch.randn(tuple(p.shape), generator=generator)
            if hasattr(p, "device_mesh"):
                goal = torch.distributed.tensor.distribute_tensor(goal, p.device_mesh, p.placements)
            loss = loss + (p * goal).sum()
        return loss


def sara(model: nn.Module, threshold: float | None = None) -> lo.SaRAAdamW:
    groups = lo.param_groups(model, density=0.3 if threshold is None else 1.0)
    return lo.SaRAAdamW(groups, lr=1e-2, low_rank_weight=0.2, shrink_at=3, threshold=threshold)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


def check_sara() -> None:
    for threshold in (None, 0.03):
        check_sara_by(threshold)


def check_sara_by(threshold: float | None) -> None:
    alone, sharded = Layers(), shard(Layers())
    reference, optimizer = sara(alone, threshold), sara(sharded, threshold)
    train(alone, reference, range(6))
    train(sharded, optimizer, range(3))
    state = get_optimizer_state_dict(sharded, optimizer)
    fresh = sara(sharded, threshold)  # chooses from weights that have moved, until the checkpoint says which they were
    set_optimizer_state_dict(sharded, fresh, state)
    train(sharded, fresh, range(3, 6))
    assert distance(weights(sharded), weights(alone)) < 2e-6
    for a, b in zip(alone.parameters(), sharded.parameters(), strict=True):
        assert torch.equal(reference.state[a]["indices"], fresh.state[b]["indices"].full_tensor())


def check_truncation() -> None:
    for settings in (
        {"energy": 0.5, "nuclear_weight": 1.0, "convolutions": "spatial"},
        {"energy": 0.5, "nuclear_weight": 1.0, "convolutions": "filter"},
        {"rank": 7, "nuclear_weight": 0.1, "mode": "gradient"},
    ):
        alone, sharded = Layers(), shard(Layers())
        optimizers = sgd(alone), sgd(sharded)
        handles = [
            lo.truncate_ranks(o, m, period=2, **settings) for o, m in zip(optimizers, (alone, sharded), strict=True)
        ]
        train(alone, optimizers[0], range(5))
        train(sharded, optimizers[1], range(5))
        assert handles[0].ranks() == handles[1].ranks()
        assert distance(weights(sharded), weights(alone)) < 2e-5
    once = shard(Layers())
    lo.nn.truncate_(once, rank=3)
    assert int(torch.linalg.matrix_rank(weights(once)["tall.weight"])) == 3
    assert distance(weights(once), weights(lo.nn.truncate_(Layers(), rank=3))) < 1e-5
    split = Layers()  # along columns, as tensor parallelism does
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    split.tall.weight = nn.Parameter(distribute_tensor(split.tall.weight.detach(), mesh, [Shard(1)]))
    lo.nn.truncate_(split, rank=3)
    assert split.tall.weight.placements == (Shard(1),)
    assert distance(weights(split), weights(once)) < 1e-5
    with pytest.raises(ValueError, match="match_reference is True and weights are sharded"):
        lo.truncate_ranks(sgd(once), once, rank=3, match_reference=True)


def test_the_low_rank_term_and_a_shrink_agree_with_one_process_and_resume():
    spawn(2, check_sara)


def test_truncated_ranks_agree_with_one_process():
    spawn(2, check_truncation)
