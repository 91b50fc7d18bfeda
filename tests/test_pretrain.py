"""The main job: it learns, it survives SIGKILL at any moment to the same numbers, and it refuses what cannot work."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import pretrain  # noqa: E402
from pretraining import checkpoint  # noqa: E402

TEXT = argparse.__file__  # real text of 100 kB that is on every machine
SMALL = ["--text", TEXT, "--length", "32", "--batch", "4", "--validation-batches", "2", "--validate-every", "10"]
SMALL += ["--save-every", "5", "--update-proj-gap", "4", "--device", "cpu"]


def rows(folder: Path) -> list[dict]:
    """The metrics of a run without its times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def run(*arguments: str) -> None:
    pretrain.main([*SMALL, *arguments])


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, str(EXAMPLES / "pretrain.py"), *SMALL, *arguments, "--out", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def kill_after(process: subprocess.Popen, folder: Path, lines: int) -> None:
    """SIGKILL as soon as the run has written that many rows of metrics."""
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= lines:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_the_loss_falls_and_everything_is_written(tmp_path):
    out = tmp_path / "run"
    run("--optimizer", "galore", "--steps", "40", "--out", str(out))
    history = rows(out)
    assert [row["step"] for row in history] == list(range(1, 41))
    assert history[0]["loss"] == pytest.approx(5.5, abs=0.15)  # ln 256: it starts knowing nothing
    assert history[-1]["val_loss"] < 4.0
    assert history[-1]["tokens"] == 40 * 4 * 32
    assert max(row["lr"] for row in history) == history[3]["lr"] == pytest.approx(pretrain.LEARNING_RATES["galore"])
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((out / "result.json").read_text())
    assert result["bytes"]["gradients"] == result["bytes"]["weights"] == 4 * 869_504
    assert result["val_loss"] == history[-1]["val_loss"]


@pytest.mark.parametrize("optimizer", ["adamw", "galore"])
def test_a_run_killed_at_any_moment_resumes_to_the_same_numbers(optimizer, tmp_path):
    arguments = ["--optimizer", optimizer, "--steps", "30"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    undisturbed = start(whole, *arguments)
    # Before the first checkpoint, between two, and again after a resume.
    kill_after(start(broken, *arguments), broken, 2)
    kill_after(start(broken, *arguments, "--resume"), broken, 13)
    finish(undisturbed)
    finish(start(broken, *arguments, "--resume"))
    assert rows(broken) == rows(whole)


class Killed(BaseException):
    """Stands for SIGKILL inside this process: nothing catches it."""


@pytest.mark.parametrize("moment", ["while writing", "before replacing", "after replacing"])
def test_a_run_killed_while_it_writes_a_checkpoint_loses_nothing(moment, tmp_path, monkeypatch):
    arguments = [
        "--optimizer",
        "galore",
        "--dtype",
        "bfloat16",
        "--option",
        "stochastic_rounding=True",
        "--steps",
        "20",
    ]
    run(*arguments, "--out", str(tmp_path / "whole"))
    broken = tmp_path / "broken"
    saves = []

    def killed_save(path: Path, content: dict) -> None:
        saves.append(content["step"])
        if content["step"] != 10:
            return original_save(path, content)
        if moment == "while writing":
            path.with_suffix(".tmp").write_bytes(b"half a checkpoint")
            raise Killed
        if moment == "after replacing":
            original_save(path, content)
            raise Killed
        monkeypatch.setattr(checkpoint.os, "replace", lambda *paths: (_ for _ in ()).throw(Killed()))
        return original_save(path, content)

    original_save = checkpoint.save
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", killed_save)
        with pytest.raises(Killed):
            run(*arguments, "--out", str(broken))
    monkeypatch.undo()
    assert saves == [5, 10]
    run(*arguments, "--out", str(broken), "--resume")
    assert rows(broken) == rows(tmp_path / "whole")


def test_compare_trains_on_the_same_data_and_resumes_where_it_was_stopped(tmp_path, capsys):
    out = tmp_path / "runs"
    arguments = ["--compare", "adamw,galore,fira", "--steps", "12", "--out", str(out)]
    run(*arguments)
    table = capsys.readouterr().out
    comparison = json.loads((out / "comparison.json").read_text())
    assert [result["optimizer"] for result in comparison] == ["adamw", "galore", "fira"]
    assert all(f"{result['val_loss']:.4f}" in table for result in comparison)
    assert (out / "loss.png").exists()
    # Same weights and same data at the start: the first loss is one number.
    assert len({rows(out / name)[0]["loss"] for name in ("adamw", "galore", "fira")}) == 1
    (out / "fira" / "result.json").unlink()
    (out / "fira" / "checkpoint.pt").unlink()
    before = {name: rows(out / name) for name in ("adamw", "galore", "fira")}
    run(*arguments, "--resume")
    assert capsys.readouterr().out.count("finished before") == 2
    assert {name: rows(out / name) for name in before} == before


def test_sweep_gives_every_optimizer_the_same_number_of_learning_rates(tmp_path, capsys):
    run("--sweep", "adamw,galore", "--steps", "3", "--out", str(tmp_path / "s"))
    results = json.loads((tmp_path / "s" / "comparison.json").read_text())
    rates = {name: [r["lr"] for r in results if r["optimizer"] == name] for name in ("adamw", "galore")}
    for name, values in rates.items():
        assert values == [pretrain.LEARNING_RATES[name] * factor for factor in pretrain.SWEEP]
    assert "best: adamw" in capsys.readouterr().out


def test_accumulated_micro_batches_give_the_steps_of_one_large_batch(tmp_path):
    def losses(*arguments: str) -> list[float]:
        out = tmp_path / arguments[1]
        pretrain.main(
            [
                "--text",
                TEXT,
                "--length",
                "32",
                "--steps",
                "4",
                "--lr",
                "1e-3",
                "--optimizer",
                "adamw",
                "--out",
                str(out),
                *arguments,
            ]
        )
        return [row["loss"] for row in rows(out)]

    assert losses("--batch", "8") == pytest.approx(losses("--batch", "2", "--accumulate", "4"), rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", *pretrain.lo.METHODS])
def test_every_optimizer_trains_in_bfloat16_autocast(optimizer, tmp_path):
    out = tmp_path / "run"
    run("--optimizer", optimizer, "--steps", "10", "--dtype", "autocast", "--out", str(out))
    assert rows(out)[-1]["val_loss"] < rows(out)[0]["loss"]


def test_bpe_trains_a_tokenizer_and_keeps_it(tmp_path):
    out = tmp_path / "run"
    run("--bpe", "300", "--steps", "3", "--out", str(out))
    assert rows(out)[0]["loss"] == pytest.approx(5.7, abs=0.15)  # ln 300
    assert (out / "bpe-300.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "galor"], "did you mean 'galore'"),
        (["--text", "/no/such/file"], "--text /no/such/file: there is no such file"),
        (["--length", "200000"], "not more than the sequence length 200000"),
        (["--steps", "0"], "--steps is 0; it must be at least 1"),
        (["--bpe", "100"], "--bpe is 100; it must be at least 257"),
        (["--compare", "adamw,galore", "--lr", "1e-3"], "--lr with several optimizers would be unfair"),
        (["--option", "update_gap=3"], "unknown option 'update_gap'"),
        (["--option", "seed"], "write KEY=VALUE"),
        (["--rank", "0"], "rank"),
        (["--dataset", "allenai/c4"], "--text and --dataset cannot be combined"),
        (["--resume", "--overwrite"], "choose one"),
    ],
)
def test_bad_input_ends_with_a_message_and_no_traceback(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*arguments, "--out", str(tmp_path / "run"))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_with_a_run_is_neither_overwritten_nor_mixed_with_another(tmp_path, capsys):
    out = tmp_path / "run"
    run("--steps", "3", "--out", str(out))
    kept = rows(out)
    for arguments, message in (
        (["--steps", "3"], "holds a run already"),
        (["--steps", "4", "--resume"], "steps: 3 there, 4 now"),
        (["--steps", "3", "--resume", "--seed", "1"], "seed: 0 there, 1 now"),
    ):
        with pytest.raises(SystemExit):
            run(*arguments, "--out", str(out))
        assert message in capsys.readouterr().err
        assert rows(out) == kept
    run("--steps", "2", "--overwrite", "--out", str(out))
    assert len(rows(out)) == 2
