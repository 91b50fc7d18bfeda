"""One optimizer with three rules trains a LLaMA: killed and resumed, sharded, and in backward, it is the same run.

Attention has Adam in a subspace, with codes of 8 bits; the MLP has Lion in another one and a step along what is outside of it; all
others have SGD.
"""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM

import lowrank_optim as lo
from lowrank_optim.step.param_step import ParamStep
from tests.oracles.distributed_harness import distance, shard, spawn, states, weights
from tests.oracles.processes import preload

STEPS, SAVED, KILLED = 12, 5, 8
SHARDED_STEPS = 8
OVERRIDES: dict[str, dict[str, Any]] = {
    "self_attn": {"rule": lo.Adam(betas=(0.9, 0.95)), "state_bits": 8, "basis_bits": 8, "scale": 0.5},
    "mlp": {"rule": lo.Lion(), "projector": "coordinate:columns", "residual": "sgd", "rank": 16, "lr_factor": 0.1},
}


def llama() -> LlamaForCausalLM:
    """Moments of 128 × 32 elements, the fewest that are coded."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def build(model: nn.Module, **options: Any) -> tuple[lo.LowRankOptimizer, LambdaLR]:
    groups = lo.param_groups(model, rank=32, weight_decay=0.1, overrides=OVERRIDES)
    optimizer = lo.LowRankOptimizer(
        groups, rule="adam", dense_rule=lo.SGD(momentum=0.9), lr=1e-2, update_proj_gap=4, **options
    )
    assert sorted({group["rule"] for group in optimizer.param_groups}) == ["adam", "lion", "sgd"]
    return optimizer, LambdaLR(optimizer, lambda step: 1.0 - step / (2 * STEPS))


def backward(model: nn.Module, step: int, part: int) -> float:
    """The gradient of one of the two halves of a batch, added to what is there; returns its share of the loss."""
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(2 * step + part))
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return float(loss.detach())


def train(model: nn.Module, optimizer: lo.LowRankOptimizer, scheduler: LambdaLR, steps: range) -> list[float]:
    losses = []
    for step in steps:
        losses.append(backward(model, step, 0))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return losses


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


# ---------------------------------------------------------------------------------------------------- killed and resumed


def save(path: Path, content: dict[str, Any], dies: bool) -> None:
    """To a file beside it, then renamed: a reader finds the old checkpoint or the new one."""
    torch.save(content, path.with_suffix(".part"))
    if dies:
        os.truncate(path.with_suffix(".part"), path.with_suffix(".part").stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    os.replace(path.with_suffix(".part"), path)


def die_in_step(after: int) -> None:
    """SIGKILL instead of the write of the weights of a parameter, when `after` others have been written in this process."""
    write, seen = ParamStep.write, []

    def counted(*arguments: Any) -> Any:
        seen.append(1)
        if len(seen) > after:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*arguments)

    ParamStep.write = counted


def run(path: Path, in_backward: bool, dies: str | None) -> None:
    """A training run that goes on from its last checkpoint, if there is one."""
    torch.set_num_threads(1)
    model = llama()
    optimizer, scheduler = build(model)
    if in_backward:
        lo.update_in_backward(optimizer)
    losses: list[float] = []
    if path.exists():
        loaded = torch.load(path, weights_only=True)
        model.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
        scheduler.load_state_dict(loaded["scheduler"])
        losses = loaded["losses"]
    first = len(losses)
    for step in range(first, STEPS):
        if step == KILLED and dies == "in backward":
            model.model.layers[0].mlp.up_proj.weight.register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
        if step == KILLED and dies == "in the step":
            die_in_step(after=7)
        losses += train(model, optimizer, scheduler, range(step, step + 1))
        if (step + 1) % SAVED == 0 or step + 1 == STEPS:
            content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
            content["scheduler"] = scheduler.state_dict()
            save(path, content, dies == "in a save" and step + 1 > KILLED)


def in_process(*arguments: Any) -> int:
    """Exit code of `run` in a process of its own."""
    preload()
    process = multiprocessing.get_context("forkserver").Process(target=run, args=arguments)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("whole") / "checkpoint.pt"
    assert in_process(path, False, None) == 0
    return torch.load(path, weights_only=True)


REPEATED = pytest.mark.full  # when there is nothing half done, or what another case has half done


@pytest.mark.parametrize(
    ("dies", "in_backward"),
    [
        pytest.param("in backward", False, marks=REPEATED),
        ("in backward", True),
        ("in the step", False),
        pytest.param("in the step", True, marks=REPEATED),
        ("in a save", False),
        pytest.param("in a save", True, marks=REPEATED),
    ],
)
def test_a_run_of_three_rules_that_is_killed_resumes_to_the_bit(dies, in_backward, undisturbed, tmp_path):
    path = tmp_path / "checkpoint.pt"
    assert in_process(path, in_backward, dies) == -signal.SIGKILL
    left = torch.load(path, weights_only=True)
    assert len(left["losses"]) == SAVED
    assert in_process(path, in_backward, None) == 0
    resumed = torch.load(path, weights_only=True)
    assert resumed["losses"] == undisturbed["losses"]
    assert_equal(resumed["model"], undisturbed["model"])
    expected = undisturbed["optimizer"]["state"]
    assert any(tensor.dtype == torch.uint8 for state in expected.values() for tensor in state.values())
    for number, state in resumed["optimizer"]["state"].items():
        assert_equal(state, expected[number])
    assert any(not torch.equal(left["model"][name], tensor) for name, tensor in resumed["model"].items())


# ----------------------------------------------------------------------------------------------------------- in backward


def test_three_rules_in_backward_have_the_bits_of_ordinary_steps():
    usual, ours = llama(), llama()
    one, other = build(usual), build(ours)
    lo.update_in_backward(other[0])
    assert train(usual, *one, range(STEPS)) == train(ours, *other, range(STEPS))
    assert_equal(weights(ours), weights(usual))
    expected = states(one[0], usual)
    for name, state in states(other[0], ours).items():
        assert_equal(state, expected[name])
    assert distance(weights(usual), weights(llama())) > 1e-3


# --------------------------------------------------------------------------------------------------------------- sharded


def sharded() -> nn.Module:
    model = llama()
    for layer in model.model.layers:
        fully_shard(layer).set_force_sum_reduction_for_comms(True)
    return shard(model)


def train_sharded(
    model: nn.Module, optimizer: lo.LowRankOptimizer, scheduler: LambdaLR, steps: range, parts: list[int]
) -> None:
    """One process takes both halves of a batch, one after the other; of two processes, each takes one."""
    for step in steps:
        for part in parts:
            backward(model, step, part)
        for param in model.parameters():
            param.grad /= len(parts)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def first(folder: str) -> None:
    """Two processes against one, and checkpoints of both kinds after some steps."""
    rank = torch.distributed.get_rank()
    alone, spread = llama(), sharded()
    reference, optimizer = build(alone, exact_sums=True), build(spread, exact_sums=True)
    if rank == 0:
        train_sharded(alone, *reference, range(SHARDED_STEPS), [0, 1])
    train_sharded(spread, *optimizer, range(SAVED), [rank])
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = {
        "model": get_model_state_dict(spread, options=options),
        "optimizer": get_optimizer_state_dict(spread, optimizer[0], options=options),
        "scheduler": optimizer[1].state_dict(),
    }
    content = {"model": get_model_state_dict(spread), "optimizer": get_optimizer_state_dict(spread, optimizer[0])}
    dcp.save(content, checkpoint_id=f"{folder}/parts")
    if rank == 0:  # at once: host tensors in it are those of the optimizer
        torch.save(full, f"{folder}/full.pt")
    train_sharded(spread, *optimizer, range(SAVED, SHARDED_STEPS), [rank])
    found = weights(spread)
    if rank == 0:
        torch.save(found, f"{folder}/weights.pt")
        assert distance(found, weights(alone)) < 1e-6  # with `exact_sums` and equal gradients; mostly it is 0
        assert distance(found, weights(llama())) > 1e-3


def second(folder: str) -> None:
    rank = torch.distributed.get_rank()
    full = torch.load(f"{folder}/full.pt", weights_only=True)
    for kind in ("parts", "full"):
        torch.manual_seed(1)
        model = sharded()
        optimizer, scheduler = build(model, exact_sums=True)
        if kind == "parts":
            loaded = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
            dcp.load(loaded, checkpoint_id=f"{folder}/parts")
            options = StateDictOptions()
        else:
            loaded, options = full, StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            loaded = loaded if rank == 0 else {"model": {}, "optimizer": {}}
        set_model_state_dict(model, loaded["model"], options=options)
        set_optimizer_state_dict(model, optimizer, loaded["optimizer"], options=options)
        scheduler.load_state_dict(full["scheduler"])
        train_sharded(model, optimizer, scheduler, range(SAVED, SHARDED_STEPS), [rank])
        assert_equal(weights(model), torch.load(f"{folder}/weights.pt", weights_only=True))


def test_three_rules_on_shards_agree_with_one_process_and_resume_to_the_bit(tmp_path):
    spawn(2, first, str(tmp_path))
    spawn(2, second, str(tmp_path))
