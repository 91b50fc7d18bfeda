"""What a person sees: progress, tables, a plot."""

import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lowrank_optim import StepProgress
from pretraining.folder import TEMPORARY, write_atomically
from pretraining.run import CUDA_PEAK, Result, Run, read_metrics

ON_TERMINAL = sys.stdout.isatty()
# A file or a pipe has no width: lines there are as long as they are.
console = Console(
    highlight=False, soft_wrap=not ON_TERMINAL, width=None if ON_TERMINAL or "COLUMNS" in os.environ else 160
)

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
        self.first: int | None = None  # step after which this process began
        self.began, self.began_seconds, self.began_tokens = time.perf_counter(), 0.0, 0
        self.smooth: float | None = None
        self.val = ""
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=max(4, min(20, console.width - 80))),
            MofNCompleteColumn(),
            TextColumn("{task.fields[info]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task(name, total=steps, info="")

    def __enter__(self) -> "Reporter":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def within_step(self, progress: StepProgress) -> None:
        """How far a long step has come: the first one makes all subspaces."""
        self.progress.update(self.task, info=str(progress))
        if not console.is_terminal:
            console.print(f"{self.name}: {progress}")

    def __call__(self, run: Run, row: dict[str, Any]) -> None:
        step = row["step"]
        if self.first is None:
            self.first = step - 1
            console.print(bytes_table(self.name, run.bytes))
            if self.first:
                console.print(f"{self.name}: continuing after step {self.first}")
                for earlier in read_metrics(run.folder, self.first):  # the run goes on as if it had not been stopped
                    self._take(earlier)
            # The steps of an earlier process say nothing about the speed of this one.
            self.progress.reset(self.task, completed=self.first)
            self.began, self.began_seconds, self.began_tokens = time.perf_counter(), row["seconds"], row["tokens"]
        self._take(row)
        info = f"loss {self.smooth:.4f}{self.val}"
        if row["seconds"] > self.began_seconds:
            rate = (row["tokens"] - self.began_tokens) / (row["seconds"] - self.began_seconds)
            info += f", {rate:,.0f} tokens/s"
        self.progress.update(self.task, completed=step, info=info)
        if not console.is_terminal and (step % self.every == 0 or step == self.steps):
            left = (time.perf_counter() - self.began) / max(step - self.first - 1, 1) * (self.steps - step)
            console.print(f"{self.name} {step}/{self.steps}: {info}, {left:.0f} s left")

    def _take(self, row: dict[str, Any]) -> None:
        """The running mean of the loss, and the last validation loss."""
        self.smooth = row["loss"] if self.smooth is None else 0.95 * self.smooth + 0.05 * row["loss"]
        if "val_loss" in row:
            self.val = f", val {row['val_loss']:.4f}"


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


def best_of_each(results: list[Result]) -> dict[str, Result]:
    """Of each optimizer, the run with the lowest validation loss; optimizers that always diverged are left out."""
    best: dict[str, Result] = {}
    for result in results:
        loss = math.inf if result.val_loss is None else result.val_loss
        if loss < (best[result.optimizer].val_loss if result.optimizer in best else math.inf):
            best[result.optimizer] = result
    return best


def results_rows(results: list[Result]) -> list[list[str]]:
    """The header, then one row a run; percentages are relative to the best run of AdamW. Weights only where runs differ in them."""
    reference = best_of_each(results).get("adamw")
    on_cuda = all(CUDA_PEAK in r.peak for r in results)
    weights = [size(r.bytes.get("weights", 0)) for r in results]
    differ = len(set(weights)) > 1
    rows = [["optimizer", "lr", "validation loss", "train loss", "optimizer state", "ms/step"]]
    rows[0] += ["weights"] * differ + ["peak GPU memory"] * on_cuda
    for r, weight in zip(results, weights, strict=True):
        compared = reference is not None and r.optimizer != "adamw"
        loss = "diverged" if r.val_loss is None else f"{r.val_loss:.4f}"
        if compared and r.val_loss is not None:
            loss += f" ({100 * (r.val_loss / reference.val_loss - 1):+.1f} %)"
        state = size(state_bytes(r)) + (f" ({100 * state_bytes(r) / state_bytes(reference):.0f} %)" if compared else "")
        train = "" if r.train_loss is None else f"{r.train_loss:.4f}"
        pace = f"{1000 * r.seconds / r.steps:.0f}" if r.steps else ""
        rows.append(
            [r.optimizer, f"{r.lr:g}", loss, train, state, pace]
            + [weight] * differ
            + ([size(r.peak[CUDA_PEAK])] if on_cuda else [])
        )
    return rows


LESS = ("ms/step", "train loss", "weights", "peak GPU memory", "lr")
"""Columns that a narrow console goes without, in this order."""


def _width(rows: list[list[str]]) -> int:
    """Characters in a line of the table: a bar and two blanks for each column, and a bar."""
    cells = (max(len(line) for cell in column for line in cell.split("\n")) for column in zip(*rows, strict=True))
    return sum(cell + 3 for cell in cells) + 1


def fitted(rows: list[list[str]], width: int) -> list[list[str]]:
    """Rows of a table that fits: headers and percentages in lines of their own first, then fewer columns."""
    if _width(rows) <= width:
        return rows
    header, *others = rows
    rows = [[cell.replace(" ", "\n") for cell in header]]
    rows += [[cell.replace(" (", "\n(") for cell in row] for row in others]
    for name in LESS:
        if _width(rows) > width and name in header:
            place = header.index(name)
            header = header[:place] + header[place + 1 :]
            rows = [row[:place] + row[place + 1 :] for row in rows]
    return rows


def results_table(results: list[Result], width: int | None = None) -> Table:
    """The results, in a table for a console of this width (None: that of this process)."""
    whole = results_rows(results)
    header, *rows = fitted(whole, console.width if width is None else width)
    left_out = [name for name in whole[0] if name not in {cell.replace("\n", " ") for cell in header}]
    caption = f"not shown here: {', '.join(left_out)} (result.json has all)" if left_out else None
    table = Table(title="Results", title_justify="left", caption=caption, caption_justify="left")
    for column in header:
        table.add_column(column, justify="left" if column == "optimizer" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def write_comparison(results: list[Result], folder: Path) -> None:
    """The results as JSON and as a Markdown table."""
    write_atomically(folder / "comparison.json", json.dumps([asdict(result) for result in results], indent=2) + "\n")
    header, *rows = results_rows(results)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    write_atomically(folder / "comparison.md", text)


def smoothed(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential average with bias correction."""
    out, average = [], 0.0
    for i, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        out.append(average / (1 - weight**i))
    return out


def save_picture(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib as PNG, as a whole or not at all, and close it."""
    import matplotlib.pyplot as plt

    temporary = path.with_name(path.name + TEMPORARY)
    figure.savefig(temporary, format="png")
    plt.close(figure)
    temporary.replace(path)


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
        curve = smoothed([row["loss"] for row in rows])
        axes.plot([row["tokens"] / 1e6 for row in rows], curve, color=colour, linewidth=1.0, alpha=0.45)
        held_out = [(row["tokens"] / 1e6, row["val_loss"]) for row in rows if "val_loss" in row]
        label = f"{result.optimizer}, lr {result.lr:g}: {result.val_loss:.3f} ({size(state_bytes(result))} of state)"
        axes.plot(*zip(*held_out, strict=True), color=colour, linewidth=2, marker="o", markersize=4, label=label)
        tops.append(max(value for _, value in held_out))
        bottoms.append(min(min(value for _, value in held_out), min(curve)))
    axes.set_ylim(min(bottoms) - 0.1, max(tops) + 0.35)
    axes.set_xlim(left=0)
    axes.set_xlabel("tokens (millions)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Validation loss (dots) and training loss (thin, smoothed)", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, title="final validation loss", title_fontsize=9, fontsize=9)
    save_picture(figure, path)
