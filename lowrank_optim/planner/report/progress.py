"""Progress of a simulation on stderr: a bar on a terminal where rich is installed, else a line now and then."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Report(Protocol):
    """Called with what is being done now, and the share that is done (None: as far as it was)."""

    def __call__(self, what: str, done: float | None = None) -> None: ...


@contextmanager
def progress(quiet: bool = False) -> Iterator[Report]:
    """A function that shows progress within this block."""
    if quiet:
        yield lambda what, done=None: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ModuleNotFoundError:
        yield _Lines()
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    columns = (TextColumn("simulating {task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("…", total=1.0)

        def show(what: str, done: float | None = None) -> None:
            bars.update(task, description=what or "…", completed=done)

        yield show


class _Lines:
    """One line for each thing that is done, with the seconds since the start."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    def __call__(self, what: str, done: float | None = None) -> None:
        if what:
            share = "" if done is None else f" ({done:.0%} done)"
            sys.stderr.write(f"[{time.perf_counter() - self.began:4.0f} s] simulating {what}{share}\n")
            sys.stderr.flush()
