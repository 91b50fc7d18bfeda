"""examples/lora.py runs, and every method follows the teacher."""

import runpy
from pathlib import Path

import pytest


@pytest.mark.long
def test_every_method_of_the_example_learns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    path = Path(__file__).parents[2] / "examples/lora.py"
    monkeypatch.setattr("sys.argv", [str(path), "--steps", "25"])
    runpy.run_path(str(path), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    before = float(lines[0].split()[-1])
    ends = {line[:22].strip(): float(line[22:].split()[0]) for line in lines[3:]}
    assert len(ends) == 7
    assert max(ends.values()) < 0.7 * before
