"""LISA and BAdam in loops of others: the Trainer of transformers, DistributedDataParallel, the main job."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lowrank_optim as lo
from lowrank_optim.integrations.transformers import LowRank
from tests.integrations.test_transformers_integration import (
    arguments,
    assert_same_weights,
    llama,
    logged,
    trainer_with_factory,
)
from tests.optimizers.test_lisa import VOCABULARY, assert_same, build_model
from tests.oracles.distributed_harness import spawn
from tests.repository.test_pretrain import kill_after, rows, start

pytestmark = pytest.mark.long

METHODS = {
    "lisa": {"method": "lisa", "active_layers": 1, "period": 4, "sleeping_state": "cpu"},
    "lisa low-rank": {"method": "lisa", "active_layers": 1, "period": 4, "rank": 4, "update_proj_gap": 2},
    "badam": {"method": "badam", "period": 4, "order": "ascending", "always_on": ("head", "final_norm")},
}


@pytest.mark.parametrize("name", METHODS)
def test_trainer_resumes_in_the_middle_of_a_period_with_accumulation_clipping_and_schedule(name, tmp_path):
    settings = {
        "max_steps": 12,
        "save_steps": 6,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
    }
    whole = trainer_with_factory(tmp_path / "whole", METHODS[name], **settings)
    whole.train()
    resumed = trainer_with_factory(tmp_path / "resumed", METHODS[name], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert_same_weights(whole.model, resumed.model)
    assert logged(whole, "loss")[6:] == logged(resumed, "loss")[6:]
    assert logged(whole, "learning_rate")[6:] == logged(resumed, "learning_rate")[6:]
    own, other = whole.optimizer.optimizer, resumed.optimizer.optimizer
    assert own.awake == other.awake
    assert own.param_groups[0]["steps"] == other.param_groups[0]["steps"] == 12


def test_the_factory_takes_what_layer_groups_takes(tmp_path):
    trainer = trainer_with_factory(tmp_path, {"method": "badam", "always_on": (), "as_layers": ("head",)})
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, lo.BAdamW)
    assert optimizer.layers == [0, 1, 2]
    assert {group["lr"] for group in optimizer.param_groups} == {5e-3}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.3, 0.0}
    with pytest.raises(TypeError, match=r"unknown option 'always_on'"):
        LowRank()(llama(), arguments(tmp_path), method="galore", rank=4, always_on=())


def batch(step: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(step))


def build(name: str, model: nn.Module) -> torch.optim.Optimizer:
    options = {"lisa": {"sampling": "weight_norm"}, "badam": {"order": "random"}}[name]
    return lo.by_name(name)(lo.layer_groups(model), lr=1e-2, eps=1e-6, period=2, seed=3, **options)


def train_on_half_a_batch(name: str, folder: Path) -> None:
    rank = torch.distributed.get_rank()
    model = build_model(torch.float64)
    torch.manual_seed(100 + rank)  # global generators differ; the draw must not
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = build(name, wrapped)
    awake = []
    for step in range(12):
        awake.append(optimizer.awake)
        tokens = batch(step)[2 * rank : 2 * rank + 2]
        nn.functional.cross_entropy(wrapped(tokens).flatten(0, 1), tokens.roll(1, 1).flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save({"model": model.state_dict(), "awake": awake}, folder / f"{rank}.pt")


@pytest.mark.parametrize("name", ["lisa", "badam"])
def test_ddp_ranks_draw_the_same_layers_and_equal_one_process_on_the_whole_batch(name, tmp_path):
    spawn(2, train_on_half_a_batch, name, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["awake"] == second["awake"]
    assert len({tuple(layers) for layers in first["awake"]}) > 3
    model = build_model(torch.float64)
    optimizer = build(name, model)
    for step in range(12):
        tokens = batch(step)
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for key, tensor in model.state_dict().items():
        assert torch.equal(first["model"][key], second["model"][key])
        torch.testing.assert_close(first["model"][key], tensor, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["lisa", "badam"])
def test_the_main_job_killed_in_a_period_resumes_to_the_same_numbers(name, tmp_path):
    common = ["--optimizer", name, "--steps", "24", "--option", "period=4", "--accumulate", "2"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    undisturbed = start(whole, *common)
    kill_after(start(broken, *common), broken, 12)
    undisturbed.finish()
    start(broken, *common, "--resume").finish()
    assert rows(whole) == rows(broken)


@pytest.mark.parametrize(("name", "layers"), [("lisa", 2), ("badam", 1)])
def test_the_main_job_shows_gradients_and_state_of_the_active_layers_only(name, layers, tmp_path):
    from pretraining.configs import SIZES
    from pretraining.configs import build_model as build_llama

    start(tmp_path / "run", "--optimizer", name, "--steps", "3").finish()
    sizes = json.loads((tmp_path / "run" / "result.json").read_text())["bytes"]
    llama = build_llama("cpu", 256, SIZES["cpu"].length, torch.device("cpu"), torch.float32, False, 0)
    layer = sum(p.numel() for p in llama.model.layers[0].parameters())
    always = sum(p.numel() for p in llama.parameters()) - SIZES["cpu"].layers * layer
    trained = always + layers * layer
    assert sizes["weights"] == 4 * sum(p.numel() for p in llama.parameters())
    assert sizes["gradients"] == sizes["state: exp_avg"] == sizes["state: exp_avg_sq"] == 4 * trained


def test_a_second_optimizer_on_a_released_model_sees_every_layer():
    model, other = build_model(), build_model()
    first = lo.LISAAdamW(lo.layer_groups(model), lr=1e-2)
    with pytest.raises(ValueError, match=r"active_layers is 3, but the groups have 2 layers"):
        lo.LISAAdamW(lo.layer_groups(model), active_layers=3)
    first.release()
    assert lo.BAdamW(lo.layer_groups(model), lr=1e-2).layers == lo.BAdamW(lo.layer_groups(other), lr=1e-2).layers
    assert_same(model, other)
