"""Updates inside backward: clipping, the norm that is reported, GradScaler, and no waiting for the device."""

import contextlib

import pytest
import torch
from torch import nn

import lowrank_optim as lo
from lowrank_optim.step.state_names import STEP_STATE
from tests.in_backward.test_in_backward import (
    STEPS,
    assert_same,
    assert_same_state,
    batch,
    build,
    build_net,
    loss_of,
    pair,
)
from tests.step.test_step import ReadsOfDeviceValues

LIMIT = 0.5


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def scale_all(grads, factor) -> None:
    for grad in grads:
        grad.mul_(factor)


def test_last_grad_norm_is_the_norm_of_the_whole_gradient_before_clipping():
    (usual, ours), (ordinary, optimizer) = pair()
    assert optimizer.last_grad_norm is None
    lo.update_in_backward(optimizer)
    assert optimizer.last_grad_norm is None
    for step in range(6):
        loss_of(usual, batch(step)).backward()
        norm = nn.utils.clip_grad_norm_(usual.parameters(), 1e9)
        loss_of(ours, batch(step)).backward()
        for each in (ordinary, optimizer):
            each.step()
            each.zero_grad()
        assert optimizer.last_grad_norm.shape == ()
        torch.testing.assert_close(optimizer.last_grad_norm, norm, rtol=1e-6, atol=0)
    assert ordinary.last_grad_norm is None
    optimizer.step()  # no gradients: the last norm stays
    torch.testing.assert_close(optimizer.last_grad_norm, norm, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["galore", "fira", "frugal", "ldadam"])
def test_clipping_by_the_previous_norm(name):
    (usual, ours), (ordinary, optimizer) = pair(name)
    lo.update_in_backward(optimizer, max_grad_norm=LIMIT)
    previous = None
    for step in range(STEPS):
        for model in (usual, ours):
            (loss_of(model, batch(step)) * (1 + step % 4)).backward()
        norm = nn.utils.get_total_norm(
            [p.grad for g in ordinary.param_groups for p in g["params"] if p.grad is not None]
        )
        if previous is not None:
            scale_all(gradients(usual), (LIMIT / (previous + 1e-6)).clamp(max=1.0))
        previous = norm
        for each in (ordinary, optimizer):
            each.step()
            each.zero_grad()
    assert previous > LIMIT
    assert_same(usual, ours)


@pytest.mark.parametrize("name", ["galore", "fira", "frugal", "ldadam"])
def test_clipping_each_tensor(name):
    (usual, ours), (ordinary, optimizer) = pair(name)
    lo.update_in_backward(optimizer, max_grad_norm=LIMIT / 4, clip="tensor")
    for step in range(STEPS):
        for model in (usual, ours):
            loss_of(model, batch(step)).backward()
        for grad in gradients(usual):
            scale_all([grad], (LIMIT / 4 / (grad.norm() + 1e-6)).clamp(max=1.0))
        for each in (ordinary, optimizer):
            each.step()
            each.zero_grad()
    assert_same(usual, ours)


@pytest.mark.parametrize("name", ["galore", "fira", "frugal", "frugal_sgd", "apollo"])
def test_clipping_in_the_subspace(name):
    param = nn.Parameter(torch.zeros(24, 16))
    twin = nn.Parameter(torch.zeros(24, 16))
    options = {"rank": 4, "update_proj_gap": 3, "lr": 1e-2}
    ordinary, optimizer = lo.by_name(name)([param], **options), lo.by_name(name)([twin], **options)
    lo.update_in_backward(optimizer, max_grad_norm=LIMIT, clip="subspace")
    for step in range(8):
        grad = torch.randn(24, 16, generator=torch.Generator().manual_seed(step))
        (twin * grad).sum().backward()
        # R of this step, from a copy that takes it first.
        ahead = nn.Parameter(param.detach().clone())
        copy = lo.by_name(name)([ahead], **options)
        copy.load_state_dict(ordinary.state_dict())
        ahead.grad = grad.clone()
        _, _, reduced = copy.trained(ahead).project()
        param.grad = grad * (LIMIT / (reduced.norm() + 1e-6)).clamp(max=1.0)
        ordinary.step()
        optimizer.step()
        torch.testing.assert_close(optimizer.last_grad_norm, grad.norm())
    torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:skipped the update")
def test_a_step_after_a_nonfinite_one_is_clipped_by_the_last_finite_norm():
    param = nn.Parameter(torch.zeros(4))
    optimizer = lo.LowRankOptimizer([param], rule=lo.SGD(), lr=1.0)
    lo.update_in_backward(optimizer, max_grad_norm=1.0)
    steps = []
    for value in (torch.inf, 2.0, torch.inf, 3.0, 3.0):  # norms are twice that
        before = param.detach().clone()
        (param * value).sum().backward()
        optimizer.step()
        assert float(optimizer.last_grad_norm) == 2 * value
        steps.append(float((before - param.detach())[0]))
    assert steps == pytest.approx([0.0, 2.0, 0.0, 3.0 / 4.0, 3.0 / 6.0])


class Deep(nn.Module):
    """Matrices enough for the estimate to average over."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(48, 48, bias=False) for _ in range(12)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


@pytest.mark.parametrize(
    "projector", ["randomized_svd", "random", "random:gaussian", "coordinate", "coordinate:entries"]
)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], ids=["different batches", "half", "equal batches"])
def test_the_norm_of_accumulated_projections_is_estimated_without_bias(share, projector):
    torch.manual_seed(0)
    model = Deep()
    optimizer = lo.GaLoreAdamW(model.parameters(), rank=8, projector=projector, update_proj_gap=1000, lr=0.0)
    lo.update_in_backward(optimizer, accumulate=4)
    errors = []
    for _ in range(12):
        common, total = torch.randn(8, 48), [torch.zeros_like(p) for p in model.parameters()]
        for _ in range(4):
            x = common * share + torch.randn(8, 48) * (1 - share)
            loss = (model(x) - x.roll(1, 1)).square().mean()
            for part, grad in zip(
                total, torch.autograd.grad(loss, list(model.parameters()), retain_graph=True), strict=True
            ):
                part += grad
            loss.backward()
        optimizer.step()
        errors.append(float(optimizer.last_grad_norm / nn.utils.get_total_norm(total)) - 1.0)
    assert max(map(abs, errors)) < 0.12
    assert abs(sum(errors) / len(errors)) < 0.04


# GradScaler -----------------------------------------------------------------------------------------------------------


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=4)


@pytest.mark.parametrize("unscale", [False, True], ids=["", "with unscale_ and clip_grad_norm_"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_scaled_loop_gives_the_weights_of_ordinary_stepping(accumulate, unscale):
    (usual, ours), (ordinary, optimizer) = pair()
    scalers = scaler(), scaler()
    lo.update_in_backward(optimizer, accumulate=accumulate, grad_scaler=scalers[1])
    for step in range(9):
        for model, each, scale in ((usual, ordinary, scalers[0]), (ours, optimizer, scalers[1])):
            parts = [batch(step)] if accumulate == 1 else [batch(step, 4)] * 2
            for part in parts:
                scale.scale(loss_of(model, part) / accumulate).backward()
            if unscale:
                scale.unscale_(each)
                nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            scale.step(each)
            scale.update()
            each.zero_grad()
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert scalers[0].get_scale() == 2.0**16
    for p, q in zip(usual.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0 if accumulate == 1 else 1e-6)


@pytest.mark.filterwarnings("ignore:skipped the update")
@pytest.mark.parametrize("on_device", [False, True], ids=["host branch", "device mask"])
def test_an_infinity_in_one_layer_skips_what_comes_after_it_and_lowers_the_scale(on_device, monkeypatch):
    monkeypatch.setattr(lo.LowRankOptimizer, "_mask_on_device", on_device)
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])
    optimizer = lo.GaLoreAdamW(list(model.named_parameters()), rank=4)
    scale = scaler()
    lo.update_in_backward(optimizer, grad_scaler=scale)
    before = [p.detach().clone() for p in model.parameters()]
    for param in model[2].parameters():  # the gradients of the layers below stay finite
        param.register_hook(lambda grad: grad * torch.inf)
    scale.scale(model(torch.randn(4, 16)).square().mean()).backward()
    scale.step(optimizer)
    scale.update()
    assert scale.get_scale() == 2.0**13
    changed = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert changed == [False] * 6 + [True] * 2  # the last layer came first
    assert sum(optimizer.skipped_updates().values()) == 6
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:skipped the update")
@pytest.mark.parametrize("on_device", [False, True], ids=["host branch", "device mask"])
def test_an_infinity_in_an_early_micro_batch_skips_the_whole_step(on_device, monkeypatch):
    monkeypatch.setattr(lo.LowRankOptimizer, "_mask_on_device", on_device)
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])
    optimizer = lo.GaLoreAdamW(list(model.named_parameters()), rank=4)
    scale = scaler()
    lo.update_in_backward(optimizer, accumulate=2, grad_scaler=scale)
    for poison in (1.0, torch.inf, 1.0):
        before = [p.detach().clone() for p in model.parameters()]
        hook = model[0].weight.register_hook(
            lambda grad, poison=poison: grad * poison
        )  # of one layer, the last to come
        scale.scale(model(torch.randn(4, 16)).square().mean()).backward()
        hook.remove()
        scale.scale(model(torch.randn(4, 16)).square().mean()).backward()
        scale.step(optimizer)
        scale.update()
        same = [torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
        assert same == [poison == torch.inf] * 8


def test_removing_gives_the_scaler_its_usual_way_back():
    model = build_net()
    optimizer, scale = build("galore", model), scaler()
    with lo.update_in_backward(optimizer, grad_scaler=scale):
        scale.scale(loss_of(model, batch(0))).backward()
        scale.step(optimizer)
        scale.update()
    scale.scale(loss_of(model, batch(1)) * torch.inf).backward()
    before = model.head.weight.detach().clone()
    scale.step(optimizer)
    scale.update()
    assert torch.equal(before, model.head.weight)


def test_a_scaler_needs_on_nonfinite_skip_and_a_disabled_one_is_none():
    optimizer = build("galore", build_net(), on_nonfinite="propagate")
    with pytest.raises(ValueError, match=r'only on_nonfinite="skip" leaves out'):
        lo.update_in_backward(optimizer, grad_scaler=scaler())
    lo.update_in_backward(optimizer, grad_scaler=torch.amp.GradScaler("cpu", enabled=False))


def test_a_loss_that_was_not_scaled_raises():
    model = build_net()
    optimizer = build("galore", model)
    lo.update_in_backward(optimizer, grad_scaler=scaler())
    with pytest.raises(RuntimeError, match=r"call scaler.scale\(loss\).backward\(\)"):
        loss_of(model, batch(0)).backward()


# The device -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", ["previous", "tensor", "subspace"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
def test_a_steady_step_never_waits_for_the_device(scaled, accumulate, clip, monkeypatch):
    monkeypatch.setattr(lo.LowRankOptimizer, "_mask_on_device", True)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24))
    optimizer = lo.GaLoreAdamW(model.parameters(), rank=4)
    scale = scaler() if scaled else None
    lo.update_in_backward(optimizer, accumulate, 1.0, clip, scale)
    for step in range(3):
        reads = contextlib.ExitStack()
        for _ in range(accumulate):
            loss = model(torch.randn(4, 24)).square().mean()
            if step:
                on_host = [
                    s[key]
                    for s in optimizer.state.values()
                    for key in STEP_STATE
                    if STEP_STATE[key] == "host" and key in s
                ]
                reads.enter_context(CountsMicroBatches(on_host, optimizer))
            (scale.scale(loss) if scale else loss).backward()
            reads.close()
        with CountsMicroBatches([], optimizer) if step else contextlib.nullcontext():
            scale.step(optimizer) if scale else optimizer.step()
        if scale:
            scale.update()


class CountsMicroBatches(ReadsOfDeviceValues):
    """The number of micro-batches lives on the host; it is made and read within the block."""

    def __init__(self, on_host, optimizer) -> None:
        super().__init__(on_host)
        self.optimizer = optimizer

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.on_host |= {
                s["micro_batches"].data_ptr() for s in self.optimizer.state.values() if "micro_batches" in s
            }
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_state_is_that_of_ordinary_stepping_with_clipping():
    (usual, ours), (ordinary, optimizer) = pair()
    lo.update_in_backward(optimizer, max_grad_norm=1e9)
    for step in range(4):
        for model, each in ((usual, ordinary), (ours, optimizer)):
            loss_of(model, batch(step)).backward()
            each.step()
            each.zero_grad()
    assert_same_state(ordinary, optimizer)


class OnAccelerator(torch.Tensor):
    """A number of an accelerator: what a copy to the host gives before it has arrived is anything."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.to and (kwargs or {}).get("non_blocking"):
            return torch.full((), 1e4)
        result = super().__torch_function__(func, types, args, kwargs)
        return result.as_subclass(torch.Tensor) if func is torch.Tensor.to else result


def test_weights_on_the_host_wait_for_scale_and_clipping_factor_of_an_accelerator(monkeypatch):
    (usual, ours), (ordinary, optimizer) = pair()
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0) for _ in range(2)]
    real = scalers[1]._get_scale_async
    monkeypatch.setattr(scalers[1], "_get_scale_async", lambda: real().as_subclass(OnAccelerator))
    for each, scaler in zip((ordinary, optimizer), scalers, strict=True):
        lo.update_in_backward(each, max_grad_norm=LIMIT, grad_scaler=scaler)
    for step in range(4):
        for model, each, scaler in ((usual, ordinary, scalers[0]), (ours, optimizer, scalers[1])):
            scaler.scale(loss_of(model, batch(step))).backward()
            scaler.step(each)
            scaler.update()
            each.param_groups[0]["grad_norms"] = each.param_groups[0]["grad_norms"].as_subclass(
                OnAccelerator if each is optimizer else torch.Tensor
            )
        assert float(ordinary.last_grad_norm) > LIMIT
    assert_same(usual, ours)
