"""Whether all processes have built the same optimizer: one small message when it is built, instead of weights that drift apart."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_optim.sharding.dtensor import is_sharded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def describe(optimizer: Optimizer) -> list[str]:
    """Everything in which two processes have to agree, one line each."""
    lines = [f"the class is {type(optimizer).__name__}"]
    for number, group in enumerate(optimizer.param_groups):
        for name, value in sorted(group.items(), key=lambda item: item[0]):
            if name not in ("params", "param_names"):
                shown = value.tolist() if isinstance(value, Tensor) else value
                lines.append(f"{name} is {shown!r} in group {number}")
        for position, param in enumerate(group["params"]):
            placements = f" {tuple(param.placements)}" if is_sharded(param) else ""
            lines.append(f"parameter {position} of group {number} is {tuple(param.shape)} {param.dtype}{placements}")
    return lines


def check_agreement(optimizer: Optimizer) -> None:
    """Raise ValueError on all processes where those that share sharded parameters have built different optimizers."""
    meshes = {
        param.device_mesh: param.device for g in optimizer.param_groups for param in g["params"] if is_sharded(param)
    }
    for mesh, device in meshes.items():
        groups = [mesh.get_group(dim) for dim in range(mesh.ndim) if mesh.size(dim) > 1]
        check_lines(describe(optimizer), groups, device)


def check_lines(lines: Iterable[str], groups: "Iterable[ProcessGroup]", device: torch.device) -> None:
    """Raise ValueError, on all processes of these groups, where the lines differ."""
    lines, groups = list(lines), list(groups)
    digest = hashlib.sha256("\n".join(lines).encode()).digest()
    number = int.from_bytes(digest[:7], "big")
    extremes = torch.tensor([number, -number], device=device)
    for group in groups:
        torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX, group=group)
    if int(extremes[0]) == -int(extremes[1]):
        return
    found: list[Mapping[int, list[str]]] = [{torch.distributed.get_rank(): lines}]
    for group in groups:
        gathered: list[Any] = [None] * group.size()
        torch.distributed.all_gather_object(gathered, found, group=group)
        found = [part for parts in gathered for part in parts]
    ranks = {rank: said for part in found for rank, said in part.items()}
    first, *others = sorted(ranks)
    rank = next(rank for rank in others if ranks[rank] != ranks[first])
    here, there = ([line for line in ranks[a] if line not in ranks[b]] for a, b in ((first, rank), (rank, first)))
    raise ValueError(
        "the processes have built different optimizers, which would drift apart:\n"
        f"  process {first}: {'; '.join(here[:5]) or '–'}\n  process {rank}: {'; '.join(there[:5]) or '–'}"
    )
