"""The option l1: soft thresholds on gates, on any dense parameter, and on the rank-one terms of pairs."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo
from tests.oracles import pairs as oracle


def soft(values: Tensor, threshold: float) -> Tensor:
    return values.sign() * (values.abs() - threshold).clamp_min(0.0)


def test_gates_of_a_small_problem_have_the_numbers_that_were_computed_elsewhere():
    """The golden problem with ΔW = sB diag(e) A; all are trained by AdamW, the gates with a threshold of ηξ."""
    a, b = map(nn.Parameter, oracle.golden_pair())
    gates = nn.Parameter(torch.tensor([0.8, -0.3], dtype=torch.float64))
    optimizer = lo.GaLoreAdamW([{"params": [a, b]}, {"params": [gates], "l1": 2.0}], lr=0.05, weight_decay=0.0)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = oracle.golden_loss(torch.diag(gates) @ a, b)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    losses.append(float(oracle.golden_loss(torch.diag(gates) @ a, b).detach()))
    assert losses == pytest.approx([0.2051009183, 0.1881031992, 0.1799183533, 0.1742638447], abs=1e-10)
    assert gates.tolist() == pytest.approx([0.4595521557, -0.1412926765], abs=1e-10)


@pytest.mark.parametrize("options", [{}, {"rank": 2}])
def test_the_threshold_comes_after_the_update_and_is_the_rate_times_l1(options: dict[str, int]):
    plain = nn.Parameter(torch.randn(6, 9, generator=torch.Generator().manual_seed(0)))
    shrunk = copy.deepcopy(plain)
    first = lo.GaLoreAdamW([plain], lr=0.01, weight_decay=0.1, **options)
    second = lo.GaLoreAdamW([{"params": [shrunk], "lr_factor": 2.0}], lr=0.005, weight_decay=0.1, l1=5.0, **options)
    for p in (plain, shrunk):
        p.grad = torch.full_like(p, 0.3)
    first.step(), second.step()
    assert torch.allclose(shrunk, soft(plain.detach(), 0.05), atol=1e-7)
    assert int((shrunk == 0).sum()) > 0


def test_a_threshold_of_zero_changes_no_bit_and_a_gradient_that_is_not_finite_shrinks_nothing():
    params = [nn.Parameter(torch.randn(33, generator=torch.Generator().manual_seed(0))) for _ in range(2)]
    optimizers = [lo.GaLoreAdamW([params[0]], lr=0.1), lo.GaLoreAdamW([params[1]], lr=0.1, l1=0.0)]
    for p, optimizer in zip(params, optimizers, strict=True):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert torch.equal(*params)
    for on_device in (False, True):
        gate = nn.Parameter(torch.ones(5))
        optimizer = lo.GaLoreAdamW([gate], lr=0.1, l1=3.0)
        optimizer._mask_on_device = on_device
        gate.grad = torch.full_like(gate, torch.nan)
        if on_device:
            optimizer.step()
        else:
            with pytest.warns(RuntimeWarning, match="skipped"):
                optimizer.step()
        assert torch.equal(gate, torch.ones(5))


def terms(a: Tensor, b: Tensor) -> Tensor:
    return b.detach().norm(dim=0) * a.detach().norm(dim=1)


def test_rank_one_terms_are_shrunk_by_a_soft_threshold_on_their_size():
    """Direction and balance of a term are kept: only ‖b_k‖‖a_k‖ is smaller, by ηξ, or 0."""
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor([1.0, 0.1, 0.5])
    a = nn.Parameter(torch.randn(3, 9, generator=generator) * size[:, None])
    b = nn.Parameter(torch.randn(6, 3, generator=generator) * size)
    plain = copy.deepcopy((a, b))
    first = lo.LoRAOptimizer(lo.lora_pairs([(*plain, 2.0)]), lr=0.01, weight_decay=0.0)
    second = lo.LoRAOptimizer(lo.lora_pairs([(a, b, 2.0)], l1=30.0), lr=0.01, weight_decay=0.0)
    for pair in (plain, (a, b)):
        for p in pair:
            p.grad = torch.full_like(p, 0.1)
    first.step(), second.step()
    before, after = terms(*plain), terms(a, b)
    assert torch.allclose(after, (before - 0.3).clamp_min(0.0), atol=1e-6)
    assert after[1] == 0
    assert not a[1].any()
    assert not b[:, 1].any()
    factor = (after / before).sqrt()
    assert torch.allclose(a, plain[0] * factor[:, None], atol=1e-6)
    assert torch.allclose(b, plain[1] * factor, atol=1e-6)


def test_beside_a_frozen_factor_the_other_takes_the_whole_threshold():
    generator = torch.Generator().manual_seed(0)
    a, b = (nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 9), (6, 3)))
    plain = copy.deepcopy((a, b))
    optimizers = [
        lo.LoRAOptimizer(lo.lora_pairs([(*pair, 1.0)], freeze="A", **options), lr=0.01, weight_decay=0.0)
        for pair, options in ((plain, {}), ((a, b), {"l1": 50.0}))
    ]
    for optimizer, own in zip(optimizers, (plain[1], b), strict=True):
        own.grad = torch.full_like(own, 0.1)
        optimizer.step()
    assert torch.allclose(terms(a, b), (terms(*plain) - 0.5).clamp_min(0.0), atol=1e-5)


def test_pruning_a_model_keeps_what_it_computes():
    class Layer(nn.Module):
        """What peft's linear layer has."""

        def __init__(self) -> None:
            super().__init__()
            self.r, self.lora_alpha, self.scaling = {"default": 4}, {"default": 8}, {"default": 2.0}
            self.use_rslora = {"default": True}
            self.lora_A = nn.ModuleDict({"default": nn.Linear(7, 4, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(4, 5, bias=True)})

        def forward(self, x: Tensor) -> Tensor:
            return self.scaling["default"] * self.lora_B["default"](self.lora_A["default"](x))

    torch.manual_seed(0)
    model = nn.Sequential(Layer(), Layer())
    model[1].lora_A = nn.ModuleDict({"default": nn.Linear(5, 4, bias=False)})
    with torch.no_grad():
        model[0].lora_A["default"].weight[1] = 0.0
        model[0].lora_B["default"].weight[:, 3] = 0.0
        model[1].lora_B["default"].weight.zero_()
    x = torch.randn(3, 7)
    before = model(x)
    assert lo.prune_ranks_(model) == {"0.default": 2, "1.default": 1}
    assert torch.allclose(model(x), before)
    assert model[0].lora_A["default"].weight.shape == (2, 7)
    assert (model[0].lora_A["default"].out_features, model[0].lora_B["default"].in_features) == (2, 2)
    assert model[0].r == {"default": 2}
    assert model[0].lora_alpha["default"] == pytest.approx(2.0 * math.sqrt(2.0))
    assert lo.prune_ranks_(model) == {}
    with pytest.raises(ValueError, match="the model has no adapter 'other'"):
        lo.prune_ranks_(model, "other")
