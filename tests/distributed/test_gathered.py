"""Weights that `fully_shard` leaves gathered after a forward pass: refused by name, and never written to."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lowrank_optim as lo
from lowrank_optim.nn import Moments
from tests.oracles.distributed_harness import distance, shard, spawn, weights

CONVERSIONS: dict[str, Callable[[nn.Module], object]] = {
    "factorize_": lambda m: lo.nn.factorize_(m, rank=2, include="0"),
    "select_ranks": lambda m: lo.nn.select_ranks(m, reduction=0.3, include="0"),
    "compensate_": lambda m: lo.nn.compensate_(m, {"0": torch.zeros(16, 24)}, rank=2, statistics={"0": moments()}),
    "sltrain_": lambda m: lo.nn.sltrain_(m, rank=2, density=0.1, init="fresh", include="0"),
    "weight_normalized_": lambda m: lo.nn.weight_normalized_(m, rank=2, include="0"),
    "ordered_": lambda m: lo.nn.ordered_(m, include="0"),
    "spectral_": lambda m: lo.nn.spectral_(m, rank=2, include="0"),
    "quantize_weights_": lambda m: lo.nn.quantize_weights_(m, include="0"),
    "svfit_": lambda m: lo.nn.svfit_(m, rank=2, include="0"),
}


def moments() -> Moments:
    return Moments("input", 1000, torch.zeros(24), torch.eye(24))


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 24))


def x(step: int = 0) -> torch.Tensor:
    return torch.randn(8, 24, generator=torch.Generator().manual_seed(step))


def gathered(model: nn.Module) -> nn.Module:
    """The model after a forward pass, in which the weights of the outermost module have stayed gathered."""
    with torch.no_grad():
        model(x())
    assert any(not isinstance(param, DTensor) for param in model.parameters())
    return model


def check_conversions() -> None:
    for name, convert in CONVERSIONS.items():
        model = gathered(shard(build()))
        with pytest.raises(ValueError, match=r"^0(\.weight)? is sharded"):
            convert(model)
        assert type(model[0]) is nn.Linear, name
        outer = gathered(shard(nn.Sequential(build())))
        before = [id(module) for module in outer.modules()]
        with pytest.raises(
            ValueError, match=r"^0(\.weight)? is gathered for a while by fully_shard.*; call this before"
        ):
            convert(outer[0])
        assert [id(module) for module in outer.modules()] == before, name
        model(x()).square().mean().backward()
        torch.testing.assert_close(model[0].weight.grad.full_tensor(), plain_gradient(), msg=name)


def plain_gradient() -> torch.Tensor:
    model = build()
    model(x()).square().mean().backward()
    return model[0].weight.grad


def check_merge() -> None:
    model = gathered(shard(lo.nn.ordered_(build(), include="0")))
    with pytest.raises(ValueError, match=r"^0 is sharded \(DTensor\); merge the unsharded model"):
        lo.nn.merge_(model)
    outer = gathered(shard(nn.Sequential(lo.nn.ordered_(build(), include="0"))))
    with pytest.raises(ValueError, match=r"^0\.in_factor is gathered for a while"):
        lo.nn.merge_(outer[0])


def check_ignored() -> None:
    """A parameter that `fully_shard` ignores is a plain one, and its layer can be replaced."""
    model = build()
    fully_shard(model, ignored_params=set(model[2].parameters()))
    gathered(model)
    lo.nn.factorize_(model, rank=2, include="2")
    assert isinstance(model[2], lo.nn.LowRankLinear)
    with pytest.raises(ValueError, match=r"^0\.weight is sharded"):
        lo.nn.factorize_(model, rank=2, include="0")


def check_truncation() -> None:
    expected = weights(lo.nn.truncate_(build(), rank=3, include=["0", "2"]))
    model = lo.nn.truncate_(gathered(shard(build())), rank=3, include=["0", "2"])
    assert distance(weights(model), expected) < 1e-6
    outer = gathered(shard(nn.Sequential(build())))
    with pytest.raises(ValueError, match=r"^0\.weight is gathered for a while"):
        lo.nn.truncate_(outer[0], rank=3, include="0")
    optimizer = torch.optim.SGD(gathered(model).parameters(), lr=0.1)  # of gathered weights: it would train nothing
    with pytest.raises(ValueError, match="the optimizer has none of the matrices"):
        lo.truncate_ranks(optimizer, model, rank=3, include=["0", "2"])


def check_groups() -> None:
    """An optimizer of gathered weights would train nothing: no gradient comes to them."""
    model = gathered(shard(build()))
    optimizer = lo.GaLoreAdamW(lo.param_groups(model, rank=4, include=["0", "2"]), lr=0.1)
    assert all(isinstance(param, DTensor) for group in optimizer.param_groups for param in group["params"])
    before = weights(model)
    model(x()).square().mean().backward()
    optimizer.step()
    assert not any(torch.equal(old, weights(model)[name]) for name, old in before.items())
    outer = gathered(shard(nn.Sequential(build())))
    with pytest.raises(ValueError, match=r"^0\.weight is gathered for a while"):
        lo.param_groups(outer[0], rank=4)


def spectral(look: bool) -> dict[str, torch.Tensor]:
    """Weights after some steps; a look at the model before each call of the schedule leaves it gathered."""
    model = shard(lo.nn.spectral_(build(), rank=3, include=["0", "2"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = lo.SpectralSchedule(gathered(model) if look else model, optimizer, period=2, iterations=2, warmup=1)
    for step in range(5):
        (model(x(step)) - x(step + 1)).square().mean().backward()
        optimizer.step()
        if look:
            model.reshard()  # torch would go on with the weights of before the step
            gathered(model)
        schedule.step()
        optimizer.zero_grad()
    return weights(model)


def ordered(look: bool) -> dict[str, torch.Tensor]:
    model = shard(lo.nn.ordered_(build(), include=["0", "2"]))
    ranks = lo.nn.OrderedRanks(gathered(model) if look else model)
    ranks.prox_(0.05)
    if look:
        gathered(model)
    with pytest.raises(ValueError, match=r"0 is sharded \(DTensor\); shrink the unsharded model"):
        ranks.shrink_(0.1)
    return weights(model)


def check_schedules() -> None:
    for run in (spectral, ordered):
        plain, looked = run(False), run(True)
        assert all(torch.equal(plain[name], looked[name]) for name in plain), run.__name__
    outer = shard(nn.Sequential(lo.nn.ordered_(build(), include="0")))
    ranks = lo.nn.OrderedRanks(outer[0])
    ranks.prox_(0.0)
    gathered(outer)
    with pytest.raises(ValueError, match=r"^0 is gathered for a while"):
        ranks.prox_(0.05)
    outer = shard(nn.Sequential(lo.nn.spectral_(build(), rank=3, include="0")))
    schedule = lo.SpectralSchedule(outer[0], torch.optim.SGD(outer.parameters(), lr=0.1))
    gathered(outer)
    with pytest.raises(ValueError, match=r"^0\.sigma is gathered for a while"):
        schedule.step()


def compare() -> None:
    for check in (check_conversions, check_merge, check_ignored, check_groups, check_truncation, check_schedules):
        check()


@pytest.mark.parametrize("world", [1, 2])
def test_gathered_weights_are_sharded_ones(world):
    spawn(world, compare)
