"""A large model in the host's memory: products in float32 tiles, what the allocator gives back, what is free."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import lowrank_optim as lo

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from pretraining import host
from pretraining.configs import build_model

BF16 = torch.bfloat16


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of a few rows, the last one smaller."""
    monkeypatch.setattr(host, "TILE", 24 * 7)


def linear(bias: bool) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 24, generator=generator).to(BF16).requires_grad_()
    weight = torch.randn(33, 24, generator=generator).to(BF16)
    return x, weight, torch.randn(33, generator=generator).to(BF16).requires_grad_() if bias else None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [16, 8])
def test_a_linear_layer_is_rounded_once_after_float32(small_tiles, bias, bits):
    x, weight, b = linear(bias)
    weight = lo.nn.QuantizedWeight.from_float(weight) if bits == 8 else weight
    weight.requires_grad_()
    plain = (weight.decoded(torch.float32) if bits == 8 else weight.detach().float()).double().requires_grad_()
    wide = [x.detach().double().requires_grad_(), plain, None if b is None else b.detach().double().requires_grad_()]
    expected = F.linear(*wide)
    with host.float32_products():
        found = F.linear(x, weight, b)
        grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(BF16)
        found.backward(grad)
    expected.backward(grad.double())
    assert found.dtype == BF16
    # One rounding to 8 binary digits is at most 2^-8 of the value; sums of 24 float32 products add less than 1e-5.
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-5)
    for tensor, reference in zip((x, weight, b), wide, strict=True):
        if tensor is not None:
            assert tensor.grad.dtype == BF16
            torch.testing.assert_close(tensor.grad.double(), reference.grad, rtol=2**-8, atol=1e-5)


def test_a_checkpointed_model_computes_its_layers_again_with_the_same_products(monkeypatch):
    """In backward, too: torch's own products of bfloat16 must never be asked for."""
    model = build_model("cpu", 64, 16, torch.device("cpu"), BF16, True, 0)
    calls = []
    monkeypatch.setattr(host._Linear, "forward", counted(host._Linear.forward, calls))
    tokens = torch.arange(16).reshape(1, 16)
    with host.float32_products():
        model(input_ids=tokens, labels=tokens).loss.backward()
    layers, linears = len(model.model.layers), 7
    assert len(calls) == 2 * layers * linears + 1  # twice, and the head once
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in model.parameters())


def test_attention_is_rounded_once_and_keeps_no_float32_for_backward():
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(2, 4, 9, 8, generator=generator).to(BF16).requires_grad_() for _ in range(3))
    mask = torch.zeros(9, 9, dtype=BF16).masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -1e4)
    wide = [x.detach().double().requires_grad_() for x in (query, key, value)]
    expected = F.scaled_dot_product_attention(*wide, mask.double())
    kept = []
    with host.float32_products(), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        found = F.scaled_dot_product_attention(query, key, value, mask)
    assert found.dtype == BF16
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-5)
    assert all(tensor.dtype == BF16 for tensor in kept)


def counted(function, calls):
    def call(*args):
        calls.append(None)
        return function(*args)

    return staticmethod(call)


def test_only_slow_products_are_replaced(monkeypatch):
    cpu, cuda, linear = torch.device("cpu"), torch.device("cuda"), F.linear

    def replaced(device, dtype):
        with host.fast_products(device, dtype):
            return F.linear is not linear

    monkeypatch.setattr(host, "multiplies_bfloat16", lambda: False)
    assert replaced(cpu, BF16)
    assert not replaced(cpu, torch.float32)
    assert not replaced(cuda, BF16)
    monkeypatch.setattr(host, "multiplies_bfloat16", lambda: True)
    assert not replaced(cpu, BF16)
    x = torch.randn(2, 24)
    with host.float32_products():
        assert torch.equal(F.linear(x, x), linear(x, x))  # of other types nothing changes
    with pytest.raises(ValueError, match="of the body"), host.float32_products():
        raise ValueError("of the body")
    assert F.linear is linear


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_memory_is_what_the_system_says():
    before = host.resident()
    kept = torch.ones(64 << 18)  # 64 MB
    assert 60 << 20 < host.resident() - before < 80 << 20
    del kept
    assert host.available() > 1 << 20
