"""The numbers of README and docs are those of the JSON in benchmarks/results: tables, the picture, and sentences."""

import re
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.repository.pages import PAGES, ROOT, text

sys.path.insert(0, str(ROOT / "benchmarks"))

import tables


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_json(page):
    assert tables.filled(text(page)) == text(page), "python benchmarks/tables.py writes them anew"


def test_every_table_is_on_a_page():
    used = {name for page in PAGES for name in re.findall(r"<!-- table: ([\w-]+) -->", text(page))}
    assert used == set(tables.TABLES)


def test_the_picture_shows_the_numbers_of_the_json():
    memory_picture = pytest.importorskip("memory_picture", reason="matplotlib is not there")
    shown = re.findall(r">([^<>\n]+)</text>", memory_picture.PICTURE.read_text(encoding="utf-8"))
    rows = tables.results("plan_7b")["7b"]
    for name, title in memory_picture.ROWS.items():
        parts = memory_picture.gibibytes(rows[name])
        assert sum(parts.values()) == pytest.approx(rows[name]["needed"] / 2**30)
        assert f"{sum(parts.values()):.1f} GiB" in shown
        assert all(line in shown for line in title.split("\n"))
        assert all(f"{size:.1f}" in shown for size in parts.values() if size > memory_picture.LEAST_NUMBER)


def test_the_picture_is_drawn_by_its_script(tmp_path):
    memory_picture = pytest.importorskip("memory_picture", reason="matplotlib is not there")
    memory_picture.draw(tables.results("plan_7b")["7b"], tmp_path / "new.svg")
    words = [
        re.findall(r">([^<>\n]+)</text>", path.read_text(encoding="utf-8"))
        for path in (tmp_path / "new.svg", memory_picture.PICTURE)
    ]
    assert words[0] == words[1]


# Sentences ----------------------------------------------------------------------------------------------------------------------

GIB, MIB = 2**30, 2**20


def state(name: str) -> list[float]:
    run = next(run for run in tables.results("pretrain_sweep")["runs"] if run["optimizer"] == name)
    return [sum(size for kind, size in run["bytes"].items() if kind.startswith("state")) / MIB]


def losses(name: str) -> list[float]:
    return [min(run["val_loss"] for run in tables.results("pretrain_sweep")["runs"] if run["optimizer"] == name)]


def rate_over_adamw() -> list[float]:
    best, methods = tables.results("pretrain_sweep")["best_lr"], tables.results("convergence-cpu")["methods"]
    return [best["galore"] / best["adamw"], methods["galore"]["lr"] / methods["adamw"]["lr"]]


def saved(name: str) -> list[float]:
    rows = tables.results("plan_7b")["7b"]
    return [100 * (1 - rows[name]["whole_state"] / rows["AdamW"]["whole_state"])]


def needed_13b(rank: int) -> list[float]:
    return [tables.results("plan_7b")["13b"][f"Q-GaLore rank {rank}, int8 weights, in backward"]["needed"] / GIB]


def peak(name: str) -> float:
    """Of LLaMA-7B, planned."""
    return float(tables.results("plan_7b")["7b"][name]["peak"])


def less_than(name: str) -> float:
    """By how many per cent the peak of SLTrain is below another."""
    return 100.0 * (1.0 - peak("SLTrain 8-bit, in backward") / peak(name))


def converged(name: str) -> float:
    return float(tables.results("convergence-cpu")["methods"][name]["val_loss"])


def steps(part: str, *names: str) -> list[float]:
    return [tables.results("step_time")[part][name]["over_fused_adamw"] for name in names]


def milliseconds(*names: str) -> list[float]:
    return [1e3 * tables.results("step_time")["small"][name]["seconds"] for name in names]


def error(direction: str, setting: str, kind: str) -> float:
    found = tables.results("state_format")[direction][setting][kind]
    return 100 * found[max(found, key=int)]["mean_error"]


def trained(bits: int) -> list[float]:
    return [
        tables.results("state_format")["training, 500 steps, 4 seeds, betas (0.9, 0.999)"][f"{bits} bit"][OVER_FLOAT32]
    ]


OVER_FLOAT32 = "val_loss_over_float32"
SMALL = "direction, hidden 128, rank 32, 1000 steps, betas (0.9, 0.999)"
LARGE = "direction, hidden 1024, rank 256, 100 steps, betas (0.9, 0.999)"
OURS = "8 bit, m/√v linear, √v linear≈, block 256, column fitted"
THEIRS = "8 bit, m dynamic, v dynamic, block 256, column none"
FUSED, GALORE_TORCH = "torch AdamW, fused, float32 state", "galore-torch GaLoreAdamW"


def apollo(*names: str) -> list[float]:
    return [tables.results("apollo_step")[name] for name in names]


def muon(*names: str) -> list[float]:
    return [tables.results("muon_step")["over_torch"][name] for name in names]


def of_the_plan() -> list[float]:
    """The least and the most peak of several processes, as shares of the planned one."""
    rows = tables.results("planner_processes")["rows"]
    shares = [[row["measured"][kind] / row["planned"]["peak"] for row in rows] for kind in ("least peak", "peak")]
    return [min(shares[0]), max(shares[1])]


def test_shares_of_several_processes_are_planned_to_the_byte():
    for row in tables.results("planner_processes")["rows"]:
        for kind in ("weights", "state"):
            assert row["planned"][kind] == row["measured"][kind], row


SENTENCES: list[tuple[str, str, Callable[[], list[Any]]]] = [
    ("README.md", "AdamW at {:.3f} with", lambda: losses("adamw")),
    ("README.md", "with {:.2f} MiB of state", lambda: state("galore")),
    ("README.md", "with {:.2f} MiB, each", lambda: state("adamw")),
    ("docs/memory.md", "is between {:.2f} and {:.2f} of the planned", of_the_plan),
    ("docs/benchmarks.md", "{:.4f} and 1.3738 on four of them", lambda: losses("galore")),
    ("docs/benchmarks.md", "where AdamW's is {:.4f} on all", lambda: losses("adamw")),
    ("docs/benchmarks.md", "The JSON is that of {:.4f}", lambda: losses("galore")),
    ("docs/benchmarks.md", "with {:.2f} MiB of optimizer state", lambda: state("galore")),
    ("docs/benchmarks.md", "with {:.2f} MiB, each", lambda: state("adamw")),
    ("docs/benchmarks.md", "and {:,} tokens for every method", lambda: [tables.results("convergence-cpu")["tokens"]]),
    ("docs/parametrisations.md", "at a peak of {:.1f} GiB", lambda: [peak("SLTrain 8-bit, in backward") / 2**30]),
    ("docs/parametrisations.md", "{:.0f} % below AdamW", lambda: [less_than("AdamW")]),
    ("docs/parametrisations.md", "and {:.0f} % below GaLore", lambda: [less_than("GaLore 8-bit, in backward")]),
    ("docs/parametrisations.md", "at a validation loss of {:.3f}", lambda: [converged("sltrain")]),
    ("docs/parametrisations.md", "ends at {:.3f} at the same rank", lambda: [converged("low_rank")]),
    ("docs/parametrisations.md", "AdamW at {:.3f}.", lambda: [converged("adamw")]),
    (
        "docs/benchmarks.md",
        "takes {:.1f}× the time of torch's fused",
        lambda: steps("dense", "GaLoreAdamW without rank, 8-bit state"),
    ),
    ("docs/benchmarks.md", "where bitsandbytes takes {:.0f}×", lambda: steps("dense", "bitsandbytes AdamW8bit")),
    ("docs/benchmarks.md", "and torchao {:.0f}×", lambda: steps("dense", "torchao AdamW8bit")),
    (
        "docs/benchmarks.md",
        "on {:.1f} M float32 parameters",
        lambda: [tables.results("step_time")["dense"][FUSED]["state_bytes"] / 8e6],
    ),
    (
        "docs/benchmarks.md",
        "takes {:.1f}× fused AdamW with `GaLoreAdamW8bit`, {:.1f}× with `FiraAdamW`, {:.1f}× with galore-torch",
        lambda: steps("matrices", "GaLoreAdamW8bit", "FiraAdamW", GALORE_TORCH),
    ),
    ("docs/benchmarks.md", "{:.1f}× with `SCALEOptimizer`", lambda: steps("matrices", "SCALEOptimizer")),
    (
        "docs/benchmarks.md",
        "take {:.0f} ms with `GaLoreAdamW`, {:.1f} ms with galore-torch, {:.1f} ms with fused AdamW",
        lambda: milliseconds("GaLoreAdamW", GALORE_TORCH, FUSED),
    ),
    (
        "docs/benchmarks.md",
        "takes {:.1f}× fused AdamW, and `GaLoreAdamW` {:.2f}× the time of galore-torch",
        lambda: [
            tables.results("torch_path")["dense"]["steps"]["GaLoreAdamW without rank, 8-bit state"]["over_base"],
            tables.results("torch_path")["matrices, rank 256"]["steps"]["GaLoreAdamW"]["over_base"],
        ],
    ),
    ("docs/benchmarks.md", "takes {:.2f}× the time of apollo-torch", lambda: apollo("apollo_over_apollo_torch")),
    ("docs/benchmarks.md", "step takes {:.1f}× that of one pass", lambda: apollo("apollo_mini_over_floor")),
    ("docs/benchmarks.md", "step takes {:.1f}× that of one pass", lambda: apollo("apollo_mini_over_fused_adamw")),
    (
        "docs/benchmarks.md",
        "takes {:.1f}× that of its three products, {:.1f}× GaLore's",
        lambda: apollo("frugal_over_three_products", "frugal_over_galore"),
    ),
    (
        "docs/benchmarks.md",
        "is {:.1f}× as fast as the step written out",
        lambda: [tables.results("fira_step")["speedup"]],
    ),
    (
        "docs/benchmarks.md",
        "temporaries of {:.1f} MiB in place of {:.0f} MiB",
        lambda: [tables.results("fira_step")["temporary_bytes"][who] / MIB for who in ("ours", "written_out")],
    ),
    (
        "docs/benchmarks.md",
        "{:.0f} MiB of gradients are alive at a time in place of {:.0f} MiB",
        lambda: [
            tables.results("in_backward")["memory"][who]["gradients"] / MIB for who in ("in_backward", "ordinary")
        ],
    ),
    (
        "docs/benchmarks.md",
        "takes {:.2f}× the time of `torch.optim.Muon` with bfloat16 products, {:.2f}× with float32 ones, and SUMO {:.2f}×",
        lambda: muon("bfloat16", "float32", "subspace"),
    ),
    (
        "docs/benchmarks.md",
        "ends at {:.3f} (`benchmarks/results/convergence-cpu-frugal.json`)",
        lambda: [in_random_columns()],
    ),
    (
        "docs/few_bits.md",
        "is {:.1f} % off that of float32 moments at rank 32 and {:.1f} % for embedding and head",
        lambda: [error(SMALL, OURS, "low_rank"), error(SMALL, OURS, "dense")],
    ),
    (
        "docs/few_bits.md",
        "blocks {:.0f} % and {:.0f} %",
        lambda: [error(SMALL, THEIRS, "low_rank"), error(SMALL, THEIRS, "dense")],
    ),
    (
        "docs/few_bits.md",
        "it is {:.1f} % ({:.0f} %)",
        lambda: [error(LARGE, OURS, "low_rank"), error(LARGE, THEIRS, "low_rank")],
    ),
    ("docs/few_bits.md", "ends at {:.3f}× the loss with 8 bits, {:.3f}× with 4", lambda: trained(8) + trained(4)),
    ("docs/memory.md", "is {:.0f} % below", lambda: saved("GaLore, bfloat16 state")),
    ("docs/memory.md", "{:.1f} % with GaLore 8-bit", lambda: saved("GaLore 8-bit, in backward")),
    ("docs/memory.md", "{:.1f} % with a 4-bit", lambda: saved("GaLore 8-bit, 4-bit basis, in backward")),
    (
        "docs/memory.md",
        "one sequence of {} tokens with GaLore 8-bit, {} with a 4-bit basis",
        lambda: [
            tables.results("plan_7b")["longest_sequence_without_checkpointing_24GiB"][f"GaLore 8-bit, {bits}-bit basis"]
            for bits in (8, 4)
        ],
    ),
    (
        "docs/memory.md",
        "sequences of up to {:,} tokens",
        lambda: [tables.results("plan_7b")["13b"]["largest in 24 GiB at rank 1024"]["longest_sequence"]],
    ),
    ("docs/memory.md", "at rank 1024 it needs {:.1f} GiB", lambda: needed_13b(1024)),
    ("docs/memory.md", "At rank 1280 it needs {:.1f} GiB", lambda: needed_13b(1280)),
    (
        "docs/memory.md",
        "the largest of {} errors is {:.1f} %",
        lambda: [
            len(tables.results("planner_validation")["cases"]),
            100 * abs(tables.results("planner_validation")["largest_error"]),
        ],
    ),
    (
        "docs/memory.md",
        "the largest of {} differences is {:.1f} %",
        lambda: [
            len(tables.results("planner_families")["cases"]),
            100 * abs(tables.results("planner_families")["largest_error"]),
        ],
    ),
    ("docs/troubleshooting.md", "best at {:.0f} and {:.0f} times the rate of AdamW", rate_over_adamw),
]


def in_random_columns() -> float:
    options = {"density": 0.25, "scale": 0.25, "update_proj_gap": 50}
    runs = tables.results("convergence-cpu-frugal")["runs"]
    values = [run["val_loss"] for run in runs if run["options"] == options and run["lr"] == 0.008]
    assert len(values) == 3
    return sum(values) / 3


@pytest.mark.parametrize(("page", "sentence", "numbers"), SENTENCES, ids=[f"{p}: {s}" for p, s, _ in SENTENCES])
def test_numbers_of_a_sentence_are_those_of_the_json(page, sentence, numbers):
    assert sentence.format(*numbers()) in " ".join(text(page).split())
