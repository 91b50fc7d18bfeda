"""Trained Rank Pruning: truncation while training and at once, against a transcription in float64 and released numbers."""

import copy
import gc
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo
from lowrank_optim.nn.truncate import RankCut, truncated_stack
from lowrank_optim.optimizers.truncation import RankTruncation
from tests.oracles.checkpoints import assert_same_run, resume
from tests.oracles.decompositions import closed_form_inputs, closed_form_weight
from tests.oracles.truncation import kernel_places, reference_sgd, truncate, truncate_kernels

F64, BF16 = torch.float64, torch.bfloat16

# Of the closed-form convolution below, by the released function at energy 0.9: its first filter, and that of the subgradient.
GOLDEN_FILTER = [
    [[0.979564, 0.970688, 1.005233], [0.757818, -0.250294, -0.976039], [0.179658, -0.856953, 0.890154]],
    [[-0.428168, -0.405275, -0.437677], [-0.941883, -0.755653, 0.212492], [-1.012616, 0.748647, 0.025035]],
    [[-0.669162, -0.665912, -0.610397], [0.060631, 0.875129, 0.771037], [0.761908, 0.268249, -0.886893]],
]
GOLDEN_PULL = [
    [[0.208098, 0.225608, 0.275062], [0.20761, -0.069455, -0.267074], [0.109479, -0.194048, 0.243573]],
    [[-0.00113, -0.055754, -0.127385], [-0.194954, -0.174388, 0.070854], [-0.297089, 0.134996, -0.010207]],
    [[-0.322366, -0.219402, -0.133188], [-0.11162, 0.153565, 0.168974], [0.151623, 0.149621, -0.194946]],
]


# The same of the view (c·h) × (a·w), by numpy.
SPATIAL_FILTER = [
    [[0.777752, 0.733404, 1.15453], [0.750909, 0.04116, -0.933525], [0.534455, -0.606506, 0.758052]],
    [[-0.266629, -0.477597, -0.455202], [-0.809214, -0.831051, 0.197847], [-0.865781, 0.607972, 0.123604]],
    [[-0.429589, -0.301749, -0.77091], [0.449546, 1.22083, 0.593618], [0.743842, -0.20957, -0.892298]],
]
SPATIAL_PULL = [
    [[0.218348, 0.196688, 0.317617], [0.187164, -0.002318, -0.236972], [0.177402, -0.159365, 0.260536]],
    [[-0.062388, -0.109907, -0.040234], [-0.202137, -0.221869, 0.024611], [-0.244322, 0.18466, 0.039722]],
    [[-0.143903, -0.123038, -0.387821], [0.112797, 0.342774, 0.202536], [0.181357, -0.093257, -0.317644]],
]

# W of the closed-form regression after four steps of SGD with momentum, truncated before steps 0 and 2, by numpy.
GOLDEN_LINEAR = [
    [0.783275, -0.239158, -0.452438, 0.673003, -0.072468, -0.595713, 0.577431, 0.316856],
    [0.489801, -0.570569, 0.52027, -0.078637, -0.447031, 0.739054, -0.495917, -0.307795],
    [-0.212719, 0.01728, 0.41106, -0.677768, 0.68922, -0.483571, 0.23398, 0.075531],
    [-0.579651, 0.703357, -0.590732, 0.411013, -0.246508, 0.149077, -0.075583, 0.023562],
    [-0.406712, 0.46502, -0.407925, 0.32861, -0.316915, 0.307202, -0.199041, -0.051241],
    [0.27203, -0.4282, 0.528595, -0.676517, 0.729043, -0.635717, 0.343133, 0.130656],
]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def falling(seed: int, rows: int, cols: int, rate: float = 0.8) -> Tensor:
    """A matrix whose singular values fall by this factor."""
    short = min(rows, cols)
    u, v = (torch.linalg.qr(draw(seed + side, size, short)).Q for side, size in enumerate((rows, cols)))
    return (u * rate ** torch.arange(short, dtype=F64)) @ v.T


class Net(nn.Module):
    """A tall and a wide matrix, a convolution, and biases."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.up, self.down = nn.Conv2d(3, 6, 3), nn.Linear(24, 40), nn.Linear(40, 24)
        self.up.weight.data, self.down.weight.data = falling(0, 40, 24), falling(2, 24, 40)
        self.conv.weight.data = falling(4, 6, 27).view(6, 3, 3, 3)
        self.to(dtype)

    def forward(self, step: int) -> Tensor:
        x = self.conv(draw(step, 2, 3, 4, 4).to(self.up.weight.dtype)).view(2, 24)
        return (self.down(self.up(x).tanh()) - draw(step + 1, 2, 24).to(x.dtype)).square().mean()


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(step).backward()
        optimizer.step()


def matrices(model: Net) -> list[Tensor]:
    return [w.detach().clone().flatten(1) for w in (model.conv.weight, model.up.weight, model.down.weight)]


def ranks(model: Net) -> list[int]:
    return [int(torch.linalg.matrix_rank(matrix)) for matrix in matrices(model)]


def closed_form_conv() -> nn.Conv2d:
    a, c, h, w = (
        torch.arange(n, dtype=F64).view([-1 if i == k else 1 for k in range(4)]) for i, n in enumerate((4, 3, 3, 3))
    )
    conv = nn.Conv2d(3, 4, 3, bias=False, dtype=F64)
    conv.weight.data = torch.cos(a + 2 * c + 0.3 * a * c + 0.7 * h + 1.1 * w * h - 0.5 * a * w)
    return conv


@pytest.mark.parametrize(
    ("view", "first", "pull", "kept", "norm"),
    [("channel", GOLDEN_FILTER, GOLDEN_PULL, 3, 7.463749), ("spatial", SPATIAL_FILTER, SPATIAL_PULL, 4, 7.309837)],
)
def test_a_convolution_is_that_of_the_released_code(view, first, pull, kept, norm):
    conv, how = closed_form_conv(), {"energy": 0.9, "convolutions": view}
    values = torch.linalg.svdvals(lo.nn.truncate_(closed_form_conv(), energy=1.0).weight.detach().flatten(1))
    expected = torch.tensor([5.146023, 4.821396, 2.445431, 0.681858], dtype=F64)
    torch.testing.assert_close(values, expected, atol=2e-6, rtol=0)
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.0)
    handle = lo.truncate_ranks(optimizer, conv, period=2, nuclear_weight=1.0, match_reference=True, **how)
    (conv(torch.zeros(1, 3, 4, 4, dtype=F64)).sum() * 0).backward()
    optimizer.step()
    assert handle.ranks() == {"weight": kept}
    for got, expected in ((conv.weight.detach(), first), (conv.weight.grad, pull)):
        torch.testing.assert_close(got[0], torch.tensor(expected, dtype=F64), atol=2e-6, rtol=0)
    assert float(conv.weight.detach().norm()) == pytest.approx(norm, abs=2e-6)
    once = lo.nn.truncate_(closed_form_conv(), **how)
    torch.testing.assert_close(once.weight, conv.weight, atol=1e-12, rtol=0)


def test_a_closed_form_regression_ends_at_the_numbers_of_the_transcription():
    model, t, i = nn.Linear(8, 6, bias=False, dtype=F64), torch.arange(12.0, dtype=F64), torch.arange(6.0, dtype=F64)
    model.weight.data.copy_(closed_form_weight(6, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    lo.truncate_ranks(
        optimizer, model, energy=0.9, period=2, nuclear_weight=0.05, match_reference=True, include="weight"
    )
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = 0.5 * (model(closed_form_inputs()) - torch.cos(0.3 * t[:, None] + 0.5 * i)).square().sum() / 12
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx([8.428141, 7.890463, 6.973187, 5.820053], abs=2e-6)
    torch.testing.assert_close(model.weight.detach(), torch.tensor(GOLDEN_LINEAR, dtype=F64), atol=2e-6, rtol=0)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)], ids=["tall", "wide", "square"])
def test_sgd_with_momentum_is_that_of_the_released_code(shape):
    start, x, y = falling(0, *shape), draw(5, 12, shape[1]), draw(6, 12, shape[0])
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}
    expected = reference_sgd(
        start.numpy(),
        lambda w: (x.numpy() @ w.T - y.numpy()).T @ x.numpy() / 12,
        7,
        **{"energy": 0.9, "period": 3, "nuclear_weight": 0.05, **options},
    )
    model = nn.Linear(*shape[::-1], bias=False, dtype=F64)
    model.weight.data.copy_(start)
    optimizer = torch.optim.SGD(model.parameters(), **options)
    lo.truncate_ranks(optimizer, model, energy=0.9, period=3, nuclear_weight=0.05, match_reference=True)
    for _ in range(7):
        optimizer.zero_grad()
        (0.5 * (model(x) - y).square().sum() / 12).backward()
        with torch.no_grad():  # a look at the model in between changes nothing
            model(x)
        optimizer.step()
    np.testing.assert_allclose(model.weight.detach().numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [torch.optim.AdamW, lo.GaLoreAdamW], ids=["torch", "galore"])
def test_truncation_follows_every_periodth_step_and_singular_values_shrink_by_the_learning_rate(make):
    model, plain = Net(), Net()
    optimizers = [make(m.parameters(), lr=0.02, weight_decay=0.0) for m in (model, plain)]
    handle = lo.truncate_ranks(optimizers[0], model, energy=0.95, period=3, nuclear_weight=2.0)
    assert handle.ranks() == {}
    for step in range(6):
        run(model, optimizers[0], range(step, step + 1))
        run(plain, optimizers[1], range(step, step + 1))
        if step % 3 == 2:
            for got, before in zip(matrices(model), matrices(plain), strict=True):
                expected, _ = truncate(before.numpy(), 0.95, 0.02 * 2.0)
                np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-12)
            assert list(handle.ranks().values()) == ranks(model)
            assert all(rank < full for rank, full in zip(ranks(model), (6, 24, 24), strict=True))
            plain.load_state_dict(model.state_dict())
        else:
            assert all(torch.equal(a, b) for a, b in zip(matrices(model), matrices(plain), strict=True))
    assert list(handle.ranks()) == ["conv.weight", "up.weight", "down.weight"]


def test_in_gradient_mode_the_step_after_a_truncation_sees_the_subgradient():
    model, plain = Net(), Net()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
    lo.truncate_ranks(optimizers[0], model, rank=4, period=2, nuclear_weight=0.3, mode="gradient")
    for step in range(5):
        before = matrices(model)
        run(model, optimizers[0], range(step, step + 1))
        run(plain, optimizers[1], range(step, step + 1))
        for got, old, other in zip(matrices(model), before, matrices(plain), strict=True):
            if step % 2 == 0:  # no truncation after it
                u, _, vt = torch.linalg.svd(old, full_matrices=False)
                pull = u[:, :4] @ vt[:4] if step else 0.0
                torch.testing.assert_close(got, other - 0.1 * 0.3 * pull, atol=1e-12, rtol=0)
        plain.load_state_dict(model.state_dict())
    assert ranks(model) != [4, 4, 4]  # the last step was not followed by one


@pytest.mark.parametrize("reference", [True, False])
def test_each_matrix_of_a_stack_is_pulled_along_its_own_directions_and_a_zero_one_is_not(reference):
    """Three kernels of ranks 1, 3 and 0: the largest rank is not that of the others."""
    conv = nn.Conv2d(4, 3, 3, bias=False, dtype=F64)
    conv.weight.data[0] = torch.outer(draw(0, 4), draw(1, 9)).view(4, 3, 3)
    conv.weight.data[1] = falling(2, 4, 9, 0.6).view(4, 3, 3)
    conv.weight.data[2] = 0.0
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.0)
    how = {"match_reference": True} if reference else {"mode": "gradient"}
    options = {"energy": 0.95, "period": 2, "nuclear_weight": 1.0, "convolutions": "filter"}
    handle = lo.truncate_ranks(optimizer, conv, **options, **how)
    for _ in range(1 if reference else 3):
        conv.weight.grad = torch.zeros_like(conv.weight)
        optimizer.step()
    found = []
    for got, kernel in zip(conv.weight.grad.flatten(2), conv.weight.detach().flatten(2), strict=True):
        u, s, vt = torch.linalg.svd(kernel, full_matrices=False)
        k = int((s > 1e-12).sum())
        found.append(k)
        torch.testing.assert_close(got, u[:, :k] @ vt[:k], atol=1e-10, rtol=0)
    assert found == [1, 3, 0]
    assert handle.ranks() == {"weight": 3}


def test_what_rounding_to_16_bits_leaves_pulls_in_no_direction():
    """A matrix of rank 2 that may keep 4: the third value is that of rounding, far above the precision of float32."""
    model = nn.Linear(48, 32, bias=False)
    model.weight.data = (draw(0, 32, 2) @ draw(1, 2, 48)).to(BF16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    lo.truncate_ranks(optimizer, model, rank=4, nuclear_weight=1.0, match_reference=True, include="weight")
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    assert torch.linalg.svdvals(model.weight.grad.double()) == pytest.approx([1, 1] + [0] * 30, abs=0.02)


@pytest.mark.parametrize("cut", [{"energy": 0.6}, {"rank": 2}, {"threshold": 1.2}], ids=str)
def test_a_stack_in_many_parts_is_that_of_its_matrices(cut, monkeypatch):
    """Parts of two matrices, of which some are cut and some are not."""
    monkeypatch.setattr("lowrank_optim.nn.truncate.CHUNK_ELEMENTS", 80)
    stack = torch.stack([falling(seed, 5, 7, 0.3 + 0.15 * seed) * (seed + 0.5) for seed in range(5)])
    stack[1], stack[3] = 0.0, torch.outer(draw(1, 5), draw(2, 7))
    found, ranks = truncated_stack(stack, RankCut(**cut))
    for new, old, k in zip(found, stack, ranks, strict=True):
        (alone, kept) = truncated_stack(old, RankCut(**cut))
        assert kept == [k]
        torch.testing.assert_close(new, alone, atol=1e-13, rtol=0)
        assert torch.equal(new, old) == (alone is old)
        assert int(torch.linalg.matrix_rank(new)) == min(k, int(torch.linalg.matrix_rank(old)))
    assert ranks[1] == 0
    assert len(set(ranks)) > (1 if "rank" in cut else 2)


def test_matrices_of_one_row_are_not_decomposed(monkeypatch):
    """Depthwise kernels have rank 1, whatever the cut."""
    conv = nn.Conv2d(96, 96, 3, groups=96, bias=False)
    conv.weight.data[5] = 0.0
    before = conv.weight.detach().clone()
    monkeypatch.setattr(torch.linalg, "svd", None)
    lo.nn.truncate_(conv, energy=0.5)
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
    handle = lo.truncate_ranks(optimizer, conv, threshold=5.0, period=1)
    conv.weight.grad = torch.zeros_like(conv.weight)
    optimizer.step()
    assert handle.ranks() == {"weight": 1}
    assert torch.equal(conv.weight, before)


@pytest.mark.parametrize(
    ("settings", "dtype", "late"),
    [
        ({"energy": 0.8, "nuclear_weight": 0.5}, torch.float32, True),
        ({"energy": 0.8, "nuclear_weight": 0.5}, BF16, False),
        ({"rank": 0.25, "nuclear_weight": 0.5, "mode": "gradient"}, BF16, True),
        ({"energy": 0.8, "nuclear_weight": 0.5, "match_reference": True}, torch.float32, False),
    ],
    ids=str,
)
def test_resume_is_exact(settings, dtype, late):
    """Between two truncations, at one, and after the gradient of one; with stochastic rounding in bfloat16."""

    def build() -> tuple[Net, torch.optim.Optimizer]:
        model = Net(dtype)
        rounding = {"stochastic_rounding": True} if dtype == BF16 else {}
        return model, lo.FiraAdamW(lo.param_groups(model, rank=4), lr=0.02, **rounding)

    whole, optimizer = build()
    lo.truncate_ranks(optimizer, whole, period=3, **settings)
    for stop in (2, 3, 4):
        run(whole, optimizer, range(0 if stop == 2 else stop - 1, stop))
        model, resumed = build()
        if not late:
            lo.truncate_ranks(resumed, model, period=3, **settings)
        resume(optimizer, whole.parameters(), resumed, model.parameters())
        if late:
            lo.truncate_ranks(resumed, model, period=3, **settings)
        reference, going = copy.deepcopy((whole, optimizer))
        handle = lo.truncate_ranks(going, reference, period=3, **settings)  # hooks are not copied
        run(reference, going, range(stop, 8))
        run(model, resumed, range(stop, 8))
        assert_same_run(going, reference.parameters(), resumed, model.parameters())
        assert len(handle.ranks()) == 3


def test_updates_in_backward_are_truncated_as_ordinary_ones():
    ends = []
    for in_backward in (False, True):
        model = Net()
        optimizer = lo.GaLoreAdamW(lo.param_groups(model, rank=4), lr=0.02)
        lo.truncate_ranks(optimizer, model, energy=0.9, period=2, nuclear_weight=1.0)
        if in_backward:
            lo.update_in_backward(optimizer)
        run(model, optimizer, range(5))
        ends.append(matrices(model))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (3, 20, 16)], ids=["tall", "wide", "stack"])
def test_what_is_left_has_the_energy_that_was_asked_for_at_the_smallest_rank(shape):
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(draw(0, *shape))

    stack = draw(0, *shape).view(-1, *shape[-2:])
    for energy in (0.3, 0.8, 0.99, 1.0):
        model = lo.nn.truncate_(Holder(), energy=energy, include="experts")
        for old, new in zip(stack, model.experts.detach().view(-1, *shape[-2:]), strict=True):
            values, k = torch.linalg.svdvals(old), int(torch.linalg.matrix_rank(new))
            lost = (old - new).square().sum()
            assert lost <= (1 - energy) * old.square().sum() + 1e-12
            torch.testing.assert_close(lost, values[k:].square().sum(), atol=1e-12, rtol=1e-12)
            assert values[: k - 1].square().sum() < energy * values.square().sum()
    # The rank does not depend on the size of the weights.
    for factor in (1e-6, 1e6):
        model = Holder()
        model.experts.data *= factor
        scaled = lo.nn.truncate_(model, energy=0.8, include="experts").experts.detach()
        plain = lo.nn.truncate_(Holder(), energy=0.8, include="experts").experts.detach()
        torch.testing.assert_close(scaled / factor, plain, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("cut", [{"rank": 5}, {"rank": 0.25}, {"threshold": 0.3}, {"energy": 1.0}], ids=str)
def test_a_second_cut_changes_no_bit(cut):
    model = lo.nn.truncate_(Net(), **cut)
    once = matrices(model)
    lo.nn.truncate_(model, **cut)
    assert all(torch.equal(a, b) for a, b in zip(once, matrices(model), strict=True))
    found = {"rank": [5, 5, 5], "threshold": [6, 6, 6], "energy": [6, 24, 24]}[next(iter(cut))]
    assert ranks(model) == ([2, 6, 6] if cut == {"rank": 0.25} else found)


def test_zero_matrices_stay_and_a_threshold_leaves_at_least_one():
    model = Net()
    nn.init.zeros_(model.up.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = lo.truncate_ranks(optimizer, model, threshold=100.0, period=1)
    run(model, optimizer, range(1))
    assert handle.ranks() == {"conv.weight": 1, "up.weight": 0, "down.weight": 1}
    assert not model.up.weight.any()
    shrunk = Net()
    optimizer = torch.optim.SGD([{"params": shrunk.parameters(), "lr": 1e-9}])
    lo.truncate_ranks(optimizer, shrunk, rank=4, period=1, nuclear_weight=1e10)
    run(shrunk, optimizer, range(1))
    assert not shrunk.up.weight.any()  # σ ≤ 1 < ηλ = 10


def test_a_matrix_that_is_not_finite_is_left_alone_and_counted():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = lo.truncate_ranks(optimizer, model, rank=3, period=1)
    model.up.weight.data[2, 3] = torch.inf
    before = model.up.weight.detach().clone()
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.step()
    assert torch.equal(model.up.weight, before)
    assert handle.skipped == {"up.weight": 2}
    assert handle.ranks() == {"conv.weight": 3, "down.weight": 3}


def test_frozen_weights_stay_and_tied_ones_are_cut_once():
    model = Net()
    model.up.weight.requires_grad_(False)
    before = model.up.weight.detach().clone()
    model.tied = nn.Linear(40, 24)
    model.tied.weight = model.down.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = lo.truncate_ranks(optimizer, model, rank=3, period=1)
    run(model, optimizer, range(1))
    assert torch.equal(model.up.weight, before)
    assert handle.ranks() == {"conv.weight": 3, "down.weight": 3}


def test_what_rounding_drops_is_kept_and_masters_follow():
    """bfloat16 weights with error bits stand for the float32 matrix, which has the rank to the bit that they keep."""
    model = Net(BF16)
    optimizer = lo.GaLoreAdamW(lo.param_groups(model, rank=4), lr=0.02, weight_error_bits=16)
    lo.truncate_ranks(optimizer, model, rank=3, period=2)
    run(model, optimizer, range(2))
    state = optimizer.state[model.up.weight]
    error = lo.kernels.WeightError(state["weight_error"], state["weight_error_low"])
    values = torch.linalg.svdvals(lo.kernels.joined(model.up.weight.detach(), error))
    assert values[3] < 1e-5 * values[0]
    assert torch.linalg.svdvals(model.up.weight.detach().float())[3] > 1e-4 * values[0]


def test_bfloat16_weights_are_rounded_stochastically_where_the_optimizer_rounds_so():
    """Their mean over seeds is nearer to the matrix of rank 3 than what rounding to nearest leaves."""

    def cut(**options: object) -> Tensor:
        model = Net(BF16)
        optimizer = lo.GaLoreAdamW([model.up.weight], rank=4, lr=0.0, **options)
        lo.truncate_ranks(optimizer, model, rank=3, period=1)
        model.up.weight.grad = torch.zeros_like(model.up.weight)
        optimizer.step()
        return model.up.weight.detach().double()

    u, s, vt = torch.linalg.svd(Net(BF16).up.weight.detach().float(), full_matrices=False)
    exact = ((u[:, :3] * s[:3]) @ vt[:3]).double()
    nearest, drawn = cut(), [cut(stochastic_rounding=True, seed=seed) for seed in range(40)]
    assert torch.equal(cut(stochastic_rounding=True, seed=7), drawn[7])
    assert not torch.equal(drawn[0], drawn[1])
    assert (torch.stack(drawn).mean(0) - exact).norm() < 0.5 * (nearest - exact).norm()


def spatial(weight: np.ndarray) -> np.ndarray:
    """(c·h) × (a·w) of kernels a×c×h×w, entry by entry."""
    (places,) = kernel_places(weight.shape, "spatial")
    return weight.flatten()[places]


@pytest.mark.parametrize("view", ["channel", "spatial", "filter"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("make", [nn.Conv2d, nn.ConvTranspose2d, nn.Conv1d, nn.Conv3d], ids=lambda make: make.__name__)
def test_every_group_has_matrices_of_its_own(make, groups, view):
    """Against the transcription, which truncates the numbers of one matrix after the other; a handle finds the same."""
    size = {"1": (5,), "2": (3, 5), "3": (3, 2, 2)}[make.__name__[-2]]
    conv = make(6, 8, size, groups=groups, bias=False, dtype=F64)
    start, how = conv.weight.detach().clone(), {"energy": 0.6, "convolutions": view}
    if view == "spatial" and len(size) != 2:
        with pytest.raises(ValueError, match="needs kernels of height and width"):
            lo.nn.truncate_(conv, **how)
        return
    expected, most = truncate_kernels(start.numpy(), 0.6, view, groups, make is nn.ConvTranspose2d)
    assert 1 <= most < min(len(side) for side in kernel_places(start.shape, view, groups, make is nn.ConvTranspose2d))
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.0)
    handle = lo.truncate_ranks(optimizer, conv, period=1, **how)
    conv.weight.grad = torch.zeros_like(conv.weight)
    optimizer.step()
    assert handle.ranks() == {"weight": most}
    np.testing.assert_allclose(conv.weight.detach().numpy(), expected, rtol=0, atol=1e-13)
    conv.weight.data = start.contiguous(memory_format=torch.channels_last) if len(size) == 2 else start
    lo.nn.truncate_(conv, **how)
    np.testing.assert_allclose(conv.weight.detach().numpy(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("view", ["channel", "spatial", "filter"])
def test_kernels_that_two_convolutions_see_differently_are_refused_by_name(view):
    """Whichever came last decided. Of one group, the channel view is that of both."""
    for first, second, same in (
        (nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3), view == "channel"),
        (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, stride=2), True),
        (nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=2), False),
    ):
        model = nn.Sequential(first, second)
        second.weight = first.weight
        before = first.weight.detach().clone()
        if same:
            lo.nn.truncate_(model, energy=0.5, convolutions=view)
            assert not torch.equal(first.weight, before)
            continue
        with pytest.raises(ValueError, match=r"^0\.weight is the weight of 0, 1, which are different convolutions"):
            lo.nn.truncate_(model, energy=0.5, convolutions=view)
        assert torch.equal(first.weight, before)


def test_a_look_at_the_model_makes_no_power_iteration():
    """Of a spectral norm in training, reading `weight` makes one."""
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 4, 3))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    lo.nn.truncate_(model, rank=1, include="1.weight")
    assert before
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_two_smaller_convolutions_do_what_a_truncated_one_with_groups_does():
    """The views of groups: k kernels of each, then 1×1; k columns of each, then rows; and k mixtures for each kernel."""
    x, conv2d = draw(1, 2, 6, 9, 11), nn.functional.conv2d
    for view in ("channel", "spatial", "filter"):
        conv, k = nn.Conv2d(6, 8, (3, 5), groups=2, bias=False, dtype=F64), 2
        lo.nn.truncate_(conv, rank=k, convolutions=view)
        flat = conv.weight.detach().flatten()
        svds = [np.linalg.svd(flat.numpy()[p], full_matrices=False) for p in kernel_places((8, 3, 3, 5), view, 2)]
        first, second = (
            torch.tensor(np.stack(each))
            for each in zip(*((u[:, :k] * s[:k], vt[:k]) for u, s, vt in svds), strict=True)
        )
        if view == "channel":  # (2, 4, k) and (2, k, 3·3·5)
            both = conv2d(conv2d(x, second.reshape(2 * k, 3, 3, 5), groups=2), first.reshape(8, k, 1, 1), groups=2)
        elif view == "spatial":  # (2, 3·3, k) and (2, k, 4·5)
            tall = first.mT.reshape(2 * k, 3, 3, 1)
            wide = second.reshape(2, k, 4, 1, 5).transpose(1, 2).reshape(8, k, 1, 5)
            both = conv2d(conv2d(x, tall, groups=2), wide, groups=2)
        else:  # (8, 3, k) and (8, k, 3·5)
            both = conv2d(conv2d(x, first.mT.reshape(8 * k, 3, 1, 1), groups=2), second.reshape(8, k, 3, 5), groups=8)
        torch.testing.assert_close(conv(x), both, atol=1e-12, rtol=1e-12)
    depthwise = nn.Conv2d(6, 6, 3, groups=6, dtype=F64)  # nothing to cut: a matrix of one row each
    before = depthwise.weight.detach().clone()
    lo.nn.truncate_(depthwise, energy=0.3)
    assert torch.equal(depthwise.weight, before)


def test_spatial_kernels_are_those_of_the_formula_and_a_column_and_a_row_do_the_same():
    conv = nn.Conv2d(3, 4, (3, 5), bias=False, dtype=F64)
    start, kept = spatial(conv.weight.detach().numpy()), 2
    lo.nn.truncate_(conv, rank=kept, convolutions="spatial")
    u, s, vt = np.linalg.svd(start, full_matrices=False)
    np.testing.assert_allclose(spatial(conv.weight.detach().numpy()), u[:, :2] * s[:2] @ vt[:2], rtol=0, atol=1e-13)
    x = draw(1, 2, 3, 9, 11)
    tall = torch.tensor(u[:, :kept] * s[:kept]).T.reshape(kept, 3, 3, 1)
    wide = torch.tensor(vt[:kept]).reshape(kept, 4, 1, 5).transpose(0, 1)
    both = nn.functional.conv2d(nn.functional.conv2d(x, tall), wide)
    torch.testing.assert_close(conv(x), both, atol=1e-12, rtol=1e-12)
    back = nn.ConvTranspose2d(4, 3, (3, 5), bias=False, dtype=F64)  # kernels 4×3×3×5, the inputs first
    start = spatial(back.weight.detach().transpose(0, 1).numpy())
    lo.nn.truncate_(back, energy=0.7, convolutions="spatial")
    expected, _ = truncate(start, 0.7)
    np.testing.assert_allclose(spatial(back.weight.detach().transpose(0, 1).numpy()), expected, rtol=0, atol=1e-13)


def test_spatial_kernels_in_training_are_those_of_the_released_code():
    """Against the transcription on the matrix of one convolution that lies channels last."""
    conv = closed_form_conv()
    start = spatial(conv.weight.detach().numpy())
    conv = conv.to(memory_format=torch.channels_last)
    goal = draw(3, 4, 3, 3, 3)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}
    expected = reference_sgd(
        start, lambda m: m - spatial(goal.numpy()), 5, energy=0.9, period=2, nuclear_weight=0.05, **options
    )
    optimizer = torch.optim.SGD(conv.parameters(), **options)
    how = {"energy": 0.9, "period": 2, "nuclear_weight": 0.05, "match_reference": True, "convolutions": "spatial"}
    handle = lo.truncate_ranks(optimizer, conv, **how)
    for _ in range(5):
        optimizer.zero_grad()
        conv(torch.zeros(1, 3, 3, 3, dtype=F64))  # the forward pass that truncates
        (0.5 * (conv.weight - goal).square().sum()).backward()
        optimizer.step()
    np.testing.assert_allclose(spatial(conv.weight.detach().numpy()), expected, rtol=0, atol=1e-12)
    assert 0 < handle.ranks()["weight"] < 9


def test_a_plan_counts_the_decomposition_of_the_largest_matrix_and_describe_says_what_is_done():
    """To the byte: float32 of a 16-bit matrix, its decomposition, what is left of it, and the product."""
    model = nn.Sequential(nn.Linear(96, 128, bias=False), nn.Linear(128, 64, bias=False)).to(BF16)
    batch = torch.zeros(4, 96, dtype=BF16)

    def build(model: nn.Module, **options: object) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        lo.truncate_ranks(optimizer, model, **options)
        return optimizer

    def bytes_of(**options: object) -> int:
        made = lo.plan(model, lambda m: build(m, **options), example_batch=batch, device="cpu")
        assert "truncation" in made.when or options.get("match_reference")
        return made.temporaries_bytes

    m, n = 128, 96
    found = {k: 4 * (m * n + (m * n + n * n + n) + k * m + m * n) for k in (5, n)}
    assert bytes_of(rank=5) == found[5]
    assert bytes_of(rank=5, match_reference=True, nuclear_weight=0.1) == found[5]
    assert bytes_of(energy=0.9) == bytes_of(threshold=0.1) == found[n]  # k is not known: the most
    late = lo.plan(
        model,
        lambda m: build(m, rank=5, mode="gradient", nuclear_weight=0.1),
        example_batch=batch,
        device="cuda",
    )
    assert late.phases["step after a truncation, optimizer"] > 1.003 * late.phases["ordinary step, optimizer"]
    shown = lo.describe(build(model, energy=0.9, nuclear_weight=0.1))
    said = "ranks truncated to energy 0.9 every 20 steps, nuclear_weight 0.1 (decoupled): *.weight x2"
    assert shown.splitlines()[-1] == said


def test_the_handle_ends_keeps_nothing_alive_and_there_is_one():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lo.truncate_ranks(optimizer, model, rank=3, period=1):
        with pytest.raises(RuntimeError, match="are truncated already"):
            lo.truncate_ranks(optimizer, model, rank=3)
        run(model, optimizer, range(1))
        assert optimizer.param_groups[0]["truncation_step"] == 1
    run(model, optimizer, range(1))
    assert min(ranks(model)) > 3
    assert not {"truncation_step", "truncation_last", "truncation_ranks"} & optimizer.param_groups[0].keys()
    handle, gone = lo.truncate_ranks(optimizer, model, rank=3, match_reference=True), weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    with pytest.raises(RuntimeError, match="does not exist any more"):
        handle.ranks()
    handle.remove()
    assert not model.up._forward_pre_hooks


def test_gradients_that_are_freed_in_backward_are_refused():
    model = Net()
    optimizer = lo.GaLoreAdamW(lo.param_groups(model, rank=4))
    attached = lo.update_in_backward(optimizer)
    with pytest.raises(RuntimeError, match='mode is "gradient"'):
        lo.truncate_ranks(optimizer, model, rank=3, mode="gradient", nuclear_weight=0.1)
    attached.remove()
    lo.truncate_ranks(optimizer, model, rank=3, mode="gradient", nuclear_weight=0.1)
    lo.update_in_backward(optimizer)
    model(0).backward()
    with pytest.raises(RuntimeError, match='mode is "gradient"'):
        optimizer.step()


BAD = [
    ({}, "give one of energy, rank and threshold.*none of them"),
    ({"energy": 0.9, "rank": 3}, r"got energy=0.9, rank=3"),
    ({"energy": 0.0}, r"energy is 0.0; it must be a share in \(0, 1\]"),
    ({"energy": 1.5}, "energy is 1.5"),
    ({"energy": True}, "energy is True"),
    ({"rank": 0}, "rank is 0; it must be an int of at least 1"),
    ({"rank": 1.5}, "rank is 1.5"),
    ({"threshold": -0.1}, "threshold is -0.1; it must be a number above 0"),
    ({"rank": 3, "include": "nowhere"}, "include pattern 'nowhere' matches no parameter"),
    ({"rank": 3, "convolutions": "VH"}, "convolutions is 'VH'; valid values are 'channel', 'spatial', 'filter'"),
]
BAD_OF_HANDLES = [
    ({"rank": 3, "period": 0}, "period is 0; it must be an int of at least 1"),
    ({"rank": 3, "period": 2.5}, "period is 2.5"),
    ({"rank": 3, "nuclear_weight": -1.0}, "nuclear_weight is -1.0; it must be a finite number of at least 0"),
    ({"rank": 3, "mode": "proximal"}, "mode is 'proximal'; valid values are 'decoupled', 'gradient'"),
    ({"rank": 3, "mode": "decoupled", "match_reference": True}, "match_reference is True, and the released code"),
]


@pytest.mark.parametrize(
    ("options", "message"), [*BAD, *BAD_OF_HANDLES], ids=[str(o) for o, _ in (*BAD, *BAD_OF_HANDLES)]
)
def test_bad_input_is_refused_and_changes_nothing(options, message):
    model = Net()
    before, optimizer = matrices(model), torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        lo.truncate_ranks(optimizer, model, **options)
    if (options, message) in BAD:
        with pytest.raises(ValueError, match=message):
            lo.nn.truncate_(model, **options)
    run(model, optimizer, range(1))
    assert ranks(model) == [6, 24, 24]
    assert "truncation_step" not in optimizer.param_groups[0]
    assert not any(torch.equal(a, b) for a, b in zip(before, matrices(model), strict=True))


def test_models_and_optimizers_that_do_not_fit_are_refused():
    model, other = Net(), Net()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"has none of the matrices of this model \(conv.weight"):
        lo.truncate_ranks(optimizer, model, rank=3)
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got Net"):
        lo.truncate_ranks(model, model, rank=3)
    with pytest.raises(TypeError, match=r"must be an nn.Module"):
        lo.truncate_ranks(optimizer, [model], rank=3)
    coded = lo.nn.quantize_weights_(nn.Sequential(nn.Linear(64, 64)))
    for call in (lo.nn.truncate_, partial(lo.truncate_ranks, torch.optim.SGD(coded.parameters(), lr=0.1))):
        with pytest.raises(ValueError, match=r"0.weight is stored in 8 bits"):
            call(coded, rank=3)
    complex_one = nn.Sequential(nn.Linear(8, 8, dtype=torch.complex64))
    for call in (lo.nn.truncate_, partial(lo.truncate_ranks, torch.optim.SGD(complex_one.parameters(), lr=0.1))):
        with pytest.raises(ValueError, match=r"0.weight is torch.complex64; floating-point weights are needed"):
            call(complex_one, rank=3, include="0")
    with pytest.raises(
        ValueError, match=r"0.weight is \(8, 8, 3\); convolutions='spatial' needs kernels of height and width"
    ):
        lo.nn.truncate_(nn.Sequential(nn.Conv1d(8, 8, 3)), rank=3, convolutions="spatial")
    with pytest.raises(ValueError, match="is on the meta device"):
        lo.nn.truncate_(nn.Linear(8, 8, device="meta"), rank=3)
    model.down.weight.data[0, 0] = torch.nan
    before = matrices(model)
    with pytest.raises(ValueError, match=r"down.weight is not finite"):
        lo.nn.truncate_(model, rank=3)
    assert all(torch.equal(a, b) for a, b in zip(before[:2], matrices(model)[:2], strict=True))
    lo.truncate_ranks(optimizer, other, rank=3, period=1)
    other.up.weight = nn.Parameter(other.up.weight.detach().clone())
    optimizer.param_groups[0]["params"] = list(other.parameters())
    with pytest.raises(RuntimeError, match=r"up.weight is not in the optimizer any more"):
        run(other, optimizer, range(1))


def test_describe_finds_the_handle_inside_of_a_wrapper():
    """Accelerate's optimizer is a torch one by class, and has none of its attributes."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, optimizer.state

    model = nn.Sequential(nn.Linear(12, 8, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lo.truncate_ranks(optimizer, model, rank=3, period=7)
    assert lo.describe(Wrapper(optimizer)) == lo.describe(optimizer)
    assert "every 7 steps" in lo.describe(optimizer)


def test_a_forward_pass_looks_at_the_weights_only_where_a_truncation_is_due(monkeypatch):
    """Each layer has a hook, and there are many layers."""
    looks, whether = [], RankTruncation.has_numbers.fget
    monkeypatch.setattr(RankTruncation, "has_numbers", property(lambda handle: looks.append(1) or whether(handle)))
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(8)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lo.truncate_ranks(optimizer, model, rank=3, period=2, match_reference=True)
    counts = []
    for _ in range(4):
        model(torch.randn(3, 12)).sum().backward()
        optimizer.step()
        counts.append(len(looks))
    assert counts == [1, 1, 2, 2]


def test_a_step_that_was_made_due_truncates_also_where_the_counter_comes_to_the_step_of_the_last_truncation():
    model = nn.Sequential(nn.Linear(12, 8, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = lo.truncate_ranks(optimizer, model, rank=3, period=2)
    for _ in range(2):
        model[0].weight.grad = torch.zeros_like(model[0].weight)
        optimizer.step()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(8, 12, generator=torch.Generator().manual_seed(0)))
    handle.make_due()
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    optimizer.step()
    assert torch.linalg.matrix_rank(model[0].weight) == 3
