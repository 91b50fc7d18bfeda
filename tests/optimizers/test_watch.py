"""Progress within a step: what is counted, when it is said, and that nothing else changes."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import lowrank_optim as lo
from lowrank_optim.optimizers.watch import duration


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 12, bias=False))


def made(model: nn.Module, **options) -> lo.GaLoreAdamW:
    return lo.GaLoreAdamW(lo.param_groups(model, rank=4), lr=1e-2, update_proj_gap=50, stagger=False, **options)


def backward(model: nn.Module, step: int = 0) -> None:
    model(torch.randn(8, 24, generator=torch.Generator().manual_seed(step))).square().mean().backward()


@pytest.mark.parametrize("in_backward", [False, True])
def test_every_parameter_of_a_step_is_reported_once_with_the_work_that_is_done(in_backward):
    model, seen = network(), []
    optimizer = made(model)
    if in_backward:
        lo.update_in_backward(optimizer)
    with lo.watch_step(optimizer, seen.append, every=0):
        backward(model)
        optimizer.step()
    assert [p.done for p in seen] == [1, 2, 3]
    assert {p.name for p in seen} == {"0.weight", "0.bias", "2.weight"}
    assert all((p.step, p.total, p.refreshed) == (1, 3, 2) for p in seen)
    assert seen[-1].share == 1.0
    assert seen[-1].seconds_left == 0.0
    # By hand: matrices that get a basis count 32·r an element, dense parameters 64.
    work = {"0.weight": 40 * 24 * 32 * 4, "2.weight": 12 * 40 * 32 * 4, "0.bias": 40 * 64}
    assert seen[0].share == pytest.approx(work[seen[0].name] / sum(work.values()))
    assert seen[0].seconds <= seen[1].seconds <= seen[2].seconds


def test_a_step_without_new_bases_counts_other_work_and_weights_are_those_of_an_unwatched_run():
    model, seen = network(), []
    other = copy.deepcopy(model)
    watched, plain = made(model), made(other)
    with lo.watch_step(watched, seen.append, every=0):
        for step in range(3):
            for m, optimizer in ((model, watched), (other, plain)):
                backward(m, step)
                optimizer.step()
                optimizer.zero_grad()
    assert [p.refreshed for p in seen] == [2] * 3 + [0] * 6
    assert [p.step for p in seen] == [1] * 3 + [2] * 3 + [3] * 3
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_short_steps_report_nothing_and_reports_end_with_the_watch():
    model, seen = network(), []
    optimizer = made(model)
    handle = lo.watch_step(optimizer, seen.append, every=60)
    backward(model)
    optimizer.step()
    handle.remove()
    handle.remove()
    lo.watch_step(optimizer, seen.append, every=0).remove()
    backward(model)
    optimizer.step()
    assert not seen


def test_a_step_that_is_broken_off_does_not_count_for_the_next():
    model, seen = network(), []
    optimizer = made(model)
    lo.update_in_backward(optimizer)
    lo.watch_step(optimizer, seen.append, every=0)
    hook = model[0].weight.register_hook(lambda grad: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        backward(model)
    hook.remove()
    first = len(seen)
    assert 0 < first < 3
    lo.UpdateInBackward.find(model.parameters())[0].discard()
    backward(model)
    optimizer.step()
    assert [p.done for p in seen[first:]] == [1, 2, 3]


def test_layers_that_sleep_are_not_waited_for():
    model, seen = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), []
    optimizer = lo.LISAAdamW(lo.layer_groups(model, layers=[f"{i}" for i in range(4)]), lr=1e-2, active_layers=1)
    with lo.watch_step(optimizer, seen.append, every=0):
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
    assert seen[-1].done == seen[-1].total == 2


def test_a_watch_does_not_keep_the_optimizer_alive():
    optimizer = made(network())
    handle, alive = lo.watch_step(optimizer), weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None
    handle.remove()


def test_the_line_says_what_is_left():
    line = str(lo.StepProgress(1, "w", 37, 226, 224, 0.25, 41.0))
    assert line == "step 1: 37 of 226 parameters, 224 of them with a new basis, 41 s, about 2 min 3 s left"
    assert [duration(s) for s in (0.4, 59.4, 61, 3600, 7500)] == ["0 s", "59 s", "1 min 1 s", "1 h 0 min", "2 h 5 min"]


def test_bad_input_says_what_to_do():
    optimizer = made(network())
    with pytest.raises(TypeError, match=r"needs an optimizer of lowrank_optim, got torch\.optim\.sgd\.SGD"):
        lo.watch_step(torch.optim.SGD(network().parameters()))
    with pytest.raises(ValueError, match="every is -1; it must be a number of seconds"):
        lo.watch_step(optimizer, every=-1)
    lo.watch_step(optimizer)
    with pytest.raises(RuntimeError, match=r"watched already: call remove\(\)"):
        lo.watch_step(optimizer)


def test_a_pair_with_a_frozen_factor_is_reported_under_the_other():
    a, b = nn.Parameter(torch.ones(2, 8)), nn.Parameter(torch.ones(6, 2), requires_grad=False)
    optimizer = lo.LoRAProAdamW(lo.lora_pairs([(a, b, 1.0)]), lr=1e-2, moments="factors")
    seen = []
    with lo.watch_step(optimizer, seen.append, every=0):
        (b @ a).square().mean().backward()
        optimizer.step()
    assert [(p.step, p.done, p.total, p.share) for p in seen] == [(1, 1, 1, 1.0)]
