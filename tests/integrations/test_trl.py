"""TRL: SFTTrainer and DPOTrainer with the factory, with updates in backward, and with peft."""

import pytest
import torch

import lowrank_optim as lo
from lowrank_optim.integrations.transformers import InBackward, LowRank
from tests.oracles import chat

pytestmark = pytest.mark.integration
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

LOW_RANK = {"method": "galore", "rank": 8, "update_proj_gap": 2}
STEPS = 4
COMMON = {
    "max_steps": STEPS,
    "save_steps": STEPS // 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_length": 64,
    "dataloader_pin_memory": False,
}


def sft(out, *callbacks, model=None, options=LOW_RANK, **changes):
    return trl.SFTTrainer(
        model=model or chat.model(),
        args=trl.SFTConfig(str(out), **{**COMMON, "assistant_only_loss": True, **changes}),
        train_dataset=datasets.Dataset.from_list(chat.chats()),
        processing_class=chat.tokenizer(),
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=(LowRank, dict(options)),
    )


def preferences():
    return datasets.Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"{n} plus {n}?"}],
                "chosen": [{"role": "assistant", "content": f"{2 * n}."}],
                "rejected": [{"role": "assistant", "content": f"{2 * n + 1}!"}],
            }
            for n in range(8)
        ]
    )


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_weights(model, other) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_sft_learns_and_resumes_to_the_bit(tmp_path):
    straight = sft(tmp_path)
    straight.train()
    optimizer = straight.optimizer.optimizer
    assert type(optimizer) is lo.GaLoreAdamW
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    assert losses(straight)[-1] < losses(straight)[0] - 0.3
    resumed = sft(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert_same_weights(straight.model, resumed.model)
    assert losses(straight) == losses(resumed)


def test_sft_in_backward_with_accumulation_clipping_and_activation_checkpoints_resumes_to_the_bit(tmp_path):
    changes = {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 1,
        "gradient_checkpointing": True,
        "max_grad_norm": 0.5,
    }
    straight = sft(tmp_path, InBackward(), **changes)
    straight.train()
    assert min(entry["grad_norm"] for entry in straight.state.log_history if "grad_norm" in entry) > 0.5
    assert losses(straight)[-1] < losses(straight)[0]
    assert all(p.grad is None for p in straight.model.parameters())
    resumed = sft(tmp_path, InBackward(), **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert_same_weights(straight.model, resumed.model)


def test_sft_in_backward_is_sft(tmp_path):
    usual = sft(tmp_path / "usual", max_grad_norm=0.0)
    ours = sft(tmp_path / "ours", InBackward(), max_grad_norm=0.0)
    for trainer in (usual, ours):
        trainer.train()
    assert_same_weights(usual.model, ours.model)


def dpo(out, *, factory: bool, **changes):
    model = chat.model()
    args = trl.DPOConfig(str(out), **{**COMMON, "learning_rate": 2e-3, "max_grad_norm": 0.0, **changes})
    # DPOTrainer takes no optimizer_cls_and_kwargs: a built optimizer, or the attribute that the Trainer reads.
    built = (None, None) if factory else (LowRank()(model.to(args.device), args, **LOW_RANK), None)
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=chat.model(),
        args=args,
        train_dataset=preferences(),
        processing_class=chat.tokenizer(),
        optimizers=built,
    )
    if factory:
        trainer.optimizer_cls_and_kwargs = (LowRank, dict(LOW_RANK))
    return trainer


def test_dpo_learns_by_a_built_optimizer_and_by_the_attribute_alike(tmp_path):
    built, attribute = (dpo(tmp_path / str(factory), factory=factory) for factory in (False, True))
    reference = chat.model()
    for trainer in (built, attribute):
        trainer.train()
        assert type(trainer.optimizer.optimizer) is lo.GaLoreAdamW
    assert losses(built)[0] == pytest.approx(0.6931, abs=1e-3)  # log 2: the model is its own reference
    assert losses(built)[-1] < 0.67
    assert_same_weights(built.model, attribute.model)
    assert any(not torch.equal(p, q) for p, q in zip(built.model.parameters(), reference.parameters(), strict=True))


def test_dpo_in_backward_learns_the_same(tmp_path):
    usual, ours = dpo(tmp_path / "usual", factory=True), dpo(tmp_path / "ours", factory=True)
    ours.add_callback(InBackward())
    for trainer in (usual, ours):
        trainer.train()
    assert losses(usual) == pytest.approx(losses(ours), rel=1e-5)


def test_sft_of_a_lora_model_trains_the_adapter_alone(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        chat.model(), peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    )
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = sft(tmp_path, model=model, options={**LOW_RANK, "rank": 4})
    trainer.train()
    moved = {n for n, value in trainer.model.named_parameters() if not torch.equal(value, before[n])}
    assert moved == {name for name in before if "lora_" in name}
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_the_example_for_fine_tuning_learns_and_resumes_by_trl(tmp_path):
    from tests.integrations.test_finetune import assert_resumes

    assert_resumes(chat.save(tmp_path / "model"), tmp_path / "out", "trl")
