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
import sltrain  # noqa: E402
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


def test_the_released_formula_of_the_sltrain_benchmark_is_our_layer_in_more_memory(monkeypatch):
    monkeypatch.setattr(sltrain, "RANK", 8)
    m, n, tokens = 96, 160, 24
    theirs = sltrain.build("released", m, n, torch.float64, torch.device("cpu"))
    like = {"rank": 8, "alpha": sltrain.ALPHA, "bias": False, "dtype": torch.float64}
    ours = lo.nn.SparseLowRankLinear(n, m, support=theirs.sparse_index, **like)
    torch.nn.init.normal_(theirs.lora_B)
    with torch.no_grad():
        for name, param in ours.named_parameters():
            param.copy_(theirs.get_parameter(name))
    found = []
    for layer in (theirs, ours):
        x = torch.randn(tokens, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *(param.grad for _, param in sorted(layer.named_parameters()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-11)
    x = torch.randn(tokens, n).requires_grad_()
    sizes = {form: sltrain.memory_of(form, m, n, x, torch.randn(tokens, m)) for form in sltrain.FORMS}
    count = int(sltrain.DENSITY * m * n)
    for form, numbers in (("dense", m * n), ("low rank", 8 * (m + n)), ("sltrain", 8 * (m + n) + count)):
        assert sizes[form]["weights"] == sizes[form]["gradients"] == 4 * numbers
        assert sizes[form]["index"] == 0
        assert sizes[form]["state"] - 8 * numbers in range(17)  # and a step for each parameter
    assert sizes["released"]["weights"] == sizes["sltrain"]["weights"]
    assert sizes["released"]["index"] == 8 * count
    assert sizes["released"]["peak"] > 2 * 4 * m * n > 4 * m * n > sizes["sltrain"]["peak"]


class Holder:
    def __init__(self) -> None:
        self.basis, self.rank = torch.zeros(64, 8), 8


def test_state_is_counted_in_objects_and_inside_of_tensor_subclasses():
    assert step_time.stored_bytes(torch.zeros(10, dtype=torch.bfloat16)) == 20
    assert step_time.stored_bytes(Holder()) == 4 * 64 * 8
    assert step_time.stored_bytes(7) == 0
    quantised = lo.nn.quantize_weights_(torch.nn.Sequential(torch.nn.Linear(64, 128, bias=False)))[0].weight
    assert quantised.numel() * quantised.element_size() > step_time.stored_bytes(quantised) >= 128 * 64
