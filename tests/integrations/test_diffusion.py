"""examples/diffusion.py: a UNet learns in backward, with convolutions in their subspaces."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[2] / "examples" / "diffusion.py"
    spec = importlib.util.spec_from_file_location("diffusion_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_learns_and_its_convolutions_are_low_rank(example, capsys):
    losses = example.main(["--steps", "50", "--width", "16", "--rank", "8"])
    assert len(losses) == 50
    assert sum(losses[-10:]) / 10 < 0.5 * sum(losses[:5]) / 5  # 0.30 after 0.96
    out = capsys.readouterr().out
    assert "middle.second.weight  32x32x3x3" in out
    assert "step   50  loss" in out
    assert f"largest gradient: {4 * 128 * 128:,} bytes" in out


@pytest.mark.parametrize("arguments", [["--width", "12"], ["--steps", "0"], ["--optimizer", "galor"]])
def test_bad_input_ends_with_a_message(example, arguments, capsys):
    with pytest.raises(SystemExit):
        example.main(arguments)
    assert "error:" in capsys.readouterr().err
