"""SIGTERM, which a scheduler sends before it takes the machine: the step in progress ends and is saved, and the run stops."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STATUS = 128 + signal.SIGTERM
"""Exit status of a process that SIGTERM has ended."""


class Terminated(BaseException):
    """SIGTERM came. Like KeyboardInterrupt it is no error: handlers of errors let it pass.

    step: the one that was saved because of it; None where nothing was.
    """

    def __init__(self, step: int | None = None) -> None:
        super().__init__(step)
        self.step = step


class Termination:
    """Whether SIGTERM came, and what it does: outside of a step it stops at once, within one it waits for the step's end."""

    def __init__(self) -> None:
        self.came = False
        self._training = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The handler; the second signal stops at once."""
        if self.came or not self._training:
            raise Terminated
        self.came = True
        sys.stderr.write("\nSIGTERM: stops after this step, and saves it; a second SIGTERM stops at once\n")
        sys.stderr.flush()

    @contextmanager
    def training(self) -> Iterator[None]:
        """A block whose steps are saved before they stop: it has to look at `came`."""
        self._training = True
        try:
            yield
        finally:
            self._training = False


termination = Termination()


@contextmanager
def catch_sigterm() -> Iterator[None]:
    """SIGTERM goes to `termination` within this block; elsewhere than in the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    termination.came = False
    before = signal.signal(signal.SIGTERM, termination)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
