"""A report of finished runs as one HTML page that needs no other file: results, curves, memory, settings."""

import base64
import io
import json
import platform
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import Any

import torch

import lowrank_optim as lo

from .folder import write_atomically
from .report import COLOURS, results_rows, size, smoothed
from .run import CUDA_PEAK, Result, RunError, read_metrics

POINTS = 1000
"""Points of a curve at most: more make the page large, and nobody sees them."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.note { color: #666; margin-top: .2rem; } img { width: 100%; height: auto; }
div.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #888; }
tr.sum td { border-top: 2px solid #888; font-weight: 600; } .settings td, .settings th { text-align: left; vertical-align: top; }
.settings td { white-space: normal; overflow-wrap: anywhere; } .settings td:first-child { white-space: nowrap; }
""".strip()


def check_target(path: Path, out: Path) -> None:
    """Raise RunError where no page can be written, before anything is trained.

    Args:
        path: of the page.
        out: the folder of the runs, which may be made later.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise RunError(f"--report {path}: the page is HTML; give a name that ends with .html")
    if path.is_dir():
        raise RunError(f"--report {path} is a folder; give a file in it")
    if not path.parent.is_dir() and path.parent.resolve() != out.resolve():
        raise RunError(f"--report {path}: there is no folder {path.parent}; make it, or give another")


def write_page(runs: list[tuple[Result, Path]], path: Path) -> None:
    """Write the page of finished runs, each with its folder; those that diverged have no curve."""
    results = [result for result, _ in runs]
    names = labels(results)
    header, *rows = results_rows(results)
    settings = [json.loads((folder / "config.json").read_text(encoding="utf-8")) for _, folder in runs]
    parts = [
        f"<h1>Training with {escape(' and '.join(dict.fromkeys(r.optimizer for r in results)))}</h1>",
        f'<p class="note">{escape(environment())}</p>',
        "<h2>Results</h2>",
        table(header, rows),
        "<h2>Curves</h2>",
        picture(runs, names),
        "<h2>Memory</h2>",
        '<p class="note">Exact bytes of what a run keeps, counted from its tensors; then the largest use that was measured.</p>',
        memory(results, names),
        "<h2>Settings</h2>",
        *setting_tables(settings, names),
    ]
    body = "\n".join(parts)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    title = escape(f"Training report: {', '.join(names)}")
    page = (
        f"<!doctype html>\n<html lang=en>\n<head>{head}\n<title>{title}</title>\n<style>\n{STYLE}\n</style>\n</head>\n"
    )
    write_atomically(path, f"{page}<body>\n{body}\n</body>\n</html>\n")


def labels(results: list[Result]) -> list[str]:
    """The names of runs; with the learning rate where one name stands for several."""
    names = [result.optimizer for result in results]
    return [f"{r.optimizer}, lr {r.lr:g}" if names.count(r.optimizer) > 1 else r.optimizer for r in results]


def environment() -> str:
    """Where and when the page was written."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return f"Written {now}; lowrank_optim {lo.__version__}, torch {torch.__version__}, Python {platform.python_version()}, {device}"


def table(header: list[str], rows: list[list[str]], kind: str = "", last_is_sum: int | None = None) -> str:
    """An HTML table; `last_is_sum` is the number of the row that adds up those above it."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = [
        f"<tr{' class=sum' if number == last_is_sum else ''}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
        for number, row in enumerate(rows)
    ]
    inner = f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>"
    return f'<div class="wide"><table class="{kind}">\n{inner}\n</table></div>'


def memory(results: list[Result], names: list[str]) -> str:
    """Bytes by kind, a column for each run, their sum, and the measured peaks."""
    kinds = list(dict.fromkeys(kind for result in results for kind in result.bytes))
    rows = [[kind, *(size(r.bytes[kind]) if kind in r.bytes else "" for r in results)] for kind in kinds]
    rows.append(["sum", *(size(sum(r.bytes.values())) for r in results)])
    peaks = list(dict.fromkeys(what for result in results for what in result.peak))
    shown = [what for what in peaks if what == CUDA_PEAK or len(results) == 1]  # of a process, runs before count too
    rows += [[what, *(size(r.peak[what]) if what in r.peak else "" for r in results)] for what in shown]
    return table(["", *names], rows, last_is_sum=len(kinds))


def setting_tables(settings: list[dict[str, Any]], names: list[str]) -> list[str]:
    """A table of the settings in which runs differ, and one of those that all have."""
    keys = list(dict.fromkeys(key for setting in settings for key in setting))
    rows = [[key, *(written(setting.get(key)) for setting in settings)] for key in keys]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    common = [row[:2] for row in rows if len(set(row[1:])) == 1]
    parts = [table(["", *names], differing, kind="settings")] if differing else []
    return [*parts, table(["", "all runs" if differing else ""], common, kind="settings")]


def written(value: Any) -> str:
    """A setting for a person."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {written(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(written, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def picture(runs: list[tuple[Result, Path]], names: list[str]) -> str:
    """Loss, learning rate and norm of the gradient over tokens, as an image within the page."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogFormatter

    figure, (loss, lr, norm) = plt.subplots(
        3, 1, figsize=(9, 10), height_ratios=(2, 1, 1), sharex=True, layout="constrained"
    )
    for number, ((result, folder), name) in enumerate(zip(runs, names, strict=True)):
        if result.val_loss is None:
            continue
        rows, colour = read_metrics(folder), COLOURS[number % len(COLOURS)]
        thin = max(1, len(rows) // POINTS)
        tokens = [row["tokens"] / 1e6 for row in rows]
        loss.plot(
            tokens[::thin], smoothed([row["loss"] for row in rows])[::thin], color=colour, linewidth=1, alpha=0.45
        )
        held_out = [(row["tokens"] / 1e6, row["val_loss"]) for row in rows if "val_loss" in row]
        loss.plot(*zip(*held_out, strict=True), color=colour, linewidth=2, marker="o", markersize=4, label=name)
        lr.plot(tokens[::thin], [row["lr"] for row in rows][::thin], color=colour)
        norm.plot(tokens[::thin], smoothed([row["grad_norm"] for row in rows])[::thin], color=colour)
    for axes, what in (
        (loss, "loss (nats per token)"),
        (lr, "learning rate"),
        (norm, "norm of the gradient, smoothed"),
    ):
        axes.set_ylabel(what)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    norm.set_yscale("log")
    for axis in (norm.yaxis.set_major_formatter, norm.yaxis.set_minor_formatter):
        axis(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 1)))
    norm.set_xlabel("tokens (millions)")
    norm.set_xlim(left=0)
    loss.set_title("Validation loss (dots) and training loss (thin, smoothed)", fontsize=11)
    if loss.get_legend_handles_labels()[0]:
        loss.legend(frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="svg")
    plt.close(figure)
    encoded = base64.b64encode(image.getvalue()).decode("ascii")
    described = escape(f"Loss, learning rate and norm of the gradient over tokens of {', '.join(names)}")
    return f'<img alt="{described}" src="data:image/svg+xml;base64,{encoded}">'
