"""What a person sees: progress, tables, a plot."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pretraining.run import Result, Run, read_metrics

console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())

# Distinguishable for colour-blind readers (Okabe and Ito, 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def size(count: float) -> str:
    """Bytes for a person."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return ""


class Reporter:
    """A progress bar on a terminal, a line now and then elsewhere."""

    def __init__(self, name: str, steps: int, every: int) -> None:
        self.name, self.steps, self.every = name, steps, every
        self.shown_bytes = False
        self.smooth: float | None = None
        self.began, self.first = time.perf_counter(), 0
        self.val = ""
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[info]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task(name, total=steps, info="")

    def __enter__(self) -> "Reporter":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def __call__(self, run: Run, row: dict[str, Any]) -> None:
        step = row["step"]
        if not self.shown_bytes:
            from pretraining.run import exact_bytes

            self.shown_bytes, self.first, self.began = True, step - 1, time.perf_counter()
            console.print(bytes_table(self.name, exact_bytes(run.model, run.optimizer) | _gradient_bytes(run)))
            if self.first:
                console.print(f"{self.name}: continuing after step {self.first}")
        self.smooth = row["loss"] if self.smooth is None else 0.95 * self.smooth + 0.05 * row["loss"]
        rate = row["tokens"] / row["seconds"]
        if "val_loss" in row:
            self.val = f", validation {row['val_loss']:.4f}"
        info = f"loss {self.smooth:.4f}{self.val}, {rate:,.0f} tokens/s"
        self.progress.update(self.task, completed=step, info=info)
        if not console.is_terminal and (step % self.every == 0 or step == self.steps):
            left = (time.perf_counter() - self.began) / (step - self.first) * (self.steps - step)
            console.print(f"{self.name} {step}/{self.steps}: {info}, {left:.0f} s left")


def _gradient_bytes(run: Run) -> dict[str, int]:
    return {"gradients": sum(p.numel() * p.element_size() for p in run.model.parameters() if p.requires_grad)}


def bytes_table(name: str, sizes: dict[str, int]) -> Table:
    """Exact bytes by kind."""
    table = Table(title=f"{name}: exact bytes", title_justify="left")
    table.add_column("what")
    table.add_column("bytes", justify="right")
    table.add_column("", justify="right")
    for kind, count in sizes.items():
        table.add_row(kind, f"{count:,}", size(count))
    table.add_section()
    table.add_row("sum", f"{sum(sizes.values()):,}", size(sum(sizes.values())))
    return table


def state_bytes(result: Result) -> int:
    return sum(count for kind, count in result.bytes.items() if kind.startswith("state"))


def results_table(results: list[Result], baseline: str | None = None) -> Table:
    """One row a run."""
    table = Table(title="Results", title_justify="left")
    for column in ("optimizer", "lr", "validation loss", "train loss", "optimizer state", "ms/step"):
        table.add_column(column, justify="left" if column == "optimizer" else "right", no_wrap=True)
    reference = next((r for r in results if r.optimizer == "adamw"), None)
    for r in results:
        versus = ""
        if reference is not None and r is not reference:
            versus = f" ({100 * (r.val_loss / reference.val_loss - 1):+.1f} %)"
        share = ""
        if reference is not None and r is not reference:
            share = f" ({100 * state_bytes(r) / state_bytes(reference):.0f} %)"
        table.add_row(
            r.optimizer,
            f"{r.lr:g}",
            f"{r.val_loss:.4f}{versus}",
            f"{r.train_loss:.4f}",
            f"{size(state_bytes(r))}{share}",
            f"{1000 * r.seconds / r.steps:.0f}",
        )
    return table


def smoothed(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential average with bias correction."""
    out, average = [], 0.0
    for i, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        out.append(average / (1 - weight**i))
    return out


def plot(runs: list[tuple[Result, Path]], path: Path) -> None:
    """Training loss (smoothed) and validation loss of each run over tokens."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), dpi=140, layout="constrained")
    tops, bottoms = [], []
    for i, (result, folder) in enumerate(runs):
        colour = COLOURS[i % len(COLOURS)]
        rows = read_metrics(folder)
        tokens = [row["tokens"] / 1e6 for row in rows]
        curve = smoothed([row["loss"] for row in rows])
        axes.plot(tokens, curve, color=colour, linewidth=1.0, alpha=0.45)
        held_out = [(row["tokens"] / 1e6, row["val_loss"]) for row in rows if "val_loss" in row]
        label = f"{result.optimizer}, lr {result.lr:g}: {result.val_loss:.3f} ({size(state_bytes(result))} of state)"
        axes.plot(*zip(*held_out, strict=True), color=colour, linewidth=2, marker="o", markersize=4, label=label)
        tops.append(max(value for _, value in held_out))
        bottoms.append(min(min(value for _, value in held_out), min(curve)))
    axes.set_ylim(min(bottoms) - 0.1, max(tops) + 0.35)
    axes.set_xlabel("tokens (millions)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Validation loss (dots) and training loss (thin, smoothed)", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, title="final validation loss", title_fontsize=9, fontsize=9)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary)
    plt.close(figure)
    temporary.replace(path)


def write_comparison(results: list[Result], path: Path) -> None:
    """The results as JSON."""
    from dataclasses import asdict

    path.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
