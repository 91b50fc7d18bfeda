"""Families of models by name and by config: their sizes, their peaks beside measured ones, what is refused; and several processes."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

import lowrank_optim as lo
from lowrank_optim.planner import PlanError, command
from lowrank_optim.planner.catalog import BUILT_IN
from lowrank_optim.planner.choices import resolve_optimizer
from lowrank_optim.planner.command import processes
from lowrank_optim.planner.models import resolve_model
from lowrank_optim.planner.search import RECIPES, Question, Row, what_fits

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from planner_validation import FAMILIES, FAMILY_LIMIT, compare, example, initialize, of_family

TINY_DIT = {**FAMILIES["dit"], "hidden_size": 32, "intermediate_size": 64}

# Sizes ------------------------------------------------------------------------------------------------------------------------------

# Millions of parameters, of the text part where there are others, as the authors (or their files of weights) say.
PUBLISHED = {
    "qwen3-0.6b": 596.0,
    "qwen3-8b": 8190.7,
    "qwen3-30b-a3b": 30532.1,
    "gemma-3-1b": 999.9,
    "gemma-3-4b": 3880.3,
    "mistral-7b": 7241.7,
    "mistral-nemo-12b": 12247.8,
    "phi-2": 2779.7,
    "phi-3-mini": 3821.1,
    "phi-4": 14659.5,
    "gpt-oss-20b": 20914.8,
    "gpt-oss-120b": 116829.2,
    "mixtral-8x7b": 46702.8,
    "mixtral-8x22b": 140630.1,
    "vit-s-16": 22.05,
    "vit-b-16": 86.57,
    "dit-s-2": 32.96,
    "dit-xl-2": 675.13,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_known_by_name_have_the_published_numbers_of_parameters(name):
    model = resolve_model(name)
    two, three = (sum(p.numel() for p in model.build(None, layers).parameters()) for layers in (2, 3))
    found = two + (model.layers - 2) * (three - two)
    assert found / 1e6 == pytest.approx(PUBLISHED[name], abs=0.06)


# Peaks ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    "case", [of_family(family)[number % 2] for number, family in enumerate(FAMILIES)], ids=list(FAMILIES)
)
def test_the_peak_of_a_real_training_of_each_family_is_predicted(case):
    found = compare(case)
    assert abs(found["error"]) < FAMILY_LIMIT, found


def test_a_mixture_of_experts_is_planned_for_a_gpu_that_is_not_there():
    how = {"sequence_length": 64, "in_backward": True, "activation_checkpointing": True}
    plan = lo.plan(FAMILIES["mixtral"], ("galore", {"rank": 16}), **how)
    stack, router, hidden, vocabulary = (4 * 3 * 256 * 256), 4 * 256, 256, 1024
    layer = stack + router + 2 * hidden * 256 + 2 * hidden * 128 + 2 * hidden
    assert plan.weights_bytes == pytest.approx(2 * (2 * layer + 2 * vocabulary * hidden + hidden), rel=0.002)
    assert 0 < plan.gradients_bytes <= 2 * 2 * stack
    assert "moments" in plan.state


def test_kinds_of_layers_that_only_deep_models_have_are_among_few_ones():
    build = resolve_model("gemma-3-1b").build
    assert build(None, 2).config.layer_types == ["sliding_attention", "full_attention"]
    assert build(None, 26).config.layer_types.count("full_attention") == 4


def test_layers_of_unequal_size_are_not_extrapolated():
    config = FAMILIES["qwen3_moe"] | {"num_hidden_layers": 5}
    assert resolve_model(config).layers_are_equal
    assert not resolve_model(config | {"mlp_only_layers": [4], "intermediate_size": 512}).layers_are_equal


# Images and latents -----------------------------------------------------------------------------------------------------------------


def test_images_and_latents_are_counted_as_such():
    plan = lo.plan(TINY_DIT, ("galore", {"rank": 8}), batch_size=3, device="cpu", dtype="float32")
    assert str(plan).startswith("dit with GaLoreAdamW, rank 8, 3 latents of 4 x 16 x 16, float32")
    assert plan.setting["sequence_length"] is None
    with pytest.raises(PlanError, match="a sample of vit is one image of 3 x 16 x 16: leave it out"):
        lo.plan(FAMILIES["vit"], sequence_length=128)


def test_the_table_of_a_vision_model_has_batches_and_no_sequences():
    recipe = next(recipe for recipe in RECIPES if recipe.optimizer == "apollo_mini")
    (row,) = what_fits(Question(TINY_DIT, 2**30, batch_size=2, device="cpu"), (recipe,))
    assert row.longest_sequence is None
    assert row.largest_batch > 2
    with pytest.raises(PlanError, match="leave it out"):
        what_fits(Question(TINY_DIT, 2**30, sequence_length=64), (recipe,))


# Configs ----------------------------------------------------------------------------------------------------------------------------


def test_a_folder_is_a_model_and_the_name_of_its_owner_does_not_matter(tmp_path):
    folder = tmp_path / "My_Model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(FAMILIES["qwen3"]))
    assert resolve_model(folder).name == resolve_model(str(folder / "config.json")).name == "My_Model"
    assert resolve_model("Qwen/Qwen3-8B").name == "qwen3-8b"


def test_of_a_model_that_sees_the_language_model_is_planned_and_said():
    text = FAMILIES["gemma3"] | {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    plan = lo.plan({"model_type": "gemma3", "text_config": text}, "sgd", sequence_length=16, device="cpu")
    alone = lo.plan(text, "sgd", sequence_length=16, device="cpu")
    assert plan.weights_bytes == alone.weights_bytes
    assert "only the language model of gemma3 (gemma3_text), not what it sees or hears" in plan.assumptions


def test_quantization_of_a_config_is_left_out_and_said():
    config = FAMILIES["qwen3"] | {"num_hidden_layers": 1, "quantization_config": {"quant_method": "mxfp4"}}
    plan = lo.plan(config, "sgd", sequence_length=16, device="cpu")
    assert any("quantization left out" in line for line in plan.assumptions)


def without(config: dict, *fields: str) -> dict:
    return {name: value for name, value in config.items() if name not in fields}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (without(FAMILIES["qwen3"], "head_dim"), "lacks head_dim; without them transformers would take the size of"),
        (without(FAMILIES["mixtral"], "num_local_experts"), "lacks num_local_experts"),
        (without(FAMILIES["vit"], "image_size"), "lacks image_size"),
        (without(TINY_DIT, "num_labels"), "lacks num_labels"),
        (TINY_DIT | {"patch_size": 3}, "image_size 16 must be a multiple of patch_size 3"),
        ({"model_type": "qwen33", "vocab_size": 1}, "model_type 'qwen33' of qwen33 is not known.*did you mean qwen3"),
        (
            {"model_type": "t5", "vocab_size": 8, "d_model": 8, "num_layers": 1, "num_heads": 1, "d_kv": 8},
            "neither a language",
        ),
        ({"_class_name": "DiTTransformer2DModel"}, "is a config of diffusers.*does not build: build the model with"),
        ("qwen3-9b", "did you mean qwen3-.*nothing is downloaded"),
    ],
)
def test_configs_that_mean_nothing_are_refused_with_what_to_change(model, message):
    with pytest.raises(PlanError, match=message):
        resolve_model(model)


def test_without_transformers_the_error_says_so_and_other_models_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PlanError, match=r"transformers, which is not installed: pip install 'lowrank-optim\[hf\]'"):
        resolve_model("qwen3-8b")
    assert resolve_model("dit-s-2").layers == 12
    plan = lo.plan(nn.Linear(8, 8), "sgd", example_batch=torch.zeros(1, 8), device="cpu")
    assert plan.weights_bytes == 4 * 72


def test_every_name_says_all_sizes():
    """Else transformers would fill in those of another model, which `resolve_model` refuses."""
    for name in BUILT_IN:
        assert resolve_model(name).layers


# Several processes ------------------------------------------------------------------------------------------------------------------


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded(config: dict, optimizer, world: int, batch: tuple[int, int]) -> tuple[int, int, int]:
    """Bytes of weights, of optimizer state and at the peak of the first of several processes, whose messages go nowhere."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (world,))
        chosen = resolve_model(config)
        inputs = example(chosen, batch)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            model = chosen.build(torch.float32, None).to_empty(device="cpu")
            initialize(model)
            for layer in next(module for module in model.modules() if isinstance(module, nn.ModuleList)):
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            made = resolve_optimizer(optimizer).build(model)
            torch.zeros(12_345)  # a mark in the record: building, which takes the whole model, is over
            for _ in range(2):
                model(**inputs)["loss"].backward()
                made.step()
                made.zero_grad()
        weights = sum(local(p).numel() * p.element_size() for p in model.parameters())
        state = sum(local(t).numel() * t.element_size() for s in made.state.values() for t in s.values())
    finally:
        dist.destroy_process_group()
    now = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = 0 if abs(event.nbytes()) == 4 * 12_345 else max(peak, now)
    return weights, state, peak


@pytest.mark.long
def test_shares_of_fsdp2_are_exact_and_its_peak_is_an_upper_bound():
    config, optimizer, batch = FAMILIES["mixtral"], ("galore", {"rank": 32}), (1, 128)
    weights, state, peak = sharded(config, optimizer, 4, batch)
    how = {"batch_size": batch[0], "sequence_length": batch[1], "dtype": "float32", "device": "cpu"}
    plan = lo.plan(config, optimizer, world_size=4, fsdp=True, **how)
    rotary = 2 * 4 * 32  # inv_freq and its copy, which are no parameters and not split
    assert plan.weights_bytes == weights + rotary
    assert sum(plan.state.values()) == state
    assert peak <= plan.peak_bytes <= 1.4 * peak


def test_processes_of_the_command():
    assert processes(4, 1) == processes(True, 4) == processes(4, 4) == (True, 4)
    assert processes(False, 2) == (False, 2)
    for fsdp, world, message in ((True, 1, "write --fsdp 4"), (1, 1, "at least 2"), (4, 2, "different numbers")):
        with pytest.raises(PlanError, match=message):
            processes(fsdp, world)


def test_what_does_not_go_with_several_processes_is_neither_planned_nor_in_the_table():
    tiny = FAMILIES["qwen3"] | {"num_hidden_layers": 1}
    with pytest.raises(PlanError, match="in_backward and DDP do not go together"):
        lo.plan(tiny, world_size=2, in_backward=True)
    with pytest.raises(PlanError, match="world_size is 1"):
        lo.plan(tiny, fsdp=True)
    some = tuple(recipe for recipe in RECIPES if recipe.optimizer in ("qgalore", "apollo_mini"))
    how = {"sequence_length": 16, "rank": 8, "world_size": 4}
    assert [row.title for row in what_fits(Question(tiny, 2**30, fsdp=True, **how), some)] == ["APOLLO-Mini"]
    assert not any(row.in_backward for row in what_fits(Question(tiny, 2**30, **how), some))


def test_a_row_that_all_layers_refute_no_longer_fits(monkeypatch):
    rows = [row_that(fits) for fits in (True, True, False)]
    rows = [replace(row, title=recipe.title) for row, recipe in zip(rows, RECIPES, strict=False)]
    answers = iter([False, True])
    monkeypatch.setattr(command, "_plan", lambda *_, **__: SimpleNamespace(fits=lambda _: next(answers)))
    question = Question(TINY_DIT, 2**30)
    checked, confirmed = command.confirm(SimpleNamespace(), question, list(rows), lambda _: None)
    assert [(row.title, row.fits) for row in checked] == [
        (rows[1].title, True),
        (rows[0].title, False),
        (rows[2].title, False),
    ]
    assert confirmed is not None
    answers = iter([False, False])
    checked, confirmed = command.confirm(SimpleNamespace(), question, list(rows), lambda _: None)
    assert confirmed is None
    assert not any(row.fits for row in checked)


def row_that(fits: bool) -> Row:
    return Row("", "galore", 4, True, 16, "", {}, 1, 1, "", fits, 1, None, None)
