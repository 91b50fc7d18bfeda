"""The command `lowrank-optim`, as a person or a script meets it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lowrank_optim.cli import main
from lowrank_optim.planner import search
from lowrank_optim.planner.report.budget_table import code
from tests.oracles.planned import two_recipes

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import pretrain  # noqa: E402

pytestmark = pytest.mark.long

RECIPES = search.RECIPES

FIELDS = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "tie_word_embeddings": False,
}
SHORT = ("--sequence-length", "64")


@pytest.fixture(autouse=True)
def few_recipes(monkeypatch):
    two_recipes(monkeypatch)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "small").mkdir()
    path = tmp_path / "small" / "config.json"
    path.write_text(json.dumps(FIELDS))
    return str(path)


def test_a_table_names_a_winner_and_the_code_that_trains_it(config, capsys):
    assert main(["plan", "--model", config, "--budget", "1GiB", *SHORT]) == 0
    printed = capsys.readouterr()
    assert "Training small (" in printed.out
    assert "within 1 GiB" in printed.out
    assert "→ AdamW" in printed.out
    assert "torch.optim.AdamW(model.parameters())" in printed.out
    assert printed.err == ""  # no terminal, no progress
    assert all(len(line) <= 110 for line in printed.out.splitlines())


def test_the_winner_is_the_first_recipe_that_fits(config, capsys):
    budget = "540MiB"  # the context takes 512
    code = main(["plan", "--model", config, "--budget", budget, *SHORT])
    out = capsys.readouterr().out
    assert code == 1
    assert "Nothing fits 540 MiB" in out
    assert "The smallest is" in out
    assert "What would help:" in out


def test_json_holds_all_numbers_and_nothing_else_is_on_stdout(config, capsys):
    assert main(["plan", "--model", config, "--budget", "1GiB", "--json", *SHORT]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["winner"] == "AdamW"
    assert content["question"]["budget"] == 2**30
    assert content["parameters"] == 2 * 1000 * 128 + 4 * (4 * 128 * 128 + 3 * 128 * 352 + 2 * 128) + 128
    row = content["rows"][0]
    assert sum(row["parts"].values()) == row["peak"] < row["needed"]
    assert content["confirmed"]["peak_bytes"] == row["peak"]


def documented(heading: str) -> dict[str, set[str]]:
    """The keys of a table of docs/memory.md behind a sentence, and for each the names in its description."""
    page = (Path(__file__).parents[2] / "docs" / "memory.md").read_text(encoding="utf-8")
    table = page[page.index(heading) :].split("|---|---|\n")[1].split("\n\n")[0]
    found = {}
    for line in table.splitlines():
        keys, _, text = line.strip("| ").partition(" | ")
        found |= {key: set(re.findall(r"`(\w+)`", text)) for key in re.findall(r"`(\w+)`", keys)}
    return found


def test_what_json_holds_is_what_the_documentation_says(config, capsys):
    assert main(["plan", "--model", config, "--optimizer", "sgd", "--json", *SHORT]) == 0
    plan, said = json.loads(capsys.readouterr().out), documented("With `--optimizer` or")
    assert plan["format"] == 1
    assert plan.keys() == said.keys()
    assert plan["setting"].keys() == said["setting"]
    assert plan["state"].keys() == said["state"]
    assert main(["plan", "--model", config, "--fsdp", "2", "--json", *SHORT]) == 0
    table, said = json.loads(capsys.readouterr().out), documented("Without them it is the table")
    assert table.keys() == said.keys()
    assert table["question"].keys() == said["question"]
    assert table["question"]["world_size"] == 2
    assert table["question"]["sequence_length"] == 64
    assert table["rows"][0].keys() == said["rows"]
    assert table["confirmed"].keys() | {"format", "budget"} == plan.keys()


def test_one_optimizer_is_planned_with_its_options(config, capsys):
    one = ("plan", "--model", config, "--optimizer", "galore_8bit", "--rank", "16", "--in-backward", *SHORT)
    assert main([*one, "--budget", "1GiB", "--option", "basis_bits=4", "--per-layer"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "small with GaLoreAdamW8bit, rank 16, 1 x 64 tokens, bfloat16, updates in backward, activation checkp"
    )
    assert "budget 1 GiB: fits" in out
    assert "model.layers.3" in out
    assert main([*one, "--budget", "520MiB"]) == 1
    assert "does not fit" in capsys.readouterr().out
    assert main([*one, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["budget"] is None
    assert content["setting"]["options"] == {"rank": 16}


def test_layers_with_a_parametrization_are_planned(config, capsys):
    one = ("plan", "--model", config, "--parametrization", "sltrain", "--rank", "16", *SHORT)
    assert main([*one, "--density", "0.05", "--option", "state_bits=8", "--in-backward", "--json"]) == 0
    setting = json.loads(capsys.readouterr().out)["setting"]
    assert setting["parametrization"] == {"name": "sltrain", "rank": 16, "density": 0.05}
    assert setting["optimizer"] == "LowRankOptimizer"
    assert setting["options"] == {"rule": "adam", "state_bits": 8}
    assert main([*one, "--optimizer", "galore", "--budget", "1MiB"]) == 1
    assert capsys.readouterr().out.startswith("small with GaLoreAdamW, sltrain rank 16, 1 x 64 tokens")


def test_the_code_of_sltrain_is_that_of_its_recipe():
    (recipe,) = (recipe for recipe in RECIPES if recipe.parametrization is not None)
    row = SimpleNamespace(title=recipe.title, optimizer=recipe.optimizer, rank=64, weight_bits=16, in_backward=True)
    lines = code(search.Question("llama-60m", 2**30), row)
    assert "model = lo.nn.sltrain_(model, rank=64, density=0.05, alpha=8, init='fresh')" in lines
    assert lines[-2] == "optimizer = lo.LowRankOptimizer(lo.param_groups(model, rank=None), rule='adam', state_bits=8)"


def test_a_picture_without_its_library_is_refused_before_the_plan(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("lowrank_optim.planner.command.resolve_model", lambda name: pytest.fail("planned"))
    assert main(["plan", "--model", "llama-7b", "--plot", "plan.png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_a_picture_is_written(config, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.png"
    assert main(["plan", "--model", config, "--budget", "1GiB", "--plot", str(picture), *SHORT]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (
        main(["plan", "--model", config, "--optimizer", "sgd", "--plot", str(picture.with_name("b.png")), *SHORT]) == 0
    )
    assert picture.with_name("b.png").exists()
    nowhere = str(tmp_path / "none" / "plan.png")
    assert main(["plan", "--model", config, "--optimizer", "sgd", "--plot", nowhere, *SHORT]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "lama-7b"], "did you mean llama-7b"),
        (["--model", "llama-60m", "--fsdp"], "write --fsdp 4, or --world-size 4 --fsdp"),
        (["--model", "llama-60m", "--optimizer", "adm"], "did you mean"),
        (["--model", "llama-60m", "--budget", "lots"], "write a number and a unit, such as 24GiB"),
        (["--model", "llama-60m", "--in-backward"], "--in-backward needs --optimizer"),
        (["--model", "llama-60m", "--rank", "0.5"], "a table needs an int"),
        (["--model", "llama-60m", "--density", "0.5"], "--density needs --parametrization"),
        (["--model", "llama-60m", "--parametrization", "sltrain", "--rank", "0.5"], "must be an integer from 0 to 512"),
        (["--model", "llama-60m", "--batch-size", "0"], "batch_size is 0"),
        (["--model", "llama-60m", "--optimizer", "galore", "--option", "basis_bits"], "write KEY=VALUE"),
        (["--model", "nowhere/config.json"], "cannot be read"),
    ],
)
def test_bad_input_ends_with_2_and_says_what_to_change(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 2
    assert "plan" in capsys.readouterr().out


def test_the_package_does_not_import_the_planner_nor_transformers():
    code = (
        "import sys, lowrank_optim as lo; "
        "heavy = {'transformers', 'matplotlib', 'triton', 'torch.distributed.tensor', 'lowrank_optim.planner'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules); assert lo.plan and lo.MemoryPlan"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_example_plans_a_run_without_a_gpu_and_refuses_what_does_not_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "pretrain" / "galore"  # what `make pretrain` leaves in the default folder
    run.mkdir(parents=True)
    (run / "config.json").write_text('{"model": "cpu", "optimizer": "galore", "steps": 800, "corpus": "other"}')
    before = sorted(tmp_path.rglob("*"))
    small = ["--config", "9m", "--length", "64", "--bpe", "1000"]
    plan_run, planned = pretrain.plan_run, []

    def plan_once(*given):
        """A budget does not change what a run takes."""
        if not planned:
            planned.append(plan_run(*given))
        return planned[0]

    monkeypatch.setattr(pretrain, "plan_run", plan_once)
    pretrain.main([*small, "--budget", "2GiB"])
    dry = capsys.readouterr().out
    assert "LLaMA 9m with galore_8bit, rank 64, 1 x 64 tokens, bfloat16, updates in backward" in dry
    assert "this was a dry run" in dry
    with pytest.raises(SystemExit) as stop:
        pretrain.main([*small, "--budget", "530MiB"])
    assert stop.value.code == 2
    refused = capsys.readouterr().err
    assert "does not fit" in refused
    assert "GaLore 8-bit" in refused
    assert sorted(tmp_path.rglob("*")) == before  # a plan writes nothing


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(
    ("arguments", "ends"),
    [("", "--resume"), ("--steps 30", "--resume --steps 30"), ("--steps 30 --overwrite", "--steps 30 --overwrite")],
)
def test_make_pretrain_continues_the_run_in_the_folder_unless_it_is_to_be_deleted(arguments, ends, tmp_path):
    (tmp_path / ".ready").touch()
    command = [
        "make",
        "-n",
        "--no-print-directory",
        "-f",
        str(ROOT / "Makefile"),
        "pretrain",
        f"VENV={tmp_path}",
        f"ARGS={arguments}",
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    words = said.splitlines()[-1].split()
    assert " ".join(words) == (
        f"{tmp_path}/bin/python examples/pretrain.py --compare adamw,galore --out runs/pretrain {ends}"
    )
