"""Groups of pairs that are stepped all at once: the same numbers as one pair after the other, and when they are not stepped so."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo
from lowrank_optim import kernels
from lowrank_optim.kernels import selftest as made
from lowrank_optim.step.joint_lists import PlainGroup
from tests.adapters.test_pairs import METHODS, drawn

SHAPES = [((4, 30), (20, 4)), ((3, 12), (17, 3)), ((4, 5, 3, 2), (10, 4, 1, 1)), ((4, 9), (70, 4))]
"""Of A and B: two ranks, and a convolution."""

Pairs = list[tuple[Tensor, Tensor, float]]


def pairs_of(dtype: torch.dtype = torch.float32) -> Pairs:
    return [
        (*(nn.Parameter(0.3 * drawn(*shape, seed=10 * n + k, dtype=dtype)) for k, shape in enumerate(both)), 0.5 + n)
        for n, both in enumerate(SHAPES)
    ]


def give_gradients(pairs: Pairs, step: int, without: int | None = None) -> None:
    for number, pair in enumerate(pairs):
        for k, p in enumerate(pair[:2]):
            p.grad = None if number == without else drawn(*p.shape, seed=1000 * step + 2 * number + k, dtype=p.dtype)


def bits_of(optimizer: torch.optim.Optimizer, pairs: Pairs) -> list[Tensor]:
    params = [p for pair in pairs for p in pair[:2]]
    return [*(p.detach().clone() for p in params), *(t.clone() for p in params for t in optimizer.state[p].values())]


def count_groups(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each group that is asked is stepped at once."""
    found: list[bool] = []
    plain = PlainGroup.of

    def asked(*args: Any) -> PlainGroup | None:
        group = plain(*args)
        found.append(group is not None)
        return group

    monkeypatch.setattr(PlainGroup, "of", asked)
    return found


@pytest.mark.parametrize("name", ["rite", "rite, escape", "altlora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_group_at_once_has_the_bits_of_its_pairs_one_by_one(name: str, dtype: torch.dtype, monkeypatch: Any):
    """Also where a pair was left out of a step, so that it has seen fewer than the others."""
    ends = []
    for at_once in (True, False):
        pairs = pairs_of(dtype)
        optimizer = METHODS[name](lo.lora_pairs(pairs, lr_ratio=3.0), weight_decay=0.1)
        if not at_once:
            monkeypatch.setattr(PlainGroup, "of", lambda *_: None)
        asked = count_groups(monkeypatch)
        for step in range(5):
            give_gradients(pairs, step, without=3 if step == 2 else None)
            optimizer.step()
        assert asked == [at_once and step != 2 for step in range(5)]
        ends.append(bits_of(optimizer, pairs))
    for one, two in zip(*ends, strict=True):
        assert torch.equal(one, two)


def spoil(optimizer: lo.LoRAOptimizer, pairs: Pairs, how: str) -> None:
    group = optimizer.param_groups[0]
    if how in ("nan", "raise"):
        assert pairs[1][0].grad is not None
        pairs[1][0].grad[0, 1] = torch.nan
        group["on_nonfinite"] = "raise" if how == "raise" else "skip"
    elif how == "no gradient":
        pairs[2][0].grad = pairs[2][1].grad = None
    elif how == "decay is a tensor":
        group["weight_decay"] = torch.tensor(0.1)
    elif how == "watched":
        lo.watch_step(optimizer, lambda progress: None)
    elif how == "l1":
        group["l1"] = 1e-3
    elif how == "strides":
        grad = pairs[0][1].grad
        assert grad is not None
        pairs[0][1].grad = grad.T.contiguous().T
    else:
        group[how] = True


@pytest.mark.parametrize("name", ["rite", "altlora"])
@pytest.mark.parametrize(
    "how", ["nan", "no gradient", "decay is a tensor", "watched", "l1", "strides", "cautious_decay", "maximize"]
)
@pytest.mark.filterwarnings("ignore:skipped the update")
def test_what_is_unusual_is_stepped_one_by_one_with_the_same_bits(name: str, how: str, monkeypatch: Any):
    ends = []
    asked: list[bool] = []
    for at_once in (True, False):
        pairs = pairs_of()
        optimizer = METHODS[name](lo.lora_pairs(pairs), weight_decay=0.1)
        if at_once:
            asked = count_groups(monkeypatch)
        else:
            monkeypatch.setattr(PlainGroup, "of", lambda *_: None)
        for step in range(3):
            give_gradients(pairs, step)
            if step == 1:
                spoil(optimizer, pairs, how)
            optimizer.step()
        ends.append(bits_of(optimizer, pairs))
        assert optimizer.skipped_updates() == ({"0.2": 1} if how == "nan" else {})
    usual = how == "maximize" or (how == "nan" and name == "rite")  # which sees by itself what is not finite
    assert asked[0]
    assert asked[1:2] == ([] if how == "watched" else [usual])
    assert len(asked) == (1 if how == "watched" else 3)
    for one, two in zip(*ends, strict=True):
        assert torch.equal(one, two)


def test_a_gradient_that_is_not_finite_raises_by_name_and_changes_nothing_of_its_pair():
    pairs = pairs_of()
    optimizer = METHODS["rite"](lo.lora_pairs(pairs))
    give_gradients(pairs, 0)
    spoil(optimizer, pairs, "raise")
    before = copy.deepcopy(pairs[1])
    with pytest.raises(RuntimeError, match=r"the gradient of 0\.2 \(3, 12\) holds NaN"):
        optimizer.step()
    assert all(torch.equal(one, two) for one, two in zip(before[:2], pairs[1][:2], strict=True))
    assert not torch.equal(pairs_of()[0][0], pairs[0][0])  # the one before it


@pytest.mark.skipif(isinstance(kernels.backends()["cpu"], kernels.Unavailable), reason="the library is not built")
@pytest.mark.parametrize("watched", [True, False])
def test_the_warning_of_edited_weights_comes_when_everything_has_moved(watched: bool):
    """Where warnings are errors, too: the other groups have been stepped, and nothing is stepped twice."""
    ends = []
    for strict in (True, False):
        pairs = pairs_of()
        groups = [lo.lora_pairs([pair])[0] for pair in pairs]
        other = nn.Parameter(torch.ones(3))
        optimizer = METHODS["rite"]([*groups, {"params": [other], "rule": "adam"}])
        if watched:
            lo.watch_step(optimizer, lambda progress: None)
        for step in range(3):
            give_gradients(pairs, step)
            other.grad = torch.ones(3)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if step == 1:
                    with torch.no_grad():
                        pairs[0][0].mul_(2.0)
                    if strict:
                        warnings.simplefilter("error")
                        with pytest.raises(RuntimeWarning, match="are others than"):
                            optimizer.step()
                        continue
                optimizer.step()
        ends.append([*bits_of(optimizer, pairs), other.detach()])
    for one, two in zip(*ends, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("what", [torch.nan, torch.inf, 1e30])
def test_rite_leaves_pairs_alone_whose_gradients_have_no_norm_and_says_which(
    backend: str, what: float, monkeypatch: Any
):
    """1e30 has one, but its square is above what float32 holds, as `kernels.norms` has it too."""
    monkeypatch.setenv("LOWRANK_OPTIM_BACKEND", backend)
    if backend == "cpu" and isinstance(kernels.backends()["cpu"], kernels.Unavailable):
        pytest.skip("the library is not built")
    sizes = (70, 150, 2300, 64, 129, 90, 33, 40, 80, 20)
    usual, spoilt = made.rite_step(sizes, 16), made.rite_step(sizes, 16)
    before = made.rite_step(sizes, 16)
    spoilt[1][3][5, 7] = what
    finite = torch.zeros(len(sizes), dtype=torch.bool)
    kernels.call("rite_step_", *usual, finite)
    assert finite.all()
    kernels.call("rite_step_", *spoilt, finite)
    assert finite.tolist() == [n != 3 for n in range(len(sizes))]
    norms = torch.stack(kernels.norms(spoilt[1]))
    assert torch.equal(norms.isfinite(), finite)
    for each in (0, 2, 3):
        for n, (got, good, old) in enumerate(zip(spoilt[each], usual[each], before[each], strict=True)):
            assert torch.equal(got, old if n in (2, 3) else good)
            assert not torch.equal(got, old) or n in (2, 3)
    assert backend == "reference" or torch.equal(spoilt[5][[0, 1, 8]], usual[5][[0, 1, 8]])
    assert not spoilt[5][2:4].any()  # nothing is known of what was not written


def test_the_flags_of_rite_have_a_place_for_each_factor():
    with pytest.raises(ValueError, match=r"finite is \(3,\) torch.bool.*needed: \(2,\) torch.bool"):
        kernels.call("rite_step_", *made.rite_step((70, 50), 3), torch.ones(3, dtype=torch.bool))


def test_a_subclass_is_asked_about_parameters_with_gradients_only(monkeypatch: Any):
    """Layer switching, which is asked, warns of gradients of layers that sleep."""
    asked: list[torch.Tensor] = []
    pairs = pairs_of(torch.float32)
    dense = torch.nn.Parameter(torch.ones(3))
    optimizer = lo.LoRARiteAdamW([*lo.lora_pairs(pairs), {"params": [dense], "rule": "adam"}], lr=1e-3)
    monkeypatch.setattr(type(optimizer), "_admits", lambda self, param, group: asked.append(param) is None)
    give_gradients(pairs, 0, without=1)
    optimizer.step()
    assert asked
    assert all(param.grad is not None for param in asked)
