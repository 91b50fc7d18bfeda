"""Progress of a simulation: one line on stderr, from the fifth second on. Where stderr is no terminal, nothing."""

import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

AFTER, EVERY = 5.0, 1.0
"""Seconds before the first line, and between two."""


class Report(Protocol):
    """Called with what is being done now, and the share that is done (None: as far as it was)."""

    def __call__(self, what: str, done: float | None = None) -> None: ...


@contextmanager
def progress() -> Iterator[Report]:
    """A function that shows progress within this block."""
    if not sys.stderr.isatty():
        yield lambda what, done=None: None
        return
    line, over = Line(), threading.Event()

    def draw() -> None:
        wait = AFTER
        while not over.wait(wait):
            line.draw()
            wait = EVERY

    drawer = threading.Thread(target=draw, daemon=True)
    drawer.start()
    try:
        yield line
    finally:
        over.set()
        drawer.join()
        line.erase()


class Line:
    """The line, which is drawn again in its place."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.what, self.done = "", 0.0
        self._drawn = 0

    def __call__(self, what: str, done: float | None = None) -> None:
        self.what = what or self.what
        self.done = self.done if done is None else done

    def text(self, seconds: float) -> str:
        """What it says after that many seconds."""
        left = ""
        if 0.0 < self.done < 1.0:
            left = f", {self.done:.0%} done, about {seconds / self.done * (1.0 - self.done):.0f} s left"
        return f"[{seconds:.0f} s] simulating {self.what}{left}"

    def draw(self) -> None:
        """Write it over the last one."""
        text = self.text(time.monotonic() - self.began)[: shutil.get_terminal_size().columns - 1]
        sys.stderr.write("\r" + text.ljust(self._drawn))
        sys.stderr.flush()
        self._drawn = len(text)

    def erase(self) -> None:
        """Leave the terminal as it was."""
        if self._drawn:
            sys.stderr.write("\r" + " " * self._drawn + "\r")
            sys.stderr.flush()
            self._drawn = 0
