"""Invariants that hold whatever the gradients are, by their letters in the specification of the methods (section 16).

    (a) signs of basis vectors never change updates
    (b) Fira with α = 1 and full rank is GaLore with α = 1
    (c) FRUGAL of density 0 is signSGD, of density 1 without refreshes AdamW                  in test_frugal.py
    (d) APOLLO: α before or after the limiter is the same, and a fourfold α doubles the step
    (e) FRUGAL's first step after a reset has |Δ| = aη on every active coordinate             in test_frugal.py
    (f) LDAdam without feedback, with the identity as basis, is AdamW                         in test_ldadam.py
    (i) stochastic rounding, to bfloat16 and to codes, is right on average
    (j) the limiter: c_t ≤ γ (c_{t−1} + 1e-8)

(g) and (h) are about SLTrain and LoRA-Pro, which are not in the package.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo
from lowrank_optim import kernels
from lowrank_optim.kernels.counter_rng import make_key
from lowrank_optim.quantization import dequantize_rows, quantize_rows

RANK, GAP, LR = 5, 7, 1e-2
SHAPES = {"tall": (40, 24), "wide": (24, 40), "square": (32, 32)}

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def gradients(shape: tuple[int, ...], steps: int, seed: int = 0, jumps: float = 0.5) -> list[Tensor]:
    """Gradients with a clear spectrum, singular vectors that wander, and a size that jumps."""
    rng = np.random.default_rng(seed)
    short = min(shape)
    u, v = (np.linalg.qr(rng.normal(size=(side, short)))[0] for side in shape)
    values = 1.2 ** -np.arange(short)
    out = []
    for _ in range(steps):
        u, v = (np.linalg.qr(x + 0.05 * rng.normal(size=x.shape))[0] for x in (u, v))
        out.append(torch.from_numpy(np.exp(jumps * rng.normal()) * (u * values) @ v.T))
    return out


def weights(shape: tuple[int, ...]) -> nn.Parameter:
    generator = torch.Generator().manual_seed(1)
    return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64) * 0.01)


def start(optimizer: torch.optim.Optimizer, param: nn.Parameter, grad: Tensor) -> None:
    param.grad = grad.clone()
    optimizer.step()


# --- (a) ----------------------------------------------------------------------------------------------------------------------

SIGNED: dict[str, tuple[type[lo.LowRankOptimizer], dict[str, Any]]] = {
    "galore": (lo.GaLoreAdamW, {}),
    "galore, rotated": (lo.GaLoreAdamW, {"on_refresh": "rotate"}),
    "galore, exact": (lo.GaLoreAdamW, {"projector": "svd"}),
    "galore, left": (lo.GaLoreAdamW, {"proj_type": "left"}),
    "galore, long side": (lo.GaLoreAdamW, {"proj_type": "reverse_std"}),
    "galore, both sides": (lo.GaLoreAdamW, {"proj_type": "full"}),
    "fira": (lo.FiraAdamW, {}),
    "fira, released": (lo.FiraAdamW, {"match_reference": True, "update_proj_gap": 10**6}),
    "apollo": (lo.APOLLOAdamW, {"projector": "svd"}),
    "frugal": (lo.FrugalAdamW, {"projector": "randomized_svd"}),
    "frugal, kept": (lo.FrugalAdamW, {"projector": "randomized_svd", "on_refresh": "keep"}),
    "frugal lion": (lo.FrugalLion, {"projector": "randomized_svd", "on_refresh": "keep"}),
    "frugal sgd": (lo.FrugalSGD, {"projector": "randomized_svd", "on_refresh": "keep", "momentum": 0.9}),
    "alice": (lo.AliceAdamW, {"projector": "randomized_svd"}),
    "subtrack": (lo.SubTrackAdamW, {}),
    "conda": (lo.CondaAdamW, {}),
    "ldadam": (lo.LDAdamW, {"update_proj_gap": 1}),
    "ldadam, no feedback": (lo.LDAdamW, {"update_proj_gap": 1, "error_feedback": False}),
}


@every_shape
@pytest.mark.parametrize(("kind", "options"), SIGNED.values(), ids=SIGNED)
def test_signs_of_basis_vectors_never_change_updates(
    kind: type[lo.LowRankOptimizer], options: dict[str, Any], shape: tuple[int, int]
) -> None:
    grads = gradients(shape, 3 * GAP)
    rng = torch.Generator().manual_seed(0)
    params = [weights(shape) for _ in range(2)]
    options = {"rank": RANK, "lr": LR, "update_proj_gap": GAP, **options}
    plain, flipped = (kind([param], **options) for param in params)
    for step, grad in enumerate(grads):
        if step % 3 == 1:
            state = flipped.state[params[1]]
            for name in ("basis", "basis_right"):
                if name not in state:
                    continue
                signs = torch.randint(0, 2, (RANK,), generator=rng).double() * 2 - 1
                state[name].mul_(signs)
                # With both sides, columns of the left basis are rows of the core.
                rows = name == "basis" and "basis_right" in state
                state["exp_avg"].mul_(signs.unsqueeze(1) if rows else signs)
        start(plain, params[0], grad)
        start(flipped, params[1], grad)
    start_weights = weights(shape).detach()
    difference = (params[0].detach() - params[1].detach()).norm()
    assert difference < 1e-9 * (params[0].detach() - start_weights).norm()


# --- (b) ----------------------------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("projector", ["randomized_svd", "svd"])
@pytest.mark.parametrize("policy", ["keep", "reset", "rotate"])
def test_fira_of_full_rank_and_alpha_1_is_galore(shape: tuple[int, int], projector: str, policy: str) -> None:
    options = {"rank": min(shape), "scale": 1.0, "lr": LR, "update_proj_gap": GAP}
    params = [weights(shape) for _ in range(2)]
    fira, galore = (
        kind([param], projector=projector, on_refresh=policy, **options)
        for kind, param in zip((lo.FiraAdamW, lo.GaLoreAdamW), params, strict=True)
    )
    for grad in gradients(shape, 3 * GAP):
        start(fira, params[0], grad)
        start(galore, params[1], grad)
    change = (params[1] - weights(shape)).norm()
    # ‖g‖² − ‖r‖² is 0 but for rounding, and its root enters: half the digits.
    assert (params[0] - params[1]).norm() < 1e-7 * change


# --- (d) ----------------------------------------------------------------------------------------------------------------------


def apollo(begin: np.ndarray, grads: list[np.ndarray], alpha: float, front: bool, scale_type: str) -> np.ndarray:
    """APOLLO in the leading right singular vectors of the first gradient, √α before (`front`) or after the limiter."""
    basis = np.linalg.svd(grads[0], full_matrices=False)[2][:RANK].T
    weight, m, v, last = begin.copy(), 0.0, 0.0, None
    for t, g in enumerate(grads, 1):
        r = g @ basis
        m, v = 0.9 * m + 0.1 * r, 0.999 * v + 0.001 * r**2
        n = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        axis = 1 if scale_type == "channel" else None
        s = g * np.linalg.norm(n, axis=axis, keepdims=True) / np.linalg.norm(r, axis=axis, keepdims=True)
        s = s * np.sqrt(alpha) if front else s
        size = np.linalg.norm(s)
        growth = 1.0 if last is None else max(size / last, 1.01) / 1.01
        last, s = size / growth, s / growth
        weight = weight - LR * (s if front else s * np.sqrt(alpha))
    return weight


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("alpha", [0.25, 128.0])
def test_apollos_scale_before_or_after_the_limiter_is_the_same(alpha: float, scale_type: str) -> None:
    begin, grads = weights((40, 24)).detach(), gradients((40, 24), 20)
    param = weights((40, 24))
    options = {"rank": RANK, "lr": LR, "weight_decay": 0.0, "update_proj_gap": 1000, "projector": "svd"}
    optimizer = lo.APOLLOAdamW([param], scale=alpha, scale_type=scale_type, **options)
    for grad in grads:
        start(optimizer, param, grad)
    for front in (True, False):
        expected = apollo(begin.numpy(), [grad.numpy() for grad in grads], alpha, front, scale_type)
        change = np.linalg.norm(expected - begin.numpy())
        assert np.linalg.norm(param.detach().numpy() - expected) < 1e-10 * change


@pytest.mark.parametrize("released", [False, True], ids=["paper", "released"])
@pytest.mark.parametrize("kind", [lo.APOLLOAdamW, lo.APOLLOMiniAdamW])
@every_shape
def test_a_fourfold_scale_doubles_apollos_step(
    shape: tuple[int, int], kind: type[lo.LowRankOptimizer], released: bool
) -> None:
    changes = []
    for scale in (32.0, 128.0):
        param = weights(shape)
        options = {"rank": RANK, "lr": LR, "weight_decay": 0.0, "update_proj_gap": GAP, "match_reference": released}
        optimizer = kind([param], scale=scale, **options)
        for grad in gradients(shape, 2 * GAP):
            start(optimizer, param, grad)
        changes.append(param.detach() - weights(shape).detach())
    assert (changes[1] - 2 * changes[0]).norm() < 1e-12 * changes[1].norm()


# --- (i) ----------------------------------------------------------------------------------------------------------------------

TRIALS = 1000


def assert_unbiased(draws: Tensor, x: Tensor, step: Tensor) -> None:
    """Means over draws are `x`, for each element and, much more closely, for all of them together, in units of the grid's `step`."""
    draws, x, step = draws.double(), x.double(), step.double()
    error, spread = (draws.mean(0) - x) / step, draws.std(0) / step
    assert float(error.abs().max()) < 5 * 0.5 / TRIALS**0.5
    for sign in (1, -1):  # no drift to or from zero either
        chosen = x.sign() == sign
        if chosen.any():
            deviation = float(spread[chosen].square().mean().sqrt()) / (TRIALS * int(chosen.sum())) ** 0.5
            assert abs(float(error[chosen].mean())) < 5 * deviation
    assert 0.3 < float(spread.mean()) < 0.5  # the mean of √(p(1−p)) is π/8


def test_stochastic_rounding_to_bfloat16_is_right_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, generator=generator) * 10.0 ** torch.randint(-6, 7, (400,), generator=generator)
    positions = torch.arange(x.numel())
    draws = torch.stack([kernels.stochastic_round(x, make_key(3, 1, t, 2), positions) for t in range(TRIALS)])
    assert torch.equal(draws, draws.bfloat16().float())
    exponent = torch.floor(torch.log2(x.abs()))
    assert_unbiased(draws, x, 2.0 ** (exponent - 7))


@pytest.mark.parametrize(("bits", "signed"), [(8, True), (4, True), (8, False), (4, False)])
def test_stochastic_codes_are_right_on_average(bits: int, signed: bool) -> None:
    levels = {(8, True): 127, (4, True): 7, (8, False): 256, (4, False): 16}[bits, signed]
    x = torch.rand(4, 300, generator=torch.Generator().manual_seed(0))
    # Unsigned codes have no 0: what is in range is from the lowest level on.
    x = (x * 2 - 1) if signed else 1 / levels + x * (1 - 1 / levels)
    x *= torch.tensor([1e-3, 1.0, 7.0, 1e5]).unsqueeze(1)
    draws = []
    for trial in range(TRIALS):
        codes, scale = quantize_rows(x, bits, signed, key=make_key(0, 0, trial, 2))
        draws.append(dequantize_rows(codes, scale, bits, signed, cols=300))
    blocks = [x[:, :256], x[:, 256:]]
    step = torch.cat([part.abs().amax(1, keepdim=True).expand_as(part) for part in blocks], 1) / levels
    for row in range(4):
        assert_unbiased(torch.stack(draws)[:, row], x[row], step[row])


# --- (j) ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 1.01, 1.5])
@pytest.mark.parametrize("released", [False, True], ids=["paper", "released"])
@pytest.mark.parametrize("method", ["fira", "channel", "tensor"])
@every_shape
def test_the_limited_norm_never_grows_by_more_than_gamma(
    shape: tuple[int, int], method: str, released: bool, gamma: float
) -> None:
    param = weights(shape)
    options = {"rank": RANK, "lr": LR, "weight_decay": 0.0, "update_proj_gap": GAP, "match_reference": released}
    if method == "fira":
        optimizer: lo.LowRankOptimizer = lo.FiraAdamW([param], limiter=gamma, scale=0.25, **options)
    else:
        optimizer = lo.APOLLOAdamW([param], limiter=gamma, scale_type=method, scale=4.0, **options)
    last, limited, free = None, 0, 0
    for step, grad in enumerate(gradients(shape, 60, jumps=3.0), 1):
        before = param.detach().clone()
        start(optimizer, param, grad)
        c = float(optimizer.state[param]["limiter_norm"])
        if last is not None:
            bound = gamma * (last + 1e-8)
            assert c <= bound * (1 + 1e-12)
            limited, free = limited + (c > bound * (1 - 1e-6)), free + (c < bound * (1 - 1e-3))
        last = c
        if (
            method != "fira"
        ):  # the update is √α times what c is the norm of; in the released form it is corrected outside
            size = LR * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step) if released else LR
            applied = float((param.detach() - before).norm()) / size / 2.0
            assert applied == pytest.approx(c, rel=1e-9)
    assert limited >= 1  # both happen
    assert free >= 3
