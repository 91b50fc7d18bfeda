"""The picture of the README: where the memory of LLaMA-7B goes, AdamW beside optimizers of this package.

    python benchmarks/memory_picture.py        # writes docs/images/memory_7b.svg; needs matplotlib

The numbers are those of `benchmarks/plan_7b.py`, in results/plan_7b.json.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

from lowrank_optim.planner.report.picture import PARTS
from lowrank_optim.planner.simulation.allocator import GIB

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "images" / "memory_7b.svg"
CARD = 24
LEAST_NUMBER = 3.0
"""GiB of the smallest part whose number fits inside of it."""
ROWS = {
    "AdamW": "AdamW",
    "8-bit AdamW (bitsandbytes, by formula)": "8-bit AdamW\n(bitsandbytes)",
    "GaLore 8-bit, in backward": "GaLoreAdamW8bit\nin backward",
    "APOLLO-Mini, in backward": "APOLLOMiniAdamW\nin backward",
    "Q-GaLore, int8 weights, in backward": "QGaLoreAdamW8bit\nint8 weights, in backward",
}
"""Names of rows of the JSON, and what the picture calls them; the first is on top."""


def gibibytes(row: Mapping[str, int]) -> dict[str, float]:
    """GiB of each part of a bar; what the card needs besides the parts is the rest."""
    parts = {kind: row[kind] for kind, *_ in PARTS if kind != "rest"}
    return {kind: size / GIB for kind, size in {**parts, "rest": row["needed"] - sum(parts.values())}.items()}


def draw(rows: Mapping[str, Mapping[str, int]], path: Path) -> None:
    """Write the picture; its words and numbers stay text."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lowrank_optim", "font.size": 11}):
        figure, axes = plt.subplots(figsize=(6.8, 4.6), layout="constrained")
        for place, (name, title) in enumerate(reversed(ROWS.items())):
            left = 0.0
            for kind, size in gibibytes(rows[name]).items():
                label, colour = next((label, colour) for part, label, colour in PARTS if part == kind)
                axes.barh(place, size, left=left, color=colour, height=0.62, label=label if title == "AdamW" else None)
                if size > LEAST_NUMBER:
                    axes.text(left + size / 2, place, f"{size:.1f}", ha="center", va="center", color="white")
                left += size
            label = axes.text(left + 0.6, place, f"{left:.1f} GiB", va="center", fontweight="bold", zorder=3)
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.5})
        axes.axvline(CARD, color="#222222", linestyle="--", linewidth=1.2, zorder=2)
        axes.text(CARD + 0.4, len(ROWS) - 0.55, f"a card of {CARD} GiB", va="bottom")
        axes.set_yticks(range(len(ROWS)), list(reversed(ROWS.values())))
        axes.set_xlim(0, 75)
        axes.set_xlabel("GiB at the peak of a step of LLaMA-7B\n1 × 2048 tokens, bfloat16, rank 1024")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PICTURE)
    content = json.loads((ROOT / "benchmarks" / "results" / "plan_7b.json").read_text(encoding="utf-8"))
    draw(content["results"]["7b"], parser.parse_args().out)


if __name__ == "__main__":
    main()
