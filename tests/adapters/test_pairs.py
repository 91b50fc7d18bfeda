"""Pairs of adapters: every method beside its transcription on uneven shapes, and what each has to keep whatever the numbers are."""

import copy
import io
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo
from lowrank_optim import kernels, rules
from lowrank_optim.rules import small_matrices
from tests.oracles import pairs as oracle

SHAPES = [(48, 20, 4), (12, 37, 3), (16, 16, 16), (30, 6, 6), (9, 40, 1)]
"""m, n, r: tall, wide, square with r = m = n, r = n, rank one."""

METHODS: dict[str, Callable[..., lo.LoRAOptimizer]] = {
    "rite": lambda groups, **o: lo.LoRARiteAdamW(groups, **{"weight_decay": 0.0, "lr": 0.01, **o}),
    "rite, escape": lambda groups, **o: lo.LoRARiteAdamW(
        groups, **{"escape": True, "weight_decay": 0.0, "lr": 0.01, **o}
    ),
    "altlora": lambda groups, **o: lo.AltLoRA(groups, **{"lr": 0.05, **o}),
    "altlora+": lambda groups, **o: lo.AltLoRA(groups, **{"lr": 0.01, "second_moment": True, **o}),
    "pro": lambda groups, **o: lo.LoRAProAdamW(groups, **{"moments": "none", "lr": 0.05, **o}),
    "pro, factors": lambda groups, **o: lo.LoRAProAdamW(groups, **{"moments": "factors", "lr": 0.01, **o}),
    "pro, full": lambda groups, **o: lo.LoRAProAdamW(groups, **{"moments": "full", "lr": 0.01, **o}),
    "riemannian": lambda groups, **o: lo.RiemannianAdamW(groups, **{"weight_decay": 0.0, "lr": 0.01, **o}),
    "adamw": lambda groups, **o: lo.LoRAOptimizer(groups, **{"weight_decay": 0.0, "lr": 0.01, **o}),
}


RULES = {"rite": rules.Rite, "altlora": rules.AlternatingLoRA}
"""Rules that step plain factors in one operation."""


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def new_pair(m: int, n: int, r: int, dtype: torch.dtype = torch.float64, zero: bool = False) -> tuple[Tensor, Tensor]:
    """Random numbers around the identity: square factors are far from singular."""
    b = 0.2 * drawn(m, r, seed=2) + torch.eye(m, r, dtype=torch.float64)
    a = 0.2 * drawn(r, n, seed=1) + torch.eye(r, n, dtype=torch.float64)
    return nn.Parameter(a.to(dtype)), nn.Parameter((0.0 * b if zero else b).to(dtype))


def loss_of(a: Tensor, b: Tensor, s: float, step: int = 0) -> Tensor:
    """½‖sBA − T‖² with T that changes from step to step."""
    m, n = b.shape[0], a.shape[-1]
    target = drawn(m, n, seed=3) + 0.3 * drawn(m, n, seed=100 + step)
    return 0.5 * (s * b @ a - target.to(b.dtype)).square().sum() / m


def train(
    optimizer: torch.optim.Optimizer, pairs: Sequence[tuple[Tensor, Tensor, float]], steps: range, size: float = 1.0
) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = size * sum(loss_of(a, b, s, step) for a, b, s in pairs)
        losses.append(float(loss.detach()) / size)
        loss.backward()
        optimizer.step()
    return losses


def matrix_gradient(a: Tensor, b: Tensor, s: float, step: int) -> Tensor:
    m, n = b.shape[0], a.shape[1]
    return (s * b @ a - drawn(m, n, seed=3) - 0.3 * drawn(m, n, seed=100 + step)) / m


def factor_gradients(s: float) -> oracle.Gradients:
    """(g_A, g_B) at steps 0, 1, …, one for each call."""
    step = -1

    def gradients(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal step
        step += 1
        grad = matrix_gradient(a, b, s, step)
        return s * b.mT @ grad, s * grad @ a.mT

    return gradients


def test_caution_masks_what_is_applied_and_leaves_the_momentum_alone():
    ends = []
    for cautious in (False, True):
        a, b = new_pair(24, 17, 4)
        optimizer = lo.AltLoRA(lo.lora_pairs([(a, b, 2.0)]), lr=0.05, cautious=cautious)
        train(optimizer, [(a, b, 2.0)], range(1))
        ends.append((optimizer.state[b]["exp_avg"], b))
    assert torch.equal(ends[0][0], ends[1][0])
    assert not torch.equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize("name", ["rite", "altlora"])
def test_copies_of_the_factors_and_the_numbers_of_the_step_tell_the_same_change_of_basis(name: str, monkeypatch):
    """A step in one operation, one with directions, and one with copies of the factors, which a threshold of almost 0 asks for."""
    ends = []
    for written, l1 in ((True, 0.0), (False, 0.0), (False, 1e-300)):
        pair = (*new_pair(24, 17, 4), 2.0)
        if not written:
            monkeypatch.setattr(RULES[name], "writes", lambda *_: False)
        optimizer = METHODS[name]([{**lo.lora_pairs([pair])[0], "l1": l1}], weight_decay=0.3)
        train(optimizer, [pair], range(4))
        ends.append([p.detach() for p in pair[:2]] + [optimizer.state[p]["exp_avg"] for p in pair[:2]])
    for one, other, third in zip(*ends, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)
        assert torch.allclose(one, third, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", [(200, 131, 16), (70, 4100, 5)])
def test_float32_factors_follow_the_path_of_float64(name: str, shape: tuple[int, int, int]):
    """The operations of the library beside their definitions, over steps that turn the momentum."""
    ends = []
    for dtype in (torch.float32, torch.float64):
        pair = (*new_pair(*shape, dtype), 2.0)
        begin = [p.detach().double().clone() for p in pair[:2]]
        optimizer = METHODS[name](lo.lora_pairs([pair]))
        for step in range(4):
            for number, p in enumerate(pair[:2]):
                p.grad = drawn(*p.shape, seed=10 * step + number, dtype=dtype)
            optimizer.step()
        ends.append([p.detach().double() - old for p, old in zip(pair[:2], begin, strict=True)])
    for got, want in zip(*ends, strict=True):
        assert want.abs().max() > 1e-4
        assert torch.allclose(got, want, rtol=0.0, atol=5e-7)


@pytest.mark.parametrize("name", RULES)
def test_a_step_in_one_operation_marks_its_factors_as_changed(name: str):
    """Autograd must notice: a product that was computed before the step has no gradient after it."""
    a, b = new_pair(24, 17, 4, torch.float32)
    optimizer = METHODS[name](lo.lora_pairs([(a, b, 1.0)]))
    for _ in range(2):  # both have had their turn then
        saved = (b @ a).sum()
        a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.backward()


def float32_run(steps: int, reload_at: int | None = None) -> tuple[list[Tensor], lo.LoRARiteAdamW]:
    """Pairs that take more than one tile, and not whole ones, of which nothing is known any more after `reload_at` steps."""
    made = [(*new_pair(m, n, 16, torch.float32), 2.0) for m, n in ((200, 131), (64, 2200), (70, 300))]
    optimizer = lo.LoRARiteAdamW(lo.lora_pairs(made), lr=1e-3)
    params = [p for pair in made for p in pair[:2]]
    for step in range(steps):
        if step == reload_at:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for number, p in enumerate(params):
            p.grad = drawn(*p.shape, seed=10 * step + number, dtype=torch.float32)
        optimizer.step()
    return params, optimizer


def test_what_rite_knows_of_its_own_weights_changes_no_bit():
    """K^(−1/2) that a step has left behind is that of the weights, however they were summed."""
    whole, optimizer = float32_run(5)
    again, other = float32_run(5, reload_at=3)
    for one, two in zip(whole, again, strict=True):
        assert torch.equal(one, two)
        for name, tensor in optimizer.state[one].items():
            assert torch.equal(tensor, other.state[two][name])


@pytest.mark.skipif(isinstance(kernels.backends()["cpu"], kernels.Unavailable), reason="the library is not built")
@pytest.mark.parametrize("through_data", [True, False])
def test_rite_sees_weights_that_others_have_written_and_goes_on_from_those(through_data: bool):
    """A write to .data leaves no trace in autograd's counters."""
    ends = []
    for forgets in (False, True):
        params, optimizer = float32_run(3)
        with torch.no_grad():
            (params[3].data if through_data else params[3])[5, 7] += 0.5
        if forgets:
            for plan in optimizer.plans.values():
                plan.memo.clear()
        for number, p in enumerate(params):
            p.grad = drawn(*p.shape, seed=number, dtype=torch.float32)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            optimizer.step()
            optimizer.step()
        assert [str(each.message)[:28] for each in said] == ([] if forgets else ["factors of LoRARiteAdamW are"])
        ends.append(params)
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))


EDITS = {
    "one factor doubled, the other halved": lambda a, b: (a.mul_(2.0), b.mul_(0.5)),
    "the sign of a component": lambda a, b: (a[3].neg_(), b[:, 3].neg_()),
    "all signs": lambda a, b: (a.neg_(), b.neg_()),
    "two rows exchanged": lambda a, b: a.copy_(a[[1, 0, *range(2, len(a))]]),
}


@pytest.mark.skipif(isinstance(kernels.backends()["cpu"], kernels.Unavailable), reason="the library is not built")
@pytest.mark.parametrize("edit", EDITS)
def test_rite_sees_edits_of_whole_factors_whose_bits_could_cancel(edit: str):
    """Signs and exponents of all elements, in sizes that are powers of two."""
    ends = []
    for forgets in (False, True):
        pair = new_pair(1024, 1024, 16, torch.float32)
        optimizer = lo.LoRARiteAdamW(lo.lora_pairs([(*pair, 2.0)]), lr=1e-3)
        for step in range(4):
            if step == 2:
                with torch.no_grad():
                    EDITS[edit](*pair)
                if forgets:
                    optimizer.plans[pair[0]].memo.clear()
            for number, p in enumerate(pair):
                p.grad = drawn(*p.shape, seed=10 * step + number, dtype=torch.float32)
            said = pytest.warns(RuntimeWarning, match="are others than") if step == 2 and not forgets else nullcontext()
            with said:
                optimizer.step()
        ends.append(pair)
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))


@pytest.mark.skipif(isinstance(kernels.backends()["cpu"], kernels.Unavailable), reason="the library is not built")
def test_rite_takes_pairs_that_step_now_and_then_for_what_they_are():
    """What is known of a pair goes with it, whichever others step beside it: nobody has written these weights."""
    ends = []
    for forgets in (False, True):
        pairs = [(*new_pair(40, 30, 4, torch.float32), 1.0) for _ in range(3)]
        optimizer = lo.LoRARiteAdamW(lo.lora_pairs(pairs), lr=1e-3)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for step, left_out in enumerate([0, None, 0, 2, None, 1, None]):
                for number, (a, b, _) in enumerate(pairs):
                    for k, p in enumerate((a, b)):
                        grad = drawn(*p.shape, seed=100 * step + 2 * number + k, dtype=torch.float32)
                        p.grad = None if number == left_out else grad
                if forgets:
                    for plan in optimizer.plans.values():
                        plan.memo.clear()
                optimizer.step()
        assert said == []
        ends.append([p for pair in pairs for p in pair[:2]])
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))


# -------------------------------------------------------------------------------------------------------- beside the papers


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
@pytest.mark.parametrize("escape", [False, True])
def test_rite_with_moments_turned_at_the_end_is_rite_with_stored_bases(m: int, n: int, r: int, escape: bool):
    a, b = new_pair(m, n, r)
    before = a.detach().clone(), b.detach().clone()
    optimizer = lo.LoRARiteAdamW(lo.lora_pairs([(a, b, 0.7)]), lr=0.01, weight_decay=0.1, escape=escape)
    train(optimizer, [(a, b, 0.7)], range(8))
    want = oracle.rite(*before, factor_gradients(0.7), 8, 0.01, escape=escape, decay=0.1)
    for got, expected in zip((a, b), want, strict=True):
        assert torch.allclose(got, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
@pytest.mark.parametrize("plus", [False, True])
def test_altlora_that_carries_momentum_along_is_altlora_with_stored_factors(m: int, n: int, r: int, plus: bool):
    a, b = new_pair(m, n, r)
    before = a.detach().clone(), b.detach().clone()
    optimizer = lo.AltLoRA(lo.lora_pairs([(a, b, 0.7)]), lr=0.05, second_moment=plus)
    train(optimizer, [(a, b, 0.7)], range(7))
    want = oracle.altlora(*before, factor_gradients(0.7), 7, 0.05, 0.7, plus=plus)
    for got, expected in zip((a, b), want, strict=True):
        assert torch.allclose(got, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("m", "n", "r"), [(12, 9, 3), (7, 13, 2), (5, 5, 5)])
@pytest.mark.parametrize("full", [False, True])
def test_lora_pro_is_the_least_squares_solution_nearest_to_the_gradients(m: int, n: int, r: int, full: bool):
    a, b = new_pair(m, n, r)
    before = a.detach().clone(), b.detach().clone()
    optimizer = lo.LoRAProAdamW(lo.lora_pairs([(a, b, 1.7)]), lr=0.01, moments="full" if full else "none")
    train(optimizer, [(a, b, 1.7)], range(4))
    step = iter(range(4))
    want = oracle.lora_pro(*before, lambda a, b: matrix_gradient(a, b, 1.7, next(step)), 4, 0.01, 1.7, full)
    for got, expected in zip((a, b), want, strict=True):
        assert torch.allclose(got, expected, rtol=1e-7, atol=1e-9)


def test_the_riemannian_damping_is_relative_to_the_mean_eigenvalue():
    a, b = new_pair(20, 14, 4)
    optimizer = lo.LoRAOptimizer(
        lo.lora_pairs([(a, b, 2.0)]), rules.Riemannian(moments="none", damping=0.05), lr=0.1, weight_decay=0.0
    )
    before = a.detach().clone(), b.detach().clone()
    loss_of(a, b, 2.0).backward()
    optimizer.step()
    for gram, grad, old, new in (
        (before[1].mT @ before[1], a.grad.mT, before[0].mT, a.mT),
        (before[0] @ before[0].mT, b.grad, before[1], b),
    ):
        damped = gram + 0.05 * gram.trace() / 4 * torch.eye(4, dtype=gram.dtype)
        assert torch.allclose(new, old - 0.1 * grad @ torch.linalg.inv(damped), rtol=1e-10)


# --------------------------------------------------------------------------------------------------------------- invariants


def product_after(name: str, turn: Tensor, steps: int = 5, **options: Any) -> Tensor:
    """sBA after some steps from (T⁻¹A, BT)."""
    a, b = new_pair(24, 17, 3)
    with torch.no_grad():
        a.copy_(torch.linalg.inv(turn) @ a), b.copy_(b @ turn)
    optimizer = METHODS[name](lo.lora_pairs([(a, b, 0.7)]), **options)
    train(optimizer, [(a, b, 0.7)], range(steps))
    return 0.7 * (b @ a).detach()


TURN = torch.tensor([[1.5, 0.4, 0.0], [-0.3, 0.7, 0.2], [0.1, -0.5, 2.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "options"), [("rite", {"eps": 0.0}), ("rite, escape", {"eps": 0.0}), ("altlora", {})], ids=lambda x: str(x)
)
def test_the_product_does_not_depend_on_the_choice_of_the_factors(name: str, options: dict[str, Any]):
    plain, turned = (product_after(name, turn, **options) for turn in (torch.eye(3, dtype=torch.float64), TURN))
    assert torch.allclose(plain, turned, rtol=0, atol=1e-12)


def test_the_undamped_riemannian_descent_does_not_depend_on_it_in_its_first_order_and_adam_does():
    eye = torch.eye(3, dtype=torch.float64)
    plain, turned = (product_after("riemannian", turn) for turn in (eye, TURN))
    assert not torch.allclose(plain, turned, rtol=0, atol=1e-3)  # so that the test above says something
    ends = []
    for turn in (eye, TURN):
        a, b = new_pair(24, 17, 3)
        with torch.no_grad():
            a.copy_(torch.linalg.inv(turn) @ a), b.copy_(b @ turn)
        rule = rules.Riemannian(moments="none", damping=0.0)
        optimizer = lo.LoRAOptimizer(lo.lora_pairs([(a, b, 0.7)]), rule, lr=0.02, weight_decay=0.0)
        train(optimizer, [(a, b, 0.7)], range(4))
        ends.append((b @ a).detach())
    assert torch.allclose(*ends, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("zero", [False, True])
def test_gradients_of_rank_one_move_the_pair_and_stay_finite(name: str, zero: bool):
    a, b = new_pair(24, 17, 4, torch.float32, zero)
    optimizer = METHODS[name](lo.lora_pairs([(a, b, 2.0)]))
    before = (b @ a).detach().clone()
    left, right = drawn(24, 1, seed=8, dtype=torch.float32), drawn(1, 17, seed=9, dtype=torch.float32)
    for _ in range(4):
        optimizer.zero_grad()
        (2.0 * b @ a * (left @ right)).sum().backward()
        optimizer.step()
    moved = (b @ a).detach() - before
    assert torch.isfinite(moved).all()
    assert float((moved * (left @ right)).sum()) < -1e-3
    for state in optimizer.state.values():
        assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_the_first_step_of_rite_has_the_size_of_the_root_of_its_rows_whatever_the_gradient():
    """ΔB = −η √m · polar(U_B) R_A^{−T}, with R_A = (AAᵀ)^{1/2}."""
    for size in (1.0, 1e4, 1e-4):
        a, b = new_pair(24, 17, 4, zero=True)
        optimizer = lo.LoRARiteAdamW(lo.lora_pairs([(a, b, 2.0)]), lr=0.1, eps=0.0, weight_decay=0.0)
        train(optimizer, [(a, b, 2.0)], range(1), size)
        values, vectors = torch.linalg.eigh((a @ a.mT).detach())
        root = vectors @ torch.diag(values.sqrt()) @ vectors.mT
        scaled = (b.detach() @ root) / (0.1 * 24**0.5)  # has orthonormal columns
        assert torch.allclose(scaled.mT @ scaled, torch.eye(4, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_the_path_of_rite_does_not_depend_on_the_scale_of_gradients(size: float):
    ends = []
    for factor in (1.0, size):
        a, b = new_pair(24, 17, 4)
        optimizer = lo.LoRARiteAdamW(lo.lora_pairs([(a, b, 0.7)]), lr=0.02, eps=0.0, weight_decay=0.0)
        train(optimizer, [(a, b, 0.7)], range(5), factor)
        ends.append((b @ a).detach())
    assert torch.allclose(*ends, rtol=1e-9)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("on_device", [False, True])
def test_a_gradient_that_is_not_finite_leaves_both_factors_as_they_are(name: str, on_device: bool):
    a, b = new_pair(24, 17, 4, torch.float32)
    optimizer = METHODS[name](lo.lora_pairs([(a, b, 2.0)]))
    optimizer._mask_on_device = on_device
    train(optimizer, [(a, b, 2.0)], range(2))
    before = [tensor.detach().clone() for tensor in (a, b)]
    states = copy.deepcopy([optimizer.state.get(p, {}) for p in (a, b)])
    optimizer.zero_grad()
    loss_of(a, b, 2.0).backward()
    a.grad[1, 2] = torch.nan
    if on_device:
        optimizer.step()
    else:
        with pytest.warns(RuntimeWarning, match="skipped the update"):
            optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, (a, b), strict=True))
    for old, p in zip(states, (a, b), strict=True):
        now = optimizer.state.get(p, {})
        assert all(torch.equal(old[name], now[name]) for name in old if name != "step")


@pytest.mark.parametrize("name", METHODS)
def test_many_pairs_in_any_order_are_stepped_as_one_alone(name: str):
    """Pairs of two ranks and three types of shape: what is computed together is not mixed up."""
    shapes = [(20, 9, 2), (8, 30, 4), (20, 9, 2), (11, 11, 4)]
    together = [(*new_pair(*shape), 0.5 + number) for number, shape in enumerate(shapes)]
    apart = copy.deepcopy(together)
    turned = copy.deepcopy(together)
    train(METHODS[name](lo.lora_pairs(together)), together, range(3))
    for pair in apart:
        train(METHODS[name](lo.lora_pairs([pair])), [pair], range(3))
    train(METHODS[name](lo.lora_pairs(turned[::-1])), turned, range(3))
    for one, other, third in zip(together, apart, turned, strict=True):
        for number in (0, 1):
            assert torch.allclose(one[number], other[number], rtol=1e-10, atol=1e-13)
            assert torch.allclose(one[number], third[number], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_factors_have_float32_state_and_learn(name: str):
    a, b = new_pair(24, 17, 4, torch.bfloat16)
    optimizer = METHODS[name](lo.lora_pairs([(a, b, 1.0)]))
    losses = train(optimizer, [(a, b, 1.0)], range(12))
    assert losses[-1] < losses[0]
    for state in optimizer.state.values():
        assert all(tensor.dtype == torch.float32 for tensor in state.values())


def test_schedulers_and_the_ratio_of_rates_act_on_every_method():
    for name, make in METHODS.items():
        ends = []
        for factor in (1.0, 0.5):
            a, b = new_pair(24, 17, 4)
            optimizer = make(lo.lora_pairs([(a, b, 0.7)], lr_ratio=2.0))
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _, factor=factor: factor)
            before = a.detach().clone(), b.detach().clone()
            train(optimizer, [(a, b, 0.7)], range(1))
            scheduler.step()
            ends.append([float((new - old).detach().norm()) for new, old in zip((a, b), before, strict=True)])
        assert ends[1][1] == pytest.approx(0.5 * ends[0][1], rel=1e-9), name
        single = new_pair(24, 17, 4)
        before = single[1].detach().clone()
        train(make(lo.lora_pairs([(*single, 0.7)])), [(*single, 0.7)], range(1))
        assert float((single[1] - before).detach().norm()) == pytest.approx(0.5 * ends[0][1], rel=1e-9), name


# -------------------------------------------------------------------------------------------------------- one factor frozen


@pytest.mark.parametrize("which", ["A", "B"])
@pytest.mark.parametrize("name", ["pro", "pro, factors", "altlora", "adamw", "riemannian"])
def test_beside_a_frozen_factor_the_other_is_stepped_alone(name: str, which: str):
    a, b = new_pair(24, 17, 4)
    s = 0.7
    (frozen, own) = (a, b) if which == "A" else (b, a)
    optimizer = METHODS[name](lo.lora_pairs([(a, b, s)], freeze=which), lr=0.05)
    before, kept = own.detach().clone(), frozen.detach().clone()
    loss_of(a, b, s).backward()
    optimizer.step()
    assert torch.equal(frozen, kept)
    assert not optimizer.state.get(frozen)
    if name == "pro":
        inverse = torch.linalg.inv(kept @ kept.mT if which == "A" else kept.mT @ kept)
        change = own.grad @ inverse / s**2 if which == "A" else inverse @ own.grad / s**2
        assert torch.allclose(own, before - 0.05 * change, rtol=1e-9)
    assert not torch.equal(own, before)


def test_lora_fa_is_adam_on_the_projected_gradient_and_saves_in_backward_too():
    plain, hooked = new_pair(24, 17, 4), new_pair(24, 17, 4)
    first = METHODS["pro, factors"](lo.lora_pairs([(*plain, 0.7)], freeze="A"))
    second = METHODS["pro, factors"](lo.lora_pairs([(*hooked, 0.7)], freeze="A"))
    lo.update_in_backward(second)
    train(first, [(*plain, 0.7)], range(3))
    train(second, [(*hooked, 0.7)], range(3))
    assert torch.equal(plain[1], hooked[1])
    assert lo.state_bytes(first) == {"exp_avg": 8 * 24 * 4, "exp_avg_sq": 8 * 24 * 4, "step": 4}


def test_rite_needs_both_factors():
    a, b = new_pair(24, 17, 4)
    with pytest.raises(
        ValueError, match=r"trains both factors of a pair, and of 0\.0 and 0\.1 one does not require a gradient"
    ):
        METHODS["rite"](lo.lora_pairs([(a, b, 0.7)], freeze="A"))
    b.requires_grad_(False)
    with pytest.raises(ValueError, match="keeps its moments with B"):
        METHODS["pro, full"](lo.lora_pairs([(*new_pair(24, 17, 4), 0.7)], freeze="B"))


# --------------------------------------------------------------------------------------------------------- state and resume


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("rite", lambda m, n, r: 4 * r * (m + n) + 8 * r * r),
        ("altlora", lambda m, n, r: 4 * r * (m + n)),
        ("altlora+", lambda m, n, r: 8 * r * (m + n)),
        ("pro", lambda m, n, r: 0),
        ("pro, factors", lambda m, n, r: 8 * r * (m + n)),
        ("pro, full", lambda m, n, r: 8 * m * n),
        ("riemannian", lambda m, n, r: 8 * r * (m + n)),
        ("adamw", lambda m, n, r: 8 * r * (m + n)),
    ],
)
def test_state_has_the_bytes_that_the_docstring_says(name: str, size: Callable[[int, int, int], int]):
    optimizer = METHODS[name](lo.lora_pairs([(*new_pair(24, 17, 4, torch.float32), 1.0)]))
    held = lo.state_bytes(optimizer)
    assert held.pop("step") == 8
    assert sum(held.values()) == size(24, 17, 4)


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_has_the_bits_of_an_undisturbed_one_in_another_order_too(name: str):
    def build(pairs: Sequence[tuple[Tensor, Tensor, float]], order: Sequence[int]) -> lo.LoRAOptimizer:
        (group,) = lo.lora_pairs([pairs[i] for i in order])
        group["param_names"] = [f"{i}.{factor}" for i in order for factor in "AB"]
        return METHODS[name]([group])

    pairs = [(*new_pair(20, 9, 2, torch.float32), 0.5), (*new_pair(8, 30, 4, torch.float32), 1.5)]
    optimizer = build(pairs, (0, 1))
    train(optimizer, pairs, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    resumed = copy.deepcopy(pairs)
    train(optimizer, pairs, range(3, 6))
    again = build(resumed, (1, 0))
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again.param_groups[0]["scalings"] == [1.5, 0.5]
    train(again, resumed, range(3, 6))
    for one, other in zip(pairs, resumed, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one[:2], other[:2], strict=True))


def test_moments_of_another_kind_begin_afresh():
    a, b = new_pair(24, 17, 4, torch.float32)
    optimizer = METHODS["pro"](lo.lora_pairs([(a, b, 1.0)]))
    train(optimizer, [(a, b, 1.0)], range(2))
    optimizer.change_group(0, moments="full")
    assert optimizer.state[b]["exp_avg"].shape == (24, 17)
    train(optimizer, [(a, b, 1.0)], range(2))


# ------------------------------------------------------------------------------------------------------------ small matrices


def test_small_matrices_of_low_rank_and_of_nan():
    factor = drawn(9, 2, seed=1) @ drawn(2, 4, seed=2)
    gram = (factor.mT @ factor)[None]
    eps = torch.finfo(torch.float64).eps
    inverse = small_matrices.pseudo_inverse(gram, eps)
    assert torch.allclose(inverse[0], torch.linalg.pinv(gram[0], hermitian=True, rtol=1e-12), atol=1e-9)
    root = small_matrices.pseudo_inverse_root(gram, eps)
    assert torch.allclose(root @ root, inverse, atol=1e-9)
    for function in (small_matrices.pseudo_inverse, small_matrices.pseudo_inverse_root):
        assert torch.equal(function(torch.full((1, 3, 3), torch.nan), eps), torch.zeros(1, 3, 3, dtype=torch.float64))
        assert torch.equal(function(torch.zeros(1, 3, 3), eps), torch.zeros(1, 3, 3, dtype=torch.float64))
    other = (drawn(7, 4, seed=3).mT @ drawn(7, 4, seed=3))[None]
    solution = small_matrices.sylvester(gram, other, drawn(1, 4, 4, seed=4), eps)
    assert torch.allclose(gram @ solution + solution @ other, drawn(1, 4, 4, seed=4))
