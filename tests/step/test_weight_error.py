"""bfloat16 weights with error bits: the steps of float32 weights, by every rule, projector and residual."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo
from lowrank_optim.kernels import dispatch

F32, BF16 = torch.float32, torch.bfloat16
SHAPE = (24, 40)


def draw(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def build(dtype: torch.dtype, shape: tuple[int, ...] = SHAPE, **options) -> tuple[nn.Parameter, lo.LowRankOptimizer]:
    param = nn.Parameter(draw(0, shape).to(dtype))
    options = {"rule": "adam", "lr": 1e-4, "weight_decay": 0.1, **options}
    return param, lo.LowRankOptimizer([("w", param)], **options)


def steps(param: Tensor, optimizer: torch.optim.Optimizer, count: int, first: int = 1) -> None:
    for step in range(first, first + count):
        param.grad = draw(step, tuple(param.shape)).to(param.dtype)
        optimizer.step()


CASES = {
    "adam": {},
    "adam, 8-bit state": {"shape": (64, 128), "state_bits": 8},
    "adam, vector": {"shape": (60,)},
    "lion": {"rule": "lion"},
    "sgd": {"rule": lo.SGD(momentum=0.9)},
    "rmsprop": {"rule": "rmsprop"},
    "muon": {"rule": "muon"},
    "sage": {"rule": "sage"},
    "low-rank": {"rank": 4, "update_proj_gap": 5},
    "low-rank, left": {"rank": 4, "shape": (40, 24)},
    "fira": {"rank": 4, "residual": "norm_scaled"},
    "sign": {"rank": 4, "residual": "sign"},
    "columns": {"rank": 4, "projector": "coordinate:columns", "update_proj_gap": 3},
    "entries": {"density": 0.3, "projector": "coordinate:entries", "update_proj_gap": 3, "residual": "sign"},
    "blocks": {"density": 0.5, "projector": "blocks:descending", "on_refresh": "reset"},
    "exact sums": {"rank": 4, "exact_sums": True},
    "experts": {"shape": (3, 14, 20), "rank": 4},
    "convolution": {"shape": (6, 4, 3, 3), "rank": 4},
    "transposed": {"rank": 4, "layout": "transposed"},
    "ascent": {"maximize": True},
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("case", list(CASES))
def test_with_sixteen_bits_weights_are_those_of_float32_to_the_bit(case, backend, monkeypatch):
    if backend is not None:
        monkeypatch.setenv(dispatch.VARIABLE, backend)
    exact, reference = build(F32, **CASES[case])
    param, optimizer = build(BF16, **CASES[case], weight_error_bits=16)
    steps(exact, reference, 12)
    steps(param, optimizer, 12)
    assert torch.equal(lo.full_precision(optimizer, param), exact)
    assert not torch.equal(exact, draw(0, tuple(exact.shape)).float())
    # Ties, where the two round apart, are one number in 2¹⁶.
    assert float((param != exact.to(BF16)).float().mean()) < 1e-3


@pytest.mark.parametrize("rule", [lo.Adafactor(), lo.RowNorm(0.9), lo.Sinkhorn(), lo.NorMuon(), lo.FoldedAdam()])
def test_rules_that_sum_over_lines_agree_with_float32_to_the_last_bits(rule):
    exact, reference = build(F32, rule=rule)
    param, optimizer = build(BF16, rule=rule, weight_error_bits=16)
    steps(exact, reference, 12)
    steps(param, optimizer, 12)
    torch.testing.assert_close(lo.full_precision(optimizer, param), exact.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [8, 16])
def test_steps_of_adamw_are_those_of_a_float64_transcription(bits):
    """Each step begins where the one before ended; it ends within 2⁻¹⁶ of the weight with 8 bits, 2⁻²² with 16."""
    param, optimizer = build(BF16, weight_error_bits=bits)
    m = v = torch.zeros(SHAPE, dtype=torch.float64)
    for step in range(1, 16):
        before = lo.full_precision(optimizer, param).double()
        steps(param, optimizer, 1, first=step)
        g = draw(step).double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        direction = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        expected = (1 - 1e-4 * 0.1) * before - 1e-4 * direction
        error = (lo.full_precision(optimizer, param).double() - expected).abs() / expected.abs()
        assert float(error.max()) < (1.05 * 2.0**-16 if bits == 8 else 2.0**-22)


def test_updates_below_the_spacing_of_bfloat16_are_not_lost():
    """A hundred steps of 10⁻⁵ on weights of 1, whose neighbours are 2⁻⁸ and 2⁻⁷ away."""
    ends = {}
    for bits in (None, 8, 16):
        param = nn.Parameter(torch.ones(8, 8, dtype=BF16))
        optimizer = lo.LowRankOptimizer([param], rule="adam", lr=1e-5, weight_error_bits=bits)
        for _ in range(100):
            param.grad = torch.ones_like(param)
            optimizer.step()
        ends[bits] = float(lo.full_precision(optimizer, param)[0, 0])
    assert ends[None] == 1.0
    assert ends[16] == pytest.approx(0.999, abs=5e-6)
    assert ends[8] == pytest.approx(0.999, abs=100 * 2.0**-17)


def test_a_step_that_is_left_out_leaves_weights_and_errors():
    for options in ({}, {"rank": 4}, {"rule": "lion"}):
        param, optimizer = build(BF16, **options, weight_error_bits=8)
        steps(param, optimizer, 3)
        before, kept = param.detach().clone(), optimizer.state[param]["weight_error"].clone()
        param.grad = torch.full_like(param, math.nan)
        with pytest.warns(RuntimeWarning, match="skipped"):
            optimizer.step()
        assert torch.equal(param, before)
        assert torch.equal(optimizer.state[param]["weight_error"], kept)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("options", [{}, {"rank": 4, "update_proj_gap": 3}], ids=["dense", "low-rank"])
def test_a_resumed_run_is_the_run(bits, options, tmp_path):
    param, optimizer = build(BF16, **options, weight_error_bits=bits)
    steps(param, optimizer, 5)
    torch.save((param.detach(), optimizer.state_dict()), tmp_path / "saved")
    steps(param, optimizer, 5, first=6)
    other, resumed = build(BF16, **options, weight_error_bits=bits)
    values, state = torch.load(tmp_path / "saved", weights_only=True)
    with torch.no_grad():
        other.copy_(values)
    resumed.load_state_dict(state)
    steps(other, resumed, 5, first=6)
    assert torch.equal(other, param)
    assert torch.equal(lo.full_precision(resumed, other), lo.full_precision(optimizer, param))
    assert resumed.state[other]["weight_error"].dtype == torch.int8


def test_a_checkpoint_of_other_bits_is_refused():
    _, optimizer = build(BF16, weight_error_bits=8)
    _, other = build(BF16)
    with pytest.raises(ValueError, match="weight_error_bits is 8 in the checkpoint, None here"):
        other.load_state_dict(optimizer.state_dict())


def test_errors_stay_when_the_group_changes():
    param, optimizer = build(BF16, rank=4, weight_error_bits=8)
    steps(param, optimizer, 5)
    before = lo.full_precision(optimizer, param)
    for change in ({"rank": 6}, {"weight_error_bits": 16}, {"rank": None}, {"rule": lo.Lion()}):
        optimizer.change_group(0, **change)
        assert torch.equal(lo.full_precision(optimizer, param), before), change
    assert optimizer.state[param]["weight_error_low"].dtype == torch.uint8
    optimizer.param_groups[0]["weight_error_bits"] = None
    with pytest.raises(ValueError, match="change_group"):
        steps(param, optimizer, 1)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_updates_in_backward_are_those_of_ordinary_steps(accumulate):
    ends = []
    for in_backward in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 8)).to(BF16)
        groups = lo.param_groups(model, rank=4)
        optimizer = lo.GaLoreAdamW(groups, lr=1e-3, weight_error_bits=16, update_proj_gap=100)
        handle = lo.update_in_backward(optimizer, accumulate=accumulate) if in_backward else None
        for step in range(4):
            for micro in range(accumulate):
                x = draw(10 * step + micro, (6, 24))
                model(x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([lo.full_precision(optimizer, p) for p in model.parameters()])
        if handle is not None:
            handle.remove()
    if accumulate == 1:
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    else:  # sums of bfloat16 gradients are rounded in another order
        assert max(float((a - b).abs().max()) for a, b in zip(*ends, strict=True)) < 1e-2


def test_float32_weights_have_no_errors_and_are_exported_as_they_are():
    param, optimizer = build(F32, weight_error_bits=8)
    steps(param, optimizer, 2)
    assert "weight_error" not in optimizer.state[param]
    whole = lo.full_precision(optimizer, param)
    assert torch.equal(whole, param)
    assert whole.data_ptr() != param.data_ptr()


def test_without_errors_the_export_is_the_weights_or_their_masters():
    param, optimizer = build(BF16)
    assert torch.equal(lo.full_precision(optimizer, param), param.float())
    layer = [{"params": [("w", nn.Parameter(draw(0)))], "layer": 0, "rank": None}]
    optimizer = lo.BAdamW(layer, lr=1e-4, master_weights=True)
    (param,) = layer[0]["params"][0][1:]
    steps(param, optimizer, 3)
    assert torch.equal(lo.full_precision(optimizer, param), optimizer.state[param]["master"])
    with pytest.raises(ValueError, match="is none of this BAdamW's"):
        lo.full_precision(optimizer, nn.Parameter(torch.ones(3)))


def test_channels_last_convolutions_step_like_contiguous_ones():
    ends = []
    for last in (False, True):
        for options in ({}, {"rank": 4}, {"rule": lo.RowNorm()}):
            param, optimizer = build(BF16, (6, 4, 3, 3), **options, weight_error_bits=16)
            if last:
                param.data = param.data.contiguous(memory_format=torch.channels_last)
            steps(param, optimizer, 4)
            ends.append(lo.full_precision(optimizer, param))
    for contiguous, other in zip(ends[:3], ends[3:], strict=True):
        torch.testing.assert_close(other, contiguous, rtol=1e-6, atol=1e-7)


def test_other_weights_count_within_half_a_unit_of_their_last_place():
    """Weights that somebody else has written are stepped from, zeros among them."""
    param, optimizer = build(BF16, weight_error_bits=16)
    steps(param, optimizer, 3)
    with torch.no_grad():
        param.copy_(draw(77))
        param[0] = 0.0
    whole = lo.full_precision(optimizer, param)
    assert bool(((whole - param).abs() <= 2.0**-8 * param.abs() + 1e-40).all())
    steps(param, optimizer, 3, first=4)
    assert bool(torch.isfinite(lo.full_precision(optimizer, param)).all())


def test_bytes_are_in_the_state_and_in_the_plan():
    model = nn.Sequential(nn.Linear(64, 256, bias=False), nn.Linear(256, 64, bias=False)).to(BF16)
    numel = 2 * 64 * 256
    sizes = {}
    for bits in (None, 8, 16):
        options = {"rank": 8, "weight_error_bits": bits}
        optimizer = lo.GaLoreAdamW(lo.param_groups(copy.deepcopy(model), rank=8), weight_error_bits=bits)
        sizes[bits] = sum(lo.state_bytes(optimizer).values())
        planned = lo.plan(model, ("galore", options), example_batch=torch.zeros(4, 64, dtype=BF16), device="cpu")
        assert planned.optimizer_state_bytes == sizes[bits]
    assert (sizes[8] - sizes[None], sizes[16] - sizes[None]) == (numel, 2 * numel)
    assert "weight_error_bits 16" in lo.describe(optimizer)


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(ValueError, match="weight_error_bits is 4; valid values are None, 8 and 16"):
        build(BF16, weight_error_bits=4)
    with pytest.raises(ValueError, match="weight_error_bits is 8 and stochastic_rounding True"):
        build(BF16, weight_error_bits=8, stochastic_rounding=True)
    with pytest.raises(ValueError, match=r"parameter w .* is float16; weight_error_bits is for bfloat16"):
        build(torch.float16, weight_error_bits=8)
    layer = [{"params": [("w", nn.Parameter(draw(0)))], "layer": 0, "rank": None}]
    with pytest.raises(ValueError, match="weight_error_bits is 16 and master_weights True"):
        lo.BAdamW(layer, master_weights=True, weight_error_bits=16)
    model = nn.Sequential(nn.Linear(64, 64, dtype=BF16))
    lo.nn.quantize_weights_(model)
    with pytest.raises(ValueError, match=r"parameter 0\.weight .* is stored in 8 bits; weight_error_bits"):
        lo.GaLoreAdamW(lo.param_groups(model, rank=8), weight_error_bits=8)
