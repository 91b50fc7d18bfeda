"""README and the pages in docs/: their code runs as it stands, and what they name exists.

Each block of Python runs, those of a section (`##`) one after the other, in a scope that has `model` and what else
`pages.presupposed` says. Where a block makes a new optimizer, the test takes a step with it. Commands of a shell are not run here:
that the targets, files and flags are there is checked.
"""

import argparse
import re
import shlex
import sys
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import torch

import lowrank_optim as lo
from lowrank_optim import doctor
from lowrank_optim.groups.options import _FIXED
from lowrank_optim.planner import command as command_line
from tests.repository import pages
from tests.repository.pages import PAGES, ROOT, blocks, text
from tests.repository.test_packaging import PROJECT

EXTEND, ARCHITECTURE = text("docs/extend.md"), text("docs/architecture.md")
PARTS = [block.code for block in blocks("docs/extend.md", "python")]

OF_PROCESSES = ("docs/integrations/ddp.md", "docs/integrations/fsdp2.md")
OF_TRAINERS = "train_dataset=data"
OF_CHATS = ("docs/integrations/trl.md", "docs/integrations/peft.md")
NEEDS = {f"docs/integrations/{name}.md": name for name in ("trl", "peft", "lightning", "accelerate")}
"""Pages that need a package of others."""

STANDS_FOR = {
    '"llama-7b"': '"llama-60m"',
    "LlamaConfig()": "LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2)",
    "rank=1024": "rank=16",
    "max_steps=10_000": 'max_steps=2, report_to=[], save_strategy="no", use_cpu=True',
}
"""What the tests run in place of what a page says, for the sake of time."""

DO_NOT_RUN = {
    ("docs/integrations/fsdp2.md", "needs a GPU"),
    ("docs/integrations/accelerate.md", "needs several processes"),
    *(("docs/integrations/other_trainers.md", f"needs {name}") for name in ("axolotl", "LLaMA-Factory", "torchtitan")),
}
"""Pages with blocks that do not run, and why."""

WITH_PYTHON = [page for page in PAGES if page != "docs/extend.md" and any(blocks(page, "python"))]


@pytest.fixture
def one_process(tmp_path):
    """A process group of one."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.long
@pytest.mark.parametrize("page", WITH_PYTHON)
def test_code_of_the_page_runs(page, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    if page in OF_PROCESSES:
        request.getfixturevalue("one_process")
    if page in NEEDS:
        pytest.importorskip(NEEDS[page])
    for name in ("galore_torch", "apollo_torch"):  # as in a process of its own
        monkeypatch.delitem(sys.modules, name, raising=False)
    code = "".join(block.code for block in blocks(page, "python"))
    if OF_TRAINERS in code:
        pytest.importorskip("transformers")
    for _, section in groupby(blocks(page, "python"), key=lambda block: block.section):
        scope = pages.presupposed()
        if page in OF_PROCESSES:
            scope |= pages.presupposed_by_processes()
        if page in OF_CHATS:
            scope |= pages.presupposed_by_chats()
        for block in section:
            if block.not_run is None:
                run(block, scope)


def run(block: pages.Block, scope: dict) -> None:
    """Run a block, and take a step with the optimizer that it makes."""
    trainer = OF_TRAINERS in block.code
    if trainer:  # what a block makes itself, it makes after this
        scope |= pages.presupposed_by_a_trainer()
    old = scope["optimizer"]
    for word, stand_in in STANDS_FOR.items():
        block = replace(block, code=block.code.replace(word, stand_in))
    block.execute(scope)
    if trainer:
        made = scope["trainer"].optimizer or scope["trainer"].create_optimizer()
        assert isinstance(getattr(made, "optimizer", made), lo.LowRankOptimizer)
    elif scope["optimizer"] is not old and pages.is_readers(scope["model"]):
        assert pages.step_changes_weights(scope), f"{block.page}:{block.line}"


def test_blocks_that_do_not_run_are_known_and_say_why():
    found = {(page, block.not_run) for page in PAGES for block in blocks(page, "python") if block.not_run is not None}
    assert found == DO_NOT_RUN
    marks = sum(line.startswith(pages.NOT_RUN) for page in PAGES for line in text(page).splitlines())
    assert marks == len([block for page in PAGES for block in blocks(page, "python") if block.not_run is not None])


def test_every_block_has_a_language_that_the_tests_know():
    for page in PAGES:
        opened = re.findall(r"^```(\w*)$", text(page), flags=re.MULTILINE)[::2]
        assert set(opened) <= {"python", "bash", "text"}, page


WIDEST = 90
"""Characters of a line of code that a page shows at 1280 pixels, with the sizes of docs/site.css."""


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_code_of_the_page_fits_beside_the_two_columns(page):
    code = [line for found in ("python", "bash") for block in blocks(page, found) for line in block.code.splitlines()]
    assert [line for line in code if len(line) > WIDEST] == []


# Commands of a shell ------------------------------------------------------------------------------------------------------------

COMMANDS = sorted(
    {
        line
        for page in PAGES
        for block in blocks(page, "bash")
        for line in block.code.replace("\\\n", " ").splitlines()
        if line and not line.startswith("#")
    }
)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_command_names_is_there(command):
    program, *words = shlex.split(command, comments=True)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert words[0] in targets
        assert all("=" in word for word in words[1:])
    elif program == "git":
        assert words[:2] == ["clone", PROJECT["urls"]["Source"]]
    elif program == "cd":
        assert words == [PROJECT["urls"]["Source"].rpartition("/")[2]]
    elif program == "lowrank-optim":
        parser = argparse.ArgumentParser()
        subparsers = parser.add_subparsers()
        command_line.add_parser(subparsers)
        doctor.add_parser(subparsers)
        parser.parse_args(words)
    elif program == "pip":
        extras = PROJECT["optional-dependencies"]
        known = {re.split("[><=]", wanted)[0] for extra in extras.values() for wanted in extra}
        assert words[0] == "install"
        assert set(words[1:]) <= known | {"."}
    elif program in ("python", "torchrun", "bash"):
        script = next(word for word in words if word.endswith((".py", ".sh")))
        folder = (ROOT / script).parent
        sources = "".join(path.read_text(encoding="utf-8") for path in [ROOT / script, *folder.glob("*/*.py")])
        for flag in (word for word in words[words.index(script) :] if word.startswith("--")):
            assert f'"{flag}"' in sources, flag
    else:
        assert program == "accelerate"
        assert (ROOT / words[words.index("--config_file") + 1]).exists()


# What pages name ----------------------------------------------------------------------------------------------------------------


def test_the_first_page_says_what_the_names_of_the_examples_stand_for():
    section = text("docs/index.md").partition("## In the examples of these pages")[2]
    assert pages.presupposed().keys() <= {"torch", *re.findall(r"`(\w+)`", section)}


def test_the_table_of_all_optimizers_has_their_short_names():
    known = lo.METHODS | lo.FULL_RANK_METHODS | lo.LAYERWISE_METHODS
    rows = text("docs/choose.md").partition("| short name |")[2].partition("\n\n")[0].splitlines()[2:]
    shown = {}
    for row in rows:
        classes, names = (re.findall(r"`(\w+)`", cell) for cell in row.split(" | ")[:2])
        shown |= dict(zip(names, classes, strict=False))
    assert shown == {name: chosen.__name__ for name, chosen in known.items()}


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("docs/reference/")])
def test_public_names_of_the_page_exist(page):
    for name in re.findall(r"\blo\.([A-Za-z_][\w.]*\w)", text(page)):
        found = lo
        for part in name.split("."):
            assert hasattr(found, part), f"lo.{name}"
            found = getattr(found, part)
    for path in re.findall(r"`((?:\w+/)+[\w-]+\.(?:py|md|json|yaml|sh))", text(page)):
        assert (ROOT / path).exists() or (ROOT / "lowrank_optim" / path).exists(), path


def headings(page: Path) -> set[str]:
    """Anchors of a page, as mkdocs and GitHub make them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        assert there.exists(), target
        assert not anchor or anchor.startswith("lowrank_optim.") or anchor in headings(there), target


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r": ([\w/]+\.md)$", text("mkdocs.yml"), flags=re.MULTILINE))
    assert listed == {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}


def test_the_reference_has_every_public_name_once():
    listed = [
        name
        for page in PAGES
        if page.startswith("docs/reference/")
        for name in re.findall(r"^::: lowrank_optim\.([\w.]+)$", text(page), flags=re.MULTILINE)
    ]
    assert len(listed) == len(set(listed))
    modules = [name for name in listed if (ROOT / "lowrank_optim" / name.replace(".", "/")).with_suffix(".py").exists()]
    assert modules == [], "the page shows a module in place of its function: write module.function"
    listed = [re.sub(r"(?:^optimizers\.|)(\w+)\.\1$", r"\1", name) for name in listed]
    public = {name for name in lo.__all__ if name not in ("__version__", "distributed", "nn")}
    layers = {f"nn.{name}" for name in lo.nn.__all__} | {f"distributed.{name}" for name in lo.distributed.__all__}
    checks = {f"testing.{name}" for name in lo.testing.__all__}
    checks |= {f"diagnostics.{name}" for name in lo.diagnostics.__all__}
    beside = {"groups.options.Options", "integrations.transformers.LowRank", "integrations.transformers.InBackward"}
    beside |= {
        "change_group",
        "integrations.transformers.Progress",
        "integrations.compat.install",
        "integrations.compat.uninstall",
    }
    assert set(listed) == public | layers | checks | beside


# Write your own, and how it works -----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_parts_of_the_page_pass_their_checks_and_train():
    torch.manual_seed(0)
    scope: dict = {}
    for code in PARTS[:-1]:
        exec(code, scope)
    exec(PARTS[-1].partition("model(torch.randn")[0], scope)
    before = [param.detach().clone() for param in scope["model"].parameters()]
    exec("model(torch.randn" + PARTS[-1].partition("model(torch.randn")[2], scope)
    assert all(not torch.equal(param, old) for param, old in zip(scope["model"].parameters(), before, strict=True))
    saved = scope["optimizer"].state_dict()["param_groups"]
    assert [group["rule"] for group in saved] == ["orthogonal", "adam"]
    assert (saved[0]["projector"], saved[0]["residual"]) == ("one_iteration", "row_normalised")


def test_each_part_takes_about_ten_lines():
    parts = [code for code in PARTS if "class " in code]
    assert len(parts) == 5
    for code in parts:
        lines = [line for line in code.splitlines() if line and not line.startswith("check_")]
        longest = 15 if "(lo.Rule)" in code or "(lo.Projector)" in code else 12
        assert len(lines) <= longest


def test_folders_of_the_picture_exist():
    (picture,) = (block.code for block in blocks("docs/architecture.md", "text") if block.section == "The floors")
    named = {word for line in picture.splitlines() for word in re.findall(r"\w+", line[:31])}
    for folder in (ROOT / "lowrank_optim").iterdir():
        if (folder / "__init__.py").exists():
            assert folder.name in named, folder.name


def test_the_structural_options_and_at_most_twenty_words_are_listed():
    (line,) = (line for line in ARCHITECTURE.splitlines() if line.startswith("| structural"))
    for name in _FIXED:
        assert re.search(rf"\b{name}\b", line), name
    words = ARCHITECTURE.partition("## Words")[2].strip().splitlines()[2:]
    assert 0 < len(words) <= 20
