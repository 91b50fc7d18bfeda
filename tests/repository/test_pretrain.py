"""The main job: it learns, it survives SIGKILL at any moment to the same numbers, and it refuses what cannot work."""

import argparse
import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import lowrank_optim as lo
from tests.oracles.checkpoints import one_thread
from tests.oracles.processes import Child

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import pretrain  # noqa: E402
from pretraining import page  # noqa: E402
from pretraining.configs import SIZES, build_model  # noqa: E402
from pretraining.report import results_table  # noqa: E402
from pretraining.run import CUDA_PEAK, Result, Run  # noqa: E402

pytestmark = pytest.mark.long

TEXT = argparse.__file__  # real text of 100 kB that is on every machine
SMALL = ["--text", TEXT, "--length", "32", "--batch", "4", "--validation-batches", "2", "--validate-every", "10"]
SMALL += ["--save-every", "5", "--update-proj-gap", "4", "--device", "cpu"]
FEW_TOKENS = ["--length", "16", "--batch", "2"]  # for bfloat16, whose products are slow on many CPUs


def rows(folder: Path) -> list[dict]:
    """The metrics of a run without its times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def run(*arguments: str) -> None:
    pretrain.main([*SMALL, *arguments])


def run_alone(*arguments: str) -> None:
    torch.set_num_threads(1)
    run(*arguments)


def start(folder: Path, *arguments: str) -> Child:
    """The run in a process forked from one that has imported torch."""
    return Child(folder.with_suffix(".output"), run_alone, *arguments, "--out", str(folder))


def finish_afresh(folder: Path, *arguments: str) -> str:
    """The run as a user starts it, with an interpreter of its own; what it printed."""
    command = [sys.executable, str(EXAMPLES / "pretrain.py"), *SMALL, *arguments, "--out", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kill_after(child: Child, folder: Path, lines: int) -> None:
    """SIGKILL as soon as the run has written that many rows of metrics."""
    metrics = folder / "metrics.jsonl"
    child.kill_when(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= lines)


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


SLTRAIN = ["--parametrization", "sltrain", "--rank", "8", "--density", "0.05"]


KILLED = [pytest.param(["--optimizer", "adamw"], marks=pytest.mark.full), ["--optimizer", "galore"], SLTRAIN]


@pytest.mark.parametrize("what", KILLED, ids=lambda what: what[1])
def test_a_run_killed_at_any_moment_resumes_to_the_same_numbers(what, tmp_path):
    arguments = [*what, "--steps", "30"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    undisturbed = start(whole, *arguments)
    # In other processes: before the first checkpoint, between two, and again after a resume.
    kill_after(start(broken, *arguments), broken, 2)
    kill_after(start(broken, *arguments, "--resume"), broken, 13)
    undisturbed.finish()
    finish_afresh(broken, *arguments, "--resume")
    assert rows(broken) == rows(whole)


def test_a_resumed_run_shows_what_the_undisturbed_one_shows_and_the_stopped_one_says_how_to_go_on(
    tmp_path, capsys, monkeypatch
):
    def shown():
        """Running mean and last validation loss of every step, by its number."""
        found = re.findall(r"^adamw (\d+)/14: (loss [\d.]+(?:, val [\d.]+)?)", capsys.readouterr().out, re.MULTILINE)
        return dict(found)

    arguments = ["--optimizer", "adamw", "--steps", "14", "--log-every", "1", "--validate-every", "4"]
    run(*arguments, "--out", str(tmp_path / "whole"))
    undisturbed = shown()
    save = Run._save

    def stop(self, *args):
        save(self, *args)
        if self.step == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_save", stop)
    monkeypatch.setattr(sys, "argv", ["examples/pretrain.py"])
    with pytest.raises(SystemExit) as stopped:
        run(*arguments, "--overwrite", "--out", str(tmp_path / "broken"))
    assert stopped.value.code == 130
    streams = capsys.readouterr()
    last = streams.err.strip().splitlines()[-1].strip()
    assert last == pretrain.shlex.join(
        ["python", "examples/pretrain.py", *SMALL, *arguments, "--out", str(tmp_path / "broken"), "--resume"]
    )
    monkeypatch.setattr(Run, "_save", save)
    run(*arguments, "--out", str(tmp_path / "broken"), "--resume")
    resumed = shown()
    assert list(resumed) == ["11", "12", "13", "14"]
    assert resumed == {step: undisturbed[step] for step in resumed}


@one_thread()  # with several, sums depend on what else the machine does
def test_sigterm_saves_the_step_that_it_came_in_and_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    arguments = ["--optimizer", "galore", "--steps", "12", "--save-every", "100"]
    run(*arguments, "--out", str(tmp_path / "whole"))
    gradients = Run._gradients

    def terminated_in_the_fourth_step(self, model):
        if self.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return gradients(self, model)

    monkeypatch.setattr(Run, "_gradients", terminated_in_the_fourth_step)
    before, broken = signal.getsignal(signal.SIGTERM), tmp_path / "broken"
    with pytest.raises(SystemExit) as stopped:
        run(*arguments, "--out", str(broken))
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    said = capsys.readouterr().err
    assert "SIGTERM: stops after this step, and saves it" in said
    assert "This goes on from step 4, which is saved, to the same numbers:" in said
    assert said.strip().endswith(f"--out {broken} --resume")
    assert len(rows(broken)) == 4
    monkeypatch.setattr(Run, "_gradients", gradients)
    run(*arguments, "--out", str(broken), "--resume")
    assert rows(broken) == rows(tmp_path / "whole")


@pytest.mark.parametrize("when", ["outside of a step", "a second time"])
def test_sigterm_that_cannot_wait_stops_at_once(when, tmp_path, capsys, monkeypatch):
    def gradients(self, model):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("the second signal has stopped it")

    if when == "a second time":
        monkeypatch.setattr(Run, "_gradients", gradients)
    else:
        monkeypatch.setattr(pretrain, "Source", lambda args: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        run("--optimizer", "adamw", "--steps", "2", "--out", str(tmp_path / "run"))
    assert stopped.value.code == 143
    assert "This goes on from the last checkpoint to the same numbers:" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def results(*names: str) -> list[Result]:
    sizes = {"weights": 3_478_016, "gradients": 3_478_016, "state: exp_avg": 2_600_000}
    peak = {CUDA_PEAK: 21_234_567_890}
    rows = [
        Result(name, 1.6e-2, 800, 1_638_400, 1.2345, 1.358 + i / 100, 91.0, sizes, peak) for i, name in enumerate(names)
    ]
    return rows


@pytest.mark.parametrize(
    ("width", "missing"),
    [
        (140, []),
        (100, []),
        (80, ["ms/step"]),
        (60, ["ms/step", "train loss", "peak GPU memory"]),
        (46, ["ms/step", "train loss", "peak GPU memory", "lr"]),
    ],
)
def test_the_table_of_results_is_not_cut_on_a_narrow_console(width, missing):
    file = io.StringIO()
    Console(file=file, width=width).print(results_table(results("adamw", "galore_adafactor"), width))
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for number in ("galore_adafactor", "1.3680", "(+0.7 %)", "2.48 MiB", "(100 %)"):
        assert number in text
    note = " ".join(text.partition("not shown here:")[2].split())
    assert set(note.partition(" (result.json")[0].split(", ")) == set(missing or [""])


def test_a_comparison_that_is_killed_continues_its_second_run_and_leaves_the_first(tmp_path):
    arguments = ["--compare", "adamw,galore", "--steps", "20"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    undisturbed = start(whole, *arguments)
    kill_after(start(broken, *arguments), broken / "galore", 8)
    undisturbed.finish()
    output = start(broken, *arguments, "--resume").finish()
    assert "adamw, lr 0.002: finished before" in output
    assert "galore: continuing after step" in output
    for name in ("adamw", "galore"):
        assert rows(broken / name) == rows(whole / name)


def test_a_comparison_with_other_layers_resumes_in_them_and_leaves_out_what_they_save(tmp_path):
    arguments = ["--compare", "adamw,galore", "--parametrization", "none,sltrain", "--rank", "8", "--density", "0.05"]
    arguments += ["--option", "state_bits=8", "--steps", "12"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    undisturbed = start(whole, *arguments)
    kill_after(start(broken, *arguments), broken / "sltrain", 7)
    undisturbed.finish()
    output = start(broken, *arguments, "--resume").finish()
    assert "sltrain: continuing after step" in output
    for name in ("adamw", "galore", "sltrain"):
        assert rows(broken / name) == rows(whole / name)
    assert "| weights |" in (broken / "comparison.md").read_text()
    comparison = {r["optimizer"]: r["bytes"] for r in json.loads((broken / "comparison.json").read_text())}
    hidden, ffn, layers = 128, 352, 4
    shapes = 4 * [(hidden, hidden)] + 3 * [(ffn, hidden)]
    factored = sum(8 * (m + n) + int(0.05 * m * n) for m, n in shapes)
    dense = sum(m * n for m, n in shapes)
    assert comparison["adamw"]["weights"] - comparison["sltrain"]["weights"] == 4 * layers * (dense - factored)
    assert comparison["sltrain"]["gradients"] == comparison["sltrain"]["weights"]


def test_layers_of_every_kind_learn(tmp_path):
    for kind in ("low_rank", "sltrain"):
        arguments = ["--parametrization", kind, "--rank", "4", "--lr", "8e-3", "--steps", "40"]
        run(*arguments, "--in-backward", "--clip", "0", "--out", str(tmp_path / kind))
        history = rows(tmp_path / kind)
        assert history[-1]["val_loss"] < history[0]["loss"] - 2.5


def test_a_preset_with_sltrain_plans_8_bit_state_in_backward():
    parser = pretrain.arguments()
    parser.set_defaults(**pretrain.preset("60m", None, "sltrain"))
    args = parser.parse_args(["--parametrization", "sltrain"])
    assert pretrain.check(args) == [("adamw", "sltrain")]
    config = pretrain.configuration(args, "adamw", "sltrain")
    assert (config.rank, config.options, config.in_backward) == (128, {"state_bits": 8}, True)
    found = pretrain.plan_run(config, 32_000, torch.device("cuda"))
    assert found.setting["parametrization"] == {"name": "sltrain", "rank": 128, "density": 0.03}
    numbers = 8 * sum(128 * (m + n) + int(0.03 * m * n) for m, n in 4 * [(512, 512)] + 3 * [(512, 1376)])
    assert found.weights_bytes == pytest.approx(2 * (numbers + 2 * 32_000 * 512), rel=1e-3)


class Killed(BaseException):
    """Stands for SIGKILL inside this process: nothing catches it."""


def count_file_operations(monkeypatch, fatal: int | None = None) -> list[str]:
    """Record every flush to the disk and every replacement of a file; the process "dies" in the one numbered `fatal`."""
    seen: list[str] = []

    def watch(name: str) -> None:
        original = getattr(os, name)

        def watched(*arguments):
            seen.append(name)
            if len(seen) - 1 == fatal:
                raise Killed
            return original(*arguments)

        monkeypatch.setattr(os, name, watched)

    watch("fsync")
    watch("replace")
    return seen


def test_a_run_killed_in_any_of_its_file_operations_loses_nothing(tmp_path, monkeypatch):
    arguments = ["--optimizer", "galore", "--dtype", "bfloat16", "--option", "stochastic_rounding=True"]
    arguments += ["--steps", "4", "--save-every", "2", "--update-proj-gap", "2", *FEW_TOKENS]
    with monkeypatch.context() as patch:
        operations = count_file_operations(patch)
        run(*arguments, "--out", str(tmp_path / "whole"))
    # config.json, two checkpoints (metrics, file, place, folder), result.json, loss.png
    assert operations == [
        "fsync",
        "replace",
        *2 * ["fsync", "fsync", "replace", "fsync"],
        "fsync",
        "replace",
        "replace",
    ]
    for moment in range(len(operations)):
        broken = tmp_path / f"broken-{moment}"
        with monkeypatch.context() as patch:
            count_file_operations(patch, fatal=moment)
            with pytest.raises(Killed):
                run(*arguments, "--out", str(broken))
        for half in broken.glob("*.tmp"):  # the kill may also come while the file is being written
            half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
        run(*arguments, "--out", str(broken), "--resume")
        assert rows(broken) == rows(tmp_path / "whole"), moment


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
    assert (out / "comparison.md").read_text().count("\n") == 5  # header, rule, three rows
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
    assert rates == {"adamw": [1e-3, 2e-3, 4e-3, 8e-3], "galore": [4e-3, 8e-3, 1.6e-2, 3.2e-2]}
    for name, values in rates.items():  # what is the default was one of the choices
        assert pretrain.LEARNING_RATES[name] in values
    best = min((r for r in results if r["optimizer"] == "galore"), key=lambda r: r["val_loss"])
    edge = " (at the edge of the grid)" if best["lr"] in (4e-3, 3.2e-2) else ""
    assert f"best: galore, lr {best['lr']:g}{edge}, validation" in capsys.readouterr().out


def test_a_sweep_reports_a_run_that_diverged_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(pretrain.SWEEP_FROM, "adamw", 2e-3)
    gradients = Run._gradients

    def diverging(run: Run, model: torch.nn.Module) -> tuple[float, float]:
        if run.config.lr == 8e-3 and run.step == 2:
            model.model.embed_tokens.weight.data.fill_(float("nan"))
        return gradients(run, model)

    monkeypatch.setattr(Run, "_gradients", diverging)
    out = tmp_path / "s"
    arguments = ["--sweep", "adamw", "--steps", "4", "--out", str(out)]
    run(*arguments)
    text = capsys.readouterr().out
    assert "adamw, lr 0.008: the loss is nan at step 3" in text
    results = json.loads((out / "comparison.json").read_text())
    assert [(r["lr"], r["val_loss"] is None) for r in results] == [
        (2e-3, False),
        (4e-3, False),
        (8e-3, True),
        (1.6e-2, False),
    ]
    run(*arguments, "--resume")
    assert capsys.readouterr().out.count("finished before") == 4
    with pytest.raises(SystemExit):
        run("--optimizer", "adamw", "--lr", "8e-3", "--steps", "4", "--out", str(tmp_path / "one"))
    assert "the loss is nan at step 3; try a lower --lr" in capsys.readouterr().err


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
    run("--optimizer", optimizer, "--steps", "10", "--dtype", "autocast", *FEW_TOKENS, "--out", str(out))
    assert rows(out)[-1]["val_loss"] < rows(out)[0]["loss"]


def test_bpe_trains_a_tokenizer_and_keeps_it(tmp_path):
    out = tmp_path / "run"
    run("--bpe", "300", "--steps", "3", "--out", str(out))
    assert rows(out)[0]["loss"] == pytest.approx(5.7, abs=0.15)  # ln 300
    (tokenizer,) = out.glob("bpe-300-*.json")
    before = tokenizer.stat().st_mtime_ns
    run("--bpe", "300", "--steps", "2", "--out", str(out), "--overwrite")
    assert tokenizer.stat().st_mtime_ns == before


def test_a_streamed_dataset_resumes_at_its_place(tmp_path, capsys):
    pytest.importorskip("datasets")
    folder = tmp_path / "dataset"
    folder.mkdir()
    lines = Path(TEXT).read_text().split("\n\n")
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    arguments = ["--dataset", str(folder), *SMALL[2:], "--optimizer", "adamw"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    pretrain.main([*arguments, "--steps", "8", "--out", str(whole)])
    validate = Run.validate

    def killed(run: Run, model: torch.nn.Module) -> float:
        raise Killed

    Run.validate = killed  # after step 8, three steps after the checkpoint
    try:
        with pytest.raises(Killed):
            pretrain.main([*arguments, "--steps", "8", "--out", str(broken)])
    finally:
        Run.validate = validate
    pretrain.main([*arguments, "--steps", "8", "--out", str(broken), "--resume"])
    assert "continuing after step 5" in capsys.readouterr().out
    assert rows(broken) == rows(whole)
    assert len({row["loss"] for row in rows(whole)}) == 8
    with pytest.raises(SystemExit):
        pretrain.main([*arguments, "--steps", "50", "--batch", "80", "--out", str(tmp_path / "long")])
    assert "is used up; train for fewer steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "millions"),
    [("60m", 58.07), ("130m", 134.1), ("350m", 368.0), ("1b", 1339.1), ("7b", 6738.4)],
)
def test_models_have_the_published_numbers_of_parameters(name, millions):
    model = build_model(name, 32_000, 256, torch.device("meta"), torch.bfloat16, True, seed=0)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.051)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_default_model_is_small():
    assert SIZES["cpu"] == min(SIZES.values(), key=lambda s: s.hidden * s.layers)


def test_checkpointing_and_deterministic_arithmetic_do_not_change_the_numbers(tmp_path):
    run("--optimizer", "galore", "--steps", "4", "--out", str(tmp_path / "plain"))
    try:
        run(
            "--optimizer",
            "galore",
            "--steps",
            "4",
            "--out",
            str(tmp_path / "other"),
            "--grad-checkpointing",
            "--deterministic",
        )
    finally:
        torch.use_deterministic_algorithms(False)
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("plain", "other")]
    assert losses[0] == losses[1]


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
        (["--option", "rank=8"], "use --rank 8"),
        (["--optimizer", "adamw", "--option", "eps=1e-6"], "adamw has no further options"),
        (["--sweep", "adamw", "--lr", "1e-3"], "--lr and --sweep cannot be combined"),
        (["--device", "nonsense"], "--device nonsense cannot be used"),
        (["--warmup", "-1"], "--warmup is -1; it must be at least 0"),
        (["--betas", "0.9", "1.5"], "1.5"),
        (["--rank", "0"], "rank"),
        (["--dataset", "allenai/c4"], "--text and --dataset cannot be combined"),
        (["--resume", "--overwrite"], "choose one"),
        (["--parametrization", "sltran"], "did you mean 'sltrain'"),
        (["--parametrization", "sltrain,sltrain"], "names one twice"),
        (["--parametrization", "sltrain", "--optimizer", "galore"], "write --parametrization none,sltrain"),
        (["--parametrization", "none,sltrain"], "add --compare galore"),
        (["--parametrization", "sltrain", "--rank", "200"], "it must be an integer from 0 to 128"),
        (["--parametrization", "sltrain", "--density", "1.5"], "density is 1.5 for model.layers.0"),
        (["--parametrization", "low_rank", "--density", "0.1"], "--density needs --parametrization sltrain"),
        (["--parametrization", "sltrain", "--weight-bits", "8"], "exclude each other"),
        (["--alpha", "8"], "--alpha needs --parametrization low_rank or sltrain"),
    ],
)
def test_bad_input_ends_with_a_message_and_no_traceback(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*arguments, "--out", str(tmp_path / "run"))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_bad_options_of_a_later_run_are_found_before_the_first_one_starts(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("--compare", "adamw,galore", "--option", "stager=False", "--out", str(tmp_path / "run"))
    assert "unknown option 'stager'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_run_is_neither_overwritten_nor_mixed_with_another(tmp_path, capsys):
    out = tmp_path / "run"
    run("--steps", "3", "--out", str(out))
    kept = rows(out)
    for arguments, message in (
        (["--steps", "3"], "holds a run already"),
        (["--steps", "4", "--resume"], "steps: 3 there, 4 now"),
        (["--steps", "3", "--resume", "--seed", "1"], "seed: 0 there, 1 now"),
        (["--steps", "3", "--resume", "--optimizer", "adamw"], "optimizer: 'galore' there, 'adamw' now"),
        (["--steps", "3", "--overwrite", "--length", "200000"], "not more than the sequence length"),
    ):
        with pytest.raises(SystemExit):
            run(*arguments, "--out", str(out))
        assert message in capsys.readouterr().err
        assert rows(out) == kept
    run("--steps", "2", "--overwrite", "--out", str(out))
    assert len(rows(out)) == 2


def test_a_run_is_not_continued_on_another_text(tmp_path, capsys):
    text, out = tmp_path / "text.py", tmp_path / "run"
    text.write_text(Path(TEXT).read_text())
    run("--text", str(text), "--steps", "2", "--out", str(out))
    text.write_text(Path(TEXT).read_text().replace("parser", "reader"))
    with pytest.raises(SystemExit):
        run("--text", str(text), "--steps", "2", "--out", str(out), "--resume")
    assert "text_digest" in capsys.readouterr().err


def test_overwrite_deletes_nothing_but_the_files_of_runs(tmp_path, capsys):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "llama"}')
    for how in ("--overwrite", "--resume"):
        with pytest.raises(SystemExit):
            run("--steps", "2", how, "--out", str(foreign))
        assert "holds no run but other files (config.json, …)" in capsys.readouterr().err
    assert [path.name for path in foreign.iterdir()] == ["config.json"]

    out = tmp_path / "runs"
    run("--compare", "adamw,galore", "--steps", "2", "--out", str(out))
    (out / "galore" / "notes.txt").write_text("mine")
    run("--compare", "fira,galore", "--steps", "3", "--overwrite", "--out", str(out))
    assert not (out / "adamw").exists()
    assert (out / "galore" / "notes.txt").read_text() == "mine"
    assert len(rows(out / "galore")) == len(rows(out / "fira")) == 3


def test_two_processes_do_not_train_in_one_folder(tmp_path, capsys):
    pytest.importorskip("fcntl")
    with pretrain.only_process(tmp_path / "run"), pytest.raises(SystemExit):
        run("--steps", "2", "--out", str(tmp_path / "run"))
    assert "another process is training in" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_reported_and_kept(tmp_path, capsys):
    out = tmp_path / "run"
    run("--steps", "5", "--out", str(out))
    (out / "result.json").unlink()
    for damage in (b"", b"no checkpoint", (out / "checkpoint.pt").read_bytes()[:-1000]):
        (out / "checkpoint.pt").write_bytes(damage)
        with pytest.raises(SystemExit):
            run("--steps", "5", "--out", str(out), "--resume")
        assert "checkpoint.pt is damaged; delete it" in capsys.readouterr().err
        assert (out / "checkpoint.pt").read_bytes() == damage
        assert len(rows(out)) == 5


def test_a_report_is_one_page_with_curves_memory_and_settings(tmp_path, capsys):
    out, file = tmp_path / "runs", tmp_path / "report.html"
    run("--compare", "adamw,galore", "--steps", "10", "--out", str(out), "--report", str(file))
    text = file.read_text(encoding="utf-8")
    assert "wrote" in capsys.readouterr().out
    assert text.startswith("<!doctype html>")
    assert text.rstrip().endswith("</html>")
    assert not re.search(r'(src|href)="(?!data:)', text)  # nothing from elsewhere
    assert "<script" not in text
    image = base64.b64decode(re.search(r"data:image/svg\+xml;base64,([^\"]+)", text)[1]).decode()
    assert image.count("<svg") == 1
    cells = re.findall(r"<t[dh]>([^<]*)</t[dh]>", text)
    results = {r["optimizer"]: r for r in json.loads((out / "comparison.json").read_text())}
    for name in ("adamw", "galore"):
        assert any(cell.startswith(f"{results[name]['val_loss']:.4f}") for cell in cells)
    assert cells[cells.index("weights") + 1] == "3.32 MiB"
    assert (
        cells[cells.index("sum") + 1] == "13.27 MiB"
    )  # 4·869,504 bytes of weights, of gradients and of each of two moments
    assert cells[cells.index("lr", cells.index("sum")) + 1 :][:2] == ["0.002", "0.016"]  # differs
    assert cells[cells.index("validation_batches") + 1] == "2"  # the same in both
    file.unlink()
    run("--compare", "adamw,galore", "--steps", "10", "--out", str(out), "--report", str(file), "--resume")
    assert re.sub(r"Written[^<]*|base64,[^\"]*", "", file.read_text()) == re.sub(
        r"Written[^<]*|base64,[^\"]*", "", text
    )


def test_names_in_a_report_are_text_and_not_html():
    assert "<b>" not in page.table(["<b>"], [["a & <b>"]])
    assert "a &amp; &lt;b&gt;" in page.table(["x"], [["a & <b>"]])


@pytest.mark.parametrize(
    ("target", "message"),
    [("report.txt", "ends with .html"), ("none/report.html", "there is no folder"), ("folder.html", "is a folder")],
)
def test_a_report_that_cannot_be_written_is_refused_before_training(target, message, tmp_path, capsys):
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(SystemExit) as ended:
        run("--steps", "1", "--out", str(tmp_path / "run"), "--report", str(tmp_path / target))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_long_first_step_says_how_far_it_is(tmp_path, capsys, monkeypatch):
    watch = lo.watch_step
    monkeypatch.setattr(lo, "watch_step", lambda optimizer, report: watch(optimizer, report, every=0))
    run("--optimizer", "galore", "--steps", "1", "--out", str(tmp_path / "run"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("galore: step 1: ")]
    assert len(lines) == 39
    assert lines[-1].startswith("galore: step 1: 39 of 39 parameters, 28 of them with a new basis, ")
    assert lines[-1].endswith("about 0 s left")
