"""Every kind of bad input gets an error that says what came and what is needed, before anything changes."""

import logging
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import lowrank_optim as lo
from lowrank_optim.groups.options import CARRIED


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape or (12, 8)).to(dtype))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"rank": -3}, "rank is -3"),
        ({"rank": 1.5}, r"rank is 1.5; a float is a fraction of the short side and must be in \(0, 1\]"),
        ({"rank": 0.0}, r"rank is 0.0.*\(0, 1\]"),
        ({"rank": "8"}, "rank is '8'"),
        ({"rank": True}, "rank is True"),
        ({"update_proj_gap": 0}, "update_proj_gap is 0; it must be an int of at least 1"),
        ({"update_proj_gap": 2.5}, "update_proj_gap is 2.5"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\); it must be two numbers in \[0, 1\)"),
        ({"betas": (-0.1, 0.9)}, r"betas is \(-0.1, 0.9\)"),
        ({"lr": -1.0}, "lr is -1.0; it must be a number of at least 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"eps": -1e-8}, "eps is -1e-08; it must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"scale": float("inf")}, "scale is inf; it must be a finite number"),
        ({"seed": 1.5}, "seed is 1.5; it must be an int"),
        (
            {"proj_type": "middle"},
            "proj_type is 'middle'; valid values are 'std', 'reverse_std', 'left', 'right', 'full'",
        ),
        ({"on_refresh": "drop"}, "on_refresh is 'drop'; valid values are 'keep', 'reset', 'rotate'"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite is 'ignore'"),
        ({"layout": "odd"}, "layout is 'odd'"),
        ({"stagger": 1}, "stagger is 1; it must be True or False"),
        ({"state_bits": 12}, "state_bits is 12; valid values are 32, 16, 8, 4"),
        ({"basis_bits": 5}, "basis_bits is 5; valid values are 32, 16, 8, 4"),
        ({"projector": "randomised_svd"}, "did you mean 'randomized_svd'"),
        (
            {"projector": "coordinate", "proj_type": "full"},
            'proj_type is "full", which a coordinate projector cannot do',
        ),
        ({"differentiable": True}, "differentiable is True.*torch.optim.AdamW"),
    ],
)
def test_values_out_of_range_raise_with_name_value_and_range(options, message):
    with pytest.raises(ValueError, match=message):
        lo.GaLoreAdamW([weight()], **options)
    # The same holds for the same keys in a group, and an optimizer that refuses a group stays as it was.
    if "projector" not in options:
        optimizer = lo.GaLoreAdamW([weight()], rank=4)
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [weight()], **options})
        assert len(optimizer.param_groups) == len(optimizer.state) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta1": 1.0}, "beta1 is 1.0"),
        ({"eps": 1e-8}, "eps is 1e-08; Adafactor needs two numbers"),
        ({"clip_threshold": 0.0}, "clip_threshold is 0.0"),
        ({"decay_rate": 0.8}, "decay_rate is 0.8; it must be at most 0"),
        ({"lr": 1e-3, "relative_step": True}, "give lr=None for relative steps"),
        ({"relative_step": False}, "lr is None and relative_step is False"),
        ({"lr": 1e-3, "warmup_init": True}, "warmup_init is True, which needs relative_step=True"),
    ],
)
def test_adafactor_values_out_of_range_raise(options, message):
    with pytest.raises(ValueError, match=message):
        lo.GaLoreAdafactor([weight()], **options)


def test_an_unknown_option_names_the_nearest_valid_one():
    with pytest.raises(
        TypeError, match=r"unknown option 'update_gap' in GaLoreAdamW\(…\): did you mean 'update_proj_gap'"
    ):
        lo.GaLoreAdamW([weight()], update_gap=10)


def test_an_unknown_group_key_names_the_nearest_valid_one():
    with pytest.raises(TypeError, match=r"unknown option 'weigth_decay' in a param group: did you mean 'weight_decay'"):
        lo.GaLoreAdamW([{"params": [weight()], "weigth_decay": 0.1}])


def slips(name: str) -> set[str]:
    """Every name with a letter left out, doubled or replaced, or two neighbours exchanged, but for the names of others."""
    cuts = [(name[:i], name[i:]) for i in range(len(name) + 1)]
    found = {a + b[1:] for a, b in cuts} | {a + letter + b for a, b in cuts for letter in "xs_"}
    found |= {a + "x" + b[1:] for a, b in cuts if b} | {a + b[1::-1] + b[2:] for a, b in cuts}
    return found - CARRIED - {name, ""}


OPTIONS = (*lo.GaLoreAdamW([weight()]).defaults, "coordinates", "blocks", "limiter", "residual_lr_scale")


@pytest.mark.parametrize("option", OPTIONS)
def test_a_group_key_one_letter_off_from_an_option_is_refused(option):
    residual = "norm_scaled" if option == "limiter" else "sgd"
    parameter = weight()
    optimizer = lo.GaLoreAdamW([{"params": [weight()], "rank": 4}])
    near = {name for name in OPTIONS if name == option or slips(name) & slips(option)}
    for slip in sorted(slips(option) - set(OPTIONS)):
        with pytest.raises(TypeError, match=f"unknown option {slip!r} in a param group: did you mean ") as raised:
            optimizer.add_param_group({"params": [parameter], "rank": 4, "residual": residual, slip: 4})
        assert str(raised.value).partition("did you mean '")[2].partition("'")[0] in near
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("option", ["rank", "lr", "eps", "seed"])
def test_an_argument_one_letter_off_from_an_option_names_it(option):
    for slip in sorted(slips(option) - set(OPTIONS)):
        for call in (lo.GaLoreAdamW, lo.GaLoreAdamW([weight()]).change_group):
            with pytest.raises(TypeError, match=f"unknown option {slip!r} in .*: did you mean '{option}'"):
                call([weight()] if call is lo.GaLoreAdamW else 0, **{slip: 4})
    with pytest.raises(TypeError, match="unknown option 'rnak'; did you mean 'rank'"):
        lo.param_groups(torch.nn.Linear(8, 8), rank=4, rnak=8)


FOREIGN = (
    "param_names",
    "initial_lr",
    "max_lr",
    "min_lr",
    "swa_lr",
    "base_momentum",
    "max_momentum",
    "lr_scale",
    "name",
)
FOREIGN += (
    "group_name",
    "fused",
    "rho",
    "moe",
    "wd_mult",
    "lr_mult",
    "is_expert_parallel",
    "weight_sum",
    "train_mode",
    "d_coef",
)


def test_keys_of_schedulers_and_frameworks_are_no_slips():
    for key in FOREIGN:
        value = ["w"] if key == "param_names" else 0.5
        optimizer = lo.GaLoreAdamW([{"params": [weight()], "rank": 4, key: value}])
        assert optimizer.param_groups[0][key] == value


def test_keys_of_torch_schedulers_and_trainers_are_carried_along():
    keys = {"fused": True, "foreach": None, "capturable": False, "initial_lr": 0.1, "name": "decay"}
    optimizer = lo.GaLoreAdamW([{"params": [weight()], "rank": 4, **keys}])
    assert {key: optimizer.param_groups[0][key] for key in keys} == keys
    assert lo.GaLoreAdamW([weight()], fused=True).param_groups[0]["fused"] is True


def test_two_projectors_of_one_name_are_refused():
    @dataclass(frozen=True)
    class One(lo.SVD):
        name = "one"

    @dataclass(frozen=True)
    class Other(lo.SVD):
        name = "one"

    with pytest.raises(ValueError, match=r"projector 'one' is .*One\(.*already, and .*Other.* has the same name"):
        lo.GaLoreAdamW([{"params": [weight()], "rank": 4, "projector": Other()}], projector=One())


@pytest.mark.parametrize("kind", ["rule", "projector", "residual"])
def test_a_part_with_the_name_of_one_of_the_package_is_refused(kind):
    @dataclass(frozen=True)
    class Rule(lo.MomentumRule):
        name = "adam"

        def direction(self, grad, state, options, context):
            return lo.Direction(grad)

    @dataclass(frozen=True)
    class Projector(lo.SVD):
        pass

    @dataclass(frozen=True)
    class Residual(lo.NoResidual):
        name = "sgd"

    part = {"rule": Rule, "projector": Projector, "residual": Residual}[kind]()
    match = f"{kind} '{part.name}' of {type(part).__name__} has the name of .*, a part of the package.*another name"
    for options in ({kind: part}, {"parts": [part]}):
        with pytest.raises(ValueError, match=match):
            lo.LowRankOptimizer([weight()], **{"rule": "adam", **options})
    optimizer = lo.GaLoreAdamW([weight()])
    with pytest.raises(ValueError, match=match):
        optimizer.add_param_group({"params": [weight()], kind: part})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(("kind", "part"), [("rule", lo.Lion), ("projector", lo.SVD), ("residual", lo.NoResidual)])
def test_a_class_in_place_of_a_part_is_refused(kind, part):
    match = rf"is the class {part.__name__}; pass an object: {part.__name__}\(\)"
    with pytest.raises(TypeError, match=match):
        lo.LowRankOptimizer([weight()], **{"rule": "adam", kind: part})
    with pytest.raises(TypeError, match=match):
        lo.LowRankOptimizer([{"params": [weight()], kind: part}], rule="adam")
    with pytest.raises(TypeError, match=match):
        lo.LowRankOptimizer([weight()], rule="adam", parts=[part])


def test_a_part_that_is_no_dataclass_or_has_no_name_is_refused():
    class Undecorated(lo.MomentumRule):
        name = "undecorated"
        heavy: float = 0.9

        def direction(self, grad, state, options, context):
            return lo.Direction(grad)

    @dataclass(frozen=True)
    class Nameless(Undecorated):
        name = None

    class Forgotten(lo.Lion):
        name = "forgotten"
        heavy: float = 0.9

    for kind in (Undecorated, Forgotten):
        with pytest.raises(TypeError, match=rf"{kind.__name__} is no dataclass: write @dataclass\(frozen=True\) above"):
            lo.LowRankOptimizer([weight()], rule=kind())
    with pytest.raises(TypeError, match='Nameless has no name: write name = "…", without a type'):
        lo.LowRankOptimizer([weight()], rule=Nameless())


# ------------------------------------------------------------------------------------------------------------- live groups


@pytest.mark.parametrize(
    ("key", "value", "error", "match"),
    [
        ("bets", (0.9, 0.99), TypeError, "unknown option 'bets' in a param group: did you mean 'betas'"),
        ("betas", (0.9, 2.0), ValueError, r"betas is \(0.9, 2.0\); it must be .* Param group 0 was edited"),
        ("update_proj_gap", 0, ValueError, "update_proj_gap is 0; it must be an int of at least 1"),
        ("lr", 1e39, ValueError, "lr is 1e.39 in param group 0; it must be a number from 0 to 3e.38"),
        ("lr", -1.0, ValueError, "lr is -1.0 in param group 0"),
    ],
)
def test_a_live_group_is_checked_again_when_it_was_edited(key, value, error, match):
    param = weight()
    optimizer = lo.GaLoreAdamW([param], rank=2)
    param.grad = torch.ones_like(param)
    optimizer.step()
    kept, before = optimizer.param_groups[0].get(key), param.detach().clone()
    optimizer.param_groups[0][key] = value
    for _ in range(2):
        with pytest.raises(error, match=match):
            optimizer.step()
    assert torch.equal(param, before)
    if kept is None:
        del optimizer.param_groups[0][key]
    else:
        optimizer.param_groups[0][key] = kept
    optimizer.step()
    assert not torch.equal(param, before)


def test_a_live_group_takes_other_values_lists_changed_in_place_and_keys_of_others():
    param = weight()
    optimizer = lo.GaLoreAdamW([param], rank=2)
    (group,) = optimizer.param_groups
    group.update(betas=[0.5, 0.9], scale=2.0, of_somebody_else=1)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert group["of_somebody_else"] == 1
    group["betas"][1] = 2.0
    with pytest.raises(ValueError, match=r"betas is \[0.5, 2.0\]"):
        optimizer.step()


def test_a_learning_rate_that_no_float_holds_is_refused():
    with pytest.raises(ValueError, match=r"lr is 1e.39; it must be at most 3e.38"):
        lo.GaLoreAdamW([weight()], lr=1e39)


def test_a_group_that_nobody_edits_is_compared_once_and_not_checked(monkeypatch):
    from lowrank_optim.groups import live

    param = weight()
    optimizer = lo.GaLoreAdamW([param], rank=2)
    monkeypatch.setattr(live, "check_group", lambda *_: pytest.fail("a check in the hot path"))
    monkeypatch.setattr(live, "check_structure", lambda *_: pytest.fail("a check in the hot path"))
    for step in range(3):
        param.grad = torch.ones_like(param)
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimizer.step()


def test_a_complex_parameter_is_named():
    params = [("layer.weight", nn.Parameter(torch.randn(6, 4, dtype=torch.complex64)))]
    with pytest.raises(ValueError, match=r"parameter layer.weight \(6, 4\) is torch.complex64.*view_as_real"):
        lo.GaLoreAdamW(params, rank=2)


def test_frozen_parameters_have_no_state_and_may_be_integers():
    codes, frozen = (
        nn.Parameter(torch.ones(64, 32, dtype=torch.uint8), requires_grad=False),
        weight().requires_grad_(False),
    )
    optimizer = lo.GaLoreAdamW([codes, frozen, weight()], rank=4)
    assert len(optimizer.state) == 1


def test_stochastic_rounding_of_float16_is_refused():
    with pytest.raises(ValueError, match="float16; stochastic rounding is for bfloat16"):
        lo.GaLoreAdamW([weight(dtype=torch.float16)], stochastic_rounding=True)


def test_a_sparse_gradient_is_named_and_nothing_changes():
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = lo.GaLoreAdamW([("emb.weight", embedding.weight)])
    before = embedding.weight.detach().clone()
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"gradient of emb.weight is sparse.*SparseAdam"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)
    assert optimizer.state[embedding.weight]["step"] == 0


def test_the_same_parameter_in_two_groups_is_refused_and_the_first_group_stays():
    param = weight()
    optimizer = lo.GaLoreAdamW([param], rank=4)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [param]})
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert len(optimizer.param_groups) == 1
    assert optimizer.state[param]["exp_avg"].shape == (12, 4)


def test_rank_above_the_short_side_trains_densely_and_is_logged_once(caplog):
    ours, theirs = [weight(6, 20), weight(5, 9)], []
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    with caplog.at_level(logging.INFO, logger="lowrank_optim"):
        optimizer = lo.GaLoreAdamW(ours, rank=8, lr=1e-2)
    assert [record.getMessage() for record in caplog.records] == [
        "0.0 (6, 20) is trained densely: its short side is below rank 8",
        "rank is 8, and the short sides of the 2 matrices in group 0 have 6 elements at most: all are trained densely; take a "
        "smaller rank, or a fraction of the short side (rank=0.25)",
    ]
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    optimizer.plans.renew(optimizer.param_groups)  # as where somebody has sorted the groups
    assert len(caplog.records) == 2
    caplog.clear()
    lo.GaLoreAdamW([weight(6, 20), weight(12, 9)], rank=8)  # one is low-rank
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    reference = torch.optim.AdamW(theirs, lr=1e-2)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_parameter_without_gradient_is_skipped_and_its_state_untouched():
    used, unused = weight(), weight()
    optimizer = lo.GaLoreAdamW([used, unused], rank=4)
    before = unused.detach().clone()
    used.grad = torch.ones_like(used)
    optimizer.step()
    assert torch.equal(unused, before)
    assert optimizer.state[unused]["step"] == 0
    assert optimizer.state[unused]["last_refresh"] == -1
    assert optimizer.state[used]["step"] == 1


def test_an_unknown_method_name_lists_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'galore'"):
        lo.by_name("galor")


def test_parameters_before_one_that_raises_are_updated_and_count_it():
    """Dense parameters are updated together at the end of a step, whatever stops it."""
    first, second = (nn.Parameter(torch.ones(8, 8)) for _ in range(2))
    optimizer = lo.GaLoreAdamW([first, second], lr=0.1, weight_decay=0.0, on_nonfinite="raise")
    first.grad, second.grad = torch.ones(8, 8), torch.full((8, 8), torch.nan)
    with pytest.raises(RuntimeError, match=r"the gradient of 0\.1"):
        optimizer.step()
    assert torch.allclose(first, torch.full((8, 8), 0.9))
    assert torch.equal(second, torch.ones(8, 8))
    assert [float(optimizer.state[p]["step"]) for p in (first, second)] == [1.0, 0.0]
