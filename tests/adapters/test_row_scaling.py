"""ALLoRA in backward: gradients of both factors beside their definition, the golden run, and what must not change."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowrank_optim as lo
from lowrank_optim import rules
from tests.oracles import pairs as oracle
from tests.oracles.adapted import Adapted, two_layers

X = torch.randn(5, 4, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def gradients(model: nn.Module, x: Tensor, redo: bool | None = None) -> list[Tensor]:
    """Of all factors, and of the input; `redo`: activations are computed again, in the old way or in the new one."""
    model.zero_grad()
    x = x.clone().requires_grad_(True)
    y = model(x) if redo is None else checkpoint(model, x, use_reentrant=redo)
    (y.square().sum() + y.sum()).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None] + [x.grad]


def test_gradients_of_both_factors_are_those_of_scaled_rows_and_the_input_has_its_own():
    model = Adapted(12, 40, 3).double()
    a, b = model.factors
    plain, y = gradients(model, X), model(X).detach()
    handle = lo.scale_rows_in_backward(model, 2.0)
    assert torch.equal(model(X), y)
    got = gradients(model, X)
    tokens, outgoing = X.flatten(0, 1), (2.0 * y + 1.0).flatten(0, 1)
    sigma = (torch.linalg.vector_norm(b @ a, dim=1) + 0.25).rsqrt().detach()
    scaled = sigma[:, None] * (outgoing.mT @ tokens)  # diag(σ) G
    assert torch.allclose(got[0], 2.0 * b.mT @ scaled, rtol=1e-12)
    assert torch.allclose(got[1], 2.0 * scaled @ a.mT, rtol=1e-12)
    assert torch.allclose(got[2], plain[2], rtol=1e-12)
    assert not torch.allclose(got[0], plain[0], rtol=1e-2)
    handle.remove()
    assert all(torch.equal(one, other) for one, other in zip(gradients(model, X), plain, strict=True))


@pytest.mark.parametrize("by_the_rule", [False, True])
def test_the_golden_run_of_both_factors(by_the_rule: bool):
    layer = Adapted(8, 6, 2, bias=False).double()
    a, b = layer.factors
    with torch.no_grad():
        a.copy_(oracle.golden_pair()[0]), b.copy_(oracle.golden_pair()[1])
        layer.base_layer.weight.copy_(oracle.golden_weight())
    x, y = oracle.golden_data()
    rule = rules.AdamPair(moments="none", row_scale=2.0 if by_the_rule else 0.0)
    optimizer = lo.LoRAOptimizer(lo.lora_pairs(layer), rule, lr=0.5, weight_decay=0.0)
    lo.scale_rows_in_backward(layer, 2.0, factors="A" if by_the_rule else "AB")
    losses = []
    for _ in range(4):
        loss = 0.5 * (layer(x) - y).square().sum() / 12.0
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == pytest.approx([0.2382052423, 0.1737184205, 0.1340354596, 0.0787615069], abs=1e-10)


def test_sigma_of_the_golden_problem():
    a, b = oracle.golden_pair()
    found = rules.riemannian.row_scales(b, a @ a.mT, 2.0).flatten()
    golden = [1.7868162255, 1.9493321613, 1.7787906862, 1.8840483866, 1.8236675866, 1.8048670313]
    assert found.tolist() == pytest.approx(golden, abs=1e-10)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activations_that_are_computed_again_have_the_same_gradients(reentrant: bool):
    model = two_layers()
    lo.scale_rows_in_backward(model, 1.5)
    expected = gradients(model, X)
    assert len(expected) == 5
    got = gradients(model, X, reentrant)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_a_bias_of_b_keeps_its_gradient_and_autocast_its_types():
    model = two_layers(torch.float32)
    model[0].lora_B["default"] = nn.Linear(3, 40)
    x = X.float()
    plain = gradients(model, x)
    lo.scale_rows_in_backward(model, 1.5)
    got = gradients(model, x)
    assert torch.allclose(got[2], plain[2], rtol=1e-5)  # after A and B of the first layer
    assert not torch.allclose(got[1], plain[1], rtol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        low = gradients(model, x)
    for one, other in zip(low, got, strict=True):
        assert one.dtype == torch.float32
        assert float((one - other).norm()) < 0.03 * float(other.norm())


def test_what_cannot_be_scaled_is_refused_by_name():
    model = two_layers()
    for scale in (0.0, -1.0, float("inf"), True):
        with pytest.raises(ValueError, match="it must be a positive number"):
            lo.scale_rows_in_backward(model, scale)
    with pytest.raises(ValueError, match="factors is 'B'; valid values are 'AB', 'A'"):
        lo.scale_rows_in_backward(model, 1.0, factors="B")
    with pytest.raises(ValueError, match="the model has no adapter 'other'"):
        lo.scale_rows_in_backward(model, 1.0, adapter="other")
    handle = lo.scale_rows_in_backward(model, 1.0)
    with pytest.raises(RuntimeError, match="the rows of 0 are scaled already"):
        lo.scale_rows_in_backward(model, 1.0)
    handle.remove()
    model[2].lora_A["default"] = nn.Conv1d(40, 3, 1)
    with pytest.raises(ValueError, match="2 cannot have its rows scaled: its layer is not linear"):
        lo.scale_rows_in_backward(model, 1.0)
    assert not model[0].lora_B["default"]._forward_hooks

    class Gated(Adapted):
        def forward(self, x: Tensor) -> Tensor:
            return self.lora_B["default"](0.5 * self.lora_A["default"](x))

    gated = Gated(12, 40, 3).double()
    lo.scale_rows_in_backward(gated, 1.0)
    with pytest.raises(RuntimeError, match="does not give to lora_B what lora_A gave"):
        gated(X)
