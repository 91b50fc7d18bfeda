"""Cautious updates and cautious decay, by every rule and residual, against float64 transcriptions of their formulas."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo
from lowrank_optim.quantization import coded_moments as coded

LR, DECAY = 1e-2, 0.3
SHAPE = (24, 40)


def draw(seed: int, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def build(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32, **options):
    param = nn.Parameter(draw(0, shape, dtype))
    options = {"rule": "adam", "lr": LR, "weight_decay": DECAY, **options}
    return param, lo.LowRankOptimizer([("w", param)], **options)


def step(param: Tensor, optimizer: torch.optim.Optimizer, number: int) -> Tensor:
    param.grad = draw(number, tuple(param.shape), param.dtype)
    optimizer.step()
    return param.grad


def masked(update: Tensor, grad: Tensor) -> Tensor:
    """U ⊙ φ · d/(nnz(φ) + 1) with φ = 1(U ⊙ G > 0)."""
    agree = torch.logical_or((update > 0) & (grad > 0), (update < 0) & (grad < 0)).double()
    return update * agree * (agree.numel() / (agree.sum() + 1.0))


def decayed(weight: Tensor, update: Tensor) -> Tensor:
    """λ W where the update makes W smaller or leaves it."""
    return torch.where(update * weight < 0, 0.0, DECAY * weight)


@pytest.mark.parametrize("cautious", [True, False])
@pytest.mark.parametrize("cautious_decay", [True, False])
def test_adamw_is_the_transcription(cautious, cautious_decay):
    param, optimizer = build(cautious=cautious, cautious_decay=cautious_decay)
    weight, m, v = param.detach().double(), 0.0, 0.0
    for t in range(1, 9):
        g = step(param, optimizer, t).double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        update = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        if cautious:
            update = masked(update, g)
        weight = weight - LR * (decayed(weight, update) if cautious_decay else DECAY * weight) - LR * update
    torch.testing.assert_close(param.detach().double(), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["right", "left"])
def test_galore_is_the_transcription(side):
    """Moments in the subspace; masks at the weights, of the lifted update and the whole gradient."""
    options = {"rank": 4, "proj_type": side, "scale": 0.25, "update_proj_gap": 100}
    param, optimizer = build(cautious=True, cautious_decay=True, **options)
    weight, m, v = param.detach().double(), 0.0, 0.0
    for t in range(1, 7):
        g = step(param, optimizer, t).double()
        basis = optimizer.state[param]["basis"].double()
        r = g @ basis if side == "right" else g.mT @ basis
        m, v = 0.9 * m + 0.1 * r, 0.999 * v + 0.001 * r * r
        n = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        update = 0.25 * masked(n @ basis.mT if side == "right" else basis @ n.mT, g)
        weight = weight - LR * decayed(weight, update) - LR * update
    torch.testing.assert_close(param.detach().double(), weight, rtol=1e-5, atol=1e-6)


CASES = {
    "lion": {"rule": "lion"},
    "sgd": {"rule": lo.SGD(momentum=0.9)},
    "rmsprop": {"rule": "rmsprop"},
    "adafactor": {"rule": "adafactor"},
    "muon": {"rule": "muon"},
    "row_norm": {"rule": lo.RowNorm(0.9)},
    "sage": {"rule": "sage"},
    "8-bit state": {"shape": (64, 128), "state_bits": 8},
    "vector": {"shape": (60,)},
    "convolution": {"shape": (6, 4, 3, 3)},
    "convolution, low-rank": {"shape": (6, 4, 3, 3), "rank": 4},
    "experts": {"shape": (3, 14, 20), "rank": 4},
    "fira": {"rank": 4, "residual": "norm_scaled"},
    "error feedback": {"rank": 4, "residual": "error_feedback"},
    "sgd residual": {"rank": 4, "residual": "sgd"},
    "columns": {"rank": 4, "projector": "coordinate:columns", "residual": "sign"},
    "blocks": {"density": 0.5, "projector": "blocks:descending", "on_refresh": "reset"},
    "transposed": {"rank": 4, "layout": "transposed"},
    "exact sums": {"rank": 4, "exact_sums": True},
    "ascent": {"maximize": True},
    "on device": {"rank": 4, "residual": "norm_scaled"},
}


@pytest.mark.parametrize("case", list(CASES))
def test_every_update_is_masked_before_it_is_applied(case, monkeypatch):
    """The same optimizer without flags, in the same state, shows U without decay, and with it what decays."""
    monkeypatch.setattr(coded, "MIN_CODED", 1)
    monkeypatch.setattr(lo.LowRankOptimizer, "_mask_on_device", case == "on device")
    options = CASES[case]
    plain, reference = build(**options, weight_decay=0.0)
    shrunk, decaying = build(**options)
    param, optimizer = build(**options, cautious=True, cautious_decay=True)
    sign = -1.0 if "maximize" in options else 1.0
    for number in range(1, 5):
        with torch.no_grad():
            plain.copy_(param)
            shrunk.copy_(param)
        before = param.detach().double()
        g = step(plain, reference, number).double()
        step(shrunk, decaying, number)
        step(param, optimizer, number)
        update = masked(before - plain.detach().double(), sign * g)
        decay = plain.detach().double() - shrunk.detach().double()
        expected = before - update - torch.where(update * before < 0, 0.0, decay)
        torch.testing.assert_close(param.detach().double(), expected, rtol=1e-4, atol=2e-6)


def test_bfloat16_weights_with_error_bits_are_cautious_to_their_bits():
    exact, reference = build(cautious=True, cautious_decay=True)
    param, optimizer = build(dtype=torch.bfloat16, cautious=True, cautious_decay=True, weight_error_bits=16)
    with torch.no_grad():
        exact.copy_(param)
    for number in range(1, 7):
        exact.grad = step(param, optimizer, number).float()
        reference.step()
    assert torch.equal(lo.full_precision(optimizer, param), exact)


def test_a_joint_rule_is_cautious():
    pair = [nn.Parameter(draw(0)), nn.Parameter(draw(1))]
    optimizer = lo.LowRankOptimizer(
        [{"params": pair, "rule": Halves()}], rule="adam", lr=LR, weight_decay=DECAY, cautious=True, cautious_decay=True
    )
    before = [param.detach().double() for param in pair]
    for param in pair:
        param.grad = draw(5)
    optimizer.step()
    for param, weight in zip(pair, before, strict=True):
        update = masked(0.5 * draw(5).double() + 0.25, draw(5).double())
        torch.testing.assert_close(param.detach().double(), weight - LR * (update + decayed(weight, update)))


@dataclass(frozen=True)
class Halves(lo.JointRule):
    """N = g/2 + 1/4, of each of two parameters."""

    name = "halves"

    def init_joint(self, shapes, options, dtype, device):
        return [{} for _ in shapes]

    def directions(self, grads, states, options, contexts):
        return [lo.Direction(0.5 * grad + 0.25) for grad in grads]


@pytest.mark.parametrize("on_device", [False, True])
def test_a_gradient_that_is_not_finite_changes_nothing(on_device, monkeypatch):
    monkeypatch.setattr(lo.LowRankOptimizer, "_mask_on_device", on_device)
    for options in ({}, {"rank": 4, "residual": "norm_scaled"}):
        param, optimizer = build(**options, cautious=True, cautious_decay=True, on_nonfinite="skip")
        step(param, optimizer, 1)
        before = param.detach().clone()
        param.grad = draw(2).index_fill(0, torch.tensor([3]), math.nan)
        optimizer.step()
        assert torch.equal(param, before)


def test_what_cannot_be_cautious_is_refused():
    with pytest.raises(ValueError, match="cautious is 1; it must be True or False"):
        build(cautious=1)
    with pytest.raises(ValueError, match="match_reference and cautious_decay are both True"):
        build(match_reference=True, cautious_decay=True)
    _, optimizer = build(rank=4, cautious=True)
    with pytest.raises(ValueError, match="accumulate is 2, but cautious=True compares updates with the whole gradient"):
        lo.update_in_backward(optimizer, accumulate=2)
    _, optimizer = build(rank=4)
    handle = lo.update_in_backward(optimizer, accumulate=2)
    with pytest.raises(ValueError, match="accumulate is 2, but cautious=True"):
        optimizer.change_group(0, cautious=True)
    optimizer.param_groups[0]["cautious"] = True
    with pytest.raises(ValueError, match=r"change_group\(0, cautious=True\)"):
        optimizer.step()
    handle.remove()
    assert "cautious" in lo.describe(optimizer)
