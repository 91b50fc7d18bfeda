"""CondaAdamW: its equations at full rank, the basis of the momentum, resume."""

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo
from lowrank_optim.projectors import from_name

F64 = torch.float64


def draw(seed: int, *shape: int) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return (
        made * torch.logspace(0, -2, shape[-1], dtype=F64) * torch.logspace(-1, 1, shape[-2], dtype=F64).unsqueeze(-1)
    )


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9), (2, 10, 6)])
@pytest.mark.parametrize("released", [False, True])
def test_conda_is_its_equations(shape, released):
    """The momentum stays in the matrix's own coordinates, and only its projection is divided."""
    lr, decay, alpha, eps, gap, (beta1, beta2) = 0.05, 0.1, 0.5, 1e-6, 3, (0.8, 0.95)
    start = draw(0, *shape)
    param = nn.Parameter(start.clone())
    options = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": decay, "scale": alpha}
    optimizer = lo.CondaAdamW(
        [{"params": [param], "rank": 1.0}], update_proj_gap=gap, stagger=False, match_reference=released, **options
    )
    flip = shape[-2] < shape[-1]
    weight = (start.mT if flip else start).clone()
    m = torch.zeros_like(weight)
    v = basis = None
    for t in range(1, 9):
        grad = draw(t, *shape)
        param.grad = grad.clone()
        optimizer.step()
        grad = grad.mT if flip else grad
        if (t - 1) % gap == 0:
            mean = m / (1 - beta1 ** (t - 1)) if t > 1 else 0.0
            basis = torch.linalg.svd(beta1 * mean + (1 - beta1) * grad, full_matrices=False)[2].mT
        m = beta1 * m + (1 - beta1) * grad
        inside, momentum = grad @ basis, m @ basis
        v = (1 - beta2) * inside.square() + (0.0 if v is None else beta2 * v)
        bc1, bc2 = 1 - beta1**t, 1 - beta2**t
        if released:
            direction = bc2**0.5 / bc1 * momentum / (v.sqrt() + eps)
            weight = (1 - lr * decay) * (weight - lr * alpha * direction @ basis.mT)
        else:
            direction = (momentum / bc1) / ((v / bc2).sqrt() + eps)
            weight = (1 - lr * decay) * weight - lr * alpha * direction @ basis.mT
    found = param.detach().mT if flip else param.detach()
    assert float((weight - (start.mT if flip else start)).abs().max()) > 0.1
    torch.testing.assert_close(found, weight, rtol=0.0, atol=1e-9)


def test_a_smaller_rank_takes_the_leading_vectors_of_gradient_and_momentum_in_the_old_basis():
    param, rho = nn.Parameter(draw(0, 20, 12)), 0.75
    options = {"projector": lo.MomentumSVD(rho), "rule": lo.SGD(momentum=0.5), "on_refresh": "rotate"}
    optimizer = lo.LowRankOptimizer([{"params": [param], "rank": 4}], update_proj_gap=2, stagger=False, **options)
    for step in range(3):
        param.grad = draw(step + 1, 20, 12)
        state = {name: tensor.clone() for name, tensor in optimizer.state[param].items()}
        mean = optimizer.plan_of(param).rule.mean_gradient(state, optimizer.param_groups[0], step)
        optimizer.step()
    mixed = rho * mean @ state["basis"].mT + (1 - rho) * param.grad
    wanted = torch.linalg.svd(mixed, full_matrices=False)[2][:4].mT
    overlap = (wanted.mT @ optimizer.state[param]["basis"]).abs()
    torch.testing.assert_close(overlap, torch.eye(4, dtype=F64), rtol=0.0, atol=1e-8)


def test_names_and_values_out_of_range():
    assert from_name("momentum_svd") == lo.MomentumSVD()
    assert from_name(lo.MomentumSVD(0.25).name) == lo.MomentumSVD(0.25)
    with pytest.raises(ValueError, match=r"rho is 1.5; it must be in \[0, 1\]"):
        lo.MomentumSVD(1.5)
    with pytest.raises(ValueError, match="betas is"):
        lo.CondaAdamW([{"params": [nn.Parameter(torch.zeros(4, 4))], "rank": 1.0}], betas=(0.9, 1.5))
