"""Which layers `layer_groups` finds, what is always on, what is frozen, and what it says of bad input."""

import doctest
import importlib
import logging

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import lowrank_optim as lo
from lowrank_optim.groups.model_layers import find_layers

BASE = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}


def llama(**changes) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**BASE, "num_key_value_heads": 4, **changes}))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=3, n_head=4))


def opt() -> OPTForCausalLM:
    config = {"ffn_dim": 64, "max_position_embeddings": 32, "word_embed_proj_dim": 32}
    return OPTForCausalLM(OPTConfig(**BASE, **config))


def bert() -> BertForMaskedLM:
    return BertForMaskedLM(BertConfig(**BASE, max_position_embeddings=32))


def vit() -> ViTForImageClassification:
    config = {key: value for key, value in BASE.items() if key != "vocab_size"}
    return ViTForImageClassification(ViTConfig(**config, image_size=16, patch_size=8))


def t5() -> T5ForConditionalGeneration:
    config = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=96, **config))


def mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(**BASE, num_key_value_heads=4, num_local_experts=4))


class Residual(nn.Module):
    """A block as in timm and torchvision: a module with modules."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, width)


def timm_like() -> nn.Module:
    """timm's names: blocks in an nn.Sequential, tokens and positions as bare parameters."""
    model = nn.Module()
    model.cls_token, model.pos_embed = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(1, 5, 8))
    model.patch_embed = nn.Conv2d(3, 8, 2)
    model.blocks = nn.Sequential(*[Residual(8) for _ in range(3)])
    model.norm, model.head = nn.LayerNorm(8), nn.Linear(8, 4)
    return model


def members(groups: list[dict]) -> dict[str, int | None]:
    """Name of each parameter → its layer; every name once."""
    pairs = [(name, group["layer"]) for group in groups for name in group["param_names"]]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


MODELS = {
    # model, paths of the layers, tensors that are always on
    "llama": (llama, [f"model.layers.{i}." for i in range(4)], {"model.embed_tokens", "model.norm", "lm_head"}),
    "gpt2": (
        gpt2,
        [f"transformer.h.{i}." for i in range(3)],
        {"transformer.wte", "transformer.wpe", "transformer.ln_f"},
    ),
    "opt": (
        opt,
        [f"model.decoder.layers.{i}." for i in range(4)],
        {"model.decoder.embed_tokens", "model.decoder.embed_positions", "model.decoder.final_layer_norm"},
    ),
    "bert": (
        bert,
        [f"bert.encoder.layer.{i}." for i in range(4)],
        {
            *(f"bert.embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")),
            "bert.embeddings.LayerNorm",
            *("cls.predictions", "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
        },
    ),
    "t5": (
        t5,
        [f"encoder.block.{i}." for i in range(3)] + [f"decoder.block.{i}." for i in range(2)],
        {"shared", "encoder.final_layer_norm", "decoder.final_layer_norm"},
    ),
    "mixtral": (mixtral, [f"model.layers.{i}." for i in range(4)], {"model.embed_tokens", "model.norm", "lm_head"}),
    "timm": (
        timm_like,
        [f"blocks.{i}." for i in range(3)],
        {"", "patch_embed", "norm", "head"},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_in_its_layer_or_always_on_and_in_one_group(name):
    build, paths, outside = MODELS[name]
    model = build()
    layers = members(lo.layer_groups(model))
    assert set(layers) == {name for name, _ in model.named_parameters()}
    for parameter, layer in layers.items():
        inside = [i for i, path in enumerate(paths) if parameter.startswith(path)]
        assert layer == (inside[0] if inside else None), parameter
    assert {name.rpartition(".")[0] for name, layer in layers.items() if layer is None} == outside


def test_vit_has_its_layers_whatever_their_path_is_in_this_version():
    model = vit()
    layers = members(lo.layer_groups(model))
    counts = [sum(layer == i for layer in layers.values()) for i in range(4)]
    assert counts == [16] * 4  # q, k, v, out, two of the MLP, two norms, each with a bias
    assert set(layers.values()) == {None, 0, 1, 2, 3}
    assert set(layers) == {name for name, _ in model.named_parameters()}


def test_groups_are_those_of_param_groups_split():
    model = llama()
    whole = lo.param_groups(model, rank=8, exclude=["k_proj"], weight_decay=0.1, scale=0.5, lr=3e-3)
    split = lo.layer_groups(model, rank=8, exclude=["k_proj"], weight_decay=0.1, scale=0.5, lr=3e-3)
    settings = {
        name: {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for group in whole
        for name in group["param_names"]
    }
    assert set(members(split)) == set(settings)
    for group in split:
        own = {key: value for key, value in group.items() if key not in ("params", "param_names", "layer")}
        for name, param in zip(group["param_names"], group["params"], strict=True):
            assert own == settings[name]
            assert param is model.get_parameter(name)
    # Layers in order, what is always on first.
    order = [-1 if group["layer"] is None else group["layer"] for group in split]
    assert order == sorted(order)


@pytest.mark.parametrize(
    ("always_on", "frozen"),
    [
        ((), {"embed_tokens", "norm", "lm_head"}),
        ("head", {"embed_tokens", "norm"}),
        (("embeddings", "final_norm"), {"lm_head"}),
        (("embeddings", "head", "final_norm", "other"), set()),
    ],
)
def test_what_is_not_always_on_is_frozen_and_in_no_group(always_on, frozen):
    model = llama()
    layers = members(lo.layer_groups(model, always_on=always_on))
    still = {name for name, param in model.named_parameters() if not param.requires_grad}
    assert {name.split(".")[-2] for name in still} == frozen
    assert set(layers) == {name for name, _ in model.named_parameters()} - still


def test_a_tied_weight_is_of_both_its_categories():
    for always_on in ("head", "embeddings"):
        layers = members(lo.layer_groups(llama(tie_word_embeddings=True), always_on=always_on))
        assert layers["model.embed_tokens.weight"] is None
        assert "lm_head.weight" not in layers
    neither = llama(tie_word_embeddings=True)
    layers = members(lo.layer_groups(neither, always_on=("final_norm", "other")))
    assert [name for name, layer in layers.items() if layer is None] == ["model.norm.weight"]
    assert not neither.lm_head.weight.requires_grad


def test_a_head_that_is_named_embed_is_a_head():
    model = nn.ModuleDict({"embed_in": nn.Embedding(5, 8), "layers": nn.ModuleList([Residual(8), Residual(8)])})
    model["embed_out"] = nn.Linear(8, 5, bias=False)  # GPT-NeoX
    layers = members(lo.layer_groups(model, always_on="head"))
    assert [name for name, layer in layers.items() if layer is None] == ["embed_out.weight"]


def test_a_weight_that_two_layers_share_is_always_on_as_other():
    def model() -> nn.Module:
        layers = [Residual(8) for _ in range(3)]
        layers[2].fc.weight = layers[0].fc.weight
        return nn.Sequential(*layers)

    layers = members(lo.layer_groups(model()))
    assert layers["0.fc.weight"] is None
    assert layers["0.fc.bias"] == 0
    assert layers["2.fc.bias"] == 2
    assert "0.fc.weight" not in members(lo.layer_groups(model(), always_on=("head",)))


def test_categories_can_be_layers_of_their_own():
    layers = members(lo.layer_groups(llama(), always_on="final_norm", as_layers=("head", "embeddings")))
    assert layers["model.embed_tokens.weight"] == 0
    assert layers["model.layers.0.mlp.up_proj.weight"] == 1
    assert layers["model.layers.3.mlp.up_proj.weight"] == 4
    assert layers["lm_head.weight"] == 5
    assert layers["model.norm.weight"] is None
    tied = members(lo.layer_groups(llama(tie_word_embeddings=True), as_layers=("head", "embeddings")))
    assert tied["model.embed_tokens.weight"] == 0


def test_frozen_parameters_are_left_out_and_frozen_layers_are_no_layers(caplog):
    model = llama()
    model.model.layers[1].requires_grad_(False)
    model.model.layers[2].self_attn.requires_grad_(False)
    with caplog.at_level(logging.WARNING, "lowrank_optim"):
        layers = members(lo.layer_groups(model))
    assert sorted({layer for layer in layers.values() if layer is not None}) == [0, 1, 2]
    assert layers["model.layers.2.mlp.up_proj.weight"] == 1
    assert not any("layers.2.self_attn" in name for name in layers)
    assert "1 of 4 layers have no parameter with requires_grad and are left out: model.layers.1. If" in caplog.text


@pytest.mark.parametrize(
    "layers",
    [
        "model.layers",
        [f"model.layers.{i}" for i in range(4)],
        lambda model: model.model.layers,
        lambda model: list(model.model.layers),
    ],
    ids=["path", "paths", "module", "modules"],
)
def test_layers_can_be_listed(layers):
    model = llama()
    listed = layers(model) if callable(layers) else layers
    assert members(lo.layer_groups(model, layers=listed)) == members(lo.layer_groups(model))


def test_a_listed_layer_can_be_several_modules_and_the_rest_is_other():
    model = llama()
    blocks = [["model.layers.0", model.model.layers[1]], ["model.layers.3", "lm_head"]]
    layers = members(lo.layer_groups(model, layers=blocks))
    assert {layers[f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 1)} == {0}
    assert layers["model.layers.3.mlp.up_proj.weight"] == layers["lm_head.weight"] == 1
    assert layers["model.layers.2.mlp.up_proj.weight"] is None
    frozen = members(lo.layer_groups(model, layers=blocks, always_on="embeddings"))
    assert not any("layers.2." in name for name in frozen)
    assert not model.model.layers[2].mlp.up_proj.weight.requires_grad


def test_plain_linear_layers_and_hybrid_lists_are_found():
    plain = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    assert [layer.name for layer in find_layers(plain)] == ["0", "1", "2"]
    # Blocks win over lists of single modules.
    both = nn.ModuleDict({"heads": nn.ModuleList([nn.Linear(8, 2)] * 1 + [nn.Linear(8, 3)]), "h": nn.Sequential()})
    both["h"].extend([Residual(8), Residual(8)])
    assert [layer.name for layer in find_layers(both)] == ["h.0", "h.1"]
    hybrid = nn.ModuleList([Residual(8), nn.Sequential(nn.Linear(8, 8)), Residual(8)])
    assert [layer.name for layer in find_layers(nn.ModuleDict({"layers": hybrid}))] == [f"layers.{i}" for i in range(3)]
    # Blocks between other modules of a pipeline.
    pipeline = nn.Sequential(nn.Embedding(5, 8), Residual(8), Residual(8), nn.LayerNorm(8), nn.Linear(8, 5))
    assert [layer.name for layer in find_layers(pipeline)] == ["1", "2"]


def test_layers_are_found_through_wrappers_and_once():
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = llama()
            self.layers = self.module.model.layers  # a second path to the same modules

    assert len(find_layers(Wrapper())) == 4


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (
            lambda: nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8)),
            {},
            r"no layers found in Sequential.*modules: 0 \(Linear\), 1 \(ReLU\), 2 \(Linear\)",
        ),
        (
            lambda: nn.ModuleDict({"stem": nn.Sequential(nn.Linear(8, 4), nn.ReLU())}),
            {},
            r"Lists: stem \(Sequential of Linear, ReLU\)",
        ),
        (llama, {"layers": "model.layer"}, r"'model.layer', .* nearest names: model.layers.*4 layers: model.layers.0"),
        (llama, {"layers": ["model.layers.9"]}, r"'model.layers.9'.*nearest names: model.layers.\d"),
        (llama, {"layers": [nn.Linear(2, 2)]}, r"a Linear, which is no module of the model; there are 4 layers"),
        (llama, {"layers": []}, r"layers is empty; there are 4 layers"),
        (llama, {"layers": "lm_head"}, r"'lm_head', which has no children"),
        (llama, {"layers": ["model.layers.0", "model.layers.0.mlp"]}, r"layers overlap: model.layers.0.mlp is a part"),
        (llama, {"always_on": "embedding"}, r"always_on has 'embedding'; valid categories are 'embeddings', 'head'"),
        (llama, {"as_layers": "other"}, r"as_layers has 'other', but no trainable parameter .* 4 layers"),
        (lambda: llama().requires_grad_(False), {}, r"no trainable parameters"),
    ],
)
def test_bad_input_is_answered_with_what_was_found(build, options, message):
    model = build()
    before = [param.requires_grad for param in model.parameters()]
    with pytest.raises(ValueError, match=message):
        lo.layer_groups(model, **options)
    assert [param.requires_grad for param in model.parameters()] == before


def test_a_model_whose_layers_all_sleep_says_so():
    model = llama()
    model.model.layers.requires_grad_(False)
    with pytest.raises(ValueError, match=r"none of the 4 layers found .*call its release\(\)"):
        lo.layer_groups(model)


def test_a_layer_that_is_no_module_or_path_is_a_type_error():
    with pytest.raises(TypeError, match=r"module paths or modules, got 3"):
        lo.layer_groups(llama(), layers=[[3]])


def test_the_share_of_the_always_on_parameters_is_reported(caplog):
    model = llama()
    with caplog.at_level(logging.INFO, "lowrank_optim"):
        groups = lo.layer_groups(model, always_on=("head", "final_norm"))
    always = model.lm_head.weight.numel() + model.model.norm.weight.numel()
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    share = f"{100 * always / (always + 4 * layer):.1f} %"
    assert f"Always on: {always:,} of {always + 4 * layer:,} parameters ({share})" in caplog.text
    assert "Frozen: model.embed_tokens.weight" in caplog.text
    assert "4 layers: model.layers.0, model.layers.1, ..., model.layers.3" in caplog.text
    lines = lo.describe_layers(groups, active_layers=3).splitlines()
    assert lines[0].split()[:3] == ["always", "on", f"{always:,}"]
    assert lines[1].split()[:5] == ["layers", "0-3", "4", "x", f"{layer:,}"]
    trained = always + 3 * layer
    assert lines[-1].startswith("3 layers at a time")
    assert f"{trained:,}" in lines[-1]
    assert lines[-1].endswith(f"of which always on {100 * always / trained:.2f} %")


def test_groups_with_layers_are_taken_by_every_optimizer():
    model = llama()
    optimizer = lo.GaLoreAdamW(lo.layer_groups(model, rank=8))
    assert {group["layer"] for group in optimizer.param_groups} == {None, 0, 1, 2, 3}


def test_the_examples_in_the_docstrings_hold():
    for name in ("groups.layers", "groups.layer_report", "optimizers.layer_sampling"):
        module = importlib.import_module(f"lowrank_optim.{name}")
        result = doctest.testmod(module)
        assert result.failed == 0
