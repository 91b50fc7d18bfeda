"""Where the step of a 7B matrix spends its time on a CPU, part by part, against the floor of its products and bytes.

    python benchmarks/seven_b_parts.py                # minutes on 2 cores; writes benchmarks/results/seven_b_parts.json

GaLore with 8-bit moments and basis, rank 1024, updates in backward with clipping, bfloat16 weights and gradients: the matrices of
LLaMA-7B one at a time (4096×4096, 11008×4096, 4096×11008), and the embedding (32000×4096), which is dense. Gradients are products of
two random matrices with 2048 inner columns of falling size, as of a sequence of 2048 tokens.

Parts (each without the parts that it calls):

    basis     the basis decoded                       floor: its codes read, float32 written
    project   R = G B                                 floor: the product in float32
    finite    norms for clipping and for NaN          floor: G read once
    direct    Adam on the codes                       floor: R read, N written, codes read and written
    columns   the scales of columns of the moments    at steps 1, 2, 4, 8, … after a refresh; no floor: none is needed
    apply     W ← W − η α N Bᵀ                        floor: the product in float32
    refresh   a new basis                             floor: its products with G, 4 for the first and 2 for each later one
    rest      what is in none of these

Floors of products are torch.mm of the same sizes, those of bytes are at the speed of a copy, measured in the same run.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any
from unittest import mock

import torch
from common import timed, write
from torch import Tensor

import lowrank_optim as lo
from lowrank_optim.in_backward import hooks
from lowrank_optim.projectors.dense_basis import DenseBasis
from lowrank_optim.step import low_rank
from lowrank_optim.step.batching import Launch
from lowrank_optim.step.nonfinite import SkippedUpdates
from lowrank_optim.step.param_step import ParamStep

MATRICES = ((4096, 4096), (11008, 4096), (4096, 11008))
EMBEDDING = (32000, 4096)
RANK, TOKENS = 1024, 2048
PLACES: tuple[tuple[Any, str, str], ...] = (
    (ParamStep, "basis", "basis"),
    (DenseBasis, "project", "project"),
    (SkippedUpdates, "check", "finite"),
    (hooks.kernels, "norm", "finite"),
    (Launch, "run", "direct"),
    (ParamStep, "fit_columns", "columns"),
    (DenseBasis, "apply_", "apply"),
    (low_rank, "refresh_if_due", "refresh"),
)
PARTS = tuple(dict.fromkeys(part for _, _, part in PLACES))


class Clock:
    """Seconds of functions by part, each without what it calls of other parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = []

    def wrap(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            self._inner.append(0.0)
            began = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                took = time.perf_counter() - began
                self.seconds[part] = self.seconds.get(part, 0.0) + took - self._inner.pop()
                if self._inner:
                    self._inner[-1] += took

        return run

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for owner, name, part in PLACES:
                stack.enter_context(mock.patch.object(owner, name, self.wrap(getattr(owner, name), part)))
            yield


def gradient(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    sizes = torch.arange(1, TOKENS + 1).rsqrt() * 1e-4
    left = torch.randn(shape[0], TOKENS, generator=generator) * sizes
    return (left @ torch.randn(TOKENS, shape[1], generator=generator)).bfloat16()


def steps_of(shape: tuple[int, int], rank: int | None, kinds: dict[int, str], gap: int) -> dict[str, dict[str, float]]:
    """Seconds by part of the steps of one matrix; those of one kind by their median."""
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.02).bfloat16())
    group = {"params": [param]} | ({} if rank is None else {"rank": rank})
    options: dict[str, Any] = {} if rank is None else {"update_proj_gap": gap, "stagger": False}
    optimizer = lo.GaLoreAdamW8bit([group], lr=1e-4, **options)
    handle = lo.update_in_backward(optimizer, max_grad_norm=1.0)
    found: dict[str, list[dict[str, float]]] = {}
    grads = [gradient(shape, generator) for _ in range(2)]
    for step in range(1, max(kinds) + 1):
        param.grad, clock = grads[step % 2].clone(), Clock()
        with clock.watching():
            whole = timed(lambda: handle.on_gradient(param))
        optimizer.step()
        rest = whole - sum(clock.seconds.values())
        if step in kinds:
            found.setdefault(kinds[step], []).append({**clock.seconds, "rest": rest, "whole": whole})
    return {
        kind: {part: median(run.get(part, 0.0) for run in runs) for part in (*PARTS, "rest", "whole")}
        for kind, runs in found.items()
    }


def floors_of(shape: tuple[int, int], rank: int | None, copy: float, rounds: int) -> dict[str, float]:
    """Seconds that no implementation can save; `copy` is seconds per byte read or written."""
    m, n = shape
    if rank is None:
        return {"finite": 2 * m * n * copy, "direct": m * n * (2 + 2 * 2 + 2 * 2) * copy}
    long, short = max(shape), min(shape)
    grad, basis = torch.randn(long, short), torch.randn(short, rank)
    reduced, weight = torch.empty(long, rank), torch.empty(long, short)
    project = median(timed(lambda: torch.mm(grad, basis, out=reduced)) for _ in range(rounds))
    apply = median(timed(lambda: torch.mm(reduced, basis.T, out=weight)) for _ in range(rounds))
    return {
        "basis": short * rank * (1 + 4) * copy,
        "project": project,
        "finite": 2 * m * n * copy,
        "direct": long * rank * (4 + 4 + 2 * 2) * copy,
        "apply": apply,
        "refresh": 2 * project,
        "first refresh": 4 * project,
    }


def seconds_of_a_byte(rounds: int) -> float:
    """Of one that is read or written, by a copy of half a gigabyte."""
    source = torch.randn(2**27)
    target = torch.zeros_like(source)
    return median(timed(lambda: target.copy_(source)) for _ in range(rounds)) / (2 * 4 * source.numel())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of floors (default 5)")
    parser.add_argument("--divide", type=int, default=1, metavar="N", help="sizes and rank by N, printed only")
    args = parser.parse_args()
    copy = seconds_of_a_byte(args.rounds)
    # A refresh at steps 1 and 10; columns are measured 1, 2, 4, 8 steps after it.
    low = {1: "first", 2: "columns", **dict.fromkeys((3, 5, 6, 7, 9), "ordinary"), 10: "refresh"}
    results: dict[str, Any] = {"copy_gb_per_second": 1e-9 / copy, "matrices": {}}
    for shape in (*MATRICES, EMBEDDING):
        rank = None if shape == EMBEDDING else RANK // args.divide
        shape = shape[0] // args.divide, shape[1] // args.divide
        kinds = {number: kind for number, kind in low.items() if rank is not None or kind != "refresh"}
        steps, floors = steps_of(shape, rank, kinds, 9), floors_of(shape, rank, copy, args.rounds)
        results["matrices"]["×".join(map(str, shape))] = {"seconds": steps, "floors": floors}
        print(f"{shape[0]}×{shape[1]}, rank {rank}; floors {', '.join(f'{k} {v:.3f}' for k, v in floors.items())}")
        for kind, parts in steps.items():
            print(f"  {kind:9}", ", ".join(f"{part} {seconds:.3f}" for part, seconds in parts.items()), flush=True)
    if args.divide == 1:
        write("seven_b_parts", results)


if __name__ == "__main__":
    main()
