"""A rank that grows and shrinks in mid-training: `change_group`, and how a run with a schedule is resumed.

A small network learns a random teacher. The rank follows a schedule of steps; moments go along from one rank to the next. In the
middle the run is saved, built anew with the rank of that moment, and goes on to the same loss.

    python examples/rank_schedule.py
    python examples/rank_schedule.py --ranks 0:32,100:16,200:8 --steps 300
"""

import argparse
import copy

import torch
from torch import Tensor, nn

import lowrank_optim as lo
from lowrank_optim.console import accept_any_text


def schedule(text: str) -> dict[int, int]:
    """`"0:32,100:8"` as {0: 32, 100: 8}: the rank from each step on."""
    try:
        ranks = {int(step): int(rank) for step, rank in (part.split(":") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no schedule; write step:rank,step:rank, such as 0:32,100:8"
        ) from None
    if 0 not in ranks or min(ranks.values()) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must begin with step 0, and ranks must be at least 1")
    return ranks


def rank_at(step: int, ranks: dict[int, int]) -> int:
    """The rank of this step."""
    return ranks[max(start for start in ranks if start <= step)]


def build(seed: int = 0) -> nn.Sequential:
    """A small network."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))


def train(
    model: nn.Module, teacher: nn.Module, optimizer: lo.LowRankOptimizer, steps: range, ranks: dict[int, int]
) -> list[float]:
    """The losses of these steps."""
    losses = []
    for step in steps:
        if step in ranks and optimizer.param_groups[0]["rank"] != ranks[step]:
            optimizer.change_group(0, rank=ranks[step])
        x = torch.randn(128, 64, generator=torch.Generator().manual_seed(step))
        with torch.no_grad():
            target: Tensor = teacher(x)
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def optimizer_for(model: nn.Module, rank: int) -> lo.GaLoreAdamW:
    """GaLore of this rank."""
    return lo.GaLoreAdamW(lo.param_groups(model, rank=rank), lr=1e-2, scale=1.0, update_proj_gap=20)


def main() -> None:
    accept_any_text()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--ranks", type=schedule, default=schedule("0:8,60:24,120:4"), help="step:rank,step:rank (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=180)
    args = parser.parse_args()
    model, teacher, half = build(), build(1), args.steps // 2
    optimizer = optimizer_for(model, args.ranks[0])
    losses = train(model, teacher, optimizer, range(half), args.ranks)
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    losses += train(model, teacher, optimizer, range(half, args.steps), args.ranks)
    for step in sorted({*args.ranks, half, args.steps - 1}):
        if step < args.steps:
            print(f"step {step:4}  rank {rank_at(step, args.ranks):3}  loss {losses[step]:.4f}")

    again = build(2)
    again.load_state_dict(saved["model"])
    resumed = optimizer_for(again, rank_at(half - 1, args.ranks))  # the rank when it was saved
    resumed.load_state_dict(saved["optimizer"])
    same = train(again, teacher, resumed, range(half, args.steps), args.ranks) == losses[half:]
    print(f"resumed at step {half}: {'the same losses' if same else 'other losses'}")


if __name__ == "__main__":
    main()
