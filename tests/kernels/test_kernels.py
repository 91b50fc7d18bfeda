"""The operations of a step against plain float64 arithmetic, for every storage type, layout and way of cutting into chunks."""

import math

import pytest
import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.kernels import compute, reference
from lowrank_optim.kernels.counter_rng import PURPOSE_ROUNDING, make_key

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [F32, F64, BF16]
KEY = make_key(0, 4, 9, PURPOSE_ROUNDING)

# batch, rows, cols, rank: tall, wide, square, stacked; rank 1, well below both sides, equal to the short side.
PROBLEMS = {
    "tall": ((), 57, 23, 5),
    "wide": ((), 23, 57, 5),
    "square": ((), 32, 32, 8),
    "stack": ((3,), 20, 31, 4),
    "rank 1": ((), 40, 24, 1),
    "full rank": ((), 40, 24, 24),
    "stack of rank 1": ((4,), 9, 6, 1),
    "one row": ((), 1, 30, 1),
}
problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=[None, 64], ids=["one chunk", "many chunks"])
def chunks(request, monkeypatch) -> None:
    """Cut low-precision matrices into chunks of a row or two, or not at all."""
    if request.param is not None:
        monkeypatch.setattr(compute, "CHUNK_ELEMENTS", request.param)


def draw(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def contiguous(matrix: Tensor) -> Tensor:
    return matrix.clone(memory_format=torch.contiguous_format)


def transposed(matrix: Tensor) -> Tensor:
    """The same values stored column by column."""
    return matrix.mT.clone(memory_format=torch.contiguous_format).mT


def strided(matrix: Tensor) -> Tensor:
    """The same values as a window of a larger tensor."""
    *batch, rows, cols = matrix.shape
    window = torch.full((*batch, rows + 2, 2 * cols + 3), 777.0, dtype=matrix.dtype)[..., 1:-1, 2:-1:2]
    window.copy_(matrix)
    return window


LAYOUTS = {"contiguous": contiguous, "transposed": transposed, "strided": strided}
layouts = pytest.mark.parametrize("place", LAYOUTS.values(), ids=LAYOUTS)


def unit(dtype: torch.dtype) -> float:
    """Relative spacing of the type's numbers."""
    return torch.finfo(dtype).eps


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """‖actual − expected‖∞ ≤ tolerance · ‖expected‖∞, in float64."""
    assert actual.shape == expected.shape
    error = float((actual.double() - expected).abs().max())
    assert error <= tolerance * float(expected.abs().max()), f"error {error:.3e}"


# -------------------------------------------------------------------------------------------------------------------- project


@layouts
@dtypes
@problems
@pytest.mark.parametrize("side", ["right", "left"])
def test_project_is_the_matrix_product_accumulated_in_the_compute_type(side, problem, dtype, place, chunks):
    batch, rows, cols, rank = problem
    grad = place(draw(1, *batch, rows, cols, dtype=dtype))
    compute = F64 if dtype == F64 else F32
    basis = draw(2, *batch, cols if side == "right" else rows, rank, dtype=compute)
    kept = grad.clone(), basis.clone()
    equation = "...mn,...nr->...mr" if side == "right" else "...mn,...mr->...nr"
    expected = torch.einsum(equation, grad.double(), basis.double())
    reduced = kernels.project(grad, basis, side)
    assert reduced.dtype == compute
    # The gradient's own rounding is in `expected`, so bfloat16 gradients get float32 accuracy.
    assert_near(reduced, expected, 50 * unit(compute))
    assert torch.equal(grad, kept[0])
    assert torch.equal(basis, kept[1])


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize(
    ("setting", "units", "low", "high"),
    [
        ("highest", True, 0.0, 2**-18),
        ("high", True, 0.0, 2**-18),
        ("medium", False, 0.0, 2**-18),
        ("medium", True, 2**-14, 2**-9),
    ],
)
def test_bfloat16_units_are_used_where_the_precision_allows(setting, units, low, high, batch, right, monkeypatch):
    monkeypatch.setenv("LOWRANK_OPTIM_BACKEND", "reference")
    monkeypatch.setattr(reference, "has_bfloat16_units", lambda: units)
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(*batch, 150, 900, generator=generator).to(torch.bfloat16)
    basis = torch.randn(*batch, 900 if right else 150, 40, generator=generator)
    side, matrix = ("right", grad) if right else ("left", grad.mT)
    exact, size = matrix.double() @ basis.double(), matrix.double().abs() @ basis.double().abs()
    default = kernels.project(grad, basis, side)
    if not units:  # torch has such products of float32 matrices, too
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    torch.set_float32_matmul_precision(setting)
    try:
        found = kernels.project(grad, basis, side)
        beside, squares = kernels.project_with_norms(grad, basis, side)
    finally:
        torch.set_float32_matmul_precision("highest")
    for result in (found, beside):
        assert result.dtype == torch.float32
        assert low <= float(((result.double() - exact).abs() / size).max()) <= high
    assert torch.equal(found, default) or setting == "medium"
    torch.testing.assert_close(squares.double(), matrix.double().square().sum(-1, keepdim=True), rtol=1e-5, atol=0)


def test_project_of_float16_gradients_does_not_overflow_in_the_sum():
    grad = torch.full((4, 300), 6e4, dtype=F16)
    reduced = kernels.project(grad, torch.ones(300, 2), "right")
    torch.testing.assert_close(reduced, torch.full((4, 2), 300 * float(grad[0, 0])))


@dtypes
@problems
@pytest.mark.parametrize("side", ["right", "left"])
def test_project_with_norms_gives_the_projection_and_the_squared_norms_of_the_lines(side, problem, dtype, chunks):
    batch, rows, cols, rank = problem
    grad = draw(1, *batch, rows, cols, dtype=dtype)
    compute = F64 if dtype == F64 else F32
    basis = draw(2, *batch, cols if side == "right" else rows, rank, dtype=compute)
    reduced, squares = kernels.project_with_norms(grad, basis, side)
    exact = grad.double()
    assert squares.dtype == compute
    assert_near(squares, (exact * exact).sum(-1 if side == "right" else -2).unsqueeze(-1), 50 * unit(compute))
    oriented = exact if side == "right" else exact.transpose(-1, -2)
    assert_near(reduced, oriented @ basis.double(), 50 * unit(compute))


@pytest.mark.parametrize(("rows", "cols"), [(0, 5), (1, 1), (7, 1), (7, 64), (7, 63), (7, 200), (129, 3), (5, 0)])
def test_row_chunks_cover_every_row_once_and_stay_small(rows, cols, monkeypatch):
    monkeypatch.setattr(compute, "CHUNK_ELEMENTS", 64)
    slices = list(kernels.row_chunks(rows, cols))
    assert [row for s in slices for row in range(rows)[s]] == list(range(rows))
    assert all(s.stop - s.start == 1 or (s.stop - s.start) * cols <= 64 for s in slices)


# ---------------------------------------------------------------------------------------------------------------------- apply


def keep_values(dtype: torch.dtype) -> list[float | Tensor]:
    compute = F64 if dtype == F64 else F32
    return [1.0, 0.875, torch.tensor(0.875, dtype=compute)]


@layouts
@dtypes
@problems
@pytest.mark.parametrize("keep", [0, 1, 2], ids=["keep 1", "keep float", "keep tensor"])
@pytest.mark.parametrize("mask", [False, True], ids=["no mask", "true mask"])
def test_apply_is_decay_plus_low_rank_update(problem, dtype, place, keep, mask, chunks):
    batch, rows, cols, rank = problem
    compute = F64 if dtype == F64 else F32
    weight = place(draw(3, *batch, rows, cols, dtype=dtype))
    left, right = draw(4, *batch, rows, rank, dtype=compute), draw(5, *batch, rank, cols, dtype=compute)
    factor = keep_values(dtype)[keep]
    expected = float(factor) * weight.double() - 0.3 * torch.einsum("...mr,...rn->...mn", left.double(), right.double())
    kernels.apply_(weight, left, right, alpha=0.3, keep=factor, ok=torch.tensor(True) if mask else None)
    assert_near(weight, expected, unit(BF16) / 2 if dtype == BF16 else 50 * unit(dtype))
    if dtype == BF16:  # rounded once, to the nearest: all but those that lie in the middle
        assert int((weight != expected.to(BF16)).sum()) <= 1 + weight.numel() // 200


def test_apply_leaves_the_neighbourhood_of_a_window_alone():
    for dtype in DTYPES:
        storage = torch.full((6, 12), 5.0, dtype=dtype)
        window = storage[1:-1, 1:-1:2]
        compute = F64 if dtype == F64 else F32
        kernels.apply_(window, torch.ones(4, 2, dtype=compute), torch.ones(2, 5, dtype=compute), alpha=1.0, keep=0.5)
        inside = torch.zeros(6, 12, dtype=torch.bool)
        inside[1:-1, 1:-1:2] = True
        assert (storage[~inside] == 5.0).all()
        assert (storage[inside] == 0.5).all()


@layouts
@pytest.mark.parametrize(("dtype", "key"), [(F32, None), (F64, None), (BF16, None), (BF16, KEY)], ids=str)
@pytest.mark.parametrize("shape", [(13, 7), (2, 13, 7), (7,), ()], ids=str)
@pytest.mark.parametrize("keep", [1, 2], ids=["keep float", "keep tensor"])
def test_a_false_mask_leaves_weights_bit_identical(shape, dtype, key, place, keep, chunks):
    compute = F64 if dtype == F64 else F32
    weight = draw(6, *shape, dtype=dtype)
    weight = place(weight) if weight.dim() > 1 else weight
    before, no = weight.clone(), torch.tensor(False)
    kernels.apply_dense_(
        weight, torch.zeros(shape, dtype=compute), alpha=0.3, keep=keep_values(dtype)[keep], ok=no, rounding_key=key
    )
    assert torch.equal(weight, before)
    kernels.decay_(weight, keep_values(dtype)[keep], no)
    assert torch.equal(weight, before)
    if weight.dim() > 1:
        *batch, rows, cols = shape
        left, right = torch.zeros(*batch, rows, 3, dtype=compute), draw(7, *batch, 3, cols, dtype=compute)
        kernels.apply_(weight, left, right, alpha=0.3, keep=keep_values(dtype)[keep], ok=no, rounding_key=key)
        assert torch.equal(weight, before)


@layouts
@dtypes
@pytest.mark.parametrize("shape", [(), (1,), (201,), (13, 17), (3, 13, 7), (2, 3, 4, 5), (0,), (0, 4)], ids=str)
@pytest.mark.parametrize("keep", [0, 1, 2], ids=["keep 1", "keep float", "keep tensor"])
@pytest.mark.parametrize("mask", [False, True], ids=["no mask", "true mask"])
def test_apply_dense_is_decay_plus_step(shape, dtype, place, keep, mask, chunks):
    compute = F64 if dtype == F64 else F32
    weight, direction = draw(8, *shape, dtype=dtype), draw(9, *shape, dtype=compute)
    weight = place(weight) if len(shape) > 1 else weight
    factor = keep_values(dtype)[keep]
    expected = float(factor) * weight.double() - 0.3 * direction.double()
    kernels.apply_dense_(weight, direction, alpha=0.3, keep=factor, ok=torch.tensor(True) if mask else None)
    if weight.numel():
        assert_near(weight, expected, unit(BF16) / 2 if dtype == BF16 else 4 * unit(dtype))


def test_decay_multiplies_where_the_mask_holds():
    for keep in (0.875, torch.tensor(0.875)):
        for ok, factor in ((None, 0.875), (torch.tensor(True), 0.875), (torch.tensor(False), 1.0)):
            weight = draw(10, 5, 6, dtype=F32)
            before = weight.clone()
            kernels.decay_(weight, keep, ok)
            assert torch.equal(weight, before * factor)


# ------------------------------------------------------------------------------------------------------------------- residual


SCALES = {"row": lambda m, n: (m, 1), "column": lambda m, n: (1, n), "matrix": lambda m, n: (1, 1)}


@dtypes
@problems
@pytest.mark.parametrize("sign", [False, True], ids=["gradient", "sign"])
@pytest.mark.parametrize("scale_of", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("subtract", [False, True], ids=["whole", "outside"])
def test_a_residual_adds_the_scaled_gradient_to_the_update(problem, dtype, sign, scale_of, subtract, chunks):
    batch, rows, cols, rank = problem
    compute = F64 if dtype == F64 else F32
    weight, grad = draw(1, *batch, rows, cols, dtype=dtype), draw(2, *batch, rows, cols, dtype=dtype)
    left, right = draw(3, *batch, rows, rank, dtype=compute), draw(4, *batch, rank, cols, dtype=compute)
    phi = draw(5, *batch, *scale_of(rows, cols), dtype=compute)
    taken = draw(6, *batch, rows, rank, dtype=compute) / rank
    extra = grad.double() - (taken.double() @ right.double() if subtract else 0.0)
    near_zero = extra.abs() < 1e-4  # rounding may turn these signs
    extra = extra.sign() if sign else extra
    expected = 0.75 * weight.double() - 0.125 * (left.double() @ right.double() + phi.double() * extra)
    term = reference.ResidualTerm(
        grad, phi, sign=sign, left=taken if subtract else None, right=right if subtract else None
    )
    before = grad.clone()
    kernels.apply_(weight, left, right, alpha=0.125, keep=0.75, residual=term)
    assert torch.equal(grad, before)
    if sign and subtract:
        weight, expected = weight[~near_zero], expected[~near_zero]
    assert_near(weight, expected, unit(BF16) / 2 if dtype == BF16 else 50 * unit(dtype))


@dtypes
@pytest.mark.parametrize("batch", [(), (2,)], ids=["matrix", "stack"])
def test_a_false_mask_keeps_a_nan_residual_out_of_the_weights(batch, dtype, chunks):
    compute = F64 if dtype == F64 else F32
    weight, grad = draw(1, *batch, 13, 7, dtype=dtype), draw(2, *batch, 13, 7, dtype=dtype)
    grad[..., 4, 2] = float("nan")
    before = weight.clone()
    zero = torch.zeros(*batch, 13, 1, dtype=compute)
    no = torch.tensor(False)
    term = reference.ResidualTerm(grad, zero, no)
    right = draw(3, *batch, 3, 7, dtype=compute)
    kernels.apply_(weight, zero.expand(*batch, 13, 3), right, alpha=0.1, keep=0.5, ok=no, residual=term)
    assert torch.equal(weight, before)


# ----------------------------------------------------------------------------------------------------------------------- Adam


def adam_scalar(grads: list[float], beta1: float, beta2: float, eps: float) -> tuple[list[float], float, float]:
    """Kingma and Ba's Algorithm 1 on one number: the directions, and the last moments."""
    m = v = 0.0
    directions = []
    for t, g in enumerate(grads, 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        directions.append((m / (1 - beta1**t)) / (math.sqrt(v / (1 - beta2**t)) + eps))
    return directions, m, v


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95), (0.95, 0.0), (0.0, 0.0)], ids=str)
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
@pytest.mark.parametrize("mask", [False, True], ids=["no mask", "true mask"])
def test_adam_follows_the_published_algorithm(dtype, betas, eps, mask):
    beta1, beta2 = betas
    shape, steps = (6, 5), 12
    grads = [draw(20 + t, *shape, dtype=dtype) * 10.0 ** (t % 4 - 2) for t in range(steps)]
    exp_avg, exp_avg_sq = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    ok = torch.tensor(True) if mask else None
    kept = [g.clone() for g in grads]
    directions = [
        kernels.adam_direct_(g, exp_avg, exp_avg_sq, beta1=beta1, beta2=beta2, eps=eps, step=t, ok=ok)
        for t, g in enumerate(grads, 1)
    ]
    for g, copy in zip(grads, kept, strict=True):
        assert torch.equal(g, copy)
    for i in range(shape[0]):
        for j in range(shape[1]):
            expected, m, v = adam_scalar([float(g[i, j]) for g in grads], beta1, beta2, eps)
            tolerance = 1e-5 if dtype == F32 else 1e-13
            for direction, want in zip(directions, expected, strict=True):
                assert float(direction[i, j]) == pytest.approx(want, rel=tolerance, abs=tolerance)
            assert float(exp_avg[i, j]) == pytest.approx(m, rel=tolerance, abs=tolerance)
            assert float(exp_avg_sq[i, j]) == pytest.approx(v, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_adam_with_a_false_mask_keeps_its_moments_and_gives_no_direction(dtype):
    exp_avg, exp_avg_sq = draw(1, 6, 5, dtype=dtype), draw(2, 6, 5, dtype=dtype).square()
    before = exp_avg.clone(), exp_avg_sq.clone()
    zero, no = torch.zeros(6, 5, dtype=dtype), torch.tensor(False)
    direction = kernels.adam_direct_(zero, exp_avg, exp_avg_sq, beta1=0.9, beta2=0.999, eps=0.0, step=1.0, ok=no)
    assert torch.equal(exp_avg, before[0])
    assert torch.equal(exp_avg_sq, before[1])
    assert torch.equal(direction, zero)


def masked_run(dtype: torch.dtype, ok: Tensor | None) -> list[Tensor]:
    """Three steps of Adam, decay and update of weights in every function that takes a mask."""
    exp_avg, exp_avg_sq = torch.zeros(6, 5, dtype=dtype), torch.zeros(6, 5, dtype=dtype)
    low_rank, dense, decayed = draw(3, 6, 5, dtype=dtype), draw(4, 6, 5, dtype=dtype), draw(5, 6, 5, dtype=dtype)
    right = torch.eye(5, dtype=dtype)
    for t in range(1, 4):
        n = kernels.adam_direct_(
            draw(t, 6, 5, dtype=dtype), exp_avg, exp_avg_sq, beta1=0.9, beta2=0.999, eps=1e-8, step=t, ok=ok
        )
        kernels.apply_(low_rank, n, right, alpha=0.01, keep=1 - 1e-4, ok=ok)
        kernels.apply_dense_(dense, n, alpha=0.01, keep=1 - 1e-4, ok=ok)
        kernels.decay_(decayed, 1 - 1e-4, ok)
    return [exp_avg, exp_avg_sq, low_rank, dense, decayed]


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("default", [F32, F64, BF16], ids=lambda d: f"default {d}")
def test_a_true_mask_changes_nothing_in_any_precision(dtype, default):
    plain = masked_run(dtype, None)
    torch.set_default_dtype(default)
    try:
        masked = masked_run(dtype, torch.tensor(True))
    finally:
        torch.set_default_dtype(F32)
    for a, b in zip(plain, masked, strict=True):
        assert_near(b, a.double(), 8 * unit(dtype))


# -------------------------------------------------------------------------------------------------------- stochastic rounding


def bfloat16_grid() -> Tensor:
    """Every finite bfloat16 in ascending order, as float64 (−0 and 0 are one)."""
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = codes.view(BF16).double()
    return values[torch.isfinite(values)].unique()


GRID = bfloat16_grid()


def neighbours(value: Tensor) -> tuple[Tensor, Tensor]:
    """The next bfloat16 at or below, and at or above, by search in the list of all."""
    value = value.double()
    above = torch.searchsorted(GRID, value)
    below = torch.searchsorted(GRID, value, right=True) - 1
    return GRID[below], GRID[above]


def sample_values() -> Tensor:
    """float32 numbers of every kind: sizes from subnormal to huge, both signs, next to powers of two, on the grid."""
    generator = torch.Generator().manual_seed(0)
    mantissa = torch.rand(400, generator=generator) + 1.0
    exponent = torch.randint(-140, 126, (400,), generator=generator)
    values = (mantissa.double() * torch.pow(2.0, exponent.double())).float()
    edges = torch.tensor([0.0, 1.0, 1.9999999, 2.0, 2.0000002, 1e-40, 1.17e-38, 3.3e38, 0.1, 1 / 3, 255.99999])
    positive = torch.cat([values, edges])
    return torch.cat([positive, -positive])


def test_stochastic_rounding_gives_one_of_the_two_neighbours():
    values = sample_values()
    low, high = neighbours(values)
    seen_low, seen_high = torch.zeros_like(low, dtype=torch.bool), torch.zeros_like(low, dtype=torch.bool)
    for key in range(200):
        rounded = kernels.stochastic_round(values, make_key(0, 0, key, 2), torch.arange(values.numel())).double()
        assert ((rounded == low) | (rounded == high)).all()
        seen_low |= rounded == low
        seen_high |= rounded == high
    inside = (values.double() - low) / (high - low).clamp_min(1e-300)
    typical = (inside > 0.1) & (inside < 0.9)
    assert seen_low[typical].all()
    assert seen_high[typical].all()


def test_stochastic_rounding_is_unbiased_over_keys():
    values = sample_values()
    low, high = neighbours(values)
    p = torch.where(high > low, (values.double() - low) / (high - low), 0.0)
    trials = 3000
    ups = torch.zeros_like(p)
    for key in range(trials):
        rounded = kernels.stochastic_round(values, make_key(1, 2, key, 2), torch.arange(values.numel())).double()
        ups += (rounded == high) & (high > low)
    deviation = (ups - trials * p).abs() / (trials * p * (1 - p) + 1.0).sqrt()
    assert float(deviation.max()) < 5.0
    # … and taken together: no drift towards or away from zero.
    for sign in (1, -1):
        chosen = (values.sign() == sign) & (high > low)
        total, variance = (ups - trials * p)[chosen].sum(), (trials * p * (1 - p))[chosen].sum()
        assert abs(float(total)) < 5 * float(variance.sqrt())


def test_stochastic_rounding_is_unbiased_over_positions():
    n = 1 << 18
    for value in (1.0 + 2.0**-9, -(1.0 + 2.0**-9), 1.0 + 2.0**-16 * 3, 0.1, -3e-5):
        x = torch.full((n,), value)
        rounded = kernels.stochastic_round(x, KEY, torch.arange(n)).double()
        low, high = neighbours(x[:1])
        p = float((x[:1].double() - low) / (high - low))
        ups = int((rounded == high).sum())
        assert abs(ups - n * p) < 5 * math.sqrt(n * p * (1 - p)) + 1


def test_stochastic_rounding_leaves_bfloat16_numbers_infinities_and_nans_alone():
    grid = GRID.float()
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0])
    for key in range(20):
        assert torch.equal(kernels.stochastic_round(grid, make_key(0, 0, key, 2), torch.arange(grid.numel())), grid)
        out = kernels.stochastic_round(special, make_key(0, 0, key, 2), torch.arange(5))
        assert torch.equal(out[:2], special[:2])
        assert torch.isnan(out[2])
        assert torch.equal(out[3:].signbit(), torch.tensor([False, True]))
        # Adding noise to these NaNs would carry into the sign, or take their last bit away and leave an infinity.
        payloads = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
        rounded = kernels.stochastic_round(payloads, make_key(0, 0, key, 2), torch.arange(4))
        assert torch.isnan(rounded.to(BF16)).all()


def test_rounding_keys_decide_the_noise():
    values = draw(1, 4096, dtype=F32)
    positions = torch.arange(4096)
    first = kernels.stochastic_round(values, KEY, positions)
    assert torch.equal(first, kernels.stochastic_round(values, KEY, positions))
    assert not torch.equal(first, kernels.stochastic_round(values, make_key(0, 4, 10, PURPOSE_ROUNDING), positions))
    # Without a dependence on the value: neighbours of one value at one position use one number.
    assert torch.equal(kernels.stochastic_round(-values, KEY, positions), -first)


def test_storing_piecewise_equals_storing_at_once():
    value, start = draw(2, 40, 50, dtype=F32), 2**33 + 11
    whole = torch.empty(40, 50, dtype=BF16)
    kernels.store_(whole, value, KEY, start)
    pieces = torch.empty(40, 50, dtype=BF16)
    for a, b in ((0, 1), (1, 7), (7, 40)):
        kernels.store_(pieces[a:b], value[a:b], KEY, start + a * 50)
    assert torch.equal(whole, pieces)
    spread = strided(torch.zeros(40, 50, dtype=BF16))
    kernels.store_(spread, transposed(value), KEY, start)
    assert torch.equal(spread, whole)
    shifted = torch.empty(40, 50, dtype=BF16)
    kernels.store_(shifted, value, KEY, start + 1)
    assert not torch.equal(shifted, whole)


def test_storing_without_a_key_rounds_to_nearest():
    value = draw(3, 30, 40, dtype=F32)
    target = torch.empty(30, 40, dtype=BF16)
    kernels.store_(target, value, None)
    low, high = neighbours(value)
    distance = torch.minimum(value.double() - low, high - value.double())
    assert torch.equal((target.double() - value.double()).abs(), distance)


def exact_update(batch: tuple[int, ...], rows: int, cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """A bfloat16 weight and factors of small dyadic numbers, so that float32 products are exact in any order."""
    weight = draw(1, *batch, rows, cols, dtype=BF16)
    left = (draw(2, *batch, rows, 3) * 4).round().float() / 512
    right = (draw(3, *batch, 3, cols) * 4).round().float()
    return weight, left, right


@pytest.mark.parametrize("batch", [(), (3,)], ids=["matrix", "stack"])
def test_stochastic_rounding_in_apply_does_not_depend_on_chunks_strides_or_stacking(batch, monkeypatch):
    results = []
    for elements in (1 << 20, 64, 1):
        for place in LAYOUTS.values():
            monkeypatch.setattr(compute, "CHUNK_ELEMENTS", elements)
            weight, left, right = exact_update(batch, 21, 30)
            weight = place(weight)
            kernels.apply_(weight, left, right, alpha=0.25, keep=0.5, rounding_key=KEY)
            results.append(weight)
    for result in results:
        assert torch.equal(result, results[0])
    # The noise is that of the row-major position in the whole stack, on the float32 result.
    weight, left, right = exact_update(batch, 21, 30)
    value = (0.5 * weight.double() - 0.25 * (left.double() @ right.double())).float()
    assert not torch.equal(value, value.to(BF16).float())
    positions = torch.arange(value.numel()).view(value.shape)
    assert torch.equal(kernels.stochastic_round(value, KEY, positions).to(BF16), results[0])


@pytest.mark.parametrize("place", LAYOUTS.values(), ids=LAYOUTS)
def test_stochastic_rounding_in_apply_dense_does_not_depend_on_chunks_or_strides(place, monkeypatch):
    weight, direction = draw(4, 21, 30, dtype=BF16), draw(5, 21, 30, dtype=F32)
    value = (weight.double() - 0.125 * direction.double()).float()
    expected = kernels.stochastic_round(value, KEY, torch.arange(630).view(21, 30)).to(BF16)
    for elements in (1 << 20, 64, 1):
        monkeypatch.setattr(compute, "CHUNK_ELEMENTS", elements)
        target = place(weight)
        kernels.apply_dense_(target, direction, alpha=0.125, keep=1.0, rounding_key=KEY)
        assert torch.equal(target, expected)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_low_precision_weights_never_see_a_working_copy_of_more_than_a_chunk(dtype, monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class LargestFloat(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype in (F32, F64, torch.int64, torch.int32):
                self.largest = max(self.largest, out.untyped_storage().nbytes() // 4)
            return out

    monkeypatch.setattr(compute, "CHUNK_ELEMENTS", 256)
    weight, grad = draw(1, 128, 64, dtype=dtype), draw(2, 128, 64, dtype=dtype)
    basis, core = draw(3, 64, 2, dtype=F32), draw(4, 128, 2, dtype=F32)
    phi, key = torch.ones(128, 1), KEY if dtype == BF16 else None
    with LargestFloat() as watch:
        kernels.project(grad, basis, "right")
        kernels.project(grad, core, "left")
        kernels.project_with_norms(grad, basis, "right")
        kernels.project_with_norms(grad, core, "left")
        term = reference.ResidualTerm(grad, phi, sign=True, left=core, right=basis.mT)
        kernels.apply_(weight, core, basis.mT, alpha=0.1, keep=0.9, rounding_key=key, residual=term)
    assert 0 < watch.largest <= 512  # a chunk of 256 numbers, also as int64 positions; the matrix has 8192


@pytest.mark.parametrize("has_units", [False, True])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_products_of_bfloat16_round_once_with_and_without_units(has_units, layout, monkeypatch):
    monkeypatch.setattr(compute, "MULTIPLIES_BFLOAT16", has_units)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).bfloat16() for shape in ((2, 9, 24), (24, 31)))
    b = b if layout == "rows" else b.mT.contiguous().mT
    found, exact = kernels.product(a, b), a.double() @ b.double()
    assert found.dtype == torch.bfloat16
    assert compute.is_slow_product(a) is not has_units
    assert not compute.is_slow_product(a.float())
    atol = 1e-2 if has_units else 1e-6  # torch may round parts of sums to bfloat16
    assert torch.allclose(found.double(), exact, rtol=1.01 * 2**-8, atol=atol)
