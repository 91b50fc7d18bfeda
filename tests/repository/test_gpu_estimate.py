"""The estimate of a step on a GPU: what is counted, and what the committed table says of the kernels."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS / "gpu"), str(BENCHMARKS)]

import launches  # noqa: E402
import limits  # noqa: E402
import tables  # noqa: E402

PRODUCTS = {"project_kernel", "apply_kernel", "sparse_kernel", "sampled_kernel"}
SHAPE = launches.Shape(hidden=128, ffn=256, layers=3, vocabulary=512, rank=64, tokens=32)


def by_kernel(name: str) -> dict[str, list[tuple[int, launches.Work]]]:
    found: dict[str, list[tuple[int, launches.Work]]] = {}
    for work, count in launches.step_of(name, limits.GPUS[89], SHAPE).items():
        found.setdefault(work.name, []).append((count, work))
    return found


def test_launches_and_bytes_of_coded_adamw_are_counted():
    found = by_kernel("AdamW, 8-bit state")
    assert sum(count for count, _ in found["coded_adam_kernel"]) == 7 * 3 + 2
    assert sum(count for count, _ in found["adam_dense_kernel"]) == 2 * 3 + 1  # norms: too small for codes
    rows, cols = 128, 256
    numbers, scales = rows * cols, 4 * rows  # a block of codes is a row
    # Weights, both moments with their scales twice; the gradient, the scales of columns, whether it is finite once.
    moved = 2 * (2 * numbers + 2 * (numbers + scales)) + 2 * numbers + 4 * cols + 1
    assert (3, moved) in {(count, work.moved) for count, work in found["coded_adam_kernel"]}


def test_products_of_galore_are_counted():
    found = by_kernel("GaLore 8-bit")
    for kernel, passes in (("project_kernel", 2), ("apply_kernel", 3)):  # of bfloat16 for one nearly in float32
        sizes = sorted((dict(work.flops)["bfloat16"], count) for count, work in found[kernel])
        square, wide = 2.0 * 128 * 128 * 64 * passes, 2.0 * 128 * 256 * 64 * passes
        assert {size for size, _ in sizes} == {square, wide}
        assert sum(count for size, count in sizes if size == square) == 4 * 3
        assert sum(count for size, count in sizes if size == wide) == 3 * 3


def test_occupancy_is_limited_by_registers_shared_memory_and_threads():
    assert limits.occupancy(90, 32, 0, 256) == 1.0
    assert limits.occupancy(90, 128, 0, 256) == 16 / 64
    assert limits.occupancy(89, 128, 48, 256) == 16 / 48
    assert limits.occupancy(89, 64, 60, 128) == 4 / 48
    assert limits.occupancy(80, 255, 0, 256) == 8 / 64


def test_the_step_is_bound_by_bytes_or_by_products():
    gpu = limits.GPUS[90]
    assert gpu.seconds(3352e9, {}) == 1.0
    assert gpu.seconds(0, {"bfloat16": 989.4e12, "tf32": 494.7e12}) == 2.0


@pytest.mark.parametrize("capability", ["80", "86", "89", "90"])
def test_no_kernel_of_the_table_spills_and_products_use_tensor_cores(capability):
    found = tables.results("gpu_static")["architectures"][capability]
    assert not found["errors"]
    assert {row["kernel"] for row in found["triton"]} >= PRODUCTS
    for row in (*found["triton"], *found["cuda"]):
        assert row["spilled_bytes"] == 0
    for row in found["triton"]:
        assert bool(row["tensor_core"]) == (row["kernel"] in PRODUCTS)
