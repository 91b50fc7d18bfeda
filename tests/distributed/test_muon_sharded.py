"""Muon on sharded matrices: the numbers of one process, and on the wire Gram matrices in place of the matrices."""

import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank_optim as lo
from lowrank_optim.quantization import coded_moments as coded
from lowrank_optim.sharding.dtensor import dense_sharding
from tests.distributed.test_fully_shard import place
from tests.oracles.distributed_harness import Model, distance, spawn, states, train, weights

STEPS, GAP = 5, 3
MATRICES = {
    "tall": (26, 10),
    "wide": (10, 33),  # exchanged, for its rows are fewer by far
    "square": (16, 16),
    "uneven": (18, 12),  # on 4 processes: 5, 5, 5, 3 rows
    "three": (3, 40),  # on 4 processes: 1, 1, 1, 0
    "experts": (3, 14, 9),
    "conv": (6, 4, 3, 3),
}
FUSED = {"fused": (30, 12), "stack": (2, 30, 8)}
CASES = [
    ({}, {"rule": lo.Muon()}),
    ({}, {"rule": lo.Muon(nesterov=False, adjust_lr_fn="match_rms_adamw")}),
    ({}, {"rule": lo.NorMuon()}),
    ({"layout": "transposed"}, {"rule": lo.NorMuon()}),
    ({"rank": 2}, {"rule": lo.Muon(), "proj_type": "right"}),
    ({"rank": 2}, {"rule": lo.NorMuon(), "proj_type": "left", "on_refresh": "rotate"}),
    ({"rank": 2}, {"rule": lo.Muon(), "proj_type": "full", "on_refresh": "rotate"}),
    ({"rank": 2}, {"rule": lo.Muon(), "coordinates": "columns"}),
    ({"density": 0.4}, {"rule": lo.Muon(), "blocks": "descending", "on_refresh": "reset"}),
]
SPLIT = [({"split": split}, {"rule": rule}) for split in (3, (18, 6, 6)) for rule in (lo.Muon(), lo.NorMuon())]


def build(model: nn.Module, group: dict, options: dict) -> lo.LowRankOptimizer:
    return lo.LowRankOptimizer(
        [{"params": list(model.named_parameters()), **group}], lr=1e-3, weight_decay=0.1, update_proj_gap=GAP, **options
    )


def compare(cases, shapes, layout: str = "fsdp", tolerance: float = 1e-6) -> None:
    found = {}
    for group, options in cases:
        alone, spread = Model(shapes), place(Model(shapes), layout)
        reference, optimizer = build(alone, group, options), build(spread, group, options)
        before = weights(alone)
        train(spread, optimizer, range(STEPS))
        got = weights(spread)
        if torch.distributed.get_rank():
            continue
        train(alone, reference, range(STEPS))
        expected = weights(alone)
        assert all(not torch.equal(before[n], expected[n]) for n in expected)
        for n in expected:
            gap = distance({n: got[n]}, {n: expected[n]})
            if not gap < tolerance:
                found[n, str(group), str(options)] = gap
    assert not found, found


@pytest.mark.parametrize("world", [1, 2, 4])
def test_sharded_rows_agree_with_one_process(world):
    spawn(world, compare, CASES, MATRICES)


@pytest.mark.parametrize("layout", ["tp columns", "tp rows"])
def test_sharded_columns_and_tensor_parallel_rows_agree_with_one_process(layout):
    spawn(2, compare, CASES[:5], MATRICES, layout)


def test_replicas_of_shards_agree_with_one_process():
    spawn(4, compare, CASES[:4], MATRICES, "hsdp")


@pytest.mark.parametrize("layout", ["fsdp", "tp columns"])
def test_blocks_of_rows_agree_with_one_process_wherever_they_are_cut(layout):
    spawn(4, compare, SPLIT, FUSED, layout)


def compare_few_bits() -> None:
    coded.MIN_CODED = 1
    eight = [({"state_bits": 8}, {"rule": lo.Muon()}), ({"state_bits": 8}, {"rule": lo.NorMuon()})]
    compare(eight, MATRICES, tolerance=1e-4)  # a code may round the other way
    compare(eight, MATRICES, "tp columns", tolerance=1e-4)
    model = place(Model({"tall": (26, 10)}), "fsdp")
    optimizer = build(model, *eight[0])
    assert states(optimizer, model)["tall"]["exp_avg"].dtype == torch.int8


def test_moments_in_few_bits_agree_with_one_process():
    spawn(2, compare_few_bits)


def compare_bfloat16() -> None:
    """Against float32 products: a hundredth of what products in bfloat16 on one process are off."""
    ends = []
    for inner, layout in (("float32", None), ("bfloat16", None), ("bfloat16", "fsdp")):
        model = Model({name: MATRICES[name] for name in ("tall", "wide", "square")})
        model = model if layout is None else place(model, layout)
        train(model, build(model, {}, {"rule": lo.Muon(inner_dtype=inner)}), range(2 * STEPS))
        ends.append(weights(model))
    exact, one, sharded = ends
    assert 1e-4 < distance(one, exact) < 2e-3
    assert distance(sharded, exact) < 0.01 * distance(one, exact)


def test_gram_matrices_in_float32_are_nearer_than_products_in_bfloat16():
    spawn(2, compare_bfloat16)


# ------------------------------------------------------------------------------------------------------------ on the wire


class Wire(TorchDispatchMode):
    """Elements and bytes that this process gives to collective operations."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        space, _, name = function._schema.name.partition("::")
        if space in ("c10d", "_c10d_functional"):
            given = args[1] if name.startswith("alltoall_base") else args[0]
            tensors = given if isinstance(given, (list, tuple)) else [given]
            sizes = [(t.numel(), t.numel() * t.element_size()) for t in tensors if isinstance(t, torch.Tensor)]
            self.sent.append((name.rstrip("_"), sum(n for n, _ in sizes), sum(b for _, b in sizes)))
        return function(*args, **(kwargs or {}))


def wire_of_step(shapes, group, options, layout="fsdp") -> list[tuple[str, int, int]]:
    model = place(Model(shapes), layout)
    optimizer = build(model, group, options)
    train(model, optimizer, range(2))
    model(2).backward()
    with Wire() as wire:
        optimizer.step()
    return wire.sent


def count() -> None:
    world = torch.distributed.get_world_size()
    finite = ("allreduce", 1, 8)
    shapes = {"tall": (26, 10), "square": (16, 16), "near": (15, 16)}
    for name, (m, n) in shapes.items():
        assert wire_of_step({name: (m, n)}, {}, {"rule": lo.Muon()}) == [finite, ("allreduce", n * n, 8 * n * n)]
    assert wire_of_step({"tall": (26, 10)}, {}, {"rule": lo.Muon(inner_dtype="bfloat16")})[1:] == [
        ("allreduce", 100, 400)
    ]
    assert wire_of_step({"tall": (26, 10)}, {}, {"rule": lo.NorMuon()})[1:] == [
        ("allreduce", 100, 800),
        ("allreduce", 2, 16),
    ]
    assert wire_of_step({"wide": (10, 26)}, {}, {"rule": lo.Muon()}, "tp columns")[1:] == [("allreduce", 100, 800)]
    assert wire_of_step({"fused": (30, 12)}, {"split": 3}, {"rule": lo.Muon()})[1:] == 3 * [("allreduce", 144, 1152)]
    m, n = 12, 48  # rows that are much longer than there are rows: a part of the matrix there and back, and m² numbers
    own = m * n // world
    exchange = ("alltoall_base", own, 4 * own)
    assert wire_of_step({"wide": (m, n)}, {}, {"rule": lo.Muon()})[1:] == [
        exchange,
        ("allreduce", m * m, 8 * m * m),
        exchange,
    ]
    assert wire_of_step({"experts": (4, 12, 8)}, {}, {"rule": lo.Muon()})[1:] == []  # whole matrices lie on each


def test_a_step_sends_gram_matrices_and_never_the_matrix():
    spawn(2, count)


def count_in_subspace() -> None:
    sent = wire_of_step({"tall": (26, 10)}, {"rank": 2}, {"rule": lo.Muon(), "proj_type": "right"})
    assert sent[1:] == [("allreduce", 4, 32)]  # r² numbers


def test_a_step_in_a_subspace_sends_a_gram_matrix_of_its_rank():
    spawn(2, count_in_subspace)


# ---------------------------------------------------------------------------------------------------------------- refused


def refuse() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    both = nn.Parameter(distribute_tensor(torch.randn(16, 12), mesh, [Shard(0), Shard(1)]))
    with pytest.raises(
        ValueError, match=r"parameter w \(16, 12\) is split along both its rows and its columns.*fully_shard"
    ):
        lo.LowRankOptimizer([("w", both)], rule=lo.Muon())
    rows = nn.Parameter(distribute_tensor(torch.randn(16, 12), mesh, [Shard(0), Replicate()]))
    lo.LowRankOptimizer([("w", rows)], rule=lo.Muon(ns_steps=12))
    with pytest.raises(ValueError, match=r"parameter w .* is sharded, and 14 steps .* use fewer ns_steps"):
        lo.LowRankOptimizer([("w", rows)], rule=lo.Muon(ns_steps=14))
    with pytest.raises(ValueError, match=r"6 steps .* use fewer ns_steps, or inner_dtype=\"float32\""):
        lo.LowRankOptimizer([("w", rows)], rule=lo.Muon(ns_steps=6, inner_dtype="bfloat16"))


def test_a_matrix_split_along_both_sides_is_refused_when_the_optimizer_is_built():
    spawn(4, refuse)


def exchange() -> None:
    """Uneven parts, and empty ones, there and back."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for shape in ((3, 10), (9, 2), (2, 7, 5)):
        whole = torch.arange(float(math.prod(shape))).view(shape)
        rows = distribute_tensor(whole, mesh, [Shard(len(shape) - 2)])
        cols = distribute_tensor(whole, mesh, [Shard(len(shape) - 1)])
        spread = dense_sharding(rows)
        assert torch.equal(spread.exchange(rows.to_local(), -2, -1), cols.to_local())
        assert torch.equal(spread.exchange(cols.to_local(), -1, -2), rows.to_local())


def test_parts_of_rows_are_exchanged_for_parts_of_columns():
    spawn(4, exchange)
