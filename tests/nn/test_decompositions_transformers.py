"""Decompositions of small transformers: LLaMA, GPT-2 (whose Conv1D stores the transpose) and ViT."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo
from lowrank_optim.nn import CompensatedLinear, LowRankEmbedding, LowRankLinear

transformers = pytest.importorskip("transformers")

NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        **NO_TOKENS,
    )
    return transformers.LlamaForCausalLM(config), tokens(96)


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, loss_type="ForCausalLM", **NO_TOKENS
    )
    return transformers.GPT2LMHeadModel(config), tokens(96)


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
    config = transformers.ViTConfig(image_size=16, patch_size=4, **sizes)
    pixels = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return transformers.ViTForImageClassification(config), {"pixel_values": pixels}


def tokens(vocabulary: int) -> dict[str, Tensor]:
    ids = torch.randint(0, vocabulary, (12, 48), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 40:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def build(make: Callable[[], tuple[nn.Module, dict[str, Tensor]]]) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, batch = make()
    for param in model.parameters():  # biases, too, and directions of different weight
        nn.init.normal_(param, std=0.1 if param.dim() > 1 else 0.5)
    return model.eval(), batch


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def rows_of(batch: dict[str, Tensor]) -> int:
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else 40 * 17


@pytest.mark.parametrize(("make", "layers"), [(llama, 14), (gpt2, 8), (vit, 12)], ids=["llama", "gpt2", "vit"])
def test_a_model_is_compressed_and_comes_back(make, layers):
    model, batch = build(make)
    exact, names = model(**batch).logits, model.state_dict().keys()
    statistics = lo.nn.collect_statistics(model, [batch])
    assert len(statistics) == layers
    assert {found.count for found in statistics.values()} == {rows_of(batch)}
    errors = {}
    for method in ("svd", "features"):
        small = copy.deepcopy(model)
        given = statistics if method == "features" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lo.nn.factorize_(small, rank=10, method=method, statistics=given)
        assert count(small, LowRankLinear) == layers
        logits = small(**batch).logits
        errors[method] = (logits - exact).norm() / exact.norm()
        lo.nn.merge_(small)
        torch.testing.assert_close(small(**batch).logits, logits, atol=1e-4, rtol=1e-4)
        kinds = {name: type(module) for name, module in model.named_modules()}
        assert {name: type(module) for name, module in small.named_modules()} == kinds
        if method == "svd":
            assert small.state_dict().keys() == names
    assert 0 < errors["features"] < errors["svd"] < 1.5


@pytest.mark.parametrize(("make", "layers"), [(llama, 14), (gpt2, 8), (vit, 12)], ids=["llama", "gpt2", "vit"])
def test_a_pair_beside_each_layer(make, layers):
    model, batch = build(make)
    exact = model(**batch).logits
    statistics = lo.nn.collect_statistics(model, [batch], side="input")
    poor = copy.deepcopy(model)
    with torch.no_grad():
        for name in statistics:
            weight = poor.get_submodule(name).weight
            weight.copy_((weight * 5).round() / 5)
    before = (poor(**batch).logits - exact).norm()
    by_name = lo.nn.compensate_(copy.deepcopy(poor), model.state_dict(), rank=12, statistics=statistics)
    lo.nn.compensate_(poor, model, rank=12, statistics=statistics, freeze_rest=True)
    assert torch.equal(by_name(**batch).logits, poor(**batch).logits)
    assert count(poor, CompensatedLinear) == layers
    assert (poor(**batch).logits - exact).norm() < 0.7 * before
    assert sum(param.requires_grad for param in poor.parameters()) == 2 * layers
    logits = poor(**batch).logits
    lo.nn.merge_(poor)
    torch.testing.assert_close(poor(**batch).logits, logits, atol=1e-4, rtol=1e-4)


def test_ranks_are_selected_for_all_kinds_of_layers_and_factors_are_fine_tuned():
    for make in (llama, gpt2, vit):
        model, batch = build(make)
        ranks = lo.nn.select_ranks(model, reduction=0.6, budget="parameters", min_ratio=0.3)
        lo.nn.factorize_(model, ranks=ranks, freeze_rest=True)
        optimizer = lo.GaLoreAdamW(lo.param_groups(model, rank=None), lr=1e-2)
        labels = batch.get("input_ids", torch.zeros(40, dtype=torch.int64))
        losses = []
        for _ in range(4):
            loss = model(**batch, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert len(optimizer.param_groups[0]["params"]) == 2 * len(ranks)


def test_an_embedding_and_a_head_that_patterns_name():
    model, batch = build(llama)
    statistics = lo.nn.collect_statistics(model, [batch], include=["embed_tokens", "lm_head"])
    assert set(statistics) == {"model.embed_tokens", "lm_head"}
    assert statistics["model.embed_tokens"].count == rows_of(batch)
    exact = model(**batch).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lo.nn.factorize_(model, rank=20, method="features", statistics=statistics, include=["embed_tokens", "lm_head"])
    assert isinstance(model.get_input_embeddings(), LowRankEmbedding)
    assert isinstance(model.get_output_embeddings(), LowRankLinear)
    assert (model(**batch).logits - exact).norm() < 0.8 * exact.norm()
    tied, _ = build(gpt2)
    with pytest.raises(ValueError, match="tied"):
        lo.nn.factorize_(tied, rank=8, include="wte")
