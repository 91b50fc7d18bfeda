"""torch.distributed.checkpoint: saved on p processes, loaded on q and continued; a save that dies spoils nothing."""

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import lowrank_optim as lo
from lowrank_optim.quantization import coded_moments as coded
from tests.oracles.distributed_harness import (
    METHODS,
    SHAPES,
    Model,
    distance,
    groups,
    layers,
    shard,
    spawn,
    states,
    train,
    weights,
    whole,
)

BEFORE, AFTER = 3, 3
"""With a refresh of all tensors before the checkpoint, and one after it."""
CASES = [
    ("galore", {}),
    ("galore_8bit", {}),
    ("galore", {"state_bits": 4, "proj_type": "right"}),
    ("qgalore", {}),
    ("fira", {}),
    ("apollo", {}),
    ("ldadam", {}),
    ("frugal", {"density": 0.5}),
    ("galore", {"coordinates": "entries"}),
    ("galore_adafactor", {}),
    ("sumo", {}),
    ("muon_adamw", {"rule": lo.NorMuon(), "state_bits": 8}),
    ("scale", {"rule": lo.RowNorm(0.9), "state_bits": 8}),
    ("sinkgd", {"rule": "sinkhorn"}),  # matrices without state
    ("alice", {"state_bits": 8}),
    ("galore", {"projector": "dct"}),
]


def build(model, name, **options):
    coded.MIN_CODED = 64
    (size,) = {"density", "rule"} & options.keys() or {"rank"}
    rank = {size: options.pop(size, 2)}
    return METHODS[name](groups(model, **rank), **{"lr": 1e-3, "update_proj_gap": 2, **options})


def distributed_model():
    return shard(Model(SHAPES)) if torch.distributed.get_world_size() > 1 else Model(SHAPES)


def parts(model, optimizer, flatten):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def put(model, optimizer, loaded, flatten):
    set_model_state_dict(model, loaded["model"])
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    set_optimizer_state_dict(model, optimizer, loaded["optimizer"], options=options)


def save(folder, flatten, which) -> None:
    for number, (name, options) in list(enumerate(CASES))[which]:
        model = distributed_model()
        optimizer = build(model, name, **options)
        train(model, optimizer, range(BEFORE))
        dcp.save(parts(model, optimizer, flatten), checkpoint_id=f"{folder}/{number}")
        told = {"weights": weights(model), "state": states(optimizer, model)}
        train(model, optimizer, range(BEFORE, BEFORE + AFTER))
        told["after"] = weights(model)
        if torch.distributed.get_rank() == 0:
            torch.save(told, f"{folder}/{number}.pt")


def load(folder, flatten, which) -> None:
    for number, (name, options) in list(enumerate(CASES))[which]:
        model = distributed_model()
        optimizer = build(model, name, **options)  # fresh, never stepped
        fresh = states(optimizer, model)
        loaded = parts(model, optimizer, flatten)
        dcp.load(loaded, checkpoint_id=f"{folder}/{number}")
        put(model, optimizer, loaded, flatten)
        told = torch.load(f"{folder}/{number}.pt", weights_only=True)
        assert distance(weights(model), told["weights"]) == 0.0, (name, options)
        changed = False
        for key, state in states(optimizer, model).items():
            assert state.keys() == told["state"][key].keys()
            for field, tensor in state.items():
                expected = told["state"][key][field]
                assert tensor.dtype == expected.dtype, (name, key, field)
                assert torch.equal(tensor, expected), (name, options, key, field)
                changed = (
                    changed or tensor.shape != fresh[key][field].shape or not torch.equal(tensor, fresh[key][field])
                )
        assert changed  # a positive control
        train(model, optimizer, range(BEFORE, BEFORE + AFTER))
        gap = distance(weights(model), told["after"])
        # A code that rounds the other way moves a weight by more than the sums of another order do.
        assert gap < (1e-4 if optimizer.param_groups[0]["state_bits"] < 16 else 2e-6), (name, options, gap)


ALL = slice(None)
QUARTERS = [slice(start, None, 4) for start in range(4)]
"""Every case is tried from two processes to one, and in `make test-all` between all numbers."""


@pytest.mark.parametrize(
    ("saved", "loaded", "flatten", "which"),
    [
        pytest.param(2, 1, False, ALL, id="2-1"),
        *(
            pytest.param(*how, which, id=f"{how[0]}-{how[1]}-{n}", marks=[] if n == usual else [pytest.mark.full])
            for *how, usual in ((2, 4, True, 0), (4, 3, False, 1))
            for n, which in enumerate(QUARTERS)
        ),
    ],
)
def test_a_checkpoint_resumes_on_another_number_of_processes(saved, loaded, flatten, which, tmp_path):
    spawn(saved, save, str(tmp_path), flatten, which)
    spawn(loaded, load, str(tmp_path), flatten, which)


TURNS = ("frugal", "lisa", "badam")


def turning(model, name):
    """A method of which only some tensors have state, another choice every two steps."""
    coded.MIN_CODED = 64
    if name == "frugal":
        blocks = {"blocks": "ascending", "on_refresh": "reset", "state_bits": 8, "update_proj_gap": 2}
        return lo.FrugalAdamW(groups(model, density=0.4), lr=1e-3, **blocks)
    return lo.LAYERWISE_METHODS[name](layers(model), lr=1e-3, period=2)


def save_turns(folder) -> None:
    for name in TURNS:
        model = distributed_model()
        optimizer = turning(model, name)
        train(model, optimizer, range(BEFORE))
        dcp.save(parts(model, optimizer, False), checkpoint_id=f"{folder}/{name}")
        told = {"weights": weights(model), "state": awake(optimizer, model)}
        train(model, optimizer, range(BEFORE, BEFORE + AFTER))
        told["after"] = weights(model)
        if torch.distributed.get_rank() == 0:
            torch.save(told, f"{folder}/{name}.pt")


def awake(optimizer, model):
    return {n: {k: whole(t) for k, t in optimizer.state.get(p, {}).items()} for n, p in model.named_parameters()}


def load_turns(folder) -> None:
    for name in TURNS:
        model = distributed_model()
        optimizer = turning(model, name)
        fresh = awake(optimizer, model)
        told = torch.load(f"{folder}/{name}.pt", weights_only=True)
        sizes = [{n: {k: t.shape for k, t in s.items()} for n, s in state.items()} for state in (fresh, told["state"])]
        assert sizes[0] != sizes[1], name  # a positive control: without the function dcp.load refuses
        template = parts(model, optimizer, False)
        lo.distributed.match_checkpoint(template, f"{folder}/{name}")
        dcp.load(template, checkpoint_id=f"{folder}/{name}")
        set_model_state_dict(model, template["model"])
        optimizer.load_state_dict(template["optimizer"])
        assert distance(weights(model), told["weights"]) == 0.0, name
        loaded = awake(optimizer, model)
        for key, state in told["state"].items():
            assert loaded[key].keys() == state.keys(), (name, key)
            for field, tensor in state.items():
                assert loaded[key][field].dtype == tensor.dtype
                assert torch.equal(loaded[key][field], tensor), (name, key, field)
        train(model, optimizer, range(BEFORE, BEFORE + AFTER))
        gap = distance(weights(model), told["after"])
        assert gap < (1e-4 if name == "frugal" else 2e-6), (name, gap)
    with pytest.raises(ValueError, match=r"is no checkpoint of torch\.distributed"):
        lo.distributed.match_checkpoint(template, f"{folder}/none")
    with pytest.raises(ValueError, match="flattened"):
        lo.distributed.match_checkpoint(parts(model, optimizer, True), f"{folder}/{TURNS[0]}")


@pytest.mark.parametrize("loaded", [2, 1])
def test_methods_that_take_turns_load_a_checkpoint_of_another_turn(loaded, tmp_path):
    spawn(2, save_turns, str(tmp_path))
    spawn(loaded, load_turns, str(tmp_path))


def full(folder) -> None:
    """A full state dict: gathered, saved by one process, broadcast from it."""
    for name, options in CASES[:5]:
        model = distributed_model()
        optimizer = build(model, name, **options)
        train(model, optimizer, range(BEFORE))
        gather = StateDictOptions(full_state_dict=True, cpu_offload=True)
        saved = get_optimizer_state_dict(model, optimizer, options=gather)
        expected = states(optimizer, model)
        model2 = distributed_model()
        optimizer2 = build(model2, name, **options)
        put_back = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_optimizer_state_dict(model2, optimizer2, saved, options=put_back)
        for key, state in states(optimizer2, model2).items():
            for field, tensor in state.items():
                assert tensor.dtype == expected[key][field].dtype
                assert torch.equal(tensor, expected[key][field]), (name, key, field)
        # And by the optimizer alone, from whole tensors.
        optimizer3 = build(distributed_model(), name, **options)
        plain = optimizer.state_dict()
        whole = {
            k: {f: t.full_tensor() if hasattr(t, "full_tensor") else t for f, t in s.items()}
            for k, s in plain["state"].items()
        }
        optimizer3.load_state_dict({**plain, "state": whole})
        for mine, theirs in zip(optimizer3.state.values(), optimizer.state.values(), strict=True):
            for field, tensor in theirs.items():
                ours = mine[field]
                if hasattr(tensor, "placements"):
                    assert ours.placements == tensor.placements
                    tensor, ours = tensor.to_local(), ours.to_local()
                assert torch.equal(ours, tensor)


def test_a_full_state_dict_is_broadcast_and_cut(tmp_path):
    spawn(2, full, str(tmp_path))


def asynchronous(folder) -> None:
    model = distributed_model()
    optimizer = build(model, "galore_8bit")
    train(model, optimizer, range(BEFORE))
    expected = states(optimizer, model)
    own = torch.distributed.new_group(backend="gloo")  # its messages must not meet those of training
    future = dcp.async_save(parts(model, optimizer, False), checkpoint_id=f"{folder}/a", process_group=own)
    train(model, optimizer, range(BEFORE, BEFORE + AFTER))  # while it is being written
    future.result()
    model2 = distributed_model()
    optimizer2 = build(model2, "galore_8bit")
    loaded = parts(model2, optimizer2, False)
    dcp.load(loaded, checkpoint_id=f"{folder}/a")
    put(model2, optimizer2, loaded, False)
    for key, state in states(optimizer2, model2).items():
        for field, tensor in state.items():
            assert torch.equal(tensor, expected[key][field]), (key, field)


def test_an_asynchronous_save_holds_the_step_it_was_asked_for(tmp_path):
    spawn(2, asynchronous, str(tmp_path))


class Dying(dcp.FileSystemWriter):
    """A writer whose process is killed in the middle of its data."""

    def write_data(self, plan, planner):
        if torch.distributed.get_rank() == 1:
            Path(self.path, "__1_0.distcp").write_bytes(b"half of")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write_data(plan, planner)


def killed(folder) -> None:
    model = distributed_model()
    optimizer = build(model, "galore_8bit")
    train(model, optimizer, range(BEFORE))
    dcp.save(parts(model, optimizer, False), checkpoint_id=f"{folder}/step-1")
    told = {"weights": weights(model), "state": states(optimizer, model)}
    if torch.distributed.get_rank() == 0:
        torch.save(told, f"{folder}/told.pt")
    torch.distributed.barrier()
    train(model, optimizer, range(BEFORE, BEFORE + AFTER))
    dcp.save(parts(model, optimizer, False), storage_writer=Dying(f"{folder}/step-2"))


def resumed(folder) -> None:
    model = distributed_model()
    optimizer = build(model, "galore_8bit")
    loaded = parts(model, optimizer, False)
    with pytest.raises(CheckpointException, match="metadata"):
        dcp.load(loaded, checkpoint_id=f"{folder}/step-2")
    loaded = parts(model, optimizer, False)
    dcp.load(loaded, checkpoint_id=f"{folder}/step-1")
    put(model, optimizer, loaded, False)
    told = torch.load(f"{folder}/told.pt", weights_only=True)
    assert distance(weights(model), told["weights"]) == 0.0
    for key, state in states(optimizer, model).items():
        for field, tensor in state.items():
            assert torch.equal(tensor, told["state"][key][field])
    train(model, optimizer, range(BEFORE, BEFORE + AFTER))


def test_a_process_killed_in_the_middle_of_a_save_leaves_the_previous_checkpoint(tmp_path):
    with pytest.raises(AssertionError, match=r"SIGKILL|process"):
        spawn(2, killed, str(tmp_path))
    spawn(2, resumed, str(tmp_path))


def mismatched() -> None:
    """Another rank: refused with what differs, and nothing has changed."""
    model = distributed_model()
    optimizer = build(model, "galore")
    train(model, optimizer, range(2))
    before = states(optimizer, model)
    other = METHODS["galore"](groups(model, rank=1))
    with pytest.raises(ValueError, match=r"rank is 1 in the checkpoint, 2 here"):
        optimizer.load_state_dict(other.state_dict())
    for key, state in states(optimizer, model).items():
        for field, tensor in state.items():
            assert torch.equal(tensor, before[key][field])


def test_a_checkpoint_of_another_rank_changes_nothing_on_shards():
    spawn(2, mismatched)
