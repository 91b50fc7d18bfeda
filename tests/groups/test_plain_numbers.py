"""Options that come as numbers of numpy, as 0-d arrays or as 0-d tensors become Python's own numbers when they enter a group."""

import subprocess
import sys
from enum import Enum, IntEnum
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo


class Bits(IntEnum):
    EIGHT = 8


class Kind(str, Enum):
    SVD = "svd"


def numpy_scalar(value: Any) -> Any:
    kinds = {bool: np.bool_, int: np.int64, float: np.float64, str: np.str_}
    if isinstance(value, tuple):
        return tuple(map(numpy_scalar, value))
    return kinds[type(value)](value) if type(value) in kinds else value


def zero_dim(make: Any) -> Any:
    def convert(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(convert, value))
        return make(value) if type(value) in (bool, int, float) else value

    return convert


def tensor(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)


FORMS = {"scalars": numpy_scalar, "arrays": zero_dim(np.array), "tensors": zero_dim(tensor)}

OPTIONS: dict[str, dict[str, Any]] = {
    "galore": {
        "rank": 8,
        "betas": (0.8, 0.95),
        "eps": 1e-6,
        "scale": 0.5,
        "update_proj_gap": 3,
        "seed": 5,
        "stagger": False,
        "maximize": True,
        "proj_type": "left",
    },
    "galore_8bit": {"rank": 8, "overlap_threshold": 0.5, "queue_size": 3, "gap_factor": 1.5},
    "galore_adafactor": {"rank": 8, "beta1": 0.9, "eps": (1e-30, 1e-3), "clip_threshold": 0.7, "decay_rate": -0.7},
    "frugal": {"density": 0.25, "residual_lr_scale": 0.3, "coordinates": "rows", "state_bits": 8},
    "frugal_sgd": {"density": 0.25, "momentum": 0.9, "nesterov": True},
    "fira": {"rank": 0.25, "limiter": 1.02, "match_reference": True},
    "apollo": {"rank": 8, "scale_type": "tensor", "limiter": 1.02, "basis_bits": 32},
    "ldadam": {"rank": 8, "rho": 0.7, "error_feedback": True},
    "qgalore": {"rank": 8, "basis_bits": 4},
    "subtrack": {"rank": 8, "step_size": 0.5, "limiter": 1.02},
    "conda": {"rank": 1.0, "betas": (0.8, 0.95), "scale": 0.5},
    "alice": {"rank": 8, "betas": (0.7, 0.9), "complement_scale": 0.5, "limiter": 1.02},
}


UNSHARDED = ("lr", "rho", "error_feedback", "coordinates", "nesterov", "match_reference")
"""Options that decide, in the constructor, what the method is."""


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((96, 64), (48, 80), (16,))]


def steps(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], count: int = 3) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def is_plain(value: Any, *, lr: bool = False) -> bool:
    if type(value) in (tuple, list):
        return all(map(is_plain, value))
    return type(value) in (bool, int, float, str, type(None)) or (lr and isinstance(value, Tensor))


def assert_plain(optimizer: torch.optim.Optimizer) -> None:
    for options in (optimizer.defaults, *optimizer.param_groups):
        for name, value in options.items():
            assert name == "params" or is_plain(value, lr=name == "lr"), (name, value)


def through_file(optimizer: torch.optim.Optimizer, folder: Path) -> dict[str, Any]:
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return torch.load(folder / "optimizer.pt", weights_only=True)


@pytest.mark.parametrize("where", ["constructor", "group"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPTIONS)
def test_numbers_of_other_types_become_pythons_and_train_alike(name, form, where, tmp_path):
    convert, plain = FORMS[form], {"lr": 0.01, "weight_decay": 0.1, **OPTIONS[name]}
    given = {key: convert(value) for key, value in plain.items()}
    ours, theirs = weights(), weights()
    expected = lo.by_name(name)(theirs, **plain)
    if where == "constructor":
        optimizer = lo.by_name(name)(ours, **given)
    else:
        whole = {key: given.pop(key) for key in UNSHARDED if key in given}
        optimizer = lo.by_name(name)([{"params": ours[:1], **given}], **whole)
        optimizer.add_param_group({"params": ours[1:], **given})
    assert_plain(optimizer)
    if where == "constructor":
        assert {key: optimizer.param_groups[0][key] for key in plain if key in optimizer.defaults} == {
            key: expected.param_groups[0][key] for key in plain if key in optimizer.defaults
        }
    if where == "group":  # random numbers go by position, so that these are the same
        expected = lo.by_name(name)([{"params": theirs[:1]}, {"params": theirs[1:]}], **plain)
    steps(optimizer, ours)
    steps(expected, theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(ours[0], weights()[0])
    resumed = lo.by_name(name)(weights(), **plain)
    saved = through_file(optimizer, tmp_path)
    if where == "constructor":
        resumed.load_state_dict(saved)
        assert_plain(resumed)


def test_fields_of_rules_and_residuals_become_pythons_numbers(tmp_path):
    rule = lo.Adam(betas=(np.float64(0.8), np.float32(0.5)), eps=np.float64(1e-6))
    optimizer = lo.LowRankOptimizer(weights(), rule=rule, residual=lo.SGDResidual(np.float64(0.5)), rank=np.int32(4))
    assert_plain(optimizer)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.5)
    assert optimizer.param_groups[0]["residual_lr_scale"] == 0.5
    through_file(optimizer, tmp_path)


@pytest.mark.parametrize("form", [numpy_scalar, np.array, tensor])
def test_fields_of_projectors_become_pythons_numbers(form, tmp_path):
    plain = [lo.RandomizedSVD(4, 2, 1), lo.PowerIteration(0.75)]
    given = [lo.RandomizedSVD(form(4), form(2), form(1)), lo.PowerIteration(form(0.75))]
    assert [projector.name for projector in given] == ["randomized_svd:4,2,1", "power_iteration:0.75"]
    assert given == plain
    optimizer = lo.GaLoreAdamW(weights(), rank=8, projector=given[1])
    fresh = lo.GaLoreAdamW(weights(), rank=8, projector=plain[1])
    fresh.load_state_dict(through_file(optimizer, tmp_path))


def test_other_kinds_of_numbers_become_pythons(tmp_path):
    optimizer = lo.GaLoreAdamW(
        weights(), rank=8, lr=Fraction(1, 4), scale=np.float16(0.5), state_bits=Bits.EIGHT, projector=Kind.SVD
    )
    assert_plain(optimizer)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["scale"], group["state_bits"], group["projector"]) == (0.25, 0.5, 8, "svd")
    through_file(optimizer, tmp_path)


def test_groups_of_a_model_have_pythons_numbers():
    model = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32)) for _ in range(3)])
    options = {"scale": np.float64(0.25), "update_proj_gap": np.int64(5), "stagger": np.bool_(False)}
    for make in (lo.param_groups, lo.layer_groups):
        for size in (
            {"rank": np.int64(8)},
            {"rank": np.float64(0.5)},
            {"density": np.array(0.5)},
            {"rank": torch.tensor(8)},
        ):
            groups = make(model, **size, weight_decay=np.float32(0.5), **options)
            values = [v for group in groups for key, v in group.items() if key != "params"]
            assert all(map(is_plain, values))
            (given,) = [v.item() for v in size.values()]
            assert given in values
            assert 0.5 in [group["weight_decay"] for group in groups]
            assert "low-rank" in lo.describe(groups)


def test_numbers_of_layerwise_methods_become_pythons(tmp_path):
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(3)])

    lisa = lo.LISAAdamW(lo.layer_groups(model()), active_layers=np.int64(1), period=np.int64(2))
    badam = lo.BAdamW(
        lo.layer_groups(model()),
        period=np.int64(2),
        master_weights=np.bool_(True),
        start_block=np.int64(1),
        order="ascending",
    )
    for optimizer in (lisa, badam):
        assert_plain(optimizer)
        through_file(optimizer, tmp_path)
    assert len(lisa.awake) == 1
    assert badam.awake == [1]


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.array, lambda x: torch.tensor(x, dtype=torch.float64)])
def test_numbers_that_schedulers_write_are_saved_as_pythons_and_used_exactly(kind, tmp_path):
    live = {"lr": 0.125, "weight_decay": 0.5, "betas": (0.75, 0.5), "eps": 0.25, "scale": 0.5}
    ours, theirs = weights(), weights()
    optimizer, expected = (lo.GaLoreAdamW(params, rank=8, lr=1e-3) for params in (ours, theirs))
    for name, value in live.items():
        optimizer.param_groups[0][name] = tuple(map(kind, value)) if isinstance(value, tuple) else kind(value)
        expected.param_groups[0][name] = value
    steps(optimizer, ours)
    steps(expected, theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    saved = through_file(optimizer, tmp_path)
    fresh = lo.GaLoreAdamW(weights(), rank=8)
    fresh.load_state_dict(saved)
    for name, value in live.items():
        assert fresh.param_groups[0][name] == value


def test_a_small_decay_in_float32_is_applied_exactly():
    """1 − ηλ in float32 would be off by a part in two thousand here."""
    params = [nn.Parameter(torch.ones(64, 64, dtype=torch.float64))]
    optimizer = lo.GaLoreAdamW(params, rank=8, lr=2.0**-10)
    optimizer.param_groups[0]["weight_decay"] = np.float32(2.0**-6 / 10)
    params[0].grad = torch.zeros(64, 64, dtype=torch.float64)
    optimizer.step()
    lost = float(1.0 - params[0].detach()[0, 0])
    assert lost == pytest.approx(2.0**-10 * float(np.float32(2.0**-6 / 10)), rel=1e-9)


def test_a_learning_rate_may_be_a_tensor():
    lr = torch.tensor(0.01)
    optimizer = lo.GaLoreAdamW(weights(), rank=8, lr=lr)
    assert optimizer.param_groups[0]["lr"] is lr
    assert isinstance(optimizer.state_dict()["param_groups"][0]["lr"], Tensor)


def test_a_checkpoint_with_numbers_of_numpy_is_cleaned_when_it_is_loaded():
    saved = lo.GaLoreAdamW(weights(), rank=8).state_dict()
    saved["param_groups"][0] |= {
        "lr": np.float64(0.5),
        "rank": np.int64(8),
        "betas": (np.float64(0.5), np.float64(0.25)),
    }
    optimizer = lo.GaLoreAdamW(weights(), rank=8)
    optimizer.load_state_dict(saved)
    assert_plain(optimizer)
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.25)


def test_updates_in_backward_take_numbers_of_numpy():
    params = weights()
    optimizer = lo.GaLoreAdamW(params, rank=8)
    handle = lo.update_in_backward(optimizer, accumulate=np.int64(2), max_grad_norm=np.float32(0.5))
    assert (handle.accumulate, handle.max_grad_norm) == (2, 0.5)
    assert type(handle.accumulate) is int


@pytest.mark.parametrize("options", [{"rank": np.float64(1.5)}, {"lr": np.float64(-1.0)}, {"stagger": np.int64(1)}])
def test_numbers_of_numpy_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is "):
        lo.GaLoreAdamW(weights(), **options)


def test_the_package_imports_no_numpy_of_its_own():
    hidden = "import sys; sys.modules['numpy'] = None; import warnings; warnings.simplefilter('ignore'); import lowrank_optim"
    subprocess.run([sys.executable, "-c", hidden], check=True)
