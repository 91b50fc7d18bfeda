"""The planner against hand-derived bytes, bad input, modules of any kind, and its JSON."""

import json
import math

import pytest
import torch
from torch import nn

import lowrank_optim as lo
from lowrank_optim.planner import PlanError
from lowrank_optim.planner.choices import resolve_optimizer
from lowrank_optim.planner.models import resolve_model
from lowrank_optim.planner.parametrizations import resolve_parametrization
from lowrank_optim.planner.planning import make_setting
from lowrank_optim.planner.search import RECIPES
from lowrank_optim.planner.simulation.allocator import (
    CUBLAS_WORKSPACE,
    CUDA_CONTEXT,
    format_bytes,
    parse_bytes,
    reserved_peak,
    rules_for,
)
from lowrank_optim.planner.simulation.estimate import Probe, deep
from lowrank_optim.planner.simulation.simulate import Run, simulate

pytestmark = pytest.mark.long

MIB = 2**20
HIDDEN, FFN, LAYERS, VOCABULARY, RANK = 4096, 11008, 32, 32_000, 1024
SIDES = [(HIDDEN, HIDDEN)] * 4 + [(HIDDEN, FFN)] * 3
WEIGHTS = LAYERS * (sum(m * n for m, n in SIDES) + 2 * HIDDEN) + 2 * VOCABULARY * HIDDEN + HIDDEN
ROTARY = 2 * 4 * (HIDDEN // 32 // 2)  # inv_freq and its copy, in float32


TINY = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "tie_word_embeddings": False,
}


def scales(rows: int, cols: int) -> int:
    """Bytes of the scales of a coded moment: a float32 for each block of 256 columns of a row."""
    return 4 * rows * math.ceil(cols / 256)


def dense_moments_8bit() -> int:
    """Both moments of embedding and head, and the scales of their columns; norms of 4,096 elements are coded too, as one row."""
    matrices = 2 * (2 * (VOCABULARY * HIDDEN + scales(VOCABULARY, HIDDEN)) + 4 * HIDDEN)
    return matrices + (2 * LAYERS + 1) * 2 * (HIDDEN + scales(1, HIDDEN))


def low_rank_moments_8bit() -> int:
    """Both moments of R, 8 bits and their scales, and the scale of its columns."""
    per_layer = sum(2 * (max(side) * RANK + scales(max(side), RANK)) + 4 * RANK for side in SIDES)
    return LAYERS * per_layer


def built(optimizer, parametrization=None) -> Run:
    """LLaMA-7B and the real optimizer for it, without a step: what they keep."""
    model, chosen = resolve_model("llama-7b"), resolve_optimizer(optimizer)
    how = {"batch": model.batch(1, 8), "dtype": torch.bfloat16, "device": torch.device("cuda"), "steps": ()}
    how["parametrization"] = resolve_parametrization(parametrization)
    return simulate(make_setting(model, chosen, **how))


def test_weights_and_state_of_galore_8bit_on_llama_7b_are_the_formulas():
    run = built(("galore_8bit", {"rank": RANK}))
    assert WEIGHTS == 6_738_415_616
    assert run.weights == 2 * WEIGHTS + ROTARY  # bfloat16
    basis = LAYERS * sum(min(side) * RANK for side in SIDES)
    parts = LAYERS * sum(2 * scales(min(side), RANK) for side in SIDES)  # scale and zero of each block
    assert run.state["basis"] == basis
    assert sum(run.state.values()) == basis + parts + low_rank_moments_8bit() + dense_moments_8bit()


def test_8_bit_state_on_llama_7b_is_82_5_percent_below_adamw_with_a_4_bit_basis():
    run = built(("galore_8bit", {"rank": RANK, "basis_bits": 4}))
    packed = LAYERS * sum(min(side) * (RANK // 2) + 2 * scales(min(side), RANK) for side in SIDES)
    assert sum(run.state.values()) == packed + low_rank_moments_8bit() + dense_moments_8bit()
    assert 1.0 - sum(run.state.values()) / (4 * WEIGHTS) > 0.825  # of AdamW's two moments in bfloat16


def test_state_of_qgalore_on_llama_7b_has_a_packed_basis():
    run = built(("qgalore", {"rank": RANK}))
    packed = LAYERS * sum(min(side) * (RANK // 2) for side in SIDES)
    parts = LAYERS * sum(2 * scales(min(side), RANK) for side in SIDES)  # scale and zero of each block
    assert run.state["basis"] == packed
    assert sum(run.state.values()) == packed + parts + low_rank_moments_8bit() + dense_moments_8bit()
    assert 1.0 - sum(run.state.values()) / (4 * WEIGHTS) > 0.825  # of AdamW's two moments in bfloat16


def test_state_of_foam_on_llama_7b_is_a_quarter_of_adamws_in_the_layers():
    run, mini = built("foam"), built(("foam", {"level": 8, "state_bits": 8}))
    layers = LAYERS * sum(rows * cols for rows, cols in SIDES)
    assert run.state["moments"] == 8 * (layers // 4 + WEIGHTS - layers)
    assert sum(mini.state.values()) < 0.05 * sum(run.state.values())


def test_state_in_16_bits_on_llama_7b_is_65_percent_below_adamw():
    run = built(("galore", {"rank": RANK, "state_bits": 16, "basis_bits": 16}))
    moments = 4 * (LAYERS * sum(max(side) * RANK for side in SIDES) + 2 * VOCABULARY * HIDDEN)
    assert run.state["moments"] == moments + 4 * (2 * LAYERS + 1) * HIDDEN
    assert run.state["basis"] == LAYERS * sum(2 * min(side) * RANK for side in SIDES)
    assert 1.0 - sum(run.state.values()) / (4 * WEIGHTS) > 0.65


DENSITY = 0.05
SLTRAIN = ("sltrain", {"rank": RANK, "density": DENSITY})
ADAM_8BIT = ("LowRankOptimizer", {"rule": "adam", "state_bits": 8})


def test_weights_and_state_of_sltrain_on_llama_7b_are_the_formulas():
    """Table 2 of the paper: 3.14 billion parameters; nothing is stored of the supports."""
    run = built(ADAM_8BIT, SLTRAIN)
    shapes = [(HIDDEN, HIDDEN)] * 4 + [(FFN, HIDDEN)] * 2 + [(HIDDEN, FFN)]
    values = [math.floor(DENSITY * m * n) for m, n in shapes]
    numbers = LAYERS * sum(RANK * (m + n) + nnz for (m, n), nnz in zip(shapes, values, strict=True))
    others = 2 * VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN
    assert (numbers + others) / 1e6 == pytest.approx(3145, abs=0.5)
    assert run.weights == 2 * (numbers + others) + ROTARY
    coded = 0
    for (m, n), nnz in zip(shapes, values, strict=True):
        coded += 2 * (RANK * (m + n) + nnz)  # both moments
        coded += 2 * (scales(m, RANK) + scales(RANK, n) + scales(1, nnz))
        coded += 4 * (RANK + n)  # scales of the columns of B and A
    assert sum(run.state.values()) == LAYERS * coded + dense_moments_8bit()


def test_weights_and_state_of_spectral_layers_on_llama_7b_are_the_formulas():
    """More weights than dense ones, as the docstring says; gradients and moments for Σ and the vectors of r triplets."""
    run = built(("LowRankOptimizer", {"rule": "adam"}), ("spectral", {"rank": RANK}))
    shapes = [(HIDDEN, HIDDEN)] * 4 + [(FFN, HIDDEN)] * 2 + [(HIDDEN, FFN)]
    numbers = LAYERS * sum(HIDDEN * (m + n) + HIDDEN for m, n in shapes)
    trained = LAYERS * sum(RANK * (m + n) + HIDDEN for m, n in shapes)
    others = 2 * VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN
    assert run.weights == 2 * (numbers + others) + 4 * LAYERS * len(shapes) * HIDDEN + ROTARY
    assert run.state["moments"] == 8 * (trained + others)


def test_weights_and_state_of_weight_normalized_and_ordered_layers_on_llama_7b_are_the_formulas():
    shapes = [(HIDDEN, HIDDEN)] * 4 + [(FFN, HIDDEN)] * 2 + [(HIDDEN, FFN)]
    others = 2 * VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN
    dense = LAYERS * sum(m * n for m, n in shapes)
    added = LAYERS * sum(8 * (m + n) + n for m, n in shapes)
    run = built(("LowRankOptimizer", {"rule": "adam"}), ("weight_normalized", {"rank": 8}))
    assert run.weights == 2 * (dense + added + others) + ROTARY
    assert run.state["moments"] == 8 * (added + others)
    factors = LAYERS * sum(min(m, n) * (m + n) for m, n in shapes)
    run = built(("LowRankOptimizer", {"rule": "adam"}), "ordered")
    assert run.weights == 2 * (factors + others) + ROTARY
    assert run.state["moments"] == 8 * (factors + others)


def test_a_weight_normalized_base_may_be_planned_in_8_bits():
    how = {"sequence_length": 16, "device": "cpu", "optimizer": ("LowRankOptimizer", {"rule": "adam"})}
    plans = [lo.plan(TINY, parametrization="weight_normalized", weight_bits=bits, **how) for bits in (16, 8)]
    assert plans[1].weights_bytes < plans[0].weights_bytes
    assert plans[1].optimizer_state_bytes == plans[0].optimizer_state_bytes


def test_sltrain_on_llama_7b_peaks_73_percent_below_adamw_and_25_below_galore():
    """Below bounds of theirs: AdamW's weights, gradients and two moments, and GaLore's weights and state, without all else."""
    model, rules = resolve_model("llama-7b"), rules_for("cuda")
    (recipe,) = (recipe for recipe in RECIPES if recipe.title == "SLTrain 8-bit")
    said = recipe.at_rank(RANK)
    how = {"batch": model.batch(1, 256), "dtype": torch.bfloat16, "device": torch.device("cuda")}
    how |= {"in_backward": True, "activation_checkpointing": True, "steps": ("ordinary step",)}
    how["parametrization"] = resolve_parametrization(said["parametrization"])

    def run(layers: int) -> Run:
        return simulate(make_setting(model, resolve_optimizer(said["optimizer"]), layers=layers, **how))

    found: Probe = deep(run, rules, LAYERS, 1)
    assert found.kinds[found.peak[0]]["weights"] == pytest.approx(2 * 3_144_958_935, rel=1e-3)
    assert found.peak[1] < 0.27 * 8 * WEIGHTS
    galore = 2 * WEIGHTS + LAYERS * sum(min(side) * RANK for side in SIDES) + low_rank_moments_8bit()
    assert found.peak[1] < 0.75 * (galore + dense_moments_8bit())


def test_int8_weights_are_the_formula():
    plan = lo.plan(TINY, ("qgalore", {"rank": 64}), sequence_length=32, in_backward=True, weight_bits=8, device="cpu")
    hidden, ffn, layers, vocabulary = 512, 1376, 2, 1000
    matrices = [(hidden, hidden)] * 4 + [(ffn, hidden)] * 2 + [(hidden, ffn)]
    coded = layers * sum(m * (n + 4 * math.ceil(n / 256)) for m, n in matrices)
    plain = 2 * (2 * vocabulary * hidden + (2 * layers + 1) * hidden)
    assert plan.weights_bytes == coded + plain + 2 * 4 * 32  # and the buffers of rotary embeddings, 64 numbers a head


def test_adamw_on_cuda_keeps_all_gradients_and_a_copy_for_its_foreach_step():
    plan = lo.plan("llama-60m", "adamw", sequence_length=16)
    weights = plan.weights_bytes - 2 * 512
    assert plan.gradients_bytes == weights
    assert plan.optimizer_state_bytes == 2 * weights
    assert plan.when.startswith("first step, optimizer") or plan.when.startswith("ordinary step, optimizer")
    assert plan.temporaries_bytes >= weights + CUBLAS_WORKSPACE
    single = lo.plan("llama-60m", ("adamw", {"foreach": False}), sequence_length=16)
    assert single.peak_bytes < plan.peak_bytes - 0.4 * weights


def test_updates_in_backward_keep_one_gradient():
    how = {"sequence_length": 16, "activation_checkpointing": True}
    ordinary = lo.plan(TINY, ("galore_8bit", {"rank": 64}), **how)
    ours = lo.plan(TINY, ("galore_8bit", {"rank": 64}), in_backward=True, **how)
    assert ordinary.gradients_bytes > 0.9 * ordinary.weights_bytes
    assert ours.gradients_bytes <= 2 * 1000 * 512 + 3 * 2 * 512 * 1376  # one or a few at a time: at most those
    assert ours.peak_bytes < ordinary.peak_bytes - 0.5 * ordinary.gradients_bytes


def test_parts_add_up_and_limits_count_more_than_the_peak():
    plan = lo.plan("llama-60m", "lisa", sequence_length=64)
    assert sum(plan.parts().values()) == plan.peak_bytes <= plan.reserved_bytes
    assert plan.total_bytes == plan.peak_bytes + CUDA_CONTEXT
    assert plan.fits(plan.needed_bytes)
    assert not plan.fits(plan.needed_bytes - 1)


def test_lisa_keeps_state_of_the_layers_that_are_awake():
    plan = lo.plan("llama-60m", ("lisa", {"active_layers": 3}), sequence_length=16)
    layer = 4 * 512 * 512 + 3 * 512 * 1376 + 2 * 512
    assert sum(plan.state.values()) == 8 * (3 * layer + 2 * VOCABULARY * 512 + 512)


def test_per_layer_numbers_add_up():
    plan = lo.plan(
        "llama-60m", ("galore", {"rank": 32}), sequence_length=64, per_layer=True, device="cpu", dtype="float32"
    )
    assert plan.layers is not None
    assert {f"model.layers.{i}" for i in range(8)} <= plan.layers.keys()
    assert sum(layer["weights"] for layer in plan.layers.values()) == plan.weights_bytes
    assert "model.layers.7" in str(plan)


def test_bitsandbytes_state_is_the_formula_of_its_class():
    bnb = pytest.importorskip("bitsandbytes")
    weights = [nn.Parameter(torch.zeros(100, 128)), nn.Parameter(torch.zeros(100))]
    theirs = bnb.optim.AdamW8bit(weights, lr=1e-3)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    theirs.step()
    counted = 0
    for state in theirs.state.values():
        counted += sum(
            t.numel() * t.element_size() for n, t in state.items() if isinstance(t, torch.Tensor) and "qmap" not in n
        )
    plan = lo.plan(nn.Linear(128, 100), "adamw_8bit", example_batch=torch.zeros(1, 128), device="cpu")
    assert sum(plan.state.values()) == counted


# Modules of any kind ----------------------------------------------------------------------------------------------------------------


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(16, 10)

    def forward(self, x, scale=1.0):
        for block in self.blocks:
            x = block(x).relu()
        return self.head(x.mean((2, 3))) * scale


@pytest.mark.parametrize(
    "batch", [torch.zeros(2, 16, 8, 8), (torch.zeros(2, 16, 8, 8),), {"x": torch.zeros(2, 16, 8, 8), "scale": 2.0}]
)
def test_any_module_is_planned_from_an_example_batch_and_not_changed(batch):
    model = Convolutional()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = lo.plan(model, ("fira", {"rank": 4}), example_batch=batch, activation_checkpointing=True)
    assert plan.weights_bytes == sum(-(-4 * t.numel() // 512) * 512 for t in before.values())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())


def test_tied_weights_count_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(1000, 64), nn.Linear(64, 1000, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.embed(tokens))

    plan = lo.plan(Tied(), "sgd", example_batch=torch.zeros(1, 8, dtype=torch.int64), device="cpu")
    assert plan.weights_bytes == 4 * 64_000


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, lengths):
        return self.linear(x)[:, : int(lengths.max())]


def test_integers_of_the_batch_are_used_where_the_forward_pass_reads_them():
    batch = (torch.zeros(2, 8), torch.tensor([3, 5]))
    assert lo.plan(Reader(), "sgd", example_batch=batch, device="cpu").weights_bytes == 4 * 72
    bare = (torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64, device="meta"))
    with pytest.raises(PlanError, match="real tensors of integers"):
        lo.plan(Reader(), "sgd", example_batch=bare)


def test_a_parametrization_may_be_a_name_a_pair_or_a_function():
    how = {"sequence_length": 16, "device": "cpu", "optimizer": ("LowRankOptimizer", {"rule": "adam"})}
    spellings = ["sltrain", ("sltrain", {"rank": 128}), lambda model: lo.nn.sltrain_(model, init="fresh")]
    plans = [lo.plan(TINY, parametrization=spelling, **how) for spelling in spellings]
    assert len({plan.peak_bytes for plan in plans}) == 1
    assert plans[1].setting["parametrization"] == {"name": "sltrain", "rank": 128}
    assert "sltrain rank 128" in str(plans[1])
    assert plans[0].weights_bytes < lo.plan(TINY, **how).weights_bytes


def test_an_optimizer_may_be_a_class_a_name_a_pair_or_a_function():
    how = {"sequence_length": 16, "device": "cpu"}
    spellings = [
        ("galore", {"rank": 8}),
        ("GaLoreAdamW", {"rank": 8}),
        (lo.GaLoreAdamW, {"rank": 8}),
        lambda model: lo.GaLoreAdamW(lo.param_groups(model, rank=8)),
    ]
    peaks = {lo.plan(TINY, spelling, **how).peak_bytes for spelling in spellings}
    assert len(peaks) == 1
    assert lo.plan(TINY, torch.optim.RMSprop, **how).optimizer_state_bytes > 0


# Several processes ------------------------------------------------------------------------------------------------------------------


def test_fsdp_splits_what_it_can_and_ddp_copies_gradients():
    how = {"sequence_length": 16, "activation_checkpointing": True}
    alone = lo.plan(TINY, ("galore", {"rank": 64}), **how)
    ddp = lo.plan(TINY, ("galore", {"rank": 64}), world_size=4, **how)
    fsdp = lo.plan(TINY, ("galore", {"rank": 64}), world_size=4, fsdp=True, **how)
    assert ddp.gradients_bytes == 2 * alone.gradients_bytes
    assert fsdp.weights_bytes == pytest.approx(alone.weights_bytes / 4, rel=0.001)
    assert fsdp.state["moments"] == pytest.approx(alone.state["moments"] / 4, rel=0.001)
    assert alone.state["basis"] / 4 < fsdp.state["basis"] < alone.state["basis"]


# Bad input --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "lama-7b"}, "did you mean llama-7b"),
        ({"model": "llama-60m", "optimizer": "galor"}, "did you mean galore"),
        (
            {"model": {"model_type": "llama", "hidden_size": 64}},
            "lacks vocab_size, num_hidden_layers, num_attention_heads, interm",
        ),
        ({"model": {"hidden_size": 64}}, "lacks model_type, vocab_size"),
        ({"model": "llama-60m", "batch_size": 0}, "batch_size is 0; it must be an int of at least 1"),
        ({"model": "llama-60m", "dtype": "int8"}, "dtype is 'int8'; it must be one of bfloat16"),
        ({"model": "llama-60m", "weight_bits": 4}, "weight_bits is 4"),
        ({"model": "llama-60m", "parametrization": "sltran"}, "did you mean sltrain"),
        ({"model": "llama-60m", "parametrization": 7}, "give a name"),
        ({"model": "llama-60m", "parametrization": ("sltrain", {"rnk": 3})}, "sltrain: .*'rnk'"),
        ({"model": "llama-60m", "parametrization": ("sltrain", {"rank": 600})}, "rank is 600 for model.*from 0 to 512"),
        ({"model": "llama-60m", "parametrization": lambda model: None}, "returned NoneType, not the model"),
        ({"model": "llama-60m", "parametrization": "sltrain", "weight_bits": 8}, "do not go together"),
        ({"model": "llama-60m", "optimizer": ("galore", {"rnk": 3})}, "unknown option 'rnk'.*did you mean 'rank'"),
        ({"model": "llama-60m", "optimizer": "adamw", "in_backward": True}, "AdamW cannot update in backward"),
        ({"model": "missing/config.json"}, "cannot be read"),
        ({"model": 7}, "model is int; give an nn.Module"),
        ({"model": "gpt2", "sequence_length": 4096}, "1024 learned positions"),
        ({"model": nn.Linear(2, 2)}, "give example_batch, a dict"),
    ],
)
def test_bad_input_says_what_to_change(arguments, message):
    with pytest.raises(PlanError, match=message):
        lo.plan(**arguments)


def test_a_config_file_is_a_model(tmp_path):
    fields = {"model_type": "gpt2", "vocab_size": 500, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    plan = lo.plan(tmp_path / "config.json", ("apollo_mini", {}), sequence_length=32, dtype="float32", device="cpu")
    hidden, layer = 64, 12 * 64 * 64 + 13 * 64
    assert plan.weights_bytes == 4 * (500 * hidden + 64 * hidden + 2 * layer + 2 * hidden)
    assert plan.setting["model"] == tmp_path.name


# Allocator --------------------------------------------------------------------------------------------------------------------------


def test_sizes_are_read_and_written():
    assert [parse_bytes(text) for text in ("24GiB", "24 gb", "1.5MiB", "512")] == [
        24 * 2**30,
        24 * 10**9,
        3 * 2**19,
        512,
    ]
    assert format_bytes(24 * 2**30) == "24 GiB"
    assert format_bytes(1.5 * MIB) == "1.50 MiB"
    for text in ("", "GiB", "-3GiB", "24 apples"):
        with pytest.raises(ValueError, match="write a number and a unit"):
            parse_bytes(text)


def test_reserved_memory_follows_the_allocators_rules():
    assert reserved_peak([(1, 100), (2, MIB)]) == 2 * MIB  # both in one segment for small blocks
    assert reserved_peak([(1, 100), (2, MIB), (3, MIB)]) == 4 * MIB  # which is full now: a second one
    assert reserved_peak([(1, 3 * MIB), (2, 4 * MIB)]) == 20 * MIB  # both in one segment of 20 MiB
    assert reserved_peak([(1, 11 * MIB)]) == 12 * MIB  # rounded up to 2 MiB
    # What was freed is used again if it is large enough, and not if it is not.
    assert reserved_peak([(1, 40 * MIB), (1, 0), (2, 30 * MIB), (3, 10 * MIB)]) == 40 * MIB
    assert reserved_peak([(1, 40 * MIB), (1, 0), (2, 44 * MIB)]) == 84 * MIB
    assert reserved_peak([(1, 40 * MIB), (1, 0), (2, 44 * MIB)], limit=50 * MIB) == 44 * MIB
