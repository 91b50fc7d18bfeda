"""Updates inside backward: the weights of ordinary stepping, one gradient at a time, and nothing left behind."""

import contextlib
import copy
import gc
import pickle
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint

import lowrank_optim as lo

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from in_backward import measure_memory
from memory_tracker import Gradients

STEPS = 14
OWN = {
    "ldadam": {"error_feedback": False},
    "galore_adafactor": {"beta1": 0.9},
    "frugal_sgd": {"momentum": 0.9},
    "lisa": {"period": 3},
    "badam": {"period": 3},
}
ALL = [*lo.METHODS, "lisa", "badam"]


class Net(nn.Module):
    """Wide, tall and square matrices, vectors, an embedding, and a path that some batches do not take."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 24)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24)) for _ in range(3)])
        self.norm, self.side, self.head = nn.LayerNorm(24), nn.Linear(24, 24), nn.Linear(24, 16, bias=False)

    def forward(self, tokens: Tensor, side: bool = False) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.norm(x + self.side(x) if side else x))


def build_net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def batch(step: int, size: int = 8) -> Tensor:
    return torch.randint(0, 16, (size, 6), generator=torch.Generator().manual_seed(100 + step))


def loss_of(model: nn.Module, tokens: Tensor, **options: bool) -> Tensor:
    logits = model(tokens, **options).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(1, 1).flatten())


def build(name: str, model: nn.Module, **options: object) -> lo.LowRankOptimizer:
    grouped = lo.layer_groups if name in ("lisa", "badam") else lo.param_groups
    groups = grouped(model, rank=options.pop("rank", 4), weight_decay=0.1)
    extra = {"update_proj_gap": 4, "lr": 1e-2, **OWN.get(name, {}), **options}
    return lo.by_name(name)(groups, **extra)


def train(
    optimizer: lo.LowRankOptimizer, model: nn.Module, start: int = 0, stop: int = STEPS, clip: float = 0.0
) -> None:
    """A loop as everybody writes it."""
    scheduler = LambdaLR(optimizer, lambda step: 1.0 / (1.0 + step), last_epoch=-1)
    for step in range(stop):
        if step >= start:
            loss_of(model, batch(step), side=step % 3 == 0).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


def assert_same_state(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    for state, other in zip(a.state_dict()["state"].values(), b.state_dict()["state"].values(), strict=True):
        assert state.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in state.items())


def pair(name: str = "galore", dtype: torch.dtype = torch.float32, **options: object):
    """The same model and optimizer twice."""
    models = build_net(dtype), build_net(dtype)
    return models, tuple(build(name, model, **options) for model in models)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_weights_and_state_are_those_of_ordinary_stepping_to_the_bit(name, dtype):
    (usual, ours), (ordinary, optimizer) = pair(name, dtype)
    lo.update_in_backward(optimizer)
    train(ordinary, usual)
    train(optimizer, ours)
    assert_same(usual, ours)
    assert_same_state(ordinary, optimizer)


@pytest.mark.parametrize(
    ("projector", "residual"),
    [
        ("svd", "sgd"),
        ("random", "sign"),
        ("random:gaussian", "none"),
        ("coordinate:rows", "sign"),
        ("coordinate:entries", "sgd"),
    ],
)
def test_free_combinations_are_those_of_ordinary_stepping_to_the_bit(projector, residual):
    (usual, ours), _ = pair()
    ordinary, optimizer = (
        lo.LowRankOptimizer(
            lo.param_groups(m, rank=4),
            rule=lo.Lion(),
            projector=projector,
            residual=residual,
            update_proj_gap=4,
            lr=1e-3,
        )
        for m in (usual, ours)
    )
    lo.update_in_backward(optimizer)
    train(ordinary, usual)
    train(optimizer, ours)
    assert_same(usual, ours)


def test_a_parameter_without_gradient_stands_still_as_in_ordinary_stepping():
    (usual, ours), (ordinary, optimizer) = pair()
    lo.update_in_backward(optimizer)
    train(ordinary, usual)
    train(optimizer, ours)
    assert optimizer.state[ours.side.weight]["step"] == 5  # of 14 steps, those that take the side path
    assert_same(usual, ours)


def test_gradients_are_gone_after_backward_and_only_one_is_alive_at_a_time():
    model = build_net()
    optimizer = build("galore", model)
    gradients = Gradients(model)  # looks before the update does
    lo.update_in_backward(optimizer)
    train(optimizer, model, stop=6)
    assert all(p.grad is None for p in model.parameters())
    assert gradients.peak == max(p.numel() * p.element_size() for p in model.parameters())


def test_the_test_for_gradients_notices_ordinary_stepping():
    model = build_net()
    optimizer, gradients = build("galore", model), Gradients(model)
    loss_of(model, batch(0), side=True).backward()
    optimizer.step()
    assert gradients.peak == sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.long
def test_peak_memory_of_a_llama_step_is_that_of_backward_with_one_gradient_alive():
    # The benchmark's counting at a small size: "floor" drops every gradient and updates nothing.
    tokens = torch.randint(0, 100, (1, 32), generator=torch.Generator().manual_seed(0))
    memory = measure_memory("9m", torch.bfloat16, torch.device("cpu"), tokens)
    largest, working = memory["largest_gradient"], 3 * 2**22 + 2**20  # chunks of 4 MiB
    assert memory["in_backward"]["gradients"] == memory["floor"]["gradients"] == largest
    assert memory["ordinary"]["gradients"] == memory["all_gradients"]
    assert memory["in_backward"]["peak"] <= memory["floor"]["peak"] + working
    assert memory["ordinary"]["peak"] > memory["in_backward"]["peak"] + memory["all_gradients"] - largest - 2 * working


# Attaching and removing -----------------------------------------------------------------------------------------------


def test_remove_restores_ordinary_stepping():
    (usual, ours), (ordinary, optimizer) = pair()
    handle = lo.update_in_backward(optimizer, max_grad_norm=1e9)
    train(ordinary, usual, stop=5)
    train(optimizer, ours, stop=5)
    assert handle.active
    handle.remove()
    handle.remove()
    assert not handle.active
    assert all(not p._post_accumulate_grad_hooks for p in ours.parameters())
    assert ordinary.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    loss_of(ours, batch(5)).backward()
    assert ours.embed.weight.grad is not None
    ours.zero_grad()
    train(ordinary, usual, 5, STEPS)
    train(optimizer, ours, 5, STEPS)
    assert_same(usual, ours)
    assert_same_state(ordinary, optimizer)


def test_a_context_manager_attaches_for_its_block_and_lets_exceptions_through():
    model = build_net()
    optimizer = build("galore", model)
    with lo.update_in_backward(optimizer) as handle:
        assert handle.active
    assert not handle.active
    with contextlib.suppress(KeyError), lo.update_in_backward(optimizer, accumulate=2) as handle:
        loss_of(model, batch(0)).backward()
        raise KeyError
    assert not handle.active
    assert "micro_batches" not in optimizer.state[model.embed.weight]
    lo.update_in_backward(optimizer)  # may be attached again


def test_attaching_twice_raises():
    optimizer = build("galore", build_net())
    lo.update_in_backward(optimizer)
    with pytest.raises(RuntimeError, match=r"attached to this optimizer already; call remove\(\)"):
        lo.update_in_backward(optimizer)


def test_model_and_optimizer_are_freed_when_they_are_dropped():
    model = build_net()
    optimizer = build("galore", model)
    handle = lo.update_in_backward(optimizer, accumulate=2, max_grad_norm=1.0)
    train(optimizer, model, stop=3)
    alive = [weakref.ref(model), weakref.ref(optimizer), weakref.ref(model.embed.weight)]
    weight = model.head.weight
    del model, optimizer
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3  # although the handle still exists
    weight.sum().backward()  # a hook whose optimizer is gone leaves the gradient
    assert weight.grad is not None
    assert not handle.active
    handle.remove()
    assert not weight._post_accumulate_grad_hooks


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_are_not_attached(clone):
    model = build_net()
    optimizer = build("galore", model)
    lo.update_in_backward(optimizer)
    train(optimizer, model, stop=2)
    twin = clone(optimizer)
    assert twin.last_grad_norm is None
    param = twin.param_groups[0]["params"][0]
    param.square().sum().backward()
    assert param.grad is not None
    before = param.detach().clone()
    twin.step()
    assert not torch.equal(before, param)


def test_groups_that_are_added_and_parameters_that_are_unfrozen_later_are_updated_in_backward():
    (usual, ours), _ = pair()
    optimizers = []
    for model in (usual, ours):
        model.layers[0].requires_grad_(False)
        optimizers.append(lo.GaLoreAdamW([p for n, p in model.named_parameters() if "side" not in n], rank=4, lr=1e-2))
    lo.update_in_backward(optimizers[1])
    for model, optimizer in zip((usual, ours), optimizers, strict=True):
        train(optimizer, model, stop=3)
        assert not model.layers[0][0].weight.requires_grad
        model.layers[0].requires_grad_(True)
        optimizer.add_param_group({"params": list(model.side.parameters()), "rank": 4})
        model.zero_grad()
        train(optimizer, model, start=3)
    assert_same(usual, ours)
    loss_of(ours, batch(0), side=True).backward()
    assert all(p.grad is None for p in ours.parameters())


# Graphs ---------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 24), nn.Linear(24, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).tanh())


def test_tied_weights_are_updated_once_with_both_gradients():
    torch.manual_seed(0)
    usual = Tied()
    ours = copy.deepcopy(usual)
    ordinary, optimizer = (lo.GaLoreAdamW(m.parameters(), rank=4, lr=1e-2, update_proj_gap=4) for m in (usual, ours))
    lo.update_in_backward(optimizer)
    train_plain(ordinary, usual)
    train_plain(optimizer, ours)
    assert optimizer.state[ours.embed.weight]["step"] == STEPS
    assert_same(usual, ours)


def train_plain(optimizer: lo.LowRankOptimizer, model: nn.Module) -> None:
    for step in range(STEPS):
        loss_of(model, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, shared: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 24), nn.Linear(24, 16)
        self.blocks = nn.ModuleList([nn.Linear(24, 24) for _ in range(1 if shared else 2)])
        self.reentrant, self.shared = reentrant, shared

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in (self.blocks[0], self.blocks[-1]):
            x = checkpoint(lambda x, block=block: block(x).tanh(), x, use_reentrant=self.reentrant)
        return self.head(x)


@pytest.mark.parametrize(("reentrant", "shared"), [(False, False), (True, False), (False, True)])
def test_activation_checkpointing_of_both_kinds_gives_the_weights_of_ordinary_stepping(reentrant, shared):
    torch.manual_seed(0)
    usual = Checkpointed(reentrant, shared)
    ours = copy.deepcopy(usual)
    ordinary, optimizer = (lo.GaLoreAdamW(m.parameters(), rank=4, lr=1e-2, update_proj_gap=4) for m in (usual, ours))
    lo.update_in_backward(optimizer)
    train_plain(ordinary, usual)
    train_plain(optimizer, ours)
    assert_same(usual, ours)


def test_a_weight_in_two_reentrant_segments_raises_and_says_what_to_use():
    model = Checkpointed(reentrant=True, shared=True)
    optimizer = lo.GaLoreAdamW(list(model.named_parameters()), rank=4)
    lo.update_in_backward(optimizer)
    with pytest.raises(RuntimeError, match=r"blocks.0.\w+ got another gradient.*use_reentrant=False"):
        loss_of(model, batch(0)).backward()


def test_two_backward_passes_without_accumulate_raise():
    model = build_net()
    optimizer = build("galore", model)
    lo.update_in_backward(optimizer)
    loss_of(model, batch(0)).backward()
    with pytest.raises(RuntimeError, match=r"A step has 1 backward passes \(accumulate\) and ends with optimizer.step"):
        loss_of(model, batch(0)).backward()


def test_closures_run_with_gradients_enabled_and_train_alike():
    (usual, ours), (ordinary, optimizer) = pair()
    lo.update_in_backward(optimizer)
    losses = []
    for step in range(6):
        for model, each in ((usual, ordinary), (ours, optimizer)):

            def closure(model=model, each=each, step=step):
                each.zero_grad()
                loss = loss_of(model, batch(step))
                loss.backward()
                return loss

            losses.append(each.step(closure).item())
    assert losses[::2] == losses[1::2]
    assert_same(usual, ours)


def test_a_gradient_that_was_set_by_hand_is_applied_by_step():
    (usual, ours), (ordinary, optimizer) = pair()
    lo.update_in_backward(optimizer)
    for model, each in ((usual, ordinary), (ours, optimizer)):
        model.head.weight.grad = torch.ones_like(model.head.weight)
        each.step()
        each.zero_grad()
    assert_same(usual, ours)


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate is 0; it must be an int of at least 1"),
        ({"accumulate": True}, "accumulate is True"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm is 0.0; it must be None or a finite number above 0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm is nan"),
        ({"clip": "tensors"}, "clip is 'tensors': did you mean 'tensor'"),
        ({"accumulate": 2, "last_micro_batch": 3}, "last_micro_batch is 3"),
        ({"last_micro_batch": bool}, "accumulate is 1: every backward pass is the last"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_out_of_range_raise_and_attach_nothing(options, message):
    model = build_net()
    optimizer = build("galore", model)
    with pytest.raises(ValueError, match=message):
        lo.update_in_backward(optimizer, **options)
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    lo.update_in_backward(optimizer)


def test_optimizers_of_others_are_refused():
    with pytest.raises(TypeError, match=r"needs an optimizer of this package, got AdamW; lo.GaLoreAdamW without rank"):
        lo.update_in_backward(torch.optim.AdamW(build_net().parameters()))


def test_several_processes_without_dtensors_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 4)
    with pytest.raises(
        TypeError,
        match=r"no DTensor, and several processes train: DistributedDataParallel reduces gradients after the hooks",
    ):
        lo.update_in_backward(build("galore", build_net()))


@pytest.mark.parametrize("mark", ["_is_flat_param", "_fsdp_flattened"])
def test_parameters_of_fsdp1_are_refused(mark):
    model = build_net()
    optimizer = build("galore", model)  # which refuses them, too
    setattr(model.head.weight, mark, True)
    with pytest.raises(TypeError, match=r"head.weight belongs to FullyShardedDataParallel \(FSDP1\).*fully_shard"):
        lo.update_in_backward(optimizer)


def test_ddp_is_refused_before_and_noticed_after(tmp_path):
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = build_net()
        optimizer = build("galore", model)
        handle = lo.update_in_backward(optimizer)
        wrapped = nn.parallel.DistributedDataParallel(model)
        loss_of(wrapped, batch(0), side=True).backward()
        with pytest.raises(RuntimeError, match=r"DistributedDataParallel puts one there after its hooks"):
            optimizer.step()
        handle.remove()
        with pytest.raises(TypeError, match=r"belongs to DistributedDataParallel: .*Use ordinary stepping"):
            lo.update_in_backward(optimizer)
    finally:
        dist.destroy_process_group()


def test_a_sparse_gradient_raises_and_says_what_to_use():
    embedding = nn.Embedding(8, 4, sparse=True)
    optimizer = lo.GaLoreAdamW([("embed", embedding.weight)])
    lo.update_in_backward(optimizer)
    with pytest.raises(ValueError, match=r"the gradient of embed is sparse; make it dense"):
        embedding(torch.tensor([1])).sum().backward()
