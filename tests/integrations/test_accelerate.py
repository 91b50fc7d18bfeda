"""Accelerate on two gloo processes: DistributedDataParallel and FSDP2, against one process with the whole batch."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank_optim as lo
from tests.oracles.distributed_harness import spawn

pytestmark = pytest.mark.integration
pytest.importorskip("accelerate")

WORLD, STEPS, ROWS, WIDTH = 2, 4, 4, 24


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 40), nn.Tanh(), nn.Linear(40, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3))


def optimizer_for(model: nn.Module) -> lo.GaLoreAdamW:
    return lo.GaLoreAdamW(lo.param_groups(model, rank=8, update_proj_gap=3, proj_type="right"), lr=1e-2)


def batch(step: int, rank: int) -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank))


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(model(x), x[:, :3])


def alone() -> list[torch.Tensor]:
    """The weights after training in one process on the batches of all."""
    model = network()
    optimizer = optimizer_for(model)
    for step in range(STEPS):
        loss_of(model, torch.cat([batch(step, rank) for rank in range(WORLD)])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def accelerator(sharded: bool):
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState

    rank = str(torch.distributed.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(WORLD), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    state = PartialState(cpu=True)
    assert state.num_processes == WORLD
    if not sharded:
        return Accelerator(cpu=True)
    # Accelerate shards where it sees GPUs; what it calls then runs on gloo as well.
    state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=100)
    return Accelerator(cpu=True, fsdp_plugin=plugin)


def train(accelerator, model, optimizer, steps=range(STEPS)) -> None:
    for step in steps:
        accelerator.backward(loss_of(model, batch(step, accelerator.process_index)))
        optimizer.step()
        optimizer.zero_grad()


def whole(model: nn.Module) -> list[torch.Tensor]:
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]


def assert_close(model: nn.Module, expected: list[torch.Tensor]) -> None:
    for p, q in zip(whole(model), expected, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5)


def replicated() -> None:
    """DDP: model and optimizer go through `prepare` together; a saved state resumes to the bit."""
    with_ddp = accelerator(sharded=False)
    model = network()
    model, optimizer = with_ddp.prepare(model, optimizer_for(model))
    assert isinstance(model, nn.parallel.DistributedDataParallel)
    train(with_ddp, model, optimizer)
    assert_close(model, alone())


def sharded_model(with_fsdp) -> tuple[nn.Module, object]:
    # FSDP2 replaces the parameters, and Accelerate wants an optimizer beside the model: a placeholder goes along.
    model = network()
    model, _ = with_fsdp.prepare(model, torch.optim.SGD(model.parameters()))
    return model, with_fsdp.prepare_optimizer(optimizer_for(model))


def sharded(in_backward: bool) -> None:
    from torch.distributed.tensor import DTensor

    with_fsdp = accelerator(sharded=True)
    model, optimizer = sharded_model(with_fsdp)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    if in_backward:
        lo.update_in_backward(optimizer.optimizer)
    train(with_fsdp, model, optimizer)
    assert_close(model, alone())


def resumed(folder: str) -> None:
    from torch.distributed.checkpoint import load, save
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    with_fsdp = accelerator(sharded=True)
    model, optimizer = sharded_model(with_fsdp)
    train(with_fsdp, model, optimizer, range(2))
    weights, state = get_state_dict(model, optimizer.optimizer)
    save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    train(with_fsdp, model, optimizer, range(2, STEPS))
    other, second = sharded_model(with_fsdp)
    weights, state = get_state_dict(other, second.optimizer)
    load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(other, second.optimizer, model_state_dict=weights, optim_state_dict=state)
    train(with_fsdp, other, second, range(2, STEPS))
    for p, q in zip(whole(model), whole(other), strict=True):
        assert torch.equal(p, q)


def prepared_together(in_backward: bool) -> None:
    """Accelerate replaces the parameters in the optimizer; before the first step, it takes them in."""
    from torch.distributed.tensor import DTensor

    with_fsdp = accelerator(sharded=True)
    model = network()
    model, optimizer = with_fsdp.prepare(model, optimizer_for(model))
    if in_backward:
        lo.update_in_backward(optimizer.optimizer)
    train(with_fsdp, model, optimizer)
    assert set(optimizer.optimizer.state) == set(model.parameters())
    assert isinstance(next(iter(optimizer.optimizer.state.values()))["exp_avg"], DTensor)
    assert_close(model, alone())


def by_the_trainer(folder: str, in_backward: bool) -> None:
    """The Trainer prepares model and optimizer together, and resumes from a sharded checkpoint."""
    from accelerate import DistributedType, PartialState
    from torch.distributed.tensor import DTensor
    from transformers import Trainer

    from lowrank_optim.integrations.transformers import InBackward, LowRank
    from tests.integrations.test_transformers_integration import LOW_RANK, Tokens, arguments, llama

    accelerator(sharded=False)
    layers = {"version": 2, "fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    # The sharded checkpoint of a Trainer has no place for the last norm, by which updates in backward clip.
    clip = 0.0 if in_backward else 1.0
    trained = []
    for resume in (None, f"{folder}/checkpoint-2"):
        args = arguments(
            folder,
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=2,
            max_grad_norm=clip,
            fsdp=True,
            fsdp_config=dict(layers),
        )
        assert args.device.type == "cpu"  # which sets up the state that is changed here
        PartialState()._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        trainer = Trainer(
            model=llama(),
            args=args,
            train_dataset=Tokens(),
            callbacks=[InBackward()] if in_backward else [],
            optimizer_cls_and_kwargs=(LowRank, {**LOW_RANK, "proj_type": "right"}),
        )
        trainer.train(resume_from_checkpoint=resume)
        assert all(isinstance(p, DTensor) for p in trainer.model.parameters())
        trained.append(trainer)
    straight, resumed = trained
    losses, again = ([entry.get("loss") for entry in trainer.state.log_history] for trainer in trained)
    assert losses == again
    for p, q in zip(whole(straight.model), whole(resumed.model), strict=True):
        assert torch.equal(p, q)


def prepared_too_late() -> None:
    with_fsdp = accelerator(sharded=True)
    model = network()
    optimizer = optimizer_for(model)
    loss_of(model, batch(0, 0)).backward()
    optimizer.step()
    optimizer.zero_grad()
    model, optimizer = with_fsdp.prepare(model, optimizer)
    with pytest.raises(RuntimeError, match=r"was replaced by a parameter .* build the optimizer when the model has"):
        train(with_fsdp, model, optimizer)


def test_ddp_trains_as_one_process_does():
    spawn(WORLD, replicated)


@pytest.mark.parametrize("in_backward", [False, True])
def test_fsdp2_trains_as_one_process_does(in_backward):
    spawn(WORLD, sharded, in_backward)


def test_fsdp2_resumes_to_the_bit(tmp_path: Path):
    spawn(WORLD, resumed, str(tmp_path / "saved"))


@pytest.mark.parametrize("in_backward", [False, True])
def test_model_and_optimizer_may_be_prepared_for_fsdp2_together(in_backward):
    spawn(WORLD, prepared_together, in_backward)


@pytest.mark.parametrize("in_backward", [False, True])
def test_the_trainer_shards_with_fsdp2_and_resumes_to_the_bit(in_backward, tmp_path):
    spawn(WORLD, by_the_trainer, str(tmp_path), in_backward)


def test_an_optimizer_with_a_history_is_refused_and_says_what_to_do():
    spawn(WORLD, prepared_too_late)
