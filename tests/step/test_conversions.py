"""A model that is converted (`model.double()`, `.bfloat16()`, …) after its optimizer was built, and checkpoints of another type.

State follows the type of arithmetic on its parameter: moments, stored bases, errors and norms become float64 with float64 weights.
Codes and their scales are the same for every type.
"""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SHAPES = [(96, 64), (64, 80), (3, 48, 32), (40,)]

CASES: list[tuple[str, dict]] = [(name, {}) for name in lo.METHODS if name not in ("lisa", "badam")]
CASES += [("galore", {"state_bits": bits}) for bits in (16, 8, 4)]
CASES += [("galore", {"basis_bits": bits}) for bits in (16, 8, 4)]
CASES += [("galore", {"rank": None, "state_bits": bits}) for bits in (32, 16, 8)]
CASES += [("galore", {"proj_type": "full", "on_refresh": "rotate"}), ("galore", {"projector": "random"})]
CASES += [("galore", {"overlap_threshold": 0.5}), ("galore", {"projector": "power_iteration"})]
CASES += [("frugal", {"coordinates": c, "state_bits": b}) for c in ("columns", "rows", "entries") for b in (32, 8)]
CASES += [("frugal", {"blocks": "random", "state_bits": bits}) for bits in (32, 8)]
CASES += [
    ("frugal", {"projector": "svd", "residual": "sgd"}),
    ("fira", {"state_bits": 8}),
    ("apollo", {"state_bits": 4}),
]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def build(name: str, params: list, **options: object) -> lo.LowRankOptimizer:
    options = {"lr": 1e-2, "update_proj_gap": 3, "stagger": False, **options}
    if name == "frugal":
        options.setdefault("density", 0.25)
    elif "rank" not in options:
        options["rank"] = 1 if name == "apollo_mini" else 16
    return lo.by_name(name)(params, **options)


def weights(dtype: torch.dtype) -> list[nn.Parameter]:
    return [nn.Parameter(draw(i, *shape).to(BF16).to(dtype)) for i, shape in enumerate(SHAPES)]


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], start: int, stop: int) -> None:
    """Steps whose gradients bfloat16 holds exactly, so that they are the same for every type."""
    for step in range(start, stop):
        for i, param in enumerate(params):
            param.grad = draw(100 * step + i, *param.shape).to(BF16).to(param.dtype)
        optimizer.step()


def convert(params: list[nn.Parameter], dtype: torch.dtype) -> None:
    module = nn.ParameterList(params)
    module.to(dtype)
    assert all(p.dtype == dtype for p in params)


def types(optimizer: lo.LowRankOptimizer) -> list[dict[str, tuple[torch.dtype, torch.Size]]]:
    return [{name: (t.dtype, t.shape) for name, t in state.items()} for state in optimizer.state.values()]


@pytest.mark.parametrize("way", [(F32, F64), (F64, F32), (BF16, F64), (F64, BF16)], ids=str)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_state_follows_the_type_of_its_parameter(name, options, way, tmp_path):
    first, then = way
    params = weights(first)
    optimizer = build(name, params, **options)
    run(optimizer, params, 0, 5)
    saved = torch.load(_file(optimizer, tmp_path), weights_only=True)
    convert(params, then)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    fresh = build(name, others, **options)
    fresh.load_state_dict(saved)  # the checkpoint of the other type
    for start in (5, 6, 9):  # steps with and without a refresh
        run(optimizer, params, start, start + (3 if start == 6 else 1))
        run(fresh, others, start, start + (3 if start == 6 else 1))
        assert types(optimizer) == types(fresh)
        for a, b in zip(params, others, strict=True):
            assert torch.equal(a, b)
            assert a.isfinite().all()
    assert not torch.equal(params[0], weights(then)[0])
    for state in optimizer.state.values():
        for moment in ("exp_avg", "exp_avg_sq", "error", "limiter_norm"):
            if moment in state and state[moment].dtype in (F32, F64) and f"{moment}_scale" not in state:
                assert state[moment].dtype == (F64 if then == F64 else F32)


def _file(optimizer: lo.LowRankOptimizer, folder: Path) -> Path:
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return folder / "optimizer.pt"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("galore", {"projector": "svd"}),
        ("galore", {"rank": None}),
        ("ldadam", {"projector": "svd"}),
        ("fira", {"projector": "svd"}),
        ("apollo", {}),
        ("frugal", {"coordinates": "columns"}),
        ("frugal", {"blocks": "random"}),
    ],
    ids=str,
)
def test_a_run_that_becomes_float64_goes_on_as_one_that_always_was(name, options):
    options = {"update_proj_gap": 7, **options}
    params, always = weights(F32), weights(F64)
    converted, reference = build(name, params, **options), build(name, always, **options)
    run(converted, params, 0, 5)
    run(reference, always, 0, 5)
    convert(params, F64)
    run(converted, params, 5, 10)
    run(reference, always, 5, 10)
    for a, b in zip(params, always, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=2e-5)
    restarted = [nn.Parameter(p.detach().clone()) for p in weights(F64)]
    again = build(name, restarted, **options)
    run(again, restarted, 0, 5)
    again = build(name, restarted, **options)  # what a lost state would give
    run(again, restarted, 5, 10)
    assert (restarted[0] - always[0]).abs().max() > 1e-3


def blocks(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(3)]).to(BF16).to(dtype)


def go(model: nn.Sequential, optimizer: lo.LowRankOptimizer, start: int, stop: int) -> None:
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            if param.requires_grad:
                param.grad = torch.randn(param.shape, generator=generator).to(BF16).to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize(("first", "then"), [(F32, F64), (F64, F32), (BF16, F32), (F32, BF16)], ids=str)
@pytest.mark.parametrize(
    ("kind", "options"),
    [(lo.LISAAdamW, {"sleeping_state": "cpu"}), (lo.BAdamW, {"master_weights": True, "order": "ascending"})],
    ids=["lisa", "badam"],
)
def test_state_of_layers_that_sleep_and_master_weights_follow(kind, options, first, then):
    options = {"lr": 1e-2, "period": 2, **options}
    if kind is lo.LISAAdamW:
        options["active_layers"] = 1
    model = blocks(first)
    optimizer = kind(lo.layer_groups(model), **options)
    go(model, optimizer, 0, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    model.to(then)
    go(model, optimizer, 5, 11)
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state.get(param, {})
            masters = group["layer"] is not None and kind is lo.BAdamW and then == BF16
            assert not state or ("master" in state) == masters
            for name in state.keys() - {"step"}:
                assert state[name].dtype == (F64 if then == F64 else F32)
    assert all(p.isfinite().all() for p in model.parameters())
    if {first, then} != {F32, F64}:
        return
    other = blocks(first)
    before = kind(lo.layer_groups(other), **options)
    go(other, before, 0, 5)
    other.to(then)
    before.release()
    resumed = kind(lo.layer_groups(other), **options)
    resumed.load_state_dict(saved)
    go(other, resumed, 5, 11)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "options"), [("galore", {}), ("galore", {"rank": None}), ("frugal_sgd", {"rank": 8})])
def test_sums_of_micro_batches_follow(name, options):
    params, always = weights(F32), weights(F64)
    optimizers = [build(name, tensors, **{"lr": 1e-3, **options}) for tensors in (params, always)]
    for optimizer in optimizers:
        lo.update_in_backward(optimizer, accumulate=2)

    def batch(seed: int) -> None:
        for tensors in (params, always):
            grads = [draw(seed + i, *p.shape).to(BF16).to(p.dtype) for i, p in enumerate(tensors)]
            sum((p * grad).sum() for p, grad in zip(tensors, grads, strict=True)).backward()

    for step in range(4):
        batch(200 * step)
        if step == 2:
            convert(params, F64)
        batch(200 * step + 100)
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(params, always, strict=True):
        assert a.dtype == F64
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=2e-5)
    assert not torch.equal(params[0], weights(F64)[0])


def test_a_type_that_an_option_cannot_do_is_refused_before_anything_changes():
    params = weights(BF16)
    optimizer = build("galore", params, stochastic_rounding=True)
    run(optimizer, params, 0, 2)
    convert(params[2:], F16)
    state = [t.clone() for s in optimizer.state.values() for t in s.values()]
    with pytest.raises(
        ValueError, match=r"parameter 0\.2 \(3, 48, 32\) is float16; stochastic rounding is for bfloat16"
    ):
        run(optimizer, params, 2, 3)
    for a, b in zip(state, (t for s in optimizer.state.values() for t in s.values()), strict=True):
        assert torch.equal(a, b)


def test_moments_in_few_bits_load_into_no_plain_ones_of_another_type():
    params, others = weights(F64), weights(F32)
    saved = build("galore", params, state_bits=16).state_dict()
    optimizer = build("galore", others)
    before = types(optimizer)
    with pytest.raises(ValueError, match="state_bits is 16 in the checkpoint, 32 here"):
        optimizer.load_state_dict(saved)
    assert types(optimizer) == before
