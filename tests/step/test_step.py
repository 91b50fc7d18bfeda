"""The shared step: closures, non-finite gradients, refresh schedule, stochastic rounding, no waiting for the device."""

import contextlib
import itertools
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lowrank_optim as lo
from lowrank_optim.step.refresh_schedule import latest_refresh, stagger_offset


def problem(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (24, 16)) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype))


def gradient(step: int, shape: tuple[int, ...] = (24, 16)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + step))


def test_closure_runs_with_gradients_enabled_and_its_loss_is_returned():
    param = problem()
    optimizer = lo.GaLoreAdamW([param], rank=4, lr=1e-2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(20)]
    assert losses[0] == float(problem().detach().square().sum())
    assert losses[-1] < losses[0]


POISON = {
    "nan": lambda g: g.index_fill(0, torch.tensor([3]), float("nan")),
    "inf": lambda g: g.index_fill(1, torch.tensor([2]), float("inf")),
    "all nan": lambda g: g * float("nan"),
}


@pytest.mark.parametrize("on_device", [False, True], ids=["host branch", "device mask"])
@pytest.mark.parametrize("poison", list(POISON))
@pytest.mark.parametrize("rank", [4, None], ids=["low-rank", "dense"])
@pytest.mark.parametrize("name", list(lo.METHODS))
@pytest.mark.parametrize("when", [0, 5, 7], ids=["first step", "refresh step", "steady step"])
def test_a_nonfinite_gradient_never_enters_weights_moments_or_basis(name, poison, rank, on_device, when, monkeypatch):
    monkeypatch.setattr(lo.LowRankOptimizer, "_mask_on_device", on_device)
    param = problem()
    optimizer = lo.by_name(name)([("w", param)], lr=1e-2, rank=rank, update_proj_gap=5, weight_decay=0.1)
    for step in range(when):
        param.grad = gradient(step)
        optimizer.step()
    before = param.detach().clone()
    state = {key: value.clone() for key, value in optimizer.state[param].items()}
    param.grad = POISON[poison](gradient(when))
    expected = contextlib.nullcontext() if on_device else pytest.warns(RuntimeWarning, match="skipped the update of w")
    with expected:  # an accelerator's counters are looked at later
        optimizer.step()
    assert torch.equal(param, before)
    # A random subspace is drawn anew when it is due, whatever the gradient, and FRUGAL's moments begin at 0 in it.
    drawn = when != 7 and name.startswith(("apollo", "frugal"))
    drawn = drawn or (when == 0 and name == "sara")  # which chooses its entries from the weights
    # On a device the host does not know that a basis was kept: the moments are rotated from it into itself.
    rotated = on_device and name == "ldadam"
    for key, value in optimizer.state[param].items():
        if key == "step" or (key == "last_refresh" and (drawn or rotated)):
            continue
        if drawn and key in ("indices", "exp_avg", "exp_avg_sq"):
            assert torch.isfinite(value).all()
        elif rotated:
            torch.testing.assert_close(value, state[key], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(value, state[key]), key
    assert optimizer.skipped_updates() == {"w": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # warned of once
        optimizer.step()
    assert optimizer.skipped_updates() == {"w": 2}
    param.grad = gradient(when)
    optimizer.step()
    assert torch.isfinite(param).all()
    assert not torch.equal(param, before)


def test_host_branch_and_device_mask_give_the_same_run(monkeypatch):
    def run(on_device: bool) -> torch.Tensor:
        monkeypatch.setattr(lo.LowRankOptimizer, "_mask_on_device", on_device)
        param = problem()
        optimizer = lo.GaLoreAdamW([param], lr=1e-2, rank=4, update_proj_gap=5, weight_decay=0.1)
        for step in range(12):
            param.grad = gradient(step) if step not in (0, 6) else gradient(step) * float("nan")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step()
        return param.detach()

    torch.testing.assert_close(run(True), run(False), rtol=1e-6, atol=1e-7)


def test_raise_names_the_parameter_and_leaves_it_unchanged():
    param = problem()
    optimizer = lo.GaLoreAdamW([("layer.weight", param)], rank=4, on_nonfinite="raise")
    before = param.detach().clone()
    param.grad = gradient(0) * float("inf")
    with pytest.raises(RuntimeError, match=r"gradient of layer.weight \(24, 16\) holds NaN or infinity"):
        optimizer.step()
    assert torch.equal(param, before)
    assert optimizer.state[param]["step"] == 0


def test_propagate_behaves_as_torch():
    param = problem()
    optimizer = lo.GaLoreAdamW([param], on_nonfinite="propagate")
    param.grad = gradient(0).index_fill(0, torch.tensor([3]), float("nan"))
    optimizer.step()
    assert torch.isnan(param[3]).all()
    assert torch.isfinite(param[4]).all()


@pytest.mark.parametrize("projector", ["svd", "randomized_svd"])
def test_a_zero_gradient_makes_no_basis_and_the_refresh_is_tried_again(projector):
    param, twin = problem(), problem()
    delayed = lo.GaLoreAdamW([param], rank=4, lr=1e-2, projector=projector, weight_decay=0.0)
    param.grad = torch.zeros_like(param)
    delayed.step()
    assert torch.equal(param, twin)
    assert delayed.state[param]["last_refresh"] == -1
    param.grad = gradient(0)
    delayed.step()
    assert delayed.state[param]["last_refresh"] == 1
    prompt = lo.GaLoreAdamW([twin], rank=4, lr=1e-2, projector="svd", weight_decay=0.0)
    twin.grad = gradient(0)
    prompt.step()
    basis, exact = delayed.state[param]["basis"], prompt.state[twin]["basis"]
    energy = (gradient(0) @ basis).square().sum() / (gradient(0) @ exact).square().sum()
    assert energy > 0.97


def test_refreshes_are_staggered_over_the_gap_after_the_first():
    params = [problem() for _ in range(5)]
    optimizer = lo.GaLoreAdamW(params, rank=4, update_proj_gap=10)
    seen: dict[int, list[int]] = {i: [] for i in range(5)}
    for step in range(41):
        for param in params:
            param.grad = gradient(step)
        optimizer.step()
        for i, param in enumerate(params):
            last = int(optimizer.state[param]["last_refresh"])
            if not seen[i] or seen[i][-1] != last:
                seen[i].append(last)
    assert seen == {
        0: [0, 10, 20, 30, 40],
        1: [0, 8, 18, 28, 38],
        2: [0, 6, 16, 26, 36],
        3: [0, 4, 14, 24, 34],
        4: [0, 2, 12, 22, 32],
    }


@pytest.mark.parametrize("options", [{"stagger": False}, {"match_reference": True}], ids=str)
def test_without_stagger_all_refresh_together(options):
    params = [problem() for _ in range(3)]
    optimizer = lo.GaLoreAdamW(params, rank=4, update_proj_gap=4, **options)
    for step in range(6):
        for param in params:
            param.grad = gradient(step)
        optimizer.step()
    assert [int(optimizer.state[p]["last_refresh"]) for p in params] == [4, 4, 4]


def test_a_refresh_is_scheduled_once_a_gap_for_every_offset():
    for gap in (1, 2, 7, 200):
        for ordinal in range(9):
            offset = stagger_offset(ordinal, 9, gap)
            assert 0 <= offset < gap
            scheduled = sorted({latest_refresh(step, gap, offset) for step in range(4 * gap)})
            assert scheduled[0] == 0
            assert all(b - a == gap for a, b in itertools.pairwise(scheduled[1:]))
            assert len(scheduled) == 1 or scheduled[1] <= gap


def test_stochastic_rounding_lets_small_updates_through_where_nearest_loses_them():
    def drift(stochastic: bool) -> float:
        param = nn.Parameter(torch.ones(64, 32, dtype=torch.bfloat16))
        optimizer = lo.GaLoreAdamW(
            [param], lr=1e-4, rank=None, weight_decay=0.0, stochastic_rounding=stochastic, eps=1e-12
        )
        for _ in range(100):
            param.grad = torch.full_like(param, 1.0)
            optimizer.step()
        return float(param.detach().float().mean()) - 1.0

    assert drift(False) == 0.0
    assert drift(True) == pytest.approx(-1e-2, rel=0.1)


def test_maximize_is_descent_on_the_negated_gradient():
    up, down = problem(), problem()
    ascending = lo.GaLoreAdamW([up], rank=4, maximize=True, projector="svd")
    descending = lo.GaLoreAdamW([down], rank=4, projector="svd")
    for step in range(5):
        up.grad, down.grad = gradient(step), -gradient(step)
        ascending.step()
        descending.step()
    torch.testing.assert_close(up, down, rtol=1e-6, atol=1e-6)


def test_flipping_the_signs_of_basis_vectors_changes_nothing():
    flipped, plain = problem(), problem()
    optimizers = [lo.GaLoreAdamW([p], rank=4, lr=1e-2, update_proj_gap=100) for p in (flipped, plain)]
    for step in range(8):
        for param, optimizer in zip((flipped, plain), optimizers, strict=True):
            param.grad = gradient(step)
            optimizer.step()
        if step == 0:
            state = optimizers[0].state[flipped]
            signs = torch.tensor([-1.0, 1.0, -1.0, 1.0])
            state["basis"] *= signs
            state["exp_avg"] *= signs
    torch.testing.assert_close(flipped, plain, rtol=1e-6, atol=1e-7)


def test_schedulers_change_the_live_learning_rate_and_betas():
    param = problem()
    optimizer = lo.GaLoreAdamW([param], lr=0.1, rank=4, weight_decay=0.0, betas=(0.0, 0.0), scale=1.0, eps=0.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    sizes = []
    for step in range(4):
        before = param.detach().clone()
        param.grad = gradient(step)
        optimizer.step()
        scheduler.step()
        # With β = 0 the direction is the sign of R: the lifted update has norm lr·√(number of elements of R).
        sizes.append(float((param.detach() - before).norm()) / (24 * 4) ** 0.5)
    assert sizes == pytest.approx([0.1, 0.05, 0.025, 0.0125], rel=1e-4)
    cyclic = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    cyclic.step()
    assert optimizer.param_groups[0]["betas"][0] != 0.0


class ReadsOfDeviceValues(TorchDispatchMode):
    """Raises when the host reads the value of a tensor that would live on the device."""

    def __init__(self, on_host: list[torch.Tensor]) -> None:
        super().__init__()
        self.on_host = {tensor.data_ptr() for tensor in on_host}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].data_ptr() not in self.on_host:
            raise AssertionError("the host waits for a value of the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "projector"),
    [
        (name, projector)
        for name in lo.METHODS
        for projector in ("randomized_svd", "random", "coordinate")
        if (name != "qgalore" or projector == "randomized_svd") and name != "sara"  # (test_sara)
    ]
    + [("galore", "coordinate:entries"), ("frugal", "blocks"), ("ldadam", "power_iteration")],
)
def test_a_steady_step_never_waits_for_the_device(name, projector, dtype, monkeypatch):
    monkeypatch.setattr(lo.LowRankOptimizer, "_mask_on_device", True)
    params = [problem(dtype), problem(dtype, (7,))]
    options = {"lr": 1e-2, "weight_decay": 0.1, "stochastic_rounding": True}
    options |= {"density": 1.0} if projector == "blocks" else {"rank": 4}
    if projector != "power_iteration":  # which refreshes in every step, and does not wait either
        options["update_proj_gap"] = 200
    optimizer = lo.by_name(name)(params, projector=projector, **options)
    for step in range(3):
        for param in params:
            param.grad = gradient(step, tuple(param.shape)).to(dtype)
        on_host = [
            tensor
            for p, s in optimizer.state.items()
            for key, tensor in s.items()
            if optimizer.plans[p].is_on_host(key)
        ]
        # The first step refreshes the subspace, which may read a flag.
        with ReadsOfDeviceValues(on_host) if step else contextlib.nullcontext():
            optimizer.step()


def test_the_test_for_waiting_notices_a_read():
    with pytest.raises(AssertionError, match="waits"), ReadsOfDeviceValues([]):
        bool(torch.ones(()) > 0)


def test_importing_the_package_loads_no_heavy_libraries():
    import subprocess
    import sys

    code = (
        "import sys, lowrank_optim\n"
        "heavy = {'transformers', 'triton', 'bitsandbytes', 'matplotlib', 'rich', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.long
def test_nothing_keeps_a_gradient_alive_after_the_step():
    """Not even for the garbage collector, and not from the first step, which looks for the backends."""
    code = """
import gc, weakref, torch, lowrank_optim as lo
gc.disable()
for bits in (32, 8):
    params = [torch.nn.Parameter(torch.zeros(128, 128)) for _ in range(4)]
    optimizer = lo.GaLoreAdamW([dict(params=params[:2], rank=None), dict(params=params[2:], rank=8)], state_bits=bits)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn(128, 128)
        grads = [weakref.ref(p.grad) for p in params]
        optimizer.step()
        optimizer.zero_grad()
        assert [grad() for grad in grads] == [None] * 4, bits
"""
    subprocess.run([sys.executable, "-c", code], check=True)
