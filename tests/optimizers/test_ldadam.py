"""LDAdam against a float64 transcription of its equations, and what must hold whatever the gradients are.

    A = G + e,   B = ρ P m̂ + (1 − ρ) A,   P' = qf(B BᵀP),   C = P'ᵀP,   R = P'ᵀA
    m' = C m,   v' = |(1 − β₂ᵗ⁻¹) [(C∘C)(v̂ − m̂²) + (C m̂)²]|,   N = Adam(R; m', v')
    W ← (1 − ηλ) W − η P' N,   e = A − P'R + β₁/(1 − β₁)·(P m − P' m')

(left side; right is the mirror image). The first basis is that of an exact SVD under `match_reference`; the transcription of the
default takes over the first basis of the optimizer, whose quality is tested for itself.

Gradients are prescribed, so that errors feed back through e only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import lowrank_optim as lo
from tests.oracles.checkpoints import assert_same_run, resume

Array = NDArray[np.float64]

RANK, STEPS, LR, DECAY, RHO = 5, 30, 1e-2, 0.3, 0.7
BETAS, EPS = (0.8, 0.95), 1e-3  # every term large enough to be seen
SHAPES = {"tall": (40, 24), "wide": (24, 40), "square": (32, 32)}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
with_and_without_feedback = pytest.mark.parametrize("feedback", [True, False], ids=["feedback", "no feedback"])


# --- the transcription --------------------------------------------------------------------------------------------------------


@dataclass
class LDAdam:
    """One matrix. On the right side everything is transposed."""

    weight: Array
    left: bool
    feedback: bool = True
    rho: float = RHO
    betas: tuple[float, float] = BETAS
    eps: float = EPS
    lr: float = LR
    weight_decay: float = DECAY
    rank: int = RANK
    t: int = 0
    basis: Array | None = None
    m: Array | float = 0.0
    v: Array | float = 0.0
    e: Array | float = 0.0

    def step(self, grad: Array, first_basis: Array | None = None) -> None:
        beta1, beta2 = self.betas
        a = (grad if self.left else grad.T) + self.e
        self.t += 1
        t, old = self.t, self.basis
        if old is None:
            p = np.linalg.svd(a, full_matrices=False)[0][:, : self.rank] if first_basis is None else first_basis
            r = p.T @ a
            m, v, lost = 0.0, 0.0, 0.0
        else:
            m_hat, v_hat = self.m / (1 - beta1 ** (t - 1)), self.v / (1 - beta2 ** (t - 1))
            b = self.rho * old @ m_hat + (1 - self.rho) * a
            p = np.linalg.qr(b @ (b.T @ old))[0]
            r, c = p.T @ a, p.T @ old
            m = c @ self.m
            lost = beta1 / (1 - beta1) * (old @ self.m - p @ m)
            v = np.abs((1 - beta2 ** (t - 1)) * (c**2 @ (v_hat - m_hat**2) + (c @ m_hat) ** 2))
        if self.feedback:
            self.e = a - p @ r + lost
        self.basis = p
        self.m = beta1 * m + (1 - beta1) * r
        self.v = beta2 * v + (1 - beta2) * r**2
        n = (self.m / (1 - beta1**t)) / (np.sqrt(self.v / (1 - beta2**t)) + self.eps)
        update = p @ n if self.left else (p @ n).T
        self.weight = (1 - self.lr * self.weight_decay) * self.weight - self.lr * update

    def error(self) -> Array:
        return self.e if self.left else self.e.T


def projected_left(shape: tuple[int, int], released: bool) -> bool:
    """The side of proj_type="std": the short one; square matrices left in the released code, right by default."""
    return shape[0] < shape[1] or (released and shape[0] == shape[1])


def gradients(shape: tuple[int, ...], dtype: torch.dtype, steps: int = STEPS, seed: int = 0) -> list[Tensor]:
    """Gradients with a clear spectrum, singular vectors that wander, and a size that changes."""
    rng = np.random.default_rng(seed)
    short = min(shape)
    u, v = (np.linalg.qr(rng.normal(size=(side, short)))[0] for side in shape)
    values = np.concatenate([0.8 ** np.arange(RANK), 0.15 * 0.9 ** np.arange(short - RANK)])
    out = []
    for _ in range(steps):
        u, v = (np.linalg.qr(x + 0.05 * rng.normal(size=x.shape))[0] for x in (u, v))
        out.append(torch.from_numpy(np.exp(0.3 * rng.normal()) * (u * values) @ v.T).to(dtype))
    return out


def small_weights(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.01).to(dtype)


def build(params: list[Any], **options: Any) -> lo.LDAdamW:
    common = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, "rho": RHO, "rank": RANK}
    return lo.LDAdamW(params, **{**common, **options})


def start(optimizer: lo.LowRankOptimizer, param: nn.Parameter, grad: Tensor) -> None:
    param.grad = grad.clone()
    optimizer.step()


def norm(x: Any) -> float:
    return float(np.linalg.norm(np.asarray(x, dtype=np.float64)))


# --- the equations ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("released", [False, True], ids=["default", "released"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
@with_and_without_feedback
@every_shape
def test_equals_the_transcription_step_by_step(
    shape: tuple[int, int], feedback: bool, dtype: torch.dtype, released: bool
) -> None:
    begin = small_weights(shape, dtype)
    param = nn.Parameter(begin.clone())
    optimizer = build([param], error_feedback=feedback, match_reference=released)
    judge = LDAdam(begin.double().numpy(), projected_left(shape, released), feedback)
    tolerance, worst = TOLERANCE[dtype], 0.0
    for step, grad in enumerate(gradients(shape, dtype)):
        start(optimizer, param, grad)
        state = optimizer.state[param]
        first = state["basis"].double().numpy().copy() if step == 0 and not released else None
        judge.step(grad.double().numpy(), first)
        worst = max(worst, norm(param.detach().double().numpy() - judge.weight))
        # The moments are those in the transcription's basis, which may have other signs.
        signs = np.sign((state["basis"].double().numpy() * judge.basis).sum(0))
        scale = 50 * tolerance
        assert norm(state["basis"].double().numpy() * signs - judge.basis) < scale
        assert norm(state["exp_avg"].double().numpy() * signs - judge.m.T) < scale * norm(judge.m)
        assert norm(state["exp_avg_sq"].double().numpy() - judge.v.T) < scale * norm(judge.v)
        if feedback:
            assert state["error"].dtype == dtype
            assert norm(state["error"].double().numpy() - judge.error()) < scale * norm(judge.error())
        else:
            assert "error" not in state
    assert worst < tolerance * norm(judge.weight - begin.double().numpy())


@pytest.mark.parametrize("proj_type", ["left", "right", "reverse_std"])
@every_shape
def test_other_sides_are_the_same_equations(shape: tuple[int, int], proj_type: str) -> None:
    begin = small_weights(shape, torch.float64)
    param = nn.Parameter(begin.clone())
    optimizer = build([param], proj_type=proj_type, match_reference=True)
    left = {"left": True, "right": False, "reverse_std": shape[0] >= shape[1]}[proj_type]
    judge = LDAdam(begin.numpy(), left)
    for grad in gradients(shape, torch.float64):
        start(optimizer, param, grad)
        judge.step(grad.numpy())
    assert norm(param.detach().numpy() - judge.weight) < 1e-10 * norm(judge.weight - begin.numpy())


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_the_subspace_follows_momentum_and_gradient_as_rho_says(rho: float) -> None:
    begin = small_weights((40, 24), torch.float64)
    param = nn.Parameter(begin.clone())
    optimizer = build([param], rho=rho, match_reference=True)
    judge, other = LDAdam(begin.numpy(), False, rho=rho), LDAdam(begin.numpy(), False, rho=0.3)
    for grad in gradients((40, 24), torch.float64):
        start(optimizer, param, grad)
        judge.step(grad.numpy())
        other.step(grad.numpy())
    change = norm(judge.weight - begin.numpy())
    assert norm(param.detach().numpy() - judge.weight) < 1e-10 * change
    assert norm(other.weight - judge.weight) > 1e-3 * change


@every_shape
def test_the_default_first_basis_has_nearly_all_the_energy_of_the_exact_one(shape: tuple[int, int]) -> None:
    param = nn.Parameter(small_weights(shape, torch.float64))
    optimizer = build([param])
    grad = gradients(shape, torch.float64, 1)[0]
    start(optimizer, param, grad)
    basis = optimizer.state[param]["basis"]
    energy = (grad @ basis if shape[0] >= shape[1] else grad.T @ basis).square().sum()
    assert energy > 0.99 * torch.linalg.svdvals(grad)[:RANK].square().sum()


def test_a_stack_of_experts_is_its_matrices_one_by_one() -> None:
    begin = small_weights((3, 20, 16), torch.float64)
    param = nn.Parameter(begin.clone())
    optimizer = build([param], match_reference=True)
    judges = [LDAdam(weight.numpy(), False) for weight in begin]
    for grads in zip(*(gradients((20, 16), torch.float64, 15, seed) for seed in range(3)), strict=True):
        start(optimizer, param, torch.stack(grads))
        for judge, grad in zip(judges, grads, strict=True):
            judge.step(grad.numpy())
    expected = torch.stack([torch.from_numpy(judge.weight) for judge in judges])
    assert norm(param.detach() - expected) < 1e-10 * norm(expected - begin)


@with_and_without_feedback
def test_bfloat16_weights_are_rounded_once_and_everything_else_is_float32(feedback: bool) -> None:
    begin = torch.randn(40, 24, generator=torch.Generator().manual_seed(2)).bfloat16()
    param = nn.Parameter(begin.clone())
    optimizer = build([param], error_feedback=feedback, match_reference=True)
    judge = LDAdam(begin.double().numpy(), False, feedback)
    for grad in gradients((40, 24), torch.bfloat16, 20):
        start(optimizer, param, grad)
        judge.step(grad.double().numpy())
        judge.weight = torch.from_numpy(judge.weight).bfloat16().double().numpy()
    assert float((param.detach().double().numpy() != judge.weight).mean()) < 0.02
    assert (param != begin).double().mean() > 0.5
    for name in ("basis", "exp_avg", "exp_avg_sq", *(["error"] if feedback else [])):
        assert optimizer.state[param][name].dtype == torch.float32


# --- error feedback -----------------------------------------------------------------------------------------------------------


def lifted(state: dict[str, Tensor], matrix: Tensor, left: bool) -> Tensor:
    return state["basis"] @ matrix.mT if left else matrix @ state["basis"].mT


@every_shape
def test_what_was_applied_and_what_is_kept_are_together_all_gradients(shape: tuple[int, int]) -> None:
    # Without momentum (β₁ = 0) exp_avg is R, and Σ P R + e = Σ G.
    param = nn.Parameter(small_weights(shape, torch.float64))
    optimizer = build([param], betas=(0.0, 0.95))
    applied, total = torch.zeros(shape).double(), torch.zeros(shape).double()
    for grad in gradients(shape, torch.float64):
        start(optimizer, param, grad)
        state = optimizer.state[param]
        applied += lifted(state, state["exp_avg"], projected_left(shape, False))
        total += grad
        assert norm(applied + state["error"] - total) < 1e-12 * norm(total)
    assert norm(state["error"]) > 1e-3 * norm(total)  # … and something is kept


@every_shape
def test_momentum_loses_nothing_either(shape: tuple[int, int]) -> None:
    # A gradient G enters the momentum as (1−β₁) G, which decays to β₁ of it in a step: over all time it is applied once. With what a
    # rotation takes from the momentum handed to e, Σ P m + e + β₁/(1−β₁) P m = Σ G.
    param = nn.Parameter(small_weights(shape, torch.float64))
    optimizer = build([param])
    applied, total = torch.zeros(shape).double(), torch.zeros(shape).double()
    for grad in gradients(shape, torch.float64):
        start(optimizer, param, grad)
        state = optimizer.state[param]
        momentum = lifted(state, state["exp_avg"], projected_left(shape, False))
        applied += momentum
        total += grad
        kept = state["error"] + BETAS[0] / (1 - BETAS[0]) * momentum
        assert norm(applied + kept - total) < 1e-12 * norm(total)


@with_and_without_feedback
@every_shape
def test_gradients_are_not_modified(shape: tuple[int, int], feedback: bool) -> None:
    param = nn.Parameter(small_weights(shape, torch.float32))
    optimizer = build([param], error_feedback=feedback)
    for grad in gradients(shape, torch.float32, 5):
        param.grad = given = grad.clone()
        optimizer.step()
        assert param.grad is given
        assert torch.equal(given, grad)


@with_and_without_feedback
def test_clearing_gradients_between_steps_changes_nothing(feedback: bool) -> None:
    grads = gradients((24, 40), torch.float32, 10)

    def train(clear: str) -> Tensor:
        model = nn.Linear(40, 24, bias=False)
        with torch.no_grad():
            model.weight.copy_(small_weights((24, 40), torch.float32))
        optimizer = build(list(model.parameters()), error_feedback=feedback)
        for grad in grads:
            (model.weight * grad).sum().backward()  # adds to what a loop leaves in .grad
            optimizer.step()
            if clear == "by hand":
                model.weight.grad = None
            elif clear == "model":
                model.zero_grad()
            else:
                optimizer.zero_grad(set_to_none=clear == "to none")
            assert model.weight.grad is None or not model.weight.grad.any()
        return model.weight.detach()

    expected = train("by hand")
    for clear in ("to none", "to zero", "model"):
        assert torch.equal(train(clear), expected)


def test_without_feedback_what_is_outside_the_subspace_is_lost() -> None:
    ends = []
    for feedback in (True, False):
        param = nn.Parameter(small_weights((40, 24), torch.float64))
        optimizer = build([param], error_feedback=feedback)
        for grad in gradients((40, 24), torch.float64):
            start(optimizer, param, grad)
        ends.append(param.detach())
    assert norm(ends[0] - ends[1]) > 1e-2 * norm(ends[0])


def test_a_direction_that_is_never_among_the_strongest_is_trained_by_feedback_only() -> None:
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(side, 2)))[0] for side in (24, 16))
    moved = {}
    for feedback in (True, False):
        param = nn.Parameter(torch.zeros(24, 16).double())
        optimizer = build([param], rank=1, weight_decay=0.0, error_feedback=feedback)
        for _ in range(60):
            grad = u * [1.0, 0.2] @ v.T + 1e-3 * rng.normal(size=(24, 16))
            start(optimizer, param, torch.from_numpy(grad))
        moved[feedback] = -float(u[:, 1] @ param.detach().numpy() @ v[:, 1])
    assert moved[True] > 0.1
    assert abs(moved[False]) < 0.01


# --- what it is when nothing is left out --------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_hand", [False, True], ids=["found", "set by hand"])
@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (16, 16)], ids=str)
def test_with_the_identity_as_full_basis_and_no_feedback_it_is_torch_adamw(
    shape: tuple[int, int], by_hand: bool
) -> None:
    # Gradients Q D with orthonormal Q and diagonal D: singular vectors are unit vectors on the projected side, at every step. The
    # released code's start is an exact SVD, on the left of square matrices.
    right = shape[0] >= shape[1] if by_hand else shape[0] > shape[1]
    rng = np.random.default_rng(0)
    short = min(shape)
    q = np.linalg.qr(rng.normal(size=(max(shape), short)))[0]
    begin = small_weights(shape, torch.float64)
    ours, theirs = nn.Parameter(begin.clone()), nn.Parameter(begin.clone())
    common = {"lr": 1e-2, "betas": (0.908, 0.99), "eps": 1e-6, "weight_decay": DECAY}
    optimizer = lo.LDAdamW([ours], rank=short, error_feedback=False, match_reference=not by_hand, **common)
    if by_hand:
        optimizer.param_groups[0]["update_proj_gap"] = 10**9
        optimizer.state[ours]["basis"].copy_(torch.eye(short))
        optimizer.state[ours]["last_refresh"].fill_(0)
    torch_adamw = torch.optim.AdamW([theirs], **common)
    for _ in range(50):
        # The order of the singular values stays: a power iteration would exchange its vectors otherwise.
        sizes = rng.normal() * 1.3 ** -np.arange(short) * np.exp(0.02 * rng.normal(size=short))
        grad = torch.from_numpy(q * sizes if right else (q * sizes).T)
        start(optimizer, ours, grad)
        start(torch_adamw, theirs, grad)
        basis = optimizer.state[ours]["basis"].abs()
        assert torch.allclose(basis.max(0).values, torch.ones(short).double())
    assert norm(ours.detach() - theirs.detach()) < 1e-9 * norm(theirs.detach() - begin)


# --- life of the state --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@with_and_without_feedback
def test_resume_is_exact_to_the_bit(feedback: bool, dtype: torch.dtype) -> None:
    shapes = [*SHAPES.values(), (3, 20, 16)]
    everything = [
        [g.expand(shape) for g in gradients(shape[-2:], dtype, seed=seed)] for seed, shape in enumerate(shapes)
    ]

    def run(optimizer: lo.LowRankOptimizer, params: list[nn.Parameter], first: int, last: int) -> None:
        for step in range(first, last):
            for param, grads in zip(params, everything, strict=True):
                param.grad = grads[step].clone()
            optimizer.step()

    def fresh() -> tuple[list[nn.Parameter], lo.LDAdamW]:
        params = [nn.Parameter(small_weights(shape, dtype)) for shape in shapes]
        return params, build(params, error_feedback=feedback, stochastic_rounding=dtype == torch.bfloat16)

    whole, uninterrupted = fresh()
    run(uninterrupted, whole, 0, 20)
    params, saved = fresh()
    run(saved, params, 0, 9)
    second, resumed = fresh()
    resume(saved, params, resumed, second)
    run(resumed, second, 9, 20)
    assert_same_run(uninterrupted, whole, resumed, second)


def test_resume_is_exact_for_another_rho_than_the_default() -> None:
    def fresh() -> tuple[nn.Parameter, lo.LDAdamW]:
        param = nn.Parameter(small_weights((40, 24), torch.float32))
        return param, build([param], rho=0.25)

    grads = gradients((40, 24), torch.float32)
    (whole, uninterrupted), (param, saved), (second, resumed) = fresh(), fresh(), fresh()
    for grad in grads:
        start(uninterrupted, whole, grad)
    for grad in grads[:11]:
        start(saved, param, grad)
    resumed.load_state_dict(saved.state_dict())
    second.data.copy_(param.data)
    for grad in grads[11:]:
        start(resumed, second, grad)
    assert torch.equal(whole, second)
    with pytest.raises(
        ValueError, match=r"projector is 'power_iteration:0\.25' in the checkpoint, 'power_iteration' here"
    ):
        lo.LDAdamW([param], rank=RANK).load_state_dict(saved.state_dict())


@with_and_without_feedback
def test_a_late_first_gradient_starts_that_parameter_as_if_it_were_alone(feedback: bool) -> None:
    grads = gradients((40, 24), torch.float64, 12)
    params = [nn.Parameter(small_weights((40, 24), torch.float64)) for _ in range(2)]
    optimizer = build(params, error_feedback=feedback, match_reference=True)
    judges = [LDAdam(param.detach().numpy().copy(), False, feedback) for param in params]
    for step, grad in enumerate(grads):
        params[0].grad, params[1].grad = grad.clone(), grad.clone() if step >= 4 and step != 8 else None
        optimizer.step()
        for param, judge in zip(params, judges, strict=True):
            if param.grad is not None:
                judge.step(grad.numpy())
    for param, judge in zip(params, judges, strict=True):
        torch.testing.assert_close(param.detach(), torch.from_numpy(judge.weight), rtol=1e-9, atol=1e-12)


@with_and_without_feedback
def test_state_has_the_bytes_of_the_formula(feedback: bool) -> None:
    m, n = 40, 24
    param = nn.Parameter(torch.zeros(m, n, dtype=torch.bfloat16))
    sizes = lo.state_bytes(build([param], error_feedback=feedback))
    assert sizes["exp_avg"] + sizes["exp_avg_sq"] == 8 * m * RANK
    assert sizes["basis"] == 4 * n * RANK
    assert sizes.get("error", 0) == (4 * m * n if feedback else 0)
    assert sum(sizes.values()) == 8 * m * RANK + 4 * n * RANK + (4 * m * n if feedback else 0) + 12


def test_a_gradient_that_is_not_finite_leaves_the_error_and_the_weights_alone() -> None:
    param = nn.Parameter(small_weights((40, 24), torch.float64))
    optimizer = build([param])
    grads = gradients((40, 24), torch.float64, 6)
    for grad in grads[:3]:
        start(optimizer, param, grad)
    kept = {name: value.clone() for name, value in optimizer.state[param].items() if name != "step"}
    before = param.detach().clone()
    poisoned = grads[3].clone()
    poisoned[7, 7] = torch.nan
    with pytest.warns(RuntimeWarning, match="skipped the update"):
        start(optimizer, param, poisoned)
    assert torch.equal(param, before)
    for name, value in kept.items():
        assert torch.equal(optimizer.state[param][name], value)
    start(optimizer, param, grads[4])
    assert torch.isfinite(param).all()
    assert not torch.equal(param, before)


def test_a_zero_gradient_hands_on_what_is_in_the_error() -> None:
    param = nn.Parameter(torch.zeros(40, 24).double())
    optimizer = build([param], betas=(0.0, 0.95), weight_decay=0.0)
    grad = gradients((40, 24), torch.float64, 1)[0]
    start(optimizer, param, grad)
    kept = norm(optimizer.state[param]["error"])
    assert kept > 0
    for _ in range(20):
        start(optimizer, param, torch.zeros_like(grad))
    assert norm(optimizer.state[param]["error"]) < 0.1 * kept


# --- defaults and bad input ---------------------------------------------------------------------------------------------------


def test_defaults_are_the_published_ones() -> None:
    (group,) = lo.LDAdamW([nn.Parameter(torch.zeros(12, 8))], rank=4).param_groups
    published = {
        "lr": 1e-3,
        "betas": (0.908, 0.99),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "scale": 1.0,
        "update_proj_gap": 1,
    }
    assert published.items() <= group.items()
    assert lo.PowerIteration().rho == 0.908


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"proj_type": "full"},
            "proj_type is 'full', which projector='power_iteration' cannot do; use std, reverse_std, left, right",
        ),
        ({"rho": -0.1}, "rho is -0.1; it must be in [0, 1]"),
        ({"rho": 1.1}, "rho is 1.1; it must be in [0, 1]"),
        ({"rho": float("nan")}, "rho is nan; it must be in [0, 1]"),
        ({"error_feedback": "yes"}, "error_feedback is 'yes'; it must be True or False"),
        ({"projector": "random:gaussian"}, 'use projector="random"'),
        ({"betas": (1.0, 0.99)}, "betas is (1.0, 0.99); it must be two numbers in [0, 1)"),
    ],
)
def test_bad_input_raises_and_says_what_to_use(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        lo.LDAdamW([nn.Parameter(torch.zeros(12, 8))], rank=4, **options)
    assert message in str(error.value)
