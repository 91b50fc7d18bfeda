"""Bytes on the wire in a step, counted in the collectives: AdamW and GaLore under DDP, GaLore with LowRankHook and under fully_shard.

    python benchmarks/distributed.py            # 2 and 4 gloo processes, then 7B by formula; writes results/distributed.json

Counted is what a process gives to a collective. Bytes that it sends are those of the ring algorithms, with p processes and S the
bytes of the whole tensor: all-reduce 2·S·(p−1)/p, reduce-scatter, all-gather and broadcast S·(p−1)/p. Steps are split into those
between two refreshes and refresh steps. What fully_shard itself moves (weights gathered twice, gradients scattered) is left out.
"""

import argparse
import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from common import write
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank_optim as lo
from lowrank_optim.distributed import LowRankHook

MATRICES, RANK = ((256, 96), (96, 256)), 16  # an "up" and a "down" projection
COLLECTIVES = {
    "all_reduce": 2.0,
    "reduce_scatter_single": 1.0,
    "reduce_scatter_tensor": 1.0,
    "all_gather_single": 1.0,
    "all_gather_into_tensor": 1.0,
    "broadcast": 1.0,
}


class Gathers(TorchDispatchMode):
    """Counts the gathers of DTensors, which do not go by the functions of torch.distributed."""

    def __init__(self, sent: dict[str, float]) -> None:
        super().__init__()
        self.sent = sent

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "_c10d_functional" and "all_gather" in op._schema.name:
            tensor, size = args[:2]
            self.sent["gather"] = self.sent.get("gather", 0.0) + tensor.numel() * tensor.element_size() * (size - 1)
        return op(*args, **(kwargs or {}))


@contextmanager
def counting(sent: dict[str, float]) -> Iterator[None]:
    """Add up the bytes that this process sends in the collectives that are called from Python."""
    real = {name: getattr(torch.distributed, name) for name in COLLECTIVES if hasattr(torch.distributed, name)}

    def counted(name: str) -> Any:
        def call(*tensors: Any, **options: Any) -> Any:
            group = options.get("group")
            size = torch.distributed.get_world_size(group)
            largest = max(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
            sent[name] = sent.get(name, 0.0) + COLLECTIVES[name] * largest * (size - 1) / size
            return real[name](*tensors, **options)

        return call

    from lowrank_optim.sharding import param_sharding as sharding

    kept = sharding._reduce_scatter, sharding._all_gather
    try:
        for name in real:
            setattr(torch.distributed, name, counted(name))
        sharding._reduce_scatter, sharding._all_gather = (
            counted(n) for n in ("reduce_scatter_tensor", "all_gather_into_tensor")
        )
        with Gathers(sent):
            yield
    finally:
        for name, function in real.items():
            setattr(torch.distributed, name, function)
        sharding._reduce_scatter, sharding._all_gather = kept


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=False) for m, n in MATRICES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def plain_hook(state: object, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What DDP does by itself, where it can be counted."""
    buffer = bucket.buffer().div_(torch.distributed.get_world_size())
    work = torch.distributed.all_reduce(buffer, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def measure(kind: str) -> dict[str, float]:
    """Bytes that a process sends in a step between two refreshes, and in one in which both matrices are refreshed."""
    torch.manual_seed(0)
    model: nn.Module = Model()
    options: dict[str, Any] = {"update_proj_gap": 4, "stagger": False}
    sharded = kind.startswith("fully_shard")
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
        options["proj_type"] = kind.split()[1]
        called = model
    else:
        called = DistributedDataParallel(model)
    rank = None if kind == "adamw ddp" else RANK
    optimizer = lo.GaLoreAdamW(lo.param_groups(model, rank=rank) if rank else model.parameters(), **options)
    if not sharded:
        called.register_comm_hook(None, LowRankHook(optimizer) if "hook" in kind else plain_hook)
    steps = []
    for step in range(6):
        sent: dict[str, float] = {}
        x = torch.randn(64, MATRICES[0][1], generator=torch.Generator().manual_seed(step))
        loss = called(x).square().mean()
        if sharded:
            loss.backward()
        with counting(sent):
            if not sharded:
                loss.backward()
            optimizer.step()
        optimizer.zero_grad()
        steps.append(sum(sent.values()))
    return {"between": steps[1], "refresh": steps[4]}


KINDS = ("adamw ddp", "galore ddp", "galore ddp hook", "fully_shard right", "fully_shard left")


def formula(kind: str, matrices: list[tuple[int, int]], rank: int, p: int, element: int = 4) -> dict[str, float]:
    """Bytes that a process sends in a step, for the same kinds; `element` bytes in a gradient, 4 in everything else."""
    ring, chunked = (p - 1) / p, lambda n: -(-n // p) * p
    whole = sum(2 * m * n * element for m, n in matrices) * ring
    short = [("right" if m >= n else "left", m, n) for m, n in matrices]
    if kind in ("adamw ddp", "galore ddp"):
        return {"between": whole, "refresh": whole}
    if kind == "galore ddp hook":
        reduced = sum(2 * rank * (m if side == "right" else n) * element for side, m, n in short) * ring
        return {"between": reduced, "refresh": whole}
    flags = 2 * 8 * len(matrices) * ring
    between, refresh = flags, flags
    for m, n in matrices:
        k = min(rank + 8, m, n)
        scalars = 2 * 4 * (1 + 1)  # is it usable, how large is it
        if kind.endswith("right"):
            # Gᵀ(G V) of the last round, its norms in two passes over columns, k×k of Y, and the basis once more to be sure.
            refresh += (scalars + 2 * 4 * (k * k + n * rank) + 4 * n * rank) * ring
        else:
            moved = 2 * 4 * chunked(n) * rank * ring
            between += moved
            refresh += moved
            refresh += (scalars + 2 * 4 * (n * k + rank * (k - rank) + 2 * rank * rank + rank) + 2 * 8 * rank) * ring
            refresh += 4 * chunked(m) * (k - rank) * ring
    return {"between": between, "refresh": refresh}


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world)
    found = {kind: measure(kind) for kind in KINDS}
    if rank == 0:
        Path(folder, f"{world}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def llama_7b() -> list[tuple[int, int]]:
    """(out, in) of the matrices of a LLaMA 7B: 32 layers."""
    hidden, inner = 4096, 11008
    return [(hidden, hidden)] * 4 * 32 + [(inner, hidden)] * 2 * 32 + [(hidden, inner)] * 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=1024, help="of the 7B table (default 1024)")
    args = parser.parse_args()
    counted: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for world in (2, 4):
            mp.spawn(worker, (world, folder), nprocs=world)
            counted[str(world)] = json.loads(Path(folder, f"{world}.json").read_text(encoding="utf-8"))
    checks = {}
    for world, kinds in counted.items():
        for kind, bytes_sent in kinds.items():
            expected = formula(kind, list(MATRICES), RANK, int(world))
            for step, value in bytes_sent.items():
                error = value / expected[step] - 1.0
                row = {"counted": value, "formula": expected[step], "error": error}
                checks[f"{kind}, {step}, {world} processes"] = row
                sizes = f"counted {value:12,.0f}  formula {expected[step]:12,.0f}  {error:+.2%}"
                print(f"{kind:20s} {step:8s} {world} processes  {sizes}")
    table = {}
    for p in (8, 16, 32, 64, 128, 256, 512, 1024):
        table[p] = {kind: formula(kind, llama_7b(), args.rank, p, element=2) for kind in KINDS}
        line = "  ".join(f"{kind} {table[p][kind]['between'] / 2**20:,.2f}" for kind in KINDS)
        print(f"7B, {p:5d} processes, MiB a step between refreshes: {line}")
    results = {
        "what": "bytes that one process sends in a step, without what fully_shard itself moves; "
        "'refresh': every matrix refreshed at once",
        "model": {"matrices": MATRICES, "rank": RANK},
        "checks": checks,
        "7B": {"rank": args.rank, "gradients": "bfloat16", "bytes": table},
    }
    write("distributed", results)


if __name__ == "__main__":
    main()
