"""Each group has a rule, a projector and a residual of its own; options are structural, live, or somebody else's."""

import copy
import io
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo

SHAPES = ((48, 32), (32, 80), (40, 40), (7,))


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def give_gradients(params: Sequence[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


def train(optimizer: lo.LowRankOptimizer, params: Sequence[nn.Parameter], steps: range) -> None:
    for step in steps:
        give_gradients(params, step)
        optimizer.step()


GROUPS: list[dict[str, Any]] = [
    {"rank": 4, "rule": lo.Lion((0.9, 0.95)), "projector": "random", "residual": "sign"},
    {"rank": 8, "projector": lo.SVD()},
    {"rule": "sgd", "momentum": 0.9, "lr": 0.1},
    {"weight_decay": 0.0},
]


def mixed(params: Sequence[nn.Parameter], **options: Any) -> lo.LowRankOptimizer:
    groups = [{"params": [param], **group} for param, group in zip(params, GROUPS, strict=True)]
    return lo.LowRankOptimizer(
        groups, rule=lo.Adam(), dense_rule=lo.RMSprop(), lr=0.01, weight_decay=0.1, update_proj_gap=3, **options
    )


def test_each_group_steps_as_an_optimizer_of_its_own_would():
    params = parameters()
    optimizer = mixed(params)
    alone = copy.deepcopy(params)
    options: dict[str, Any] = {"weight_decay": 0.1, "update_proj_gap": 3, "stagger": False}
    singles = [
        lo.LowRankOptimizer(
            [alone[0]], rule=lo.Lion((0.9, 0.95)), projector="random", residual="sign", rank=4, lr=0.01, **options
        ),
        lo.LowRankOptimizer([alone[1]], rule=lo.Adam(), rank=8, projector="svd", lr=0.01, **options),
        lo.LowRankOptimizer([alone[2]], rule=lo.SGD(0.9), lr=0.1, **options),
        lo.LowRankOptimizer([alone[3]], rule=lo.RMSprop(), lr=0.01, update_proj_gap=3),
    ]
    for group in optimizer.param_groups:
        group["stagger"] = False
    train(optimizer, params, range(7))
    for single, param in zip(singles, alone, strict=True):
        for step in range(7):
            give_gradients(alone, step)
            single.step()
        assert param.grad is not None
    assert all(torch.equal(param, other) for param, other in zip(params, alone, strict=True))
    assert [group["rule"] for group in optimizer.param_groups] == ["lion", "adam", "sgd", "rmsprop"]
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.95), *[(0.9, 0.999)] * 3]


def test_a_mixed_optimizer_resumes_to_the_bit_through_weights_only():
    params = parameters()
    optimizer = mixed(params)
    train(optimizer, params, range(5))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    resumed = copy.deepcopy(params)
    train(optimizer, params, range(5, 10))
    file.seek(0)
    again = mixed(resumed)
    again.load_state_dict(torch.load(file, weights_only=True))
    train(again, resumed, range(5, 10))
    for param, other in zip(params, resumed, strict=True):
        assert torch.equal(param, other)


def test_updates_in_backward_of_a_mixed_optimizer_are_those_of_ordinary_steps():
    plain, hooked = parameters(), parameters()
    ordinary, inside = mixed(plain), mixed(hooked)
    lo.update_in_backward(inside)
    for step in range(6):
        weights = [torch.randn(shape, generator=torch.Generator().manual_seed(step)) for shape in SHAPES]
        for params in (plain, hooked):
            sum((param * weight).sum() for param, weight in zip(params, weights, strict=True)).backward()
        for optimizer in (ordinary, inside):
            optimizer.step()
            optimizer.zero_grad()
    for param, other in zip(plain, hooked, strict=True):
        assert torch.equal(param, other)


def test_a_group_that_is_added_later_may_have_a_rule_of_its_own():
    first, second = parameters()[:2]
    optimizer = lo.GaLoreAdamW([first], rank=4)
    optimizer.add_param_group({"params": [second], "rank": 4, "rule": lo.Lion()})
    assert set(optimizer.state[second]) == {"step", "last_refresh", "basis", "exp_avg"}


def test_schedulers_find_their_options_in_every_group():
    params = parameters()
    optimizer = mixed(params)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)
    train(optimizer, params, range(2))
    scheduler.step()
    assert optimizer.param_groups[1]["betas"][0] != 0.9


# ------------------------------------------------------------------------------------------------------------------ structure


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", 2),
        ("state_bits", 8),
        ("projector", "svd"),
        ("rule", "lion"),
        ("proj_type", "left"),
        ("seed", 3),
        ("layout", "conv"),
    ],
)
def test_a_structural_option_edited_in_a_live_group_raises_before_anything_moves(name: str, value: Any):
    params = parameters()
    optimizer = lo.GaLoreAdamW([{"params": params[:2], "rank": 4}, {"params": params[2:]}], lr=0.1)
    train(optimizer, params, range(2))
    before = [param.detach().clone() for param in params]
    optimizer.param_groups[0][name] = value
    give_gradients(params, 2)
    with pytest.raises(ValueError, match=rf"{name} is .* in param group 0.*optimizer\.change_group\(0, {name}="):
        optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))


def test_live_options_take_effect_on_the_next_step():
    params = parameters()[:1]
    optimizer = lo.GaLoreAdamW(params, rank=4, lr=0.1, update_proj_gap=100)
    train(optimizer, params, range(3))
    optimizer.param_groups[0]["update_proj_gap"] = 2
    train(optimizer, params, range(3, 5))
    assert int(optimizer.state[params[0]]["last_refresh"]) == 4


def test_a_changed_gap_gives_the_same_run_after_a_resume():
    params = parameters()[:3]
    optimizer = lo.GaLoreAdamW(params, rank=4, lr=0.1, update_proj_gap=6)
    train(optimizer, params, range(4))
    optimizer.param_groups[0]["update_proj_gap"] = 3
    saved, resumed = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(params)
    train(optimizer, params, range(4, 12))
    again = lo.GaLoreAdamW(resumed, rank=4, lr=0.1, update_proj_gap=6)
    again.load_state_dict(saved)
    train(again, resumed, range(4, 12))
    assert all(torch.equal(param, other) for param, other in zip(params, resumed, strict=True))


def test_keys_of_others_are_carried_along_and_saved():
    keys = {"rho": 0.05, "wd_mult": 2.0, "moe": True, "is_expert_parallel": False}
    optimizer = lo.GaLoreAdamW([{"params": parameters()[:1], "rank": 4, **keys}], amsgrad=False)
    assert keys.items() <= optimizer.state_dict()["param_groups"][0].items()


@pytest.mark.parametrize("key", ["ranks", "betass", "weigth_decay", "rnk", "scales", "update_proj_gaps"])
def test_a_key_that_is_nearly_an_option_raises(key: str):
    with pytest.raises(TypeError, match=f"unknown option '{key}' in a param group: did you mean"):
        lo.GaLoreAdamW([{"params": parameters()[:1], key: 1}])


@pytest.mark.parametrize("bits", [32, 8])
def test_a_smaller_rank_keeps_the_leading_directions_and_their_moments(bits: int):
    params = [nn.Parameter(torch.randn(160, 96))]
    optimizer = lo.GaLoreAdamW(params, rank=64, lr=0.01, state_bits=bits)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        params[0].grad = torch.randn(160, 96, generator=generator)
        optimizer.step()
    before = optimizer.trained(params[0])
    basis, moment = before.basis().matrix.clone(), before.moments["exp_avg"].clone()
    optimizer.change_group(0, rank=48)
    after = optimizer.trained(params[0])
    assert torch.equal(after.basis().matrix, basis[:, :48])
    assert torch.allclose(after.moments["exp_avg"], moment[:, :48], atol=1e-6 if bits == 32 else 0.02)
    assert int(after.state["step"]) == 3


def test_a_smaller_rank_of_both_sides_keeps_the_leading_block_of_the_moments():
    params = parameters()[:1]
    optimizer = lo.GaLoreAdamW(params, rank=6, lr=0.01, proj_type="full")
    train(optimizer, params, range(3))
    before = {name: tensor.clone() for name, tensor in optimizer.state[params[0]].items()}
    optimizer.change_group(0, rank=4)
    after = optimizer.state[params[0]]
    for name in ("basis", "basis_right"):
        assert torch.equal(after[name], before[name][:, :4])
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.allclose(after[name], before[name][:4, :4], atol=1e-6)
    assert int(after["step"]) == 3


def test_a_larger_rank_keeps_all_directions_and_adds_orthogonal_ones():
    params = parameters()[:1]
    optimizer = lo.GaLoreAdamW(params, rank=4, lr=0.01)
    train(optimizer, params, range(3))
    before = optimizer.trained(params[0])
    basis, moments = (
        before.basis().matrix.clone(),
        {name: before.moments[name].clone() for name in ("exp_avg", "exp_avg_sq")},
    )
    optimizer.change_group(0, rank=10)
    after = optimizer.trained(params[0])
    larger = after.basis().matrix
    assert torch.equal(larger[:, :4], basis)
    assert torch.allclose(larger.mT @ larger, torch.eye(10), atol=1e-5)
    for name, moment in moments.items():
        assert torch.allclose(after.moments[name][:, :4], moment, atol=1e-6)
        assert torch.allclose(after.moments[name][:, 4:], torch.zeros(48, 6), atol=1e-6)


def test_a_rank_that_grows_and_shrinks_resumes_to_the_bit():
    def run(optimizer: lo.LowRankOptimizer, params: list[nn.Parameter], steps: range) -> None:
        for step in steps:
            if step in (3, 6, 9):
                optimizer.change_group(0, rank={3: 8, 6: 3, 9: 12}[step])
            train(optimizer, params, range(step, step + 1))

    params = parameters()[:3]
    optimizer = lo.FiraAdamW(params, rank=4, lr=0.01, update_proj_gap=4)
    run(optimizer, params, range(7))
    saved, resumed = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(params)
    run(optimizer, params, range(7, 12))
    again = lo.FiraAdamW(resumed, rank=3, lr=0.01, update_proj_gap=4)
    again.load_state_dict(saved)
    run(again, resumed, range(7, 12))
    assert all(torch.equal(param, other) for param, other in zip(params, resumed, strict=True))


def test_change_group_checks_before_it_changes():
    params = parameters()[:1]
    optimizer = lo.GaLoreAdamW(params, rank=4)
    train(optimizer, params, range(2))
    state = {name: tensor.clone() for name, tensor in optimizer.state[params[0]].items()}
    for wrong in ({"rank": 0}, {"rule": "lyon"}, {"rnk": 3}, {"projector": "random:gaussian", "residual": "sgd"}):
        with pytest.raises((TypeError, ValueError)):
            optimizer.change_group(0, **wrong)
    assert optimizer.param_groups[0]["rank"] == 4
    assert all(torch.equal(optimizer.state[params[0]][name], tensor) for name, tensor in state.items())


# ------------------------------------------------------------------------------------------------------------------- parts


@dataclass(frozen=True)
class Collides(lo.Adam):
    name: ClassVar[str] = "collides"
    scale: float = 1.0


@dataclass(frozen=True)
class TakesBasis(lo.Lion):
    name: ClassVar[str] = "takes_basis"

    def init(
        self, shape: tuple[int, ...], options: Mapping[str, Any], dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        return {"basis": torch.zeros(shape, dtype=dtype, device=device)}


def test_options_and_state_of_two_parts_must_not_have_one_name():
    params = parameters()[:1]
    with pytest.raises(ValueError, match="'scale' is a field of the rule Collides, and an option of every optimizer"):
        lo.LowRankOptimizer(params, rule=Collides())
    with pytest.raises(ValueError, match="'basis' belongs to the projector, and the rule has one of that name"):
        lo.LowRankOptimizer(params, rule=TakesBasis(), rank=4)


@pytest.mark.parametrize("field", ["lr", "initial_lr", "state_format", "param_names", "rule", "parts"])
def test_keys_of_a_group_and_arguments_of_the_constructor_are_no_fields_of_a_part(field):
    kind = make_dataclass("Field", [(field, float, 0.5)], bases=(lo.Lion,), namespace={"name": "field"}, frozen=True)
    with pytest.raises(ValueError, match=f"'{field}' is a field of the rule Field, and an option of every optimizer"):
        lo.LowRankOptimizer(parameters()[:1], rule=kind())


@dataclass(frozen=True)
class Mine(lo.Lion):
    name: ClassVar[str] = "mine"


def test_a_rule_of_ones_own_is_named_where_it_is_missing():
    params = parameters()[:1]
    optimizer = lo.LowRankOptimizer([{"params": params, "rule": Mine()}], rule="adam")
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"rule is 'mine'.*parts="):
        lo.LowRankOptimizer([{"params": params, "rule": "mine"}], rule="adam")
    with pytest.raises(ValueError, match="rule is 'mine' in the checkpoint, 'adam' here"):
        lo.LowRankOptimizer(params, rule="adam").load_state_dict(saved)
    again = lo.LowRankOptimizer([{"params": params, "rule": "mine"}], rule="adam", parts=[Mine()])
    again.load_state_dict(saved)
    assert again.param_groups[0]["rule"] == "mine"


@dataclass(frozen=True)
class IgnoresMask(lo.Rule):
    """Momentum that looks at no mask."""

    name: ClassVar[str] = "ignores_mask"

    def init(
        self, shape: tuple[int, ...], options: Mapping[str, Any], dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros(shape, dtype=dtype, device=device)}

    def direction(
        self, grad: Tensor, state: Mapping[str, Tensor], options: Mapping[str, Any], context: lo.Context
    ) -> lo.Direction:
        return lo.Direction(state["exp_avg"].mul_(0.9).add_(grad + 1.0).clone())

    def transport(self, state: Mapping[str, Tensor], move: Any, options: Mapping[str, Any], step: float) -> None:
        state["exp_avg"].copy_(move(state["exp_avg"], 1))


@pytest.mark.parametrize("rank", [None, 4])
def test_a_rule_that_ignores_the_mask_changes_nothing_on_a_bad_gradient(rank: int | None):
    params = parameters()[:1]
    optimizer = lo.LowRankOptimizer(params, rule=IgnoresMask(), rank=rank)
    optimizer._mask_on_device = True
    train(optimizer, params, range(2))
    weight, moment = params[0].detach().clone(), optimizer.state[params[0]]["exp_avg"].clone()
    params[0].grad = torch.full_like(params[0], torch.nan)
    optimizer.step()
    assert torch.equal(params[0], weight)
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], moment)


# ------------------------------------------------------------------------------------------------------------------- state


def test_state_is_made_at_need_as_in_torch():
    params = parameters()[:2]
    optimizer = lo.GaLoreAdamW(params, rank=4)
    train(optimizer, params, range(2))
    optimizer.state.clear()
    train(optimizer, params, range(1))
    assert [int(optimizer.state[param]["step"]) for param in params] == [1, 1]
    optimizer.state.pop(params[0])
    train(optimizer, params, range(1))
    assert [int(optimizer.state[param]["step"]) for param in params] == [1, 2]


def test_a_parameter_that_is_unfrozen_gets_its_state_then():
    params = parameters()[:2]
    params[1].requires_grad_(False)
    optimizer = lo.GaLoreAdamW(params, rank=4)
    assert params[1] not in optimizer.state
    params[1].requires_grad_(True)
    train(optimizer, params, range(1))
    assert int(optimizer.state[params[1]]["step"]) == 1


def test_a_checkpoint_in_another_order_continues_the_same_run():
    names = ["a.weight", "b.weight", "c.weight"]
    params = dict(zip(names, parameters()[:3], strict=True))

    def build(params: Mapping[str, nn.Parameter], order: Sequence[str]) -> lo.LowRankOptimizer:
        return lo.APOLLOAdamW([(name, params[name]) for name in order], rank=4, lr=0.01, update_proj_gap=2)

    optimizer = build(params, names)
    train(optimizer, list(params.values()), range(3))
    saved, resumed = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(params)
    train(optimizer, list(params.values()), range(3, 8))
    again = build(resumed, names[::-1])
    again.load_state_dict(saved)
    train(again, list(resumed.values()), range(3, 8))
    assert all(torch.equal(params[name], resumed[name]) for name in names)


# ------------------------------------------------------------------------------------------------------------- joint rules


@dataclass(frozen=True)
class Balanced(lo.JointRule):
    """Momenta divided by their common norm."""

    name: ClassVar[str] = "balanced"
    mu: float = 0.9

    def init_joint(
        self, shapes: Sequence[tuple[int, ...]], options: Mapping[str, Any], dtype: torch.dtype, device: torch.device
    ) -> list[dict[str, Tensor]]:
        return [{"exp_avg": torch.zeros(shape, dtype=dtype, device=device)} for shape in shapes]

    def directions(
        self,
        grads: Sequence[Tensor],
        states: Sequence[Mapping[str, Tensor]],
        options: Mapping[str, Any],
        contexts: Sequence[lo.Context],
    ) -> list[lo.Direction]:
        for grad, state in zip(grads, states, strict=True):
            state["exp_avg"].lerp_(grad, 1.0 - options["mu"])
        size = torch.stack([state["exp_avg"].norm() for state in states]).norm()
        return [lo.Direction(state["exp_avg"] / size) for state in states]


def pairs() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 16), (8, 4)) * 2]


def build_pairs(params: Sequence[nn.Parameter]) -> lo.LowRankOptimizer:
    return lo.LowRankOptimizer([{"params": list(params), "rule": Balanced()}], rule="adam", lr=0.1)


def pair_loss(params: Sequence[nn.Parameter], seed: int) -> Tensor:
    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(seed))
    return sum(((b @ a @ x).square().mean() for a, b in zip(params[::2], params[1::2], strict=True)), torch.zeros(()))


def test_a_joint_rule_sees_both_gradients_of_each_pair():
    params = pairs()
    before = [param.detach().clone() for param in params]
    optimizer = build_pairs(params)
    give_gradients(params, 0)
    optimizer.step()
    for a, b in ((0, 1), (2, 3)):
        grads = [params[i].grad for i in (a, b)]
        size = torch.stack([grad.double().norm() for grad in grads]).norm()
        for i, grad in zip((a, b), grads, strict=True):
            assert torch.allclose(params[i].double(), before[i].double() - 0.1 * grad.double() / size, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_joint_rule_runs_in_backward_when_the_last_gradient_is_there(accumulate: int):
    plain, hooked = pairs(), pairs()
    ordinary, inside = build_pairs(plain), build_pairs(hooked)
    lo.update_in_backward(inside, accumulate=accumulate)
    for step in range(4):
        for part in range(accumulate):
            for params in (plain, hooked):
                (pair_loss(params, 10 * step + part) / accumulate).backward()
        assert all(param.grad is None for param in hooked)
        ordinary.step(), inside.step()
        ordinary.zero_grad(), inside.zero_grad()
    for param, other in zip(plain, hooked, strict=True):
        assert torch.allclose(param, other, atol=1e-6)


def test_pairs_that_cannot_be_are_refused_by_name():
    params = pairs()
    with pytest.raises(ValueError, match="steps 2 parameters at a time, and its group has 3"):
        build_pairs(params[:3])
    with pytest.raises(ValueError, match="can have no rank"):
        lo.LowRankOptimizer([{"params": params, "rule": Balanced(), "rank": 2}], rule="adam")
    params[1].requires_grad_(False)
    with pytest.raises(ValueError, match=r"steps 0\.0, 0\.1 together, but 0\.1 does not require a gradient"):
        build_pairs(params)
    params[1].requires_grad_(True)
    optimizer = build_pairs(params)
    before = [param.detach().clone() for param in params]
    give_gradients(params, 0)
    params[3].grad = None
    with pytest.raises(RuntimeError, match=r"0\.3 got no gradient, so that none of them was changed"):
        optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))


# ------------------------------------------------------------------------------------------------------------------- roles


class Factors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lora_A, self.sparse = nn.Parameter(torch.randn(8, 32)), nn.Parameter(torch.randn(50))
        self.linear = nn.Linear(32, 32)

    def parameter_roles(self) -> dict[str, lo.Role]:
        return {"lora_A": lo.Role("matrix", decay_factor=0.5), "sparse": lo.Role("dense", lr_factor=2.0)}


def test_modules_say_how_their_own_parameters_are_trained():
    model = Factors()
    groups = lo.param_groups(model, rank=4, weight_decay=0.1)
    by_name = {name: group for group in groups for name in group["param_names"]}
    assert by_name["lora_A"]["rank"] == 4
    assert by_name["lora_A"]["decay_factor"] == 0.5
    assert (by_name["sparse"]["rank"], by_name["sparse"]["weight_decay"], by_name["sparse"]["lr_factor"]) == (
        None,
        0.1,
        2.0,
    )
    assert "decay_factor" not in by_name["linear.weight"]


def test_factors_of_learning_rate_and_decay_multiply():
    params = parameters()[2:]
    scaled = copy.deepcopy(params)
    plain = lo.GaLoreAdamW(params, lr=0.02, weight_decay=0.05)
    factors = lo.GaLoreAdamW([{"params": scaled, "lr_factor": 2.0, "decay_factor": 0.5}], lr=0.01, weight_decay=0.1)
    train(plain, params, range(3))
    train(factors, scaled, range(3))
    assert all(torch.equal(param, other) for param, other in zip(params, scaled, strict=True))


def test_overrides_make_groups_of_their_own():
    groups = lo.param_groups(Factors(), rank=4, overrides={"linear": {"lr_factor": 3.0}, "*.bias": {"lr_factor": 1.5}})
    by_name = {name: group for group in groups for name in group["param_names"]}
    assert by_name["linear.weight"]["lr_factor"] == 3.0
    assert by_name["linear.bias"]["lr_factor"] == 1.5
    with pytest.raises(ValueError, match="overrides pattern 'nothing' matches no parameter"):
        lo.param_groups(Factors(), rank=4, overrides={"nothing": {"lr_factor": 3.0}})


# --------------------------------------------------------------------------------------------------------------- the example


def test_the_example_with_a_rank_schedule_resumes_to_the_same_losses(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any
):
    path = Path(__file__).parents[2] / "examples/rank_schedule.py"
    monkeypatch.setattr("sys.argv", [str(path), "--ranks", "0:8,20:24,40:4", "--steps", "60"])
    runpy.run_path(str(path), run_name="__main__")
    out = capsys.readouterr().out
    losses = [float(line.split("loss ")[1]) for line in out.splitlines() if "loss " in line]
    assert "resumed at step 30: the same losses" in out
    assert losses[-1] < 0.6 * losses[0]


def test_describe_shows_the_parts_of_each_group_and_knows_projectors_of_ones_own():
    @dataclass(frozen=True)
    class MySVD(lo.SVD):
        @property
        def name(self) -> str:
            return "mine"

    params = parameters()
    optimizer = lo.LowRankOptimizer(
        [
            {"params": params[:1], "rank": 4, "projector": MySVD(), "rule": "lion", "residual": "sgd"},
            {"params": params[1:], "rank": 8},
        ],
        rule="adam",
    )
    lines = lo.describe(optimizer).splitlines()
    assert lines[0].startswith("group 0: low-rank, rule lion, residual sgd, rank 4")
    assert "projector mine" in lo.describe(optimizer)
    assert any(line.startswith("group 1: low-rank, rule adam, residual none, rank 8") for line in lines)
