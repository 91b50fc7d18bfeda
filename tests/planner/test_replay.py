"""Repeated calls: a timeline with them is the one of running everything, event by event; and what cannot be repeated is not."""

import math
import threading

import pytest
import torch
from torch import nn

from lowrank_optim.planner.choices import resolve_optimizer
from lowrank_optim.planner.models import resolve_model
from lowrank_optim.planner.parametrizations import resolve_parametrization
from lowrank_optim.planner.planning import make_setting
from lowrank_optim.planner.simulation import replay
from lowrank_optim.planner.simulation.pretend import pretend
from lowrank_optim.planner.simulation.simulate import simulate

CONFIG = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "tie_word_embeddings": False,
}


def events(optimizer, device, **how):
    """What a run allocates and frees: every block's number, size, kind, part and owner, and the moment."""
    model, layers = resolve_model(CONFIG), resolve_parametrization(how.pop("parametrization", None))
    made = make_setting(
        model,
        resolve_optimizer(optimizer),
        batch=model.batch(1, 16),
        dtype=torch.bfloat16,
        device=torch.device(device),
        parametrization=layers,
        steps=("first step", "refresh step"),
        **how,
    )
    timeline, numbers = simulate(made).timeline, {}
    return [
        (numbers.setdefault(block, len(numbers)), is_made, block.size, block.resolved, block.part, block.owner, moment)
        for block, is_made, moment in timeline.events
    ]


@pytest.mark.parametrize(
    ("optimizer", "device", "how"),
    [
        (
            ("LowRankOptimizer", {"rule": "adam", "state_bits": 8}),
            "cuda",
            {"parametrization": ("sltrain", {"rank": 32, "density": 0.05}), "in_backward": True},
        ),
        (("galore_8bit", {"rank": 64}), "cpu", {"in_backward": True, "activation_checkpointing": True}),
        (("fira", {"rank": 64, "state_bits": 4, "basis_bits": 16}), "cuda", {"accumulate": 2}),
    ],
    ids=["sltrain", "galore", "fira"],
)
def test_repeated_calls_make_the_events_of_running_everything(optimizer, device, how, monkeypatch):
    repeats, repeat = [], replay.Replays._repeat

    def counted(self, tape):
        repeats.append(tape)
        return repeat(self, tape)

    monkeypatch.setattr(replay.Replays, "_repeat", counted)
    found = events(optimizer, device, **how)
    assert len(repeats) > 20
    monkeypatch.setattr(replay, "REPEATED", ())
    assert found == events(optimizer, device, **how)


class Kept:
    """Methods that are called twice with the same arguments."""

    def __init__(self) -> None:
        self.calls, self.left, self.old = 0, None, None

    def pure(self, x):
        self.calls += 1
        return {"sum": x + x.exp()}

    def keeps(self, x):
        self.calls += 1
        self.left = x + 1

    def frees(self, x):
        self.calls += 1
        self.old = None

    def view(self, x):
        self.calls += 1
        return x.clone()[1:]


@pytest.mark.parametrize(("name", "calls"), [("pure", 1), ("keeps", 2), ("frees", 2), ("view", 2)])
def test_only_calls_that_leave_nothing_but_their_results_are_repeated(name, calls, monkeypatch):
    monkeypatch.setattr(replay, "REPEATED", ((Kept, name, lambda kept, x: replay.form(x)),))
    kept = Kept()
    with pretend(torch.device("cuda")) as recorder:
        x = torch.zeros(4, 3, device="cuda")
        for _ in range(2):
            kept.old = torch.zeros(2, device="cuda")
            result = getattr(kept, name)(x)
        sizes = [block.size for block, made, _ in recorder.timeline.events if made]
    assert kept.calls == calls
    if name == "pure":
        assert result["sum"].shape == (4, 3)
        assert sizes == [48, 8, 48, 48, 8, 48, 48]


def test_calls_on_other_shapes_or_with_other_values_on_the_host_are_run():
    with pretend(torch.device("cuda")):
        x = torch.zeros(4, 3, device="cuda")
        assert replay.form(x) != replay.form(torch.zeros(3, 4, device="cuda"))
        assert replay.form(x) == replay.form(nn.Parameter(torch.ones(4, 3, device="cuda")))
        assert replay.form({"step": torch.tensor(1)}) != replay.form({"step": torch.tensor(2)})
        with pytest.raises(replay.Unlike):
            replay.form(torch.zeros(9))


def test_calls_of_another_thread_are_run(monkeypatch):
    """Which trains with real tensors, while this one plans."""
    monkeypatch.setattr(replay, "REPEATED", ((Kept, "pure", lambda kept, x: tuple(x.shape)),))
    kept, found = Kept(), []
    with pretend(torch.device("cuda")):
        for _ in range(2):
            kept.pure(torch.zeros(4, 3, device="cuda"))
        assert kept.calls == 1
        thread = threading.Thread(target=lambda: found.append(kept.pure(torch.ones(4, 3))["sum"]))
        thread.start()
        thread.join()
    assert kept.calls == 2
    assert found[0].device.type == "cpu"
    torch.testing.assert_close(found[0], torch.full((4, 3), 1.0 + math.e))
