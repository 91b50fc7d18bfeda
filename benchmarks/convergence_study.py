"""The runs of one method in benchmarks/convergence.py: which come next, and what they amount to in the table.

Nothing here trains; losses come in, wishes and tables go out.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

from pretraining.report import size
from rich.table import Table

FACTOR = 2.0
RULE = (
    "rates start·2^k; train the starting rate with seed 0, then the untried neighbours of the best rate, until the best rate has a "
    "worse or diverged neighbour on both sides or the ladder is full; the lower rate wins a tie; then more seeds at the best rate"
)


@dataclass(frozen=True)
class Setting:
    """What differs between methods: where the ladder begins, and what a method needs."""

    lr: float = 4e-3
    rank: int | float | None = 0.25
    options: Mapping[str, Any] = field(default_factory=dict)
    refreshes: bool = True  # takes the preset's update_proj_gap
    weight_decay: float | None = None  # None: that of the others


# The ladder ---------------------------------------------------------------------------------------------------------------------


def best_rung(losses: Mapping[int, float | None]) -> int | None:
    """The rung with the lowest loss, of equal ones the lowest; None where every one diverged (has no loss)."""
    finite = [(loss, rung) for rung, loss in losses.items() if loss is not None]
    return min(finite)[1] if finite else None


def next_rungs(losses: Mapping[int, float | None], longest: int) -> list[int]:
    """The rungs k (rates start·2ᵏ) to train after those with these losses; none when the best is bracketed or the ladder is full."""
    if not losses:
        return [0]
    best = best_rung(losses)
    around = [min(losses) - 1] if best is None else [best - 1, best + 1]
    return [rung for rung in around if rung not in losses][: longest - len(losses)]


def bracketed(losses: Mapping[int, float | None]) -> bool:
    """Whether the best rung has a worse neighbour on both sides."""
    best = best_rung(losses)
    return best is not None and {best - 1, best + 1} <= losses.keys()


@dataclass(frozen=True)
class Row:
    """One run, as the JSON has it; a run that diverged has no losses."""

    method: str
    lr: float
    rung: int
    seed: int
    val_loss: float | None
    train_loss: float | None
    steps: int
    step_seconds: float | None
    state: dict[str, int]
    folder: str


@dataclass(eq=False)
class Study:
    """The runs of one method: first its ladder, then the seeds at its best rate."""

    method: str
    setting: Setting
    seeds: int
    longest: int
    rows: dict[tuple[int, int], Row] = field(default_factory=dict)  # by rung and seed

    def lr(self, rung: int) -> float:
        return self.setting.lr * FACTOR**rung

    @property
    def ladder(self) -> dict[int, float | None]:
        """Loss by rung, seed 0."""
        return {rung: row.val_loss for (rung, seed), row in self.rows.items() if seed == 0}

    def wanted(self) -> list[tuple[int, int]]:
        """The runs to do next, once those before have ended. They depend on losses alone, so neither on speed nor on workers."""
        if rungs := next_rungs(self.ladder, self.longest):
            return [(rung, 0) for rung in rungs]
        best = best_rung(self.ladder)
        if best is None:
            return []
        return [(best, seed) for seed in range(self.seeds) if (best, seed) not in self.rows]

    def best_runs(self) -> list[Row]:
        """The runs at the best rate, by seed."""
        best = best_rung(self.ladder)
        return [self.rows[key] for key in sorted(self.rows) if key[0] == best]


# Results ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """One method at its best rate; without losses where it diverged with some seed."""

    method: str
    lr: float | None
    bracketed: bool
    val_loss: float | None
    spread: float | None
    val_losses: list[float | None]
    state_bytes: int
    state: dict[str, int]
    step_seconds: float | None


def summarise(study: Study) -> Summary:
    """Mean and spread over seeds, and the fastest of all runs."""
    best = study.best_runs()
    losses = [row.val_loss for row in best]
    finite = [loss for loss in losses if loss is not None]
    whole = bool(finite) and len(finite) == len(losses)
    state = (best or list(study.rows.values()))[0].state
    return Summary(
        method=study.method,
        lr=best[0].lr if best else None,
        bracketed=bracketed(study.ladder),
        val_loss=mean(finite) if whole else None,
        spread=stdev(finite) if whole and len(finite) > 1 else None,
        val_losses=losses,
        state_bytes=sum(state.values()),
        state=state,
        step_seconds=min((r.step_seconds for r in study.rows.values() if r.step_seconds is not None), default=None),
    )


def ratio(value: float | None, reference: float | None) -> float | None:
    return value / reference if value is not None and reference else None


def over_adamw(summaries: Iterable[Summary]) -> dict[str, dict[str, float | None]]:
    """Loss, state and time of each method over AdamW's; None where AdamW was not run or a number is missing."""
    summaries = list(summaries)
    reference = next((s for s in summaries if s.method == "adamw"), None)
    keys = ("val_loss", "state_bytes", "step_seconds")
    return {s.method: {k: ratio(getattr(s, k), getattr(reference, k, None)) for k in keys} for s in summaries}


def table_rows(summaries: Sequence[Summary]) -> list[list[str]]:
    """The header, then one row a method, best first; `*` marks a best rate at the end of its ladder."""

    def shown(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    ratios = over_adamw(summaries)
    rows = [["optimizer", "validation loss", "÷ adamw", "best lr", "state", "÷ adamw", "time ÷ adamw"]]
    for s in sorted(summaries, key=lambda s: (math.inf if s.val_loss is None else s.val_loss, s.method)):
        diverged = sum(loss is None for loss in s.val_losses)
        loss = shown(s.val_loss, ".4f") + ("" if s.spread is None else f" ± {s.spread:.4f}")
        if s.val_loss is None:
            loss = "diverged" if s.lr is None else f"diverged with {diverged} of {len(s.val_losses)} seeds"
        over = ratios[s.method]
        lr = shown(s.lr, "g") + ("" if s.bracketed else " *")
        state = [size(s.state_bytes), shown(over["state_bytes"], ".2f")]
        rows.append([s.method, loss, shown(over["val_loss"], ".3f"), lr, *state, shown(over["step_seconds"], ".2f")])
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    header, *body = rows
    lines = [header, [":---", *["---:"] * (len(header) - 1)], *body]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    if any("*" in line[3] for line in body):
        text += "\n\\* at the end of its ladder: a better rate may lie further out.\n"
    return text


def rich_table(rows: Sequence[Sequence[str]], title: str) -> Table:
    header, *body = rows
    open_ended = any("*" in line[3] for line in body)
    caption = "* at the end of its ladder: a better rate may lie further out" if open_ended else None
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for i, column in enumerate(header):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for line in body:
        table.add_row(*line)
    return table
