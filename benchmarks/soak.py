"""A training run that is killed again and again ends with the same bits as one that nothing disturbs.

    python benchmarks/soak.py [--kills 12] [--steps 120] [--seed 0]

One process: the main job with GaLore in 8 bits, updates in backward and four micro-batches a step is killed (SIGKILL) at random
moments, one drawn from each of `--kills` equal parts of the run, and continued each time. It saves every three steps; every third
kill waits until a checkpoint is being written. Afterwards the checkpoints of both runs are compared: every tensor of
weights, state and random generators, and every row of metrics.

Two processes under fully_shard (gloo): one of them is killed while a checkpoint is written, as often as `--sharded-kills` says. The
last checkpoints of both runs are compared tensor by tensor.

Writes benchmarks/results/soak.json.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import torch
from common import write
from pretraining import checkpoint
from pretraining.folder import TEMPORARY
from pretraining.run import read_metrics
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

EXAMPLE = Path(__file__).parent.parent / "examples" / "pretrain.py"
METHOD = ["--optimizer", "galore_8bit", "--in-backward", "--clip", "0"]
METHOD += ["--accumulate", "4", "--batch", "4", "--length", "64"]
MOST_SECONDS = 600.0
"""Without an event that is waited for."""


def begin(folder: Path, *arguments: str, processes: int = 1) -> subprocess.Popen[bytes]:
    """The main job in a process of its own, or in several below torchrun; it continues what is in the folder."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, str(EXAMPLE), *METHOD, *arguments, "--resume", "--out", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def until(happened: Callable[[], bool], process: subprocess.Popen[bytes], every: float = 0.002) -> bool:
    """Wait for an event; whether it came before the end of the process."""
    end = time.monotonic() + MOST_SECONDS
    while not happened():
        if process.poll() is not None:
            return happened()
        if time.monotonic() > end:
            process.kill()
            raise TimeoutError(f"nothing happened in {MOST_SECONDS:.0f} s")
        time.sleep(every)
    return True


def finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    if process.wait(timeout=6 * MOST_SECONDS) != 0:
        raise SystemExit(f"the run failed: see {folder.with_suffix('.log')}")


def differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """The names of all parts in which two checkpoints are not the same to the bit, but for `seconds`."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        if not same or not torch.equal(
            a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
        ):
            yield where
    elif isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys(), key=str):
            if key not in a or key not in b:
                yield f"{where}/{key}"
            elif key not in ("seconds", "metrics_bytes"):  # metrics hold seconds, whose digits differ in number
                yield from differences(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{where}/{i}")
    elif a != b:
        yield where


def losses(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_metrics(folder)]


# One process ------------------------------------------------------------------------------------------------------------------


def one_process(folder: Path, steps: int, kills: int, draw: random.Random) -> dict[str, Any]:
    """Kill a run at random moments of random steps."""
    arguments = ("--steps", str(steps), "--save-every", "3", "--validate-every", "20")
    whole, broken = folder / "whole", folder / "broken"
    finish(begin(whole, *arguments), whole)
    metrics, unfinished = broken / "metrics.jsonl", broken / f"checkpoint.pt{TEMPORARY}"
    pace = read_metrics(whole)[-1]["seconds"] / steps
    killed = []
    for part in range(kills):
        step = 1 + int((part + draw.random()) * (steps - 2) / kills)
        process = begin(broken, *arguments)
        # A row of the metrics is not on the disk at once, so the moment after it is drawn as well.
        if until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= step, process):  # noqa: B023 (called at once)
            time.sleep(draw.uniform(0.0, 2 * pace))
        if part % 3 == 2:
            until(unfinished.exists, process, every=0.0001)
        process.send_signal(signal.SIGKILL)
        died = process.wait() == -signal.SIGKILL
        saving = unfinished.exists()
        killed.append({"step": metrics.read_bytes().count(b"\n"), "died": died, "while_saving": saving})
        print(
            f"killed {part + 1} of {kills} after step {killed[-1]['step']}" + (", in a save" if saving else ""),
            flush=True,
        )
    finish(begin(broken, *arguments), broken)
    parts = [checkpoint.load(run / "checkpoint.pt") for run in (whole, broken)]
    differing = list(differences(*parts))
    return {
        "steps": steps,
        "kills": killed,
        "differing_parts": differing,
        "equal_metrics": losses(whole) == losses(broken),
        "tensors": sum(1 for _ in tensors(parts[0])),
    }


def tensors(content: Any) -> Iterator[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict | list | tuple):
        for value in content.values() if isinstance(content, dict) else content:
            yield from tensors(value)


# Several processes ------------------------------------------------------------------------------------------------------------


def children(parent: int) -> list[int]:
    """The processes that torchrun has started."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii").split()]


def sharded(folder: Path, steps: int, kills: int, draw: random.Random) -> dict[str, Any]:
    """Kill one of two processes while both write a checkpoint."""
    arguments = ("--steps", str(steps), "--save-every", "5", "--fsdp")
    whole, broken = folder / "sharded", folder / "sharded-broken"
    finish(begin(whole, *arguments, processes=2), whole)
    killed = []
    for part in range(kills):
        step = 5 * draw.randint(1 + part * (steps // 5) // kills, max(1, (part + 1) * (steps // 5) // kills))
        target = broken / f"step-{step}"
        process = begin(broken, *arguments, processes=2)
        until(target.exists, process)
        victim = draw.choice(children(process.pid))
        os.kill(victim, signal.SIGKILL)
        process.wait(timeout=MOST_SECONDS)  # torchrun ends the other
        latest = (broken / "latest").read_text(encoding="utf-8") if (broken / "latest").exists() else None
        killed.append({"step": step, "while_saving": latest != target.name, "latest": latest})
        print(f"killed one of two in the save of step {step}; the latest whole one is {latest}", flush=True)
    finish(begin(broken, *arguments, processes=2), broken)
    parts = []
    for run in (whole, broken):
        dcp_to_torch_save(run / f"step-{steps}", run.with_suffix(".pt"))
        parts.append(torch.load(run.with_suffix(".pt"), weights_only=False))
    return {
        "steps": steps,
        "kills": killed,
        "differing_parts": list(differences(*parts)),
        "tensors": sum(1 for _ in tensors(parts[0])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--sharded-kills", type=int, default=3)
    parser.add_argument("--sharded-steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    if args.sharded_kills > args.sharded_steps // 5:
        parser.error("--sharded-kills must be at most a fifth of --sharded-steps: each kill falls into another save")
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "one_process": one_process(Path(folder), args.steps, args.kills, draw),
            "two_processes": sharded(Path(folder), args.sharded_steps, args.sharded_kills, draw),
        }
    for name, result in results.items():
        print(
            f"{name}: {len(result['kills'])} kills, {len(result['differing_parts'])} of {result['tensors']} tensors differ"
        )
    write("soak", results)
    if any(result["differing_parts"] for result in results.values()) or not results["one_process"]["equal_metrics"]:
        raise SystemExit("the runs differ")


if __name__ == "__main__":
    main()
