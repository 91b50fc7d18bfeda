"""Checkpoints of other versions: frozen ones load and train on to the same numbers, newer formats are refused, older ones migrate."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo
from lowrank_optim.groups.complete import FORMAT_KEY, STATE_FORMAT
from lowrank_optim.optimizers import migrations
from tests import freeze
from tests.oracles.checkpoints import one_thread

FILES = sorted(freeze.FOLDER.glob("format_*/*.pt.gz"))


def put(model: nn.Module, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(weights[name])


def distance(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return sum(float((got[name].double() - expected[name].double()).square().sum()) for name in expected) ** 0.5


def test_every_method_and_every_case_is_frozen():
    """`python -m tests.freeze` writes the files that are missing."""
    assert set(freeze.CASES) >= set(freeze.METHODS)
    frozen = {path.name for path in FILES if path.parent.name == f"format_{STATE_FORMAT}"}
    assert frozen == {f"{name}.pt.gz" for name in freeze.CASES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name.partition('.')[0]}")
def test_a_frozen_checkpoint_loads_and_steps_to_the_same_numbers(path):
    case, saved = freeze.CASES[path.name.partition(".")[0]], freeze.read(path)
    states = copy.deepcopy(saved["optimizer"]["state"])
    with one_thread(), freeze.coded_at_any_size():
        model, optimizer, _ = case.build()
        put(model, saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        own = optimizer.state_dict()["state"]
        assert own.keys() == states.keys()
        for key, state in states.items():
            assert own[key].keys() == state.keys()
            for name, tensor in state.items():
                assert own[key][name].dtype == tensor.dtype
                assert torch.equal(own[key][name], tensor), (key, name)
        case.train(model, optimizer, freeze.BEFORE, freeze.BEFORE + freeze.AFTER)

        unloaded, fresh, _ = case.build()
        put(unloaded, saved["weights"])
        case.train(unloaded, fresh, freeze.BEFORE, freeze.BEFORE + freeze.AFTER)
    way = distance(saved["weights"], saved["after"])
    assert distance(freeze.weights(model), saved["after"]) <= case.tolerance * way
    assert distance(freeze.weights(unloaded), saved["after"]) > 2 * case.tolerance * way  # the state matters


def optimizer_and_checkpoint() -> tuple[lo.LowRankOptimizer, dict]:
    case = freeze.CASES["galore"]
    model, optimizer, _ = case.build()
    case.train(model, optimizer, 0, 2)
    return case.build()[1], optimizer.state_dict()


def test_every_group_holds_the_number_and_so_does_every_checkpoint():
    optimizer, checkpoint = optimizer_and_checkpoint()
    optimizer.add_param_group({"params": [("more", nn.Parameter(torch.ones(3)))], FORMAT_KEY: 17})
    assert [group[FORMAT_KEY] for group in optimizer.param_groups] == [STATE_FORMAT] * 3
    assert [group[FORMAT_KEY] for group in checkpoint["param_groups"]] == [STATE_FORMAT] * 2


def test_there_is_a_migration_from_every_older_format():
    assert sorted(migrations.MIGRATIONS) == list(range(STATE_FORMAT))


def test_a_newer_format_is_refused_with_what_to_do():
    optimizer, checkpoint = optimizer_and_checkpoint()
    before = copy.deepcopy(optimizer.state_dict())
    for group in checkpoint["param_groups"]:
        group[FORMAT_KEY] = STATE_FORMAT + 2
    message = (
        f"format {STATE_FORMAT + 2}, and this version .* up to {STATE_FORMAT}: .*pip install --upgrade lowrank-optim"
    )
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(checkpoint)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(t, after["state"][k][n]) for k, s in before["state"].items() for n, t in s.items())


@pytest.mark.parametrize(("first", "second"), [("1", "1"), (True, True), (-1, -1), (1, 0), (1.0, 1.0), ([1], [1])])
def test_a_number_that_is_none_or_differs_between_groups_is_refused(first, second):
    optimizer, checkpoint = optimizer_and_checkpoint()
    for group, number in zip(checkpoint["param_groups"], (first, second), strict=True):
        group[FORMAT_KEY] = number
    with pytest.raises(ValueError, match=re.escape(f"{FORMAT_KEY} is {first!r}") + ".*one number"):
        optimizer.load_state_dict(checkpoint)


def test_a_checkpoint_that_is_no_optimizers_is_refused():
    optimizer, _ = optimizer_and_checkpoint()
    with pytest.raises(ValueError, match=r"needs the keys state and param_groups, and has weight, bias"):
        optimizer.load_state_dict(nn.Linear(2, 2).state_dict())


def test_a_checkpoint_without_the_number_loads_and_gets_it():
    optimizer, checkpoint = optimizer_and_checkpoint()
    for group in checkpoint["param_groups"]:
        del group[FORMAT_KEY]
    optimizer.load_state_dict(checkpoint)
    assert [group[FORMAT_KEY] for group in optimizer.param_groups] == [STATE_FORMAT] * 2
    assert FORMAT_KEY not in checkpoint["param_groups"][0]  # what was given is as it was
    assert float(optimizer.state_dict()["state"][0]["step"]) == 2.0


def test_steps_that_are_numbers_load_as_in_torch():
    """Checkpoints of torch before 1.12, and of AdamW as transformers had it."""
    theirs, ours = (nn.Parameter(torch.linspace(-1, 1, 12).view(4, 3)) for _ in range(2))
    reference, optimizer = torch.optim.AdamW([theirs], lr=0.1), lo.GaLoreAdamW([ours], lr=0.1)

    def run(optimizer: torch.optim.Optimizer, param: Tensor, count: int) -> None:
        for step in range(count):
            param.grad = freeze.gradient((4, 3), 0, step).float()
            optimizer.step()

    run(reference, theirs, 3)
    checkpoint = copy.deepcopy(reference.state_dict())
    checkpoint["state"][0]["step"] = 3
    with torch.no_grad():
        ours.copy_(theirs)
    optimizer.load_state_dict(checkpoint)
    assert checkpoint["state"][0]["step"] == 3
    run(reference, theirs, 4)
    run(optimizer, ours, 4)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_migrations_are_applied_one_after_the_other(monkeypatch):
    def second(state_dict: dict) -> None:
        for state in state_dict["state"].values():
            state["moment"] = state.pop("exp_avg")

    def third(state_dict: dict) -> None:
        for state in state_dict["state"].values():
            state["exp_avg"] = -state.pop("moment")

    optimizer, checkpoint = optimizer_and_checkpoint()
    monkeypatch.setattr(migrations, "STATE_FORMAT", 3)
    monkeypatch.setattr(migrations, "MIGRATIONS", {**migrations.MIGRATIONS, 1: second, 2: third})
    optimizer.load_state_dict(checkpoint)
    for state, given in zip(optimizer.state.values(), checkpoint["state"].values(), strict=True):
        torch.testing.assert_close(state["exp_avg"], -given["exp_avg"], rtol=0, atol=0)
    assert [group[FORMAT_KEY] for group in optimizer.param_groups] == [3, 3]
