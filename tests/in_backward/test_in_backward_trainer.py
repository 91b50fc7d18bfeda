"""Updates inside backward under the Trainer of transformers: accumulation, clipping, its log, checkpoints."""

import copy

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

import lowrank_optim as lo
from lowrank_optim.integrations.transformers import InBackward, LowRank
from tests.integrations.test_transformers_integration import (
    LOW_RANK,
    STEPS,
    Tokens,
    arguments,
    assert_same_weights,
    llama,
    logged,
)

pytestmark = pytest.mark.long


def trainer_for(out, *callbacks, data=None, options=LOW_RANK, **changes) -> Trainer:
    return Trainer(
        model=llama(),
        args=arguments(out, **changes),
        train_dataset=data or Tokens(),
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=(LowRank, dict(options)),
    )


class Watch(TrainerCallback):
    """Looks at gradients where a step begins and before the optimizer's step, and at what loggers see."""

    def __init__(self) -> None:
        self.left, self.kept, self.seen = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **_):
        self.left.append(sum(p.grad is not None for p in model.parameters()))
        self.kept.append(sum("micro_batches" in s for s in optimizer.state.values()))

    def on_substep_end(self, args, state, control, model=None, optimizer=None, **_):
        self.left.append(sum(p.grad is not None for p in model.parameters()))

    def on_log(self, args, state, control, logs=None, **_):
        self.seen += [logs["grad_norm"]] if "grad_norm" in logs else []


def test_without_accumulation_and_clipping_the_trainer_ends_at_the_same_bits_and_logs_the_same(tmp_path):
    usual = trainer_for(tmp_path / "usual", max_grad_norm=0.0)
    watch = Watch()
    ours = trainer_for(tmp_path / "ours", watch, InBackward(), max_grad_norm=0.0)
    for trainer in (usual, ours):
        trainer.train()
    assert_same_weights(usual.model, ours.model)
    assert logged(usual, "loss") == logged(ours, "loss")
    assert logged(usual, "learning_rate") == logged(ours, "learning_rate")
    assert logged(ours, "learning_rate") == pytest.approx([5e-3 * (1 - step / STEPS) for step in range(STEPS)])
    assert logged(ours, "grad_norm") == pytest.approx(logged(usual, "grad_norm"), rel=1e-5)
    assert watch.seen == logged(ours, "grad_norm")  # a logger that was registered before sees them, too
    assert watch.left == [0] * STEPS


def test_accumulation_equals_ordinary_stepping_and_keeps_no_gradients(tmp_path):
    data = Tokens(2)  # one micro-batch over and over: the first basis is that of ordinary stepping
    changes = {"gradient_accumulation_steps": 3, "max_grad_norm": 0.0, "per_device_train_batch_size": 2}
    options = {**LOW_RANK, "update_proj_gap": 4}
    usual = trainer_for(tmp_path / "usual", data=data, options=options, **changes, num_train_epochs=6, max_steps=-1)
    watch = Watch()
    ours = trainer_for(
        tmp_path / "ours", InBackward(), watch, data=data, options=options, **changes, num_train_epochs=6, max_steps=-1
    )
    for trainer in (usual, ours):
        trainer.train()
    assert usual.state.global_step == 6  # every step is short: one micro-batch of three
    assert_same_weights(usual.model, ours.model)
    assert set(watch.left + watch.kept) == {0}


def test_accumulation_with_short_last_steps_follows_ordinary_stepping(tmp_path):
    # 10 micro-batches of 2 in steps of 4: 4, 4 and 2 in each epoch.
    changes = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2, "max_steps": 9, "max_grad_norm": 0.0}
    # A subspace that no gradient decides, so that the first one is the same.
    options = {**LOW_RANK, "projector": "random"}
    usual = trainer_for(tmp_path / "usual", data=Tokens(20), options=options, **changes)
    watch = Watch()
    ours = trainer_for(tmp_path / "ours", InBackward(), watch, data=Tokens(20), options=options, **changes)
    for trainer in (usual, ours):
        trainer.train()
    assert logged(ours, "loss") == pytest.approx(logged(usual, "loss"), rel=1e-4)
    assert logged(ours, "learning_rate") == logged(usual, "learning_rate")
    assert logged(ours, "grad_norm") == pytest.approx(logged(usual, "grad_norm"), rel=0.1)  # a sketch of a small model
    assert set(watch.left + watch.kept) == {0}  # also the short steps end inside backward
    for p, q in zip(usual.model.parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-4)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_resumed_run_with_accumulation_clipping_and_scheduler_equals_the_undisturbed_one(accumulate, tmp_path):
    changes = {
        "gradient_accumulation_steps": accumulate,
        "per_device_train_batch_size": 2,
        "max_grad_norm": 0.3,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
    }
    straight = trainer_for(tmp_path, InBackward(), **changes)
    straight.train()
    checkpoint = tmp_path / f"checkpoint-{STEPS // 2}"
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert saved["param_groups"][0]["grad_norms"].shape == (2,)
    resumed = trainer_for(tmp_path, InBackward(), **changes)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_weights(straight.model, resumed.model)
    for key in ("loss", "learning_rate", "grad_norm"):
        assert logged(straight, key) == logged(resumed, key)
    assert min(logged(straight, "grad_norm")) > 0.3  # clipping was at work


def test_clipping_is_by_max_grad_norm_and_the_chosen_norm(tmp_path):
    data = Tokens(1)
    trainer = trainer_for(
        tmp_path, InBackward(clip="tensor"), data=data, per_device_train_batch_size=1, max_grad_norm=0.05
    )
    trainer.train()
    model = llama()
    optimizer = lo.GaLoreAdamW(
        lo.param_groups(model, rank=8, update_proj_gap=2, weight_decay=0.3), lr=5e-3, betas=(0.8, 0.95), eps=1e-6
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    batch = {name: value[None] for name, value in data[0].items()}
    for _ in range(STEPS):
        model(**batch).loss.backward()
        for param in model.parameters():
            nn.utils.clip_grad_norm_([param], 0.05)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for p, q in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_ordinary_stepping_is_back_when_training_ends_and_training_can_go_on(tmp_path):
    callback = InBackward()
    trainer = trainer_for(tmp_path, callback)
    trainer.train()
    assert callback.handle is None
    optimizer = trainer.optimizer.optimizer
    assert optimizer.last_grad_norm is None
    assert all(not p._post_accumulate_grad_hooks for p in trainer.model.parameters())
    trainer.train()
    assert all(norm > 0.0 for norm in logged(trainer, "grad_norm"))


class Interrupt(TrainerCallback):
    def on_substep_end(self, args, state, control, **_):
        raise KeyboardInterrupt


def test_training_can_begin_again_after_an_exception_within_a_step(tmp_path):
    callback, interrupt = InBackward(), Interrupt()
    model, args = llama(), arguments(tmp_path, gradient_accumulation_steps=2)
    optimizer = LowRank()(model, args, **LOW_RANK)
    trainer = Trainer(
        model=model, args=args, train_dataset=Tokens(), callbacks=[callback, interrupt], optimizers=(optimizer, None)
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(interrupt)
    trainer.train()
    assert trainer.state.global_step == STEPS


@pytest.mark.parametrize("same_callback", [False, True])
def test_a_second_trainer_of_a_model_whose_training_was_interrupted_says_what_to_do(same_callback, tmp_path):
    model, args = llama(), arguments(tmp_path, gradient_accumulation_steps=2)
    how = {
        "model": model,
        "args": args,
        "train_dataset": Tokens(),
        "optimizer_cls_and_kwargs": (LowRank, dict(LOW_RANK)),
    }
    callback = InBackward()
    first = Trainer(callbacks=[callback, Interrupt()], **how)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    twin = copy.deepcopy(model)
    for second in (callback if same_callback else InBackward(), None):  # with updates in backward, and without
        with pytest.raises(RuntimeError, match=r"q_proj.weight and 13 more parameters: .*UpdateInBackward.find"):
            Trainer(callbacks=[second] if second else [], **how).train()
    for handle in lo.UpdateInBackward.find(model.parameters()):
        handle.discard()
        handle.remove()
    second, reference = (
        Trainer(callbacks=[callback if same_callback else InBackward()], **{**how, "model": each})
        for each in (model, twin)
    )
    second.train()
    reference.train()
    assert second.state.global_step == STEPS
    assert_same_weights(model, twin)


def test_methods_that_cannot_accumulate_are_refused_when_training_starts(tmp_path):
    trainer = trainer_for(tmp_path, InBackward(), options={"method": "fira", "rank": 8}, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match=r"accumulate is 2, but residual='norm_scaled' \(FiraAdamW\)"):
        trainer.train()
