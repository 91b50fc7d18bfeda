"""The plan of one of several processes beside what that process allocates: a small LLaMA under FSDP2 and DDP, with gloo, on the CPU.

    python benchmarks/planner_processes.py            # writes results/planner_processes.json, and docs/memory.md shows it

Every process trains for three steps. Measured are the bytes of its weights and of its optimizer state, and the most that torch's CPU
allocator has handed out at once, as the profiler records it, after the model was built and split: while it is built it is whole.
Peaks differ from run to run: gloo keeps the buffers of a message until its threads are done with it. So there are several runs, and
the least and the most of all processes are noted.
"""

import argparse
import gc
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import write
from planner_validation import CONFIG, example, initialize
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import lowrank_optim as lo
from lowrank_optim.planner.choices import resolve_optimizer
from lowrank_optim.planner.models import resolve_model

SEQUENCES, LENGTH, RUNS = 1, 128, 3
GALORE, GALORE_8BIT, APOLLO = (("galore", 64), ("galore_8bit", 64), ("apollo", 64))
WAYS: tuple[tuple[str, tuple[str, int | None], bool], ...] = (
    ("FSDP2", ("adamw", None), False),
    ("FSDP2", GALORE, False),
    ("FSDP2", APOLLO, False),
    ("FSDP2", GALORE_8BIT, False),
    ("FSDP2", GALORE_8BIT, True),
    ("DDP", ("adamw", None), False),
    ("DDP", GALORE_8BIT, False),
)
"""How the model is spread, the optimizer with its rank, and whether it updates in backward."""

MARK = 12_345  # floats of a tensor that marks a moment in the profiler's record


def local(tensor: Tensor) -> int:
    """Bytes on this process."""
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return own.numel() * own.element_size()


def split(model: nn.Module, how: str) -> nn.Module:
    """The model on this process: a share of every layer, or a copy."""
    if how == "DDP":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in next(module for module in model.modules() if isinstance(module, nn.ModuleList)):
        fully_shard(layer, mesh=mesh)
    whole = fully_shard(model, mesh=mesh)
    for module in model.modules():
        if hasattr(module, "set_force_sum_reduction_for_comms"):  # gloo of some versions of torch takes AVG for SUM
            module.set_force_sum_reduction_for_comms(True)
    return whole


def optimizer_of(name: str, rank: int | None) -> Any:
    """As `lo.plan` takes it."""
    return name if rank is None else (name, {"rank": rank})


def measure(how: str, optimizer: Any, in_backward: bool) -> dict[str, int]:
    """Bytes of this process: weights, state, and the most at once."""
    chosen = resolve_model(CONFIG)
    inputs = example(chosen, (SEQUENCES, LENGTH))
    gc.collect()  # the last model, which hooks hold in a circle, must not be freed within the record
    dist.barrier()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        model = chosen.build(torch.float32, None).to_empty(device="cpu")
        initialize(model)
        called = split(model, how)
        made = resolve_optimizer(optimizer).build(model)
        if in_backward:
            lo.update_in_backward(made)
        torch.zeros(MARK)
        for _ in range(3):
            called(**inputs)["loss"].backward()
            made.step()
            made.zero_grad()
    now = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = 0 if abs(event.nbytes()) == 4 * MARK else max(peak, now)
    state = [t for s in made.state.values() for t in s.values() if isinstance(t, Tensor)]
    weights = sum(local(t) for t in (*model.parameters(), *model.buffers()))
    return {"weights": weights, "state": sum(map(local, state)), "peak": peak}


def worker(rank: int, world: int, folder: str) -> None:
    """All ways in one process; its numbers go to a file."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    measure("FSDP2", "adamw", False)  # what libraries allocate once, and keep
    found = [
        [measure(how, optimizer_of(*chosen), in_backward) for _ in range(RUNS)] for how, chosen, in_backward in WAYS
    ]
    Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def run(world: int) -> list[dict[str, Any]]:
    """A row for each way: what was planned, what was measured, and the first over the second."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (world, folder), nprocs=world)
        found = [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(world)]
    rows = []
    for (how, (name, rank), in_backward), *processes in zip(WAYS, *found, strict=True):
        plan = lo.plan(
            CONFIG,
            optimizer_of(name, rank),
            batch_size=SEQUENCES,
            sequence_length=LENGTH,
            dtype="float32",
            device="cpu",
            activation_checkpointing=False,
            in_backward=in_backward,
            world_size=world,
            fsdp=how == "FSDP2",
        )
        planned = {"weights": plan.weights_bytes, "state": sum(plan.state.values()), "peak": plan.peak_bytes}
        runs = [run for process in processes for run in process]
        measured = {kind: max(run[kind] for run in runs) for kind in planned}
        measured["least peak"] = min(run["peak"] for run in runs)
        row = {"how": how, "processes": world, "optimizer": name, "rank": rank, "in_backward": in_backward}
        row |= {"planned": planned, "measured": measured}
        row["planned_over_measured"] = [round(planned["peak"] / measured[k], 3) for k in ("peak", "least peak")]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    args = parser.parse_args()
    rows = [row for world in args.processes for row in run(world)]
    for row in rows:
        sizes = "  ".join(
            f"{kind} {row['planned'][kind] / 2**20:.2f} planned, {row['measured'][kind] / 2**20:.2f} MiB"
            for kind in ("weights", "state", "peak")
        )
        sizes += f" (least {row['measured']['least peak'] / 2**20:.2f})"
        print(f"{row['how']:<6}{row['processes']} {row['optimizer']:<12} in_backward={row['in_backward']!s:<6} {sizes}")
    write("planner_processes", {"model": CONFIG, "sequences": SEQUENCES, "length": LENGTH, "runs": RUNS, "rows": rows})


if __name__ == "__main__":
    main()
