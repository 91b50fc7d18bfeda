"""SaRA and truncated ranks on small transformers: LLaMA, GPT-2 (whose Conv1D stores the transpose) and ViT."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo

transformers = pytest.importorskip("transformers")

NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=96, **sizes, **NO_TOKENS)), tokens()


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, **NO_TOKENS)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return transformers.GPT2LMHeadModel(config), tokens()


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
    pixels = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=16, patch_size=4, **sizes))
    return model, {"pixel_values": pixels, "labels": torch.arange(8) % 2}


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(0, 96, (4, 24), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize(("make", "count"), [(llama, 14), (gpt2, 8), (vit, 13)], ids=["llama", "gpt2", "vit"])
def test_a_model_trains_on_chosen_entries_and_at_truncated_ranks(
    make: Callable[[], tuple[nn.Module, dict]], count: int
):
    torch.manual_seed(0)
    model, batch = make()
    model.train()
    groups = lo.param_groups(model, density=0.25)
    matrices = [
        (n, p)
        for group in groups
        if group.get("density")
        for n, p in zip(group["param_names"], group["params"], strict=True)
    ]
    assert len(matrices) == count
    before = {name: param.detach().clone() for name, param in matrices}
    optimizer = lo.SaRAAdamW(groups, lr=1e-2, weight_decay=0.1, shrink_at=4)
    losses = []
    for _ in range(8):
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    for name, param in matrices:
        moved = (param != before[name]).float().mean()
        assert 0.2 < moved <= 0.25, name

    handle = lo.truncate_ranks(optimizer, model, rank=5, period=2)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert handle.ranks() == {name: 5 for name, _ in matrices}
    assert all(int(torch.linalg.matrix_rank(param.detach().flatten(1), rtol=1e-5)) == 5 for _, param in matrices)
    handle.remove()
    lo.nn.truncate_(model, rank=2)
    assert all(int(torch.linalg.matrix_rank(param.detach().flatten(1), rtol=1e-5)) == 2 for _, param in matrices)


def tied_llama() -> tuple[nn.Module, dict[str, Tensor]]:
    """A LLaMA whose head is its embedding table; 96×80, so that it may have the low-rank term."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 80, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=96, tie_word_embeddings=True, **sizes, **NO_TOKENS)
    return transformers.LlamaForCausalLM(config), tokens()


@pytest.mark.parametrize("include", ["embed_tokens", "lm_head", ["embed_tokens", "lm_head", "q_proj"]], ids=str)
def test_a_tied_table_that_a_pattern_names_by_either_name_has_one_set_of_entries(include):
    def build(llama: nn.Module) -> lo.SaRAAdamW:
        groups = lo.param_groups(llama, density=0.25, include=include)
        return lo.SaRAAdamW(groups, lr=1e-2, weight_decay=0.1, shrink_at=3, low_rank_weight=0.1)

    model, batch = tied_llama()
    table = model.model.embed_tokens.weight
    optimizer = build(model)
    before, losses = table.detach().clone(), []
    mask = torch.zeros(table.numel(), dtype=torch.bool)
    mask[optimizer.state[table]["indices"].long()] = True
    assert int(mask.sum()) == table.numel() // 4
    for _ in range(5):
        losses.append(model(**batch).loss.item())
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert model.lm_head.weight is table
    assert sum(param is table for group in optimizer.param_groups for param in group["params"]) == 1
    moved = (table != before).flatten()
    assert not (moved & ~mask).any()
    assert moved[mask].float().mean() > 0.9

    other, _ = tied_llama()
    resumed = build(other)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for each, own in ((model, optimizer), (other, resumed)):
        each(**batch).loss.backward()
        own.step()
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert torch.equal(other.lm_head.weight, table)

    handle = lo.truncate_ranks(optimizer, model, rank=5, period=1, include="lm_head")
    optimizer.step()
    assert list(handle.ranks().values()) == [5]
    assert int(torch.linalg.matrix_rank(table.detach(), rtol=1e-5)) == 5


@pytest.mark.parametrize("exclude", [None, "embed_tokens", "lm_head"])
def test_a_tied_table_that_no_pattern_names_is_trained_as_a_whole(exclude):
    model, batch = tied_llama()
    table = model.lm_head.weight
    groups = lo.param_groups(model, density=0.25, exclude=exclude)
    optimizer = lo.SaRAAdamW(groups, lr=1e-2)
    assert "indices" not in optimizer.state[table]
    assert sum("indices" in optimizer.state[param] for group in groups for param in group["params"]) == 14
    before = table.detach().clone()
    model(**batch).loss.backward()
    optimizer.step()
    assert (table != before).float().mean() > 0.99
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # Left out of the optimizer, it stays.
    model, batch = tied_llama()
    optimizer = lo.SaRAAdamW([group for group in lo.param_groups(model, density=0.25) if group.get("density")], lr=1e-2)
    model(**batch).loss.backward()
    optimizer.step()
    assert torch.equal(model.lm_head.weight, before)
