"""The picture of benchmarks/convergence.py: loss over tokens, and final loss against the memory that it took."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.text import Text
from matplotlib.transforms import Bbox
from pretraining.report import save_picture

# Distinguishable for colour-blind readers (Okabe and Ito, 2008); more methods than colours get another line and marker.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7")
LINES, MARKERS = ("-", "--", ":"), ("o", "s", "^")


@dataclass(frozen=True)
class Curve:
    """A method at its best learning rate."""

    name: str
    points: list[tuple[int, float]]  # tokens, validation loss
    loss: float
    spread: float
    state_bytes: int


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """The heights, in their order, moved as little as it takes for neighbours to be `gap` apart.

    Blocks of touching labels are centred on the mean of what they label, and merge when they meet.

    Examples:
        >>> apart([0.0, 0.1, 3.0], 1.0)
        [-0.45, 0.55, 3.0]
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    blocks: list[list[float]] = []  # of each label: its height less its place in the block
    for i in order:
        blocks.append([heights[i]])
        while len(blocks) > 1 and _bottom(blocks[-1], gap) < _bottom(blocks[-2], gap) + len(blocks[-2]) * gap:
            last = blocks.pop()
            blocks[-1] += last
    placed = [_bottom(block, gap) + k * gap for block in blocks for k in range(len(block))]
    return [placed[order.index(i)] for i in range(len(heights))]


def _bottom(block: list[float], gap: float) -> float:
    """Height of the lowest label of a block centred on what it labels."""
    return sum(block) / len(block) - gap * (len(block) - 1) / 2


def style(i: int) -> dict[str, Any]:
    turn = i // len(COLOURS) % len(LINES)
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[turn], "marker": MARKERS[turn]}


def plot(curves: Sequence[Curve], path: Path) -> None:
    """Both panels share the axis of the loss; each method is named once beside the end of its curve and once at its point."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 6), dpi=140, width_ratios=(1.25, 1), layout="constrained")
    curves = sorted(curves, key=lambda curve: curve.name != "adamw")  # AdamW is black
    bottom, top = limits(curves)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.get_layout_engine().set(wspace=0.04)
    _loss_over_tokens(left, curves, bottom, top)
    _loss_over_state(right, curves, bottom, top)
    save_picture(figure, path)


def limits(curves: Sequence[Curve]) -> tuple[float, float]:
    """What is shown of the loss: all final ones, but for methods so far above the others that these would be squeezed together."""
    finals = [curve.loss for curve in curves]
    low = min(finals)
    near = low + 4 * (median(finals) - low)
    reference = max(curve.loss for curve in curves if curve.name == "adamw" or curve is curves[0])
    high = max(reference, *(curve.loss + curve.spread for curve in curves if curve.loss <= near))
    height = max(high - low, 0.02 * low)
    return low - 0.12 * height, high + 0.12 * height


def _loss_over_tokens(axes: Any, curves: Sequence[Curve], bottom: float, top: float) -> None:
    end = curves[0].points[-1][0] / 1e6
    # The curves come from above: half as much again is shown of them.
    top += 0.5 * (top - bottom)
    labels = apart([min(curve.loss, top) for curve in curves], 0.042 * (top - bottom))
    for i, (curve, height) in enumerate(zip(curves, labels, strict=True)):
        look = style(i)
        tokens, losses = zip(*curve.points, strict=True)
        axes.plot([t / 1e6 for t in tokens], losses, linewidth=1.6, markersize=3.5, **look)
        inside = curve.loss <= top
        if inside:
            axes.plot([end, 1.05 * end], [curve.loss, height], color=look["color"], linewidth=0.6, clip_on=False)
        text = f"{curve.name} {curve.loss:.3f}" + ("" if inside else " ↑")
        axes.text(1.06 * end, height, text, color=look["color"], fontsize=9, va="center", clip_on=False)
    axes.set_xlim(0, 1.02 * end)
    axes.set_ylim(bottom, top)
    axes.set_xlabel("tokens (millions)")
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title("Loss at the best learning rate, mean over seeds", fontsize=11, loc="left")


def _loss_over_state(axes: Any, curves: Sequence[Curve], bottom: float, top: float) -> None:
    sizes = [curve.state_bytes / 2**20 for curve in curves]
    names = []
    for i, (curve, x) in enumerate(zip(curves, sizes, strict=True)):
        inside = curve.loss <= top
        y = curve.loss if inside else top - 0.02 * (top - bottom)
        names.append((curve.name if inside else f"{curve.name} {curve.loss:.3f} ↑", x, y, curve.spread * inside))
        look = style(i) | {"linestyle": "none"}
        axes.errorbar(x, y, yerr=curve.spread if inside else None, markersize=7, capsize=3, **look)
    axes.set_ylim(bottom, top)
    axes.set_xlim(0, 1.28 * max(sizes))
    axes.set_xlabel("optimizer state (MiB)")
    axes.set_ylabel("final validation loss (± standard deviation over seeds)")
    axes.set_title("Final loss against optimizer state", fontsize=11, loc="left")
    _name_points(axes, names)  # last: it needs to know where everything is


def _name_points(axes: Any, points: Sequence[tuple[str, float, float, float]]) -> None:
    """Write each name at the nearest place around its point where it covers neither a point nor another name."""
    axes.figure.canvas.draw()  # so that pixels are known
    scale = axes.figure.dpi / 72
    taken = []
    for _, x, y, spread in points:
        (px, low), (_, high) = axes.transData.transform([(x, y - spread), (x, y + spread)])
        taken.append(Bbox([[px, low], [px, high]]).padded(6 * scale))
    directions = [(1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1)]
    for i, (name, x, y, _) in enumerate(points):
        others = taken[:i] + taken[i + 1 :]
        for far in (*range(9, 90, 9), 99):
            places = [_name(axes, i, name, (x, y), (dx * far, dy * far)) for dx, dy in directions]
            boxes = [Text.get_window_extent(place).padded(scale) for place in places]  # without the line
            free = [k for k, box in enumerate(boxes) if _within(box, axes.bbox) and not box.count_overlaps(others)]
            chosen = free[0] if free else 0
            for k, place in enumerate(places):
                if k != chosen or not (free or far == 99):
                    place.remove()
            if free or far == 99:  # nowhere is free: to the right
                taken.append(boxes[chosen])
                break


def _within(box: Bbox, outer: Bbox) -> bool:
    return outer.x0 <= box.x0 and box.x1 <= outer.x1 and outer.y0 <= box.y0 and box.y1 <= outer.y1


def _name(axes: Any, i: int, name: str, point: tuple[float, float], offset: tuple[int, int]) -> Any:
    """The name at an offset (in points) from its point, with a line to it where that is not clear."""
    dx, dy = offset
    colour = style(i)["color"]
    line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkB": 5}
    label = axes.annotate(
        name,
        point,
        offset,
        textcoords="offset points",
        color=colour,
        fontsize=9,
        ha={1: "left", -1: "right", 0: "center"}[(dx > 0) - (dx < 0)],
        va={1: "bottom", -1: "top", 0: "center"}[(dy > 0) - (dy < 0)],
        arrowprops=line if max(abs(dx), abs(dy)) > 9 else None,
    )
    label.set_in_layout(False)
    label.update_positions(axes.figure.canvas.get_renderer())  # else its extent is that of no offset
    return label
