"""One adapter fine-tuning with AdamW, LoRA+, LoRA-RITE, LoRA-Pro, AltLoRA and Riemannian AdamW: losses, state and time side by side.

A small network learns a teacher, which stands for pretraining. Then the teacher changes by a matrix of low rank in each layer, the
weights are frozen, and adapters W₀ + s B A follow it. Every method takes the best of its rates; B begins at zero.

    python examples/lora.py
    python examples/lora.py --rank 8 --steps 400 --plot lora.png
"""

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_optim as lo
from lowrank_optim.console import accept_any_text

METHODS: dict[str, tuple[Callable[..., lo.LowRankOptimizer], dict[str, Any], tuple[float, ...]]] = {
    "AdamW": (lambda groups, lr: lo.LoRAOptimizer(groups, lr=lr), {}, (3e-3, 1e-2, 3e-2, 1e-1)),
    "LoRA+": (lambda groups, lr: lo.LoRAOptimizer(groups, lr=lr), {"lr_ratio": 16.0}, (1e-3, 3e-3, 1e-2, 3e-2)),
    "RiemannianAdamW": (lambda groups, lr: lo.RiemannianAdamW(groups, lr=lr), {}, (3e-3, 1e-2, 3e-2, 1e-1)),
    "LoRARiteAdamW": (lambda groups, lr: lo.LoRARiteAdamW(groups, lr=lr), {}, (1e-3, 3e-3, 1e-2, 3e-2)),
    "LoRAProAdamW, factors": (
        lambda groups, lr: lo.LoRAProAdamW(groups, lr=lr, moments="factors"),
        {},
        (3e-3, 1e-2, 3e-2, 1e-1),
    ),
    "LoRAProAdamW, full": (lambda groups, lr: lo.LoRAProAdamW(groups, lr=lr), {}, (3e-4, 1e-3, 3e-3, 1e-2)),
    "AltLoRA": (lambda groups, lr: lo.AltLoRA(groups, lr=lr), {}, (0.3, 1.0, 3.0, 10.0)),
}
"""How each is built, options of its group, and the rates that are tried."""


class Adapted(nn.Module):
    """A frozen linear layer and an adapter; its attributes are called as in peft."""

    def __init__(self, base: nn.Linear, rank: int, scaling: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scaling = {"default": scaling}
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.lora_B["default"](self.lora_A["default"](x))
        return self.base(x) + self.scaling["default"] * change


def network() -> nn.Sequential:
    """The layers of student and teacher."""
    return nn.Sequential(nn.Linear(48, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 24))


def batch(step: int, teacher: nn.Module) -> tuple[Tensor, Tensor]:
    """Inputs of one step, and what the teacher says of them."""
    x = torch.randn(128, 48, generator=torch.Generator().manual_seed(step))
    with torch.no_grad():
        return x, teacher(x)


def pretrained(seed: int) -> tuple[nn.Module, nn.Module]:
    """A student that has learned a teacher, and the teacher after its layers have changed by matrices of rank 4."""
    torch.manual_seed(seed)
    teacher, student = network(), network()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for step in range(200):
        x, target = batch(step, teacher)
        nn.functional.mse_loss(student(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for layer in teacher:
            if isinstance(layer, nn.Linear):
                m, n = layer.weight.shape
                layer.weight += 0.5 * torch.randn(m, 4) @ torch.randn(4, n) / (m * n) ** 0.25
    return student, teacher


def fine_tune(
    student: nn.Module, teacher: nn.Module, method: str, lr: float, rank: int, steps: int
) -> tuple[list[float], dict[str, int], float]:
    """The losses of a run, the bytes of its state, and the seconds of its optimizer's steps."""
    make, options, _ = METHODS[method]
    torch.manual_seed(1)
    model = copy.deepcopy(student)
    for number, layer in enumerate(model):
        if isinstance(layer, nn.Linear):
            model[number] = Adapted(layer, rank, 2.0)
    optimizer = make(lo.lora_pairs(model, **options), lr)
    losses, seconds = [], 0.0
    for step in range(steps):
        x, target = batch(10_000 + step, teacher)
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        start = time.perf_counter()
        optimizer.step()
        seconds += time.perf_counter() - start
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, lo.state_bytes(optimizer), seconds


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """The losses over steps, a mean of ten at a time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, losses in curves.items():
        means = torch.tensor(losses).unfold(0, min(10, len(losses)), 1).mean(-1)
        axes.plot(means, label=name)
    axes.set(xlabel="step", ylabel="loss (mean of 10)", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=4, help="of the adapters (default 4)")
    parser.add_argument("--steps", type=int, default=150, help="of each run (default 150)")
    parser.add_argument("--plot", type=Path, help="write the curves to this file (needs matplotlib)")
    args = parser.parse_args()
    accept_any_text()
    student, teacher = pretrained(0)
    before = nn.functional.mse_loss(student(batch(1, teacher)[0]), batch(1, teacher)[1]).item()
    print(f"loss before fine-tuning: {before:.4f}\n")
    print(f"{'method':<22} {'loss':>8}  {'best lr':>8}  {'state':>9}  {'ms a step':>9}")
    curves = {}
    for name, (_, _, rates) in METHODS.items():
        runs = {lr: fine_tune(student, teacher, name, lr, args.rank, args.steps) for lr in rates}
        ends = {lr: sum(losses[-10:]) / len(losses[-10:]) for lr, (losses, _, _) in runs.items()}
        best = min(ends, key=lambda lr: ends[lr] if ends[lr] == ends[lr] else float("inf"))
        curves[name], held, seconds = runs[best]
        size = sum(size for kind, size in held.items() if kind != "step")
        print(f"{name:<22} {ends[best]:8.4f}  {best:8.0e}  {size / 1024:6.1f} KB  {1e3 * seconds / args.steps:9.2f}")
    if args.plot is not None:
        draw(curves, args.plot)
        print(f"\ncurves: {args.plot}")


if __name__ == "__main__":
    main()
