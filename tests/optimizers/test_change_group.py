"""A param group keeps its meaning in mid-training: as it changes, moves or freezes, and in names, checkpoints and pairs."""

import contextlib
import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import lowrank_optim as lo


def parameters(*shapes):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def train_step(optimizer, params, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()
    optimizer.zero_grad()


@dataclass(frozen=True)
class Joint(lo.JointRule):
    """Momentum of parameters that step together."""

    name: ClassVar[str] = "joint"

    def init_joint(self, shapes, options, dtype, device):
        return [{"m": torch.zeros(shape, dtype=dtype, device=device)} for shape in shapes]

    def directions(self, grads, states, options, contexts):
        for grad, state in zip(grads, states, strict=True):
            state["m"].mul_(0.9).add_(grad)
        return [lo.Direction(state["m"].clone()) for state in states]


# What a change of a group keeps, and what it starts anew.


def error_of_8bit_second_moment(change):
    """Median relative error of the root of the 8-bit second moment, where the columns have scales from 1e-4 to 1."""
    (coded,) = parameters((200, 64))
    (plain,) = parameters((200, 64))
    optimizer = lo.LowRankOptimizer([coded], rule=lo.Adam(), state_bits=8, lr=1e-3)
    reference = lo.LowRankOptimizer([plain], rule=lo.Adam(), state_bits=32, lr=1e-3)
    scales = torch.logspace(-4, 0, 64)
    for seed in range(15):
        if seed == 9 and change:
            optimizer.change_group(0, weight_decay=0.0)
        grad = torch.randn(200, 64, generator=torch.Generator().manual_seed(seed)) * scales
        coded.grad = grad.clone()
        plain.grad = grad.clone()
        optimizer.step()
        reference.step()
    root = optimizer.trained(coded).moments["exp_avg_sq"].sqrt()
    expected = reference.state[plain]["exp_avg_sq"].sqrt()
    return float((root / expected - 1).abs().median())


def test_column_scales_of_dense_8bit_state_survive_a_change_of_the_group():
    unchanged = error_of_8bit_second_moment(change=False)
    changed = error_of_8bit_second_moment(change=True)
    assert changed < 3 * unchanged


def test_a_change_of_a_live_option_keeps_the_state():
    (param,) = parameters((64, 64))
    optimizer = lo.GaLoreAdamW([param], rank=4, projector="random")
    train_step(optimizer, [param])
    optimizer.change_group(0, lr=0.5)
    assert float(optimizer.state[param]["step"]) == 1


def test_a_change_of_update_proj_gap_holds_where_overlaps_adapt_the_gap():
    (param,) = parameters((64, 64))
    optimizer = lo.GaLoreAdamW([param], rank=4, overlap_threshold=0.4, update_proj_gap=200)
    train_step(optimizer, [param])
    optimizer.change_group(0, update_proj_gap=10)
    assert int(optimizer.state[param]["gap"]) == 10


@pytest.mark.parametrize("shape", [(64, 96), (64, 64)])
def test_a_change_of_layout_makes_the_subspace_due_anew(shape):
    (param,) = parameters(shape)
    optimizer = lo.GaLoreAdamW([param], rank=4, proj_type="right")
    train_step(optimizer, [param])
    optimizer.change_group(0, layout="transposed")
    assert int(optimizer.state[param]["last_refresh"]) == -1


def test_a_group_of_lisa_can_change_its_state_bits():
    first, second = parameters((64, 32), (64, 32))
    optimizer = lo.LISAAdamW(
        [{"params": [first], "layer": 0}, {"params": [second], "layer": None}], active_layers=1, period=2
    )
    train_step(optimizer, [first, second])
    optimizer.change_group(1, state_bits=16)


# Which rule a group has that becomes low-rank or dense.


def two_rules(**dense):
    params = parameters((64, 48), (64, 48))
    optimizer = lo.LowRankOptimizer(
        [{"params": params[:1], "rank": 4}, {"params": params[1:], **dense}],
        rule=lo.Lion((0.8, 0.9)),
        dense_rule=lo.SGD(momentum=0.5),
    )
    train_step(optimizer, params)
    return params, optimizer


def rule_options(group):
    return {name: group[name] for name in ("rule", "betas", "momentum")}


@pytest.mark.parametrize("change", [{"rank": 4}, {"density": 0.25}])
def test_a_dense_group_that_becomes_low_rank_has_the_rule_of_a_new_one(change):
    params, optimizer = two_rules()
    optimizer.change_group(1, **change)
    (new,) = parameters((64, 48))
    optimizer.add_param_group({"params": [new], **change})
    _, changed, added = optimizer.param_groups
    assert rule_options(changed) == rule_options(added)
    assert (changed["rule"], changed["betas"]) == ("lion", (0.8, 0.9))
    before = params[1].detach().clone()
    train_step(optimizer, params)
    assert optimizer.state[params[1]]["exp_avg"].shape == optimizer.state[new]["exp_avg"].shape
    moved = torch.linalg.svdvals(params[1].detach() - before)
    assert (moved[12:] < 1e-6).all()  # a quarter of 48, or 4


def test_a_low_rank_group_that_becomes_dense_has_the_rule_of_a_new_one():
    params, optimizer = two_rules()
    optimizer.change_group(0, rank=None)
    assert rule_options(optimizer.param_groups[0]) == rule_options(optimizer.param_groups[1])
    assert optimizer.plan_of(params[0]).rule == lo.SGD(momentum=0.5)
    before, grad = params[0].detach().clone(), torch.ones(64, 48)
    params[0].grad = grad
    momentum = optimizer.state[params[0]]["exp_avg"].clone()
    optimizer.step()
    torch.testing.assert_close(params[0].detach(), before - 1e-3 * (grad + 0.5 * momentum))


def test_a_rule_or_option_of_its_own_stays_where_a_group_becomes_low_rank():
    _, optimizer = two_rules(rule=lo.Adam())
    optimizer.change_group(1, rank=4)
    assert optimizer.param_groups[1]["rule"] == "adam"
    _, optimizer = two_rules(betas=(0.7, 0.6))
    optimizer.change_group(1, rank=4)
    assert (optimizer.param_groups[1]["rule"], optimizer.param_groups[1]["betas"]) == ("lion", (0.7, 0.6))
    _, optimizer = two_rules()
    optimizer.change_group(1, rank=4, rule="sgd", momentum=0.3)
    assert (optimizer.param_groups[1]["rule"], optimizer.param_groups[1]["momentum"]) == ("sgd", 0.3)
    optimizer.change_group(1, rank=None, momentum=0.4)
    optimizer.change_group(1, rank=8, betas=(0.1, 0.2))
    assert rule_options(optimizer.param_groups[1]) == {"rule": "lion", "betas": (0.1, 0.2), "momentum": 0.4}


# What a change of a group refuses.


@pytest.mark.parametrize(
    ("accumulate", "residual", "message"),
    [(1, "error_feedback", "keeps the error of each matrix"), (3, "norm_scaled", "accumulate is 3")],
)
def test_a_change_to_a_residual_that_updates_in_backward_exclude_is_refused(accumulate, residual, message):
    (param,) = parameters((64, 32))
    optimizer = lo.GaLoreAdamW([param], rank=4)
    lo.update_in_backward(optimizer, accumulate)
    with pytest.raises(ValueError, match=message):
        optimizer.change_group(0, residual=residual)


def test_a_change_of_on_nonfinite_that_the_grad_scaler_excludes_is_refused():
    (param,) = parameters((64, 32))
    optimizer = lo.GaLoreAdamW([param], rank=4)
    lo.update_in_backward(optimizer, grad_scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match="a GradScaler finds its scale by infinities"):
        optimizer.change_group(0, on_nonfinite="raise")


def test_training_goes_on_after_a_negative_group_number():
    matrix, vector = parameters((64, 32), (64,))
    optimizer = lo.GaLoreAdamW([{"params": [matrix], "rank": 4}, {"params": [vector]}], lr=0.1)
    with contextlib.suppress(ValueError, IndexError):
        optimizer.change_group(-1, weight_decay=0.0)
    train_step(optimizer, [matrix, vector])


def test_a_change_of_the_params_of_a_group_is_refused():
    param, other = parameters((64, 32), (32, 32))
    optimizer = lo.GaLoreAdamW([param], rank=4)
    with pytest.raises((TypeError, ValueError), match="unknown option 'params' in change_group"):
        optimizer.change_group(0, params=[other])


def test_a_change_to_a_residual_whose_field_the_rule_has_too_is_refused():
    @dataclass(frozen=True)
    class WithEps(lo.NoResidual):
        name: ClassVar[str] = "mine"
        eps: float = 3.0

    (param,) = parameters((64, 48))
    optimizer = lo.GaLoreAdamW([param], rank=4)
    with pytest.raises(ValueError, match="'eps' is a field of the residual WithEps, and a field of the rule Adam"):
        optimizer.change_group(0, residual=WithEps())


# The groups of an optimizer, and the parts that each of them has.


def test_groups_in_another_order_keep_their_learning_rates():
    still, moving = parameters((64, 32), (64, 48))
    before = still.detach().clone()
    optimizer = lo.GaLoreAdamW(
        [{"params": [still], "rank": 4, "lr": 0.0, "weight_decay": 0.0}, {"params": [moving], "rank": 4, "lr": 1.0}]
    )
    optimizer.param_groups.reverse()
    train_step(optimizer, [still, moving])
    assert torch.equal(still, before)


def test_the_other_groups_train_after_a_group_was_taken_out():
    matrix, vector = parameters((64, 32), (64,))
    optimizer = lo.GaLoreAdamW([{"params": [matrix], "rank": 4}, {"params": [vector]}], lr=0.1)
    before = matrix.detach().clone()
    optimizer.param_groups.pop()
    train_step(optimizer, [matrix, vector])
    assert not torch.equal(matrix, before)


def test_a_dense_rule_of_the_same_name_keeps_its_own_betas():
    matrix, vector = parameters((64, 32), (64,))
    optimizer = lo.LowRankOptimizer(
        [{"params": [matrix], "rank": 4}, {"params": [vector]}],
        rule=lo.Adam((0.9, 0.999)),
        dense_rule=lo.Adam((0.5, 0.9)),
    )
    assert optimizer.param_groups[1]["betas"] == (0.5, 0.9)


@pytest.mark.parametrize("kind", [lo.FrugalAdamW, lo.LDAdamW])
def test_a_dense_group_takes_the_public_adam_beside_a_variant_of_it(kind):
    projected, dense = parameters((64, 32), (64, 32))
    kind([{"params": [projected], "rank": 4}, {"params": [dense], "rank": None, "rule": lo.Adam()}])


def test_the_parts_of_a_refused_group_are_not_kept():
    @dataclass(frozen=True)
    class Refused(lo.Lion):
        name: ClassVar[str] = "mine"

    @dataclass(frozen=True)
    class Accepted(lo.RMSprop):
        name: ClassVar[str] = "mine"

    first, second = parameters((64, 48), (64, 48))
    optimizer = lo.GaLoreAdamW([first], rank=4)
    with pytest.raises(ValueError, match="rank is -1; it must be at least 1"):
        optimizer.add_param_group({"params": [second], "rule": Refused(), "rank": -1})
    optimizer.add_param_group({"params": [second], "rule": Accepted()})


def test_describe_names_the_rule_of_a_group():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    groups = lo.param_groups(model, rank=4, overrides={"0.weight": {"rule": lo.Lion()}})
    optimizer = lo.GaLoreAdamW(groups)
    assert "lion" in lo.describe(optimizer).lower()


def test_updates_in_backward_accept_a_frozen_uint8_parameter():
    (param,) = parameters((64, 64))
    frozen = nn.Parameter(torch.zeros(64, 64, dtype=torch.uint8), requires_grad=False)
    lo.update_in_backward(lo.GaLoreAdamW([param, frozen], rank=4))


# Names.


def test_two_groups_with_an_equal_name_update_in_backward():
    first, second = parameters((64, 32), (64, 32))
    optimizer = lo.GaLoreAdamW(
        [{"params": [("weight", first)], "rank": 4}, {"params": [("weight", second)], "rank": 4}], lr=0.1
    )
    lo.update_in_backward(optimizer)
    (first.sum() + second.sum()).backward()
    optimizer.step()


def named(names, params):
    return lo.GaLoreAdamW([{"params": list(zip(names, params, strict=True)), "rank": 4}], lr=0.1)


@pytest.mark.parametrize("names", [("weight", "weight"), ("module.weight", "weight")])
def test_a_checkpoint_with_equal_names_loads_in_order(names):
    params = parameters((64, 32), (64, 32))
    loaded_params = parameters((64, 32), (64, 32))
    optimizer = named(names, params)
    loaded = named(names, loaded_params)
    train_step(optimizer, params)
    loaded.load_state_dict(optimizer.state_dict())
    assert torch.equal(loaded.state[loaded_params[0]]["exp_avg"], optimizer.state[params[0]]["exp_avg"])


def test_a_checkpoint_with_other_names_is_refused():
    params = parameters((64, 48), (64, 48))
    optimizer = lo.GaLoreAdamW([{"params": list(zip("ab", params, strict=True)), "rank": 8}])
    train_step(optimizer, params)
    others = parameters((64, 48), (64, 48))
    other = lo.GaLoreAdamW([{"params": list(zip("bz", others, strict=True)), "rank": 8}])
    with pytest.raises(ValueError, match="the checkpoint does not fit this GaLoreAdamW"):
        other.load_state_dict(optimizer.state_dict())


# Checkpoints.


def test_a_checkpoint_of_a_frozen_parameter_loads_where_it_trains():
    frozen = parameters((64, 32), (66, 32))
    frozen[1].requires_grad_(False)
    optimizer = lo.GaLoreAdamW(frozen, rank=4, lr=0.1)
    train_step(optimizer, frozen[:1])
    loaded = lo.GaLoreAdamW(parameters((64, 32), (66, 32)), rank=4, lr=0.1)
    loaded.load_state_dict(optimizer.state_dict())


def test_an_optimizer_whose_state_was_cleared_loads_its_own_checkpoint():
    params = parameters((64, 32), (66, 32))
    optimizer = lo.GaLoreAdamW(params, rank=4, lr=0.1)
    train_step(optimizer, params)
    optimizer.state.clear()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


# Pairs: parameters that step together.


def test_a_group_of_pairs_can_change_its_weight_decay():
    first, second = parameters((6, 3), (3, 6))
    optimizer = lo.LowRankOptimizer([{"params": [first, second], "rule": Joint()}], rule="adam")
    train_step(optimizer, [first, second])
    optimizer.change_group(0, weight_decay=0.1)


def test_a_pair_that_was_frozen_in_training_is_copied_and_loaded():
    first, second, matrix = parameters((6, 3), (3, 6), (40, 40))
    optimizer = lo.LowRankOptimizer(
        [{"params": [first, second], "rule": Joint()}, {"params": [matrix]}],
        rule="adam",
    )
    train_step(optimizer, [first, second, matrix])
    checkpoint = copy.deepcopy(optimizer.state_dict())
    first.requires_grad_(False)
    second.requires_grad_(False)
    copy.deepcopy(optimizer)
    optimizer.load_state_dict(checkpoint)


def test_a_pair_in_a_layer_of_lisa_loads_its_checkpoint_in_each_period():
    params = parameters((6, 3), (3, 6), (40, 40))
    optimizer = lo.LISAAdamW(
        [{"params": params[:2], "rule": Joint(), "layer": 0}, {"params": params[2:], "layer": 1}],
        active_layers=1,
        period=1,
    )
    for _ in range(4):
        for param in params:
            param.grad = torch.ones_like(param) if param.requires_grad else None
        optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_a_pair_in_backward_trains_on_after_a_gradient_was_missing():
    first, second = parameters((8, 6), (6, 8))
    optimizer = lo.LowRankOptimizer([{"params": [first, second], "rule": Joint()}], rule="adam")
    lo.update_in_backward(optimizer)
    first.sum().backward()
    with pytest.raises(RuntimeError, match="got no gradient, so that none of them was changed"):
        optimizer.step()
    optimizer.zero_grad()
    (first.sum() + second.sum()).backward()
    optimizer.step()


def test_a_wrong_number_of_directions_changes_no_parameter():
    @dataclass(frozen=True)
    class OnlyFirst(Joint):
        name: ClassVar[str] = "only_first"

        def directions(self, *arguments):
            return super().directions(*arguments)[:1]

    params = parameters((8, 6), (6, 8))
    optimizer = lo.LowRankOptimizer([{"params": params, "rule": OnlyFirst()}], rule="adam")
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match=r"OnlyFirst\.directions gave 1 directions for 2 parameters"):
        train_step(optimizer, params)
    assert torch.equal(before, params[0])
