"""The state: what it holds, how many bytes, and that it survives a checkpoint to the bit."""

import copy
import io
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowrank_optim as lo
from lowrank_optim.optimizers import checkpoint
from tests.oracles.checkpoints import in_fresh_process, one_thread

PROJECTORS = [
    "randomized_svd",
    "svd",
    "random",
    "random:gaussian",
    "coordinate",
    "coordinate:rows",
    "coordinate:entries",
    "blocks:random",
    "power_iteration",
    "grassmann_tracking",
    "momentum_svd",
    "randomized_svd:complement",
    "dct",
]
SCALED_BY_NORMS = ("fira", "apollo", "apollo_mini", "alice", "subtrack")
STORED = ("randomized_svd", "randomized_svd:complement", "svd", "power_iteration", "grassmann_tracking", "momentum_svd")


def is_refused(name: str, projector: str) -> bool:
    """What construction refuses: single entries and blocks have no rows or columns to scale, a Gaussian basis is not orthonormal."""
    if name in SCALED_BY_NORMS:
        refused = projector == "coordinate:entries" or projector.startswith("blocks")
        return refused or (name == "alice" and projector == "random:gaussian")
    if name == "sara":  # has entries of its own (test_sara)
        return True
    if name == "qgalore":  # has a packed basis, which random subspaces have not
        return projector not in STORED
    return projector == "random:gaussian" and (name.startswith("frugal") or name == "ldadam")


COMBINATIONS = [(name, projector) for name in lo.METHODS for projector in PROJECTORS if not is_refused(name, projector)]
SHAPES = ((40, 24), (24, 40), (32, 32), (3, 20, 16), (24,))


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    """Gradients that are a pure function of the step, and of a magnitude that bfloat16 weights notice."""
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], start: int, stop: int) -> None:
    for step in range(start, stop):
        set_gradients(params, step)
        optimizer.step()


def build(name: str, params: list[nn.Parameter], **options: object) -> lo.LowRankOptimizer:
    own = {"galore_adafactor": {"beta1": 0.9}, "frugal_sgd": {"momentum": 0.9, "lr": 1e-4}}
    extra = {"lr": 1e-2, **own.get(name, {"betas": (0.9, 0.95)})}
    if str(options.get("projector")).startswith("blocks"):
        extra |= {"density": 0.5, "on_refresh": "reset"}
    else:
        extra |= {"rank": 6}
    return lo.by_name(name)(params, update_proj_gap=5, **{**options, **extra})


def through_file(state_dict: dict, path: Path) -> dict:
    torch.save(state_dict, path)
    return torch.load(path, weights_only=True)


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def assert_same_state(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    for state_a, state_b in zip(a.state.values(), b.state.values(), strict=True):
        assert state_a.keys() == state_b.keys()
        for key in state_a:
            assert state_a[key].dtype == state_b[key].dtype, key
            assert torch.equal(state_a[key], state_b[key]), key


POLICIES, DTYPES = ("keep", "reset", "rotate"), (torch.float32, torch.bfloat16, torch.float64)


def in_turn() -> Iterator[tuple[str, str, str, torch.dtype]]:
    """Every combination once, with one of the nine pairs of policy and type: the next one for the next method or projector."""
    for name, projector in COMBINATIONS:
        turn = list(lo.METHODS).index(name) + PROJECTORS.index(projector)
        yield name, projector, POLICIES[turn % 3], DTYPES[turn // 3 % 3]


IN_TURN = set(in_turn())
EVERY = [
    pytest.param(*case, policy, dtype, marks=[] if (*case, policy, dtype) in IN_TURN else pytest.mark.full)
    for case in COMBINATIONS
    for policy in POLICIES
    for dtype in DTYPES
]


@pytest.mark.parametrize(("name", "projector", "policy", "dtype"), EVERY)
def test_resume_is_exact_across_refreshes(name, projector, policy, dtype, tmp_path):
    options = {
        "projector": projector,
        "on_refresh": policy,
        "stochastic_rounding": dtype == torch.bfloat16,
        "seed": 3,
    }
    whole = parameters(dtype)
    saved = build(name, whole, **options)
    run(saved, whole, 0, 7)
    state = through_file({"optimizer": saved.state_dict(), "params": [p.detach() for p in whole]}, tmp_path / "c.pt")

    # A fresh, never stepped optimizer over parameters of other values: everything must come from the file.
    second = [nn.Parameter(torch.full_like(p, 0.5)) for p in whole]
    resumed = build(name, second, **options)
    with torch.no_grad():
        for param, value in zip(second, state["params"], strict=True):
            param.copy_(value)
    resumed.load_state_dict(state["optimizer"])
    assert_same_state(saved, resumed)
    run(resumed, second, 7, 14)

    run(saved, whole, 7, 14)  # goes on after its checkpoint; runs without one are in the test of fresh processes
    assert_same(whole, second)
    assert_same_state(saved, resumed)


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
def test_resume_is_exact_for_every_proj_type(proj_type):
    whole, first = parameters(torch.float32), parameters(torch.float32)
    uninterrupted = build("galore", whole, proj_type=proj_type)
    run(uninterrupted, whole, 0, 12)
    saved = build("galore", first, proj_type=proj_type)
    run(saved, first, 0, 6)
    second = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = build("galore", second, proj_type=proj_type)
    resumed.load_state_dict(copy.deepcopy(saved.state_dict()))
    run(resumed, second, 6, 12)
    assert_same(whole, second)


def few_in_turn() -> list[tuple[str, str, str, torch.dtype]]:
    """Of these cases a few, in which every method, projector, policy and type is twice or more."""
    kept, seen = [], Counter[object]()
    for case in in_turn():
        if any(seen[value] < 2 for value in case):
            kept.append(case)
            seen.update(case)
    return kept


def run_all(mode: str, folder: Path, every: bool) -> None:
    """The runs of the test below: "whole" takes 14 steps and leaves a checkpoint of the seventh, "second" goes on from it."""
    contents, first = {}, {}
    saved = torch.load(folder / "first", weights_only=True) if mode == "second" else {}
    for number, (name, projector, policy, dtype) in enumerate(in_turn() if every else few_in_turn()):
        params = parameters(dtype)
        options = {"projector": projector, "on_refresh": policy, "stochastic_rounding": dtype == torch.bfloat16}
        optimizer = build(name, params, **options)
        if mode == "second":
            with torch.no_grad():
                for param, value in zip(params, saved[number]["params"], strict=True):
                    param.copy_(value)
            optimizer.load_state_dict(saved[number]["optimizer"])
        if mode == "whole":
            run(optimizer, params, 0, 7)
            first[number] = copy.deepcopy(content(optimizer, params))
        run(optimizer, params, 7, 14)
        contents[number] = content(optimizer, params)
    torch.save(contents, folder / mode)
    if mode == "whole":
        torch.save(first, folder / "first")


def content(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> dict:
    return {"optimizer": optimizer.state_dict(), "params": [param.detach() for param in params]}


@pytest.mark.long
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.full)])
def test_resume_is_exact_in_a_fresh_process_for_every_method_and_projector(every, tmp_path):
    """Each of them with some of the others: what only a process of its own shows is no matter of two of them together."""
    with one_thread():
        run_all("whole", tmp_path, every)
    in_fresh_process(__name__, "run_all", "second", tmp_path, every)
    resumed, whole = (torch.load(tmp_path / mode, weights_only=True) for mode in ("second", "whole"))
    assert len(resumed) == len(whole) == len(COMBINATIONS if every else few_in_turn())
    for number, expected in whole.items():
        assert_same(resumed[number]["params"], expected["params"])
        states = (found["optimizer"]["state"].values() for found in (resumed[number], expected))
        for a, b in zip(*states, strict=True):
            assert all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in b)


def test_state_is_made_with_the_optimizer_and_holds_tensors_only():
    params = parameters(torch.bfloat16)
    optimizer = build("galore", params)
    assert set(optimizer.state) == set(params)
    for state in optimizer.state.values():
        assert all(type(value) is Tensor for value in state.values())
    expected = {"step", "last_refresh", "basis", "exp_avg", "exp_avg_sq"}
    assert [state.keys() == expected for state in optimizer.state.values()] == [True, True, True, True, False]


def test_load_keeps_float32_moments_of_bfloat16_weights():
    params = parameters(torch.bfloat16)
    optimizer = build("galore", params)
    run(optimizer, params, 0, 3)
    fresh = build("galore", parameters(torch.bfloat16))
    fresh.load_state_dict(optimizer.state_dict())
    for state in fresh.state.values():
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    low_rank = next(iter(fresh.state.values()))
    assert low_rank["basis"].dtype == torch.float32
    assert low_rank["last_refresh"].dtype == torch.int64


def test_loaded_state_shares_no_memory_with_the_checkpoint():
    params = parameters(torch.float32)
    optimizer = build("galore", params)
    run(optimizer, params, 0, 3)
    checkpoint = optimizer.state_dict()
    kept = copy.deepcopy(checkpoint)
    others = parameters(torch.float32)
    fresh = build("galore", others)
    fresh.load_state_dict(checkpoint)
    run(fresh, others, 3, 9)
    for key, state in kept["state"].items():
        for name, value in state.items():
            assert torch.equal(value, checkpoint["state"][key][name])


@pytest.mark.parametrize(
    ("shape", "rank", "proj_type", "expected"),
    [
        # (moments, basis) in elements: std keeps D×r moments and a d×r basis, reverse_std the other way round.
        ((96, 64), 16, "std", (96 * 16, 64 * 16)),
        ((64, 96), 16, "std", (96 * 16, 64 * 16)),
        ((64, 64), 16, "std", (64 * 16, 64 * 16)),
        ((96, 64), 16, "reverse_std", (64 * 16, 96 * 16)),
        ((96, 64), 16, "full", (16 * 16, (96 + 64) * 16)),
    ],
)
def test_state_bytes_are_those_of_the_formulas(shape, rank, proj_type, expected):
    moments, basis = expected
    param = nn.Parameter(torch.randn(shape))
    optimizer = lo.GaLoreAdamW([param], rank=rank, proj_type=proj_type)
    for _ in range(2):
        param.grad = torch.randn(shape)
        optimizer.step()
    sizes = lo.state_bytes(optimizer)
    assert sizes["exp_avg"] + sizes["exp_avg_sq"] == 8 * moments
    assert sizes["basis"] + sizes.get("basis_right", 0) == 4 * basis
    assert sizes["step"] + sizes["last_refresh"] == 12
    # Nothing larger hides behind the tensors: what a file holds is what is counted.
    for tensor in optimizer.state[param].values():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_adafactor_state_bytes_are_those_of_the_formulas():
    param = nn.Parameter(torch.randn(96, 64))
    sizes = lo.state_bytes(lo.GaLoreAdafactor([param], rank=16))
    assert sizes["exp_avg_sq_row"] + sizes["exp_avg_sq_col"] == 4 * (96 + 16)
    assert sizes["basis"] == 4 * 64 * 16


@pytest.mark.parametrize("projector", ["random", "random:gaussian"])
def test_random_bases_are_not_stored(projector):
    param = nn.Parameter(torch.randn(96, 64))
    assert lo.state_bytes(lo.GaLoreAdamW([param], rank=16, projector=projector)).keys() == {
        "exp_avg",
        "exp_avg_sq",
        "last_refresh",
        "step",
    }


def fingerprint(optimizer: torch.optim.Optimizer) -> bytes:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    return buffer.getvalue()


def test_checkpoint_of_another_rank_raises_and_changes_nothing():
    params = parameters(torch.float32)
    optimizer = build("galore", params)
    run(optimizer, params, 0, 3)
    before = fingerprint(optimizer)
    other = lo.GaLoreAdamW(parameters(torch.float32), lr=5.0, rank=4, betas=(0.5, 0.5))
    with pytest.raises(ValueError, match=r"group 0: rank is 4 in the checkpoint, 6 here"):
        optimizer.load_state_dict(other.state_dict())
    assert fingerprint(optimizer) == before


def test_checkpoint_of_another_method_names_what_differs():
    params = parameters(torch.float32)
    optimizer = build("galore", params)
    other = build("galore_adafactor", parameters(torch.float32), projector="svd")
    with pytest.raises(ValueError, match=r"(?s)rule is 'adafactor' in the checkpoint, 'adam' here.*projector is 'svd'"):
        optimizer.load_state_dict(other.state_dict())


def test_checkpoint_of_another_model_names_every_parameter_that_differs():
    names = ["a", "b"]
    big = [nn.Parameter(torch.randn(40, 24)), nn.Parameter(torch.randn(24, 40))]
    small = [nn.Parameter(torch.randn(40, 20)), nn.Parameter(torch.randn(20, 40))]
    optimizer = lo.GaLoreAdamW(list(zip(names, big, strict=True)), rank=4)
    before = fingerprint(optimizer)
    with pytest.raises(ValueError, match=r"(?s)a \(40, 24\): basis is .* \(20, 4\) .*b \(24, 40\): basis is"):
        optimizer.load_state_dict(lo.GaLoreAdamW(list(zip(names, small, strict=True)), rank=4).state_dict())
    assert fingerprint(optimizer) == before


def test_checkpoint_with_a_missing_tensor_raises():
    params = parameters(torch.float32)
    optimizer = build("galore", params)
    broken = copy.deepcopy(optimizer.state_dict())
    del broken["state"][1]["exp_avg"]
    with pytest.raises(ValueError, match=r"0\.1 \(24, 40\): the checkpoint lacks exp_avg"):
        optimizer.load_state_dict(broken)


@pytest.mark.parametrize(
    ("saved", "own", "fits"),
    [
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.float32, True),  # widened, without a loss
        (torch.float32, torch.bfloat16, False),
        (torch.float64, torch.float32, True),  # of arithmetic on float64 weights
        (torch.float64, torch.bfloat16, False),
        (torch.int64, torch.float32, False),
        (torch.float32, torch.int64, False),
        (torch.uint8, torch.int32, False),
    ],
    ids=str,
)
def test_a_tensor_of_a_checkpoint_fits_where_its_type_can_become_ours_without_a_loss(saved, own, fits):
    value, template = torch.ones(3, 2).to(saved), torch.ones(3, 2).to(own)
    assert checkpoint._fits(value, template) == fits
    assert not checkpoint._fits(value, template[:2])


def test_checkpoint_with_moments_of_another_type_raises_and_changes_nothing():
    params = parameters(torch.float32)
    optimizer = build("galore", params)
    before, other = fingerprint(optimizer), copy.deepcopy(optimizer.state_dict())
    other["state"][0]["last_refresh"] = other["state"][0]["last_refresh"].float()
    with pytest.raises(
        ValueError, match=r"last_refresh is torch\.float32 \(\) in the checkpoint, torch\.int64 \(\) here"
    ):
        optimizer.load_state_dict(other)
    assert fingerprint(optimizer) == before


def test_checkpoint_with_another_number_of_groups_or_parameters_raises():
    optimizer = build("galore", parameters(torch.float32))
    one = lo.GaLoreAdamW([nn.Parameter(torch.randn(40, 24))], rank=6)
    with pytest.raises(ValueError, match=r"group 0: 1 parameters saved, 5 here"):
        optimizer.load_state_dict(one.state_dict())
    two = lo.GaLoreAdamW([{"params": [nn.Parameter(torch.randn(4, 2))]}, {"params": [nn.Parameter(torch.randn(3))]}])
    with pytest.raises(ValueError, match=r"2 param groups, the optimizer 1"):
        optimizer.load_state_dict(two.state_dict())


def test_a_torch_adamw_checkpoint_loads_into_dense_groups_and_continues():
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    reference = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    run(reference, theirs, 0, 5)
    optimizer = lo.GaLoreAdamW(ours)
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            a.copy_(b)
    optimizer.load_state_dict(reference.state_dict())
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    run(reference, theirs, 5, 15)
    run(optimizer, ours, 5, 15)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_hooks_of_torch_run_around_a_load():
    params = parameters(torch.float32)
    optimizer = build("galore", params)
    run(optimizer, params, 0, 2)
    calls = []
    fresh = build("galore", parameters(torch.float32))
    fresh.register_load_state_dict_pre_hook(lambda o, d: calls.append("pre"))
    fresh.register_load_state_dict_post_hook(
        lambda o: calls.append(float(o.state[o.param_groups[0]["params"][0]]["step"]))
    )
    fresh.load_state_dict(state_dict=optimizer.state_dict())
    assert calls == ["pre", 2.0]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copied_optimizer_continues_like_the_original(clone):
    params = parameters(torch.float32)
    optimizer = build("galore", params)
    run(optimizer, params, 0, 6)
    twin = clone(optimizer)
    twin_params = twin.param_groups[0]["params"]
    run(optimizer, params, 6, 12)
    run(twin, twin_params, 6, 12)
    assert_same(params, twin_params)


def test_a_group_added_later_resumes():
    params, extra = parameters(torch.float32), [nn.Parameter(torch.ones(20, 30))]
    optimizer = build("galore", params)
    run(optimizer, params, 0, 3)
    optimizer.add_param_group({"params": extra, "rank": 3, "lr": 0.5})
    assert optimizer.state[extra[0]]["exp_avg"].shape == (30, 3)
    run(optimizer, params + extra, 3, 9)
    others, other_extra = parameters(torch.float32), [nn.Parameter(torch.ones(20, 30))]
    fresh = build("galore", others)
    fresh.add_param_group({"params": other_extra, "rank": 3})
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[1]["lr"] == 0.5
    assert_same_state(optimizer, fresh)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(300, 400), (301, 401)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_element_anywhere_in_a_large_gradient_is_seen(threads, shape, value):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for at in (0, -1):
            weight = torch.nn.Parameter(torch.ones(shape))
            optimizer = lo.GaLoreAdamW([weight])
            weight.grad = torch.ones(shape)
            weight.grad.view(-1)[at] = value
            with pytest.warns(RuntimeWarning, match="skipped the update"):
                optimizer.step()
            assert torch.equal(weight, torch.ones(shape))
            weight.grad = torch.ones(shape)
            optimizer.step()
            assert not torch.equal(weight, torch.ones(shape))
    finally:
        torch.set_num_threads(before)
