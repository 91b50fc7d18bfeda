"""Families of models in the Trainer of transformers: the factory, and updates in backward, on small random models.

Two steps on one batch. Every weight that had a gradient has moved, the losses are those of a plain loop, and which matrices are
low-rank is written down here, so that a change is seen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, Trainer, TrainingArguments

import lowrank_optim as lo
from lowrank_optim.integrations.transformers import InBackward, LowRank

pytestmark = pytest.mark.long

BATCH, LENGTH, WORDS = 2, 8, 48
SMALL: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}
LR, DECAY, RANK = 1e-2, 0.1, 8


def tokens(**names: int) -> dict[str, Tensor]:
    """Random tokens under these names, each with a seed."""
    draw = {name: torch.Generator().manual_seed(seed) for name, seed in names.items()}
    made = {name: torch.randint(2, WORDS, (BATCH, LENGTH), generator=generator) for name, generator in draw.items()}
    made["labels"][:, 0] = -100  # the Trainer counts it for some families, though nothing predicts it
    return made


def images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, 3, 8, 8), "labels": torch.tensor([0, 2])}


@dataclass(frozen=True)
class Family:
    """A class of transformers, the sizes of a small model, a batch, and the names of its low-rank parameters."""

    model: str
    config: str
    sizes: dict[str, Any]
    low_rank: dict[str, int]
    batch: Callable[[], dict[str, Tensor]] = lambda: tokens(input_ids=1, labels=1)

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        config: PretrainedConfig = getattr(transformers, self.config)(**self.sizes)
        return getattr(transformers, self.model)(config)


ATTENTION = {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 2}
MLP = {"gate_proj": 2, "up_proj": 2, "down_proj": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 4}

FAMILIES = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", SMALL, ATTENTION | MLP),
    "llama, tied": Family("LlamaForCausalLM", "LlamaConfig", SMALL | {"tie_word_embeddings": True}, ATTENTION | MLP),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": WORDS, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
        | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        {"c_attn": 2, "c_proj": 4, "c_fc": 2},
    ),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", SMALL | {"head_dim": 8}, ATTENTION | MLP),
    "mixtral": Family(
        "MixtralForCausalLM",
        "MixtralConfig",
        SMALL | EXPERTS,
        ATTENTION | {"gate_up_proj": 2, "down_proj": 2},  # the router stays dense
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
        | {"decoder_start_token_id": 0, "pad_token_id": 0},
        {"q": 6, "k": 6, "v": 6, "o": 6, "wi": 4, "wo": 4},
        lambda: tokens(input_ids=1, labels=2),
    ),
    "vit": Family(
        "ViTForImageClassification",
        "ViTConfig",
        {"image_size": 8, "patch_size": 4, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
        | {"num_attention_heads": 4, "num_labels": 3},
        ATTENTION | {"fc1": 2, "fc2": 2, "projection": 1},  # of patches: a convolution
        images,
    ),
}  # fmt: skip


def train(family: Family, out: str, *callbacks: Any, **options: Any) -> Trainer:
    """Two steps of the Trainer on one batch, without clipping."""
    batch = family.batch()
    rows = [{name: value[row] for name, value in batch.items()} for row in range(BATCH)]
    args = TrainingArguments(
        out, max_steps=2, num_train_epochs=2, logging_steps=1, per_device_train_batch_size=BATCH, learning_rate=LR,
        lr_scheduler_type="constant", weight_decay=DECAY, max_grad_norm=0.0, report_to=[], disable_tqdm=True, use_cpu=True,
        save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    low_rank = {"method": "galore", "rank": RANK, **options}
    trainer = Trainer(
        model=family.build(),
        args=args,
        train_dataset=rows,
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=(LowRank, low_rank),
    )
    trainer.train()
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_with_the_factory_and_in_backward_as_a_plain_loop_does(name, tmp_path):
    family = FAMILIES[name]
    torch.manual_seed(3)
    batch = family.batch()
    model = family.build().train()
    start = {key: value.detach().clone() for key, value in model.named_parameters()}
    groups = lo.param_groups(model, rank=RANK, weight_decay=DECAY)
    optimizer = lo.GaLoreAdamW(groups, lr=LR)
    expected, reached = [], set()
    for _ in range(2):
        loss = model(**batch).loss
        loss.backward()
        reached |= {key for key, value in model.named_parameters() if value.grad is not None and value.grad.any()}
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert expected[1] < expected[0]

    torch.manual_seed(3)
    usual = train(family, str(tmp_path))
    torch.manual_seed(3)
    in_backward = train(family, str(tmp_path), InBackward())
    assert losses(usual) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert losses(in_backward) == losses(usual)
    moved = {key for key, value in usual.model.named_parameters() if not torch.equal(value, start[key])}
    assert moved == reached
    assert len(reached) >= 0.9 * len(start)
    for key, value in usual.model.named_parameters():
        torch.testing.assert_close(value, dict(model.named_parameters())[key], rtol=0, atol=2e-6)
        assert torch.equal(value, dict(in_backward.model.named_parameters())[key]), key


@pytest.mark.parametrize("name", FAMILIES)
def test_the_low_rank_parameters_of_a_family_are_those_a_person_would_choose(name):
    groups = lo.param_groups(FAMILIES[name].build(), rank=RANK)
    chosen: dict[str, int] = {}
    for group in groups:
        for parameter in group["param_names"] if group["rank"] is not None else []:
            parts = [part for part in parameter.split(".") if part != "weight"]
            chosen[parts[-1]] = chosen.get(parts[-1], 0) + 1
    assert chosen == FAMILIES[name].low_rank
