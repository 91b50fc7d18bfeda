"""Every operation of every backend on this device, against what the device can do.

    python benchmarks/kernels.py [--rounds 20] [--ranks 128,512,1024] [--seconds 240] [--out DIRECTORY]

The floor of an operation is the larger of two times: the bytes that it must move over the measured rate of copying, and the products
that it must make over the measured rate of matrix products in bfloat16 (GPU) or float32 (CPU). Where an operation makes several
products to be exact (the table in `lowrank_optim/kernels/triton/products.py`), `products` says how many of these the floor would
need; the floor itself counts one. Candidates of one row are measured in turn in each round, so their ratios are of one machine state.

On a GPU: bfloat16 matrices of 4096×4096 and 4096×11008, and a refresh of the larger one at rank 1024 against torch.linalg.svd. On
the CPU: float32 matrices of 512×512 and 512×1376, ranks an eighth of these; they lie in the cache, so that some operations come out
below the floor, which is that of memory.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import common
import torch
from torch import Tensor

from lowrank_optim.kernels import Loaded, arguments, dispatch
from lowrank_optim.projectors import RandomizedSVD, Refresh
from lowrank_optim.quantization import zero_rows

F32, BF16 = torch.float32, torch.bfloat16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"


@dataclass(frozen=True)
class Task:
    """One call of an operation: its arguments, the bytes that it must move and the flops of one product."""

    op: str
    label: str
    args: tuple[Any, ...]
    bytes: float
    flops: float = 0.0


def seconds(run: Callable[[], object], rounds: int) -> list[float]:
    """Durations of single runs; on a GPU between two events, with the launches hidden behind a wait of the device."""
    run()
    if not GPU:
        return [common.timed(run) for _ in range(rounds)]
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    torch.cuda._sleep(2_000_000)
    for begin, end in pairs:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1000 for begin, end in pairs]


def interleaved(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each candidate, in turn over five passes."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(5):
        for name, run in candidates.items():
            times[name] += seconds(run, max(1, rounds // 5))
    return {name: median(values) for name, values in times.items()}


def rates() -> dict[str, float]:
    """Bytes per second of a copy (read and written) and flops per second of a product, the best of a few sizes."""
    n = 1 << (28 if GPU else 24)
    source, target = torch.ones(n, dtype=torch.uint8, device=DEVICE), torch.empty(n, dtype=torch.uint8, device=DEVICE)
    copying = 2 * n / min(seconds(lambda: target.copy_(source), 20))
    best = 0.0
    for size in (4096, 8192) if GPU else (512, 1024):
        a = torch.randn(size, size, device=DEVICE).to(BF16 if GPU else F32)
        best = max(best, 2 * size**3 / min(seconds(lambda a=a: a @ a, 10)))
    return {"copy_bytes_per_s": copying, "matmul_flops_per_s": best}


def random(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def codes(shape: tuple[int, ...], bits: int) -> tuple[Tensor, ...]:
    ratio, ratio_scale = zero_rows(shape, bits, True, device=DEVICE)
    root, root_scale = zero_rows(shape, bits, False, device=DEVICE)
    return ratio, ratio_scale, root, root_scale


def tasks(rows: int, cols: int, rank: int) -> list[Task]:
    """Operations on a matrix of this size; the short side is projected, as the optimizers do."""
    dtype = BF16 if GPU else F32
    size = dtype.itemsize
    matrix, tall = rows * cols, cols * rank
    w, g = random(rows, cols, dtype=dtype), random(rows, cols, dtype=dtype)
    basis, core = random(rows, rank), random(cols, rank) * 1e-4
    factors = 4 * rank * (rows + cols)
    flops = 2.0 * rows * cols * rank
    rounding = arguments.pack_key(12345, 0) if dtype == BF16 else None
    write = (arguments.pack_scalars(1e-3, 0.999), None, None, rounding)
    adam = arguments.pack_scalars(0.9, 0.999, 1e-8, 3.0)
    dense = arguments.pack_scalars(0.9, 0.999, 1e-8, 3.0, 1e-3, 0.999)
    noise = arguments.pack_key(54321, 3, 0)
    reduced = random(cols, rank)
    name = f"{rows}×{cols} r={rank}"
    lifted, nothing = (w, basis, core.mT, *write), (None, None, None, None, False)
    sign_bytes = 3 * size * matrix + 2 * factors
    phi = random(1, cols).abs()
    found = [
        Task("project", f"{name} left", (g, basis, False), size * matrix + factors, flops),
        Task("project", f"{name} right", (g, random(cols, rank), True), size * matrix + factors, flops),
        Task("project_with_norms", f"{name} left", (g, basis, False), size * matrix + factors, flops),
        Task("apply_", name, (*lifted, *nothing), 2 * size * matrix + factors, flops),
        Task("apply_", f"{name} φ⊙G", (*lifted, g, phi, None, None, False), 3 * size * matrix + factors, flops),
        Task("apply_", f"{name} sign", (*lifted, g, phi, basis, core.mT, True), sign_bytes, 2 * flops),
    ]
    for norms in ("", "with_norms_"):
        moments = (core.clone(), core.square())
        found.append(Task(f"adam_direct_{norms}", f"{cols}×{rank}", (reduced, *moments, adam, None), 24 * tall))
    for bits in (8, 4):
        coded = codes((cols, rank), bits)
        moved = tall * (8 + 4 * bits / 8)
        args = (reduced, *coded, None, adam, noise, None, bits, 256)
        found += [
            Task(f"coded_adam_direct_{norms}", f"{cols}×{rank} {bits} bits", args, moved)
            for norms in ("", "with_norms_")
        ]
    if rank != min(RANKS):
        return found
    found += [
        Task(
            "adam_dense_",
            name,
            (w, g, random(rows, cols), random(rows, cols).abs(), dense, None, rounding),
            matrix * (3 * size + 16),
        ),
        Task("apply_dense_", name, (w, random(rows, cols), *write), matrix * (2 * size + 4)),
        Task("stochastic_round_", name, (w, random(rows, cols), rounding), matrix * (size + 4)),
        Task(
            "lion_direct_",
            name,
            (random(rows, cols), random(rows, cols), arguments.pack_scalars(0.9, 0.99), None),
            16 * matrix,
        ),
    ]
    for bits in (8, 4):
        coded, share = codes((rows, cols), bits), bits / 8
        label, moved = f"{name} {bits} bits", matrix * (4 + share)
        args = (w, g, *coded, None, dense, noise, None, rounding, bits, 256)
        found.append(Task("coded_adam_dense_", label, args, matrix * (3 * size + 4 * share)))
        found += [
            Task("quantize_rows", label, (random(rows, cols), None, noise, bits, True, 256), moved),
            Task("dequantize_rows", label, (*coded[:2], None, bits, True, 256, cols, F32), moved),
            Task("pack_basis", label, (random(rows, cols), bits, 256), moved),
        ]
    return found


def products_of(backend: str, task: Task) -> int:
    """How many products at the measured rate the backend makes for one; the reference makes one in float32."""
    if not GPU or not task.flops or backend != "triton":
        return 1
    precision = torch.get_float32_matmul_precision()
    return 1 if precision == "medium" else 2 if task.op.startswith("project") or precision == "high" else 3


def by_definition(task: Task) -> Any:
    """The operation in torch ops, and so the operations that its definition calls."""
    before = os.environ.get(dispatch.VARIABLE)
    os.environ[dispatch.VARIABLE] = "reference"
    try:
        return dispatch._DEFINITIONS[task.op](*task.args)
    finally:
        os.environ.pop(dispatch.VARIABLE)
        if before is not None:
            os.environ[dispatch.VARIABLE] = before


def measure(task: Task, rate: dict[str, float], rounds: int) -> dict[str, Any]:
    """Seconds of every backend, and their ratios to the floor."""
    candidates = {"reference": lambda: by_definition(task)}
    for name, loaded in dispatch.backends().items():
        if isinstance(loaded, Loaded) and DEVICE.type in loaded.devices and task.op in loaded.operations:
            kernel = loaded.operations[task.op]
            if kernel(*task.args) is not NotImplemented:
                candidates[name] = lambda kernel=kernel: kernel(*task.args)
    took = interleaved(candidates, rounds)
    by_bytes, by_flops = task.bytes / rate["copy_bytes_per_s"], task.flops / rate["matmul_flops_per_s"]
    floor = max(by_bytes, by_flops)
    return {
        "op": task.op,
        "what": task.label,
        "precision": torch.get_float32_matmul_precision(),
        "floor_s": floor,
        "bound": "bytes" if by_bytes >= by_flops else "flops",
        "seconds": took,
        "over_floor": {name: value / floor for name, value in took.items()},
        "over_floor_of_its_products": {
            name: value / max(by_bytes, by_flops * products_of(name, task)) for name, value in took.items()
        },
    }


def refresh(rows: int, cols: int, rank: int, rounds: int) -> dict[str, Any]:
    """A refresh of one matrix by the range finder, the first and a later one, and the exact decomposition of the same gradient."""
    # The projector works on the gradient in the compute type, whatever its own.
    grad, projector = random(rows, cols), RandomizedSVD()
    space = projector.space((rows, cols), rank, "std", F32)
    state = projector.init(space, 1, DEVICE)
    first = projector.compute(Refresh(grad, space, state, 2, True))
    torch.linalg.svd(grad[:64, :64])  # loads the library
    took = {
        "torch.linalg.svd": common.timed(lambda: torch.linalg.svd(grad, full_matrices=False)),
        "first refresh": median(seconds(lambda: projector.compute(Refresh(grad, space, state, 2, True)), rounds)),
        "later refresh": median(seconds(lambda: projector.compute(Refresh(grad, space, first, 3)), rounds)),
    }
    faster = {name: took["torch.linalg.svd"] / value for name, value in took.items()}
    return {"what": f"refresh of {rows}×{cols} at rank {rank}", "seconds": took, "times_faster": faster}


def show(found: list[dict[str, Any]], title: str) -> None:
    """The table, by rich where it is installed."""
    names = sorted({name for row in found for name in row["seconds"]})
    header = ["operation", "what", "precision", "floor µs", "bound", *(f"{name}, times floor" for name in names)]
    lines = [
        [
            row["op"],
            row["what"],
            row["precision"],
            f"{row['floor_s'] * 1e6:.1f}",
            row["bound"],
            *(f"{row['over_floor'][name]:.2f}" if name in row["over_floor"] else "–" for name in names),
        ]
        for row in found
    ]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("\n".join("  ".join(line) for line in [header, *lines]))
        return
    table = Table(title=title)
    for column in header:
        table.add_column(column)
    for line in lines:
        table.add_row(*line)
    Console(width=200).print(table)


RANKS: list[int] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20 if GPU else 10)
    parser.add_argument("--ranks", default="128,512,1024" if GPU else "16,64,128")
    parser.add_argument("--seconds", type=float, default=240.0, help="start no further measurement after this time")
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    options = parser.parse_args()
    RANKS[:] = map(int, options.ranks.split(","))
    torch.manual_seed(0)
    began, rate, found, left_out = time.monotonic(), rates(), [], []
    sizes = [(4096, 4096), (4096, 11008)] if GPU else [(512, 512), (512, 1376)]
    for rows, cols in sizes:
        for rank in RANKS:
            for task in tasks(rows, cols, rank):
                for setting in ("highest", "high", "medium") if GPU and task.flops else ("highest",):
                    if time.monotonic() - began > options.seconds:
                        left_out.append(f"{task.op} {task.label} {setting}")
                        continue
                    torch.set_float32_matmul_precision(setting)
                    found.append(measure(task, rate, options.rounds))
                    torch.set_float32_matmul_precision("highest")
    results: dict[str, Any] = {"rates": rate, "operations": found, "left_out": left_out}
    reached = f"{rate['copy_bytes_per_s'] / 1e9:.0f} GB/s, {rate['matmul_flops_per_s'] / 1e12:.2f} Tflop/s"
    show(found, f"{common.environment()['device']}: {reached}")
    results["refresh"] = refresh(4096, 11008, 1024, 5) if GPU else refresh(*sizes[-1], max(RANKS), 3)
    print(results["refresh"])
    common.RESULTS = options.out
    common.write(f"kernels-{device_name()}", results)


def device_name() -> str:
    """The device's name as part of a file's."""
    name = torch.cuda.get_device_name() if GPU else "cpu"
    return "".join(c if c.isalnum() else "-" for c in name).strip("-").lower()


if __name__ == "__main__":
    main()
