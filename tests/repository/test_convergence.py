"""The convergence benchmark: its rule for learning rates on made-up losses, its tables, and the Muon baseline."""

import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent / "examples")]

import convergence  # noqa: E402
import pretrain  # noqa: E402
from convergence_plot import apart  # noqa: E402
from convergence_study import (  # noqa: E402
    Row,
    Setting,
    Study,
    best_rung,
    bracketed,
    markdown,
    next_rungs,
    summarise,
    table_rows,
)
from pretraining.baselines import MuonWithAdamW, adamw_split, muon  # noqa: E402
from pretraining.run import RunError, make_optimizer  # noqa: E402

import lowrank_optim as lo  # noqa: E402

pytestmark = pytest.mark.long


def climb(loss, longest=9):
    """The losses of all rungs that the rule asks for, and the rounds in which it asks."""
    losses, rounds = {}, []
    while rungs := next_rungs(losses, longest):
        rounds.append(rungs)
        losses |= {rung: loss(rung) for rung in rungs}
    return losses, rounds


@pytest.mark.parametrize("optimum", range(-3, 4))
def test_the_ladder_ends_with_the_optimum_between_two_worse_rates(optimum):
    losses, rounds = climb(lambda rung: 2.0 + (rung - optimum) ** 2)
    assert best_rung(losses) == optimum
    assert bracketed(losses)
    assert {optimum - 1, optimum + 1} <= losses.keys()
    # Only towards the better side: nothing beyond the worse neighbour of the start.
    assert sorted(losses) == list(range(min(-1, optimum - 1), max(1, optimum + 1) + 1))
    assert rounds[:2] == [[0], [-1, 1]]


def test_the_ladder_ends_at_its_largest_length_and_says_that_it_is_open():
    losses, _ = climb(lambda rung: -float(rung), longest=5)
    assert sorted(losses) == [-1, 0, 1, 2, 3]
    assert best_rung(losses) == 3
    assert not bracketed(losses)
    assert sorted(climb(lambda rung: 0.0, longest=2)[0]) == [-1, 0]  # a round is cut too


def test_a_diverged_neighbour_is_a_worse_one():
    losses, _ = climb(lambda rung: None if rung > 1 else 3.0 - rung)
    assert best_rung(losses) == 1
    assert losses[2] is None
    assert bracketed(losses)


def test_a_start_that_diverges_is_left_downwards():
    losses, rounds = climb(lambda rung: None if rung > -3 else 3.0 - rung)
    assert rounds == [[0], [-1], [-2], [-3], [-4]]
    assert best_rung(losses) == -3
    assert bracketed(losses)
    losses, _ = climb(lambda rung: None, longest=4)
    assert sorted(losses) == [-3, -2, -1, 0]
    assert best_rung(losses) is None
    assert not bracketed(losses)


def test_the_lowest_of_equal_rates_wins_and_a_plateau_ends():
    losses, _ = climb(lambda rung: 1.0 if -2 <= rung <= 2 else 2.0)
    assert best_rung(losses) == -2
    assert bracketed(losses)


def row(method, rung, seed, val_loss, lr=1e-3, state=1024, seconds=0.1):
    return Row(method, lr * 2.0**rung, rung, seed, val_loss, val_loss, 10, seconds, {"exp_avg": state}, "folder")


def finished(method, loss, seeds=3, **values):
    """A study with made-up runs."""
    study = Study(method, Setting(values.get("lr", 1e-3)), seeds, longest=5)
    while wanted := study.wanted():
        for rung, seed in wanted:
            study.rows[rung, seed] = row(method, rung, seed, loss(rung, seed), **values)
    return study


def test_the_best_rate_is_trained_with_every_seed_and_stays_the_best():
    # Other seeds are worse there than seed 0 is elsewhere: the choice was made before them.
    study = finished("adamw", lambda rung, seed: 2.0 + (rung - 1) ** 2 + 5.0 * seed)
    assert [(r.rung, r.seed) for r in study.best_runs()] == [(1, 0), (1, 1), (1, 2)]
    assert sorted(rung for rung, seed in study.rows if seed == 0) == [-1, 0, 1, 2]
    assert len(study.rows) == 6
    assert {r.lr for r in study.best_runs()} == {2e-3}


def test_a_table_has_means_spreads_ratios_and_marks():
    studies = [
        finished("adamw", lambda rung, seed: 2.0 + rung**2 + 0.1 * seed, state=8 * 2**20),
        finished("edge", lambda rung, seed: 4.2 - 0.1 * rung, state=2**20, seconds=0.15),
        finished("some", lambda rung, seed: None if seed == 2 else 1.0 + rung**2),
        finished("never", lambda rung, seed: None),
    ]
    header, *rows = table_rows([summarise(study) for study in studies])
    cells = {line[0]: dict(zip(enumerate(header), line, strict=True)) for line in rows}
    assert [line[0] for line in rows] == ["adamw", "edge", "never", "some"]
    assert rows[0][1:] == ["2.1000 ± 0.1000", "1.000", "0.001", "8.00 MiB", "1.00", "1.00"]
    # 4.2 − 0.3 at the fourth rate up, over 2.1
    assert rows[1][1:] == ["3.9000 ± 0.0000", "1.857", "0.008 *", "1.00 MiB", "0.12", "1.50"]
    assert cells["never"][1, "validation loss"] == "diverged"
    assert cells["some"][1, "validation loss"] == "diverged with 1 of 3 seeds"
    text = markdown([header, *rows])
    assert text.splitlines()[1] == "| :--- | ---: | ---: | ---: | ---: | ---: | ---: |"
    assert "end of its ladder" in text
    assert "end of its ladder" not in markdown([header, rows[0]])


def test_ratios_are_missing_where_adamw_was_not_run():
    summary = summarise(finished("fira", lambda rung, seed: 1.0 + rung**2))
    assert table_rows([summary])[1][2] == "–"


def test_step_time_leaves_out_validation_and_the_first_steps():
    metrics = [{"seconds": 5.0 + 0.1 * step} for step in range(40)]
    for later in metrics[30:]:
        later["seconds"] += 7.0
    metrics[30]["val_loss"] = 1.0
    metrics[0]["seconds"] = 0.0
    assert convergence.step_seconds(metrics) == pytest.approx(0.1)
    assert convergence.step_seconds(metrics[:12]) is None


def test_labels_are_moved_apart_and_keep_their_order():
    assert apart([1.0, 5.0], 1.0) == [1.0, 5.0]
    heights = [0.3, 0.0, 0.31, 0.05, 9.0, 0.9]
    placed = apart(heights, 1.0)
    by_height = [h for _, h in sorted(zip(heights, placed, strict=True))]
    assert all(b - a > 0.999 for a, b in pairwise(by_height))
    assert placed[4] == 9.0


@pytest.mark.parametrize("method", [*convergence.METHODS, "a_new_one"])
def test_every_method_gets_the_same_budget_and_a_rate_on_the_common_grid(method):
    args = convergence.arguments().parse_args([])
    shared = convergence.pretrain_arguments(args, convergence.PRESETS["cpu"], ["--text", pretrain.__file__])
    config = convergence.configuration(shared, method)
    reference = convergence.configuration(shared, "adamw")
    for key in ("model", "steps", "warmup", "batch", "accumulate", "length", "clip", "betas", "dtype", "seed"):
        assert getattr(config, key) == getattr(reference, key)
    assert config.weight_decay == (0.0 if method == "frugal_sgd" else reference.weight_decay)
    rung = torch.tensor(config.lr / 1e-3, dtype=torch.float64).log2().item()
    assert rung == pytest.approx(round(rung))
    if method != "a_new_one":
        pretrain.check_optimizer(config)
    assert config.label == method
    assert (config.parametrization != "none") == (method in ("low_rank", "sltrain"))


def test_what_the_benchmark_sets_itself_is_refused():
    args = convergence.arguments().parse_args([])
    for argument in (["--lr", "1"], ["--rank=4"], ["--seed", "3"], ["--density", "0.1"]):
        with pytest.raises(RunError, match="is set by the benchmark"):
            convergence.pretrain_arguments(args, convergence.PRESETS["cpu"], argument)
    with pytest.raises(RunError, match="no method 'adam'"):
        convergence.chosen_methods("galore,adam")


def test_a_benchmark_of_the_preset_with_adamw_is_written_to_the_results():
    def complete(*words):
        args, rest = convergence.arguments().parse_known_args(words)
        return convergence.complete(args, convergence.chosen_methods(args.methods), rest)

    assert complete()
    assert complete("--dataset", "allenai/c4", "--workers", "1")
    assert complete("--methods", "fira,adamw")
    for words in (["--methods", "muon,fira"], ["--steps", "9"], ["--seeds", "2"], ["--batch", "4"], ["--batch=4"]):
        assert not complete(*words)


def results_of(methods, date, **values):
    shared = {"rule": "r", "trained_on": "cpu", "longest_ladder": 7, "seeds": 3, "tokens": 9, "threads_of_a_worker": 1}
    runs = [{"method": name, "val_loss": 1.0, "date": date} for name in methods]
    rows = {name: {"method": name, "environment": {"date": date}} for name in methods}
    return shared | {"shared": {"text_digest": "abc"}, "methods": rows, "runs": runs} | values


def test_a_benchmark_of_some_methods_takes_the_place_of_their_rows_and_keeps_the_others():
    old = results_of(["adamw", "muon", "galore"], "old")
    for row in old["methods"].values():
        del row["environment"]
    earlier = {"environment": {"date": "old"}, "results": old}
    both = convergence.added(results_of(["foam", "adamw"], "new"), earlier)
    dates = {name: row["environment"]["date"] for name, row in both["methods"].items()}
    assert list(dates.items()) == [("adamw", "new"), ("muon", "old"), ("galore", "old"), ("foam", "new")]
    assert [(run["method"], run["date"]) for run in both["runs"]] == [
        ("muon", "old"),
        ("galore", "old"),
        ("foam", "new"),
        ("adamw", "new"),
    ]
    other = results_of(["adamw"], "new", shared={"text_digest": "abd"})
    with pytest.raises(RunError, match=r"shared is \{'text_digest': 'abd'\} now and was \{'text_digest': 'abc'\}"):
        convergence.added(other, earlier)


def test_a_small_benchmark_runs_and_a_second_call_uses_its_runs(tmp_path, monkeypatch):
    """In this process: no pool, no spawned interpreter."""
    from concurrent.futures import Future

    class Pool:
        def __init__(self, workers, context, start, arguments):
            monkeypatch.setattr(convergence.signal, "signal", lambda *_: None)
            quiet = pretrain.console.quiet
            start(*arguments)
            pretrain.console.quiet = quiet

        def submit(self, function, *arguments):
            future = Future()
            future.set_result(function(*arguments))
            return future

        def shutdown(self, **_):
            pass

    monkeypatch.setattr(convergence, "ProcessPoolExecutor", Pool)
    monkeypatch.setitem(convergence.PRESETS, "cpu", replace(convergence.PRESETS["cpu"], longest=1))
    monkeypatch.setattr(convergence, "write", lambda *_: pytest.fail("a restricted benchmark is no result"))
    threads = torch.get_num_threads()
    words = ["--methods", "adamw,sltrain", "--steps", "2", "--seeds", "2", "--out", str(tmp_path / "out")]
    words += ["--text", pretrain.__file__, "--batch", "2", "--length", "16", "--validation-batches", "1"]
    try:
        convergence.main(words)
        results = json.loads((tmp_path / "out" / "convergence.json").read_text())["results"]
        assert set(results["methods"]) == {"adamw", "sltrain"}
        assert results["methods"]["sltrain"]["parametrization"] == "sltrain"
        assert len(results["runs"]) == len(list((tmp_path / "out").glob("*/result.json"))) == 4
        assert {run["seed"] for run in results["runs"]} == {0, 1}
        assert results["tokens"] == 2 * 2 * 16
        assert not list((tmp_path / "out").glob("*/checkpoint.pt"))
        assert (tmp_path / "out" / "convergence.png").read_bytes().startswith(b"\x89PNG")
        assert "| adamw |" in (tmp_path / "out" / "convergence.md").read_text()
        monkeypatch.setattr(convergence.Run, "train", lambda *_: pytest.fail("trained again"))
        convergence.main(words)
        again = json.loads((tmp_path / "out" / "convergence.json").read_text())["results"]
        assert again == results
    finally:
        torch.set_num_threads(threads)


# The baselines --------------------------------------------------------------------------------------------------------------

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")


def tiny_model():
    torch.manual_seed(0)
    return torch.nn.ModuleDict(
        {
            "embed": torch.nn.Embedding(50, 32),
            "up": torch.nn.Linear(32, 96),
            "down": torch.nn.Linear(96, 32),
            "lm_head": torch.nn.Linear(32, 50, bias=False),
        }
    )


def test_adamw_split_is_galore_at_full_rank():
    """In the basis of the coordinates, where Adam on R = G is Adam on G."""
    model, other = tiny_model(), tiny_model()
    optimizer = adamw_split(model, 1e-2, (0.9, 0.95), 0.1)
    projector = lo.Coordinate()
    groups = lo.param_groups(other, rank=1.0, weight_decay=0.1)
    galore = lo.GaLoreAdamW(groups, 1e-2, (0.9, 0.95), projector=projector, update_proj_gap=100, stagger=False)
    for step in range(5):
        train_step(model, optimizer, step)
        train_step(other, galore, step)
    for (name, weight), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5, msg=name)


def train_step(model, optimizer, step):
    tokens = torch.randint(50, (16,), generator=torch.Generator().manual_seed(step))
    hidden = model["down"](model["up"](model["embed"](tokens)).relu())
    torch.nn.functional.cross_entropy(model["lm_head"](hidden), tokens.roll(1)).backward()
    optimizer.step()
    optimizer.zero_grad()


@needs_muon
def test_muon_trains_the_matrices_and_adamw_the_rest_as_they_would_alone():
    model, alone = tiny_model(), tiny_model()
    optimizer = muon(model, 1e-2, (0.9, 0.95), 0.1)
    matrices = [alone["up"].weight, alone["down"].weight]
    dense = [alone["embed"].weight, alone["lm_head"].weight]
    biases = {"params": [alone["up"].bias, alone["down"].bias], "weight_decay": 0.0}
    first = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    second = torch.optim.AdamW([{"params": dense}, biases], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(5):
        train_step(model, optimizer, step)
        tokens = torch.randint(50, (16,), generator=torch.Generator().manual_seed(step))
        hidden = alone["down"](alone["up"](alone["embed"](tokens)).relu())
        torch.nn.functional.cross_entropy(alone["lm_head"](hidden), tokens.roll(1)).backward()
        for part in (first, second):
            part.step()
            part.zero_grad()
    for (name, weight), other in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=0, msg=name)
    assert lo.state_bytes(optimizer)["momentum_buffer"] == 4 * 2 * 32 * 96
    assert lo.state_bytes(optimizer)["exp_avg"] == 4 * (2 * 50 * 32 + 96 + 32)


@needs_muon
def test_muon_resumes_to_the_bit_and_follows_a_schedule(tmp_path):
    def make():
        model = tiny_model()
        optimizer = muon(model, 1e-2, (0.9, 0.95), 0.1)
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step)

    def train(parts, steps):
        for step in steps:
            train_step(*parts[:2], step)
            parts[2].step()

    whole, broken = make(), make()
    train(whole, range(8))
    train(broken, range(4))
    torch.save([part.state_dict() for part in broken], tmp_path / "checkpoint.pt")
    resumed = make()
    for part, state in zip(resumed, torch.load(tmp_path / "checkpoint.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    train(resumed, range(4, 8))
    for (name, weight), other in zip(resumed[0].named_parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(weight, other), name
    for group in resumed[1].muon.param_groups + resumed[1].adamw.param_groups:
        assert group["lr"] == pytest.approx(1e-2 * 0.8**8)


def test_a_torch_without_muon_is_told_so(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    args = convergence.arguments().parse_args([])
    shared = convergence.pretrain_arguments(args, convergence.PRESETS["cpu"], ["--text", pretrain.__file__])
    with pytest.raises(RunError, match=r"muon needs torch 2\.9"):
        make_optimizer(convergence.configuration(shared, "muon"), tiny_model())
    with pytest.raises(RuntimeError, match=r"muon needs torch 2\.9"):
        MuonWithAdamW(lo.param_groups(tiny_model(), rank=1), 1e-3, (0.9, 0.95), 0.1)
