"""Will a run fit? The planner's answer for a configuration, the limit of the CUDA allocator, and the presets of `--config`."""

from dataclasses import dataclass
from typing import Any

import torch

import lowrank_optim as lo
from lowrank_optim.planner import PlanError
from lowrank_optim.planner.memory_plan import MemoryPlan, describe_plan
from lowrank_optim.planner.report import budget_table as show
from lowrank_optim.planner.search import Question, what_fits
from lowrank_optim.planner.simulation.allocator import CUDA_CONTEXT
from pretraining.baselines import BASELINES
from pretraining.configs import SIZES
from pretraining.layers import density_of, parametrize
from pretraining.run import Config, RunError, make_optimizer

VOCABULARY = 32_000


@dataclass(frozen=True)
class Budget:
    """What a card has, in bytes."""

    size: int

    def limit(self, device: torch.device) -> None:
        """Let torch's allocator take no more than the budget without the CUDA context; an error where the card has less."""
        total = torch.cuda.get_device_properties(device).total_memory
        if self.size > total:
            raise RunError(f"--budget is {self.size / 2**30:.1f} GiB, but the card has {total / 2**30:.1f} GiB")
        torch.cuda.set_per_process_memory_fraction((self.size - CUDA_CONTEXT) / total, device)


def preset(size: str, optimizer: str | None, parametrization: str = "none") -> dict[str, Any]:
    """What `--config SIZE` stands for, as defaults of other arguments: one card, updates in backward, sequences of 2048.

    With "qgalore", weights in int8. The rank is a quarter of the hidden size where the method takes one. Layers with a
    parametrization have that rank, and 8-bit state.
    """
    if parametrization != "none":
        others = {"rank": max(1, SIZES[size].hidden // 4), "in_backward": True, "option": ["state_bits=8"]}
        return preset(size, "adamw") | others
    optimizer = optimizer or "galore_8bit"
    ranked = optimizer in lo.METHODS and optimizer != "apollo_mini" and not lo.METHODS[optimizer].matrix_options
    return {
        "model": size,
        "optimizer": optimizer,
        "batch": 1,
        "length": 2048,
        "dtype": "bfloat16",
        "rank": max(1, SIZES[size].hidden // 4) if ranked else None,
        "bpe": VOCABULARY,
        "in_backward": optimizer not in BASELINES,
        "grad_checkpointing": True,
        "weight_bits": 8 if optimizer == "qgalore" else 16,
    }


def fields(config: Config, vocabulary: int) -> dict[str, Any]:
    """The config.json of the model that `build_model` makes."""
    size = SIZES[config.model]
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "hidden_size": size.hidden,
        "intermediate_size": size.ffn,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "max_position_embeddings": max(size.positions, config.length),
    }


def plan_run(config: Config, vocabulary: int, device: torch.device) -> MemoryPlan:
    """The memory that a run takes.

    Raises:
        RunError: it cannot be planned, and why.
    """
    if config.dtype == "autocast":
        raise RunError("--budget cannot plan --dtype autocast; use float32 or bfloat16")
    try:
        found = lo.plan(
            fields(config, vocabulary),
            lambda model: make_optimizer(config, model),
            batch_size=config.batch,
            sequence_length=config.length,
            dtype=config.dtype,
            # A function hides what it builds: updates in backward are the handle's business, not the name's.
            in_backward=config.in_backward,
            activation_checkpointing=config.grad_checkpointing,
            accumulate=config.accumulate,
            weight_bits=config.weight_bits,
            parametrization=None if config.parametrization == "none" else lambda model: parametrize(config, model),
            device=device,
        )
    except PlanError as error:
        raise RunError(f"--budget: {error}") from error
    found.setting.update(model=f"LLaMA {config.model}", optimizer=config.optimizer, options={"rank": config.rank})
    if config.parametrization != "none":
        layers = {"name": config.parametrization, "rank": config.rank, "density": density_of(config)}
        found.setting.update(options={}, parametrization=layers)
    return found


def refusal(config: Config, vocabulary: int, budget: int, found: MemoryPlan) -> str:
    """Why a run does not fit, and what does."""
    question = Question(
        fields(config, vocabulary),
        budget,
        config.batch,
        config.length,
        config.rank if isinstance(config.rank, int) else None,
        config.dtype,
        config.grad_checkpointing,
        found.setting["device"].partition(":")[0],
    )
    rows = what_fits(question)
    return "\n\n".join([describe_plan(found, budget), "What fits:", show.table(question, rows)])
