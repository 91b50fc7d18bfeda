"""The README: short, its code runs as it stands, and what it promises is there."""

import re

import lowrank_optim as lo
from tests.repository.pages import ROOT, blocks, text

README = text("README.md")


def test_the_complete_loop_runs_and_learns():
    (block,) = (block for block in blocks("README.md", "python") if "manual_seed" in block.code)
    scope: dict = {}
    block.execute(scope)
    assert scope["loss"].item() < 0.5
    assert "low-rank" in lo.describe(scope["groups"])


def test_it_is_short_and_chooses_in_eight_rows():
    assert len(README.splitlines()) <= 130
    choice = README.partition("## Choose an optimizer")[2].partition("\n##")[0]
    assert len([line for line in choice.splitlines() if line.startswith("|")]) == 2 + 8


def test_every_optimizer_that_it_names_is_public():
    named = {name for name in re.findall(r"`(\w+)`", README) if name.endswith(("AdamW", "8bit", "Optimizer"))}
    assert named
    assert named <= set(lo.__all__)


def test_its_picture_is_there():
    (picture,) = re.findall(r"!\[.+\]\((.+)\)", README)
    assert (ROOT / picture).stat().st_size > 1000
