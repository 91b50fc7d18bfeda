"""Subspaces: orthonormal, close to the best, compact, and the same wherever and whenever they are computed.

The yardsticks are numpy's SVD, explicit indexing and explicit products in float64.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import lowrank_optim as lo
from lowrank_optim.kernels.counter_rng import PURPOSE_BASIS, PURPOSE_ROUNDING, make_key
from lowrank_optim.kernels.rounding import stochastic_round
from lowrank_optim.projectors import Basis, GradientTerm, Projector, Refresh, StepParams, SubspaceSpec, from_name
from lowrank_optim.projectors.base import align_signs
from lowrank_optim.projectors.blocks import WholeBasis
from lowrank_optim.projectors.randomized_svd import eigenvectors

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
CPU = torch.device("cpu")
State = dict[str, Tensor]

# shape, rank: tall, wide, square, stacked; rank 1, well below both sides, equal to the short side.
SHAPES = {
    "tall": ((60, 33), 7),
    "wide": ((33, 60), 7),
    "square": ((40, 40), 10),
    "stack": ((3, 30, 18), 5),
    "rank 1": ((40, 25), 1),
    "full rank": ((40, 24), 24),
    "full rank square": ((24, 24), 24),
    "stack of full rank": ((2, 9, 16), 9),
}
shapes = pytest.mark.parametrize(("shape", "rank"), SHAPES.values(), ids=SHAPES)
sides = pytest.mark.parametrize("side", ["right", "left", "full"])
precisions = pytest.mark.parametrize("dtype", [F32, F64], ids=str)
TOLERANCE = {F32: 1e-5, F64: 1e-12}

SPECTRAL = [lo.RandomizedSVD(), lo.SVD(), lo.RandomizedSVD(0, 1, 1)]
spectral = pytest.mark.parametrize("projector", SPECTRAL, ids=lambda p: p.name)
COORDINATE = [lo.Coordinate(), lo.Coordinate("columns"), lo.Coordinate("rows"), lo.Coordinate("entries")]
EVERY = [
    *SPECTRAL,
    lo.SVD(align=False),
    lo.RandomizedSVD(4, 3, 2),
    lo.Random(),
    lo.Random("gaussian"),
    *COORDINATE,
    lo.RandomizedSVD(explore="complement"),
    lo.RandomizedSVD(4, 3, 2, "sample", 0.25),
    lo.DCT(),
]


def draw(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def key(step: int = 0, index: int = 0, seed: int = 0) -> int:
    return make_key(seed, index, step, PURPOSE_BASIS)


def space_of(projector: Projector, grad: Tensor, rank: int, proj_type: str) -> SubspaceSpec:
    return projector.space(tuple(grad.shape), rank, proj_type, F64 if grad.dtype == F64 else F32)


def refreshed(projector: Projector, grads: list[Tensor], rank: int, proj_type: str) -> tuple[SubspaceSpec, State]:
    """The state after one refresh with each gradient, as the optimizer does it."""
    space = space_of(projector, grads[0], rank, proj_type)
    state = projector.init(space, key(), CPU)
    for step, grad in enumerate(grads):
        new = projector.refresh(Refresh(grad, space, state, key(step), first=step == 0))
        assert new is not None
        assert new.keys() == state.keys()
        state = new
    return space, state


def spanned(state: State, side: str) -> list[tuple[str, Tensor]]:
    """(side of the gradient, basis) for every basis in the state."""
    if side == "full":
        return [("left", state["basis"].double()), ("right", state["basis_right"].double())]
    return [(side, state["basis"].double())]


def oriented(grad: Tensor, side: str) -> Tensor:
    """The gradient in float64 with the projected side last."""
    return grad.double() if side == "right" else grad.double().mT


def error_from_identity(basis: Tensor) -> float:
    basis = basis.double()
    return float((basis.mT @ basis - torch.eye(basis.shape[-1], dtype=F64)).abs().max())


def energy(grad: Tensor, basis: Tensor, side: str) -> float:
    """‖G B‖² over that of the best basis of the same rank, the worst in the stack."""
    captured = (oriented(grad, side) @ basis.double()).square().sum((-2, -1))
    values = np.linalg.svd(grad.double().numpy(), compute_uv=False)[..., : basis.shape[-1]]
    return float((captured / torch.as_tensor((values**2).sum(-1))).min())


# --------------------------------------------------------------------------------------------------------------- orthonormal


@shapes
@sides
@precisions
@spectral
def test_bases_are_orthonormal_after_cold_and_warm_refreshes(projector, dtype, side, shape, rank):
    for steps in (1, 2, 4):
        grads = [draw(step, *shape, dtype=dtype) * 10.0 ** (-3 * step) for step in range(steps)]
        space, state = refreshed(projector, grads, rank, side)
        for name, tensor in state.items():
            assert tensor.dtype == dtype, name
            assert torch.isfinite(tensor).all()
            assert error_from_identity(tensor) < TOLERANCE[dtype], name
        basis = projector.basis(space, state, key(), CPU)
        assert basis.project(grads[-1]).shape == projector.reduced_shape(space)


@shapes
@sides
@precisions
@pytest.mark.parametrize("projector", [*SPECTRAL, lo.Random()], ids=lambda p: p.name)
def test_the_basis_before_the_first_gradient_is_orthonormal(projector, dtype, side, shape, rank):
    space = projector.space(shape, rank, side, dtype)
    basis = projector.basis(space, projector.init(space, key(), CPU), key(), CPU)
    parts = [basis.left, basis.right] if side == "full" else [basis.matrix]
    for part in parts:
        assert part.dtype == dtype
        assert error_from_identity(part) < TOLERANCE[dtype]


@spectral
@sides
@pytest.mark.parametrize("steps", [1, 3])
def test_stored_bases_are_compact_in_memory(projector, side, steps):
    for shape, rank in SHAPES.values():
        _, state = refreshed(projector, [draw(s, *shape, dtype=F32) for s in range(steps)], rank, side)
        for name, tensor in state.items():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name


@spectral
@sides
def test_a_refresh_modifies_neither_the_gradient_nor_the_state(projector, side):
    grads = [draw(0, 30, 20, dtype=F32), draw(1, 30, 20, dtype=F32)]
    space, state = refreshed(projector, grads[:1], 5, side)
    before = {name: tensor.clone() for name, tensor in state.items()}
    kept = grads[1].clone()
    projector.refresh(Refresh(grads[1], space, state, key(1), first=False))
    assert torch.equal(grads[1], kept)
    for name, tensor in state.items():
        assert torch.equal(tensor, before[name])


# -------------------------------------------------------------------------------------------------------------------- energy


def slow_decay(seed: int, rows: int, cols: int, noise: float) -> Tensor:
    """Singular values k^-0.7, plus white noise with `noise` times the Frobenius norm."""
    short = min(rows, cols)
    u, v = torch.linalg.qr(draw(seed, rows, short)).Q, torch.linalg.qr(draw(seed + 1, cols, short)).Q
    signal = (u * torch.arange(1, short + 1, dtype=F64) ** -0.7) @ v.T
    extra = draw(seed + 2, rows, cols)
    return signal + noise * extra * (signal.norm() / extra.norm())


ENERGY_SHAPES = {"tall": (300, 160, 40), "wide": (160, 300, 40), "square": (200, 200, 50), "low rank": (300, 160, 8)}
energy_shapes = pytest.mark.parametrize(("rows", "cols", "rank"), ENERGY_SHAPES.values(), ids=ENERGY_SHAPES)


@energy_shapes
@pytest.mark.parametrize("side", ["right", "left", "full"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_cold_randomized_basis_has_99_percent_of_the_best_energy(dtype, side, rows, cols, rank):
    for seed in range(3):
        grad = slow_decay(10 * seed, rows, cols, 0.2).to(dtype)
        _, state = refreshed(lo.RandomizedSVD(), [grad], rank, side)
        for which, basis in spanned(state, side):
            assert energy(grad, basis, which) > 0.99


@energy_shapes
@pytest.mark.parametrize("side", ["right", "left", "full"])
@pytest.mark.parametrize(
    ("projector", "turn"),
    [
        (lo.RandomizedSVD(), 0.05),
        (lo.RandomizedSVD(), 0.2),
        (lo.RandomizedSVD(8, 2, 2), 0.5),
        (lo.RandomizedSVD(8, 2, 2), 1.0),
    ],
    ids=["slow drift", "drift", "fast drift, 2 warm iterations", "another gradient, 2 warm iterations"],
)
def test_a_warm_randomized_basis_has_99_percent_of_the_best_energy(projector, turn, side, rows, cols, rank):
    # Every refresh mixes in a gradient of the same spectrum and other directions; 1 replaces the whole.
    for seed in range(2):
        grads = [slow_decay(100 * seed, rows, cols, 0.1)]
        for step in range(1, 4):
            new = slow_decay(100 * seed + 10 * step, rows, cols, 0.1)
            grads.append(math.sqrt(1 - turn**2) * grads[-1] + turn * new)
        _, state = refreshed(projector, [g.to(F32) for g in grads], rank, side)
        for which, basis in spanned(state, side):
            assert energy(grads[-1], basis, which) > 0.99


def test_more_rounds_find_what_one_round_misses():
    grad = slow_decay(0, 300, 160, 0.2)
    found = []
    for rounds in (1, 2, 4):
        _, state = refreshed(lo.RandomizedSVD(8, rounds, 1), [grad.to(F32)], 40, "right")
        found.append(energy(grad, state["basis"], "right"))
    assert found[0] < 0.98 < found[1] < found[2] <= 1.0 + 1e-6


@shapes
@sides
@precisions
def test_svd_spans_what_numpys_singular_vectors_span(dtype, side, shape, rank):
    grads = [draw(5, *shape, dtype=dtype), draw(6, *shape, dtype=dtype)]
    _, state = refreshed(lo.SVD(), grads, rank, side)
    u, _, vt = np.linalg.svd(grads[-1].double().numpy(), full_matrices=False)
    exact = {"left": torch.from_numpy(u[..., :rank]), "right": torch.from_numpy(vt[..., :rank, :]).mT}
    for which, basis in spanned(state, side):
        # Column by column: the order is that of the singular values.
        cosines = (basis * exact[which]).sum(-2).abs()
        assert float(cosines.min()) > 1 - 1e2 * TOLERANCE[dtype]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("steps", [1, 3])
def test_randomized_columns_come_in_the_order_of_the_singular_values(side, steps):
    singular = 2.0 ** -torch.arange(30, dtype=F64)
    grad = (torch.linalg.qr(draw(1, 50, 30)).Q * singular) @ torch.linalg.qr(draw(2, 30, 30)).Q.T
    _, state = refreshed(lo.RandomizedSVD(), [grad.to(F32)] * steps, 6, side)
    lengths = torch.linalg.vector_norm(oriented(grad, side) @ state["basis"].double(), dim=0)
    torch.testing.assert_close(lengths, singular[:6], rtol=1e-3, atol=0)


# ------------------------------------------------------------------------------------------------------ unpleasant gradients


def few_entries(rows: int, cols: int, count: int = 4, seed: int = 0) -> Tensor:
    """Zero but for some entries, as for inputs that are nearly always off."""
    generator = torch.Generator().manual_seed(seed)
    where = torch.randperm(rows, generator=generator)[:count], torch.randperm(cols, generator=generator)[:count]
    grad = torch.zeros(rows, cols, dtype=F64)
    grad[where] = (1.0 + draw(seed, count).abs()) * 4.0 ** -torch.arange(count, dtype=F64)
    return grad


def some_rows(rows: int, cols: int) -> Tensor:
    grad = draw(3, rows, cols)
    grad[3:] = 0.0
    return grad


def some_columns(rows: int, cols: int) -> Tensor:
    grad = draw(4, rows, cols)
    grad[:, 3:] = 0.0
    return grad


DEFICIENT = {
    "rank 1": lambda m, n: draw(0, m, 1) @ draw(1, 1, n),
    "rank 1 in one column": lambda m, n: draw(0, m, 1) @ torch.eye(n, dtype=F64)[5:6],
    "rank 3": lambda m, n: draw(0, m, 3) @ draw(1, 3, n),
    "three rows": some_rows,
    "three columns": some_columns,
    "duplicated columns": lambda m, n: draw(2, m, 3).repeat(1, n // 3 + 1)[:, :n],
    "duplicated rows": lambda m, n: draw(2, 3, n).repeat(m // 3 + 1, 1)[:m],
    "four entries": few_entries,
    "four other entries": lambda m, n: few_entries(m, n, 4, seed=1),
    "one entry": lambda m, n: few_entries(m, n, 1),
    "ones": lambda m, n: torch.ones(m, n, dtype=F64),
}
DEFICIENT_SHAPES = [((40, 24), 8), ((24, 40), 8), ((64, 64), 16), ((100, 80), 40), ((40, 24), 24), ((9, 30), 1)]


@pytest.mark.parametrize("kind", DEFICIENT)
@sides
@spectral
def test_rank_deficient_gradients_give_an_orthonormal_basis_that_contains_their_range(projector, side, kind):
    for shape, rank in DEFICIENT_SHAPES:
        for scale in (1.0, 1e-8, 1e-16, 1e8):
            if rank == 1 and not (kind.startswith("rank 1") or kind in ("one entry", "ones")):
                continue
            grad = (DEFICIENT[kind](*shape) * scale).to(F32)
            # The first refresh, the same gradient again and again, and after one of full rank.
            for grads in ([grad], [grad] * 4, [draw(9, *shape, dtype=F32), grad, grad]):
                _, state = refreshed(projector, grads, rank, side)
                where = f"{shape} rank {rank} scale {scale} after {len(grads)}"
                for which, basis in spanned(state, side):
                    assert torch.isfinite(basis).all(), where
                    assert error_from_identity(basis) < TOLERANCE[F32], where
                    g = oriented(grad, which)
                    assert float((g - g @ basis @ basis.mT).norm() / g.norm()) < 1e-4, where


@spectral
@sides
def test_a_basis_found_from_a_deficient_gradient_finds_a_full_one_again(projector, side):
    narrow, wide = few_entries(64, 48).to(F32), slow_decay(0, 64, 48, 0.1).to(F32)
    _, state = refreshed(projector, [narrow] * 3 + [wide] * 3, 12, side)
    for which, basis in spanned(state, side):
        assert energy(wide, basis, which) > 0.98


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-18, 1e-12, 1.0, 1e12, 1e17])
@sides
@spectral
def test_the_size_of_the_gradient_does_not_matter(projector, side, scale):
    grad = slow_decay(3, 90, 60, 0.1)
    small = (grad * scale / grad.abs().max()).to(F32)
    space = space_of(projector, small, 12, side)
    state = projector.init(space, key(), CPU)
    for step in range(3):
        new = projector.refresh(Refresh(small, space, state, key(step), first=step == 0))
        if new is None:  # smaller than float32 can take the norm of: no basis, and none that is wrong
            assert scale < 1e-18
            return
        state = new
        for which, basis in spanned(state, side):
            assert error_from_identity(basis) < TOLERANCE[F32]
            assert energy(grad, basis, which) > (0.98 if "0,1,1" not in projector.name else 0.8)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@spectral
def test_a_gradient_that_is_zero_or_not_finite_gives_no_basis(projector, dtype, value):
    grad = torch.zeros(20, 12, dtype=dtype)
    grad[3, 4] = value
    space = space_of(projector, grad, 4, "std")
    state = projector.init(space, key(), CPU)
    assert projector.refresh(Refresh(grad, space, state, key(), first=True)) is None
    assert (
        projector.refresh(
            Refresh(grad.expand(2, 20, 12), space_of(projector, grad.expand(2, 20, 12), 4, "std"), {}, 0, True)
        )
        is None
    )


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("value", [0.0, float("nan"), -float("inf")])
@sides
@spectral
def test_experts_without_a_usable_gradient_keep_their_basis_and_do_not_disturb_the_others(
    projector, side, value, first
):
    earlier, now = draw(1, 4, 30, 18, dtype=F32), draw(2, 4, 30, 18, dtype=F32)
    if value == 0.0:
        now[1] = 0.0
    else:
        now[1, 5, 6] = value
    space = space_of(projector, now, 5, side)
    state = projector.init(space, key(), CPU)
    if not first:
        state = projector.refresh(Refresh(earlier, space, state, key(), first=True))
    new = projector.refresh(Refresh(now, space, state, key(7), first=first))
    # The others get the bases that they would have got with a healthy neighbour.
    healthy = projector.refresh(Refresh(torch.where(torch.isfinite(now), now, 1.0), space, state, key(7), first=first))
    for name, tensor in new.items():
        assert torch.equal(tensor[1], state[name][1]), name
        for expert in (0, 2, 3):
            assert not torch.equal(tensor[expert], state[name][expert])
            cosines = (tensor[expert].double() * healthy[name][expert].double()).sum(0)
            assert float((cosines.abs() if first else cosines).min()) > 1 - 1e-4  # first vectors have no sign yet


@spectral
def test_a_stack_gets_the_bases_of_its_matrices(projector):
    grads = [slow_decay(s, 48, 30, 0.1).to(F32) for s in (0, 10, 20)]
    space, state = refreshed(projector, [torch.stack(grads)] * 3, 6, "std")
    assert space.batch == (3,)
    for i, grad in enumerate(grads):
        assert energy(grad, state["basis"][i], "right") > 0.97
        _, single = refreshed(projector, [grad] * 3, 6, "std")
        if isinstance(projector, lo.SVD):
            torch.testing.assert_close(state["basis"][i], single["basis"], rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------------- sides

SIDE_TABLE = {  # proj_type: side for (tall, wide, square)
    "std": ("right", "left", "right"),
    "reverse_std": ("left", "right", "left"),
    "right": ("right", "right", "right"),
    "left": ("left", "left", "left"),
    "full": ("full", "full", "full"),
}


@pytest.mark.parametrize("proj_type", SIDE_TABLE)
@pytest.mark.parametrize("batch", [(), (3,)], ids=["matrix", "stack"])
def test_the_projected_side_and_the_shapes_that_follow(proj_type, batch):
    for (rows, cols), side in zip(((20, 12), (12, 20), (16, 16)), SIDE_TABLE[proj_type], strict=True):
        grad = draw(1, *batch, rows, cols, dtype=F32)
        space, state = refreshed(lo.SVD(), [grad], 5, proj_type)
        assert space.side == side
        assert space.shape == (*batch, rows, cols)
        reduced = {"right": (rows, 5), "left": (cols, 5), "full": (5, 5)}[side]
        assert lo.SVD().reduced_shape(space) == (*batch, *reduced)
        expected = {
            "right": {"basis": (cols, 5)},
            "left": {"basis": (rows, 5)},
            "full": {"basis": (rows, 5), "basis_right": (cols, 5)},
        }[side]
        assert {name: tuple(t.shape) for name, t in state.items()} == {n: (*batch, *s) for n, s in expected.items()}


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@sides
@shapes
@pytest.mark.parametrize("projector", [lo.SVD(), lo.Random(), lo.Random("gaussian")], ids=lambda p: p.name)
def test_project_and_apply_are_the_explicit_products(projector, shape, rank, side, dtype):
    grad, weight = draw(1, *shape, dtype=dtype), draw(2, *shape, dtype=dtype)
    space, state = refreshed(projector, [grad], rank, side)
    basis = projector.basis(space, state, key(), CPU)
    reduced = basis.project(grad)
    compute = F64 if dtype == F64 else F32
    assert reduced.dtype == compute
    g, r = grad.double(), reduced.double()
    if side == "full":
        a, b = basis.left.double(), basis.right.double()
        expected, lifted = a.mT @ g @ b, a @ r @ b.mT
    else:
        b = basis.matrix.double()
        expected, lifted = (g @ b, r @ b.mT) if side == "right" else (g.mT @ b, b @ r.mT)
    scale = float(expected.abs().max())
    torch.testing.assert_close(r, expected, rtol=0, atol=10 * TOLERANCE[compute] * scale)
    target = 0.75 * weight.double() - 0.5 * lifted
    basis.apply_(weight, reduced, StepParams(alpha=0.5, keep=0.75))
    tolerance = torch.finfo(BF16).eps / 2 if dtype == BF16 else 10 * TOLERANCE[dtype]
    torch.testing.assert_close(weight.double(), target, rtol=0, atol=tolerance * float(target.abs().max()))


# -------------------------------------------------------------------------------------------------------------------- random


def random_parts(projector: Projector, space: SubspaceSpec, k: int) -> list[Tensor]:
    basis = projector.basis(space, {}, k, CPU)
    return [basis.left, basis.right] if space.side == "full" else [basis.matrix]


@pytest.mark.parametrize("kind", ["orthonormal", "gaussian"])
@shapes
@sides
def test_random_bases_are_regenerated_and_never_stored(kind, side, shape, rank):
    projector = lo.Random(kind)
    space = projector.space(shape, rank, side, F32)
    assert projector.init(space, key(), CPU) == {}
    assert projector.refresh(Refresh(draw(1, *shape, dtype=F32), space, {}, key(), True)) == {}
    assert (
        projector.refresh(Refresh(torch.zeros(shape), space, {}, key(), True)) == {}
    )  # cannot fail: looks at no gradient
    torch.manual_seed(1)
    first = random_parts(projector, space, key())
    torch.manual_seed(2)
    again = random_parts(projector, space, key())
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    others = {"refresh": key(200), "index": key(index=1), "seed": key(seed=1)}
    others["purpose"] = make_key(0, 0, 0, PURPOSE_ROUNDING)
    for name, other in others.items():
        for a, b in zip(first, random_parts(projector, space, other), strict=True):
            assert not torch.equal(a, b), name


def test_gaussian_bases_have_variance_one_over_rank():
    for rank in (1, 4, 32):
        space = lo.Random("gaussian").space((2000, 1000), rank, "right", F32)
        (matrix,) = random_parts(lo.Random("gaussian"), space, key())
        n = matrix.numel()
        assert abs(float(matrix.mean())) < 5 / math.sqrt(n * rank)
        assert abs(float(matrix.double().square().mean()) * rank - 1) < 5 * math.sqrt(2 / n)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["orthonormal", "gaussian"])
def test_random_bases_have_no_preferred_direction(kind):
    # E[B Bᵀ] is the identity (Gaussian) or r/n of it (orthonormal).
    n, rank, trials = 12, 4, 3000
    projector = lo.Random(kind)
    space = projector.space((20, n), rank, "right", F64)
    mean = torch.zeros(n, n, dtype=F64)
    for i in range(trials):
        (b,) = random_parts(projector, space, key(step=i))
        mean += b @ b.T / trials
    expected = torch.eye(n, dtype=F64) * (1.0 if kind == "gaussian" else rank / n)
    assert float((mean - expected).abs().max()) < 5 * math.sqrt(2 / rank / trials)


def overlap(a: Tensor, b: Tensor) -> float:
    """‖QaᵀQb‖² for orthonormal bases of the two spans: r if they are the same, about r²/n if they are unrelated."""
    return float((torch.linalg.qr(a.double()).Q.T @ torch.linalg.qr(b.double()).Q).square().sum())


@pytest.mark.parametrize("kind", ["orthonormal", "gaussian"])
def test_both_sides_of_a_square_matrix_and_all_experts_get_unrelated_random_bases(kind):
    projector = lo.Random(kind)
    for seed in range(4):
        space = projector.space((96, 96), 8, "full", F32)
        left, right = random_parts(projector, space, key(seed=seed))
        assert overlap(left, right) < 2.0
        stack = projector.space((3, 96, 64), 8, "std", F32)
        (experts,) = random_parts(projector, stack, key(seed=seed))
        for i, j in ((0, 1), (1, 2), (0, 2)):
            assert overlap(experts[i], experts[j]) < 3.0


# ----------------------------------------------------------------------------------------------------------------- coordinate


def explicit_mask(projector: lo.Coordinate, space: SubspaceSpec, indices: Tensor) -> Tensor:
    """1 where an entry of the matrix is selected; one matrix at a time, by plain loops."""
    mask = torch.zeros(space.shape, dtype=torch.bool)
    masks = mask if space.batch else mask.unsqueeze(0)
    rows = indices if space.batch else indices.unsqueeze(0)
    for matrix, chosen in zip(masks, rows.tolist(), strict=True):
        for i in chosen:
            if projector.coordinates == "entries":
                matrix[i // space.cols, i % space.cols] = True
            elif space.side == "right":
                matrix[:, i] = True
            else:
                matrix[i] = True
    return mask


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@shapes
@pytest.mark.parametrize("projector", COORDINATE, ids=lambda p: p.name)
def test_coordinates_select_and_update_exactly_their_entries(projector, shape, rank, dtype):
    for proj_type in ("std", "reverse_std", "left", "right"):
        for transposed in (False, True):
            grad, weight = draw(1, *shape, dtype=dtype), draw(2, *shape, dtype=dtype)
            if transposed:
                grad, weight = grad.mT.contiguous().mT, weight.mT.contiguous().mT
            check_selection(projector, grad, weight, rank, proj_type)


def check_selection(projector: lo.Coordinate, grad: Tensor, weight: Tensor, rank: int, proj_type: str) -> None:
    space, state = refreshed(projector, [grad], rank, proj_type)
    side = {"columns": "right", "rows": "left", "entries": "right"}.get(projector.coordinates, space.side)
    assert space.side == side
    basis = projector.basis(space, state, key(), CPU)
    mask = explicit_mask(projector, space, state["indices"])
    rows, cols = grad.shape[-2:]
    count = rank * (max(rows, cols) if projector.coordinates == "entries" else rows if side == "right" else cols)
    assert mask.sum((-2, -1)).unique().tolist() == [count]  # distinct indices, in every matrix

    compute = F64 if grad.dtype == F64 else F32
    reduced = basis.project(grad)
    assert reduced.dtype == compute
    assert reduced.shape == projector.reduced_shape(space)
    tall = projector.coordinates != "entries" and side == "left"  # a row of the matrix is a column of R
    values = grad.mT[mask.mT] if tall else grad[mask]
    assert torch.equal(reduced.flatten(), values.to(compute))

    expected = torch.where(mask, 0.75 * weight.double() - 0.5 * grad.double(), 0.75 * weight.double())
    basis.apply_(weight, reduced, StepParams(alpha=0.5, keep=0.75))
    if weight.dtype == BF16:  # the float32 arithmetic is exact here, so rounding happens once
        assert torch.equal(weight, expected.to(BF16))
    else:
        torch.testing.assert_close(weight.double(), expected, rtol=0, atol=4 * torch.finfo(weight.dtype).eps)


@pytest.mark.parametrize("projector", COORDINATE, ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_coordinates_with_a_false_mask_change_nothing(projector, dtype):
    grad, weight = draw(1, 20, 14, dtype=dtype), draw(2, 20, 14, dtype=dtype)
    space, state = refreshed(projector, [grad], 4, "std")
    basis, before = projector.basis(space, state, key(), CPU), weight.clone()
    zero = torch.zeros(projector.reduced_shape(space))
    for rounding in (None, 7) if dtype == BF16 else (None,):
        basis.apply_(weight, zero, StepParams(0.5, 0.75, torch.tensor(False), rounding))
        assert torch.equal(weight, before)


@pytest.mark.long
@pytest.mark.parametrize("projector", COORDINATE, ids=lambda p: p.name)
def test_coordinate_updates_of_bfloat16_weights_are_rounded_stochastically_and_once(projector):
    n = 400
    up = 0
    for step in range(n):
        weight = torch.ones(12, 8, dtype=BF16)
        space, state = refreshed(projector, [weight], 4, "std")
        basis = projector.basis(space, state, key(), CPU)
        core = torch.full(projector.reduced_shape(space), -(2.0**-9))  # a quarter of the spacing above 1
        basis.apply_(weight, core, StepParams(1.0, 1.0, None, make_key(0, 0, step, PURPOSE_ROUNDING)))
        mask = explicit_mask(projector, space, state["indices"])
        assert (weight[~mask] == 1.0).all()
        assert ((weight[mask] == 1.0) | (weight[mask] == 1.0 + 2.0**-7)).all()
        up += int((weight[mask] != 1.0).sum())
    trials = n * int(mask.sum())
    assert abs(up - trials / 4) < 5 * math.sqrt(trials * 3 / 16)


@pytest.mark.parametrize("shape", [(14, 9), (3, 14, 9)], ids=["matrix", "stack"])
@pytest.mark.parametrize("projector", COORDINATE, ids=lambda p: p.name)
def test_an_entry_is_rounded_by_the_noise_of_its_own_place_in_the_weight(projector, shape):
    grad, weight = draw(1, *shape, dtype=BF16), draw(2, *shape, dtype=BF16)
    space, state = refreshed(projector, [grad], 4, "std")
    basis, noise = projector.basis(space, state, key(), CPU), make_key(0, 0, 3, PURPOSE_ROUNDING)
    places = torch.arange(weight.numel()).view(shape)
    expected = stochastic_round(weight.float() - 0.25 * grad.float(), noise, places).to(BF16)
    mask = explicit_mask(projector, space, state["indices"])
    basis.apply_(weight, basis.project(grad), StepParams(0.25, 1.0, None, noise))
    assert torch.equal(weight[mask], expected[mask])


@pytest.mark.parametrize("shape", [(14, 9), (9, 14), (3, 14, 9)], ids=["tall", "wide", "stack"])
@pytest.mark.parametrize("proj_type", ["left", "right"])
def test_coordinates_come_with_the_norm_of_the_whole_line_of_each_row_of_r(proj_type, shape):
    grad, projector = draw(1, *shape), lo.Coordinate()
    space, state = refreshed(projector, [grad], 4, proj_type)
    basis = projector.basis(space, state, key(), CPU)
    reduced, squares = basis.project_with_norms(grad)
    assert torch.equal(reduced, basis.project(grad))
    lines = grad if proj_type == "right" else grad.mT
    torch.testing.assert_close(squares, lines.square().sum(-1, keepdim=True), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("sign", [True, False], ids=["sign", "gradient"])
@pytest.mark.parametrize("inside", [True, False], ids=["E = G", "E = G - lift R"])
@pytest.mark.parametrize("space", [*(projector.name for projector in COORDINATE[1:]), "blocks"])
def test_a_gradient_term_goes_into_the_chosen_entries_only_where_nothing_is_subtracted(space, inside, sign):
    grad, weight = draw(1, 14, 9), draw(2, 14, 9)
    basis, mask = WholeBasis(), torch.ones(14, 9, dtype=torch.bool)
    if space != "blocks":
        projector = from_name(space)
        spec, state = refreshed(projector, [grad], 4, "std")
        basis, mask = projector.basis(spec, state, key(), CPU), explicit_mask(projector, spec, state["indices"])
    reduced, scale = basis.project(grad), torch.full((1, 1), 0.5, dtype=F64)
    term = GradientTerm(grad, scale, subtract=None if inside else reduced, sign=sign)
    outside = grad.sign() if sign else grad
    update = torch.where(mask, grad + (0.5 * outside if inside else 0.0), 0.5 * outside)
    expected = 0.75 * weight - 0.25 * update
    basis.apply_(weight, reduced, StepParams(alpha=0.25, keep=0.75), term)
    torch.testing.assert_close(weight, expected, rtol=0.0, atol=1e-14)


@pytest.mark.parametrize("projector", COORDINATE, ids=lambda p: p.name)
def test_coordinates_are_drawn_anew_at_every_refresh_and_for_every_parameter(projector):
    space = projector.space((64, 48), 6, "std", F32)
    draws = [projector.init(space, k, CPU)["indices"] for k in (key(), key(200), key(index=1), key(seed=1))]
    for i, a in enumerate(draws):
        assert all(not torch.equal(a, b) for b in draws[i + 1 :])
    assert torch.equal(draws[0], projector.init(space, key(), CPU)["indices"])


@pytest.mark.long
@pytest.mark.parametrize("projector", COORDINATE[:3], ids=lambda p: p.name)
def test_experts_draw_their_coordinates_independently(projector):
    # For every pair of indices (i of expert 0, j of expert 1), the chance to be drawn together is (r/n)².
    n, rank, trials = 16, 4, 1500
    space = projector.space((2, n, n), rank, "std", F32)
    together = torch.zeros(n, n, dtype=F64)
    for i in range(trials):
        first, second = projector.init(space, key(step=i), CPU)["indices"].long()
        together[first.unsqueeze(1), second] += 1
    p = (rank / n) ** 2
    assert float((together / trials - p).abs().max()) < 5 * math.sqrt(p * (1 - p) / trials)


@pytest.mark.parametrize("projector", COORDINATE, ids=lambda p: p.name)
def test_coordinates_refuse_to_project_both_sides(projector):
    with pytest.raises(ValueError, match='"full", which a coordinate projector cannot do'):
        projector.check("full")
    weight = torch.nn.Parameter(torch.zeros(8, 6))
    with pytest.raises(ValueError, match='"full"'):
        lo.GaLoreAdamW([weight], rank=2, projector=projector, proj_type="full")


@pytest.mark.parametrize("projector", EVERY, ids=lambda p: p.name)
def test_an_unknown_proj_type_raises_and_lists_the_valid_ones(projector):
    with pytest.raises(ValueError, match="proj_type is 'rigth'; valid values are std, reverse_std, left, right, full"):
        projector.check("rigth")


# ----------------------------------------------------------------------------------------------------------------- transport


def two_bases(projector: Projector, shape: tuple[int, ...], rank: int, side: str) -> tuple[SubspaceSpec, Basis, Basis]:
    space, old = refreshed(projector, [draw(1, *shape)], rank, side)
    new = projector.refresh(Refresh(draw(2, *shape), space, old, key(9), first=False))
    assert new is not None
    return space, projector.basis(space, old, key(), CPU), projector.basis(space, new, key(9), CPU)


@shapes
@sides
@pytest.mark.parametrize("projector", [lo.RandomizedSVD(), lo.SVD(), lo.Random()], ids=lambda p: p.name)
def test_transport_multiplies_by_the_overlap_of_the_bases(projector, side, shape, rank):
    space, old, new = two_bases(projector, shape, rank, side)
    moment = draw(3, *projector.reduced_shape(space))
    for power in (1, 2):
        if side == "full":
            left, right = (old.left.mT @ new.left) ** power, (old.right.mT @ new.right) ** power
            expected = torch.einsum("...ia,...ij,...jb->...ab", left, moment, right)
        else:
            expected = torch.einsum("...ij,...jk->...ik", moment, (old.matrix.mT @ new.matrix) ** power)
        torch.testing.assert_close(new.transport(moment, old, power), expected, rtol=1e-9, atol=1e-9)


@shapes
@pytest.mark.parametrize("side", ["right", "left", "full"])
def test_transport_between_gaussian_bases_uses_the_pseudo_inverse(side, shape, rank):
    projector = lo.Random("gaussian")
    space, old, new = two_bases(projector, shape, rank, side)
    moment = draw(3, *projector.reduced_shape(space))

    def change(a: Tensor, b: Tensor) -> Tensor:
        return torch.from_numpy(np.linalg.pinv(a.numpy())) @ b

    if side == "full":
        expected = change(old.left, new.left).mT @ moment @ change(old.right, new.right)
    else:
        expected = moment @ change(old.matrix, new.matrix)
    torch.testing.assert_close(
        new.transport(moment, old, 1), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max())
    )


@shapes
@pytest.mark.parametrize("projector", EVERY, ids=lambda p: p.name)
def test_transport_to_the_same_basis_changes_nothing(projector, shape, rank):
    space, state = refreshed(projector, [draw(1, *shape)], rank, "std")
    basis = projector.basis(space, state, key(), CPU)
    moment = draw(3, *projector.reduced_shape(space))
    torch.testing.assert_close(basis.transport(moment, basis, 1), moment, rtol=1e-9, atol=1e-9)


@shapes
@pytest.mark.parametrize("projector", COORDINATE, ids=lambda p: p.name)
def test_transport_between_coordinates_keeps_what_both_share_and_clears_the_rest(projector, shape, rank):
    space = projector.space(shape, rank, "std", F32)
    states = [projector.init(space, k, CPU) for k in (key(), key(1))]
    old, new = (projector.basis(space, s, 0, CPU) for s in states)
    moment = draw(3, *projector.reduced_shape(space), dtype=F32)
    whole = torch.zeros(space.shape)
    old.apply_(whole, moment, StepParams(alpha=-1.0, keep=1.0))  # the moment, as a matrix
    for power in (1, 2):
        assert torch.equal(new.transport(moment, old, power), new.project(whole))


@pytest.mark.parametrize("projector", [lo.RandomizedSVD(), lo.SVD()], ids=lambda p: p.name)
@sides
@pytest.mark.parametrize("batch", [(), (2,)], ids=["matrix", "stack"])
def test_new_basis_vectors_point_to_the_side_of_the_old_ones(projector, side, batch):
    grads = [draw(step, *batch, 40, 30, dtype=F32) for step in range(6)]
    space, state = refreshed(projector, grads[:1], 8, side)
    for step, grad in enumerate(grads[1:], 1):
        new = projector.refresh(Refresh(grad, space, state, key(step), first=False))
        for name in new:
            assert ((new[name] * state[name]).sum(-2) >= 0).all(), name
        state = new


def test_unaligned_svd_keeps_the_signs_of_lapack():
    grads = [draw(step, 40, 30, dtype=F32) for step in range(6)]
    _, state = refreshed(lo.SVD(align=False), grads, 8, "right")
    _, _, vh = torch.linalg.svd(grads[-1], full_matrices=False)
    assert torch.equal(state["basis"], vh[:8].T)


def test_align_signs_flips_columns_only():
    old, new = draw(1, 2, 20, 6), draw(2, 2, 20, 6)
    aligned = align_signs(new, old)
    assert torch.equal(aligned.abs(), new.abs())
    for b in range(2):
        for c in range(6):
            dot = float(new[b, :, c] @ old[b, :, c])
            assert torch.equal(aligned[b, :, c], new[b, :, c] * math.copysign(1.0, dot))
    still = torch.zeros(20, 6)
    assert torch.equal(align_signs(new[0], still.double()), new[0])  # no preference, no change


# --------------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("projector", EVERY, ids=lambda p: p.name)
def test_names_stand_for_their_projectors(projector):
    again = from_name(projector.name)
    assert again == projector
    assert type(again) is type(projector)
    assert again.name == projector.name


def test_the_short_names_stand_for_the_defaults():
    assert from_name("randomized_svd") == lo.RandomizedSVD()
    assert from_name("svd") == lo.SVD()
    assert from_name("random") == lo.Random()
    assert from_name("coordinate") == lo.Coordinate()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("randomised_svd", "randomized_svd"), ("SVD", None), ("svdd", "svd"), ("coordinates", "coordinate"), ("", None)],
)
def test_unknown_names_raise_with_the_nearest_and_all_valid_ones(name, nearest):
    hint = f"did you mean '{nearest}'\\? " if nearest else ""
    with pytest.raises(
        ValueError, match=f"projector is '{name}': {hint}valid names are randomized_svd, svd, random, coordinate"
    ):
        from_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *("svd:unalinged", "random:gausian", "coordinate:row", "randomized_svd:8,2,1,5", "randomized_svd:a,b,c"),
        *("randomized_svd:complement,x", "randomized_svd:sample,0.5,1", "randomized_svd:complement,2.0", "dct:fast"),
    ],
)
def test_unknown_variants_of_known_names_raise_and_show_what_was_given(name):
    with pytest.raises(ValueError, match=name.partition(":")[2].partition(",")[0]):
        from_name(name)


@pytest.mark.parametrize("values", [{"oversample": -1}, {"power_iterations": 0}, {"warm_iterations": 0}], ids=str)
def test_randomized_svd_refuses_numbers_out_of_range(values):
    ((name, value),) = values.items()
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be at least"):
        lo.RandomizedSVD(**values)


def test_kinds_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="kind is 'normal'; valid values are gaussian, orthonormal"):
        lo.Random("normal")
    with pytest.raises(ValueError, match="coordinates is 'diagonal'; valid values are columns, rows, entries"):
        lo.Coordinate("diagonal")


def test_the_signs_of_eigenvectors_do_not_turn_with_the_last_bit_of_the_matrix():
    generator = torch.Generator().manual_seed(0)
    for size in (2, 7, 40):
        rows = torch.randn(50, 3 * size, size, generator=generator, dtype=torch.float64)
        gram = rows.mT @ rows
        vectors = eigenvectors(gram)
        torch.testing.assert_close(gram @ vectors, vectors * torch.linalg.eigvalsh(gram)[..., None, :])
        largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
        assert (largest > 0).all()
        torch.testing.assert_close(eigenvectors(gram * (1.0 + 1e-15)), vectors, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("rank", [200, 30, 0])
def test_large_float32_matrices_have_the_eigenvectors_of_float64(rank):
    wide = draw(3, 400, rank, dtype=torch.float64) @ draw(4, rank, 200, dtype=torch.float64)
    gram = wide.mT @ wide / max(float(wide.square().sum()), 1e-30)
    vectors = eigenvectors(gram.float())
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(200), rtol=0.0, atol=1e-5)
    values = torch.linalg.eigvalsh(gram)
    torch.testing.assert_close(((gram @ vectors.double()) * vectors).sum(-2), values, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("fault", ["raises", "not orthonormal", "not eigenvectors", "nan"])
def test_eigenvectors_that_float32_gets_wrong_are_taken_in_float64(monkeypatch, fault):
    eigh, seen = torch.linalg.eigh, []

    def failing(matrix):
        seen.append(matrix.dtype)
        values, vectors = eigh(matrix)
        if matrix.dtype == torch.float64:
            return values, vectors
        if fault == "raises":
            raise torch.linalg.LinAlgError("linalg.eigh: it did not converge")
        return values, {
            "not orthonormal": vectors[:, [0, 0, *range(2, 130)]],
            "not eigenvectors": torch.eye(130),
            "nan": vectors * torch.nan,
        }[fault]

    wide = draw(3, 400, 130, dtype=torch.float64)
    gram = (wide.mT @ wide / wide.square().sum()).float()
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    vectors = eigenvectors(gram)
    assert seen == [torch.float32, torch.float64]
    torch.testing.assert_close(vectors.abs(), eigh(gram.double())[1].abs().float())


@pytest.mark.parametrize(
    "options", [{}, {"basis_bits": 16}, {"basis_bits": 8}, {"projector": "dct"}, {"proj_type": "full"}], ids=str
)
def test_sums_may_be_exact_whatever_the_basis_is_kept_in(options):
    params = [torch.nn.Parameter(draw(1, 40, 24).float()) for _ in range(2)]
    usual, exact = (
        lo.GaLoreAdamW([p], rank=4, eps=1e-3, update_proj_gap=2, exact_sums=wide, **options)
        for p, wide in zip(params, (False, True), strict=True)
    )
    for step in range(3):
        for param, optimizer in zip(params, (usual, exact), strict=True):
            param.grad = draw(step, 40, 24).float()
            optimizer.step()
    torch.testing.assert_close(params[0], params[1], rtol=1e-4, atol=1e-5)
