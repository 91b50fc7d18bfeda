"""What the benchmarks share: where they ran and with what, fair timing, and the JSON they write."""

import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lowrank_optim.console import accept_any_text

RESULTS = Path(__file__).parent / "results"
PACKAGES = {
    "apollo_torch": "apollo-torch",
    "bitsandbytes": "bitsandbytes",
    "galore_torch": "galore-torch",
    "torchao": "torchao",
    "transformers": "transformers",
    "triton": "triton",
}
"""Modules that measurements use, peers first, and the distributions they come from."""

accept_any_text()  # every benchmark is a script that imports this module and prints


def environment() -> dict[str, Any]:
    """The device, the versions and the date of a measurement. Call it after the measurement: peers are imported when they run."""
    cuda = torch.cuda.is_available()
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if cuda else cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "packages": packages(),
    }


def packages() -> dict[str, str]:
    """The versions of the peers, and of other packages, that this process has imported."""
    return {name: _version(name) for module, name in PACKAGES.items() if module in sys.modules}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # a checkout on the path
        return "not installed by pip"


_ON_GPU = torch.cuda.is_available()  # asked once: the question takes as long as a small kernel


def _synchronize() -> None:
    if _ON_GPU:
        torch.cuda.synchronize()


def timed(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one run, from an idle device to an idle device."""
    _synchronize()
    start = clock()
    run()
    _synchronize()
    return clock() - start


def rounds_of(
    candidates: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each candidate, all measured in every round, so that a noisy machine disturbs them alike.

    Each round has an order of its own: what a candidate finds in the caches is what the one before has left there.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order, shuffle = list(candidates), random.Random(0).shuffle
    for i in range(rounds + warmup):
        shuffle(order)
        for name in order:
            seconds = timed(candidates[name], clock)
            if i >= warmup:
                times[name].append(seconds)
    return times


def interleaved(candidates: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, float]:
    """Median seconds of each candidate, see `rounds_of`."""
    return {name: median(values) for name, values in rounds_of(candidates, rounds, warmup).items()}


def parameters(shapes: Iterable[tuple[int, int]], generator: torch.Generator) -> list[torch.nn.Parameter]:
    """Weights with gradients."""
    params = []
    for shape in shapes:
        param = torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.02)
        param.grad = torch.randn(shape, generator=generator) * 1e-3
        params.append(param)
    return params


def reason(why: Exception) -> str:
    """Why a candidate has no result, in one line."""
    return f"{type(why).__name__}: {why}".splitlines()[0][:200]


def write(name: str, results: Any) -> Path:
    """Write benchmarks/results/NAME.json with the environment beside the results."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), "results": results}, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return path
