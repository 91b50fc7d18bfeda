"""Q-GaLore's subspaces: bases in packed codes, and refreshes that become rare where the subspace stands still.

    codes of a group of up to 256 columns of a row:  zero = min,  scale = (max − min)/(2ᵇ − 1),  decoded = zero + code · scale
    overlap = ‖P_oldᵀP_new‖²/r;  gap ← factor · gap where the last `queue_size` overlaps average `threshold` or more

Codes are decoded, and refreshes foretold, by functions of their own in numpy. Moments in few bits are tested elsewhere.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import lowrank_optim as lo
from tests.oracles.checkpoints import assert_same_run, resume

Array = NDArray[np.float64]

RANK, GAP, LR = 5, 4, 1e-2
BETAS, EPS, DECAY, SCALE = (0.8, 0.95), 1e-3, 0.3, 0.5
SHAPES = {"tall": (40, 24), "wide": (24, 40), "square": (32, 32)}

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
both_widths = pytest.mark.parametrize("bits", [8, 4])


def gradients(shape: tuple[int, ...], steps: int, seed: int = 0, wander: float = 0.05) -> list[Array]:
    """Gradients with a clear spectrum, singular vectors that wander, and a size that changes."""
    rng = np.random.default_rng(seed)
    short = min(shape)
    u, v = (np.linalg.qr(rng.normal(size=(side, short)))[0] for side in shape)
    values = 1.2 ** -np.arange(short)
    out = []
    for _ in range(steps):
        u, v = (np.linalg.qr(x + wander * rng.normal(size=x.shape))[0] for x in (u, v))
        out.append(np.exp(0.5 * rng.normal()) * (u * values) @ v.T)
    return out


def small_weights(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.01).to(dtype)


def start(optimizer: torch.optim.Optimizer, param: nn.Parameter, grad: Array | Tensor) -> None:
    param.grad = torch.as_tensor(grad).to(param.dtype, copy=True)
    optimizer.step()


def decode(state: dict[str, Tensor], bits: int, rank: int, name: str = "basis") -> Array:
    """The basis that packed codes stand for; even columns are in the low halves of bytes."""
    codes = state[name].numpy()
    if bits == 4:
        both = np.zeros((*codes.shape[:-1], 2 * codes.shape[-1]), dtype=np.uint8)
        both[..., 0::2], both[..., 1::2] = codes % 16, codes // 16
        codes = both[..., :rank]
    group = np.arange(rank) // 256
    scale, zero = (state[f"{name}_{part}"].numpy()[..., group] for part in ("scale", "zero"))
    return (zero + codes.astype(np.float32) * scale).astype(np.float64)  # float32 arithmetic, as documented


# --- packed bases -------------------------------------------------------------------------------------------------------------


@both_widths
@pytest.mark.parametrize(
    ("shape", "rank"), [((40, 24), 5), ((24, 40), 8), ((300, 280), 257), ((3, 40, 24), 7), ((270, 600), 256)], ids=str
)
def test_a_packed_basis_has_exactly_the_bytes_of_the_formula(shape: tuple[int, ...], rank: int, bits: int) -> None:
    param = nn.Parameter(torch.zeros(shape))
    optimizer = lo.GaLoreAdamW([param], rank=rank, basis_bits=bits)
    batch, short, long = math.prod(shape[:-2]), min(shape[-2:]), max(shape[-2:])
    expected = batch * short * (math.ceil(rank * bits / 8) + 8 * math.ceil(rank / 256))

    def check() -> None:
        sizes = lo.state_bytes(optimizer)
        assert sizes["basis"] + sizes["basis_scale"] + sizes["basis_zero"] == expected
        assert sum(sizes.values()) == expected + 8 * batch * long * rank + 12
        state = optimizer.state[param]
        assert state["basis"].dtype == torch.uint8
        for name in ("basis", "basis_scale", "basis_zero"):
            assert state[name].untyped_storage().nbytes() == state[name].nbytes

    check()
    start(optimizer, param, torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    check()


@both_widths
def test_both_bases_of_a_two_sided_projection_are_packed(bits: int) -> None:
    param = nn.Parameter(torch.zeros(40, 24))
    sizes = lo.state_bytes(lo.GaLoreAdamW([param], rank=5, basis_bits=bits, proj_type="full"))
    total = sum(size for name, size in sizes.items() if name.startswith("basis"))
    assert total == (40 + 24) * (math.ceil(5 * bits / 8) + 8)


def test_sixteen_bits_are_bfloat16() -> None:
    param = nn.Parameter(torch.zeros(40, 24))
    optimizer = lo.GaLoreAdamW([param], rank=RANK, basis_bits=16, projector="svd")
    start(optimizer, param, gradients((40, 24), 1)[0])
    basis = optimizer.state[param]["basis"]
    assert basis.dtype == torch.bfloat16
    exact = torch.linalg.svd(torch.from_numpy(gradients((40, 24), 1)[0]).float())[2][:RANK].T
    assert torch.equal(basis, exact.bfloat16())


@both_widths
@pytest.mark.parametrize(("shape", "rank"), [((40, 24), 5), ((24, 40), 7), ((32, 32), 6), ((280, 300), 257)], ids=str)
def test_codes_are_the_nearest_to_the_exact_basis(shape: tuple[int, int], rank: int, bits: int) -> None:
    param = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = lo.GaLoreAdamW([param], rank=rank, basis_bits=bits, projector="svd")
    grad = gradients(shape, 1)[0] if rank < 100 else np.random.default_rng(0).normal(size=shape)
    start(optimizer, param, grad)
    u, _, vt = np.linalg.svd(grad, full_matrices=False)
    exact = vt[:rank].T if shape[0] >= shape[1] else u[:, :rank]
    state = optimizer.state[param]
    decoded = decode(state, bits, rank)
    exact = exact * np.sign((exact * decoded).sum(0))
    step = state["basis_scale"].double().numpy()[:, np.arange(rank) // 256]
    assert np.abs(decoded - exact).max() > 0
    assert (np.abs(decoded - exact) <= 0.5 * step * (1 + 1e-4) + 1e-7).all()
    for first in range(0, rank, 256):  # each group between its own least and greatest element
        part = exact[:, first : first + 256]
        np.testing.assert_allclose(step[:, first], (part.max(1) - part.min(1)) / (2**bits - 1), rtol=1e-4, atol=1e-9)


@both_widths
@pytest.mark.parametrize("policy", ["keep", "reset", "rotate"])
@every_shape
def test_the_step_uses_the_decoded_basis_and_nothing_else(shape: tuple[int, int], policy: str, bits: int) -> None:
    begin = small_weights(shape)
    param = nn.Parameter(begin.clone())
    common = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, "scale": SCALE, "rank": RANK}
    optimizer = lo.GaLoreAdamW(
        [param], update_proj_gap=GAP, stagger=False, basis_bits=bits, on_refresh=policy, **common
    )
    right = shape[0] >= shape[1]
    weight = (begin if right else begin.T).numpy()
    basis, m, v, t = None, 0.0, 0.0, 0
    for step, grad in enumerate(gradients(shape, 5 * GAP)):
        start(optimizer, param, grad)
        if step % GAP == 0:
            old, basis = basis, decode(optimizer.state[param], bits, RANK)
            if policy == "reset" or old is None:
                m, v, t = 0.0, 0.0, 0
            elif policy == "rotate":
                # Coordinates r with P_old r as close as possible to P_new r': neither basis is orthonormal.
                c = np.linalg.solve(old.T @ old, old.T @ basis)
                m_hat, v_hat = m / (1 - BETAS[0] ** t), v / (1 - BETAS[1] ** t)
                v = np.abs((1 - BETAS[1] ** t) * ((v_hat - m_hat**2) @ c**2 + (m_hat @ c) ** 2))
                m = m @ c
        t += 1
        r = (grad if right else grad.T) @ basis
        m, v = BETAS[0] * m + (1 - BETAS[0]) * r, BETAS[1] * v + (1 - BETAS[1]) * r**2
        n = m / (1 - BETAS[0] ** t) / (np.sqrt(v / (1 - BETAS[1] ** t)) + EPS)
        weight = (1 - LR * DECAY) * weight - LR * SCALE * n @ basis.T
    ours = param.detach() if right else param.detach().T
    change = np.linalg.norm(weight - (begin if right else begin.T).numpy())
    assert np.linalg.norm(ours.numpy() - weight) < 1e-10 * change


def sensing_error(build: Any, steps: int, count: int) -> float:
    """Mean of ‖X − X*‖/‖X*‖ after training a stack of `count` matrices X, each on Gaussian measurements of one of rank 3."""
    targets, squares = [], []
    for seed in range(count):
        rng = torch.Generator().manual_seed(seed)
        targets.append(torch.randn(24, 3, generator=rng) @ torch.randn(3, 16, generator=rng))
        operator = torch.randn(2 * 384, 384, generator=rng) / (2 * 384) ** 0.5
        squares.append(operator.T @ operator)
    target, square = (torch.stack(each) if count > 1 else each[0] for each in (targets, squares))
    param = nn.Parameter(torch.zeros_like(target))
    optimizer = build(param)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    for _ in range(steps):
        off = (param.detach() - target).flatten(-2).unsqueeze(-1)
        start(optimizer, param, (square @ off).view_as(target))
        decay.step()
    return float(((param.detach() - target).norm(dim=(-2, -1)) / target.norm(dim=(-2, -1))).mean())


@pytest.mark.long
@pytest.mark.parametrize("kind", [lo.GaLoreAdamW, lo.FiraAdamW, lo.FrugalAdamW, lo.LDAdamW])
def test_training_converges_as_well_whatever_the_bits_of_the_basis(kind: type[lo.LowRankOptimizer]) -> None:
    # FRUGAL's signs make chaos of a last bit: one run tells nothing (the ratio of two has a spread of a factor of 2), the mean does.
    count = 30 if kind is lo.FrugalAdamW else 1
    errors = {}
    for bits in (32, 16, 8, 4):
        options: dict[str, Any] = {"rank": 5, "lr": 0.1, "weight_decay": 0.0, "basis_bits": bits, "scale": 1.0}
        if kind is lo.FrugalAdamW:
            options |= {"projector": "randomized_svd", "residual_lr_scale": 0.2}
        if kind is not lo.LDAdamW:
            options["update_proj_gap"] = 10
        errors[bits] = sensing_error(lambda p, options=options: kind([p], **options), 200, count)
    assert errors[32] < 0.4
    assert max(errors.values()) < 1.2 * errors[32]


@every_shape
@pytest.mark.parametrize("released", [False, True], ids=["paper", "released"])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_firas_limiter_works_with_the_true_norm_of_the_residual(
    shape: tuple[int, int], released: bool, bits: int
) -> None:
    param = nn.Parameter(small_weights(shape))
    alpha = 0.25
    optimizer = lo.FiraAdamW(
        [param], rank=RANK, lr=LR, eps=1e-12, scale=alpha, basis_bits=bits, match_reference=released
    )
    grad = gradients(shape, 1)[0]
    start(optimizer, param, grad)
    state = optimizer.state[param]
    basis = state["basis"].double().numpy() if bits == 16 else decode(state, bits, RANK)
    g = grad if shape[0] >= shape[1] else grad.T
    r = g @ basis
    # The first direction of Adam is the sign; in the released form m/√v, which is (1−β₁)/√(1−β₂) times the sign.
    n = np.sqrt(RANK) * (0.1 / 0.001**0.5 if released else 1.0)
    phi = n / np.linalg.norm(r, axis=1, keepdims=True)
    outside = g - (alpha if released else 1.0) * r @ basis.T
    explicit = np.linalg.norm(phi * outside)
    assert float(state["limiter_norm"]) == pytest.approx(explicit, rel=1e-6)
    if bits == 4 and not released:  # P Pᵀ is no projection
        naive = np.sqrt((phi**2 * ((g**2).sum(1) - (r**2).sum(1))[:, None]).sum())
        assert abs(naive - explicit) > 1e-3 * explicit


# --- overlap ------------------------------------------------------------------------------------------------------------------


def basis_of(matrix: Array, side: str = "right") -> Any:
    rows, cols = (len(matrix), 50) if side == "left" else (50, len(matrix))
    projector = lo.SVD()
    space = projector.space((rows, cols), matrix.shape[1], side, torch.float64)
    return projector.basis(space, {"basis": torch.from_numpy(matrix)}, 0, torch.device("cpu"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_overlap_knows_no_signs_no_order_and_no_rotation_of_the_vectors(side: str) -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(30, 6)))[0]
    turned = basis @ np.linalg.qr(rng.normal(size=(6, 6)))[0]
    for other in (basis, -basis, basis * [1, -1, 1, 1, -1, -1], basis[:, ::-1].copy(), turned):
        assert float(basis_of(other, side).overlap(basis_of(basis, side))) == pytest.approx(1.0, abs=1e-12)
    whole = np.linalg.qr(rng.normal(size=(30, 12)))[0]
    for shared in range(7):  # subspaces that share so many of six dimensions
        other = whole[:, 6 - shared : 12 - shared]
        assert float(basis_of(other, side).overlap(basis_of(whole[:, :6].copy(), side))) == pytest.approx(shared / 6)


def expected_refreshes(
    bases: list[Array], gap: int, threshold: float, queue_size: int, factor: float, offset: int = 0
) -> list[tuple[int, int, list[float]]]:
    """(last refresh, gap, overlaps so far) after each step; `bases` is what a refresh on that step would find."""
    out: list[tuple[int, int, list[float]]] = []
    last, overlaps = 0, []
    for step in range(len(bases)):
        # A refresh on every step s with s + offset a multiple of the current gap; the first on step 0.
        if step > 0 and (step + offset) % gap == 0:
            overlaps.append(float(((bases[last].T @ bases[step]) ** 2).sum()) / bases[step].shape[1])
            last = step
            if len(overlaps) >= queue_size and np.mean(overlaps[-queue_size:]) >= threshold:
                gap = int(gap * factor)
        out.append((last, gap, list(overlaps)))
    return out


def leading(grads: list[Array]) -> list[Array]:
    """Bases of an exact SVD."""
    right = grads[0].shape[0] >= grads[0].shape[1]
    svds = [np.linalg.svd(grad, full_matrices=False) for grad in grads]
    return [vt[:RANK].T if right else u[:, :RANK] for u, _, vt in svds]


def lazy(params: list[nn.Parameter], **options: Any) -> lo.GaLoreAdamW:
    common = {"rank": RANK, "lr": 1e-3, "projector": "svd", "update_proj_gap": GAP, "overlap_threshold": 0.4}
    return lo.GaLoreAdamW(params, **{**common, **options})


def check_schedule(state: dict[str, Tensor], expected: tuple[int, int, list[float]], queue_size: int) -> None:
    last, gap, overlaps = expected
    assert int(state["last_refresh"]) == last
    assert int(state["gap"]) == gap
    kept = state["overlaps"].tolist()
    assert len(kept) == queue_size
    recent = overlaps[-queue_size:]
    empty = queue_size - len(recent)
    assert all(not value >= 0.0 for value in kept[:empty])  # no overlap: there was none yet
    assert kept[empty:] == pytest.approx(recent, abs=1e-5)


def sequence(kind: str, shape: tuple[int, int], steps: int) -> list[Array]:
    still = gradients(shape, steps, wander=0.003)
    moving = [gradients(shape, 1, seed=100 + step)[0] for step in range(steps)]
    return {
        "still": still,
        "moving": moving,
        "settles": moving[: steps // 3] + still[steps // 3 :],
        "leaves": still[: steps // 3] + moving[steps // 3 :],
        "drifts": gradients(shape, steps, wander=0.04),
    }[kind]


@pytest.mark.parametrize(
    ("threshold", "queue_size", "factor"), [(0.4, 5, 2.0), (0.9, 1, 1.5), (0.75, 3, 3.0), (0.0, 2, 1.0)]
)
@pytest.mark.parametrize("kind", ["still", "moving", "settles", "leaves", "drifts"])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)], ids=["tall", "wide"])
def test_the_gap_grows_only_where_the_last_overlaps_average_the_threshold(
    shape: tuple[int, int], kind: str, threshold: float, queue_size: int, factor: float
) -> None:
    grads = sequence(kind, shape, 60)
    params = [nn.Parameter(small_weights(shape)) for _ in range(2)]
    optimizer = lazy(params, update_proj_gap=2, overlap_threshold=threshold, queue_size=queue_size, gap_factor=factor)
    bases = leading(grads)
    # Refreshes are staggered: the second of two parameters has its own one step earlier.
    expected = [expected_refreshes(bases, 2, threshold, queue_size, factor, offset) for offset in (0, 1)]
    for step, grad in enumerate(grads):
        for param in params:
            param.grad = torch.from_numpy(grad)
        optimizer.step()
        for param, each in zip(params, expected, strict=True):
            check_schedule(optimizer.state[param], each[step], queue_size)
    if threshold == 0.4:
        grown = int(optimizer.state[params[0]]["gap"]) > 2
        assert grown == (kind != "moving")


def test_refreshes_are_on_multiples_of_the_current_gap_and_the_queue_outlives_a_doubling() -> None:
    grads = sequence("still", (40, 24), 70)
    param = nn.Parameter(small_weights((40, 24)))
    optimizer = lazy([param], update_proj_gap=2)
    refreshes = []
    for step, grad in enumerate(grads):
        start(optimizer, param, grad)
        if int(optimizer.state[param]["last_refresh"]) == step:
            refreshes.append(step)
    # Five overlaps are known at step 10: gaps 4, 8, 16, 32, 64 from then on.
    assert refreshes == [0, 2, 4, 6, 8, 10, 12, 16, 32, 64]


@pytest.mark.parametrize("released", [False, True], ids=["aligned signs", "free signs"])
def test_singular_vectors_that_change_sign_and_order_in_a_fixed_subspace_count_as_standing_still(
    released: bool,
) -> None:
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(side, RANK)))[0] for side in (40, 24))
    param = nn.Parameter(small_weights((40, 24)))
    optimizer = lazy([param], update_proj_gap=1, queue_size=3, match_reference=released)
    firsts = []
    for _ in range(4):
        values = rng.permutation(np.arange(1.0, RANK + 1)) * rng.choice([-1, 1], size=RANK)
        start(optimizer, param, (u * values) @ v.T)
        firsts.append(optimizer.state[param]["basis"][:, 0].clone())
    cosines = [abs(float(a @ b)) for a, b in itertools.pairwise(firsts)]
    assert np.mean(cosines) < 0.4  # the first vectors alone would say that it moves
    assert optimizer.state[param]["overlaps"].tolist() == pytest.approx([1.0] * 3, abs=1e-6)
    assert int(optimizer.state[param]["gap"]) == 2


@both_widths
def test_overlaps_of_packed_bases_are_those_of_the_bases_but_for_their_rounding(bits: int) -> None:
    grads = sequence("drifts", (40, 24), 9)
    param = nn.Parameter(small_weights((40, 24)))
    optimizer = lazy([param], update_proj_gap=4, queue_size=2, basis_bits=bits)
    decoded = []
    for step, grad in enumerate(grads):
        start(optimizer, param, grad)
        if step % 4 == 0:
            decoded.append(decode(optimizer.state[param], bits, RANK))
    overlaps = [((a.T @ b) ** 2).sum() / RANK for a, b in itertools.pairwise(decoded)]
    assert optimizer.state[param]["overlaps"].tolist() == pytest.approx([min(x, 1.0) for x in overlaps], abs=1e-5)
    bases = leading(grads)
    exact = [((bases[i].T @ bases[i + 4]) ** 2).sum() / RANK for i in (0, 4)]
    assert overlaps == pytest.approx(exact, abs=0.01 if bits == 8 else 0.1)


def test_overlaps_of_both_sides_and_of_a_stack_are_averaged() -> None:
    grads = gradients((40, 24), 2, wander=0.04)
    param = nn.Parameter(small_weights((40, 24)))
    optimizer = lazy([param], update_proj_gap=1, queue_size=1, proj_type="full")
    for grad in grads:
        start(optimizer, param, grad)
    sides = []
    for transpose in (False, True):
        old, new = (np.linalg.svd(g.T if transpose else g, full_matrices=False)[0][:, :RANK] for g in grads)
        sides.append(((old.T @ new) ** 2).sum() / RANK)
    assert float(optimizer.state[param]["overlaps"]) == pytest.approx(np.mean(sides), abs=1e-6)
    assert abs(sides[0] - sides[1]) > 1e-3

    stacks = [np.stack(pair) for pair in zip(grads, gradients((40, 24), 2, seed=7, wander=0.2), strict=True)]
    param = nn.Parameter(small_weights((2, 40, 24)))
    optimizer = lazy([param], update_proj_gap=1, queue_size=1)
    for stack in stacks:
        start(optimizer, param, stack)
    experts = []
    for i in range(2):
        old, new = leading([stack[i] for stack in stacks])
        experts.append(((old.T @ new) ** 2).sum() / RANK)
    assert float(optimizer.state[param]["overlaps"]) == pytest.approx(np.mean(experts), abs=1e-6)


def test_a_refresh_that_fails_leaves_the_queue_alone_and_is_tried_again() -> None:
    grads = sequence("still", (40, 24), 10)
    param = nn.Parameter(small_weights((40, 24)))
    optimizer = lazy([param], update_proj_gap=4)
    for step, grad in enumerate(grads):
        start(optimizer, param, np.zeros_like(grad) if step == 4 else grad)
        if step == 4:
            assert not (optimizer.state[param]["overlaps"] >= 0.0).any()
            assert int(optimizer.state[param]["last_refresh"]) == 0
    assert int(optimizer.state[param]["last_refresh"]) == 8
    assert (optimizer.state[param]["overlaps"] >= 0.0).sum() == 2  # of steps 5 and 8


# --- checkpoints --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("projector", "policy"), [("randomized_svd", "keep"), ("svd", "rotate"), ("randomized_svd", "reset")]
)
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_resume_is_exact_to_the_bit_with_the_queue_and_the_gap(
    bits: int, policy: str, projector: str, dtype: torch.dtype
) -> None:
    shapes = ((40, 24), (24, 40), (3, 20, 16))
    steps, middle = 26, 13

    def fresh() -> tuple[list[nn.Parameter], lo.GaLoreAdamW]:
        params = [nn.Parameter(small_weights(shape, dtype)) for shape in shapes]
        options = {"basis_bits": bits, "on_refresh": policy, "projector": projector, "queue_size": 3}
        return params, lazy(params, update_proj_gap=2, **options)

    everything = [[np.broadcast_to(g, shape) for g in sequence("still", shape[-2:], steps)] for shape in shapes]

    def run(optimizer: lo.GaLoreAdamW, params: list[nn.Parameter], first: int, last: int) -> None:
        for step in range(first, last):
            for param, grads in zip(params, everything, strict=True):
                param.grad = torch.tensor(grads[step]).to(dtype)
            optimizer.step()

    whole, uninterrupted = fresh()
    run(uninterrupted, whole, 0, steps)
    params, saved = fresh()
    run(saved, params, 0, middle)
    assert 2 < int(saved.state[params[0]]["gap"]) < int(uninterrupted.state[whole[0]]["gap"])
    second, resumed = fresh()
    resume(saved, params, resumed, second)
    run(resumed, second, middle, steps)
    assert_same_run(uninterrupted, whole, resumed, second)


def test_a_checkpoint_of_other_bits_or_without_the_queue_is_refused() -> None:
    param = nn.Parameter(torch.zeros(40, 24))
    saved = lazy([param], basis_bits=4).state_dict()
    with pytest.raises(ValueError, match="basis_bits is 4 in the checkpoint, 8 here"):
        lazy([param], basis_bits=8).load_state_dict(saved)
    with pytest.raises(ValueError, match="the checkpoint has gap, overlaps besides"):
        lazy([param], basis_bits=4, overlap_threshold=None).load_state_dict(saved)


# --- bad input ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis_bits": 3}, "basis_bits is 3; valid values are 32, 16, 8, 4"),
        ({"overlap_threshold": 1.5}, "overlap_threshold is 1.5; it must be None or a number in [0, 1]"),
        ({"overlap_threshold": -0.1}, "overlap_threshold is -0.1; it must be None or a number in [0, 1]"),
        ({"overlap_threshold": 0.4, "queue_size": 0}, "queue_size is 0; it must be an int of at least 1"),
        ({"overlap_threshold": 0.4, "queue_size": 2.5}, "queue_size is 2.5; it must be an int of at least 1"),
        ({"overlap_threshold": 0.4, "gap_factor": 0.5}, "gap_factor is 0.5; it must be a finite number of at least 1"),
        ({"overlap_threshold": 0.4, "gap_factor": math.inf}, "gap_factor is inf; it must be a finite number"),
    ],
)
def test_values_out_of_range_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        lo.GaLoreAdamW([nn.Parameter(torch.zeros(12, 8))], rank=4, **options)
    assert message in str(error.value)


@pytest.mark.parametrize("option", [{"overlap_threshold": 0.4}, {"basis_bits": 4}, {"basis_bits": 16}], ids=str)
@pytest.mark.parametrize("projector", ["random", "random:gaussian", "coordinate", "coordinate:entries"])
def test_random_subspaces_have_no_basis_to_store_and_none_that_stands_still(
    projector: str, option: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match='projector "randomized_svd" or "svd"'):
        lo.GaLoreAdamW([nn.Parameter(torch.zeros(12, 8))], rank=4, projector=projector, **option)
    with pytest.raises(ValueError, match='projector "randomized_svd" or "svd"'):
        lo.APOLLOAdamW([nn.Parameter(torch.zeros(12, 8))], rank=4, **option)
    with pytest.raises(ValueError, match='projector "randomized_svd" or "svd"'):
        lo.FrugalAdamW([nn.Parameter(torch.zeros(12, 8))], blocks="random", **option)
