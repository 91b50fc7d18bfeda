"""GrassmannTracking and SubTrackAdamW: the paper's geodesic, what a turn gains, orthonormal bases for long, the whole method."""

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo
from lowrank_optim.projectors import Refresh, from_name

F64 = torch.float64
SHAPES = {"tall": (40, 18), "wide": (18, 40), "square": (20, 20), "stack": (3, 30, 14)}
RANK = 5


def draw(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    """With a spectrum that falls."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    left, values, right = torch.linalg.svd(made, full_matrices=False)
    return ((left * (values * 0.8 ** torch.arange(values.shape[-1])).unsqueeze(-2)) @ right).to(dtype)


def begun(projector: lo.Projector, shape, dtype: torch.dtype = F64):
    """Space, and the state after a first gradient."""
    space = projector.space(tuple(shape), RANK, "std", dtype)
    state = projector.init(space, 0, torch.device("cpu"))
    state = projector.refresh(Refresh(draw(1, *shape, dtype=dtype), space, state, 5, first=True))
    assert state is not None
    return space, state


def geodesic(basis: Tensor, grad: Tensor, eta: float) -> Tensor:
    """S(η) = [S V, U] [cos Ση; sin Ση] Vᵀ + S (I − V Vᵀ), U Σ Vᵀ the rank-1 part of −∇‖G − S SᵀG‖², for the left side."""
    grad = grad / grad.norm()
    coordinates = torch.linalg.lstsq(basis, grad).solution
    downhill = 2.0 * (grad - basis @ coordinates) @ coordinates.T
    u, sigma, vh = torch.linalg.svd(downhill, full_matrices=False)
    u, size, v = u[:, :1], eta * sigma[0], vh[:1].T
    turned = torch.cat([basis @ v, u], 1) @ torch.stack([size.cos(), size.sin()])[:, None] @ v.T
    return turned + basis @ (torch.eye(basis.shape[1], dtype=F64) - v @ v.T)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_a_refresh_is_the_papers_step_along_the_geodesic(shape, eta):
    projector = lo.GrassmannTracking(eta)
    space, state = begun(projector, shape)
    for step in range(2, 5):
        grad, old = draw(step, *shape), state["basis"]
        state = projector.refresh(Refresh(grad, space, state, 5))
        oriented = grad if space.side == "left" else grad.mT
        found, stack, bases = (t.reshape(-1, *t.shape[-2:]) for t in (state["basis"], oriented, old))
        for new, matrix, before in zip(found, stack, bases, strict=True):
            torch.testing.assert_close(new, geodesic(before, matrix, eta), rtol=0.0, atol=1e-10)
        assert float((state["basis"] - old).norm()) > 0.01


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_turns_find_the_leading_subspace_of_a_gradient_that_stays(shape):
    projector, grad = lo.GrassmannTracking(), draw(9, *shape)
    space, state = begun(projector, shape)
    whole = grad.norm(dim=(-2, -1)).square()

    def held() -> Tensor:
        return projector.basis(space, state, 0, torch.device("cpu")).project(grad).square().sum((-2, -1)) / whole

    shares = [held()]
    for _ in range(300):
        state = projector.refresh(Refresh(grad, space, state, 5))
        shares.append(held())
    steps = torch.stack(shares)
    assert bool((steps.diff(dim=0) > -1e-12).all())
    best = torch.linalg.svdvals(grad)[..., :RANK].square().sum(-1) / whole
    assert bool((shares[0] < 0.9 * best).all())
    assert bool((shares[-1] > 0.99 * best).all())


@pytest.mark.parametrize("bits", [32, 8])
def test_bases_stay_orthonormal(bits):
    projector = lo.GrassmannTracking()
    weight = nn.Parameter(torch.zeros(40, 30))
    options = {"projector": projector, "rule": lo.Adam(), "update_proj_gap": 1, "basis_bits": bits}
    optimizer = lo.LowRankOptimizer([{"params": [weight], "rank": RANK}], **options)
    for step in range(200):
        weight.grad = draw(step, 40, 30, dtype=torch.float32)
        optimizer.step()
    plan, state = optimizer.plan_of(weight), optimizer.state[weight]
    basis = plan.basis(state, 0).transport(torch.eye(RANK), plan.basis(state, 0), 1)
    assert float((basis - torch.eye(RANK)).abs().max()) < (1e-6 if bits == 32 else 0.02)


def test_a_gradient_inside_the_subspace_and_a_matrix_without_gradient_turn_nothing():
    projector = lo.GrassmannTracking()
    space, state = begun(projector, SHAPES["stack"])
    inside = draw(4, 3, 30, RANK) @ state["basis"].mT
    inside[1] = 0.0
    new = projector.refresh(Refresh(inside, space, state, 5))
    torch.testing.assert_close(new["basis"], state["basis"], rtol=0.0, atol=1e-10)


def test_names_and_values_out_of_range():
    assert from_name("grassmann_tracking") == lo.GrassmannTracking()
    assert from_name(lo.GrassmannTracking(0.25).name) == lo.GrassmannTracking(0.25)
    for value in (0.0, -1.0, 1.6):
        with pytest.raises(ValueError, match=r"step_size is .*\(0, π/2\]"):
            lo.GrassmannTracking(value)


# ------------------------------------------------------------------------------------------------------------------- SubTrack++


@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
def test_subtrack_is_its_equations(shape):
    """Side, tracking, moments that turn along and the scaled rest, transcribed for the left side of a matrix or its transpose."""
    lr, decay, alpha, eps, gap, gamma = 0.05, 0.1, 0.25, 1e-6, 2, 1.01
    beta1, beta2 = 0.9, 0.99
    start = draw(0, *shape)
    param = nn.Parameter(start.clone())
    options = {
        "lr": lr,
        "betas": (beta1, beta2),
        "eps": eps,
        "weight_decay": decay,
        "update_proj_gap": gap,
        "stagger": False,
    }
    optimizer = lo.SubTrackAdamW([{"params": [param], "rank": 3}], step_size=0.8, **options)
    flip = shape[0] >= shape[1]
    weight, limited, basis = (start.T if flip else start).clone(), None, None
    m = v = torch.zeros(3, max(shape), dtype=F64)
    for t in range(1, 9):
        grad = draw(t, *shape)
        param.grad = grad.clone()
        optimizer.step()
        grad = grad.T if flip else grad
        if basis is None:
            basis = optimizer.state[param]["basis"].clone()
        elif (t - 1) % gap == 0:
            new = geodesic(basis, grad, 0.8)
            turn, bc1, bc2 = new.T @ basis, 1 - beta1 ** (t - 1), 1 - beta2 ** (t - 1)
            variance = turn.square() @ (v / bc2 - (m / bc1).square()) + (turn @ m / bc1).square()
            m, v, basis = turn @ m, bc2 * variance.abs(), new
        inside = basis.T @ grad
        m, v = beta1 * m + (1 - beta1) * inside, beta2 * v + (1 - beta2) * inside.square()
        direction = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        rest = (grad - basis @ inside) * direction.norm(dim=0) / inside.norm(dim=0)
        if limited is not None and rest.norm() > gamma * limited:
            rest = rest * gamma * limited / rest.norm()
        limited = rest.norm()
        weight = (1 - lr * decay) * weight - lr * (alpha * basis @ direction + rest)
    found = param.detach().T if flip else param.detach()
    assert float((weight - (start.T if flip else start)).abs().max()) > 0.1
    torch.testing.assert_close(found, weight, rtol=0.0, atol=1e-10)
