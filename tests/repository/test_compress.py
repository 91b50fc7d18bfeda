"""examples/compress.py: trains, compresses at several budgets, and loads what it has saved."""

import argparse
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import compress  # noqa: E402

SMALL = ["--text", argparse.__file__, "--length", "32", "--batch", "4", "--calibration", "2"]


@pytest.mark.long
def test_it_trains_compresses_draws_and_loads_its_model_again(tmp_path, capsys):
    small = [*SMALL, "--shares", "0.3,0.8", "--pairs", "4"]
    points = compress.main([*small, "--steps", "12", "--out", str(tmp_path)])
    found = {(point.method, point.setting): point for point in points}
    assert len(found) == 9
    whole = points[0]
    shares = {share: f"{share} % of the layers' numbers" for share in (30, 80)}
    layers = 2 * 4 * (4 * 128 * 128 + 3 * 128 * 352)  # bytes
    for share, setting in shares.items():
        svd, features = found["svd", setting], found["features", setting]
        assert whole.bytes - svd.bytes == pytest.approx((1 - share / 100) * layers, rel=0.04)
        assert 0 < features.bytes - svd.bytes < 0.02 * whole.bytes  # biases
        assert found["svd, selected ranks", setting].bytes <= whole.bytes - (1 - share / 100) * layers
    assert whole.bytes - found["int8", "8 bits"].bytes == pytest.approx(layers / 2, rel=0.05)
    assert found["int8", "8 bits"].loss == pytest.approx(whole.loss, abs=0.05)
    assert found["int8 + pair", "8 bits, rank 4"].bytes > found["int8", "8 bits"].bytes
    assert (tmp_path / "compress.png").stat().st_size > 10_000
    saved = json.loads((tmp_path / "compress.json").read_text(encoding="utf-8"))
    assert [point["loss"] for point in saved["points"]] == [point.loss for point in points]
    assert "features" in capsys.readouterr().out
    again = compress.main(
        [*SMALL, "--shares", "0.3", "--pairs", "4", "--folder", str(tmp_path / "model"), "--out", str(tmp_path / "b")]
    )
    assert again[0].loss == pytest.approx(whole.loss, abs=1e-3)
    assert again[0].bytes == whole.bytes


def test_bad_arguments(tmp_path, capsys):
    for wrong, message in (("--shares=1.5", "shares between 0 and 1"), ("--pairs=0", "ranks")):
        with pytest.raises(SystemExit):
            compress.main([wrong])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"no config\.json"):
        compress.main([*SMALL, "--folder", str(tmp_path), "--out", str(tmp_path / "out")])
