"""SpectralSchedule: training against the equations with the dense gradient, draws and decompositions, resumed runs."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo
from lowrank_optim.kernels.counter_rng import PURPOSE_TRIPLETS, make_key
from lowrank_optim.nn import SpectralLinear
from lowrank_optim.nn.spectral_linear import draw_triplets
from tests.oracles.decompositions import closed_form_inputs, closed_form_weight
from tests.oracles.spectral import SGD, Adam, DenseSpectral

F64 = torch.float64
M, N, RANK = 14, 20, 3
LR, DECAY = 0.02, 0.3


def build(rank: int = RANK, dtype: torch.dtype = F64, scale: float = 1.0, **options: object) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(N, M, dtype=dtype))
    model[0].weight.data.mul_(scale)
    return lo.nn.spectral_(model, rank=rank, include="0", **options)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(30, size, generator=generator, dtype=F64) for size in (N, M))
    return x, y


def backward(model: nn.Module) -> None:
    x, y = data()
    dtype = next(model.parameters()).dtype
    (0.5 * (model(x.to(dtype)) - y.to(dtype)).square().sum() / 30).backward()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    layer = model[0]
    groups = [
        {"params": [layer.sigma], "weight_decay": DECAY},
        {"params": [layer.u_active, layer.v_active, layer.bias], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LR)


def own_adam(model: nn.Module, **options: object) -> lo.LowRankOptimizer:
    groups = lo.param_groups(model, rank=None, weight_decay=DECAY)
    return lo.LowRankOptimizer(groups, rule="adam", lr=LR, **options)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: lo.SpectralSchedule, steps: int) -> None:
    for _ in range(steps):
        backward(model)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


# ---------------------------------------------------------------------------------------------------------------- the equations


def follow(make: Callable[[nn.Module], torch.optim.Optimizer], steps: int, iterations: int, **options: object) -> int:
    """Train beside the dense equations: draws every 4 steps, a warm-up of 2. Returns how often a value was 0."""
    model = build(**options)
    layer, optimizer = model[0], make(model)
    schedule = lo.SpectralSchedule(model, optimizer, period=4, iterations=iterations, warmup=2)
    rules: dict[str, Callable[[], object]] = {"sigma": lambda: Adam(LR, DECAY), "vectors": lambda: Adam(LR)}
    if make is sgd:
        rules = dict.fromkeys(rules, lambda: SGD(LR))
    expected = DenseSpectral(layer.weight, layer.active.tolist(), lambda kind: rules[kind]())
    (x, y), unit, zeros, sets = data(), torch.ones(RANK, dtype=F64), 0, {tuple(expected.active)}
    for step in range(1, steps + 1):
        grad = (x @ expected.weight.mT + layer.bias.detach() - y).mT @ x / 30
        train(model, optimizer, schedule, 1)
        since, since_round = (step - 1) % 4, (step - 1) % (4 * iterations)
        shares = {"share": min(1, (since + 1) / 2), "share_sigma": min(1, (since_round + 1) / 2)}
        expected.step(grad, enhanced=layer.enhanced, tangent=layer.tangent, **shares)
        torch.testing.assert_close(layer.weight, expected.weight, atol=1e-9, rtol=1e-9)
        for vectors in (layer.u_active, layer.v_active):
            torch.testing.assert_close(vectors.norm(dim=0), unit, atol=1e-14, rtol=0)
        assert layer.sigma.min() >= 0
        zeros += int((layer.sigma == 0).sum())
        if step % (4 * iterations) == 0:
            expected.decompose(expected.weight)
            torch.testing.assert_close(layer.sigma.detach(), expected.sigma, atol=1e-9, rtol=1e-9)
        if step % 4 == 0:
            expected.draw(layer.active.tolist())
            sets.add(tuple(expected.active))
    assert len(sets) > steps // 8
    return zeros


@pytest.mark.parametrize("make", [sgd, adamw, own_adam], ids=lambda make: make.__name__)
@pytest.mark.parametrize(("enhanced", "tangent"), [(True, False), (False, True)])
def test_training_follows_the_equations_over_draws_and_decompositions(make, enhanced, tangent):
    follow(make, 19, iterations=2, enhanced=enhanced, tangent=tangent, scale=4)


@pytest.mark.parametrize("tangent", [False, True])
def test_a_step_of_sgd_changes_the_weight_to_the_first_order_as_the_equations_say(tangent):
    """−η [Σ_i (u_iᵀGv_i) u_iv_iᵀ + Σ_{i trained} Σ_i ((I − u_iu_iᵀ) G v_iv_iᵀ + u_iu_iᵀ G (I − v_iv_iᵀ))]."""
    model, rate = build(scale=4, tangent=tangent), 1e-8
    layer, (x, y) = model[0], data()
    before, sigma = layer.weight, layer.sigma.detach().clone()
    u, v = layer.vectors(layer.u_active, layer.v_active)
    grad = (x @ before.mT + layer.bias.detach() - y).mT @ x / 30
    change = torch.zeros_like(before)
    for i in range(M):
        a, b = u[:, i : i + 1], v[:, i : i + 1]
        change += (a.mT @ grad @ b) * a @ b.mT
        if i in layer.active.tolist():
            outside = (torch.eye(M, dtype=F64) - a @ a.mT) @ grad @ b @ b.mT
            change += sigma[i] * (outside + a @ a.mT @ grad @ (torch.eye(N, dtype=F64) - b @ b.mT))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    train(model, optimizer, lo.SpectralSchedule(model, optimizer, warmup=0), 1)
    torch.testing.assert_close((before - layer.weight) / rate, change, atol=1e-5, rtol=1e-5)


def test_values_stop_at_zero_and_keep_their_moments():
    assert follow(adamw, 14, iterations=100) > 3


def test_staggered_layers_follow_the_equations_at_steps_of_their_own():
    """Three layers, draws every 6 steps and decompositions every 12: the second is 2 steps early, the third 4."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(N, M, bias=False, dtype=F64) for _ in range(3))
    for layer in model:
        layer.weight.data.mul_(4)  # so that no value becomes 0, and no two are equal
    lo.nn.spectral_(model, rank=RANK)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    schedule = lo.SpectralSchedule(model, optimizer, period=6, iterations=2, warmup=3, stagger=True)
    expected = [DenseSpectral(layer.weight, layer.active.tolist(), lambda _: Adam(LR)) for layer in model]
    x, y = data()
    drawn: list[list[int]] = [[], [], []]
    for step in range(26):
        grads = [(x @ each.weight.mT - y).mT @ x / 30 for each in expected]
        before = [layer.active.tolist() for layer in model]
        sum(0.5 * (layer(x) - y).square().sum() / 30 for layer in model).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        for number, (layer, each, grad) in enumerate(zip(model, expected, grads, strict=True)):
            clock = step + 2 * number
            shares = [min(1, (min(clock % length, step) + 1) / 3) for length in (6, 12)]
            each.step(grad, share=shares[0], share_sigma=shares[1])
            torch.testing.assert_close(layer.weight, each.weight, atol=1e-9, rtol=1e-9)
            if clock % 12 == 11:
                each.decompose(each.weight)
            if clock % 6 == 5:
                each.draw(layer.active.tolist())
                drawn[number].append(step)
            else:
                assert layer.active.tolist() == before[number]
    assert drawn == [[5, 11, 17, 23], [3, 9, 15, 21], [1, 7, 13, 19, 25]]
    assert len({tuple(layer.active.tolist()) for layer in model}) > 1


def test_the_first_draw_and_later_ones_have_the_mixture_of_the_layers():
    for mixture in (0.0, 0.5, 1.0):
        model = build(mixture=mixture, seed=4)
        layer = model[0]
        key = make_key(4, layer.position, 0, PURPOSE_TRIPLETS)
        assert torch.equal(layer.order, draw_triplets(layer.sigma, RANK, mixture, key))
        schedule = lo.SpectralSchedule(model, torch.optim.SGD(model.parameters(), lr=0.0), period=1, warmup=0)
        schedule.step()
        key = make_key(4, layer.position, 1, PURPOSE_TRIPLETS)
        assert torch.equal(layer.order, draw_triplets(layer.sigma, RANK, mixture, key))
        assert schedule.state_dict()["mixtures"] == [mixture]
    other = lo.SpectralSchedule(model, torch.optim.SGD(model.parameters(), lr=0.0), period=1, warmup=0, mixture=0.0)
    other.step()
    key = make_key(4, layer.position, 1, PURPOSE_TRIPLETS)
    assert torch.equal(layer.order, draw_triplets(layer.sigma, RANK, 0.0, key))


def test_a_plan_counts_a_decomposition_and_describe_says_what_is_done():
    model = nn.Sequential(nn.Linear(96, 128, bias=False))

    def attached(model: nn.Module, attach: bool = True) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(model.parameters())
        schedule = lo.SpectralSchedule(model, optimizer, stagger=True)
        if attach:
            schedule.attach()
        return optimizer

    how = {"parametrization": ("spectral", {"rank": 8, "include": "0"}), "example_batch": torch.zeros(4, 96)}
    plans = [lo.plan(model, lambda m, a=on: attached(m, a), device="cuda", **how) for on in (True, False)]
    m, n = 128, 96
    assert plans[0].when.startswith("step with a decomposition, optimizer")
    assert plans[0].peak_bytes - plans[1].peak_bytes > 4 * 3 * m * n
    # The last step that is simulated decomposes, and takes the moments: the state is what there was before.
    trained = 4 * (8 * (m + n) + min(m, n))
    assert plans[0].state == plans[1].state
    assert sum(plans[0].state.values()) == pytest.approx(2 * trained, rel=0.01)
    optimizer = attached(build())
    said = "triplets drawn every 200 steps, weights decomposed after some draws: 0"
    assert lo.describe(optimizer).splitlines()[-1] == said


# W after three steps on 6×8 numbers in closed form, of which triplets 2 and 4 have their vectors trained; by numpy.
GOLDEN = {
    "sgd": [
        [0.914506, -0.373226, -0.57543, 0.882495, -0.123066, -0.772664, 0.76027, 0.263443],
        [0.481689, -0.874713, 0.706542, -0.056634, -0.636079, 0.909917, -0.568442, -0.150441],
        [-0.366249, -0.107309, 0.537535, -0.823777, 0.874937, -0.683925, 0.300768, 0.142238],
        [-0.899772, 0.843213, -0.727506, 0.567273, -0.393159, 0.20164, 0.008993, -0.244351],
        [-0.570995, 0.537931, -0.510105, 0.472153, -0.419906, 0.3599, -0.30472, 0.235829],
        [0.259441, -0.541438, 0.753262, -0.873037, 0.887655, -0.787375, 0.577047, -0.293605],
    ],
    "adam": [
        [1.066852, -0.391864, -0.583093, 0.97149, -0.075561, -0.77375, 0.808533, 0.271669],
        [0.470723, -0.906077, 0.788833, -0.115226, -0.660059, 1.012853, -0.643781, -0.171604],
        [-0.364656, -0.123952, 0.571982, -0.902066, 0.942672, -0.761368, 0.341285, 0.154351],
        [-0.895182, 0.889243, -0.826843, 0.665004, -0.453187, 0.193988, 0.037176, -0.247221],
        [-0.570148, 0.57681, -0.577811, 0.536135, -0.470478, 0.379544, -0.314186, 0.256977],
        [0.366043, -0.62735, 0.799728, -0.903159, 0.955625, -0.88613, 0.661168, -0.303501],
    ],
}


@pytest.mark.parametrize(
    ("rule", "losses", "values", "angle"),
    [
        ("sgd", [8.773252, 8.24856, 7.765853], [2.873856, 2.070044, 1.909512, 0.531171, 0.315806, 0.0], 0.079004),
        ("adam", [8.773252, 8.613225, 8.450076], [3.14614, 2.230722, 2.043846, 0.565081, 0.295292, 0.0], 0.248254),
    ],
)
def test_three_steps_in_closed_form_and_vectors_leave_the_right_angle(rule, losses, values, angle):
    """SGD at 0.05 and Adam at 0.02; ‖UᵀU − I‖ grows between two decompositions."""
    layer = SpectralLinear(8, 6, rank=2, dtype=F64)
    layer.set_weight(closed_form_weight(6, 8))
    u, v = layer.vectors(layer.u_active, layer.v_active)
    order = torch.tensor([2, 4, 0, 1, 3, 5], dtype=torch.int32)
    layer.set_frozen(u, v, order)
    x, t, i = closed_form_inputs(), torch.arange(12, dtype=F64).unsqueeze(1), torch.arange(6, dtype=F64)
    with torch.no_grad():
        layer.u_active.copy_(u[:, [2, 4]])
        layer.v_active.copy_(v[:, [2, 4]])
        layer.bias.copy_(0.01 * i)
    layer.bias.requires_grad_(False)
    torch.testing.assert_close(layer.weight, closed_form_weight(6, 8), atol=1e-12, rtol=0)
    trained = [param for param in layer.parameters() if param.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05) if rule == "sgd" else torch.optim.Adam(trained, lr=0.02)
    schedule, found = lo.SpectralSchedule(layer, optimizer, warmup=0), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = 0.5 * (layer(x) - torch.cos(0.3 * t + 0.5 * i)).square().sum() / 12
        loss.backward()
        optimizer.step()
        schedule.step()
        found.append(loss.item())
    assert found == pytest.approx(losses, abs=2e-6)
    torch.testing.assert_close(layer.sigma.detach(), torch.tensor(values, dtype=F64), atol=2e-6, rtol=0)
    torch.testing.assert_close(layer.weight, torch.tensor(GOLDEN[rule], dtype=F64), atol=2e-6, rtol=0)
    u, _ = layer.vectors(layer.u_active, layer.v_active)
    assert (u.mT @ u - torch.eye(6, dtype=F64)).norm().item() == pytest.approx(angle, abs=2e-6)


def test_draws_and_decompositions_do_not_change_the_weight():
    model = build(rank=4)
    layer = model[0]
    with torch.no_grad():  # no right angles, and values in no order
        layer.u_active.add_(0.3 * torch.randn_like(layer.u_active))
        layer.u_active.div_(layer.u_active.norm(dim=0))
        layer.sigma.copy_(layer.sigma[torch.randperm(M)])
    weight, orders = layer.weight, []
    schedule = lo.SpectralSchedule(model, torch.optim.SGD(model.parameters(), lr=0.0), period=1, iterations=3, warmup=0)
    for step in range(1, 7):
        schedule.step()
        orders.append(layer.active.tolist())
        torch.testing.assert_close(layer.weight, weight, atol=1e-12, rtol=1e-12)
        u, v = layer.vectors(layer.u_active, layer.v_active)
        right = (u.mT @ u - torch.eye(M, dtype=F64)).norm() < 1e-12
        assert bool(right) == (step >= 3)
        torch.testing.assert_close((u * layer.sigma) @ v.mT, weight, atol=1e-12, rtol=1e-12)
    assert len({tuple(order) for order in orders}) > 3
    torch.testing.assert_close(layer.sigma.detach(), torch.linalg.svdvals(weight), atol=1e-12, rtol=1e-12)


def test_signs_of_pairs_change_nothing():
    first = build()
    second = copy.deepcopy(first)
    layer = second[0]
    with torch.no_grad():
        for u, v in ((layer.u_active, layer.v_active), (layer.u_frozen, layer.v_frozen)):
            signs = torch.where(torch.rand(u.shape[1]) < 0.5, -1.0, 1.0).double()
            assert (signs < 0).any()
            u.mul_(signs)
            v.mul_(signs)
    for model in (first, second):
        optimizer = adamw(model)
        train(model, optimizer, lo.SpectralSchedule(model, optimizer, period=3, iterations=100, warmup=0), 8)
    assert torch.equal(first[0].weight, second[0].weight)


def test_a_value_of_zero_may_come_back():
    model = build(rank=1)
    layer = model[0]
    with torch.no_grad():
        layer.sigma[2] = 0
        layer.sigma[3] = 0
    optimizer = sgd(model)
    schedule = lo.SpectralSchedule(model, optimizer, period=100, warmup=0)
    train(model, optimizer, schedule, 3)
    grown = (layer.sigma[2:4] > 0).tolist()
    # A value has a sign of its own: it grows for one sign of the pair, and stays at 0 for the other.
    with torch.no_grad():
        layer.sigma[2:4] = 0
        for place in (2, 3):
            column = layer.order.tolist().index(place) - 1
            part = layer.u_frozen[:, column] if column >= 0 else layer.u_active[:, 0]
            part.neg_()
    train(model, optimizer, schedule, 3)
    assert (layer.sigma[2:4] > 0).tolist() == [not each for each in grown]


# ---------------------------------------------------------------------------------------------------------------- the optimizer


@pytest.mark.parametrize("make", [adamw, own_adam], ids=lambda make: make.__name__)
def test_moments_of_vectors_begin_afresh_at_a_draw_and_those_of_values_with_a_round(make):
    model = build()
    layer, optimizer = model[0], make(model)
    schedule = lo.SpectralSchedule(model, optimizer, period=2, iterations=2, warmup=0)

    def counted(param: Tensor) -> float:
        return float(optimizer.state[param].get("step", 0.0))

    seen = []
    for _ in range(5):
        train(model, optimizer, schedule, 1)
        seen.append(tuple(map(counted, (layer.u_active, layer.v_active, layer.sigma, layer.bias))))
    assert seen == [(1, 1, 1, 1), (0, 0, 2, 2), (1, 1, 3, 3), (0, 0, 0, 4), (1, 1, 1, 5)]


def test_a_round_takes_every_triplet_once_on_average_unless_told():
    model = build(rank=4)  # 14 triplets: 4 draws
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule, layer = lo.SpectralSchedule(model, optimizer, period=1, warmup=0), model[0]
    with torch.no_grad():
        layer.sigma.copy_(layer.sigma.flip(0))
    sorted_after = []
    for _ in range(4):
        schedule.step()
        sorted_after.append(bool((layer.sigma.diff() <= 0).all()))
    assert sorted_after == [False, False, False, True]


def test_reset_state_is_for_parameters_of_the_optimizer_and_whole_steps():
    model = build()
    optimizer, layer = own_adam(model), model[0]
    backward(model)
    optimizer.step()
    kept = optimizer.state[layer.bias]["exp_avg"].clone()
    optimizer.reset_state([layer.sigma])
    assert torch.count_nonzero(optimizer.state[layer.sigma]["exp_avg"]) == 0
    assert torch.equal(optimizer.state[layer.bias]["exp_avg"], kept)
    with pytest.raises(ValueError, match=r"\(3,\) is none"):
        optimizer.reset_state([layer.bias, nn.Parameter(torch.zeros(3))])
    handle = lo.update_in_backward(optimizer, accumulate=2)
    backward(model)
    with pytest.raises(RuntimeError, match="unfinished"):
        optimizer.reset_state([layer.sigma])
    backward(model)
    optimizer.step()
    optimizer.reset_state([layer.sigma])
    handle.remove()


def test_a_matrix_in_a_subspace_begins_afresh_without_one():
    weight = nn.Parameter(torch.randn(20, 12))
    optimizer = lo.GaLoreAdamW([weight], rank=3)
    for _ in range(2):
        weight.grad = torch.randn(20, 12)
        optimizer.step()
    optimizer.reset_state([weight])
    state = optimizer.state[weight]
    assert (float(state["step"]), int(state["last_refresh"])) == (0, -1)
    weight.grad = torch.randn(20, 12)
    optimizer.step()
    assert int(state["last_refresh"]) == 0


def test_updates_in_backward_are_ordinary_steps():
    models = [build(dtype=torch.float32) for _ in range(2)]
    for model, in_backward in zip(models, (False, True), strict=True):
        optimizer = own_adam(model)
        handle = lo.update_in_backward(optimizer) if in_backward else None
        train(model, optimizer, lo.SpectralSchedule(model, optimizer, period=3, iterations=2, warmup=3), 8)
        if handle is not None:
            handle.remove()
    for name, param in models[0].named_parameters():
        torch.testing.assert_close(models[1].get_parameter(name), param, msg=name)


def test_an_attached_schedule_is_called_by_the_optimizer():
    first, second = build(), build()
    optimizer = adamw(first)
    train(first, optimizer, lo.SpectralSchedule(first, optimizer, period=2, warmup=1), 5)
    optimizer = adamw(second)
    schedule = lo.SpectralSchedule(second, optimizer, period=2, warmup=1)
    handle = schedule.attach()
    for _ in range(5):
        backward(second)
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(first[0].weight, second[0].weight)
    with pytest.raises(RuntimeError, match="attached"):
        schedule.step()
    with pytest.raises(RuntimeError, match="attached already"):
        schedule.attach()
    handle.remove()
    schedule.step()
    assert schedule.state_dict()["steps"] == 6


@pytest.mark.parametrize("number", [0.0, float("nan"), float("inf")])
def test_a_vector_that_a_step_has_made_zero_or_not_finite_is_taken_back(number):
    model = build()
    layer = model[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = lo.SpectralSchedule(model, optimizer, warmup=0)
    old = layer.u_active.detach().clone()
    layer.u_active.grad = torch.zeros_like(old)
    layer.u_active.grad[:, 1] = old[:, 1] if number == 0 else number
    layer.u_active.grad[:, 0] = 0.5 * old[:, 0]
    optimizer.step()
    schedule.step()
    torch.testing.assert_close(layer.u_active.detach(), old, atol=1e-15, rtol=0)


def test_a_weight_that_is_not_finite_is_named_when_it_is_decomposed():
    model = build()
    schedule = lo.SpectralSchedule(model, sgd(model), period=1, iterations=1, warmup=0)
    with torch.no_grad():
        model[0].sigma[0] = float("inf")
    with pytest.raises(RuntimeError, match="the weight of 0 is not finite"):
        schedule.step()


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("make", [adamw, own_adam], ids=lambda make: make.__name__)
@pytest.mark.parametrize("stop", [3, 4, 7])
def test_a_run_resumes_to_the_bit(make, stop):
    def start() -> tuple[nn.Module, torch.optim.Optimizer, lo.SpectralSchedule]:
        model = build(dtype=torch.float32, mixture=0.2)
        optimizer = make(model)
        how = {"period": 4, "iterations": 2, "warmup": 3, "stagger": make is own_adam}
        return model, optimizer, lo.SpectralSchedule(model, optimizer, **how)

    whole = start()
    train(*whole, 13)
    parts = start()
    train(*parts, stop)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = start()
    train(*resumed, 2)
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    train(*resumed, 13 - stop)
    for name, tensor in whole[0].state_dict().items():
        assert torch.equal(tensor, resumed[0].state_dict()[name]), name


def test_a_state_of_another_schedule_is_refused():
    model = build()
    schedule = lo.SpectralSchedule(model, sgd(model), period=30)
    for change in ({"period": 31}, {"steps": -1}, {"steps": None}, {"seeds": [1]}, {"mixtures": [0.1]}):
        with pytest.raises(ValueError, match="this schedule has"):
            schedule.load_state_dict(schedule.state_dict() | change)
    assert schedule.state_dict()["steps"] == 0


def test_tied_layers_are_one_also_in_a_copy():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
    model[2].weight = model[0].weight
    lo.nn.spectral_(model, rank=2, include="0")
    x = torch.randn(4, 8, dtype=F64)
    for moved in (model, copy.deepcopy(model).float().double()):
        optimizer = torch.optim.SGD(moved.parameters(), lr=0.1)
        schedule = lo.SpectralSchedule(moved, optimizer, period=2, warmup=0)
        for _ in range(9):
            moved(x).square().sum().backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        assert torch.equal(moved[0].weight, moved[2].weight)
        assert torch.equal(moved[0].order, moved[2].order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_small_model_learns_more_than_its_values_alone(dtype):
    losses = {}
    for trained in (True, False):
        model = build(rank=4, dtype=dtype)
        for vectors in (model[0].u_active, model[0].v_active):
            vectors.requires_grad_(trained)
        optimizer = own_adam(model)
        train(model, optimizer, lo.SpectralSchedule(model, optimizer, period=10, warmup=2), 60)
        x, y = data()
        losses[trained] = (model(x.to(dtype)) - y.to(dtype)).float().square().mean().item()
        lengths = model[0].u_active.detach().float().norm(dim=0)
        torch.testing.assert_close(lengths, torch.ones(4), atol=4e-3, rtol=0)
    assert losses[True] < 0.9 * losses[False]


# ---------------------------------------------------------------------------------------------------------------- bad input


BAD = {
    "period": ({"period": 0}, "period is 0"),
    "period fraction": ({"period": 1.5}, "period is 1.5"),
    "iterations": ({"iterations": 0}, "iterations is 0"),
    "warmup": ({"warmup": -1}, "warmup is -1"),
    "warmup too long": ({"period": 10}, "warmup is 20, longer than the period of 10"),
    "mixture": ({"mixture": 1.5}, "mixture is 1.5"),
    "mixture nan": ({"mixture": float("nan")}, "mixture is nan"),
    "mixture word": ({"mixture": "half"}, "mixture is 'half'"),
    "stagger": ({"stagger": 3}, "stagger is 3; it must be True or False"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_numbers_are_named(case):
    options, message = BAD[case]
    model = build()
    with pytest.raises(ValueError, match=message):
        lo.SpectralSchedule(model, sgd(model), **options)


def test_models_and_optimizers_that_do_not_go_together():
    model = build()
    with pytest.raises(ValueError, match="holds no parameter of a SpectralLinear"):
        lo.SpectralSchedule(model, torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1))
    with pytest.raises(ValueError, match="has no SpectralLinear"):
        lo.SpectralSchedule(nn.Linear(3, 3), sgd(model))
    with pytest.raises(ValueError, match="Adagrad"):
        lo.SpectralSchedule(model, torch.optim.Adagrad(model.parameters()))
    with pytest.raises(TypeError, match=r"nn\.Module"):
        lo.SpectralSchedule([model], sgd(model))
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer, got str"):
        lo.SpectralSchedule(model, "adamw")


def test_a_frozen_layer_stays_as_it_is_to_the_bit():
    model = build(dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    with torch.no_grad():
        model[0].u_active.mul_(1.5)  # what settling would undo
    for param in model.parameters():
        param.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    schedule = lo.SpectralSchedule(model, optimizer, period=2, warmup=1)
    for _ in range(3):
        schedule.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
