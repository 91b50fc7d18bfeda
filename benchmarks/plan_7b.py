"""The planner's numbers for LLaMA-7B (and 13B): the tables of README and docs, the targets, the longest sequences. Needs no GPU.

Every row is a simulation of all layers, batch 1 × 2048, bfloat16 weights and arithmetic, rank 1024, for CUDA. The state of the
reductions is that of a whole step, against AdamW's with bfloat16 moments (26.9 GB).
"""

import time
from typing import Any

from common import write

import lowrank_optim as lo
from lowrank_optim.planner.search import Question, Recipe, what_fits
from lowrank_optim.planner.simulation.allocator import GIB

IN_BACKWARD = {"in_backward": True}
ROWS: dict[str, dict[str, Any]] = {
    "AdamW": {"optimizer": "adamw"},
    "AdamW, one tensor at a time": {"optimizer": ("adamw", {"foreach": False})},
    "8-bit AdamW (bitsandbytes, by formula)": {"optimizer": "adamw_8bit"},
    "GaLore, float32 state": {"optimizer": ("galore", {"rank": 1024})},
    "GaLore, bfloat16 state": {"optimizer": ("galore", {"rank": 1024, "state_bits": 16, "basis_bits": 16})},
    "GaLore 8-bit, in backward": {"optimizer": ("galore_8bit", {"rank": 1024}), **IN_BACKWARD},
    "GaLore 8-bit, float32 basis, in backward": {
        "optimizer": ("galore_8bit", {"rank": 1024, "basis_bits": 32}),
        **IN_BACKWARD,
    },
    "GaLore 8-bit, 16-bit basis, in backward": {
        "optimizer": ("galore_8bit", {"rank": 1024, "basis_bits": 16}),
        **IN_BACKWARD,
    },
    "GaLore 8-bit, 4-bit basis, in backward": {
        "optimizer": ("galore_8bit", {"rank": 1024, "basis_bits": 4}),
        **IN_BACKWARD,
    },
    "Q-GaLore, bfloat16 weights, in backward": {"optimizer": ("qgalore", {"rank": 1024}), **IN_BACKWARD},
    "Q-GaLore, int8 weights, in backward": {"optimizer": ("qgalore", {"rank": 1024}), "weight_bits": 8, **IN_BACKWARD},
    "APOLLO-Mini, in backward": {"optimizer": "apollo_mini", **IN_BACKWARD},
    "APOLLO-Mini, 8-bit state, in backward": {"optimizer": ("apollo_mini", {"state_bits": 8}), **IN_BACKWARD},
    "SinkGD, in backward": {"optimizer": "sinkgd", **IN_BACKWARD},
    "SCALE, in backward": {"optimizer": "scale", **IN_BACKWARD},
    "SCALE, int8 weights, in backward": {"optimizer": "scale", "weight_bits": 8, **IN_BACKWARD},
    "LISA, 2 layers, in backward": {"optimizer": "lisa", **IN_BACKWARD},
    "SLTrain 8-bit, in backward": {
        "optimizer": ("LowRankOptimizer", {"rule": "adam", "state_bits": 8}),
        "parametrization": ("sltrain", {"rank": 1024, "density": 0.05}),
        **IN_BACKWARD,
    },
}
SHORT = ("AdamW", "AdamW, one tensor at a time", "GaLore 8-bit, in backward", "SLTrain 8-bit, in backward")
"""Rows that are planned with 1 × 256 tokens, too: the batch of the published measurement of SLTrain."""


def row(model: str, checkpointing: bool = True, length: int = 2048, **how: Any) -> dict[str, Any]:
    """One plan as numbers, with the seconds it took."""
    began = time.perf_counter()
    plan = lo.plan(model, sequence_length=length, activation_checkpointing=checkpointing, **how)
    kept = plan.parts() | {"peak": plan.peak_bytes, "reserved": plan.reserved_bytes, "needed": plan.needed_bytes}
    kept |= {"when": plan.when, "state": plan.state, "whole_state": sum(plan.state.values())}
    return kept | {"seconds": round(time.perf_counter() - began, 1), "setting": plan.setting}


def say(name: str, found: dict[str, Any], adamw_state: int) -> None:
    sizes = "  ".join(
        f"{found[k] / GIB:6.2f}" for k in ("weights", "gradients", "optimizer_state", "activations", "temporaries")
    )
    saved = 1.0 - found["whole_state"] / adamw_state
    print(
        f"{name:<42} {sizes}  peak {found['peak'] / GIB:6.2f}  needed {found['needed'] / GIB:6.2f} GiB  state −{saved:.1%}  "
        f"({found['seconds']} s)",
        flush=True,
    )


def longest_without_checkpointing(budget: int) -> dict[str, int]:
    """Tokens of one sequence that fit with all activations kept, for the 8-bit GaLores."""
    recipes = tuple(
        Recipe(f"GaLore 8-bit, {bits}-bit basis", "galore_8bit", "", {"basis_bits": bits}) for bits in (32, 16, 8, 4)
    )
    question = Question("llama-7b", budget, 1, 256, 1024, activation_checkpointing=False)
    return {found.title: found.longest_sequence for found in what_fits(question, recipes)}


def main() -> None:
    results: dict[str, Any] = {"7b": {}, "13b": {}}
    adamw_state = 0
    for name, how in ROWS.items():
        results["7b"][name] = row("llama-7b", **how)
        adamw_state = adamw_state or results["7b"][name]["whole_state"]
        say(name, results["7b"][name], adamw_state)
    results["7b, 256 tokens"] = {}
    for name in SHORT:
        found = results["7b, 256 tokens"][name] = row("llama-7b", length=256, **ROWS[name])
        say(f"{name}, 256 tokens", found, adamw_state)
    results["peak_of_sltrain"] = {
        f"over {name}, {tokens} tokens": results[part]["SLTrain 8-bit, in backward"]["peak"]
        / results[part][name]["peak"]
        for part, tokens in (("7b", 2048), ("7b, 256 tokens", 256))
        for name in SHORT[:-1]
    }
    print(results["peak_of_sltrain"])
    for name in ("GaLore 8-bit, in backward", "GaLore 8-bit, 4-bit basis, in backward"):
        found = results["7b"][f"{name}, no checkpointing"] = row("llama-7b", checkpointing=False, **ROWS[name])
        say(f"{name}, no checkpointing", found, adamw_state)
    results["longest_sequence_without_checkpointing_24GiB"] = longest_without_checkpointing(24 * GIB)
    print(results["longest_sequence_without_checkpointing_24GiB"])
    thirteen = {
        "Q-GaLore rank 1280, int8 weights, in backward": {"optimizer": ("qgalore", {"rank": 1280}), "weight_bits": 8},
        "Q-GaLore rank 1024, int8 weights, in backward": {"optimizer": ("qgalore", {"rank": 1024}), "weight_bits": 8},
        "Q-GaLore rank 512, int8 weights, in backward": {"optimizer": ("qgalore", {"rank": 512}), "weight_bits": 8},
        "APOLLO-Mini 8-bit, int8 weights, in backward": {
            "optimizer": ("apollo_mini", {"state_bits": 8}),
            "weight_bits": 8,
        },
    }
    for name, how in thirteen.items():
        results["13b"][name] = row("llama-13b", in_backward=True, **how)
        say(f"13B, {name}", results["13b"][name], 4 * 13_015_864_320)
    recipes = (Recipe("Q-GaLore, int8 weights", "qgalore", "", {}, weight_bits=8),)
    fitting = what_fits(Question("llama-13b", 24 * GIB, rank=1024), recipes)[0]
    results["13b"]["largest in 24 GiB at rank 1024"] = fitting.to_dict()
    holds = f"{fitting.largest_batch} sequences of 2048, longest {fitting.longest_sequence} rank {fitting.largest_rank}"
    print(f"13B in 24 GiB: {holds}")
    write("plan_7b", results)


if __name__ == "__main__":
    main()
