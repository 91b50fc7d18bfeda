"""The planner's progress line: on a terminal only, after some seconds, with the time left, and gone at the end."""

import io
import sys

import pytest

from lowrank_optim.planner.report import progress as module
from lowrank_optim.planner.report.progress import Line, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stderr", "after"), [(io.StringIO, 0.0), (Terminal, 1e6)], ids=["no terminal", "a short plan"]
)
def test_nothing_is_written_without_a_terminal_and_of_a_short_plan(stderr, after, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stderr())
    monkeypatch.setattr(module, "AFTER", after)
    with progress() as report:
        report("AdamW", 0.5)
    assert sys.stderr.getvalue() == ""


def test_a_long_plan_shows_the_line_and_wipes_it(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(module, "AFTER", 0.0)
    drawn = module.threading.Event()
    draw = Line.draw
    monkeypatch.setattr(Line, "draw", lambda self: (draw(self), drawn.set()))
    with progress() as report:
        report("AdamW", 0.5)
        assert drawn.wait(60)
    written = sys.stderr.getvalue()
    assert written.startswith("\r[0 s] simulating")
    last = written.split("\r")
    assert last[-1] == ""
    assert last[-2] == " " * len(last[-2]) != ""


@pytest.mark.parametrize(
    ("done", "said"),
    [(0.0, "[12 s] simulating GaLore"), (0.25, "[12 s] simulating GaLore, 25% done, about 36 s left")],
)
def test_the_line_tells_the_time_left_once_a_share_is_done(done, said):
    line = Line()
    line("GaLore", done)
    assert line.text(12.0) == said
    line("", None)  # what was known stays
    assert line.text(12.0) == said


def test_a_shorter_line_covers_the_longer_one_and_none_is_wider_than_the_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "40")
    line = Line()
    line("a recipe with a name that is too long for it", 0.5)
    line.draw()
    line("SGD", 0.0)
    line.draw()
    first, second = sys.stderr.getvalue().split("\r")[1:]
    assert len(first) == len(second) == 39
    assert second.rstrip() == "[0 s] simulating SGD"
