"""LLaMA-7B on a machine of 24 GB without a GPU: does it train, and was the planner right about the memory?

    python benchmarks/seven_b_cpu.py                                   # GaLore in 8 bits, 20 steps; hours on 2 cores
    python benchmarks/seven_b_cpu.py --only qgalore --steps 3
    python benchmarks/seven_b_cpu.py --only adamw                      # the largest LLaMA that AdamW fits into the same memory
    python benchmarks/seven_b_cpu.py --layers 8 --steps 3              # a cut: how long is the first step, which takes all bases?
    python benchmarks/seven_b_cpu.py --model 60m --length 64 --steps 4 # the whole path on a small model

bfloat16 weights, rank 1024, activation checkpointing, updates in backward, one sequence of `--length` bytes of the standard library's
source a step, as token ids of a vocabulary of 32,000. The gap between refreshes is 10, staggered. On a processor without units for
bfloat16, linear layers multiply in float32, a tile of the weight at a time: torch's own products are eight times slower there.

Memory is what the operating system says the process has (resident memory, a thread reads it every 50 ms), less what it had before
the model was built: interpreter and libraries. The peak beside the plan is that of the steps. The building has one of its own: int8
weights and sparse plus low-rank layers are made of 16-bit weights. The plan is the planner's peak for the CPU. A run is refused where
the machine has less than the plan free. glibc's allocator keeps freed blocks in its heap and grows beyond the plan: the threshold
from which blocks go back to the system is set to 1 MB.

`--save FOLDER` writes a checkpoint after each step (or after every `--save-every`), tensor by tensor without a second copy of the
model, and the same command continues it. Steps that a killed process had done after its last checkpoint are done again; the result
has the losses of both (`repeated`), which are equal to the bit.

Each run writes benchmarks/results/seven_b_cpu_NAME.json; that of `--model` is printed only.
"""

import argparse
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

LOCAL = Path(__file__).resolve().parent
sys.path[:0] = [str(LOCAL), str(LOCAL / "gpu"), str(LOCAL.parent / "examples")]

import torch  # noqa: E402
from common import write  # noqa: E402
from pretraining.configs import SIZES, build_model  # noqa: E402
from pretraining.host import available, fast_products, give_blocks_back, resident  # noqa: E402
from seven_b import DESCENDING, VOCABULARY, fields, text_batches  # noqa: E402

import lowrank_optim as lo  # noqa: E402
from lowrank_optim.planner.choices import resolve_optimizer  # noqa: E402
from lowrank_optim.planner.parametrizations import resolve_parametrization  # noqa: E402
from lowrank_optim.planner.simulation.allocator import GIB  # noqa: E402

GAP, RANK, DENSITY = 10, 1024, 0.05
PARTS = ("forward", "backward", "step")
LOW_RANK = {"rank": RANK, "update_proj_gap": GAP}
RUNS: dict[str, dict[str, Any]] = {
    "galore_8bit": {"optimizer": ("galore_8bit", LOW_RANK), "lr": 1e-3},
    "qgalore": {"optimizer": ("qgalore", LOW_RANK), "weight_bits": 8, "lr": 1e-3},
    "apollo_mini": {"optimizer": ("apollo_mini", {"update_proj_gap": GAP}), "lr": 1e-4},
    "sltrain": {
        "optimizer": ("LowRankOptimizer", {"rule": "adam", "state_bits": 8}),
        "parametrization": ("sltrain", {"density": DENSITY}),
        "lr": 1e-4,
    },
    "adamw": {"optimizer": ("adamw", {}), "in_backward": False, "lr": 1e-4},
}


# Memory of this process -------------------------------------------------------------------------------------------------------


class Resident:
    """The largest resident memory, read by a thread; what there was at the beginning counts apart, and the building of the model."""

    def __init__(self, every: float = 0.05) -> None:
        self.before = self.peak = self.peak_of_building = resident()
        self._every, self._ended = every, threading.Event()

    @contextmanager
    def watched(self) -> Iterator[None]:
        def watch() -> None:
            while not self._ended.wait(self._every):
                self.peak = max(self.peak, resident())

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def built(self) -> None:
        """From now on the peak is that of the steps: 8-bit weights and factors are made of 16-bit weights, which are gone then."""
        self.peak_of_building, self.peak = self.peak, resident()


# One run ----------------------------------------------------------------------------------------------------------------------


def layers_of(run: dict[str, Any], size: str) -> Any:
    """The parametrization of a run, with a quarter of the hidden size for rank: 1024 for 7B."""
    if "parametrization" not in run:
        return None
    name, options = run["parametrization"]
    return name, {"rank": SIZES[size].hidden // 4, **options}


def predict(run: dict[str, Any], size: str, length: int) -> Any:
    return lo.plan(
        fields(size),
        run["optimizer"],
        parametrization=layers_of(run, size),
        sequence_length=length,
        in_backward=run.get("in_backward", True),
        activation_checkpointing=True,
        weight_bits=run.get("weight_bits", 16),
        device="cpu",
    )


def build(run: dict[str, Any], size: str, length: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = build_model(size, VOCABULARY, length, torch.device("cpu"), torch.bfloat16, True, 0)
    if run.get("weight_bits") == 8:
        model = lo.nn.quantize_weights_(model)
    if (layers := resolve_parametrization(layers_of(run, size))) is not None:
        layers.convert(model)
    name, options = run["optimizer"]
    optimizer = resolve_optimizer((name, {"lr": run["lr"], **options})).build(model)
    if run.get("in_backward", True):
        lo.update_in_backward(optimizer, max_grad_norm=1.0)
    return model, optimizer


def train(
    run: dict[str, Any], size: str, length: int, steps: int, folder: Path | None, save_every: int
) -> dict[str, Any]:
    """Memory, losses and times of a run, from the building of the model on."""
    memory = Resident()
    with memory.watched(), fast_products(torch.device("cpu"), torch.bfloat16):
        began = time.perf_counter()
        model, optimizer = build(run, size, length)
        seconds_to_build = time.perf_counter() - began
        memory.built()
        print(f"built in {seconds_to_build:.0f} s, {(resident() - memory.before) / GIB:.2f} GiB", flush=True)
        record = restore(folder, model, optimizer)
        losses, seconds, peak_before = record["losses"], record["seconds"], record["peak_resident_bytes"]
        seconds["build"].append(seconds_to_build)
        if len(losses) >= steps:
            raise SystemExit(f"all {steps} steps are done: nothing was measured, and no result written")
        batches = text_batches(length, torch.device("cpu"))
        for step in range(len(losses), steps):
            times = [time.perf_counter()]
            tokens = batches[step % len(batches)]
            loss = model(input_ids=tokens, labels=tokens).loss
            times.append(time.perf_counter())
            loss.backward()
            times.append(time.perf_counter())
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter())
            losses.append(float(loss.detach()))
            for i, part in enumerate(PARTS):
                seconds[part].append(times[i + 1] - times[i])
            took = [sum(parts) for parts in zip(*(seconds[part] for part in PARTS), strict=True)]
            record["peak_resident_bytes"] = max(peak_before, memory.peak - memory.before)
            above, left = (memory.peak - memory.before) / GIB, (steps - step - 1) * (median(took[1:] or took))
            print(
                f"step {step + 1} of {steps}: loss {losses[-1]:.6f}, {took[-1]:.0f} s, peak {above:.2f} GiB beside "
                f"{memory.before / GIB:.2f} of interpreter and libraries, about {left / 60:.0f} min left",
                flush=True,
            )
            if folder is not None:
                with (folder / "steps.jsonl").open("a", encoding="ascii") as lines:
                    lines.write(json.dumps([step + 1, losses[-1]]) + "\n")
                if (step + 1) % save_every == 0:
                    save(folder, model, optimizer, record)
    if not all(map(math.isfinite, losses)):
        raise SystemExit(f"a loss is not finite: {losses}")
    record["peak_resident_bytes"] = max(peak_before, memory.peak - memory.before)
    return {
        **record,
        "peak_resident_bytes_of_building": memory.peak_of_building - memory.before,
        "interpreter_bytes": memory.before,
        "repeated": repeated(folder),
    }


# Checkpoints ------------------------------------------------------------------------------------------------------------------


def save(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, record: dict[str, Any]) -> None:
    """Written tensor by tensor from where they lie, and put in the place of the one before at the end."""
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "record": record}
    torch.save(content, folder / "checkpoint.pt.tmp")
    os.replace(folder / "checkpoint.pt.tmp", folder / "checkpoint.pt")


def restore(folder: Path | None, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What is known of the steps that are done; tensors are read from the file when they are copied."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if (path := folder / "checkpoint.pt").exists():
            content = torch.load(path, mmap=True, weights_only=True)
            model.load_state_dict(content["model"])
            optimizer.load_state_dict(content["optimizer"])
            record: dict[str, Any] = content["record"]
            record["continued_after"].append(len(record["losses"]))
            print(f"continuing after step {len(record['losses'])}", flush=True)
            return record
    seconds: dict[str, list[float]] = {part: [] for part in ("build", *PARTS)}
    return {"losses": [], "seconds": seconds, "peak_resident_bytes": 0, "continued_after": []}


def repeated(folder: Path | None) -> dict[str, list[float]]:
    """The losses of the steps that were done more than once, since the first process was killed after them."""
    done: dict[str, list[float]] = {}
    if folder is not None:
        for line in (folder / "steps.jsonl").read_text(encoding="ascii").splitlines():
            step, loss = json.loads(line)
            done.setdefault(str(step), []).append(loss)
    return {step: losses for step, losses in done.items() if len(losses) > 1}


# The command ------------------------------------------------------------------------------------------------------------------


def choose_size(run: dict[str, Any], length: int, limit: int) -> str:
    """The largest LLaMA whose plan fits."""
    for size in DESCENDING:
        if predict(run, size, length).peak_bytes <= limit:
            return size
    raise SystemExit(f"no size fits {limit / GIB:.1f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=RUNS, default="galore_8bit", help="the run (default galore_8bit)")
    parser.add_argument("--model", choices=SIZES, help="this size")
    parser.add_argument("--layers", type=int, metavar="N", help="only the first N layers of it")
    parser.add_argument("--length", type=int, default=2048, help="tokens of the sequence (default 2048)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--save", type=Path, metavar="FOLDER", help="write a checkpoint after each step, and continue it"
    )
    parser.add_argument(
        "--save-every", type=int, default=1, metavar="N", help="a checkpoint after every N steps (default 1)"
    )
    parser.add_argument("--note", default="", help="what else the machine did, for the JSON")
    args = parser.parse_args()
    print(give_blocks_back())
    run, free = RUNS[args.only], available() or 0
    size = args.model or ("7b" if run.get("in_backward", True) else choose_size(run, args.length, free))
    name = f"seven_b_cpu_{args.only}"
    if args.layers:
        name += f"_{args.layers}_layers"
        SIZES[f"{args.layers} layers of {size}"] = replace(SIZES[size], layers=args.layers)
        size = f"{args.layers} layers of {size}"
    plan = predict(run, size, args.length)
    print(f"{args.only}, {size}: {plan.peak_bytes / GIB:.2f} GiB planned, {free / GIB:.2f} GiB free", flush=True)
    if plan.peak_bytes > free:
        raise SystemExit(
            "the machine has less memory free than the plan needs; end other programs, or take a smaller --model"
        )
    found = train(run, size, args.length, args.steps, args.save, args.save_every)
    error = plan.peak_bytes / found["peak_resident_bytes"] - 1.0
    print(
        f"peak {found['peak_resident_bytes'] / GIB:.2f} GiB, {plan.peak_bytes / GIB:.2f} planned ({error:+.1%}), "
        f"loss {found['losses'][0]:.2f} → {found['losses'][-1]:.2f}"
    )
    results = {
        "model": size,
        "length": args.length,
        "note": args.note,
        "planned_bytes": plan.peak_bytes,
        "error_of_plan": error,
    }
    results |= {"run": json.loads(json.dumps(run)), **found}
    if args.model is None:
        write(name, results)


if __name__ == "__main__":
    main()
