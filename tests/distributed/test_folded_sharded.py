"""FoldedAdam on sharded matrices: the numbers of one process, without a message, and columns that would cut blocks."""

import pytest
import torch

import lowrank_optim as lo
from lowrank_optim.quantization import coded_moments as coded
from tests.distributed.test_fully_shard import place
from tests.distributed.test_muon_sharded import MATRICES, build, compare, wire_of_step
from tests.oracles.distributed_harness import Model, spawn, states

EVEN = {"tall": (26, 16), "wide": (10, 32), "experts": (3, 14, 24)}
CASES = [
    ({}, {"rule": lo.FoldedAdam()}),
    ({"layout": "transposed"}, {"rule": lo.FoldedAdam(level=1)}),
]


@pytest.mark.parametrize(("world", "layout"), [(2, "fsdp"), (4, "fsdp"), (4, "hsdp")])
def test_sharded_rows_agree_with_one_process(world, layout):
    spawn(world, compare, CASES[:1], MATRICES, layout)


@pytest.mark.parametrize(("world", "layout"), [(2, "tp columns"), (4, "fsdp and tp")])
def test_columns_that_are_split_between_blocks_agree_with_one_process(world, layout):
    spawn(world, compare, CASES[:1], EVEN, layout)


def check_split_rows_of_a_transposed_matrix() -> None:
    """Rows that are split are columns of the layout."""
    compare(CASES[1:], {"tall": (32, 7)})


def test_split_rows_of_a_transposed_matrix_agree_with_one_process():
    spawn(4, check_split_rows_of_a_transposed_matrix)


def check_few_bits() -> None:
    coded.MIN_CODED = 1
    cases = [({"state_bits": 8}, {"rule": lo.FoldedAdam()})]
    for layout in ("fsdp", "tp columns"):  # split columns: every process has the moments of all
        compare(cases, MATRICES, layout, tolerance=1e-4)
    model = place(Model({"tall": (26, 10)}), "fsdp")
    kept = states(build(model, *cases[0]), model)["tall"]
    assert (kept["exp_avg"].dtype, tuple(kept["exp_avg"].shape)) == (torch.int8, (26, 3))


def test_moments_in_few_bits_agree_with_one_process():
    spawn(2, check_few_bits)


def check_wire_and_refusals() -> None:
    rule = {"rule": lo.FoldedAdam()}
    for layout in ("fsdp", "tp columns"):
        (finite,) = wire_of_step({"w": (26, 16)}, {}, rule, layout)
        assert finite == ("allreduce", 1, 8)
    model = place(Model({"w": (26, 12)}), "tp columns")
    with pytest.raises(
        ValueError, match=r"parameter w \(26, 12\) has 12 columns on 2 processes.*multiple of 8.*Shard\(0\)"
    ):
        build(model, {}, rule)


def test_a_step_sends_nothing_and_columns_that_cut_blocks_are_refused():
    spawn(2, check_wire_and_refusals)
