"""Parameters that fully_shard keeps on the host (`CPUOffloadPolicy`): ordinary stepping, and updates in backward.

The policy itself runs here with gloo, where nothing is copied. What it makes on accelerators, host tensors on a mesh of other
devices, is made by hand: the mesh says "meta", and a stand-in for its stream delivers the gradients.
"""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec

import lowrank_optim as lo
from tests.oracles.distributed_harness import (
    METHODS,
    Model,
    distance,
    groups,
    layers,
    shard,
    spawn,
    states,
    train,
    weights,
)

SHAPES = {"tall": (26, 10), "wide": (10, 33), "three": (3, 40), "experts": (3, 14, 9), "vector": (13,)}
STEPS = 4


def build(model: nn.Module, name: str, **options) -> lo.LowRankOptimizer:
    options = {"lr": 1e-2, "update_proj_gap": 2, **options}
    if name in lo.LAYERWISE_METHODS:
        return METHODS[name](layers(model), period=3, **options)
    return METHODS[name](groups(model, rank=2), **options)


def assert_same(one: nn.Module, other: nn.Module, what: object) -> None:
    for (name, p), q in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p.to_local(), q[1].to_local()), (what, name)


def offloaded() -> None:
    """The policy changes no bit, ordinary or in backward."""
    ordinary = [(name, 0) for name in ("galore", "galore_8bit", "fira", "ldadam", "frugal", "lisa")]
    for name, accumulate in [*ordinary, ("galore", 1), ("fira", 1), ("lisa", 1), ("galore", 2), ("galore_8bit", 2)]:
        ends = []
        for policy in ({}, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}):
            model = shard(Model(SHAPES), **policy)
            optimizer = build(model, name)
            if accumulate:
                lo.update_in_backward(optimizer, accumulate)
            for step in range(STEPS):
                if accumulate == 2:
                    model(100 + step).backward()
                train(model, optimizer, range(step, step + 1))
            ends.append(model)
        assert_same(*ends, (name, accumulate))
        assert distance(weights(ends[0]), weights(Model(SHAPES))) > 1e-3


def test_models_that_are_offloaded_to_the_host_train_as_others():
    spawn(2, offloaded)


class Devices:
    """The module of the mesh's devices, such as `torch.cuda`. Their one stream copies when it is waited for."""

    def __init__(self) -> None:
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.waits = 0

    def device_count(self) -> int:
        return 1

    def current_stream(self) -> "Devices":
        return self

    def synchronize(self) -> None:
        self.waits += 1
        for to, value in self.copies:
            to.copy_(value)
        self.copies.clear()


DEVICES = Devices()  # torch keeps the first that it was given


def on_host(model: nn.Module) -> nn.Module:
    """The parameters of a sharded model as `CPUOffloadPolicy` keeps them: local parts on the host, a mesh of other devices."""
    vars(torch).pop("meta", None)  # torch would ask it whether it is initialised
    mesh = init_device_mesh("meta", (torch.distributed.get_world_size(),))
    torch.meta = DEVICES
    host = nn.Module()
    for name, p in model.named_parameters():
        spec = DTensorSpec(mesh, p.placements, p._spec.tensor_meta)
        local = p.to_local().detach().clone()
        host.register_parameter(name, nn.Parameter(DTensor(local, spec, requires_grad=False)))
    return host


def gradient_of(twin: nn.Parameter, param: nn.Parameter) -> DTensor:
    """A copy; the gradient itself becomes one, too, since on some processors products round by where in memory a matrix begins."""
    twin.grad = twin.grad.detach().clone()
    return DTensor(twin.grad.to_local().detach().clone(), param._spec, requires_grad=False)


def step_on_host(model: nn.Module, host: nn.Module, pair: tuple, steps: range) -> None:
    """Steps of both, with the gradients of `model`."""
    for step in steps:
        model(step).backward()
        for twin, param in zip(model.parameters(), host.parameters(), strict=True):
            param.grad = None if twin.grad is None else gradient_of(twin, param)
        for optimizer in pair:
            optimizer.step()
            optimizer.zero_grad()


def ordinary_on_host() -> None:
    for name, options in [*((name, {}) for name in METHODS), ("galore", {"proj_type": "left"})]:
        model = shard(Model(SHAPES))
        host = on_host(model)
        pair = build(model, name, **options), build(host, name, **options)
        step_on_host(model, host, pair, range(STEPS))
        assert_same(model, host, name)
        assert all(tensor.device.type == "cpu" for state in pair[1].state.values() for tensor in state.values()), name
        resumed_host = copy_of(host)
        resumed = build(resumed_host, name, **options)
        resumed.load_state_dict(pair[1].state_dict())
        step_on_host(model, resumed_host, (pair[0], resumed), range(STEPS, 2 * STEPS))
        assert_same(model, resumed_host, name)
        if name not in lo.LAYERWISE_METHODS:
            expected, got = states(pair[0], model), states(resumed, resumed_host)
            assert all(torch.equal(got[n][key], value) for n, state in expected.items() for key, value in state.items())


def copy_of(host: nn.Module) -> nn.Module:
    new = nn.Module()
    for name, p in host.named_parameters():
        local = p.to_local().detach().clone()
        new.register_parameter(name, nn.Parameter(DTensor(local, p._spec, requires_grad=False)))
    return new


def test_every_method_steps_on_host_parameters_of_a_mesh_of_other_devices():
    spawn(2, ordinary_on_host)


def arrive_late(host: nn.Module, gradients: dict[str, torch.Tensor]) -> None:
    """Call the hooks as fully_shard calls them: in the stream of the copy, which has not run yet."""
    for key, param in host.named_parameters():
        if key in gradients:
            stale = torch.full_like(gradients[key], 1e4)
            DEVICES.copies.append((stale, gradients[key]))
            param.grad = DTensor(stale, param._spec, requires_grad=False)
            for hook in list(param._post_accumulate_grad_hooks.values()):
                hook(param)
            assert param.grad is None


def late_gradients() -> None:
    for name, accumulate in (("galore", 1), ("galore", 2), ("fira", 1), ("galore_8bit", 1), ("badam", 1)):
        model = shard(Model(SHAPES))
        host, gradients = on_host(model), {}
        for (key, p), param in zip(model.named_parameters(), host.parameters(), strict=True):
            p.register_post_accumulate_grad_hook(  # comes before the hook that takes the gradient
                lambda p, key=key, param=param, seen=gradients: seen.update({key: gradient_of(p, param).to_local()})
            )
        pair = build(model, name), build(host, name)
        before = DEVICES.waits
        for optimizer in pair:
            lo.update_in_backward(optimizer, accumulate, max_grad_norm=1.0, clip="tensor")
        for step in range(STEPS):
            for micro in range(accumulate):
                gradients.clear()
                model(step + 100 * micro).backward()
                arrive_late(host, gradients)
            for optimizer in pair:
                optimizer.step()
        assert_same(model, host, (name, accumulate))
        assert DEVICES.waits - before >= STEPS
        assert float(pair[0].last_grad_norm) == float(pair[1].last_grad_norm) > 1.0


def test_updates_in_backward_wait_until_a_gradient_has_arrived_on_the_host():
    spawn(2, late_gradients)


def a_second_optimizer() -> None:
    """Sharded parameters, too, are trained by one optimizer."""
    model = shard(Model(SHAPES))
    first = build(model, "galore")
    handle = lo.update_in_backward(first)
    train(model, first, range(2))
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"tall and \d more parameters: updated in backward by another GaLoreAdamW"):
        build(model, "fira")
    other = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(RuntimeError, match=r"SGD takes no step: tall and 4 more parameters: updated in backward"):
        other.step()
    assert distance(weights(model), before) == 0.0
    assert lo.UpdateInBackward.find(model.parameters()) == [handle]
    handle.remove()
    train(model, build(model, "fira"), range(1))
    assert distance(weights(model), before) > 1e-3


def test_a_second_optimizer_of_shards_is_refused():
    spawn(2, a_second_optimizer)
