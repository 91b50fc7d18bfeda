"""Training on several processes, started by torchrun: DistributedDataParallel (--ddp) or fully_shard (--fsdp).

    torchrun --nproc-per-node=2 examples/pretrain.py --fsdp --steps 100 --out runs/fsdp
    torchrun --nproc-per-node=4 examples/pretrain.py --fsdp --steps 200 --out runs/fsdp --resume      # on more processes

gloo on CPUs, nccl on GPUs. Micro-batches are split over the processes. Checkpoints are those of torch.distributed.checkpoint,
saved on p processes and loaded on any number. Each goes to a folder of its own, and `latest` names it once it is complete.
"""

import math
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

import lowrank_optim as lo

from .configs import build_model
from .run import DTYPES, Config, RunError, attach, change_layers, make_optimizer, schedule


def start() -> torch.device:
    """Join the process group that torchrun has prepared; returns this process's device."""
    if "RANK" not in os.environ:
        raise RunError(
            "--fsdp and --ddp train on several processes: torchrun --nproc-per-node=2 examples/pretrain.py …"
        )
    cuda = torch.cuda.is_available()
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    if not cuda:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def train(config: Config, how: str, source: Any, folder: Path, save_every: int, log_every: int, resume: bool) -> float:
    """Train to the last step; returns the last loss, averaged over the processes."""
    device = start()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if config.batch % world:
        raise RunError(f"--batch is {config.batch}; it must be a multiple of the {world} processes")
    batches, vocabulary = source.open(config)
    model = build_model(
        config.model, vocabulary, config.length, device, DTYPES[config.dtype], config.grad_checkpointing, config.seed
    )
    model = change_layers(config, model)
    called: nn.Module = model
    if how == "fsdp":
        from torch.distributed.fsdp import FSDPModule, fully_shard

        for module in model.modules():
            if isinstance(module, nn.ModuleList):
                for layer in module:
                    fully_shard(layer)
        fully_shard(model)
        for module in model.modules():
            if isinstance(module, FSDPModule) and next(model.parameters()).device.type == "cpu":
                module.set_force_sum_reduction_for_comms(True)  # gloo in torch 2.8 takes AVG for SUM
    optimizer = make_optimizer(config, model)
    if how == "ddp":
        called = DistributedDataParallel(model, find_unused_parameters=config.optimizer in lo.LAYERWISE_METHODS)
        if isinstance(optimizer, lo.GaLoreAdamW) and config.clip <= 0:  # clipping needs the norm of the whole gradient
            called.register_comm_hook(None, lo.distributed.LowRankHook(optimizer))
    attach(config, optimizer)
    if rank == 0 and isinstance(optimizer, lo.LowRankOptimizer):
        lo.watch_step(optimizer, lambda progress: print(progress, flush=True))
    scheduler = LambdaLR(optimizer, schedule(config))
    first = _load(folder, model, optimizer, scheduler) if resume else 0
    loss = math.nan
    for step in range(first, config.steps):
        began = time.perf_counter()
        windows = batches.batch(step, config.batch * config.accumulate).to(device)
        total = torch.zeros((), device=device)
        parts = windows.split(config.batch)
        for number, part in enumerate(parts):
            if how == "fsdp" and not config.in_backward:
                model.set_requires_gradient_sync(number + 1 == len(parts))
            mine = part.chunk(world)[rank]
            output = called(input_ids=mine, labels=mine).loss / config.accumulate
            output.backward()
            total += output.detach()
        if config.clip > 0 and not config.in_backward:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        torch.distributed.all_reduce(total)
        loss = float(total) / world
        if rank == 0 and ((step + 1) % log_every == 0 or step + 1 == config.steps):
            print(f"step {step + 1}: loss {loss:.4f}, {time.perf_counter() - began:.2f} s a step", flush=True)
        if (step + 1) % save_every == 0 or step + 1 == config.steps:
            _save(folder, step + 1, model, optimizer, scheduler)
    torch.distributed.barrier()  # none leaves while another waits for it
    torch.distributed.destroy_process_group()
    return loss


def _parts(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LambdaLR, step: int) -> dict[str, Any]:
    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": state, "scheduler": scheduler.state_dict(), "step": step}


def _save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LambdaLR) -> None:
    dcp.save(_parts(model, optimizer, scheduler, step), checkpoint_id=folder / f"step-{step}")
    if torch.distributed.get_rank() == 0:  # a save that dies leaves the name of the one before
        (folder / "latest.new").write_text(f"step-{step}", encoding="utf-8")
        (folder / "latest.new").replace(folder / "latest")


def _load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LambdaLR) -> int:
    if not (folder / "latest").exists():
        return 0
    parts = _parts(model, optimizer, scheduler, 0)
    dcp.load(parts, checkpoint_id=folder / (folder / "latest").read_text(encoding="utf-8"))
    set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
    scheduler.load_state_dict(parts["scheduler"])
    return int(parts["step"])
