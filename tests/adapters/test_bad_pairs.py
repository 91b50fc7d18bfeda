"""What cannot be a pair, or cannot be shrunk, is refused by name, before anything moves."""

import logging

import pytest
import torch
from torch import nn

import lowrank_optim as lo
from tests.oracles.adapted import two_layers


def factor(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return nn.Parameter(values.to(dtype))


def test_a_pair_that_is_split_over_two_groups():
    a, b = factor(4, 32), factor(64, 4)
    (group,) = lo.lora_pairs([(a, b, 1.0)])
    halves = [{**group, "params": [a], "scalings": [1.0]}, {**group, "params": [b], "scalings": [1.0]}]
    with pytest.raises(ValueError, match=r"steps 2 parameters at a time, and its group has 1: 0\.0"):
        lo.LoRARiteAdamW(halves)
    others = factor(4, 20), factor(30, 4)
    mixed = [{**group, "params": [a, others[0]]}, {**group, "params": [b, others[1]]}]
    with pytest.raises(
        ValueError, match=r"0\.0 \(4, 32\) and 0\.1 \(4, 20\) are no pair: A has 4 rows and B 20 columns"
    ):
        lo.LoRARiteAdamW(mixed)


def test_unequal_ranks_a_missing_partner_and_a_rank_above_a_side():
    with pytest.raises(ValueError, match=r"A of pair 0 \(4, 32\) and B of pair 0 \(64, 3\) are no pair"):
        lo.lora_pairs([(factor(4, 32), factor(64, 3), 1.0)])
    with pytest.raises(TypeError, match=r"\(A, B, s\) triples of two tensors and a number"):
        lo.lora_pairs([(factor(4, 32), None, 1.0)])
    model = two_layers(torch.float32)
    del model[2].lora_B["default"]
    with pytest.raises(ValueError, match=r"2\.lora_A\.default has no partner in its layer"):
        lo.lora_pairs(model)
    with pytest.raises(ValueError, match=r"have rank 8, above the shorter side 5"):
        lo.lora_pairs([(factor(8, 5), factor(64, 8), 1.0)])


@pytest.mark.parametrize("scaling", [0.0, float("inf"), float("nan"), None])
def test_a_scaling_that_makes_no_product(scaling: float | None):
    with pytest.raises(ValueError, match=r"the scaling of A of pair 1 .* it must be a finite number other than 0"):
        lo.lora_pairs([(factor(4, 32), factor(64, 4), 1.0), (factor(2, 8), factor(8, 2), scaling)])


def test_one_tensor_in_two_pairs():
    a = factor(4, 32)
    with pytest.raises(ValueError, match=r"A of pair 1 \(4, 32\) is in two pairs, as A of pair 0 too \(tied weights\)"):
        lo.lora_pairs([(a, factor(64, 4), 1.0), (a, factor(16, 4), 1.0)])


def test_a_model_without_adapters_and_options_that_are_misspelt():
    with pytest.raises(ValueError, match="the model has no layers with adapters"):
        lo.lora_pairs(nn.Linear(4, 4))
    pair = [(factor(4, 32), factor(64, 4), 1.0)]
    with pytest.raises(TypeError, match="did you mean 'lr_ratio'"):
        lo.lora_pairs(pair, lr_ration=16)
    with pytest.raises(TypeError, match="rank is set by lora_pairs"):
        lo.lora_pairs(pair, rank=4)
    with pytest.raises(ValueError, match="lr_ratio is -1; it must be a finite number of at least 0"):
        lo.lora_pairs(pair, lr_ratio=-1)
    for name in ("frozen", "freeze"):
        with pytest.raises(ValueError, match=f"{name} is 'all'; valid values are"):
            lo.lora_pairs(pair, **{name: "all"})
    for each in pair[0][:2]:
        each.requires_grad_(False)
    with pytest.raises(ValueError, match="all factors are frozen"):
        lo.lora_pairs(pair)


def test_optimizers_of_pairs_need_pairs():
    with pytest.raises(
        ValueError, match=r"no group says which parameters are pairs: LoRARiteAdamW\(lo\.lora_pairs\(model\)\)"
    ):
        lo.LoRARiteAdamW([factor(4, 32), factor(64, 4)])
    pair = lo.lora_pairs([(factor(4, 32), factor(64, 4), 1.0)])
    with pytest.raises(
        ValueError,
        match="preconditioner is 'ritz'; valid values are 'none', 'riemannian', 'lora_pro', 'rite', 'altlora'",
    ):
        lo.LoRAOptimizer(pair, preconditioner="ritz")
    with pytest.raises(ValueError, match="moments is 'some'"):
        lo.LoRAProAdamW(pair, moments="some")
    with pytest.raises(ValueError, match=r"beta1 is 1\.0"):
        lo.AltLoRA(pair, beta1=1.0)
    with pytest.raises(ValueError, match=r"beta2 is 1\.0"):
        lo.AltLoRA(pair, betas=(0.9, 1.0), second_moment=True)
    with pytest.raises(ValueError, match="second_moment is 1; it must be True or False"):
        lo.AltLoRA(pair, second_moment=1)
    with pytest.raises(ValueError, match=r"damping is -1\.0"):
        lo.RiemannianAdamW(pair, damping=-1.0)


def test_a_pair_of_which_one_factor_got_no_gradient():
    a, b = factor(4, 32), factor(64, 4)
    optimizer = lo.AltLoRA(lo.lora_pairs([(a, b, 1.0)]))
    a.grad = torch.ones_like(a)
    before = a.detach().clone()
    with pytest.raises(RuntimeError, match=r"0\.1 got no gradient, so that none of them was changed"):
        optimizer.step()
    assert torch.equal(a, before)


def test_a_threshold_that_would_zero_every_term_at_the_start():
    a, b = factor(4, 32), nn.Parameter(torch.zeros(64, 4))
    optimizer = lo.LoRAOptimizer(lo.lora_pairs([(a, b, 1.0)], l1=0.5), lr=0.1)
    a.grad, b.grad = torch.zeros_like(a), torch.ones_like(b)
    before = a.detach().clone()
    with pytest.raises(
        ValueError, match=r"l1=0\.5 would set every rank-one term of 0\.0 and 0\.1 to zero in the first step"
    ):
        optimizer.step()
    assert torch.equal(a, before)
    assert not b.any()
    optimizer.param_groups[0]["l1"] = 0.0
    optimizer.step()
    assert b.all()


def test_thresholds_need_float32_and_a_rule_for_pairs():
    gate = factor(8, dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"l1 is 0\.1, but parameter 0\.0 is torch\.bfloat16, in which a small threshold"
    ):
        lo.GaLoreAdamW([{"params": [gate], "l1": 0.1}])
    optimizer = lo.GaLoreAdamW([gate])
    gate.grad = torch.ones_like(gate)
    optimizer.param_groups[0]["l1"] = 0.1
    before = gate.detach().clone()
    with pytest.raises(ValueError, match="keep such parameters in float32"):
        optimizer.step()
    assert torch.equal(gate, before)
    pairs = lo.lora_pairs([(factor(4, 32), factor(64, 4), 1.0)], l1=0.1)
    with pytest.raises(ValueError, match="its rule 'adam' steps the factors one by one"):
        lo.GaLoreAdamW(pairs)
    with pytest.raises(ValueError, match="l1 is -1; it must be a finite number of at least 0"):
        lo.GaLoreAdamW([factor(3)], l1=-1)


def test_factors_of_a_grouped_convolution_are_dense_and_logged(caplog: pytest.LogCaptureFixture):
    class Layer(nn.Module):
        def __init__(self, groups: int) -> None:
            super().__init__()
            self.scaling = {"default": 2.0}
            self.lora_A = nn.ModuleDict({"default": nn.Conv2d(4, 2, 3, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Conv2d(2, 8, 1, groups=groups, bias=False)})

    with caplog.at_level(logging.WARNING, "lowrank_optim"):
        groups = lo.lora_pairs(nn.ModuleList([Layer(1), Layer(2)]))
    assert "the factors of 1 are no pair: A is (2, 4, 3, 3) and B (8, 1, 1, 1), which do not multiply" in caplog.text
    assert [group["param_names"] for group in groups] == [
        ["0.lora_A.default.weight", "0.lora_B.default.weight"],
        ["1.lora_A.default.weight", "1.lora_B.default.weight"],
    ]
    with pytest.raises(ValueError, match="there is no adapter 'other'; the model has default"):
        lo.lora_pairs(nn.ModuleList([Layer(1)]), "other")
