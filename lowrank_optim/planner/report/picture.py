"""Where memory goes, as stacked bars. Needs matplotlib."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from lowrank_optim.planner.errors import PlanError
from lowrank_optim.planner.simulation.allocator import GIB, format_bytes

# Distinguishable for colour-blind readers (Okabe and Ito, 2008).
PARTS = (
    ("weights", "weights", "#0072B2"),
    ("gradients", "gradients", "#D55E00"),
    ("optimizer_state", "optimizer state", "#E69F00"),
    ("activations", "activations", "#009E73"),
    ("temporaries", "logits, working copies", "#56B4E9"),
    ("rest", "allocator, CUDA context", "#BBBBBB"),
)


def check_library() -> None:
    """Raise PlanError where matplotlib is missing: before a plan that takes a minute."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PlanError("--plot needs matplotlib: pip install matplotlib")


def draw(bars: Sequence[tuple[str, Mapping[str, int], int]], budget: int | None, title: str, path: Path) -> None:
    """Write a picture of one horizontal bar for each set-up.

    Args:
        bars: (name, bytes by kind, bytes needed in all), the first on top.
        budget: where to draw the line; None draws none.

    Raises:
        PlanError: the file cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9.5, 1.5 + 0.52 * len(bars)), dpi=140, layout="constrained")
    places = list(range(len(bars)))[::-1]
    left = [0.0] * len(bars)
    for kind, label, colour in PARTS:
        sizes = [_size(parts, needed, kind) / GIB for _, parts, needed in bars]
        axes.barh(places, sizes, left=left, color=colour, label=label, height=0.66, edgecolor="white", linewidth=0.6)
        for place, size, start in zip(places, sizes, left, strict=True):
            if size > 0.045 * max(needed for *_, needed in bars) / GIB:
                axes.text(start + size / 2, place, f"{size:.1f}", ha="center", va="center", color="white", fontsize=8)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for place, (_, _, needed), end in zip(places, bars, left, strict=True):
        fits = budget is None or needed <= budget
        axes.text(
            end + 0.008 * max(left),
            place,
            f"{needed / GIB:.1f} GiB",
            va="center",
            fontsize=9,
            fontweight="bold",
            color="#222222" if fits else "#B03030",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2},
            zorder=3,
        )
    if budget is not None:
        axes.axvline(budget / GIB, color="#222222", linestyle="--", linewidth=1.3, zorder=2)
        axes.annotate(
            f"budget {format_bytes(budget)}",
            (budget / GIB, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=9,
        )
    axes.set_yticks(places, [name for name, _, _ in bars])
    axes.set_xlim(0, 1.13 * max([*left, (budget or 0) / GIB]))
    axes.set_xlabel("GiB at the peak of a step")
    axes.set_title(title, fontsize=10.5, loc="left", pad=20)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=8.5)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise PlanError(f"--plot {path} cannot be written: {error}") from error
    plt.close(figure)


def _size(parts: Mapping[str, int], needed: int, kind: str) -> int:
    return needed - sum(parts.values()) if kind == "rest" else parts[kind]
