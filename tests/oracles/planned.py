"""The planner's table in little time, for tests of what is printed of it; `test_planner_prediction` has all recipes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowrank_optim.planner import search
from lowrank_optim.planner.simulation.estimate import Probe

_PROBES: dict[tuple[Any, ...], Probe] = {}


def config_of(question: search.Question) -> str:
    """The model that is asked for, by what its config says."""
    said: Any = question.model
    if isinstance(said, str) and Path(said).is_file():
        return Path(said).read_text(encoding="utf-8")
    return str(said)


def two_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW and 8-bit GaLore in place of all recipes; what one process has simulated of a model is not simulated again."""
    simulated = search._Search._probe

    def probe(self: search._Search, tokens: int, rank: int | None) -> Probe:
        key = (config_of(self.question), replace(self.question, model="", budget=0), self.recipe.title, tokens, rank)
        if key not in _PROBES:
            _PROBES[key] = simulated(self, tokens, rank)
        return _PROBES[key]

    monkeypatch.setattr(search._Search, "_probe", probe)
    monkeypatch.setattr(search, "RECIPES", tuple(r for r in search.RECIPES if r.optimizer in ("adamw", "galore_8bit")))
