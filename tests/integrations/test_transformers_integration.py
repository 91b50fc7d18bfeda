"""The Trainer of transformers with the LowRank factory, and loops that step with a closure."""

import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import lowrank_optim as lo
from lowrank_optim.integrations.transformers import InBackward, LowRank, Progress

pytestmark = pytest.mark.long

STEPS = 6
SETTINGS = {"learning_rate": 5e-3, "weight_decay": 0.3, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
LOW_RANK = {"method": "galore", "rank": 8, "update_proj_gap": 2}


class Tokens(Dataset):
    """Random token sequences; every pass gives the same."""

    def __init__(self, count: int = 32) -> None:
        self.tokens = torch.randint(0, 64, (count, 16), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config)


def arguments(out, **changes) -> TrainingArguments:
    fixed = {"max_steps": STEPS, "save_steps": STEPS // 2, "logging_steps": 1, "per_device_train_batch_size": 4}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    return TrainingArguments(str(out), **{**fixed, **quiet, **SETTINGS, **changes})


def trainer_with_factory(out, options=LOW_RANK, data=None, **changes) -> Trainer:
    return Trainer(
        model=llama(),
        args=arguments(out, **changes),
        train_dataset=data or Tokens(),
        optimizer_cls_and_kwargs=(LowRank, dict(options)),
    )


def logged(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry and "loss" in entry]


def assert_same_weights(model: torch.nn.Module, other: torch.nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


# What the factory hands on ------------------------------------------------------------------------------------------------------


def test_settings_of_training_arguments_arrive_in_the_groups(tmp_path):
    optimizer = trainer_with_factory(tmp_path).create_optimizer()
    assert isinstance(optimizer, lo.GaLoreAdamW)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.3, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (5e-3, (0.8, 0.95), 1e-6)
    low = optimizer.param_groups[0]
    assert (low["rank"], low["update_proj_gap"]) == (8, 2)


def test_norms_have_no_decay_and_embedding_and_head_are_dense(tmp_path):
    low, dense, no_decay = trainer_with_factory(tmp_path).create_optimizer().param_groups
    assert (len(low["param_names"]), low["rank"]) == (14, 8)
    assert (dense["param_names"], dense["rank"]) == (["model.embed_tokens.weight", "lm_head.weight"], None)
    assert len(no_decay["param_names"]) == 5
    assert all("norm" in name for name in no_decay["param_names"])
    assert no_decay["weight_decay"] == 0.0


def test_options_win_over_training_arguments(tmp_path):
    options = {**LOW_RANK, "lr": 1e-4, "betas": (0.7, 0.9), "eps": 1e-5, "weight_decay": 0.0, "include": "mlp"}
    low, *_, no_decay = trainer_with_factory(tmp_path, options).create_optimizer().param_groups
    assert (low["lr"], low["betas"], low["eps"], low["weight_decay"]) == (1e-4, (0.7, 0.9), 1e-5, 0.0)
    assert no_decay["lr"] == 1e-4
    assert all(".mlp." in name for name in low["param_names"])


def test_training_arguments_may_stand_among_the_kwargs_or_be_passed_positionally(tmp_path):
    other = arguments(tmp_path, weight_decay=0.05)
    from_kwargs = trainer_with_factory(tmp_path, {**LOW_RANK, "training_args": other}).create_optimizer()
    positional = LowRank()(llama(), other, **LOW_RANK)
    for optimizer in (from_kwargs, positional):
        assert [g["weight_decay"] for g in optimizer.param_groups] == [0.05, 0.05, 0.0]


def test_without_training_arguments_settings_are_never_lost_silently():
    with pytest.raises(ValueError, match=r"lr, weight_decay, betas, eps would be lost: add training_args=args"):
        LowRank()(llama(), **LOW_RANK)
    with pytest.raises(ValueError, match=r"so weight_decay would be lost"):
        LowRank()(llama(), lr=1e-3, betas=(0.9, 0.99), eps=1e-8, **LOW_RANK)
    optimizer = LowRank()(llama(), lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, **LOW_RANK)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.1, 0.0]


def test_a_caller_whose_args_are_something_else_is_not_taken_for_a_trainer():
    class Caller:
        args = SimpleNamespace(learning_rate=1.0)

        def create_optimizer(self):
            return LowRank()(llama(), **LOW_RANK)

    with pytest.raises(ValueError, match="cannot reach the TrainingArguments"):
        Caller().create_optimizer()


def test_adafactor_takes_lr_and_decay_and_warns_of_settings_that_it_cannot_take(tmp_path):
    options = {**LOW_RANK, "method": "galore_adafactor"}
    with pytest.warns(UserWarning, match=r"does not use TrainingArguments\.adam_beta1, .*adam_beta2, .*adam_epsilon"):
        optimizer = trainer_with_factory(tmp_path, options).create_optimizer()
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(5e-3, 0.3), (5e-3, 0.3), (5e-3, 0.0)]
    assert optimizer.param_groups[0]["eps"] == (1e-30, 1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unchanged = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
        LowRank()(llama(), unchanged, **options)


def test_optim_args_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"optim_args is 'rank=4'.*put these options into the kwargs"):
        trainer_with_factory(tmp_path, optim_args="rank=4").create_optimizer()


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("all-linear", 14),
        ("all_linear", 14),
        (["mlp"], 6),
        (["q_proj", r".*\.v_proj"], 4),
        (r".*\.self_attn\.\w_proj", 8),
    ],
)
def test_optim_target_modules_mean_what_they_mean_to_transformers(tmp_path, targets, count):
    optimizer = trainer_with_factory(tmp_path, optim_target_modules=targets).create_optimizer()
    assert len(optimizer.param_groups[0]["params"]) == count
    optimizer = trainer_with_factory(
        tmp_path, {**LOW_RANK, "include": "up_proj"}, optim_target_modules=targets
    ).create_optimizer()
    assert len(optimizer.param_groups[0]["params"]) == 2  # include wins


def test_method_may_be_a_class_and_a_misspelt_one_or_option_raises(tmp_path):
    args = arguments(tmp_path, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8)
    optimizer = LowRank()(llama(), args, method=lo.GaLoreAdafactor, rank=4, lr=None)
    assert (type(optimizer), optimizer.param_groups[0]["lr"]) == (lo.GaLoreAdafactor, 1.0)
    with pytest.raises(ValueError, match="galore"):
        LowRank()(llama(), args, method="galor", rank=8)
    with pytest.raises(TypeError, match="update_proj_gap"):
        LowRank()(llama(), args, rank=8, update_gap=3)
    with pytest.raises(ValueError, match="'q_porj' matches no parameter"):
        LowRank()(llama(), args, rank=8, include="q_porj")


def test_a_trainer_without_factories_is_told_what_to_do():
    groups = [{"params": list(llama().parameters()), "weight_decay": 0.0}]
    with pytest.raises(RuntimeError, match=r"optimizers=\(LowRank\(\)\(model"):
        LowRank(groups, **LOW_RANK)


# Training -----------------------------------------------------------------------------------------------------------------------


def test_the_trainer_takes_the_steps_of_a_plain_loop_with_the_same_settings(tmp_path):
    data = Tokens(1)  # one sequence: nothing depends on the order of the data
    trainer = trainer_with_factory(tmp_path, data=data, per_device_train_batch_size=1)
    trainer.train()

    model = llama()
    optimizer = lo.GaLoreAdamW(
        lo.param_groups(model, rank=8, update_proj_gap=2, weight_decay=0.3), lr=5e-3, betas=(0.8, 0.95), eps=1e-6
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    batch = {name: value[None] for name, value in data[0].items()}
    losses = []
    for _ in range(STEPS):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    torch.testing.assert_close(logged(trainer, "loss"), losses, rtol=1e-4, atol=1e-4)
    for p, q in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_logs_show_the_learning_rate_of_the_schedule(tmp_path):
    trainer = trainer_with_factory(tmp_path)
    trainer.train()
    assert logged(trainer, "learning_rate") == pytest.approx([5e-3 * (1 - step / STEPS) for step in range(STEPS)])


@pytest.mark.parametrize("callbacks", [[], [InBackward()]], ids=["step", "in backward"])
def test_progress_reports_from_within_steps_and_ends_with_the_training(callbacks, tmp_path):
    seen = []
    trainer = trainer_with_factory(tmp_path, max_steps=2, max_grad_norm=0.0)
    for callback in (*callbacks, Progress(every=0, report=seen.append)):
        trainer.add_callback(callback)
    trainer.train()
    assert [p.step for p in seen] == [1] * 21 + [2] * 21
    assert [p.done for p in seen] == [*range(1, 22)] * 2
    assert seen[0].total == 21
    assert trainer.optimizer.optimizer._watch is None
    plain = trainer_with_factory(tmp_path, max_steps=2, max_grad_norm=0.0)
    plain.train()
    assert_same_weights(plain.model, trainer.model)


def test_progress_of_another_optimizer_is_refused_when_training_starts(tmp_path):
    trainer = Trainer(model=llama(), args=arguments(tmp_path), train_dataset=Tokens(), callbacks=[Progress()])
    with pytest.raises(
        TypeError, match=r"watch_step needs an optimizer of lowrank_optim, got torch\.optim\.adamw\.AdamW"
    ):
        trainer.train()


def test_resume_from_a_checkpoint_is_exact_and_the_file_loads_with_weights_only(tmp_path):
    straight = trainer_with_factory(tmp_path)
    straight.train()
    checkpoint = tmp_path / f"checkpoint-{STEPS // 2}"
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert len(saved["state"]) == 21
    resumed = trainer_with_factory(tmp_path)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_weights(straight.model, resumed.model)
    assert logged(straight, "loss") == logged(resumed, "loss")
    states = [t.optimizer.state_dict()["state"] for t in (straight, resumed)]
    for index, state in states[0].items():
        assert all(torch.equal(value, states[1][index][name]) for name, value in state.items())


def test_an_optimizer_built_first_trains_as_the_factory_does_and_resumes(tmp_path):
    def with_optimizer(out) -> Trainer:
        model, args = llama(), arguments(out)
        optimizer = LowRank()(model.to(args.device), args, **LOW_RANK)
        return Trainer(model=model, args=args, train_dataset=Tokens(), optimizers=(optimizer, None))

    factory = trainer_with_factory(tmp_path / "factory")
    factory.train()
    built = with_optimizer(tmp_path / "built")
    built.train()
    assert_same_weights(factory.model, built.model)
    resumed = with_optimizer(tmp_path / "built")
    resumed.train(resume_from_checkpoint=str(tmp_path / "built" / f"checkpoint-{STEPS // 2}"))
    assert_same_weights(built.model, resumed.model)


def test_a_checkpoint_of_another_rank_is_refused(tmp_path):
    trainer_with_factory(tmp_path).train()
    other = trainer_with_factory(tmp_path, {**LOW_RANK, "rank": 4})
    with pytest.raises(ValueError, match="rank is 8 in the checkpoint, 4 here"):
        other.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))


def test_gradient_accumulation_in_the_trainer_equals_the_large_batch(tmp_path):
    weights = []
    for batch, accumulate in ((4, 1), (2, 2)):
        trainer = trainer_with_factory(
            tmp_path / str(batch),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            max_steps=3,
            save_strategy="no",
        )
        trainer.train()
        weights.append([p.detach() for p in trainer.model.parameters()])
    for large, accumulated in zip(*weights, strict=True):
        torch.testing.assert_close(large, accumulated, rtol=0, atol=2e-4)


def test_example_trains_and_resumes_to_equal_losses(tmp_path):
    path = Path(__file__).parents[2] / "examples" / "trainer.py"
    spec = importlib.util.spec_from_file_location("trainer_example", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    losses = example.main(["--steps", "20", "--hidden", "64", "--rank", "8", "--out", str(tmp_path)])
    assert losses["straight"] == losses["resumed"]
    assert losses["straight"][1] < 4.0  # chance is log 256 = 5.5


# Closures -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer_class", [lo.GaLoreAdamW, lo.GaLoreAdafactor])
def test_a_closure_that_zeroes_gradients_and_calls_backward_trains_as_the_plain_loop(optimizer_class):
    # Lightning's automatic optimization: everything, zero_grad included, happens inside step(closure).
    batches = torch.randint(0, 64, (2, 4, 16), generator=torch.Generator().manual_seed(2)).repeat(6, 1, 1)

    def build():
        model = llama()
        return model, optimizer_class(lo.param_groups(model, rank=8, update_proj_gap=5, weight_decay=0.1), lr=5e-3)

    plain_model, plain = build()
    plain_losses = []
    for tokens in batches:
        plain.zero_grad()
        loss = plain_model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        plain.step()
        plain_losses.append(loss.item())

    model, optimizer = build()
    grad_modes, losses = [], []
    for tokens in batches:

        def closure(tokens=tokens):
            grad_modes.append(torch.is_grad_enabled())
            loss = model(input_ids=tokens, labels=tokens).loss
            optimizer.zero_grad()
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())

    assert grad_modes == [True] * len(batches)
    assert losses == plain_losses
    assert losses[-1] < losses[0]
    assert_same_weights(plain_model, model)


# Imports ------------------------------------------------------------------------------------------------------------------------


def test_the_adapter_is_reached_by_attribute_without_importing_transformers():
    code = "import sys, lowrank_optim as lo; print(lo.integrations.transformers.LowRank.__name__, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["LowRank", "False"]
