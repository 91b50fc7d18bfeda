"""FRUGAL against a float64 transcription of its equation, and its random choices against what they have to be.

    W ← (1 − ηλ) W − η a (lift(N) + κ f(G − lift R)),    R = project(G),  N = rule(R),  f = sign, identity or 0

The subspace is a set of entries (columns, rows, single entries, whole tensors) or the leading singular vectors. Random choices are
read from the optimizer's state and given to the transcription; tests of their own say that the choices are right.

Gradients are prescribed, so that errors do not feed back. Weights are small: what is compared is their change, which float32 holds
only to the precision of the weights.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import lowrank_optim as lo
from tests.oracles.checkpoints import assert_same_run, resume

Array = NDArray[np.float64]

GAP, STEPS, LR, DECAY = 7, 30, 1e-2, 0.3
SCALE, KAPPA, DENSITY = 0.7, 0.4, 0.3
BETAS, EPS, MOMENTUM = (0.8, 0.95), 1e-3, 0.8
SHAPES = {"tall": (40, 24), "wide": (24, 40), "square": (32, 32)}
BLOCK_SHAPES = ((24, 16), (16, 24), (12, 12), (20, 16), (9, 30), (16, 20))
SPACES: dict[str, dict[str, str]] = {
    "svd": {"projector": "svd"},
    "columns": {"coordinates": "columns"},
    "rows": {"coordinates": "rows"},
    "entries": {"coordinates": "entries"},
    "blocks": {"blocks": "descending"},
}
ORDERS = ("random", "ascending", "descending", "mirror")
RULES = ("adamw", "lion", "sgd")
RESIDUALS = ("sign", "sgd", "none")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_coordinate = pytest.mark.parametrize("coordinates", ["columns", "rows", "entries"])
both_precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])


# --- the transcription -------------------------------------------------------------------------------------------------------


@dataclass
class Rule:
    """N from R, with moments that begin at 0.

    `margin` is how close to 0 a rounded number came whose sign was taken, beside what it is made of.
    """

    name: str
    margin: float = math.inf
    t: int = 0
    m: Array | float = 0.0
    v: Array | float = 0.0

    def direction(self, r: Array) -> Array:
        self.t += 1
        if self.name == "sgd":
            self.m = MOMENTUM * self.m + r
            return self.m
        beta1, beta2 = BETAS
        if self.name == "lion":
            old, new = beta1 * self.m, (1 - beta1) * r
            mixed, size = old + new, np.abs(old) + np.abs(new)
            self.margin = min(self.margin, (np.abs(mixed)[size > 0] / size[size > 0]).min(initial=1.0))
            n = np.sign(mixed)
            self.m = beta2 * self.m + (1 - beta2) * r
            return n
        self.m = beta1 * self.m + (1 - beta1) * r
        self.v = beta2 * self.v + (1 - beta2) * r**2
        return (self.m / (1 - beta1**self.t)) / (np.sqrt(self.v / (1 - beta2**self.t)) + EPS)


@dataclass
class Frugal:
    """FRUGAL on one matrix.

    The subspace is `mask`, true for the entries in it, or `left`, `right`, bases of one side each (None: that side is whole).
    `margin` is how close to 0 a rounded number came whose sign was taken, as in `Rule`.
    """

    weight: Array
    rule: str
    residual: str
    lr: float = LR
    weight_decay: float = DECAY
    scale: float = SCALE
    kappa: float = KAPPA
    mask: Array | None = None
    left: Array | None = None
    right: Array | None = None
    moments: Rule = field(init=False)
    margin: float = math.inf

    def refresh(self, mask: Array | None = None, left: Array | None = None, right: Array | None = None) -> None:
        self.mask, self.left, self.right, self.moments = mask, left, right, Rule(self.rule)

    def project(self, g: Array) -> Array:
        if self.mask is not None:
            return np.where(self.mask, g, 0.0)
        return g @ self.right if self.right is not None else self.left.T @ g

    def lift(self, r: Array) -> Array:
        if self.mask is not None:
            return np.where(self.mask, r, 0.0)
        return r @ self.right.T if self.right is not None else self.left @ r

    def step(self, g: Array) -> None:
        r = self.project(g)
        outside = g - self.lift(r)
        if self.residual == "sign":
            if self.mask is None:  # else `outside` is G, to the bit
                self.margin = min(self.margin, np.abs(outside).min() / np.abs(g).max())
            outside = np.sign(outside)
        if self.residual == "none":
            outside = np.zeros_like(outside)
        update = self.lift(self.moments.direction(r)) + self.kappa * outside
        self.margin = min(self.margin, self.moments.margin)
        self.weight = (1 - self.lr * self.weight_decay) * self.weight - self.lr * self.scale * update


def chosen(state: dict[str, Tensor], space: str, shape: tuple[int, ...], grad: Array) -> dict[str, Array]:
    """The subspace after a refresh: random choices from the optimizer's state, singular vectors from the gradient."""
    if space == "svd":
        u, _, vt = np.linalg.svd(grad, full_matrices=False)
        rank = round(DENSITY * min(shape))
        return {"right": vt[:rank].T} if shape[0] >= shape[1] else {"left": u[:, :rank]}
    mask = np.zeros(shape, dtype=bool)
    if space == "blocks":
        mask[:] = state["exp_avg"].numel() > 0
        return {"mask": mask}
    indices = state["indices"].long().numpy()
    {"columns": mask.T, "rows": mask, "entries": mask.reshape(-1)}[space][indices] = True
    return {"mask": mask}


def gradients(shape: tuple[int, ...], dtype: torch.dtype, steps: int = STEPS, seed: int = 0) -> list[Tensor]:
    """Gradients with a clear spectrum, singular vectors that wander, and a size that changes."""
    rng = np.random.default_rng(seed)
    short = min(shape)
    u, v = (np.linalg.qr(rng.normal(size=(side, short)))[0] for side in shape)
    values = 1.2 ** -np.arange(short)
    out = []
    for _ in range(steps):
        u, v = (np.linalg.qr(x + 0.05 * rng.normal(size=x.shape))[0] for x in (u, v))
        out.append(torch.from_numpy(np.exp(0.5 * rng.normal()) * (u * values) @ v.T).to(dtype))
    return out


def small_weights(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.01).to(dtype)


def build(rule: str, params: Iterable[Any], **options: Any) -> lo.LowRankOptimizer:
    """One of the three presets, with options that make every term of the equation large enough to be seen."""
    options = {
        "lr": LR,
        "weight_decay": DECAY,
        "scale": SCALE,
        "residual_lr_scale": KAPPA,
        "update_proj_gap": GAP,
        "density": DENSITY,
        "stagger": False,
        **options,
    }
    if rule == "sgd":
        return lo.FrugalSGD(params, momentum=options.pop("momentum", MOMENTUM), **options)
    if rule == "lion":
        return lo.FrugalLion(params, betas=BETAS, **options)
    return lo.FrugalAdamW(params, betas=options.pop("betas", BETAS), eps=options.pop("eps", EPS), **options)


def start(optimizer: lo.LowRankOptimizer, params: list[nn.Parameter], grads: list[Tensor]) -> None:
    """Give gradients and step."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    optimizer.step()


def moment_bytes(state: dict[str, Tensor]) -> int:
    return sum(state[name].untyped_storage().nbytes() for name in ("exp_avg", "exp_avg_sq") if name in state)


# --- the equation ------------------------------------------------------------------------------------------------------------


CASES = [
    pytest.param(space, [shape], id=f"{space}-{name}")
    for space, (name, shape) in itertools.product(SPACES, SHAPES.items())
    if space != "blocks"
] + [pytest.param("blocks", list(BLOCK_SHAPES), id="blocks")]


@both_precisions
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("space", "shapes"), CASES)
def test_equals_the_transcription_over_refreshes(
    space: str, shapes: list[tuple[int, int]], rule: str, residual: str, dtype: torch.dtype
) -> None:
    begin = [small_weights(shape, dtype, seed) for seed, shape in enumerate(shapes)]
    params = [nn.Parameter(weight.clone()) for weight in begin]
    options = {} if residual == "none" else {"residual_lr_scale": KAPPA}
    optimizer = build(rule, params, residual=residual, **SPACES[space], **options)
    judges = [Frugal(weight.double().numpy(), rule, residual) for weight in begin]
    everything = [gradients(shape, dtype, seed=seed) for seed, shape in enumerate(shapes)]
    worst = 0.0
    for step in range(STEPS):
        grads = [each[step] for each in everything]
        start(optimizer, params, grads)
        for param, judge, grad in zip(params, judges, grads, strict=True):
            g = grad.double().numpy()
            if step % GAP == 0:
                judge.refresh(**chosen(optimizer.state[param], space, tuple(param.shape), g))
            judge.step(g)
            worst = max(worst, float(np.linalg.norm(param.detach().double().numpy() - judge.weight)))
    for judge, weight, param in zip(judges, begin, params, strict=True):
        change = np.linalg.norm(judge.weight - weight.double().numpy())
        assert worst < TOLERANCE[dtype] * change
        assert torch.isfinite(param).all()
        # A sign that rounding could turn would be the test's fault.
        assert judge.margin > 1e-6


@pytest.mark.parametrize("residual", ["sign", "sgd"])
@pytest.mark.parametrize("space", SPACES)
def test_the_residual_and_its_size_make_a_difference_beyond_all_tolerances(space: str, residual: str) -> None:
    ends = {}
    for kind, kappa in ((residual, KAPPA), (residual, 1.1 * KAPPA), ("none", KAPPA)):
        params = [nn.Parameter(small_weights((40, 24), torch.float64)) for _ in range(3)]
        optimizer = build("adamw", params, residual=kind, residual_lr_scale=kappa, **SPACES[space])
        for grad in gradients((40, 24), torch.float64, 5):
            start(optimizer, params, [grad] * 3)
        ends[kind, kappa] = params[0].detach()
    for a, b in itertools.combinations(ends.values(), 2):
        assert (a - b).norm() > 1e-3 * a.norm()


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("space", SPACES)
def test_bfloat16_weights_follow_the_same_arithmetic_and_are_rounded_once(space: str, residual: str) -> None:
    shapes = list(BLOCK_SHAPES) if space == "blocks" else [(40, 24)]
    begin = [torch.randn(shape, generator=torch.Generator().manual_seed(2)).bfloat16() for shape in shapes]
    params = [nn.Parameter(weight.clone()) for weight in begin]
    optimizer = build("adamw", params, residual=residual, **SPACES[space])
    judges = [Frugal(weight.double().numpy(), "adamw", residual) for weight in begin]
    everything = [gradients(shape, torch.bfloat16, 20, seed) for seed, shape in enumerate(shapes)]
    for step in range(20):
        grads = [each[step] for each in everything]
        start(optimizer, params, grads)
        for param, judge, grad in zip(params, judges, grads, strict=True):
            g = grad.double().numpy()
            if step % GAP == 0:
                judge.refresh(**chosen(optimizer.state[param], space, tuple(param.shape), g))
            judge.step(g)
            judge.weight = torch.from_numpy(judge.weight).bfloat16().double().numpy()
    differing = [
        (p.detach().double() != torch.from_numpy(j.weight)).flatten() for p, j in zip(params, judges, strict=True)
    ]
    assert float(torch.cat(differing).double().mean()) < 0.02
    assert all(
        param.dtype == torch.bfloat16 and (param != weight).any() for param, weight in zip(params, begin, strict=True)
    )
    for state in optimizer.state.values():
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32


@every_coordinate
def test_a_stack_of_experts_is_its_matrices_one_by_one_each_with_its_own_choice(coordinates: str) -> None:
    shape, experts = (20, 16), 3
    begin = small_weights((experts, *shape), torch.float64)
    param = nn.Parameter(begin.clone())
    optimizer = build("adamw", [param], coordinates=coordinates)
    judges = [Frugal(weight.numpy(), "adamw", "sign") for weight in begin]
    everything = [gradients(shape, torch.float64, 20, seed) for seed in range(experts)]
    for step in range(20):
        start(optimizer, [param], [torch.stack([each[step] for each in everything])])
        indices = optimizer.state[param]["indices"]
        assert len({tuple(row.tolist()) for row in indices}) == experts
        for judge, each, row in zip(judges, everything, indices, strict=True):
            g = each[step].numpy()
            if step % GAP == 0:
                judge.refresh(**chosen({"indices": row}, coordinates, shape, g))
            judge.step(g)
    expected = torch.stack([torch.from_numpy(judge.weight) for judge in judges])
    assert (param.detach() - expected).norm() < 1e-10 * (expected - begin).norm()


# --- the ends of the scale ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("space", [*SPACES, "random", "randomized_svd"])
def test_density_0_is_sign_sgd_with_learning_rate_a_eta_kappa(space: str, rule: str) -> None:
    options = SPACES.get(space, {"projector": space})
    begin = small_weights((24, 40), torch.float64)
    params = [nn.Parameter(begin.clone()) for _ in range(2)]
    optimizer = build(rule, params, density=0, residual="sign", **options)
    expected = begin.clone()
    for grad in gradients((24, 40), torch.float64, 2 * GAP + 1):
        start(optimizer, params, [grad, grad])
        expected = (1 - LR * DECAY) * expected - SCALE * LR * KAPPA * grad.sign()
    for param in params:
        torch.testing.assert_close(param.detach(), expected, rtol=1e-13, atol=1e-15)
        assert moment_bytes(optimizer.state[param]) == 0


@both_precisions
@pytest.mark.parametrize("space", ["columns", "rows", "entries", "blocks"])
def test_density_1_that_is_never_refreshed_is_torch_adamw(space: str, dtype: torch.dtype) -> None:
    begin = small_weights((40, 24), dtype)
    ours, theirs = [nn.Parameter(begin.clone()) for _ in range(2)], nn.Parameter(begin.clone())
    common = {"lr": 1e-2, "betas": BETAS, "eps": 1e-6, "weight_decay": DECAY}
    optimizer = lo.FrugalAdamW(ours, density=1, update_proj_gap=10**9, **common, **SPACES[space])
    torch_adamw = torch.optim.AdamW([theirs], **common)
    for grad in gradients((40, 24), dtype, 50):
        start(optimizer, ours, [grad, grad])
        theirs.grad = grad.clone()
        torch_adamw.step()
    for param in ours:
        error = (param.detach() - theirs.detach()).norm() / (theirs.detach() - begin).norm()
        assert error < (1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_of_density_1_are_adamw_begun_again_at_every_refresh(order: str) -> None:
    begin = small_weights((20, 16), torch.float64)
    params = [nn.Parameter(begin.clone()) for _ in range(4)]
    optimizer = build("adamw", params, density=1.0, blocks=order)
    judge = Frugal(begin.numpy(), "adamw", "none")
    for step, grad in enumerate(gradients((20, 16), torch.float64, 2 * GAP + 3)):
        start(optimizer, params, [grad] * 4)
        if step % GAP == 0:
            judge.refresh(mask=np.ones((20, 16), dtype=bool))
        judge.step(grad.numpy())
    for param in params:
        torch.testing.assert_close(param.detach(), torch.from_numpy(judge.weight), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("space", ["columns", "rows", "entries", *(f"blocks:{order}" for order in ORDERS)])
def test_the_first_step_after_a_reset_has_the_size_of_the_sign_step_on_every_active_coordinate(space: str) -> None:
    kind, _, order = space.partition(":")
    params = [nn.Parameter(small_weights((20, 16), torch.float64, seed)) for seed in range(4)]
    options = {"blocks": order, "density": 0.5} if order else SPACES[space]
    optimizer = build("adamw", params, eps=0.0, weight_decay=0.0, **options)
    sizes = {True: SCALE * LR, False: SCALE * LR * KAPPA}
    for step, grad in enumerate(gradients((20, 16), torch.float64, 3 * GAP + 1)):
        before = [param.detach().clone() for param in params]
        start(optimizer, params, [grad] * 4)
        for param, old in zip(params, before, strict=True):
            mask = chosen(optimizer.state[param], kind, (20, 16), grad.numpy())["mask"]
            active, inactive = (param.detach() - old)[mask].abs(), (param.detach() - old)[~mask].abs()
            assert torch.allclose(inactive, torch.full_like(inactive, sizes[False]), rtol=1e-9)
            if step % GAP == 0:
                assert torch.allclose(active, torch.full_like(active, sizes[True]), rtol=1e-9)
            elif mask.any():  # … and on no other step: the moments have a past
                assert not torch.allclose(active, torch.full_like(active, sizes[True]), rtol=1e-3)


def test_moments_can_be_kept_at_a_refresh_where_the_part_is_no_block() -> None:
    param = nn.Parameter(small_weights((20, 16), torch.float64))
    optimizer = build("adamw", [param], coordinates="columns", on_refresh="keep", eps=0.0, weight_decay=0.0)
    for step, grad in enumerate(gradients((20, 16), torch.float64, GAP + 1)):
        old = param.detach().clone()
        start(optimizer, [param], [grad])
        active = (param.detach() - old)[:, optimizer.state[param]["indices"].long()].abs()
        assert torch.allclose(active, torch.full_like(active, SCALE * LR), rtol=1e-6) == (step == 0)


# --- the choice ---------------------------------------------------------------------------------------------------------------


def expected_count(coordinates: str, density: float, shape: tuple[int, int]) -> int:
    """⌊ρn⌋, ⌊ρm⌋ or ⌊ρmn⌋, for the decimal number that ρ was written as."""
    population = {"columns": shape[1], "rows": shape[0], "entries": shape[0] * shape[1]}[coordinates]
    return math.floor(Fraction(str(density)) * population)


@pytest.mark.parametrize("density", [0.1, 0.25, 0.29, 0.3, 0.57, 0.7, 0.999, 1.0])
@pytest.mark.parametrize("shape", [(100, 30), (30, 100), (41, 57), (64, 64)], ids=str)
@every_coordinate
def test_indices_are_distinct_in_range_int32_and_as_many_as_density_says(
    coordinates: str, shape: tuple[int, int], density: float
) -> None:
    param = nn.Parameter(torch.zeros(shape))
    optimizer = build("lion", [param], density=density, coordinates=coordinates, update_proj_gap=1)
    count = expected_count(coordinates, density, shape)
    population = {"columns": shape[1], "rows": shape[0], "entries": param.numel()}[coordinates]
    for _ in range(3):
        start(optimizer, [param], [torch.ones(shape)])
        state = optimizer.state[param]
        indices = state["indices"]
        assert indices.dtype == torch.int32
        assert indices.tolist() == sorted(set(indices.tolist()))
        assert len(indices) == count
        assert int(indices[0]) >= 0
        assert int(indices[-1]) < population
        assert state["exp_avg"].numel() == {"columns": shape[0], "rows": shape[1], "entries": 1}[coordinates] * count


@pytest.mark.parametrize("rule", RULES)
@every_coordinate
def test_state_has_the_bytes_of_the_formula_and_indices_never_more_than_the_moments(
    coordinates: str, rule: str
) -> None:
    shape = (48, 40)
    param = nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
    optimizer = build(rule, [param], density=0.25, coordinates=coordinates, residual="sign")
    start(optimizer, [param], [torch.ones(shape, dtype=torch.bfloat16)])
    sizes = lo.state_bytes(optimizer)
    count = expected_count(coordinates, 0.25, shape)
    moments = sum(sizes.get(name, 0) for name in ("exp_avg", "exp_avg_sq"))
    assert moments == round(0.25 * 48 * 40) * (8 if rule == "adamw" else 4)
    assert sizes["indices"] == 4 * count <= moments
    assert sum(sizes.values()) == moments + sizes["indices"] + 12  # and two counters


def assert_uniform(draws: list[list[int]], population: int, expected: float) -> None:
    """Every index is drawn with probability `expected` at each draw: a χ² bound, and none far off on its own."""
    counts = np.bincount(np.concatenate(draws), minlength=population)
    mean, variance = len(draws) * expected, len(draws) * expected * (1 - expected)
    statistic = float(((counts - mean) ** 2).sum()) / variance * (population - 1) / population
    spread = math.sqrt(2 * population) / (1 - expected)
    assert abs(statistic - (population - 1)) < 5 * spread
    assert float(np.abs(counts - mean).max()) < 5 * math.sqrt(variance)
    # Draws know nothing of each other.
    count = expected * population
    shared = [len(set(a) & set(b)) for a, b in itertools.pairwise(draws)]
    deviation = math.sqrt(count * expected * (1 - expected) / len(shared))
    assert abs(np.mean(shared) - count * expected) < 5 * deviation


@pytest.mark.parametrize("density", [0.25, 0.3, 0.6, 0.75])
@every_coordinate
def test_every_column_row_and_entry_is_chosen_equally_often(coordinates: str, density: float) -> None:
    shape = (12, 20)
    param = nn.Parameter(torch.zeros(shape))
    optimizer = build("lion", [param], density=density, coordinates=coordinates, update_proj_gap=1, seed=5)
    draws = []
    for _ in range(300):
        start(optimizer, [param], [torch.ones(shape)])
        draws.append(optimizer.state[param]["indices"].tolist())
    population = {"columns": 20, "rows": 12, "entries": 240}[coordinates]
    assert_uniform(draws, population, expected_count(coordinates, density, shape) / population)


def test_choices_depend_on_the_seed_the_parameter_and_the_refresh_only() -> None:
    def indices(seed: int, gradient: float) -> list[list[int]]:
        params = [nn.Parameter(torch.zeros(64, 64)) for _ in range(2)]
        optimizer = build("adamw", params, update_proj_gap=2, seed=seed)
        out = []
        for _ in range(3):
            start(optimizer, params, [torch.full((64, 64), gradient)] * 2)
            out += [optimizer.state[param]["indices"].tolist() for param in params]
        return out

    torch.manual_seed(0)
    first = indices(0, 1.0)
    assert first == indices(0, -3.0)  # torch's global generator has moved on
    other = indices(1, 1.0)
    distinct = {tuple(row) for row in first + other}
    assert len(distinct) == 8  # two refreshes, two parameters, two seeds


# --- blocks -------------------------------------------------------------------------------------------------------------------


def active(optimizer: lo.LowRankOptimizer, params: list[nn.Parameter]) -> set[int]:
    """Positions of the tensors that have moments."""
    return {i for i, param in enumerate(params) if moment_bytes(optimizer.state[param]) > 0}


def turns(order: str, count: int, density: float, number: int, seed: int = 0, gap: int = 2) -> list[set[int]]:
    """The active sets of a number of turns, each of which is the same for all of its steps."""
    params = [nn.Parameter(torch.zeros(6 + i, 5)) for i in range(count)]
    optimizer = build("lion", params, density=density, blocks=order, update_proj_gap=gap, seed=seed)
    out = []
    for _ in range(number):
        sets = []
        for _ in range(gap):
            start(optimizer, params, [torch.ones_like(param) for param in params])
            sets.append(active(optimizer, params))
        assert all(each == sets[0] for each in sets)
        out.append(sets[0])
    return out


@pytest.mark.parametrize(("count", "density"), [(6, 0.5), (7, 0.3), (7, 0.4), (5, 0.5), (7, 0.5), (9, 0.2), (3, 1.0)])
def test_ascending_and_descending_blocks_follow_a_pointer_that_wraps(count: int, density: float) -> None:
    size = round(density * count)
    up, down = turns("ascending", count, density, 12), turns("descending", count, density, 12)
    front, back = 0, count - 1
    for ascending, descending in zip(up, down, strict=True):
        assert ascending == {(front + i) % count for i in range(size)}
        assert descending == {(back - i) % count for i in range(size)}
        front, back = (front + size) % count, (back - size) % count


@pytest.mark.parametrize(("count", "density"), [(8, 0.5), (10, 0.4), (6, 0.34), (4, 1.0)])
def test_mirror_blocks_are_as_many_from_the_front_as_mirrored_from_the_back(count: int, density: float) -> None:
    size = round(density * count)
    pairs = count // 2
    pointer = 0
    for mirrored in turns("mirror", count, density, 12):
        front = {(pointer + i) % pairs for i in range(size // 2)}
        assert mirrored == front | {count - 1 - i for i in front}
        pointer = (pointer + size // 2) % pairs


@pytest.mark.parametrize(("count", "density"), [(7, 0.3), (6, 0.5)])
def test_random_blocks_are_drawn_anew_and_uniformly_at_every_turn(count: int, density: float) -> None:
    draws = [sorted(each) for each in turns("random", count, density, 200, seed=3, gap=1)]
    assert {len(draw) for draw in draws} == {round(density * count)}
    assert_uniform(draws, count, round(density * count) / count)
    assert draws[:20] != [sorted(each) for each in turns("random", count, density, 20, seed=4)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("order", ORDERS)
def test_the_state_of_inactive_tensors_has_no_bytes_and_that_of_active_ones_is_whole(order: str, rule: str) -> None:
    params = [nn.Parameter(torch.zeros(shape)) for shape in BLOCK_SHAPES[:4]]
    optimizer = build(rule, params, density=0.5, blocks=order, update_proj_gap=1)
    each = 8 if rule == "adamw" else 4
    for _ in range(6):
        start(optimizer, params, [torch.ones_like(param) for param in params])
        on = active(optimizer, params)
        assert len(on) == 2
        for i, param in enumerate(params):
            state = optimizer.state[param]
            assert moment_bytes(state) == (each * param.numel() if i in on else 0)
            counters = sum(t.nbytes for name, t in state.items() if not name.startswith("exp_avg"))
            assert counters <= 20


def test_blocks_are_the_tensors_of_one_group_each_group_for_itself() -> None:
    params = [nn.Parameter(torch.zeros(8, 6)) for _ in range(8)]
    groups = [
        {"params": params[:4], "density": 0.5},
        {"params": params[4:7], "density": 0.34},
        {"params": params[7:], "rank": None},
    ]
    optimizer = build("adamw", groups, blocks="ascending", update_proj_gap=1)
    seen = []
    for _ in range(4):
        start(optimizer, params, [torch.ones_like(param) for param in params])
        seen.append(active(optimizer, params[:7]))
    assert seen == [{0, 1, 4}, {2, 3, 5}, {0, 1, 6}, {2, 3, 4}]
    assert optimizer.state[params[7]]["exp_avg"].shape == (8, 6)  # dense: always all of it


def test_a_tensor_without_gradient_for_a_while_changes_its_turn_later() -> None:
    params = [nn.Parameter(torch.zeros(8, 6)) for _ in range(2)]
    optimizer = build("adamw", params, density=0.5, blocks="ascending", update_proj_gap=2)
    for step in range(6):
        for i, param in enumerate(params):
            param.grad = torch.ones_like(param) if i == 0 or step >= 2 else None
        optimizer.step()
        # The turns of the first are steps 0–1, 4–5; of the second, which joins at step 2, its third and fourth steps: 4–5.
        assert active(optimizer, params) == {0: {0}, 1: set(), 2: {0, 1}}[step // 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("order", ORDERS)
def test_resume_in_the_middle_of_a_gap_is_exact_to_the_bit(order: str, rule: str, dtype: torch.dtype) -> None:
    def fresh(value: float | None = None) -> tuple[list[nn.Parameter], lo.LowRankOptimizer]:
        params = [nn.Parameter(small_weights(shape, dtype)) for shape in BLOCK_SHAPES]
        if value is not None:
            params = [nn.Parameter(torch.full_like(param, value)) for param in params]
        rounding = dtype == torch.bfloat16
        return params, build(rule, params, density=1 / 3, blocks=order, stochastic_rounding=rounding, seed=2)

    everything = [gradients(shape, dtype, seed=seed) for seed, shape in enumerate(BLOCK_SHAPES)]

    def run(optimizer: lo.LowRankOptimizer, params: list[nn.Parameter], first: int, last: int) -> None:
        for step in range(first, last):
            start(optimizer, params, [each[step] for each in everything])

    whole, uninterrupted = fresh()
    run(uninterrupted, whole, 0, STEPS)
    params, saved = fresh()
    middle = 2 * GAP + 3  # the third turn
    run(saved, params, 0, middle)
    second, resumed = fresh(0.5)  # never stepped: at turn 0, where other tensors are active
    assert active(resumed, second) != active(saved, params)
    resume(saved, params, resumed, second)
    assert active(resumed, second) == active(saved, params)
    copied = copy.deepcopy(resumed)
    run(resumed, second, middle, STEPS)
    assert_same_run(uninterrupted, whole, resumed, second)
    twins = [param for group in copied.param_groups for param in group["params"]]
    run(copied, twins, middle, STEPS)
    for a, b in zip(whole, twins, strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_another_order_or_density_is_refused() -> None:
    params = [nn.Parameter(torch.zeros(8, 6)) for _ in range(4)]
    saved = build("adamw", params, density=0.5, blocks="ascending").state_dict()
    for options in ({"density": 0.5, "blocks": "descending"}, {"density": 0.25, "blocks": "ascending"}):
        with pytest.raises(ValueError, match="the checkpoint does not fit this FrugalAdamW"):
            build("adamw", params, **options).load_state_dict(saved)


# --- defaults, the released code, bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "residual"), [(lo.FrugalAdamW, "sign"), (lo.FrugalLion, "sign"), (lo.FrugalSGD, "sgd")]
)
def test_defaults_are_those_of_the_paper(kind: type[lo.LowRankOptimizer], residual: str) -> None:
    param = nn.Parameter(torch.zeros(64, 32))
    (group,) = kind([param]).param_groups
    published = {
        "density": 0.25,
        "rank": None,
        "scale": 1.0,
        "residual": residual,
        "residual_lr_scale": 1.0,
        "update_proj_gap": 200,
    }
    assert published.items() <= group.items()
    assert (group["projector"], group["on_refresh"]) == ("coordinate:columns", "reset")
    assert group["lr"] == (1e-4 if kind is lo.FrugalLion else 1e-3)
    assert group["weight_decay"] == (1e-2 if kind is lo.FrugalAdamW else 0.0)


def test_a_rank_in_a_group_takes_the_place_of_the_density() -> None:
    params = [nn.Parameter(torch.zeros(64, 32)) for _ in range(3)]
    groups = [
        {"params": params[:1], "rank": 5},
        {"params": params[1:2], "density": 0.5},
        {"params": params[2:], "rank": None},
    ]
    optimizer = lo.FrugalAdamW(groups)
    assert [tuple(optimizer.state[param]["exp_avg"].shape) for param in params] == [(64, 5), (64, 16), (64, 32)]


@pytest.mark.parametrize("space", ["svd", "columns"])
def test_momentum_starts_as_in_the_released_code_where_that_is_asked_for(space: str) -> None:
    grads = gradients((24, 16), torch.float64, 3)
    begin = small_weights((24, 16), torch.float64)
    params = [nn.Parameter(begin.clone()) for _ in range(2)]
    groups = [{"params": params[:1], "density": 0.25}, {"params": params[1:], "rank": None}]
    optimizer = build("sgd", groups, residual="none", weight_decay=0.0, match_reference=True, **SPACES[space])
    start(optimizer, params, [grads[0]] * 2)
    # b ← μ b₀ + R with b₀ = R where projected, b₀ = W where dense.
    judge = Frugal(begin.numpy(), "sgd", "none")
    judge.refresh(**chosen(optimizer.state[params[0]], space, (24, 16), grads[0].numpy()))
    if space == "svd":
        judge.right = np.linalg.svd(grads[0].numpy())[2][:4].T
    inside = judge.lift(judge.project(grads[0].numpy()))
    torch.testing.assert_close(params[0].detach(), begin - SCALE * LR * (1 + MOMENTUM) * torch.from_numpy(inside))
    torch.testing.assert_close(params[1].detach(), begin - LR * (MOMENTUM * begin + grads[0]))


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("density above 1", {"density": 1.5}, r"density is 1.5; it must be a number in \[0, 1\]"),
    ("density below 0", {"density": -0.1}, r"density is -0.1; it must be a number in \[0, 1\]"),
    ("density no number", {"density": "half"}, r"density is 'half'; it must be a number in \[0, 1\]"),
    ("density NaN", {"density": math.nan}, r"density is nan; it must be a number in \[0, 1\]"),
    ("rank and density", {"rank": 4, "density": 0.5}, "rank is 4 and density 0.5; give one of them, the other None"),
    ("nothing is trained", {"density": 0.0, "residual": "none"}, 'use residual "sgd" or "sign", or more density'),
    (
        "mirror of three",
        {"blocks": "mirror", "density": 0.5, "count": 3},
        "must be even: change the density, or use",
    ),
    ("mirror with one active", {"blocks": "mirror", "density": 0.25, "count": 4}, 'use blocks="ascending" or "random"'),
    ("blocks with rank", {"blocks": "random", "rank": 4}, "use density=… in place of rank=4"),
    ("blocks that keep", {"blocks": "random", "on_refresh": "keep"}, 'use on_refresh="reset"'),
    ("blocks that rotate", {"blocks": "random", "on_refresh": "rotate"}, 'use on_refresh="reset"'),
    ("unknown order", {"blocks": "backwards"}, "valid values are 'random', 'ascending', 'descending', 'mirror'"),
    ("unknown coordinates", {"coordinates": "diagonals"}, "valid values are columns, rows, entries"),
    ("unknown residual", {"residual": "same"}, "residual is 'same'; FRUGAL's are 'sign', 'sgd', 'none'"),
    (
        "a residual of others",
        {"residual": "norm_scaled"},
        "FRUGAL's are 'sign', 'sgd', 'none', LowRankOptimizer takes others",
    ),
    (
        "coordinates and projector",
        {"coordinates": "rows", "projector": "svd"},
        "coordinates and a projector exclude each other",
    ),
    (
        "blocks and projector",
        {"blocks": "random", "projector": "svd"},
        "coordinates and a projector exclude each other",
    ),
    (
        "blocks and coordinates",
        {"blocks": "random", "coordinates": "rows"},
        "coordinates and a projector exclude each other",
    ),
    ("negative kappa", {"residual_lr_scale": -0.1}, "residual_lr_scale is -0.1; it must be at least 0"),
    ("no orthonormal basis", {"projector": "random:gaussian"}, 'use projector="random"'),
    ("both sides of columns", {"proj_type": "full"}, 'use coordinates="entries"'),
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("options", "message"), [pytest.param(o, m, id=name) for name, o, m in BAD])
def test_bad_input_raises_and_the_message_says_what_to_use(options: dict[str, Any], message: str, rule: str) -> None:
    options = dict(options)
    params = [nn.Parameter(torch.zeros(12, 8)) for _ in range(options.pop("count", 2))]
    kind = {"adamw": lo.FrugalAdamW, "lion": lo.FrugalLion, "sgd": lo.FrugalSGD}[rule]
    with pytest.raises(ValueError) as error:
        kind(params, **options)
    assert re.search(message if "\\" in message else re.escape(message), str(error.value))


@pytest.mark.parametrize(("count", "density", "active"), [(1, 0.25, 1), (2, 0.25, 1), (3, 0.01, 1), (3, 0.0, 0)])
def test_a_density_above_zero_gives_some_tensor_its_turn(count: int, density: float, active: int) -> None:
    params = [nn.Parameter(torch.zeros(12, 8)) for _ in range(count)]
    optimizer = lo.FrugalAdamW(params, blocks="descending", density=density)
    assert sum(optimizer.state[p]["exp_avg"].numel() > 0 for p in params) == active


def test_tensors_of_one_column_take_turns_with_coded_moments():
    """Coded as a row, without column scales; of no column while others have their turn."""

    def made() -> tuple[list[nn.Parameter], lo.FrugalAdamW]:
        params = [nn.Parameter(torch.zeros(*shape)) for shape in ((5000, 1), (5001, 1), (100, 90))]
        options = {"blocks": "descending", "update_proj_gap": 2, "on_refresh": "reset", "state_bits": 8}
        return params, lo.FrugalAdamW([{"params": params, "density": 0.5}], lr=0.1, **options)

    params, optimizer = made()
    for step in range(9):
        again, loaded = made()
        loaded.load_state_dict(optimizer.state_dict())
        for old, new in zip(params, again, strict=True):
            new.data.copy_(old.data)
            old.grad = torch.randn(old.shape, generator=torch.Generator().manual_seed(step))
            new.grad = old.grad.clone()
        optimizer.step()
        loaded.step()
        assert all(torch.equal(old, new) for old, new in zip(params, again, strict=True))
    assert all(param.abs().max() > 0.1 for param in params)
