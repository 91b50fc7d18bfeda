"""Updates inside backward with accumulation: several micro-batches equal one batch, and a step can be interrupted anywhere."""

import copy
import os
import signal
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank_optim as lo
from tests.in_backward.test_in_backward import STEPS, assert_same, assert_same_state, batch, build, build_net, loss_of
from tests.oracles.checkpoints import in_fresh_process, one_thread
from tests.oracles.processes import Child

K = 4
LINEAR = {
    "galore": ("galore", {}),
    "galore svd": ("galore", {"projector": "svd"}),
    "galore rotate": ("galore", {"on_refresh": "rotate"}),
    "galore reset": ("galore", {"on_refresh": "reset"}),
    "galore full": ("galore", {"proj_type": "full", "eps": 1e-4}),
    "galore random": ("galore", {"projector": "random"}),
    "galore gaussian": ("galore", {"projector": "random:gaussian"}),
    "galore entries": ("galore", {"projector": "coordinate:entries"}),
    "adafactor": ("galore_adafactor", {}),
    "lazy": ("galore", {"overlap_threshold": 0.1, "queue_size": 1}),
    "frugal columns": ("frugal", {"residual": "none", "on_refresh": "keep"}),
    "frugal sgd": ("frugal_sgd", {}),
    "ldadam": ("ldadam", {"error_feedback": False, "update_proj_gap": 1}),
    "lisa": ("lisa", {"rank": None}),
    "badam": ("badam", {"rank": None}),
}
# The first basis of a layer that wakes comes from its first micro-batch, so that these equal no single batch.
WAKING = {"lisa low-rank": ("lisa", {}), "badam low-rank": ("badam", {})}


def micro_batches(step: int, count: int = K):
    """Those of the first step are equal, so that the first of them and all together give the same first basis."""
    return batch(0, 2).repeat(K, 1).chunk(count) if step == 0 else batch(step, 2 * K).chunk(count)


def train(optimizer, model, start=0, stop=STEPS, count=K, first=0, last=None):
    """Steps of `count` micro-batches; the first step begins with micro-batch `first`, the last ends before micro-batch `last`."""
    for step in range(start, stop):
        parts = micro_batches(step, count)
        ending = step == stop - 1 and last is not None
        for part in parts[first if step == start else 0 : last if ending else None]:
            (loss_of(model, part, side=step % 3 == 0) / count).backward()
        if not ending:
            optimizer.step()
            optimizer.zero_grad()


def test_loss_of_a_batch_is_the_mean_over_its_micro_batches():
    model = build_net().double()
    whole = loss_of(model, batch(3, 8), side=True)
    parts = [loss_of(model, part, side=True) for part in batch(3, 8).chunk(4)]
    torch.testing.assert_close(whole, sum(parts) / 4, rtol=1e-6, atol=0)


IN_FLOAT32 = ("galore", "galore entries", "adafactor", "ldadam", "badam")
"""What sums differently: products, entries, squares, with a rotation in each step, and whole gradients."""


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, marks=[pytest.mark.full] * (dtype is torch.float32 and case not in IN_FLOAT32))
        for case in LINEAR
        for dtype in (torch.float64, torch.float32)
    ],
)
def test_four_micro_batches_equal_one_batch_across_refreshes(case, dtype):
    (name, options), close = LINEAR[case], 1e-10 if dtype is torch.float64 else 1e-6
    models = build_net(dtype), build_net(dtype)
    # Small steps: Adam divides by what may be rounding noise, and this is no test of how that grows over a run.
    ordinary, optimizer = (build(name, m, **{"lr": 1e-3, **options}) for m in models)
    lo.update_in_backward(optimizer, accumulate=K)
    train(ordinary, models[0], count=1)
    train(optimizer, models[1])
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=close, atol=close)
    assert optimizer.state[models[1].head.weight].keys() == ordinary.state[models[0].head.weight].keys()


def test_the_same_micro_batches_in_ordinary_stepping_give_dense_parameters_of_the_same_bits():
    models = [nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 16)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ordinary, optimizer = (lo.GaLoreAdamW(m.parameters(), lr=1e-2) for m in models)
    lo.update_in_backward(optimizer, accumulate=3)
    for step in range(6):
        for x in torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(step)):
            for model in models:
                model(x).square().mean().backward()
        ordinary.step(), ordinary.zero_grad(), optimizer.step()
    assert_same(*models)


@pytest.mark.parametrize(
    "options", [{}, {"layout": "transposed"}, {"projector": "coordinate"}, {"proj_type": "left"}], ids=str
)
@pytest.mark.parametrize("shape", [(3, 20, 16), (12, 4, 3, 3), (24, 16)], ids=["experts", "convolution", "matrix"])
def test_stacks_convolutions_and_transposed_matrices_accumulate(shape, options):
    params = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for _ in range(2)]
    ordinary, optimizer = (lo.GaLoreAdamW([p], rank=4, update_proj_gap=3, lr=1e-2, **options) for p in params)
    lo.update_in_backward(optimizer, accumulate=2)
    for step in range(8):
        generator = torch.Generator().manual_seed(step)
        grads = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        if step == 0:
            grads[1] = grads[0]
        for grad in grads:
            for param in params:
                (param * grad).sum().backward()
        ordinary.step(), ordinary.zero_grad(), optimizer.step()
        torch.testing.assert_close(optimizer.last_grad_norm, grads.sum(0).norm(), rtol=0.25, atol=0)
    torch.testing.assert_close(params[0], params[1], rtol=1e-10, atol=1e-12)


def test_between_micro_batches_only_r_is_kept_and_on_refresh_steps_the_whole_sum():
    model = build_net()
    optimizer = build("galore", model, update_proj_gap=9)
    handle = lo.update_in_backward(optimizer, accumulate=2)
    matrices = list(optimizer.param_groups[0]["params"])
    whole = []
    for step in range(19):
        loss_of(model, batch(step), side=True).backward()
        for param in matrices:
            state = optimizer.state[param]
            assert state["micro_batches"] == 1
            assert ("grad_sum" in state) != ("projected_sum" in state)
            if "projected_sum" in state:
                assert state["projected_sum"].shape == state["exp_avg"].shape
        whole.append(sum("grad_sum" in optimizer.state[p] for p in matrices))
        if whole[-1] == 0:
            kept = sum(b for name, b in lo.state_bytes(optimizer).items() if "sum" in name or name == "micro_batches")
            assert handle.memory()["accumulated"] == kept
        assert all(p.grad is None for p in model.parameters())
        loss_of(model, batch(step), side=True).backward()
        assert not any("micro_batches" in state for state in optimizer.state.values())
        optimizer.step()
    assert whole[0] == 0  # the first basis comes from the first micro-batch
    assert sum(whole) == 2 * len(matrices)  # two refreshes of each …
    assert max(whole) == 1  # … never two at a time
    assert handle.memory()["gradient"] == 4 * 40 * 24


def test_what_is_left_at_step_is_applied_there():
    # The last step of an epoch may have fewer micro-batches, and some parameters get fewer gradients than others.
    models = build_net(), build_net()
    ordinary, optimizer = (build("galore", m) for m in models)
    lo.update_in_backward(optimizer, accumulate=K)
    for model, each, parts in ((models[0], ordinary, 1), (models[1], optimizer, 2)):
        for step in range(6):
            tokens = batch(0, 4).repeat(2, 1) if step == 0 else batch(step)
            for part in tokens.chunk(parts):
                (loss_of(model, part, side=True) / parts).backward()
            each.step()
            each.zero_grad()
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_more_gradients_than_a_step_has_raise():
    model = build_net()
    optimizer = build("galore", model)
    lo.update_in_backward(optimizer, accumulate=2)
    for _ in range(2):
        loss_of(model, batch(0)).backward()
    with pytest.raises(RuntimeError, match=r"got another gradient.*A step has 2 backward passes"):
        loss_of(model, batch(0)).backward()


def test_a_function_may_say_which_micro_batch_is_the_last():
    models = build_net(), build_net()
    counted, told = (build("galore", m) for m in models)
    position = [0, 0]
    lo.update_in_backward(counted, accumulate=2)
    lo.update_in_backward(told, accumulate=99, last_micro_batch=lambda: position[0] + 1 == position[1])
    for step in range(6):
        parts = micro_batches(step, 2)
        for i, part in enumerate(parts):
            position[:] = i, len(parts)
            for model in models:
                (loss_of(model, part, side=True) / 2).backward()
        assert not any("micro_batches" in state for state in told.state.values())
        counted.step(), told.step()
    assert_same(*models)


@pytest.mark.parametrize("name", ["fira", "apollo", "apollo_mini", "frugal", "frugal_lion"])
def test_methods_that_need_the_whole_gradient_say_so_and_what_to_use(name):
    model = build_net()
    with pytest.raises(
        ValueError, match=r"needs the whole gradient of a step.*use accumulate=1 .*GaLoreAdamW.*ordinary stepping"
    ):
        lo.update_in_backward(build(name, model), accumulate=2)
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_error_feedback_is_refused_and_the_message_says_what_to_use(accumulate):
    model = build_net()
    with pytest.raises(ValueError, match=r"keeps the error of each matrix.*use error_feedback=False \(LDAdamW\)"):
        lo.update_in_backward(build("ldadam", model, error_feedback=True), accumulate=accumulate)
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


# Non-finite micro-batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_device", [False, True], ids=["host branch", "device mask"])
@pytest.mark.parametrize("when", [0, 1, 4], ids=["first basis", "steady", "refresh"])
def test_a_nan_in_a_micro_batch_leaves_the_whole_step_of_a_parameter_out(when, on_device, monkeypatch):
    monkeypatch.setattr(lo.LowRankOptimizer, "_mask_on_device", on_device)
    model = nn.Linear(24, 40)
    optimizer = lo.GaLoreAdamW(list(model.named_parameters()), rank=4, update_proj_gap=4, lr=1e-2)
    lo.update_in_backward(optimizer, accumulate=2)
    for step in range(when + 1):
        before = copy.deepcopy((model.state_dict(), {n: dict(optimizer.state[p]) for n, p in model.named_parameters()}))
        for part in range(2):
            x = torch.randn(8, 24, generator=torch.Generator().manual_seed(step))
            poison = torch.full_like(x, torch.nan) if (step, part) == (when, 0) else x
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model(poison).square().mean().backward()
        optimizer.step()
    assert torch.equal(model.weight, before[0]["weight"])
    assert optimizer.skipped_updates() == {"weight": 1, "bias": 1}
    for name, param in model.named_parameters():
        for key, value in optimizer.state[param].items():
            if when == 0 and key in ("basis", "last_refresh"):  # the finite micro-batch gave a basis
                assert torch.isfinite(value).all()
            else:
                assert key == "step" or torch.equal(value, before[1][name][key]), key
    model(torch.ones(2, 24)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before[0]["weight"])
    assert torch.isfinite(model.weight).all()


def test_on_nonfinite_raise_names_the_parameter():
    model = nn.Linear(24, 40)
    optimizer = lo.GaLoreAdamW(list(model.named_parameters()), rank=4, on_nonfinite="raise")
    lo.update_in_backward(optimizer, accumulate=2)
    model(torch.full((2, 24), torch.nan)).sum().backward()
    with pytest.raises(RuntimeError, match=r"the gradient of \w+ \(.*holds NaN or infinity"):
        model(torch.ones(2, 24)).sum().backward()


# Checkpoints ----------------------------------------------------------------------------------------------------------


def started(case: str, clip: str = "previous"):
    name, options = (LINEAR | WAKING)[case]
    model = build_net()
    optimizer = build(name, model, **options)
    lo.update_in_backward(optimizer, accumulate=K, max_grad_norm=1.0, clip=clip)
    return optimizer, model


@pytest.mark.long
@pytest.mark.parametrize(
    ("step", "clip"),
    [
        pytest.param(step, clip, marks=[pytest.mark.full] * (clip != "previous" and step not in (0, 9)))
        for step in (0, 3, 8, 9, 10, 11)
        for clip in ("previous", "tensor", "subspace")  # only the first remembers anything from step to step
    ],
)
def test_resume_within_a_step_is_exact(step, clip, tmp_path):
    check_resume("galore", step, clip, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("case", [*LINEAR, *WAKING])
def test_resume_within_a_step_is_exact_for_every_method_that_accumulates(case, tmp_path):
    check_resume(case, 9, "previous", tmp_path)


def check_resume(case, step, clip, tmp_path):
    whole, model = started(case, clip)
    train(whole, model)

    saved, first = started(case, clip)
    train(saved, first, stop=step + 1, last=2)
    assert any("micro_batches" in state for state in saved.state.values())
    torch.save({"optimizer": saved.state_dict(), "model": first.state_dict()}, tmp_path / "c.pt")

    resumed, second = started(case, clip)
    train(resumed, second, stop=2, last=1)  # what it was doing before is forgotten
    content = torch.load(tmp_path / "c.pt", weights_only=True)
    second.load_state_dict(content["model"])
    resumed.load_state_dict(content["optimizer"])
    second.zero_grad()
    train(resumed, second, start=step, first=2)
    assert_same(model, second)
    assert_same_state(whole, resumed)
    assert torch.equal(whole.last_grad_norm, resumed.last_grad_norm)


RESUMED = ("galore", "adafactor", "lisa")


def run_to_the_kill(mode: str, folder: Path) -> None:
    """The first micro-batches up to a checkpoint within a step ("first"), the rest from there ("second"), or all ("whole")."""
    for case in RESUMED:
        optimizer, model = started(case)
        if mode == "second":
            content = torch.load(folder / f"{case}-first", weights_only=True)
            model.load_state_dict(content["model"])
            optimizer.load_state_dict(content["optimizer"])
            train(optimizer, model, start=8, first=3)
        elif mode == "first":
            train(optimizer, model, stop=9, last=3)
        else:
            train(optimizer, model)
        torch.save({"optimizer": optimizer.state_dict(), "model": model.state_dict()}, folder / f"{case}-{mode}")
        if mode == "first":
            train(optimizer, model, start=8, stop=9, first=3, last=4)  # work that the kill below loses
    if mode == "first":
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.long
def test_a_killed_process_resumes_within_a_step_to_the_bit(tmp_path):
    child = Child(tmp_path / "said", run_to_the_kill, "first", tmp_path)
    child.process.join()
    assert child.process.exitcode == -signal.SIGKILL, child.output.read_text()
    in_fresh_process(__name__, "run_to_the_kill", "second", tmp_path)
    with one_thread():
        run_to_the_kill("whole", tmp_path)
    for case in RESUMED:
        resumed, whole = (torch.load(tmp_path / f"{case}-{mode}", weights_only=True) for mode in ("second", "whole"))
        assert all(torch.equal(value, whole["model"][name]) for name, value in resumed["model"].items())
        for a, b in zip(resumed["optimizer"]["state"].values(), whole["optimizer"]["state"].values(), strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in b)


def test_a_checkpoint_within_a_step_says_what_it_needs_and_changes_nothing():
    saved, model = started("galore")
    train(saved, model, stop=3, last=2)
    content = copy.deepcopy(saved.state_dict())
    for attach in (None, 1, 2):
        plain = build("galore", build_net())
        if attach:
            lo.update_in_backward(plain, accumulate=attach)
        before = copy.deepcopy(plain.state_dict())
        with pytest.raises(
            ValueError, match=r"written 2 micro-batches into a step: call lowrank_optim.update_in_backward\("
        ):
            plain.load_state_dict(content)
        assert all(
            torch.equal(v, before["state"][k][n]) for k, s in plain.state_dict()["state"].items() for n, v in s.items()
        )


def test_a_checkpoint_between_two_steps_is_that_of_ordinary_stepping_in_both_directions():
    saved, model = started("galore")
    train(saved, model, stop=3)
    plain = build("galore", build_net())
    plain.load_state_dict(saved.state_dict())
    assert_same_state(saved, plain)
    assert plain.last_grad_norm is None
    other, second = started("galore")
    train(other, second, stop=2, last=2)
    other.load_state_dict(plain.state_dict())
    assert_same_state(other, plain)
    train(plain, build_net(), stop=1, count=1)
    assert "grad_norms" not in plain.param_groups[0]


def test_remove_within_a_step_raises_and_discard_drops_its_gradients():
    optimizer, model = started("galore")
    train(optimizer, model, stop=2, last=1)
    handle = optimizer._in_backward
    with pytest.raises(
        RuntimeError, match=r"\d+ parameters keep gradients of an unfinished step: call optimizer.step\(\)"
    ):
        handle.remove()
    assert handle.active
    handle.discard()
    handle.remove()
    assert not any("micro_batches" in state for state in optimizer.state.values())
