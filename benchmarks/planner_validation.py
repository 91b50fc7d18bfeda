"""The planner's prediction beside the measured peak, on the CPU: small models, with and without updates in backward, checkpointing.

LLaMAs with every optimizer; with --families, a model of each other family (`FAMILIES`) with two.

Measured is what torch's CPU allocator handed out, event by event, as the profiler records it: kernels' own working memory is in it,
which the planner does not see. oneDNN is off: its scratch memory depends on the processor, and on one with units for bfloat16 a
product of a small model takes up to half a megabyte. Three real steps, from the building of the model on. With "long" batches most
memory is activations, with "short" ones weights, state and the optimizer's working copies (not shorter than the rank in tokens:
gradients of fewer directions than the rank take Householder QR, and more memory). On a GPU, benchmarks/gpu/seven_b.py compares
likewise.
"""

import argparse
import math
from typing import Any

import torch
from common import write
from torch.profiler import ProfilerActivity, profile

import lowrank_optim as lo
from lowrank_optim.planner.choices import resolve_optimizer
from lowrank_optim.planner.models import ModelChoice, resolve_model
from lowrank_optim.planner.parametrizations import resolve_parametrization
from lowrank_optim.planner.simulation.simulate import checkpoint_activations

CONFIG = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "tie_word_embeddings": False,
}
SMALL = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
IMAGES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 4,
}
WINDOWS = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": SMALL | {"model_type": "qwen3", "tie_word_embeddings": True},
    "gemma3": SMALL | WINDOWS | {"model_type": "gemma3_text"},
    "mistral": SMALL | {"model_type": "mistral", "sliding_window": 64},
    "phi": SMALL | {"model_type": "phi"},
    "phi3": SMALL | {"model_type": "phi3", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "gpt_oss": SMALL | WINDOWS | EXPERTS | {"model_type": "gpt_oss"},
    "mixtral": SMALL | EXPERTS | {"model_type": "mixtral"},
    "qwen3_moe": SMALL | EXPERTS | {"model_type": "qwen3_moe", "moe_intermediate_size": 128},
    "vit": IMAGES | {"model_type": "vit", "image_size": 16, "num_channels": 3, "num_labels": 100},
    "dit": IMAGES | {"model_type": "dit", "image_size": 16, "num_channels": 4, "num_labels": 100},
}
"""The config of a small model of each family."""

OPTIMIZERS: tuple[Any, ...] = (
    *("adamw", ("adamw", {"foreach": True}), "sgd", ("galore", {"rank": 64}), ("galore_8bit", {"rank": 64})),
    *(("qgalore", {"rank": 64}), ("fira", {"rank": 64}), ("apollo", {"rank": 64}), "apollo_mini"),
    *(("ldadam", {"rank": 64, "error_feedback": False}), ("frugal", {"density": 0.25}), "lisa", "badam"),
)
BATCHES = {"long": (4, 256), "short": (1, 128), "images": (32, 1)}
LIMIT, FAMILY_LIMIT = 0.03, 0.04


def measure(
    optimizer: Any,
    batch: tuple[int, int],
    in_backward: bool,
    checkpointing: bool,
    dtype: torch.dtype,
    weight_bits: int,
    parametrization: Any = None,
    config: dict[str, Any] = CONFIG,
) -> int:
    """Bytes that were allocated at once, at most, by building a model and its optimizer and taking three steps."""
    resolved = resolve_model(config)
    bare, inputs = resolved.build(dtype, None), example(resolved, batch)
    if (layers := resolve_parametrization(parametrization)) is not None:
        bare = layers.convert(bare)
    recorded = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with torch.backends.mkldnn.flags(enabled=False), recorded as record:
        model = bare.to_empty(device="cpu")
        if hasattr(model, "tie_weights"):  # of which to_empty makes two
            model.tie_weights()
        initialize(model)
        if weight_bits == 8:
            model = lo.nn.quantize_weights_(model)
        if checkpointing:
            checkpoint_activations(model)
        chosen = resolve_optimizer(optimizer).build(model)
        if in_backward:
            lo.update_in_backward(chosen)
        given = {name: tensor.clone() for name, tensor in inputs.items()}
        for _ in range(3):
            model(**given)["loss"].backward()
            chosen.step()
            chosen.zero_grad()
    now = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def example(model: ModelChoice, batch: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Random inputs of the shapes that the planner plans for."""
    torch.manual_seed(0)
    shapes = model.batch(*batch)
    return {
        name: torch.randn(t.shape) if t.is_floating_point() else torch.randint(0, 100, t.shape)
        for name, t in shapes.items()
    }


def initialize(model: torch.nn.Module) -> None:
    """Numbers that train: the model was made without any."""
    torch.manual_seed(0)
    for name, param in model.named_parameters():
        matrix = param.dim() > 1 or name.endswith("sparse_value")
        torch.nn.init.normal_(param, std=1.0 / math.sqrt(256)) if matrix else torch.nn.init.ones_(param)
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            buffer.fill_(0.1)


def cases(quick: bool) -> list[dict[str, Any]]:
    """Every optimizer, both batches, with and without updates in backward and checkpointing; int8 weights, bfloat16, SLTrain."""
    found = []
    for optimizer in OPTIMIZERS[3:5] if quick else OPTIMIZERS:
        ours = resolve_optimizer(optimizer).updates_in_backward
        for batch in ("long", "short"):
            for in_backward in (False, True) if ours else (False,):
                for checkpointing in (False, True):
                    case = {"optimizer": optimizer, "batch": batch, "in_backward": in_backward}
                    found.append(case | {"checkpointing": checkpointing, "dtype": "float32", "weight_bits": 16})
    last = {"batch": "short", "in_backward": True, "checkpointing": True}
    found.append({"optimizer": ("qgalore", {"rank": 64}), **last, "dtype": "bfloat16", "weight_bits": 8})
    found.append({"optimizer": ("galore_8bit", {"rank": 64}), **last, "dtype": "bfloat16", "weight_bits": 16})
    sltrain = {"optimizer": ("LowRankOptimizer", {"rule": "adam", "state_bits": 8}), "weight_bits": 16}
    sltrain["parametrization"] = ("sltrain", {"rank": 64, "density": 0.05})
    found.append(sltrain | last | {"dtype": "bfloat16"})
    found.append(sltrain | {"batch": "long", "in_backward": False, "checkpointing": False, "dtype": "float32"})
    return found


def of_family(family: str) -> list[dict[str, Any]]:
    """AdamW as it is; GaLore with 8-bit state in backward, with everything that saves memory."""
    long, short = ("long", "short") if "vocab_size" in FAMILIES[family] else ("images", "images")
    plain = {"optimizer": "adamw", "batch": long, "in_backward": False, "checkpointing": False, "dtype": "float32"}
    galore = {"optimizer": ("galore_8bit", {"rank": 16}), "batch": short, "in_backward": True, "checkpointing": True}
    galore["dtype"] = "bfloat16"
    return [case | {"weight_bits": 16, "family": family} for case in (plain, galore)]


def compare(case: dict[str, Any]) -> dict[str, Any]:
    """One case with both numbers and the relative error of the prediction."""
    sequences, length = BATCHES[case["batch"]]
    config = FAMILIES[case["family"]] if "family" in case else CONFIG
    predicted = lo.plan(
        config,
        case["optimizer"],
        batch_size=sequences,
        sequence_length=length if "vocab_size" in config else None,
        dtype=case["dtype"],
        in_backward=case["in_backward"],
        activation_checkpointing=case["checkpointing"],
        weight_bits=case["weight_bits"],
        parametrization=case.get("parametrization"),
        device="cpu",
    )
    measured = measure(
        case["optimizer"],
        (sequences, length),
        case["in_backward"],
        case["checkpointing"],
        getattr(torch, case["dtype"]),
        case["weight_bits"],
        case.get("parametrization"),
        config,
    )
    error = predicted.peak_bytes / measured - 1.0
    return case | {
        "predicted": predicted.peak_bytes,
        "measured": measured,
        "error": round(error, 5),
        "when": predicted.when,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two optimizers only, nothing written")
    parser.add_argument("--families", action="store_true", help="the models of FAMILIES, to planner_families.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    limit = FAMILY_LIMIT if args.families else LIMIT
    results = []
    measure("adamw", BATCHES["short"], False, False, torch.float32, 16)  # what libraries allocate once, and keep
    of_families = [case for family in FAMILIES for case in of_family(family)]
    for case in of_families if args.families else cases(args.quick):
        results.append(row := compare(case))
        measured = f"{row['measured'] / 2**20:7.2f} MiB"
        print(
            f"{row.get('family', 'llama'):<9} {row['optimizer']!s:<40} {row['batch']:<6} in_backward={row['in_backward']!s:<6} "
            f"checkpointing={row['checkpointing']!s:<6} measured {measured}  {row['error']:+.2%}  {row['when']}"
        )
    worst = max(results, key=lambda row: abs(row["error"]))
    print(
        f"largest error {worst['error']:+.2%}: {worst['optimizer']}, {worst['batch']}, in_backward={worst['in_backward']}"
    )
    if not args.quick:
        write(
            "planner_families" if args.families else "planner_validation",
            {"limit": limit, "largest_error": worst["error"], "cases": results},
        )
    if abs(worst["error"]) > limit:
        raise SystemExit(f"the prediction is off by more than {limit:.0%}")


if __name__ == "__main__":
    main()
