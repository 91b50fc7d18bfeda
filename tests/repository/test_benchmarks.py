"""What the benchmarks write and measure: versions of the peers that ran, APOLLO-Mini at its rank, state wherever a peer keeps it."""

import json
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import common  # noqa: E402
import step_time  # noqa: E402

import lowrank_optim as lo  # noqa: E402

pytestmark = pytest.mark.long


def params() -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.full(shape, 0.01)) for shape in ((128, 64), (64, 96))]
    for number, param in enumerate(made):
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(number))
    return made


def test_every_json_has_the_versions_of_the_packages_that_ran_and_of_no_others(tmp_path, monkeypatch):
    pytest.importorskip("galore_torch")
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.delitem(sys.modules, "torchao", raising=False)
    monkeypatch.setitem(common.PACKAGES, "lowrank_optim.planner", "no-such-distribution")
    monkeypatch.setitem(sys.modules, "lowrank_optim.planner", sys)
    content = json.loads(common.write("made", {"seconds": 1.0}).read_text(encoding="utf-8"))
    assert content["results"] == {"seconds": 1.0}
    packages = content["environment"]["packages"]
    assert packages["galore-torch"] == metadata.version("galore-torch")
    assert packages["no-such-distribution"] == "not installed by pip"
    assert "torchao" not in packages


def test_apollo_mini_is_measured_at_rank_1_and_the_others_at_the_rank_that_is_named():
    def moments(build: step_time.Build) -> list[tuple[int, ...]]:
        made = params()
        optimizer = build(made, 16)
        optimizer.step()
        return [tuple(sorted(optimizer.state[p]["exp_avg"].shape)) for p in made]

    assert moments(step_time.ours(lo.APOLLOMiniAdamW)) == [(1, 128), (1, 96)]
    assert moments(step_time.ours(lo.APOLLOAdamW)) == [(16, 128), (16, 96)]
    assert moments(step_time.ours(lo.GaLoreAdamW)) == [(16, 128), (16, 96)]


def test_the_peer_of_apollo_mini_has_rank_1_and_one_scale_for_a_matrix():
    pytest.importorskip("apollo_torch")
    made = params()
    before = [p.detach().clone() for p in made]
    optimizer = step_time.apollo_torch_mini(made, 16)
    optimizer.step()
    for param, old in zip(made, before, strict=True):
        assert sorted(optimizer.state[param]["exp_avg"].shape) == [1, max(param.shape)]
        ratio = (param.detach() - old) / param.grad
        assert ratio.std() < 1e-2 * ratio.mean().abs()


class Holder:
    def __init__(self) -> None:
        self.basis, self.rank = torch.zeros(64, 8), 8


def test_state_is_counted_in_objects_and_inside_of_tensor_subclasses():
    assert step_time.stored_bytes(torch.zeros(10, dtype=torch.bfloat16)) == 20
    assert step_time.stored_bytes(Holder()) == 4 * 64 * 8
    assert step_time.stored_bytes(7) == 0
    quantised = lo.nn.quantize_weights_(torch.nn.Sequential(torch.nn.Linear(64, 128, bias=False)))[0].weight
    assert quantised.numel() * quantised.element_size() > step_time.stored_bytes(quantised) >= 128 * 64
