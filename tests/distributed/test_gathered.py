"""Weights that `fully_shard` leaves gathered after a forward pass: refused by name, and never written to."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

import lowrank_optim as lo
from lowrank_optim.nn import Moments
from tests.oracles.adapted import Adapted
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
            ValueError, match=r"^0(\.weight)? is a plain tensor in a layer that fully_shard .*; call this before"
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
    with pytest.raises(ValueError, match=r"^0\.in_factor is a plain tensor"):
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
    with pytest.raises(ValueError, match=r"^0\.weight is a plain tensor"):
        lo.nn.truncate_(outer[0], rank=3, include="0")
    optimizer = torch.optim.SGD(gathered(model).parameters(), lr=0.1)  # of gathered weights: it would train nothing
    with pytest.raises(ValueError, match="the optimizer has none of the matrices"):
        lo.truncate_ranks(optimizer, model, rank=3, include=["0", "2"])


def check_groups() -> None:
    """An optimizer of gathered weights would train nothing: no gradient comes to them."""
    model = gathered(shard(build()))
    with pytest.raises(ValueError, match=r"^0\.weight is sharded, and gathered.*model\.reshard\(\) on all processes"):
        lo.param_groups(model, rank=4)
    model.reshard()
    optimizer = lo.GaLoreAdamW(lo.param_groups(model, rank=4, include=["0", "2"]), lr=0.1)
    assert all(isinstance(param, DTensor) for group in optimizer.param_groups for param in group["params"])
    before = weights(model)
    model(x()).square().mean().backward()
    optimizer.step()
    assert not any(torch.equal(old, weights(model)[name]) for name, old in before.items())
    outer = gathered(shard(nn.Sequential(build())))
    with pytest.raises(ValueError, match=r"^0\.weight is a plain tensor"):
        lo.param_groups(outer[0], rank=4)


def check_one_process_alone() -> None:
    """What only reads leaves the model as it is: after a change, the next forward pass of this process would wait for the others."""
    model = gathered(shard(build()))
    before = list(map(id, model.parameters()))
    calls = (
        lambda m: lo.param_groups(m, rank=4),
        lambda m: lo.nn.select_ranks(m, reduction=0.3, include="0"),
        lambda m: lo.nn.factorize_(m, rank=2, include="0"),
    )
    for call in calls if torch.distributed.get_rank() == 0 else ():
        with pytest.raises(ValueError, match=r"^0\.weight is sharded"):
            call(model)
        assert list(map(id, model.parameters())) == before
    model(x()).square().mean().backward()
    torch.testing.assert_close(model[0].weight.grad.full_tensor(), plain_gradient())
    assert lo.param_groups(model, rank=4)


def check_frozen_and_ignored() -> None:
    """What no optimizer gets may be a plain tensor, and what is ignored is said to be perhaps so."""
    inner = build()
    outer = nn.Sequential(inner)
    fully_shard(outer, ignored_params={inner[2].bias})
    with pytest.raises(ValueError, match=r"^2\.bias is a plain tensor in a layer .* gathered for a while, or ignored"):
        lo.param_groups(inner, rank=4)
    inner[2].bias.requires_grad_(False)
    assert len(lo.param_groups(inner, rank=4)) == 2
    assert len(lo.param_groups(outer, rank=4)) == 2


def check_fsdp1() -> None:
    wrapped = FullyShardedDataParallel(build(), use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"0\.weight belongs to FullyShardedDataParallel \(FSDP1\)"):
        lo.param_groups(wrapped.module, rank=4)


def adapted() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Adapted(24, 16, 3), nn.GELU(), nn.Linear(16, 24))


ADAPTER_FUNCTIONS: dict[str, Callable[[nn.Module], object]] = {
    "lora_pairs": lo.lora_pairs,
    "update_scalings": lambda m: lo.update_scalings(torch.optim.SGD([nn.Parameter(torch.ones(1))]), m),
    "prune_ranks_": lo.prune_ranks_,
    "lora_sb_": lambda m: lo.lora_sb_(m, {"0": torch.randn(16, 24)}, eta=0.1),
    "noise_in_forward": lambda m: lo.noise_in_forward(m, torch.optim.SGD(m.parameters(), lr=0.1), sigma=0.1),
    "scale_rows_in_backward": lambda m: lo.scale_rows_in_backward(m, 1.0),
}


def check_adapters() -> None:
    """Their factors were taken for plain ones: scalings stayed as they were, and what was written was lost."""
    model, outer = gathered(shard(adapted())), gathered(shard(nn.Sequential(adapted())))
    with torch.no_grad():
        model[0].lora_A["default"].weight[1] = 0.0
    for name, function in ADAPTER_FUNCTIONS.items():
        before = list(map(id, model.parameters()))
        with pytest.raises(ValueError, match=r"^(A of 0|0\.\w+.*) is sharded, and gathered"):
            function(model)
        with pytest.raises(ValueError, match=r"^(A of 0|0\.\w+.*) is a plain tensor in a layer"):
            function(outer[0])
        assert list(map(id, model.parameters())) == before, name
    model.reshard()
    (pairs, *_) = lo.lora_pairs(model)
    assert all(isinstance(param, DTensor) for param in pairs["params"])
    optimizer = lo.LoRARiteAdamW(lo.lora_pairs(model), lr=0.1)
    model[0].scaling["default"] = 3.0
    lo.update_scalings(optimizer, model)
    assert optimizer.param_groups[0]["scalings"] == [3.0]
    with pytest.raises(ValueError, match=r"^0 is sharded \(DTensor\); prune the unsharded model"):
        lo.prune_ranks_(model)


def check_other_parameters_of_adapters() -> None:
    """The layer beside the pairs is gathered from around, the pairs are not."""
    inner = nn.Sequential(fully_shard(Adapted(24, 16, 3)), nn.Linear(16, 24))
    outer = fully_shard(nn.Sequential(inner))
    with torch.no_grad():
        outer(x())
    inner[0].reshard()
    with pytest.raises(ValueError, match=r"^1\.weight is a plain tensor in a layer"):
        lo.lora_pairs(inner)


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
    with pytest.raises(ValueError, match=r"^0 is a plain tensor"):
        ranks.prox_(0.05)
    outer = shard(nn.Sequential(lo.nn.spectral_(build(), rank=3, include="0")))
    schedule = lo.SpectralSchedule(outer[0], torch.optim.SGD(outer.parameters(), lr=0.1))
    gathered(outer)
    with pytest.raises(ValueError, match=r"^0\.\w+ is a plain tensor"):
        lo.SpectralSchedule(outer[0], torch.optim.SGD(outer[0].parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"^0\.sigma is a plain tensor"):
        schedule.step()
    with pytest.raises(ValueError, match=r"^0\.sigma is a plain tensor"):
        schedule.load_state_dict({**schedule.state_dict(), "steps": 7})
    assert schedule.steps == 0


def compare() -> None:
    for check in CHECKS:
        check()


CHECKS = (
    *(check_conversions, check_merge, check_ignored, check_groups, check_truncation, check_schedules, check_adapters),
    *(check_one_process_alone, check_frozen_and_ignored, check_fsdp1, check_other_parameters_of_adapters),
)


@pytest.mark.parametrize("world", [1, 2])
def test_gathered_weights_are_sharded_ones(world):
    spawn(world, compare)
