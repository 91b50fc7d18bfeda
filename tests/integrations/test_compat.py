"""`compat.install()`: flags of the Trainer and imports that name galore_torch or apollo_torch reach this package."""

import functools
import importlib.util
import sys
from types import ModuleType

import pytest
import torch
import transformers.trainer
from transformers import Trainer
from transformers.utils import import_utils

import lowrank_optim as lo
from lowrank_optim.integrations import compat
from lowrank_optim.integrations.transformers import InBackward
from tests.integrations.test_transformers_integration import (
    STEPS,
    Tokens,
    arguments,
    assert_same_weights,
    llama,
    logged,
    trainer_with_factory,
)

pytestmark = pytest.mark.long

NAMES = ("galore_torch", "apollo_torch")


@pytest.fixture
def fresh(monkeypatch):
    """A process in which nothing has imported the two packages; put back as it was, also after a test that failed."""
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(Trainer.get_optimizer_cls_and_kwargs))
    yield
    for name in NAMES:
        sys.modules.pop(name, None)
    for name in NAMES:
        getattr(import_utils, f"is_{name}_available").cache_clear()


@pytest.fixture
def installed(fresh):
    compat.install()


def with_flags(out, optim: str, *, data=None, callbacks=(), **changes) -> Trainer:
    return Trainer(
        model=llama(),
        args=arguments(out, optim=optim, **changes),
        train_dataset=data or Tokens(),
        callbacks=list(callbacks),
    )


# The Trainer's flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optim", "kind", "scale"),
    [
        ("galore_adamw", lo.GaLoreAdamW, 0.25),
        ("galore_adamw_8bit", lo.GaLoreAdamW8bit, 0.25),
        ("apollo_adamw", lo.APOLLOAdamW, 1.0),
    ],
)
def test_a_flag_makes_our_optimizer_with_defaults_of_transformers_and_the_settings_of_its_arguments(
    optim, kind, scale, installed, tmp_path
):
    optimizer = with_flags(tmp_path, optim, optim_target_modules=["attn", "mlp"]).create_optimizer()
    assert type(optimizer) is kind
    low, dense, no_decay = optimizer.param_groups
    assert (low["rank"], low["update_proj_gap"], low["scale"], low["proj_type"]) == (128, 200, scale, "std")
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (5e-3, (0.8, 0.95), 1e-6)
    assert len(low["params"]) == 14
    assert dense["param_names"] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert all("norm" in name for name in no_decay["param_names"])


def test_adafactor_does_not_scale_by_the_weights_as_transformers_has_it(installed, tmp_path):
    with pytest.warns(UserWarning, match="does not use TrainingArguments.adam_beta1"):
        optimizer = with_flags(tmp_path, "galore_adafactor").create_optimizer()
    assert type(optimizer) is lo.GaLoreAdafactor
    assert [(g["lr"], g["scale_parameter"]) for g in optimizer.param_groups] == [(5e-3, False)] * 3


def test_optim_args_and_target_modules_arrive(installed, tmp_path):
    given = "rank=8, update_proj_gap=5,scale=0.5,proj_type=right,projector=svd,on_refresh=rotate,state_bits=16"
    trainer = with_flags(tmp_path, "galore_adamw", optim_args=given, optim_target_modules=r".*\.self_attn\.\w_proj")
    low = trainer.create_optimizer().param_groups[0]
    expected = {"rank": 8, "update_proj_gap": 5, "scale": 0.5, "proj_type": "right", "projector": "svd"}
    assert {name: low[name] for name in expected} == expected
    assert (low["on_refresh"], low["state_bits"]) == ("rotate", 16)
    assert len(low["params"]) == 8
    assert trainer.args.optim_args == given  # of the user, and not changed


def test_apollos_own_words_arrive(installed, tmp_path):
    flags = {"optim_args": "rank=4,proj=svd,scale_type=tensor,scale=128,scale_front=True"}
    low = with_flags(tmp_path, "apollo_adamw", **flags).create_optimizer().param_groups[0]
    assert (low["projector"], low["scale_type"], low["scale"]) == ("svd", "tensor", 128)
    with pytest.raises(ValueError, match="proj is 'hadamard'; valid values are 'random', 'svd'"):
        with_flags(tmp_path, "apollo_adamw", optim_args="proj=hadamard").create_optimizer()


def test_a_run_by_flags_is_the_run_by_the_factory(installed, tmp_path):
    flags = with_flags(tmp_path / "flags", "galore_adamw", optim_args="rank=8,update_proj_gap=2")
    factory = trainer_with_factory(tmp_path / "factory")
    for trainer in (flags, factory):
        trainer.train()
    assert_same_weights(flags.model, factory.model)
    assert logged(flags, "loss") == logged(factory, "loss")


def test_layerwise_updates_in_backward_with_accumulation_and_clipping(installed, tmp_path):
    changes = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.3, "optim_args": "rank=8,update_proj_gap=2"}
    flags = with_flags(tmp_path / "flags", "galore_adamw_layerwise", **changes)
    flags.train()
    assert flags.state.global_step == STEPS
    factory = trainer_with_factory(tmp_path / "factory", **{**changes, "optim_args": None})
    factory.add_callback(InBackward())
    factory.train()
    assert_same_weights(flags.model, factory.model)
    # One callback, also where the user has given it.
    both = with_flags(tmp_path / "both", "galore_adamw_layerwise", callbacks=[InBackward()])
    both.create_optimizer()
    assert sum(isinstance(each, InBackward) for each in both.callback_handler.callbacks) == 1


def test_other_values_of_optim_are_the_trainers_own(installed, tmp_path):
    assert type(with_flags(tmp_path, "adamw_torch").create_optimizer()) is torch.optim.AdamW


@pytest.mark.parametrize(
    ("optim_args", "error", "message"),
    [
        ("rank", ValueError, r"'rank' is not \"name=value\"; write"),
        ("method=fira", ValueError, "optim_args has method, which optim='galore_adamw' says already; for other"),
        ("update_gap=3", TypeError, "did you mean 'update_proj_gap'"),
        ("rank=zwölf", ValueError, "rank is 'zwölf'; it must be an int"),
    ],
)
def test_wrong_optim_args_say_what_to_do(optim_args, error, message, installed, tmp_path):
    with pytest.raises(error, match=message):
        with_flags(tmp_path, "galore_adamw", optim_args=optim_args).create_optimizer()


def test_layerwise_outside_of_a_trainer_says_what_to_do(installed, tmp_path):
    factory, options = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim="galore_adamw_layerwise"), None)
    with pytest.raises(RuntimeError, match=r"lowrank_optim.update_in_backward\(optimizer\)"):
        factory()(llama(), **options)


# The modules --------------------------------------------------------------------------------------------------------------------


def matrices_and_vectors() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    parameters = list(llama().parameters())
    return [p for p in parameters if p.dim() == 2], [p for p in parameters if p.dim() == 1]


def test_imports_find_our_classes_and_find_spec_finds_the_modules(installed):
    from apollo_torch import APOLLOAdamW
    from galore_torch import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit

    ours = {GaLoreAdamW: lo.GaLoreAdamW, GaLoreAdamW8bit: lo.GaLoreAdamW8bit, GaLoreAdafactor: lo.GaLoreAdafactor}
    for name, public in {**ours, APOLLOAdamW: lo.APOLLOAdamW}.items():
        assert issubclass(name, public)
    for name in NAMES:
        assert importlib.util.find_spec(name).origin == "lowrank_optim.integrations.compat"
    assert import_utils.is_galore_torch_available()


def test_the_groups_and_arguments_of_llama_factory_are_taken_and_defaults_are_those_of_the_packages(installed):
    import apollo_torch
    import galore_torch

    matrices, vectors = matrices_and_vectors()
    low = {"rank": 8, "update_proj_gap": 10, "scale": 0.25, "proj_type": "std"}
    groups = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.2, **low}]
    adamw = {"lr": 1e-3, "betas": (0.8, 0.9), "eps": 1e-7}
    optimizer = galore_torch.GaLoreAdamW(groups, **adamw)
    assert [(g["weight_decay"], g["rank"], g["betas"]) for g in optimizer.param_groups] == [
        (0.0, None, (0.8, 0.9)),
        (0.2, 8, (0.8, 0.9)),
    ]
    eight = galore_torch.GaLoreAdamW8bit(groups, **adamw, optim_bits=8, is_paged=False)
    assert eight.param_groups[1]["state_bits"] == 8
    adafactor = galore_torch.GaLoreAdafactor(groups, lr=1e-3, scale_parameter=False, relative_step=False)
    assert adafactor.param_groups[1]["lr"] == 1e-3
    words = {"proj": "random", "scale_type": "tensor", "scale_front": True}
    mine = [groups[0], {**groups[1], **words}]
    apollo = apollo_torch.APOLLOAdamW(mine, disable_nl=True)
    assert [(g["eps"], g["limiter"]) for g in apollo.param_groups] == [(1e-6, None)] * 2
    assert (apollo.param_groups[1]["scale_type"], apollo.param_groups[1]["projector"]) == ("tensor", "random:gaussian")
    assert "proj" in mine[1]  # of the user, and not changed
    plain = galore_torch.GaLoreAdamW(matrices)
    assert (plain.defaults["eps"], plain.defaults["weight_decay"]) == (1e-6, 0.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"is_paged": True}, 'is_paged is True; .* only False. Leave it out .*without "paged"'),
        ({"percentile_clipping": 5}, "percentile_clipping is 5"),
    ],
)
def test_arguments_without_a_counterpart_raise(changed, message, installed):
    from galore_torch import GaLoreAdamW8bit

    with pytest.raises(ValueError, match=message):
        GaLoreAdamW8bit(matrices_and_vectors()[0], **changed)


# Installing ---------------------------------------------------------------------------------------------------------------------


def state_of_the_process() -> tuple:
    return Trainer.get_optimizer_cls_and_kwargs, *(sys.modules.get(name) for name in NAMES)


def test_uninstall_restores_what_was_there(fresh):
    before = state_of_the_process()
    compat.install()
    assert state_of_the_process() != before
    compat.uninstall()
    assert state_of_the_process() == before
    with pytest.raises(RuntimeError, match=r"is not installed; call install\(\) first"):
        compat.uninstall()
    compat.install()  # and again
    compat.uninstall()
    assert state_of_the_process() == before


def test_a_second_install_says_so_and_changes_nothing(installed):
    before = state_of_the_process()
    with pytest.raises(RuntimeError, match=r"is installed already; one call of install\(\) is enough, and uninstall"):
        compat.install()
    assert state_of_the_process() == before


@pytest.mark.parametrize("name", NAMES)
def test_a_package_that_was_imported_before_is_named_and_nothing_changes(name, fresh):
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__file__ = "/site-packages/there.py"
    before = state_of_the_process()
    with pytest.raises(RuntimeError, match=rf"{name} is imported already \(from /site.*at the top of the script"):
        compat.install()
    assert state_of_the_process() == before


def test_a_trainer_without_factories_is_told_and_can_be_left_alone(fresh, monkeypatch):
    before = state_of_the_process()
    monkeypatch.delattr(transformers.trainer, "is_optimizer_factory")
    with pytest.raises(
        RuntimeError, match=r"knows no optimizer factories \(5.2 and newer do\).*install\(trainer=False\)"
    ):
        compat.install()
    assert state_of_the_process() == before
    compat.install(trainer=False)
    assert Trainer.get_optimizer_cls_and_kwargs is before[0]
    from galore_torch import GaLoreAdamW

    assert issubclass(GaLoreAdamW, lo.GaLoreAdamW)
    compat.uninstall()
    assert state_of_the_process() == before


def test_what_another_package_put_over_ours_is_to_be_taken_out_first(installed):
    ours = Trainer.get_optimizer_cls_and_kwargs
    theirs = functools.wraps(ours)(lambda args, model=None: ours(args, model))
    Trainer.get_optimizer_cls_and_kwargs = staticmethod(theirs)
    with pytest.raises(RuntimeError, match=r"was replaced after install\(\), by .*undo that first"):
        compat.uninstall()
    Trainer.get_optimizer_cls_and_kwargs = staticmethod(ours)
    other = sys.modules["galore_torch"]
    sys.modules["galore_torch"] = ModuleType("galore_torch")
    with pytest.raises(RuntimeError, match=r"galore_torch in sys.modules was replaced after install\(\)"):
        compat.uninstall()
    sys.modules["galore_torch"] = other
    compat.uninstall()
