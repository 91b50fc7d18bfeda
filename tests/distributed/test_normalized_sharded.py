"""RowNorm, Sinkhorn and SAGE on sharded matrices: the numbers of one process, and a few numbers for each line on the wire."""

import pytest
import torch

import lowrank_optim as lo
from lowrank_optim.quantization import coded_moments as coded
from tests.distributed.test_fully_shard import place
from tests.distributed.test_muon_sharded import MATRICES, compare, wire_of_step
from tests.oracles.distributed_harness import Model, spawn, states

CASES = [
    ({}, {"rule": lo.RowNorm()}),
    ({}, {"rule": lo.RowNorm(0.9, axis="columns")}),
    ({"layout": "transposed"}, {"rule": lo.RowNorm(unit="norm")}),
    ({}, {"rule": lo.Sinkhorn()}),
    ({}, {"rule": lo.Sinkhorn(0.9, iterations=2)}),
    ({}, {"rule": lo.SAGE()}),
    ({"rank": 2}, {"rule": lo.RowNorm(0.9), "proj_type": "left", "on_refresh": "rotate"}),
    ({"rank": 2}, {"rule": lo.Sinkhorn(), "proj_type": "right"}),
    ({"density": 0.4}, {"rule": lo.RowNorm(0.9), "blocks": "descending", "on_refresh": "reset"}),
]


@pytest.mark.parametrize(
    ("world", "layout"),
    [(1, "fsdp"), (2, "fsdp"), (4, "fsdp"), (2, "tp columns"), (2, "tp rows"), (4, "hsdp"), (4, "fsdp and tp")],
)
def test_sharded_matrices_agree_with_one_process(world, layout):
    spawn(world, compare, CASES, MATRICES, layout)


def compare_few_bits() -> None:
    coded.MIN_CODED = 1
    cases = [
        ({"state_bits": 8}, {"rule": rule}) for rule in (lo.RowNorm(0.9), lo.Sinkhorn(0.9), lo.SAGE(), lo.RowNorm())
    ]
    for layout in ("fsdp", "tp columns"):
        compare(cases, {name: MATRICES[name] for name in ("tall", "wide", "experts", "conv")}, layout, tolerance=1e-4)
    model = place(Model({"tall": (26, 10)}), "fsdp")
    kept = states(lo.LowRankOptimizer(list(model.named_parameters()), rule=lo.RowNorm(0.9), state_bits=8), model)[
        "tall"
    ]
    assert kept["exp_avg"].dtype == torch.int8


def test_momentum_in_few_bits_agrees_with_one_process():
    spawn(2, compare_few_bits)


def count() -> None:
    m, n = 26, 10

    def sent(rule: lo.Rule, layout: str = "fsdp") -> list[tuple[str, int, int]]:
        finite, *others = wire_of_step({"w": (m, n)}, {}, {"rule": rule}, layout)
        assert finite == ("allreduce", 1, 8)
        return others

    def line(elements: int) -> tuple[str, int, int]:
        return ("allreduce", elements, 4 * elements)

    assert sent(lo.RowNorm()) == []
    assert sent(lo.RowNorm(0.9, axis="columns")) == [line(n)]
    assert sent(lo.RowNorm(), "tp columns") == [line(m)]
    assert sent(lo.Sinkhorn()) == 5 * [line(n)]
    assert sent(lo.Sinkhorn(iterations=2), "tp columns") == 2 * [line(m)]
    assert sent(lo.SAGE()) == [line(n)]
    assert sent(lo.SAGE(), "tp columns") == 2 * [line(1)]


def test_a_step_sends_a_few_numbers_for_each_line():
    spawn(2, count)
