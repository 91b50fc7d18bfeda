"""Two optimizers on one model: while one updates in backward, no other may train its weights, and there is always a way out."""

import contextlib
import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer
from torch.optim.swa_utils import AveragedModel

import lowrank_optim as lo
from tests.in_backward.test_in_backward import (
    STEPS,
    Tied,
    assert_same,
    assert_same_state,
    batch,
    build,
    build_net,
    loss_of,
    train,
)

ALIVE = (
    r"updated in backward by another GaLoreAdamW, which is still alive.*UpdateInBackward.find\(model.parameters\(\)\)"
)


def hooked(name: str = "galore", accumulate: int = 1, **options):
    """A model, the optimizer that updates it in backward, and its handle."""
    model = build_net()
    optimizer = build(name, model, **options)
    return model, optimizer, lo.update_in_backward(optimizer, accumulate)


def copies(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_unmoved(model: nn.Module, before: list[torch.Tensor]) -> None:
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)


def step_hooks() -> int:
    """How many hooks torch calls before the step of every optimizer; none is left of optimizers that were dropped."""
    gc.collect()
    return len(torch_optimizer._global_optimizer_pre_hooks)


# A second optimizer of this package ------------------------------------------------------------------------------------


class Another(nn.Module):
    """A second model that shares one layer with the first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.shared, self.own = model.side, nn.Linear(24, 8)


SECOND = {
    "the same class": lambda model: build("galore", model),
    "another class": lambda model: build("apollo", model),
    "from parts": lambda model: lo.LowRankOptimizer(model.parameters(), rule=lo.Lion(), lr=1e-3),
    "without names": lambda model: lo.GaLoreAdamW(list(model.parameters()), rank=4),
    "with names": lambda model: lo.GaLoreAdamW(model.named_parameters(), rank=4),
    "one parameter of many": lambda model: lo.GaLoreAdamW([nn.Parameter(torch.zeros(8, 8)), model.norm.bias]),
    "the last of its groups": lambda model: lo.GaLoreAdamW(
        [{"params": [nn.Parameter(torch.zeros(8, 8))]}, {"params": [model.head.weight], "rank": 4}]
    ),
    "a frozen parameter": lambda model: lo.GaLoreAdamW([model.embed.weight.requires_grad_(False)]),
    "layer by layer": lambda model: build("lisa", model),
    "block by block": lambda model: build("badam", model),
    "a model around it": lambda model: build("galore", nn.Sequential(model)),
    "a compiled model": lambda model: lo.GaLoreAdamW(torch.compile(model).parameters()),
    "a model that shares a layer": lambda model: lo.GaLoreAdamW(Another(model).parameters(), rank=4),
    "by its name": lambda model: lo.by_name("fira")(lo.param_groups(model, rank=4)),
}


@pytest.mark.long
@pytest.mark.parametrize("second", SECOND.values(), ids=SECOND.keys())
def test_an_optimizer_of_parameters_that_another_one_updates_in_backward_is_refused(second):
    model, optimizer, handle = hooked()
    train(optimizer, model, stop=3)
    before = copies(model)
    with pytest.raises(RuntimeError, match=ALIVE):
        second(model)
    assert_unmoved(model, before)
    assert lo.UpdateInBackward.find(model.parameters()) == [handle]
    handle.remove()
    second(model)


def test_the_message_counts_and_names_the_parameters():
    model, *_alive = hooked()
    with pytest.raises(RuntimeError, match=r"^norm.bias: updated in backward"):
        lo.GaLoreAdamW([("norm.bias", model.norm.bias)])
    with pytest.raises(RuntimeError, match=r"^norm.weight and 1 more parameters: updated in backward"):
        lo.GaLoreAdamW(model.norm.named_parameters(prefix="norm"))


def test_layers_that_sleep_are_not_free():
    _, optimizer, _ = hooked("lisa", active_layers=1)
    (asleep, *_) = (g for g in optimizer.param_groups if g["layer"] is not None and not g["awake"])
    with pytest.raises(RuntimeError, match="updated in backward by another LISAAdamW"):
        lo.GaLoreAdamW(asleep["params"])


def test_a_group_with_a_parameter_that_another_optimizer_updates_is_not_added():
    model, _alive, handle = hooked()
    own = nn.Parameter(torch.ones(24, 16))
    for attach in (False, True):
        other = lo.GaLoreAdamW([own], rank=4)
        with lo.update_in_backward(other) if attach else contextlib.nullcontext():
            with pytest.raises(RuntimeError, match=ALIVE):
                other.add_param_group({"params": [nn.Parameter(torch.ones(4)), model.head.weight]})
            assert len(other.param_groups) == 1
            assert len(other.state) == 1
    assert lo.UpdateInBackward.find(model.parameters()) == [handle]


def test_attaching_where_another_handle_is_attached_raises_before_anything_changes():
    model = build_net()
    first, second = build("galore", model), build("galore", model)  # both are built before any is attached
    handle = lo.update_in_backward(first)
    before, hooks = copies(model), step_hooks()
    with pytest.raises(RuntimeError, match=ALIVE):
        lo.update_in_backward(second)
    assert second._in_backward is None
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in model.parameters())
    assert step_hooks() == hooks
    assert_unmoved(model, before)
    handle.remove()
    lo.update_in_backward(second)
    train(second, model, stop=3)
    assert second.state[model.head.weight]["step"] == 3
    assert first.state[model.head.weight]["step"] == 0


def test_attaching_to_a_part_of_the_same_parameters_raises():
    model = build_net()
    first = lo.GaLoreAdamW([*model.embed.parameters(), *model.norm.parameters()])
    second = lo.GaLoreAdamW([*model.norm.parameters(), *model.head.parameters()], rank=4)
    lo.update_in_backward(first)
    with pytest.raises(RuntimeError, match=r"^0.0 and 1 more parameters: updated in backward"):
        lo.update_in_backward(second)
    assert not model.head.weight._post_accumulate_grad_hooks


def test_tied_weights_belong_to_one_optimizer():
    model = Tied()
    handle = lo.update_in_backward(first := lo.GaLoreAdamW(model.parameters(), rank=4))
    with pytest.raises(RuntimeError, match=ALIVE):
        lo.GaLoreAdamW([model.head.weight], rank=4)
    assert lo.UpdateInBackward.find([model.head.weight, model.embed.weight]) == [handle]
    assert handle.optimizer is first


# A second optimizer of torch, or one that was built before --------------------------------------------------------------


class Foreign(torch.optim.Optimizer):
    """As anybody writes one."""

    def __init__(self, params) -> None:
        super().__init__(params, {})

    def step(self, closure=None):
        if closure is not None:
            closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(1.0)


STEPPING = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters()),
    "AdamW of many tensors": lambda model: torch.optim.AdamW(model.parameters(), foreach=True),
    "fused AdamW": lambda model: torch.optim.AdamW(model.parameters(), fused=True),
    "SGD that decays": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1),
    "Adafactor": lambda model: torch.optim.Adafactor(model.parameters()),
    "one parameter": lambda model: torch.optim.SGD([model.norm.bias], lr=0.1),
    "somebody's own": lambda model: Foreign(model.parameters()),
    "an unpickled one": lambda model: rebound(torch.optim.AdamW(build_net().parameters()), model),
}


def rebound(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer that was unpickled and then given the parameters of a model."""
    optimizer = pickle.loads(pickle.dumps(optimizer))
    optimizer.param_groups[0]["params"] = list(model.parameters())
    return optimizer


@pytest.mark.long
@pytest.mark.parametrize("accumulate", [1, 8])
@pytest.mark.parametrize("other", STEPPING.values(), ids=STEPPING.keys())
def test_another_optimizer_is_stopped_at_its_first_step(other, accumulate):
    model, _alive, handle = hooked(accumulate=accumulate)
    other = other(model)
    loss_of(model, batch(0)).backward()
    before = copies(model)
    with pytest.raises(RuntimeError, match=f"^{type(other).__name__} takes no step: .*{ALIVE}"):
        other.step()
    assert_unmoved(model, before)
    handle.discard()
    handle.remove()
    other.step()
    loss_of(model, batch(0), side=True).backward()
    other.step()
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_closure_of_another_optimizer_is_not_called():
    model, *_alive = hooked()
    before = copies(model)

    def closure():
        loss = loss_of(model, batch(0))
        loss.backward()
        return loss

    for other in (torch.optim.LBFGS(model.parameters()), torch.optim.SGD(model.parameters(), lr=0.1)):
        with pytest.raises(RuntimeError, match=ALIVE):
            other.step(closure)
    assert_unmoved(model, before)


@pytest.mark.parametrize("name", ["galore", "lisa"])
def test_an_optimizer_of_this_package_that_was_built_before_is_stopped_at_its_first_step(name):
    model = build_net()
    other = build(name, model)
    optimizer = build("galore", model)
    lo.update_in_backward(optimizer)
    loss_of(model, batch(0)).backward()
    before = copies(model)
    with pytest.raises(RuntimeError, match=ALIVE):
        other.step()
    assert_unmoved(model, before)
    assert all(state["step"] == 0 for state in other.state.values())


def test_a_shallow_copy_of_the_optimizer_is_stopped():
    model, optimizer, _handle = hooked()
    loss_of(model, batch(0)).backward()
    with pytest.raises(RuntimeError, match=ALIVE):
        copy.copy(optimizer).step()
    optimizer.step()


def test_a_parameter_that_was_put_into_a_group_by_hand_is_found():
    model, *_alive = hooked()
    other = lo.GaLoreAdamW([nn.Parameter(torch.ones(8, 4))], rank=2)
    other.param_groups[0]["params"].append(model.head.weight)
    with pytest.raises(RuntimeError, match=ALIVE):
        other.step()
    torch_one = torch.optim.SGD([nn.Parameter(torch.ones(8, 4))], lr=0.1)
    torch_one.add_param_group({"params": [model.head.weight]})
    with pytest.raises(RuntimeError, match=ALIVE):
        torch_one.step()


def test_a_grad_scaler_does_not_hide_another_optimizer():
    model, *_alive = hooked()
    other = torch.optim.SGD([*model.parameters(), own := nn.Parameter(torch.ones(2))], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(model, batch(0)) + own.sum()).backward()
    with pytest.raises(RuntimeError, match=ALIVE):
        scaler.step(other)
    assert torch.equal(own, torch.ones(2))


def test_hooks_that_step_an_optimizer_for_each_parameter_are_stopped():
    model, *_alive = hooked()
    before = copies(model)
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.head.parameters()}
    hook = model.head.weight.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    with pytest.raises(RuntimeError, match=f"SGD takes no step: head.weight: {ALIVE}"):
        loss_of(model, batch(0)).backward()
    hook.remove()
    early = build_net()  # theirs come first, ours later
    mine = {p: torch.optim.SGD([p], lr=0.1) for p in early.parameters()}
    for p in early.parameters():
        p.register_post_accumulate_grad_hook(lambda p: mine[p].step())
    lo.update_in_backward(optimizer := build("galore", early))
    with pytest.raises(RuntimeError, match=f"SGD takes no step: head.weight: {ALIVE}"):
        loss_of(early, batch(0)).backward()
    assert_unmoved(early, before)
    assert optimizer.state[early.head.weight]["step"] == 0


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_backward_pass_for_which_nobody_steps_raises_and_names_the_way_out(accumulate):
    model, *_alive = hooked(accumulate=accumulate)
    for step in range(accumulate):  # a loop that has an update of its own
        loss_of(model, batch(step), side=True).backward()
        model.zero_grad()
    before = copies(model)
    with pytest.raises(
        RuntimeError, match=r"another optimizer steps in place of this one \(GaLoreAdamW\): Call remove"
    ):
        loss_of(model, batch(9)).backward()
    assert_unmoved(model, before)


# The way out ------------------------------------------------------------------------------------------------------------


def interrupted(model: nn.Module, accumulate: int) -> BaseException:
    """A training that is broken off within a step; the exception keeps its frames, as a notebook does."""

    def cell() -> None:
        optimizer = build("galore", model)
        lo.update_in_backward(optimizer, accumulate)
        for step in range(STEPS):
            loss_of(model, batch(step)).backward()
            if step == 4:
                raise KeyboardInterrupt
            if step % accumulate == accumulate - 1:
                optimizer.step()

    try:
        cell()
    except KeyboardInterrupt as error:
        return error
    raise AssertionError


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_new_optimizer_after_an_interrupted_cell_trains_as_if_there_had_been_no_other(accumulate):
    model = build_net()
    kept = interrupted(model, accumulate)
    twin = copy.deepcopy(model)
    for make in (lambda: build("fira", model), lambda: torch.optim.AdamW(model.parameters()).step()):
        with pytest.raises(RuntimeError, match=ALIVE):
            make()
    for handle in lo.UpdateInBackward.find(model.parameters()):  # what the message says
        handle.discard()
        handle.remove()
    assert lo.UpdateInBackward.find(model.parameters()) == []
    ours, alone = build("fira", model), build("fira", twin)
    lo.update_in_backward(ours)
    train(ours, model)
    train(alone, twin)
    assert_same(model, twin)
    assert_same_state(ours, alone)
    assert kept is not None


def test_the_handle_of_a_lost_variable_is_found_once_for_each_optimizer():
    model, other = build_net(), build_net()
    optimizers = build("galore", model), build("apollo", other)
    for optimizer in optimizers:
        lo.update_in_backward(optimizer)  # the handle is dropped, the optimizer keeps it
    gc.collect()
    found = lo.UpdateInBackward.find([*other.parameters(), *model.parameters()])
    assert [handle.optimizer for handle in found] == [optimizers[1], optimizers[0]]
    assert lo.UpdateInBackward.find(build_net().parameters()) == []
    with pytest.raises(RuntimeError, match=r"attached to this optimizer already.*UpdateInBackward.find"):
        lo.update_in_backward(optimizers[0])


# No alarm where there is no second one -----------------------------------------------------------------------------------


def test_optimizers_of_different_parameters_train_side_by_side():
    (model, optimizer, _), (other, second, _) = hooked(), hooked("apollo")
    alone, reference = build_net(), build_net()
    optimizers = build("galore", alone), torch.optim.AdamW(reference.parameters(), lr=1e-2)
    third = build_net()
    for one, each in ((model, optimizer), (other, second), (alone, optimizers[0])):
        train(each, one)
    for one, each in ((third, torch.optim.AdamW(third.parameters(), lr=1e-2)), (reference, optimizers[1])):
        train(each, one)
    assert_same(model, alone)
    assert_same(third, reference)
    assert second.state[other.head.weight]["step"] == STEPS


@pytest.mark.long
@pytest.mark.parametrize("end", ["remove", "drop", "drop a cycle"])
def test_a_handle_that_was_removed_or_whose_optimizer_is_gone_does_not_count(end):
    hooks = step_hooks()
    model, optimizer, handle = hooked()
    assert step_hooks() == hooks + 1
    train(optimizer, model, stop=2)
    alive = weakref.ref(optimizer)
    if end == "remove":
        handle.remove()
    elif end == "drop a cycle":
        optimizer.itself = optimizer
        gc.disable()
    try:
        del optimizer
        assert (alive() is None) == (end == "drop" or end == "remove")
        twin = copy.deepcopy(model)
        second = build("galore", model)  # frees the cycle
    finally:
        gc.enable()
    assert alive() is None
    assert step_hooks() == hooks
    reference = build("galore", twin)
    lo.update_in_backward(second)
    train(second, model)
    train(reference, twin)
    assert_same(model, twin)
    assert handle.optimizer is None
    handle.remove()
    assert second._in_backward.active


def test_a_step_after_an_update_by_an_optimizer_that_was_dropped_warns():
    model, optimizer, _ = hooked()
    optimizer.itself = optimizer
    gc.disable()
    try:
        del optimizer
        other = torch.optim.SGD(model.parameters(), lr=0.1)
        loss_of(model, batch(0)).backward()
        with pytest.warns(RuntimeWarning, match=r"dropped but not yet freed; this step of SGD has none") as seen:
            other.step()
        assert seen[0].filename == __file__
    finally:
        gc.enable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(model, batch(0)).backward()
        assert model.head.weight.grad is not None
        other.step()


def test_remove_and_attach_again_trains_as_ordinary_stepping():
    model, twin = build_net(), build_net()
    optimizer, reference = build("galore", model), build("galore", twin)
    for start in range(0, STEPS, 2):
        with lo.update_in_backward(optimizer):
            train(optimizer, model, start, start + 2)
    train(reference, twin)
    assert_same(model, twin)
    assert lo.UpdateInBackward.find(model.parameters()) == []


CLONES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda item: pickle.loads(pickle.dumps(item)),
    "torch.save": lambda item: reload(item),
}


def reload(item):
    stream = io.BytesIO()
    torch.save(item, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("clone", CLONES.values(), ids=CLONES.keys())
def test_copies_of_model_and_optimizer_are_free(clone, quantized):
    model = build_net()
    if quantized:
        lo.nn.quantize_weights_(model, include=["layers"])
    optimizer = build("qgalore" if quantized else "galore", model)
    lo.update_in_backward(optimizer)
    train(optimizer, model, stop=2)
    before = copies(model)
    twin, steps = clone((model, optimizer))
    assert lo.UpdateInBackward.find(twin.parameters()) == []
    second = build("apollo", clone(model))
    second.step()
    torch.optim.AdamW(p for p in clone(model).parameters() if isinstance(p, nn.Parameter)).step()
    assert_unmoved(model, before)
    train(steps, twin, 2, 4)
    train(optimizer, model, 2, 4)
    assert_same(twin, model)


def test_an_average_of_the_model_is_free():
    model, optimizer, _handle = hooked()
    average = AveragedModel(model)
    train(optimizer, model, stop=2)
    average.update_parameters(model)
    lo.GaLoreAdamW(average.module.parameters())
    torch.optim.AdamW(average.module.parameters()).step()
    for p, q in zip(average.module.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)


class Wrapper(torch.optim.Optimizer):
    """Hands steps, and whatever it does not know, on to the optimizer whose groups it shares, as wrappers of trainers do."""

    def __init__(self, optimizer) -> None:
        super().__init__([nn.Parameter(torch.zeros(1))], {})
        self.inner, self.param_groups = optimizer, optimizer.param_groups

    def step(self, closure=None):
        self.inner.step(closure)

    def __getattr__(self, name):
        return getattr(self.inner, name)


def test_a_wrapper_of_the_optimizer_steps():
    (model, optimizer, _handle), twin = hooked(), build_net()
    reference = build("galore", twin)
    train(Wrapper(optimizer), model)
    train(reference, twin)
    assert_same(model, twin)


def test_a_compiled_step_of_the_optimizer_and_of_others_is_never_recompiled():
    (model, optimizer, _handle), twin, others = hooked(), build_net(), build_net()
    reference, other = build("galore", twin), torch.optim.SGD(others.parameters(), lr=0.1)
    for one, each in ((model, optimizer), (others, other)):
        torch._dynamo.reset()
        take = torch.compile(each.step, backend="eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for step in range(5):
                loss_of(one, batch(step), side=True).backward()
                take()
    for step in range(5):
        loss_of(twin, batch(step), side=True).backward()
        reference.step()
        reference.zero_grad()
    assert_same(model, twin)
    torch._dynamo.reset()
    stopped = torch.compile(torch.optim.SGD(model.parameters(), lr=0.1).step, backend="eager")
    with pytest.raises(RuntimeError, match=ALIVE):
        stopped()


# Attaching is all or nothing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu")], ids=["", "scaler"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_stays_attached_where_attaching_is_broken_off(error, scaler, monkeypatch):
    model = build_net()
    model.embed.requires_grad_(False)
    model.head.requires_grad_(False)
    frozen = [p.requires_grad for p in model.parameters()]
    optimizer, hooks = build_all(model), step_hooks()
    before = set(vars(optimizer))
    real, calls = torch.Tensor.register_post_accumulate_grad_hook, []

    def broken(param, hook):
        calls.append(param)
        if param is model.head.weight:
            raise error
        return real(param, hook)

    monkeypatch.setattr(torch.Tensor, "register_post_accumulate_grad_hook", broken)
    with pytest.raises(error):
        lo.update_in_backward(optimizer, grad_scaler=scaler)
    monkeypatch.undo()
    assert len(calls) > 1
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == frozen
    assert set(vars(optimizer)) == before
    assert step_hooks() == hooks
    lo.update_in_backward(optimizer, grad_scaler=scaler).remove()
    assert set(vars(optimizer)) == before


def build_all(model: nn.Module) -> lo.LowRankOptimizer:
    """An optimizer of all parameters, frozen ones too, in the model's order."""
    return lo.GaLoreAdamW(list(model.named_parameters()), rank=4)


def test_a_group_that_cannot_be_updated_in_backward_is_not_added():
    model = build_net()
    optimizer = lo.GaLoreAdamW(list(model.named_parameters()), rank=4)
    handle = lo.update_in_backward(optimizer, grad_scaler=torch.amp.GradScaler("cpu"))
    own = nn.Parameter(torch.ones(8, 4))
    with pytest.raises(ValueError, match=r'only on_nonfinite="skip" leaves out'):
        optimizer.add_param_group({"params": [own], "on_nonfinite": "raise"})
    handle.remove()
    dense = lo.FiraAdamW([nn.Parameter(torch.ones(3))])
    lo.update_in_backward(dense, accumulate=2)
    with pytest.raises(ValueError, match=r"accumulate is 2, but residual='norm_scaled'"):
        dense.add_param_group({"params": [own], "rank": 2})
    for each in (optimizer, dense):
        assert len(each.param_groups) == 1
        assert own not in each.state
    assert not own._post_accumulate_grad_hooks
    lo.FiraAdamW([own], rank=2)
