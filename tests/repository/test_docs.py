"""The pages in docs/: their code runs as it stands, and what they name exists."""

import re
from pathlib import Path

import torch

import lowrank_optim as lo
from lowrank_optim.groups.options import _FIXED

ROOT = Path(__file__).parents[2]
EXTEND = (ROOT / "docs/extend.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", EXTEND, flags=re.DOTALL)


def test_the_parts_of_the_page_pass_their_checks_and_train():
    torch.manual_seed(0)
    scope: dict = {}
    for code in BLOCKS[:-1]:
        exec(code, scope)
    exec(BLOCKS[-1].partition("model(torch.randn")[0], scope)
    before = [param.detach().clone() for param in scope["model"].parameters()]
    exec("model(torch.randn" + BLOCKS[-1].partition("model(torch.randn")[2], scope)
    assert all(not torch.equal(param, old) for param, old in zip(scope["model"].parameters(), before, strict=True))
    saved = scope["optimizer"].state_dict()["param_groups"]
    assert [group["rule"] for group in saved] == ["orthogonal", "adam"]
    assert (saved[0]["projector"], saved[0]["residual"]) == ("one_iteration", "row_normalised")


def test_each_part_takes_about_ten_lines():
    parts = [code for code in BLOCKS if "class " in code]
    assert len(parts) == 4
    for code in parts:
        lines = [line for line in code.splitlines() if line and not line.startswith("check_")]
        assert len(lines) <= (15 if "(lo.Rule)" in code else 12)


def test_public_names_of_the_pages_exist():
    for name in re.findall(r"\blo\.([A-Za-z_]\w*)", EXTEND):
        assert name in lo.__all__, name


def test_files_and_folders_of_the_pages_exist():
    for path in re.findall(r"`((?:\w+/)+\w+\.(?:py|md))`", EXTEND + ARCHITECTURE):
        assert (ROOT / path).exists() or (ROOT / "lowrank_optim" / path).exists(), path
    picture = ARCHITECTURE.partition("```\n")[2].partition("```")[0]
    named = {word for line in picture.splitlines() for word in re.findall(r"\w+", line[:56])}
    for folder in (ROOT / "lowrank_optim").iterdir():
        if (folder / "__init__.py").exists():
            assert folder.name in named, folder.name


def test_the_structural_options_and_at_most_twenty_words_are_listed():
    (line,) = (line for line in ARCHITECTURE.splitlines() if line.startswith("| structural"))
    for name in _FIXED:
        assert re.search(rf"\b{name}\b", line), name
    words = ARCHITECTURE.partition("## Words")[2].strip().splitlines()[2:]
    assert 0 < len(words) <= 20
