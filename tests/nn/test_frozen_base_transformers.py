"""Frozen-base adapters in small transformers: LLaMA, GPT-2 (whose Conv1D stores the transpose) and ViT."""

import pytest
import torch

import lowrank_optim as lo
from tests.nn.test_decompositions_transformers import build, gpt2, llama, vit
from tests.nn.test_frozen_base import convert, perturb

METHODS = ["svfit", "salt", "loldu", "nola"]


@pytest.mark.parametrize(("make", "layers"), [(llama, 14), (gpt2, 8), (vit, 12)], ids=["llama", "gpt2", "vit"])
def test_a_model_starts_as_it_was_learns_and_comes_back(make, layers):
    for name in METHODS:
        model, batch = build(make)
        exact, kinds = model(**batch).logits, {key: type(module) for key, module in model.named_modules()}
        keys = model.state_dict().keys()
        convert(name, model)
        assert sum(isinstance(module, lo.nn.AdaptedLayer) for module in model.modules()) == layers
        assert torch.equal(model(**batch).logits, exact)
        optimizer = lo.LowRankOptimizer(lo.param_groups(model, rank=None), rule="adam", lr=1e-2)
        assert all("base" not in key for group in optimizer.param_groups for key in group["param_names"])
        losses = []
        for _ in range(4):
            loss = model(**batch).logits.square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0], name
        perturb(model, 0.02)
        logits = model(**batch).logits
        assert (logits - exact).norm() > 0.01 * exact.norm(), name
        lo.nn.merge_(model)
        assert {key: type(module) for key, module in model.named_modules()} == kinds
        assert model.state_dict().keys() == keys
        torch.testing.assert_close(model(**batch).logits, logits, atol=2e-4, rtol=2e-4, msg=name)


def test_the_patches_of_a_vit_get_a_core():
    model, batch = build(vit)
    exact = model(**batch).logits
    lo.nn.tucker_adapters_(model, rank=4, kernel_rank=2)
    names = [key for key, p in model.named_parameters() if p.requires_grad]
    assert [key.rpartition(".")[2] for key in names] == [
        "core",
        "input_factor",
        "output_factor",
        "kernel_factor_0",
        "kernel_factor_1",
    ]
    assert torch.equal(model(**batch).logits, exact)
    logits = perturb(model, 1.0)(**batch).logits
    assert (logits - exact).norm() > 0.01 * exact.norm()
    lo.nn.merge_(model)
    torch.testing.assert_close(model(**batch).logits, logits, atol=2e-4, rtol=2e-4)
