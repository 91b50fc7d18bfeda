"""DistributedDataParallel with and without LowRankHook, updates in backward on fully_shard, and what is refused."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank_optim as lo
from lowrank_optim.distributed import LowRankHook
from tests.oracles.distributed_harness import METHODS, Model, distance, groups, shard, spawn, train, weights

SHAPES = {"tall": (26, 10), "wide": (10, 33), "conv": (6, 4, 3, 3), "experts": (3, 14, 9), "embedding": (50, 8)}
EXACT = [
    ("galore", {}),
    ("galore", {"proj_type": "left"}),
    ("galore", {"proj_type": "full", "eps": 1e-3}),
    ("galore", {"projector": "random:gaussian"}),
    ("galore", {"coordinates": "entries"}),
    ("galore_8bit", {}),
    ("galore_adafactor", {}),
    ("qgalore", {}),
    ("ldadam", {"error_feedback": False}),
    ("frugal", {"residual": "none"}),
]


def build(model, name, **options):
    return METHODS[name](groups(model, rank=2), **{"lr": 1e-3, "update_proj_gap": 4, **options})


def different_data(model, step):
    """Gradients that differ between the processes."""
    rank = torch.distributed.get_rank()
    return sum(p.sum() * 0.1 * (rank + 1) * (step + i) for i, p in enumerate(model.parameters()))


def with_hook() -> None:
    for name, options in EXACT:
        ends = []
        for hook in (False, True):
            model = Model(SHAPES)
            parallel = DistributedDataParallel(model, bucket_cap_mb=0.001)
            optimizer = build(model, name, **options)
            if hook:
                parallel.register_comm_hook(None, LowRankHook(optimizer))
            for step in range(10):
                (parallel(step) + different_data(model, step)).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6)
                optimizer.step()
                optimizer.zero_grad()
            ends.append(weights(model))
            mine = torch.cat([p.detach().flatten() for p in model.parameters()])
            others = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(others, mine)
            assert all(torch.equal(mine, other) for other in others), (name, options, "replicas differ")
        gap = distance(*ends)
        assert gap < 1e-6, (name, options, gap)


@pytest.mark.parametrize("world", [2, 4])
def test_the_hook_changes_no_weights(world):
    spawn(world, with_hook)


class Traffic(TorchDispatchMode):
    """Counts the elements that are given to collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[str, int] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace in ("c10d", "_c10d_functional"):
            first = args[0]
            tensors = first if isinstance(first, (list, tuple)) else [first]
            tensors = [t for item in tensors for t in (item if isinstance(item, (list, tuple)) else [item])]
            name = op._schema.name.split("::")[1]
            self.elements[name] = self.elements.get(name, 0) + sum(t.numel() for t in tensors)
        return op(*args, **(kwargs or {}))


def count_hook() -> None:
    shapes = {"tall": (64, 32), "wide": (32, 96)}
    sent = {}
    for hook in (False, True):
        model = Model(shapes)
        parallel = DistributedDataParallel(model)
        optimizer = build(model, "galore", update_proj_gap=100, stagger=False)
        if hook:
            parallel.register_comm_hook(None, LowRankHook(optimizer))
        train(parallel, optimizer, range(3))
        sizes = []
        real = torch.distributed.all_reduce

        def counted(tensor, *args, real=real, sizes=sizes, **kwargs):
            sizes.append(tensor.numel())
            return real(tensor, *args, **kwargs)

        if hook:
            torch.distributed.all_reduce = counted
        try:
            parallel(3).backward()
        finally:
            torch.distributed.all_reduce = real
        sent[hook] = sum(sizes)
    gradients = 64 * 32 + 32 * 96
    assert sent[True] == 64 * 2 + 96 * 2
    assert sent[True] <= gradients * (2 / 32 + 0.05)


def test_between_refreshes_the_hook_sends_r_and_nothing_else():
    spawn(2, count_hook)


def count_right() -> None:
    for name in ("galore", "galore_8bit", "apollo", "fira"):
        model = shard(Model({"tall": (64, 32), "wide": (32, 96)}))
        optimizer = build(model, name, proj_type="right", update_proj_gap=100, stagger=False)
        train(model, optimizer, range(2))
        model(2).backward()
        with Traffic() as traffic:
            optimizer.step()
        # One number for each matrix says whether all is finite; Fira and APOLLO have a norm to limit besides.
        limit = 2 if name.startswith("galore") else 4
        assert sum(traffic.elements.values()) == limit, (name, traffic.elements)


def test_a_right_basis_sends_nothing_but_one_number_for_each_matrix():
    spawn(2, count_right)


def refused_by_hook() -> None:
    model = Model(SHAPES)
    for name in ("fira", "apollo", "ldadam", "frugal"):
        with pytest.raises(ValueError, match="needs the whole gradient in every step"):
            LowRankHook(build(model, name))
    with pytest.raises(TypeError, match="an optimizer of this package"):
        LowRankHook(torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="is a DTensor"):
        LowRankHook(build(shard(Model(SHAPES)), "galore"))
    rank = torch.distributed.get_rank()
    with pytest.raises(ValueError, match=r"process 0: seed is 0 in group 0.*\n.*process 1: seed is 1 in group 0"):
        LowRankHook(build(model, "galore", seed=rank))


def test_the_hook_refuses_what_needs_the_gradient():
    spawn(2, refused_by_hook)


def different_options() -> None:
    rank = torch.distributed.get_rank()
    for options in (
        {"update_proj_gap": 5 + (rank == 1)},
        {"proj_type": "left" if rank else "right"},
        {"lr": 1e-3 + rank},
    ):
        with pytest.raises(ValueError, match="the processes have built different optimizers"):
            build(shard(Model(SHAPES)), "galore", **options)
    build(shard(Model(SHAPES)), "galore")


@pytest.mark.parametrize("world", [2, 4])
def test_processes_with_other_options_are_told_apart_when_they_are_built(world):
    spawn(world, different_options)


def in_backward() -> None:
    for name in ("galore", "fira", "galore_8bit", "frugal", "apollo"):
        for accumulate in (1, 2):
            if accumulate > 1 and name in ("fira", "frugal", "apollo"):
                continue
            ends = []
            for hooked in (False, True):
                model = shard(Model(SHAPES))
                optimizer = build(model, name)
                if hooked:
                    handle = lo.update_in_backward(optimizer, accumulate=accumulate)
                for step in range(8):
                    for micro in range(accumulate):
                        model(step + 100 * micro).backward()
                    if hooked:
                        assert all(p.grad is None for p in model.parameters())
                        assert optimizer.param_groups[0]["params"][0].grad is None
                    optimizer.step()
                    optimizer.zero_grad()
                ends.append(weights(model))
                if hooked:
                    assert float(optimizer.last_grad_norm) > 0
                    handle.remove()
            assert distance(*ends) < 1e-6, (name, accumulate)


def test_updates_in_backward_on_shards_are_those_of_ordinary_stepping():
    spawn(2, in_backward)


def clipped_in_backward() -> None:
    """The norm that clips is the whole gradient's, not that of a share."""
    spread = shard(Model(SHAPES))
    optimizer = build(spread, "galore")
    with lo.update_in_backward(optimizer, max_grad_norm=1.0, clip="tensor"):
        train(spread, optimizer, range(8))
    ordinary = shard(Model(SHAPES))
    optimizer = build(ordinary, "galore")
    for step in range(8):
        ordinary(step).backward()
        for p in ordinary.parameters():
            norm = p.grad.full_tensor().norm()
            p.grad.mul_((1.0 / (norm + 1e-6)).clamp_max(1.0))
        optimizer.step()
        optimizer.zero_grad()
    assert distance(weights(spread), weights(ordinary)) < 1e-6


def test_clipping_in_backward_knows_the_whole_norm():
    spawn(2, clipped_in_backward)


def accumulated_without_sync() -> None:
    ends = []
    for hooked in (False, True):
        model = shard(Model(SHAPES))
        optimizer = build(model, "galore")
        if hooked:
            lo.update_in_backward(optimizer)
        for step in range(8):
            for micro in range(2):
                model.set_requires_gradient_sync(micro == 1)
                model(step + 100 * micro).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(weights(model))
    assert distance(*ends) < 1e-6


def test_accumulation_without_gradient_sync_updates_on_the_last_micro_batch():
    spawn(2, accumulated_without_sync)


def layers() -> None:
    """LISA and BAdam draw the same layers everywhere, and fully_shard follows their requires_grad."""
    for name, options in (("lisa", {"active_layers": 2, "sampling": "weight_norm"}), ("lisa", {}), ("badam", {})):
        alone, spread = Model(SHAPES), shard(Model(SHAPES))
        seen = []
        for model in (alone, spread):
            made = [
                {"params": [(key, p)], "layer": i, "rank": None} for i, (key, p) in enumerate(model.named_parameters())
            ]
            optimizer = METHODS[name](made, lr=1e-3, period=2, **options)
            drawn = []
            for step in range(10):
                train(model, optimizer, range(step, step + 1))
                drawn.append(optimizer.awake)
            seen.append(drawn)
        assert seen[0] == seen[1]
        gathered = [None] * 2
        torch.distributed.all_gather_object(gathered, seen[1])
        assert gathered[0] == gathered[1]
        assert distance(weights(spread), weights(alone)) < 1e-6


def test_layers_are_drawn_alike_on_all_processes():
    spawn(2, layers)


class NotAware(lo.RandomizedSVD):
    name = "not_aware"
    knows_shards = False


def refused() -> None:
    mesh = init_device_mesh("cpu", (2,))
    partial = DTensor.from_local(torch.ones(8, 6), mesh, [Partial()], run_check=False)
    with pytest.raises(ValueError, match=r"w \(8, 6\) lies on a mesh \(2,\) as \(Partial.*supported are"):
        lo.GaLoreAdamW([("w", torch.nn.Parameter(partial))], rank=2)
    kernel = DTensor.from_local(torch.ones(8, 6, 3, 2), mesh, [Shard(3)], run_check=False)
    with pytest.raises(ValueError, match=r"k \(8, 6, 3, 4\).*Shard.*of a convolution"):
        lo.GaLoreAdamW([("k", torch.nn.Parameter(kernel))], rank=2)
    matrix = DTensor.from_local(torch.ones(4, 6), mesh, [Shard(0)], run_check=False)
    with pytest.raises(ValueError, match="NotAware does not say that it works on parts"):
        lo.GaLoreAdamW([("w", torch.nn.Parameter(matrix))], rank=2, projector=NotAware())
    whole = DTensor.from_local(torch.ones(8, 6), mesh, [Replicate()], run_check=False)
    optimizer = lo.GaLoreAdamW([("w", torch.nn.Parameter(whole))], rank=2)
    assert len(optimizer.state) == 1


def test_placements_that_no_rule_covers_are_refused_by_name():
    spawn(2, refused)


def fsdp1() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    for original in (False, True):
        model = FullyShardedDataParallel(torch.nn.Linear(8, 6), use_orig_params=original, device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match=r"FullyShardedDataParallel \(FSDP1\).*fully_shard"):
            lo.GaLoreAdamW(model.parameters(), rank=2)


def test_parameters_of_fsdp1_are_refused():
    spawn(2, fsdp1)


def test_partitions_of_deepspeed_are_refused():
    param = torch.nn.Parameter(torch.zeros(8, 6))
    param.ds_id = 3
    with pytest.raises(ValueError, match=r"0\.0 \(8, 6\) is partitioned by DeepSpeed ZeRO.*fully_shard"):
        lo.GaLoreAdamW([param], rank=2)


def test_flat_partitions_that_deepspeed_puts_into_the_groups_are_refused():
    optimizer = lo.GaLoreAdamW([torch.nn.Parameter(torch.zeros(8, 6))], rank=2)
    flat = torch.nn.Parameter(torch.zeros(48))
    flat.grad = torch.ones(48)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match=r"DeepSpeed ZeRO \(stages 1 and 2\)"):
        optimizer.step()


def _eight_bit_weights() -> None:
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)  # DistributedDataParallel gives all processes the weights of the first
    model = nn.Sequential(nn.Linear(96, 300), nn.GELU(), nn.Linear(300, 64))
    lo.nn.quantize_weights_(model, include=["0", "2"])
    before = model[0].weight.codes.clone()
    wrapped = DistributedDataParallel(model)
    optimizer = lo.QGaLoreAdamW8bit(lo.param_groups(model, rank=8, include=["0", "2"]), lr=1e-3)
    for step in range(5):
        data = torch.randn(8, 96, generator=torch.Generator().manual_seed(10 * rank + step))
        wrapped(data).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for weight in (model[0].weight, model[2].weight):
        for part in (weight.codes.int(), weight.scale):
            parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(parts, part)
            assert torch.equal(parts[0], parts[-1])
    assert not torch.equal(model[0].weight.codes, before)


def test_weights_of_8_bits_stay_equal_under_ddp() -> None:
    spawn(2, _eight_bit_weights)
