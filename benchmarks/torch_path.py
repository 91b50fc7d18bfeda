"""Time of a step without compiled kernels, as on machines without a compiler, on MPS, or on a GPU without Triton.

    dense        AdamW with 8-bit state on a 13 M parameter stack of float32 matrices, beside torch's fused AdamW and the peers
    matrices     GaLoreAdamW with float32 state on the matrices of a LLaMA-350M layer, beside galore-torch
    projection   R = G B and GᵀB of a bfloat16 gradient by `torch.set_float32_matmul_precision`, with the error of R; CPU

Interleaved rounds, medians and minima. `--cpu-time` counts the time of the processor in place of that of the clock: for one thread on
a machine that others use, too.

    OMP_NUM_THREADS=1 python benchmarks/torch_path.py [--rounds 15] [--ranks 64 256] [--cpu-time]
"""

import argparse
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from common import environment, reason, rounds_of, write
from step_time import DENSE, FUSED, LAYERS, PEERS_DENSE, Build, galore_torch, gradients, ours, ours_dense, prepare

import lowrank_optim as lo
from lowrank_optim import kernels
from lowrank_optim.kernels.dispatch import VARIABLE
from lowrank_optim.kernels.reference import has_bfloat16_units

Clock = Callable[[], float]


def measure(candidates: dict[str, Callable[[], object]], rounds: int, clock: Clock) -> dict[str, Any]:
    """Seconds by name: the median and the least of interleaved rounds."""
    times = rounds_of(candidates, rounds, warmup=0, clock=clock)
    return {name: {"median_s": median(values), "least_s": min(values)} for name, values in times.items()}


def compare(builds: dict[str, Build], shapes: Any, rank: int, rounds: int, clock: Any, base: str) -> dict[str, Any]:
    """Times of steps, their ratios to those of `base`, and the reasons why others are not there."""
    grads, ready, missing = gradients(shapes, "cpu", torch.float32), {}, {}
    for name, build in builds.items():
        try:
            ready[name] = prepare(build, grads, rank)[0]
        except Exception as why:  # noqa: PERF203 a peer that does not run here is a result, too
            missing[name] = reason(why)
    found = measure(ready, rounds, clock)
    for name, row in found.items():
        if base in found:
            row["over_base"] = row["median_s"] / found[base]["median_s"]
            row["least_over_base"] = row["least_s"] / found[base]["least_s"]
            print(f"  {name:44} {row['median_s'] * 1e3:9.2f} ms {row['over_base']:7.2f}× {base}")
    for name, why in missing.items():
        print(f"  {name:44} {why}")
    return {"base": base, "steps": found, "skipped": missing}


def projection(rank: int, rounds: int, clock: Any) -> dict[str, Any]:
    """Seconds and relative errors of projecting a bfloat16 gradient, by side and precision."""
    found: dict[str, Any] = {"has_bfloat16_units": has_bfloat16_units()}
    for rows, cols in sorted(set(LAYERS["cpu"])):
        grad = torch.randn(rows, cols).to(torch.bfloat16)
        for side, dim, matrix in (("right", cols, grad), ("left", rows, grad.mT)):
            basis = torch.linalg.qr(torch.randn(dim, rank)).Q
            exact = matrix.double() @ basis.double()
            for setting in ("highest", "medium"):
                torch.set_float32_matmul_precision(setting)
                run = {"project": lambda g=grad, b=basis, s=side: kernels.project(g, b, s)}
                took = measure(run, rounds, clock)["project"]
                error = float((run["project"]().double() - exact).norm() / exact.norm())
                torch.set_float32_matmul_precision("highest")
                label = f"{rows}x{cols} {side} rank {rank} {setting}"
                found[label] = {**took, "tflops": 2e-12 * rows * cols * rank / took["least_s"], "error": error}
                print(
                    f"  {label:36} {took['median_s'] * 1e3:9.2f} ms {found[label]['tflops']:6.2f} Tflop/s {error:9.1e}"
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--ranks", type=int, nargs="*", default=[64, 256])
    parser.add_argument("--backend", choices=["torch", "reference"], default="torch")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--name", default="torch_path", help="of the JSON in benchmarks/results")
    options = parser.parse_args()
    os.environ[VARIABLE] = options.backend
    clock = time.process_time if options.cpu_time else time.perf_counter
    print(environment())
    results: dict[str, Any] = {"backend": options.backend, "clock": clock.__name__}
    print("dense, 13.6 M parameters, float32")
    dense = {**PEERS_DENSE, "GaLoreAdamW without rank, 8-bit state": ours_dense(8)}
    results["dense"] = compare(dense, DENSE, 0, options.rounds, clock, FUSED)
    for rank in options.ranks:
        print(f"matrices of a LLaMA-350M layer, float32, rank {rank}, between refreshes")
        both: dict[str, Build] = {"galore-torch GaLoreAdamW": galore_torch, "GaLoreAdamW": ours(lo.GaLoreAdamW)}
        results[f"matrices, rank {rank}"] = compare(
            both, LAYERS["cpu"], rank, options.rounds, clock, "galore-torch GaLoreAdamW"
        )
        results[f"projection, rank {rank}"] = projection(rank, options.rounds, clock)
    write(options.name, results)


if __name__ == "__main__":
    main()
