"""A model that is sharded after the optimizer was built: before the first step, the optimizer goes on with the sharded parameters."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lowrank_optim as lo
from tests.oracles.distributed_harness import spawn

WORLD = 2


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(18, 30), nn.Tanh(), nn.Linear(30, 18))


def optimizer_for(model: nn.Module) -> lo.LowRankOptimizer:
    return lo.FiraAdamW(lo.param_groups(model, rank=6, update_proj_gap=2), lr=1e-2)


def sharded(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))


def put_into(optimizer: torch.optim.Optimizer, names: list[str], model: nn.Module) -> None:
    """The model's parameters in the places of those that had their names."""
    new = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [new[name] for name in group["param_names"]]
    assert sorted(names) == sorted(new)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    x = torch.randn(5, 18, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def adopt() -> None:
    model = network()
    optimizer = optimizer_for(model)
    names = [name for name, _ in model.named_parameters()]
    put_into(optimizer, names, sharded(model))
    assert set(optimizer.state_dict()["state"]) == {0, 1, 2, 3}  # a checkpoint before the first step takes them in, too
    assert set(optimizer.state) == set(model.parameters())
    assert all(isinstance(optimizer.state[p]["exp_avg"], DTensor) for p in model.parameters())
    train(model, optimizer)
    other = sharded(network())
    train(other, optimizer_for(other))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q.full_tensor())


def refuse() -> None:
    model = network()
    optimizer = optimizer_for(model)
    names = [name for name, _ in model.named_parameters()]
    train(model, optimizer, 1)
    put_into(optimizer, names, sharded(model))
    with pytest.raises(RuntimeError, match=r"was replaced by a parameter .* after the optimizer was built"):
        train(model, optimizer)
    whole = network()
    fresh = optimizer_for(whole)
    put_into(fresh, names, network())  # other parameters, which are not sharded
    with pytest.raises(RuntimeError, match=r"was replaced by a parameter .* after the optimizer was built"):
        fresh.state_dict()


def test_before_the_first_step_sharded_parameters_are_taken_in():
    spawn(WORLD, adopt)


def test_after_a_step_and_for_other_parameters_an_error_says_what_to_do():
    spawn(WORLD, refuse)
