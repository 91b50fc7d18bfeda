"""Pairs of adapters on sharded factors: the numbers of one process."""

import io

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import lowrank_optim as lo
from tests.distributed.test_fully_shard import place
from tests.oracles.adapted import two_layers
from tests.oracles.distributed_harness import Model, distance, spawn, states, train, weights

STEPS = 6
SHAPES = {
    "a": (4, 21),
    "b": (18, 4),
    "odd_a": (3, 9),  # on 2 processes: 2 and 1 ranks
    "odd_b": (7, 3),
    "conv_a": (4, 4, 3, 3),
    "conv_b": (6, 4, 1, 1),
    "stack_a": (6, 14),  # 3 experts of rank 2: a process holds one and a half of them
    "stack_b": (9, 6),
}
EXPERTS = [1, 1, 1, 3]
METHODS = {
    "rite": lambda groups: lo.LoRARiteAdamW(groups, lr=1e-2, weight_decay=0.1),
    "rite, escape": lambda groups: lo.LoRARiteAdamW(groups, lr=1e-2, escape=True),
    "altlora": lambda groups: lo.AltLoRA(groups, lr=1e-3, weight_decay=0.1),
    "altlora+": lambda groups: lo.AltLoRA(groups, lr=1e-3, second_moment=True),
    "pro": lambda groups: lo.LoRAProAdamW(groups, lr=1e-3, moments="none"),
    "pro, factors": lambda groups: lo.LoRAProAdamW(groups, lr=1e-3, moments="factors"),
    "pro, full": lambda groups: lo.LoRAProAdamW(groups, lr=1e-3, moments="full"),
    "riemannian": lambda groups: lo.RiemannianAdamW(groups, lr=1e-3),
    "adamw, l1": lambda groups: lo.LoRAOptimizer([{**groups[0], "l1": 20.0}], lr=1e-2),
}


def build(model: nn.Module, name: str) -> lo.LoRAOptimizer:
    named = list(model.named_parameters())
    group = {"params": named, "pairs": True, "scalings": [0.7, 1.0, 2.0, 1.5], "experts": EXPERTS, "lr_ratio": 2.0}
    return METHODS[name]([group])


def compare(layout: str, names: list[str]) -> None:
    found = {}
    for name in names:
        alone, spread = Model(SHAPES, torch.float64), place(Model(SHAPES, torch.float64), layout)
        reference, optimizer = build(alone, name), build(spread, name)
        before = weights(alone)
        train(alone, reference, range(STEPS))
        train(spread, optimizer, range(STEPS))
        expected, got = weights(alone), weights(spread)
        assert all(not torch.equal(before[n], expected[n]) for n in expected), name
        if not distance(got, expected) < 1e-9:
            found[name] = distance(got, expected)
        if torch.distributed.get_world_size() == 2 and layout == "fsdp" and name == "rite":
            moment = optimizer.state[dict(spread.named_parameters())["a"]]["exp_avg"]
            assert moment.placements == (Shard(1),)  # A's ranks are whole, its long side is split
    assert not found, found


@pytest.mark.parametrize("world", [1, 2, 4])
def test_sharded_factors_agree_with_one_process(world: int):
    spawn(world, compare, "fsdp", list(METHODS))


@pytest.mark.parametrize("layout", ["tp columns", "tp rows"])
def test_tensor_parallel_factors_agree_with_one_process(layout: str):
    spawn(2, compare, layout, ["rite", "altlora", "pro, full"])


def test_replicas_of_shards_agree_with_one_process():
    spawn(4, compare, "hsdp", ["rite", "pro, full"])


def resume() -> None:
    """A checkpoint of whole tensors, made on one process, goes on sharded, and the other way round."""
    for name in ("rite", "altlora", "pro, full"):
        alone, spread = Model(SHAPES, torch.float64), place(Model(SHAPES, torch.float64), "fsdp")
        reference, optimizer = build(alone, name), build(spread, name)
        train(alone, reference, range(3))
        train(spread, optimizer, range(3))
        held = states(reference, alone)
        for param, kept in states(optimizer, spread).items():
            # V has numbers of some hundreds, and follows a basis that a rounding error turns by a million of them.
            assert distance(kept, held[param]) < 1e-10 * max(
                100.0, *(each.abs().max() for each in held[param].values())
            )
        file = io.BytesIO()
        torch.save(reference.state_dict(), file)
        file.seek(0)
        optimizer.load_state_dict(torch.load(file, weights_only=True))
        train(alone, reference, range(3, STEPS))
        train(spread, optimizer, range(3, STEPS))
        assert distance(weights(spread), weights(alone)) < 1e-9


def test_a_checkpoint_of_one_process_goes_on_sharded():
    spawn(2, resume)


def fixed_basis() -> None:
    """A is frozen, the r×r matrices are whole on every process."""
    alone, spread = Model(SHAPES, torch.float64), place(Model(SHAPES, torch.float64), "fsdp")
    optimizers = []
    for model in (alone, spread):
        named = list(model.named_parameters())
        for _, factor in named[::2]:
            factor.requires_grad_(False)
        group = {"params": named, "pairs": True, "scalings": [0.7, 1.0, 2.0, 1.5], "experts": EXPERTS}
        optimizers.append(lo.LoRASBAdamW([group], lr=1e-2))
        train(model, optimizers[-1], range(4))
    assert distance(weights(spread), weights(alone)) < 1e-9
    assert not torch.equal(weights(alone)["b"], weights(Model(SHAPES, torch.float64))["b"])


def scaled_rows() -> None:
    """The hooks of ALLoRA see whole factors; noise and perturbations, which look at them outside of forward, are refused by name."""
    alone, spread = two_layers(), two_layers()
    for layer in spread[::2]:
        fully_shard(layer, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for model in (alone, spread):
        lo.scale_rows_in_backward(model, 1.5)
        model(x).square().sum().backward()
    for (name, p), q in zip(alone.named_parameters(), spread.parameters(), strict=True):
        if p.requires_grad:
            assert torch.allclose(q.grad.full_tensor(), p.grad, rtol=1e-10), name
    optimizer = lo.LoRAOptimizer(lo.lora_pairs(spread))
    with pytest.raises(ValueError, match=r"0 can have no noise in forward: its factors are sharded \(DTensor\)"):
        lo.noise_in_forward(spread, optimizer)
    with pytest.raises(ValueError, match=r"0\.lora_A\.default\.weight cannot be perturbed .*: it is sharded"):
        lo.perturb_by_momentum(optimizer)
    with pytest.raises(ValueError, match=r"0 is sharded \(DTensor\); look at the unsharded model"):
        lo.diagnostics.intruder_dimensions(spread)


def test_rows_are_scaled_where_factors_are_split():
    spawn(2, scaled_rows)


def test_a_fixed_basis_is_split_and_its_core_is_whole():
    spawn(2, fixed_basis)
