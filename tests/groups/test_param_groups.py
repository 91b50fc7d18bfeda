"""Which parameters `param_groups` makes low-rank, and what `describe` says about them."""

import doctest
import importlib
import re

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import lowrank_optim as lo

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
MLP = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=32, n_embd=64, n_layer=2, n_head=4))


def mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(32, 48, 3)
        self.conv2 = nn.Conv2d(16, 32, 3)
        self.conv3 = nn.Conv3d(8, 16, 3)
        self.up = nn.ConvTranspose2d(32, 16, 3)
        self.norm = nn.BatchNorm2d(32)
        self.spatial_norm = nn.LayerNorm((4, 6, 6))
        self.classifier = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 20))


class ViTLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 32))
        self.pos_embed = nn.Parameter(
            torch.zeros(2, 17, 32)
        )  # two images' positions: no stack of matrices all the same
        self.scan = nn.Parameter(torch.zeros(32, 16))
        self.attention = nn.MultiheadAttention(32, 4, add_bias_kv=True)


def names_by_treatment(groups) -> tuple[set[str], set[str], set[str]]:
    """(low-rank, dense, no decay) parameter names."""
    low = {name for g in groups if g["rank"] is not None for name in g["param_names"]}
    none = {name for g in groups if g.get("weight_decay") == 0.0 for name in g["param_names"]}
    return low, {name for g in groups for name in g["param_names"]} - low - none, none


def group_of(groups, name: str) -> dict:
    return next(g for g in groups if name in g["param_names"])


def layer_names(modules, layers=range(3), block="mlp") -> set[str]:
    return {f"model.layers.{i}.{block}.{m}.weight" for i in layers for m in modules}


@pytest.mark.parametrize("build", [llama, gpt2, mixtral, ConvNet, ViTLike])
def test_every_trainable_parameter_is_in_exactly_one_group_under_its_own_name(build):
    model = build()
    groups = lo.param_groups(model, rank=8, weight_decay=0.1)
    placed = [(name, p) for g in groups for name, p in zip(g["param_names"], g["params"], strict=True)]
    assert len(placed) == len(list(model.parameters()))
    assert {name: id(p) for name, p in placed} == {name: id(p) for name, p in model.named_parameters()}


def test_llama_linears_are_low_rank_embedding_and_head_dense_norms_without_decay():
    groups = lo.param_groups(llama(), rank=8, weight_decay=0.1, scale=0.5, update_proj_gap=50)
    low, dense, no_decay = names_by_treatment(groups)
    assert low == layer_names(MLP) | layer_names(ATTENTION, block="self_attn")
    assert dense == {"model.embed_tokens.weight", "lm_head.weight"}
    assert no_decay == {"model.norm.weight"} | {
        f"model.layers.{i}.{norm}.weight" for i in range(3) for norm in ("input_layernorm", "post_attention_layernorm")
    }
    keys = [{k: v for k, v in g.items() if k not in ("params", "param_names")} for g in groups]
    assert keys == [
        {"rank": 8, "scale": 0.5, "update_proj_gap": 50, "weight_decay": 0.1},
        {"rank": None, "weight_decay": 0.1},
        {"rank": None, "weight_decay": 0.0},
    ]


def test_without_weight_decay_the_optimizers_default_holds_for_all_but_the_no_decay_group():
    groups = lo.param_groups(llama(), rank=8)
    assert ["weight_decay" in g for g in groups] == [False, False, True]
    optimizer = lo.GaLoreAdamW(groups, weight_decay=0.07)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.07, 0.07, 0.0]


def test_gpt2_weights_are_low_rank_as_transposed_and_the_tied_head_appears_once():
    groups = lo.param_groups(gpt2(), rank=8)
    low, dense, no_decay = names_by_treatment(groups)
    assert low == {
        f"transformer.h.{i}.{m}.weight"
        for i in range(2)
        for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert group_of(groups, "transformer.h.0.attn.c_attn.weight")["layout"] == "transposed"
    assert dense == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert all(name.endswith(".bias") or ".ln_" in name for name in no_decay)


@pytest.mark.parametrize("proj_type", ["std", "left", "right"])
def test_gpt2_conv1d_is_trained_as_the_linear_layer_that_it_is(proj_type):
    model = gpt2()
    conv = model.transformer.h[
        0
    ].attn.c_proj  # square: std projects the right side of the Linear, the left of what is stored
    linear = nn.Linear(64, 64)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.T)
    options = {"rank": 8, "proj_type": proj_type, "projector": "svd"}
    optimizers = [lo.GaLoreAdamW(lo.param_groups(module, **options)) for module in (conv, linear)]
    for seed in range(3):
        conv.weight.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
        linear.weight.grad = conv.weight.grad.T.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(conv.weight.T, linear.weight, rtol=0, atol=1e-6)


def test_convolutions_are_low_rank_as_first_dimension_times_the_rest():
    model = ConvNet()
    groups = lo.param_groups(model, rank=4)
    low, dense, no_decay = names_by_treatment(groups)
    assert low == {"conv1.weight", "conv2.weight", "conv3.weight", "up.weight", "classifier.0.weight"}
    assert group_of(groups, "conv1.weight")["param_names"] == [
        "conv1.weight",
        "conv2.weight",
        "conv3.weight",
        "up.weight",
    ]
    assert group_of(groups, "conv1.weight")["layout"] == "conv"
    assert dense == {"classifier.2.weight"}  # only the last layer of a classifier is the head
    assert "spatial_norm.weight" in no_decay  # 3-D, but a norm
    state = lo.GaLoreAdamW(groups).state
    assert state[model.conv1.weight]["basis"].shape == (48, 4)
    assert state[model.conv1.weight]["exp_avg"].shape == (32 * 3, 4)
    assert state[model.up.weight]["exp_avg"].shape == (16 * 9, 4)


@pytest.mark.parametrize(
    ("fraction", "shape", "rank"),
    [
        (0.25, (40, 30), 8),  # of 7.5
        (0.25, (40, 26), 6),  # of 6.5: halves go to the even number, as in Python
        (0.3, (9, 40), 3),  # of 2.7
        (0.1, (3, 24, 12), 1),  # of 1.2
        (0.01, (40, 24), 1),  # of 0.24: at least one
        (1.0, (24, 16), 16),
    ],
)
def test_a_fraction_is_a_rank_to_the_nearest_number_of_the_short_side(fraction, shape, rank):
    param = nn.Parameter(torch.zeros(shape))
    optimizer = lo.GaLoreAdamW([param], rank=fraction)
    assert optimizer.state[param]["exp_avg"].shape == (*shape[:-2], max(shape[-2:]), rank)


def test_expert_stacks_are_low_rank_with_a_basis_for_each_expert():
    model = mixtral()
    groups = lo.param_groups(model, rank=8)
    low, dense, _ = names_by_treatment(groups)
    stacks = {f"model.layers.{i}.mlp.experts.{m}" for i in range(3) for m in ("gate_up_proj", "down_proj")}
    assert low == stacks | layer_names(ATTENTION, block="self_attn")
    assert {f"model.layers.{i}.mlp.gate.weight" for i in range(3)} < dense  # routers
    experts = model.model.layers[0].mlp.experts
    assert tuple(experts.gate_up_proj.shape) == (4, 256, 64)
    assert lo.GaLoreAdamW(groups).state[experts.gate_up_proj]["basis"].shape == (4, 64, 8)


def test_expert_stacks_stored_transposed_are_recognised_and_their_2d_biases_have_no_decay():
    groups = lo.param_groups(GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4)), rank=8)
    experts = "model.layers.0.mlp.experts."
    assert group_of(groups, experts + "gate_up_proj")["layout"] == "transposed"
    assert "layout" not in group_of(groups, "model.layers.0.self_attn.q_proj.weight")
    assert {experts + "gate_up_proj_bias", experts + "down_proj_bias"} <= names_by_treatment(groups)[2]


def test_learned_tokens_and_other_tensors_are_dense_and_attention_in_projections_low_rank():
    low, dense, no_decay = names_by_treatment(lo.param_groups(ViTLike(), rank=8))
    assert low == {"attention.in_proj_weight", "attention.out_proj.weight"}
    assert dense == {"cls_token", "pos_embed", "scan"}
    assert no_decay == {"attention.in_proj_bias", "attention.out_proj.bias", "attention.bias_k", "attention.bias_v"}


def test_vision_transformer_keeps_positions_and_classifier_dense():
    config = ViTConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=32, num_labels=100
    )
    low, dense, _ = names_by_treatment(lo.param_groups(ViTForImageClassification(config), rank=8))
    assert dense == {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings", "classifier.weight"}
    assert "vit.embeddings.patch_embeddings.projection.weight" in low


@pytest.mark.parametrize("name", ["lm_head", "embed_out", "classifier", "score", "head", "output", "fc"])
def test_modules_with_the_name_of_a_head_are_dense_unless_a_repeated_layer_contains_them(name):
    body = nn.ModuleList([nn.ModuleDict({name: nn.Linear(32, 32)})])
    groups = lo.param_groups(nn.ModuleDict({"layers": body, name: nn.Linear(32, 64)}), rank=4)
    assert names_by_treatment(groups)[:2] == ({f"layers.0.{name}.weight"}, {f"{name}.weight"})


def test_what_get_output_embeddings_returns_is_dense_whatever_its_name():
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(32, 32)})
    model.get_output_embeddings = lambda: model["b"]
    assert names_by_treatment(lo.param_groups(model, rank=4))[:2] == ({"a.weight"}, {"b.weight"})


def test_a_linear_layer_tied_to_an_embedding_is_dense_and_appears_once():
    model = nn.ModuleDict(
        {"project": nn.Linear(32, 64, bias=False), "table": nn.Embedding(64, 32), "mix": nn.Linear(32, 32)}
    )
    model["table"].weight = model["project"].weight
    low, dense, _ = names_by_treatment(lo.param_groups(model, rank=4))
    assert (low, dense) == ({"mix.weight"}, {"project.weight"})


def test_linear_layers_that_share_a_weight_appear_once_and_answer_to_both_names():
    model = nn.ModuleDict({"first": nn.Linear(32, 32), "second": nn.Linear(32, 32), "third": nn.Linear(32, 32)})
    model["second"].weight = model["first"].weight
    assert names_by_treatment(lo.param_groups(model, rank=4))[0] == {"first.weight", "third.weight"}
    assert names_by_treatment(lo.param_groups(model, rank=4, include="second"))[0] == {"first.weight"}


def test_tied_head_is_dense_until_named_by_either_name():
    model = llama(tie_word_embeddings=True)
    assert "model.embed_tokens.weight" in names_by_treatment(lo.param_groups(model, rank=8))[1]
    for name in ("lm_head", "embed_tokens"):
        low = names_by_treatment(lo.param_groups(model, rank=8, include=["mlp", name]))[0]
        assert low == layer_names(MLP) | {"model.embed_tokens.weight"}


def test_frozen_parameters_are_left_out():
    model = llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    low, dense, no_decay = names_by_treatment(lo.param_groups(model, rank=8))
    assert dense == {"lm_head.weight"}
    assert not any("layers.0." in name for name in low | no_decay)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        lo.param_groups(model, rank=8)


def test_a_pattern_for_frozen_parameters_is_no_error():
    model = llama()
    model.model.layers[0].requires_grad_(False)
    assert names_by_treatment(lo.param_groups(model, rank=8, include=["layers.0.", "layers.1.mlp"]))[0] == layer_names(
        MLP, [1]
    )


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        ("mlp", layer_names(MLP)),
        (["attn", "mlp"], layer_names(MLP) | layer_names(ATTENTION, block="self_attn")),
        (["layers.1.mlp"], layer_names(MLP, [1])),
        ("*.up_proj", layer_names(["up_proj"])),  # a glob for the module name
        ("model.layers.[01].mlp.*.weight", layer_names(MLP, [0, 1])),  # and for the parameter name
        (re.compile(r"layers\.[02]\.mlp\.(up|down)"), layer_names(["up_proj", "down_proj"], [0, 2])),
        (["mlp", "lm_head"], layer_names(MLP) | {"lm_head.weight"}),
        (["embed"], {"model.embed_tokens.weight"}),
        ("*head.weight", {"lm_head.weight"}),
        ("model", layer_names(MLP) | layer_names(ATTENTION, block="self_attn")),  # a parent does not name the embedding
        ("*", layer_names(MLP) | layer_names(ATTENTION, block="self_attn")),
    ],
)
def test_include_limits_what_is_low_rank_and_takes_in_what_it_names(include, expected):
    model = llama()
    low, dense, no_decay = names_by_treatment(lo.param_groups(model, rank=8, include=include))
    assert low == expected
    assert low | dense | no_decay == {name for name, _ in model.named_parameters()}  # the rest is trained, dense


def test_exclude_wins_over_include_and_leaves_parameters_trained():
    low, dense, _ = names_by_treatment(
        lo.param_groups(llama(), rank=8, include="mlp", exclude=["down_proj", "layers.2."])
    )
    assert low == layer_names(["gate_proj", "up_proj"], [0, 1])
    assert layer_names(["down_proj"]) < dense


def test_include_does_not_take_in_tensors_whose_parents_it_names():
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=256, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    )
    low, dense, _ = names_by_treatment(lo.param_groups(model, rank=4, include="SelfAttention"))
    assert len(low) == 16
    assert "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight" in dense  # an embedding
    experts = lo.param_groups(mixtral(), rank=4, include="mlp")
    assert "model.layers.0.mlp.gate.weight" in names_by_treatment(experts)[1]  # a router
    assert names_by_treatment(lo.param_groups(mixtral(), rank=4, include="mlp.gate.weight"))[0] == {
        f"model.layers.{i}.mlp.gate.weight" for i in range(3)
    }


@pytest.mark.parametrize(
    ("argument", "pattern", "near"), [("include", "q_porj", "q_proj"), ("exclude", "lm_haed", "lm_head")]
)
def test_a_pattern_that_matches_nothing_raises_and_names_the_nearest(argument, pattern, near):
    with pytest.raises(ValueError, match=rf"{argument} pattern '{pattern}' matches no parameter.*{near}"):
        lo.param_groups(llama(), rank=8, **{argument: ["mlp", pattern]})


def test_an_include_pattern_that_can_make_nothing_low_rank_raises():
    with pytest.raises(ValueError, match=r"'norm' matches only parameters .* model\.norm\.weight"):
        lo.param_groups(llama(), rank=8, include=["mlp", "norm"])
    with pytest.raises(ValueError, match="no parameter is low-rank"):
        lo.param_groups(llama(), rank=8, exclude="*")
    with pytest.raises(ValueError, match=r"no parameter is low-rank.*weight_ih_l0"):
        lo.param_groups(nn.LSTM(32, 32), rank=8)
    assert names_by_treatment(lo.param_groups(nn.LSTM(32, 32), rank=8, include="weight_ih"))[0] == {"weight_ih_l0"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank is 0"),
        ({"rank": 1.5}, ValueError, "rank is 1.5"),
        ({"rank": "8"}, ValueError, "rank is '8'"),
        ({"rank": 8, "weight_decay": -1.0}, ValueError, "weight_decay is -1.0"),
        ({"rank": 8, "update_proj_gap": 0}, ValueError, "update_proj_gap is 0"),
        ({"rank": 8, "exclde": "head"}, TypeError, "did you mean 'exclude'"),
        ({"rank": 8, "layout": "conv"}, TypeError, "layout is set by param_groups"),
        ({"rank": 8, "include": [3]}, TypeError, "include must be strings"),
        ({"rank": 8, "include": ""}, ValueError, "empty pattern"),
        ({"rank": None, "scale": 0.25}, ValueError, "scale would have no effect"),
    ],
)
def test_bad_arguments_raise(arguments, error, message):
    with pytest.raises(error, match=message):
        lo.param_groups(llama(), **arguments)


def test_a_list_of_parameters_is_no_model():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        lo.param_groups(list(llama().parameters()), rank=8)


def test_a_misspelt_option_is_refused_by_the_optimizer():
    with pytest.raises(TypeError, match="update_proj_gap"):
        lo.GaLoreAdamW(lo.param_groups(llama(), rank=8, update_proj_gpa=10))


def test_rank_none_only_splits_by_weight_decay():
    groups = lo.param_groups(llama(), rank=None, weight_decay=0.1)
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(23, 0.1), (7, 0.0)]
    assert not any(g["rank"] for g in groups)


def test_groups_are_the_same_on_the_meta_device():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    assert [g["param_names"] for g in lo.param_groups(model, rank=8)] == [
        g["param_names"] for g in lo.param_groups(llama(), rank=8)
    ]


@pytest.mark.parametrize("wrap", [torch.compile, lambda model: nn.ModuleDict({"module": model})])
def test_compiled_and_wrapped_models_are_seen_through(wrap):
    groups = lo.param_groups(wrap(llama()), rank=8, include=["attn", "mlp"])
    low, dense, _ = names_by_treatment(groups)
    assert len(low) == 21
    assert {name.partition(".")[2] for name in dense} == {"model.embed_tokens.weight", "lm_head.weight"}


# describe -----------------------------------------------------------------------------------------------------------------------


def cells(table: str) -> list[list[str]]:
    """The words of each line; columns are apart by two spaces or more."""
    return [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]


def test_describe_collapses_layers_and_shows_shape_side_rank_and_share():
    model = llama()
    table = cells(lo.describe(lo.param_groups(model, rank=8, weight_decay=0.1, exclude="k_proj")))
    total = sum(p.numel() for p in model.parameters())

    def share(size: int) -> list[str]:
        return [f"{size:,}", f"{100 * size / total:.2f}"]

    assert ["group 0: low-rank, rank 8, weight_decay 0.1"] in table
    assert [
        "model.layers.*.mlp.up_proj.weight x3",
        "128x64",
        "right",
        "8",
        "auto",
        "low-rank",
        *share(3 * 128 * 64),
    ] in table
    assert [
        "model.layers.*.mlp.down_proj.weight x3",
        "64x128",
        "left",
        "8",
        "auto",
        "low-rank",
        *share(3 * 128 * 64),
    ] in table
    assert ["lm_head.weight", "256x64", "-", "-", "-", "dense", *share(256 * 64)] in table
    assert ["model.layers.*.input_layernorm.weight x3", "64", "-", "-", "-", "no decay", *share(3 * 64)] in table
    low = 3 * (3 * 128 * 64 + 3 * 64 * 64)
    assert ["low-rank", "18 tensors", *share(low)] in table
    assert ["dense", "5 tensors", *share(2 * 256 * 64 + 3 * 64 * 64)] in table
    assert ["no decay", "7 tensors", *share(7 * 64)] in table
    assert ["all", "30 tensors", f"{total:,}", "100.00"] in table


@pytest.mark.parametrize("build", [llama, gpt2, mixtral, ConvNet, ViTLike])
@pytest.mark.parametrize("rank", [0.25, 20])
def test_describe_says_low_rank_of_exactly_those_that_the_optimizer_trains_so(build, rank):
    optimizer = lo.GaLoreAdamW(lo.param_groups(build(), rank=rank))
    with_basis = sum("basis" in optimizer.state[p] for g in optimizer.param_groups for p in g["params"])
    assert any(line[:2] == ["low-rank", f"{with_basis} tensors"] for line in cells(lo.describe(optimizer)))


def test_describe_shows_matrices_that_are_smaller_than_the_rank_as_dense():
    model = nn.ModuleDict({"small": nn.Linear(16, 64), "large": nn.Linear(64, 64)})
    table = cells(lo.describe(lo.param_groups(model, rank=32)))
    assert ["small.weight", "64x16", "-", "-", "auto", "dense (16 < 32)", "1,024", "19.51"] in table
    assert ["large.weight", "64x64", "right", "32", "auto", "low-rank", "4,096", "78.05"] in table


def test_describe_shows_the_sides_that_proj_type_and_layout_ask_for():
    model = nn.ModuleDict({"a": nn.Linear(32, 64, bias=False), "b": nn.Conv1d(32, 32, 3, bias=False)})
    for proj_type, sides in {
        "std": ("right", "left"),
        "reverse_std": ("left", "right"),
        "full": ("full", "full"),
    }.items():
        table = cells(lo.describe(lo.param_groups(model, rank=4, proj_type=proj_type)))
        assert tuple(line[2] for line in table if line[0] in ("a.weight", "b.weight")) == sides


def test_describe_reads_groups_of_galore_torch_and_optimizers():
    model = llama()
    matrices = [p for name, p in model.named_parameters() if "mlp" in name]
    rest = [p for name, p in model.named_parameters() if "mlp" not in name]
    groups = [
        {"params": rest},
        {"params": matrices, "rank": 8, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"},
    ]
    by_hand = cells(lo.describe(groups))
    assert ["(unnamed) x6", "128x64", "right", "8", "auto", "low-rank", "49,152", "31.49"] in by_hand
    assert ["low-rank", "9 tensors", "73,728", "47.23"] in by_hand
    optimizer = lo.GaLoreAdamW(groups)
    assert lo.describe(optimizer) == lo.describe(optimizer.param_groups)
    assert cells(lo.describe(optimizer))[-3:] == by_hand[-3:]


@pytest.mark.parametrize("build", [llama, gpt2, mixtral])
def test_describe_fits_120_columns(build):
    optimizer = lo.GaLoreAdamW(lo.param_groups(build(), rank=8, weight_decay=0.1, update_proj_gap=200, proj_type="std"))
    assert max(map(len, lo.describe(optimizer).splitlines())) <= 120
    with torch.device("meta"):
        huge = LlamaForCausalLM(LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80))
    assert max(map(len, lo.describe(lo.param_groups(huge, rank=1024)).splitlines())) <= 120


def test_describe_refuses_what_is_no_group():
    model = llama()
    with pytest.raises(TypeError, match="param groups"):
        lo.describe(model.parameters())
    with pytest.raises(TypeError, match="iterator"):
        lo.describe([{"params": model.parameters()}])


@pytest.mark.parametrize("module", ["build", "describe"])
def test_examples_in_the_docstrings_hold(module: str):
    failed, attempted = doctest.testmod(importlib.import_module(f"lowrank_optim.groups.{module}"))
    assert (failed, attempted > 1) == (0, True)


def test_a_rank_given_to_the_optimizer_does_not_reach_embeddings_and_heads():
    model = llama()
    optimizer = lo.GaLoreAdamW(lo.param_groups(model, rank=8), rank=8)
    assert "basis" not in optimizer.state[model.model.embed_tokens.weight]
    assert "basis" in optimizer.state[model.model.layers[0].mlp.up_proj.weight]
