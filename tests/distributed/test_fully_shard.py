"""fully_shard (FSDP2) and tensor parallelism: every optimizer ends at the weights that one process ends at."""

import itertools

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import lowrank_optim as lo
from lowrank_optim.quantization import coded_moments as coded
from lowrank_optim.step import batching as later
from tests.oracles.distributed_harness import (
    METHODS,
    SHAPES,
    Model,
    distance,
    groups,
    layers,
    shard,
    spawn,
    states,
    target,
    train,
    weights,
    whole,
)

STEPS, GAP = 5, 2
"""All are refreshed at the first step, and twice after it."""


def build(model: nn.Module, name: str, **options) -> lo.LowRankOptimizer:
    """Any method of the package on the harness's model, one parameter a layer where the method has layers."""
    options = {"lr": 1e-3, "update_proj_gap": GAP, **options}
    rank = {"density": options.pop("density")} if "density" in options else {"rank": options.pop("rank", 2)}
    if name not in lo.LAYERWISE_METHODS:
        return METHODS[name](groups(model, **rank), **options)
    return METHODS[name](layers(model), period=3, **options)


def compare(cases, layout="fsdp") -> None:
    """Train each case on one process, the first of the group, and sharded on all; weights must agree to 1e-6."""
    found = {}
    for name, options in cases:
        shapes = {n: s for n, s in SHAPES.items() if layout == "fsdp" or n != "vector"}
        if layout == "tp+fsdp":  # fully_shard wants even splits of what is split already
            shapes = {n: tuple(-(-x // 4) * 4 if i < 2 else x for i, x in enumerate(s)) for n, s in shapes.items()}
        alone, spread = Model(shapes), place(Model(shapes), layout)
        reference, optimizer = build(alone, name, **options), build(spread, name, **options)
        if torch.distributed.get_rank() == 0:
            train(alone, reference, range(STEPS))
        train(spread, optimizer, range(STEPS))
        got, expected = weights(spread), weights(alone)
        if torch.distributed.get_rank():
            continue
        far = [n for n in expected if not distance({n: got[n]}, {n: expected[n]}) < 1e-6]
        if far:  # unless float32 is no nearer to the truth (Fira divides by the norm of a row of R, which can be tiny)
            exact = Model(shapes, torch.float64)
            train(exact, build(exact, name, **options), range(STEPS))
            truth = weights(exact)
            for n in far:
                gap = distance({n: got[n]}, {n: expected[n]})
                if not gap < 2.0 * distance({n: expected[n]}, {n: truth[n]}) < 2e-5:
                    found[name, str(options), n] = gap
    assert not found, found


def place(model: nn.Module, layout: str) -> nn.Module:
    world = torch.distributed.get_world_size()
    if layout == "fsdp":
        return shard(model)
    if layout == "hsdp":
        return shard(model, init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))
    if layout in ("tp rows", "tp columns"):
        mesh, dim = init_device_mesh("cpu", (world,)), 0 if layout == "tp rows" else 1
        return split(model, mesh, dim)
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    split(model, mesh["tp"], 0, every_second=1)
    return shard(model, mesh["dp"])


def split(model: nn.Module, mesh, dim: int, every_second: int | None = None) -> nn.Module:
    for number, (name, p) in enumerate(list(model.named_parameters())):
        along = every_second if every_second is not None and number % 2 else dim
        placement = Shard(along) if p.dim() > along else Replicate()
        model.register_parameter(name, nn.Parameter(distribute_tensor(p.detach(), mesh, [placement])))
    model.forward = lambda step: sum(
        loss(p, target(tuple(p.shape), number, step)) for number, p in enumerate(model.parameters())
    )
    return model


def loss(p, goal):
    if isinstance(p, DTensor):
        goal = distribute_tensor(goal, p.device_mesh, p.placements)
        return ((p * goal).sum() + 0.05 * p.square().sum()).full_tensor()
    return (p * goal).sum() + 0.05 * p.square().sum()


SIDES = [(name, {"proj_type": side}) for name in METHODS for side in ("right", "left")]
EVERY = [(name, {}) for name in METHODS]  # tall matrices on the right side, wide ones on the left

VARIANTS = [
    ("galore", options)
    for options in (
        {"proj_type": "full", "eps": 1e-3},
        {"proj_type": "full", "eps": 1e-3, "on_refresh": "rotate"},
        {"projector": "svd"},
        {"projector": "svd", "proj_type": "reverse_std"},
        {"projector": "random", "proj_type": "left"},
        {"projector": "random:gaussian", "proj_type": "left", "on_refresh": "rotate"},
        {"coordinates": "rows"},
        {"coordinates": "entries"},
        {"density": 0.4, "blocks": "descending", "on_refresh": "reset"},
        {"on_refresh": "rotate"},
        {"on_refresh": "rotate", "proj_type": "left"},
        {"on_refresh": "reset"},
        {"basis_bits": 16, "proj_type": "left"},
        {"basis_bits": 4},
        {"overlap_threshold": 0.1, "queue_size": 1, "proj_type": "left"},
        {"projector": "power_iteration", "update_proj_gap": 1, "proj_type": "left", "on_refresh": "rotate"},
        {"match_reference": True},
        {"projector": "randomized_svd:complement"},
        {"projector": "randomized_svd:complement", "proj_type": "left"},
        {"projector": "randomized_svd:complement", "proj_type": "full", "eps": 1e-3},
        {"projector": "randomized_svd:sample"},
        {"projector": "dct"},
        {"projector": "dct", "proj_type": "left", "on_refresh": "rotate"},
        {"projector": "grassmann_tracking", "proj_type": "left", "on_refresh": "rotate"},
        {"projector": "momentum_svd", "proj_type": "left", "on_refresh": "rotate"},
    )
] + [
    ("conda", {"rank": 1.0}),
    ("conda", {"rank": 1.0, "proj_type": "left"}),
    ("sara", {"density": 1.0, "threshold": 0.1, "shrink_at": GAP}),
    ("sara", {"density": 0.3, "shrink_at": GAP, "state_bits": 8}),
]


def test_every_public_optimizer_is_in_the_matrix():
    public = {getattr(lo, name) for name in lo.__all__ if isinstance(getattr(lo, name), type)}
    public = {kind for kind in public if issubclass(kind, lo.LowRankOptimizer)} - {lo.LowRankOptimizer}
    public = {kind for kind in public if not issubclass(kind, lo.LoRAOptimizer)}  # (test_pairs_sharded)
    assert public == {*METHODS.values(), *lo.FULL_RANK_METHODS.values()}  # (test_folded_sharded)
    assert {name for name, _ in EVERY} == set(METHODS)
    assert len(public) == 22


def mean_of_gradients():
    model = shard(nn.Linear(4, 2, bias=False))
    model(torch.full((1, 4), 1.0 + 2.0 * torch.distributed.get_rank())).sum().backward()
    assert torch.equal(whole(model.weight.grad), torch.full((2, 4), 2.0))


def test_gradients_are_averaged_over_the_processes():
    """Not summed, as gloo does in torch 2.8 unless told otherwise: all but SGD would hide it."""
    spawn(2, mean_of_gradients)


@pytest.mark.parametrize(("world", "cases"), [(2, SIDES), (4, EVERY)], ids=["2", "4"])
def test_every_optimizer_agrees_with_one_process(world, cases):
    """With uneven shards, and empty ones on four: of 3 rows, of 3 experts."""
    spawn(world, compare, cases)


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (4, VARIANTS[::2]),
        (2, VARIANTS[1::2]),
        pytest.param(4, VARIANTS[1::2], marks=pytest.mark.full),
        pytest.param(2, VARIANTS[::2], marks=pytest.mark.full),
    ],
    ids=["4-even", "2-odd", "4-odd", "2-even"],
)
def test_every_variant_agrees_with_one_process(world, cases):
    spawn(world, compare, cases)


def test_replicas_of_shards_agree_with_one_process():
    spawn(4, compare, [(n, o) for n, o in EVERY if n in ("galore", "fira", "apollo_mini", "ldadam", "frugal")], "hsdp")


@pytest.mark.parametrize("layout", ["tp rows", "tp columns"])
def test_tensor_parallel_matrices_agree_with_one_process(layout):
    names = ("galore", "galore_adafactor", "apollo", "apollo_mini", "ldadam", "frugal", "qgalore")
    spawn(2, compare, [(n, o) for n, o in EVERY if n in names], layout)


def test_tensor_parallel_and_fully_shard_agree_with_one_process():
    spawn(4, compare, [(n, o) for n, o in EVERY if n in ("galore", "apollo", "ldadam", "frugal")], "tp+fsdp")


def compare_codes() -> None:
    coded.MIN_CODED = 1
    for bits in (8, 4):
        for options in ({"coordinates": "columns"}, {"coordinates": "rows"}, {"coordinates": "entries"}):
            alone = Model(SHAPES)
            spread = shard(Model(SHAPES))
            pair = [build(m, "galore", state_bits=bits, **options) for m in (alone, spread)]
            train(alone, pair[0], range(STEPS))
            train(spread, pair[1], range(STEPS))
            expected, got = states(pair[0], alone), states(pair[1], spread)
            for name, state in expected.items():
                for key, tensor in state.items():
                    assert got[name][key].dtype == tensor.dtype
                    if tensor.is_floating_point():  # column scales are sums, which round in another order
                        torch.testing.assert_close(got[name][key], tensor, rtol=1e-5, atol=1e-6)
                    else:
                        assert torch.equal(got[name][key], tensor), (bits, options, name, key)


CODED = [
    (name, {"state_bits": 8, "proj_type": side})
    for name in ("galore_8bit", "fira", "alice", "apollo", "ldadam", "frugal", "qgalore")
    for side in ("right", "left")
]


def compare_exactly(cases) -> None:
    """With exact sums, which are rounded once: all codes, also of subspaces from products, are the same."""
    coded.MIN_CODED = 1
    found = {}
    shapes = {**SHAPES, "many": (700, 40), "wider": (40, 900)}  # for one code in thousands rounds another way
    for name, options in cases:
        alone, spread = Model(shapes), shard(Model(shapes))
        pair = [build(m, name, exact_sums=True, **options) for m in (alone, spread)]
        first, has_codes = torch.distributed.get_rank() == 0, pair[0].param_groups[0]["state_bits"] < 32
        if first:
            train(alone, pair[0], range(STEPS))
        train(spread, pair[1], range(STEPS))
        ours, got = weights(spread), states(pair[1], spread) if has_codes else {}
        if not first:
            continue
        gap = distance(ours, weights(alone))
        if not gap < 1e-6:
            found[name, str(options)] = gap
        expected = states(pair[0], alone) if has_codes else {}
        for key, state in expected.items():
            for field, tensor in state.items():
                other = got[key][field]
                if not tensor.is_floating_point() and not torch.equal(other, tensor):
                    found[name, str(options), key, field] = int((other != tensor).sum()), tensor.numel()
    assert not found, found


def codes(cases) -> None:
    compare_codes()
    compare_exactly(cases)


ONE_SIDE = [case for number, case in enumerate(CODED) if (number // 2 + number) % 2]
"""Of every method one side, the other one for the next."""


@pytest.mark.parametrize(("world", "cases"), [(2, CODED + EVERY), (4, ONE_SIDE)], ids=["2", "4"])
def test_codes_and_their_noise_are_those_of_one_process(world, cases):
    """Of coordinates, whose R needs no product, always; of all others with `exact_sums`."""
    spawn(world, codes, cases)


def mixed(reduce: torch.dtype) -> None:
    """Weights in float32 that are gathered in bfloat16: as one process that computes with bfloat16 copies."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce)
    for name in ("galore", "galore_8bit", "fira"):
        for in_backward in (False, True):
            alone, spread = Model(SHAPES), shard(Model(SHAPES), mp_policy=policy)
            reference, optimizer = (build(model, name, exact_sums=True) for model in (alone, spread))
            if in_backward:
                lo.update_in_backward(optimizer)
            for step in range(12):
                copies = {n: p.bfloat16() for n, p in alone.named_parameters()}
                torch.func.functional_call(alone, copies, (step,)).backward()
                reference.step()
                reference.zero_grad()
                train(spread, optimizer, range(step, step + 1))
            assert spread.tall.dtype == torch.float32
            gap = distance(weights(spread), weights(alone))
            assert gap < 1e-6, (name, in_backward, gap)
            assert distance(weights(alone), weights(Model(SHAPES))) > 1e-3


@pytest.mark.parametrize("reduce", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_precision_trains_as_one_process_with_bfloat16_copies(reduce):
    spawn(2, mixed, reduce)


def compare_rounding() -> None:
    for options in ({"proj_type": "right"}, {"coordinates": "rows"}, {"density": 0.5, "blocks": "ascending"}):
        options = {"on_refresh": "reset", **options}
        alone, spread = Model(SHAPES, torch.bfloat16), shard(Model(SHAPES, torch.bfloat16))
        pair = [build(m, "galore", stochastic_rounding=True, **options) for m in (alone, spread)]
        train(alone, pair[0], range(STEPS))
        train(spread, pair[1], range(STEPS))
        got, expected = weights(spread), weights(alone)
        same = torch.cat([(got[n] == expected[n]).flatten() for n in expected]).float().mean()
        assert same > (0.995 if "proj_type" in options else 0.9999), (options, same)


def test_stochastic_rounding_of_weights_draws_the_numbers_of_one_process():
    spawn(4, compare_rounding)


def count_messages() -> None:
    """Between refreshes, with right bases: one message says which gradients are finite, and one holds the limiters' sums."""
    real, sent = torch.distributed.all_reduce, []

    def counted(tensor, *args, **kwargs):
        sent.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    shapes = {"tall": (18, 6), "square": (16, 16), "uneven": (18, 12), "many": (3, 14, 9), "vector": (13,)}
    for name, numbers in (("galore", 0), ("fira", 3 + 3), ("apollo", 3 + 3), ("apollo_mini", 3 * 3 + 3 * 3)):
        model = Model(shapes)
        model = shard(model, shard_placement_fn=lambda p: Shard(1) if p.dim() == 3 else Shard(0))
        optimizer = build(model, name, proj_type="right", update_proj_gap=10**6, stagger=False)
        train(model, optimizer, range(2))
        model(2).backward()
        torch.distributed.all_reduce = counted
        try:
            sent.clear()
            optimizer.step()
        finally:
            torch.distributed.all_reduce = real
        assert sent == [len(shapes), *([numbers] if numbers else [])], (name, sent)


def test_limiters_send_one_message_a_step():
    spawn(2, count_messages)


def compare_parts(cases) -> None:
    """Directions of a few matrices at a time, with larger matrices between: messages have to keep their order."""
    later.SMALL, later.TOGETHER = 70, 120
    compare(cases)
    compare(cases, "tp columns")


def test_directions_of_a_few_matrices_at_a_time_agree_with_one_process():
    spawn(4, compare_parts, [(name, {"proj_type": side}) for name in ("galore", "fira") for side in ("right", "left")])


def raise_midway() -> None:
    """Matrices before the one that raises, on all processes, are updated; those after it are not."""
    for name, side in itertools.product(("galore", "fira"), ("right", "left")):
        models = [shard(Model(SHAPES)) for _ in range(2)]
        both = [build(model, name, proj_type=side, on_nonfinite="raise") for model in models]
        for model, optimizer in zip(models, both, strict=True):
            train(model, optimizer, range(2))
            model(2).backward()
        before = weights(models[0])
        bad = models[0].uneven.grad.to_local()
        if torch.distributed.get_rank() == 0:
            bad[0, 0] = torch.nan
        with pytest.raises(RuntimeError, match=r"the gradient of .* holds NaN"):
            both[0].step()
        both[1].step()
        got, expected = weights(models[0]), weights(models[1])
        for number, key in enumerate(SHAPES):
            assert torch.equal(got[key], (expected if number < list(SHAPES).index("uneven") else before)[key]), (
                name,
                key,
            )


def test_matrices_before_one_that_raises_are_updated():
    spawn(2, raise_midway)


def coded_columns() -> None:
    """Column scales of dense matrices are those of one process, whether rows are split or columns (moments are then kept whole)."""
    coded.MIN_CODED = 1
    for layout in ("tp columns", "tp rows"):
        shapes = {"tall": (26, 10), "wide": (10, 34), "experts": (4, 14, 8), "embedding": (50, 8)}
        alone, spread = Model(shapes), place(Model(shapes), layout)
        pair = [
            lo.GaLoreAdamW([{"params": list(model.parameters()), "rank": None}], lr=1e-3, state_bits=8)
            for model in (alone, spread)
        ]
        for model, optimizer in zip((alone, spread), pair, strict=True):
            train(model, optimizer, range(9))
        for name, state in states(pair[0], alone).items():
            kept = pair[1].state[getattr(spread, name)]["col_scale"]
            assert kept.placements == (Shard(0) if name == "experts" and layout == "tp rows" else Replicate(),)
            # The numbers of elements, and so their noise, are those of the whole where the first dimension is split.
            near = 0.02 if name == "experts" and layout == "tp columns" else 0.0
            torch.testing.assert_close(whole(kept), state["col_scale"], rtol=near, atol=0.0)
            assert state["col_scale"].min() < 0.99
        moved = distance(weights(alone), weights(Model(shapes)))
        assert distance(weights(spread), weights(alone)) < 0.1 * moved


def test_column_scales_of_shards_are_those_of_one_process():
    spawn(2, coded_columns)


def check_state() -> None:
    """Placements of the state; one process per 5 rows."""
    model = shard(Model({"tall": (18, 6), "wide": (6, 18)}))
    optimizer = build(model, "galore", state_bits=32)
    optimizer8 = lo.GaLoreAdamW(list(model.parameters()), rank=2, proj_type="left")
    for side, opt, basis in (("right", optimizer, Replicate()), ("left", optimizer8, Shard(0))):
        state = opt.state[model.tall]
        assert state["basis"].placements == (basis,), side
        for name in ("exp_avg", "exp_avg_sq"):
            assert state[name].placements == (Shard(0),)
            assert tuple(state[name].shape) == ((18, 2) if side == "right" else (6, 2))
        assert not isinstance(state["step"], DTensor)
    held = lo.state_bytes(optimizer)["exp_avg"]
    assert held < 4 * 2 * (18 + 18)  # a share of it


def test_state_is_sharded_as_the_long_side_is():
    spawn(4, check_state)


def nonfinite() -> None:
    rank = torch.distributed.get_rank()
    for name in ("galore", "fira", "ldadam", "frugal"):
        model = shard(Model({"tall": (18, 6), "vector": (9,)}))
        optimizer = build(model, name)
        train(model, optimizer, range(3))
        before = weights(model)
        model(3).backward()
        if rank == 1:
            model.tall.grad.to_local()[0, 0] = torch.nan
        with pytest.warns(RuntimeWarning, match="skipped the update"):
            optimizer.step()
        assert torch.equal(whole(model.tall), before["tall"]), name
        assert not torch.equal(whole(model.vector), before["vector"])
        assert optimizer.skipped_updates() == {"tall": 1}


def test_a_nan_on_one_process_is_skipped_on_all():
    spawn(2, nonfinite)


def extremes() -> None:
    """Gradients of 1e-15 and 1e15 are refreshed and projected as those of 1 are; a zero one keeps the basis."""
    for size in (1e-15, 1e15):
        model = shard(Model({"tall": (18, 6)}))
        optimizer = build(model, "galore")
        model(0).backward()
        model.tall.grad.mul_(size)
        optimizer.step()
        assert int(optimizer.state[model.tall]["last_refresh"]) == 0
        basis = whole(optimizer.state[model.tall]["basis"])
        torch.testing.assert_close(basis.T @ basis, torch.eye(2), atol=1e-5, rtol=0)
    model = shard(Model({"tall": (18, 6)}))
    optimizer = build(model, "galore")
    model(0).backward()
    model.tall.grad.zero_()
    optimizer.step()
    assert int(optimizer.state[model.tall]["last_refresh"]) == -1


def test_gradients_of_any_size_give_a_basis_on_shards():
    spawn(2, extremes)
