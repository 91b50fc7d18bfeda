"""Sparse Spectral Training of small transformers: LLaMA, GPT-2 (whose Conv1D stores the transpose) and ViT."""

import pytest
import torch

import lowrank_optim as lo
from lowrank_optim.nn import SpectralLinear
from tests.nn.test_decompositions_transformers import build, count, gpt2, llama, vit


@pytest.mark.parametrize(("make", "layers"), [(llama, 14), (gpt2, 8), (vit, 12)], ids=["llama", "gpt2", "vit"])
def test_a_model_computes_what_it_did_learns_and_comes_back(make, layers):
    model, batch = build(make)
    exact, kinds = model(**batch).logits, {name: type(module) for name, module in model.named_modules()}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    lo.nn.spectral_(model, rank=6)
    assert count(model, SpectralLinear) == layers
    torch.testing.assert_close(model(**batch).logits, exact, atol=1e-4, rtol=1e-4)
    labels = batch.get("input_ids", torch.zeros(40, dtype=torch.int64))
    optimizer = lo.LowRankOptimizer(lo.param_groups(model, rank=None, weight_decay=0.1), rule="adam", lr=1e-2)
    schedule, losses = lo.SpectralSchedule(model, optimizer, period=2, iterations=2, warmup=1), []
    for _ in range(5):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    logits = model(**batch).logits
    lo.nn.merge_(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes
    torch.testing.assert_close(model(**batch).logits, logits, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_of_a_gpt2_loads_into_its_spectral_form():
    model, batch = build(gpt2)
    exact, state = model(**batch).logits, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other, _ = build(gpt2)
    for param in other.parameters():
        param.data.mul_(0.5)
    lo.nn.spectral_(other, rank=6)
    other.load_state_dict(state, strict=True)
    torch.testing.assert_close(other(**batch).logits, exact, atol=1e-4, rtol=1e-4)
