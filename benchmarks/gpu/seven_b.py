"""LLaMA-7B on one GPU under a hard memory limit: does it train, how fast, and was the planner right?

    python benchmarks/gpu/seven_b.py            # everything, within nine minutes; writes benchmarks/results/seven_b.json
    python benchmarks/gpu/seven_b.py --only galore_8bit

Each run is a process of its own under torch.cuda.set_per_process_memory_fraction: the model with random weights, 30 steps on real
text (bytes of the standard library's source, as token ids of a vocabulary of 32,000), through one refresh of every subspace after the
first (the gap is 20). Recorded: peak allocated and reserved bytes of the steps, the plan's prediction beside them, median time of a
step and tokens/s, losses. AdamW and bitsandbytes' AdamW8bit run on the largest of the LLaMA sizes that the plan says they fit.

Without a GPU the plans are printed, and nothing else; `--device cpu --model 60m` tries the whole path on a small model.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

LOCAL = Path(__file__).resolve().parent
sys.path[:0] = [str(LOCAL.parent), str(LOCAL.parent.parent / "examples")]

from common import packages, write  # noqa: E402
from pretraining.configs import SIZES, build_model  # noqa: E402
from pretraining.data import standard_library  # noqa: E402

import lowrank_optim as lo  # noqa: E402
from lowrank_optim.planner.choices import resolve_optimizer  # noqa: E402
from lowrank_optim.planner.simulation.allocator import CUDA_CONTEXT, GIB  # noqa: E402

VOCABULARY, GAP, STEPS = 32_000, 20, 30
DESCENDING = ("13b", "7b", "3b", "1b", "350m", "130m", "60m")
RUNS: dict[str, dict[str, Any]] = {
    "galore_8bit": {"model": "7b", "budget": 24, "rank": 1024, "options": {}},
    "galore_8bit_basis_4": {
        "model": "7b",
        "budget": 24,
        "optimizer": "galore_8bit",
        "rank": 1024,
        "options": {"basis_bits": 4},
    },
    "qgalore": {"model": "7b", "budget": 16, "rank": 1024, "options": {}, "weight_bits": 8},
    "adamw": {"model": "largest", "budget": 24, "in_backward": False},
    "adamw_8bit": {"model": "largest", "budget": 24, "in_backward": False},
}


def spec(name: str, run: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The optimizer and its options, as the planner takes them."""
    options: dict[str, Any] = dict(run.get("options", {}))
    if "rank" in run:
        options |= {"rank": run["rank"], "update_proj_gap": GAP}
    return run.get("optimizer", name), options


def fields(size: str) -> dict[str, Any]:
    """The config.json of the model that `build_model` makes."""
    s = SIZES[size]
    return {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": s.hidden,
        "intermediate_size": s.ffn,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "tie_word_embeddings": False,
    }


def predict(name: str, run: dict[str, Any], size: str, device: str, length: int) -> Any:
    """The plan of a run."""
    return lo.plan(
        fields(size),
        spec(name, run),
        sequence_length=length,
        in_backward=run.get("in_backward", True),
        activation_checkpointing=True,
        weight_bits=run.get("weight_bits", 16),
        device=device,
    )


def choose_size(name: str, run: dict[str, Any], length: int) -> str:
    """The largest LLaMA that the plan says the run fits."""
    for size in DESCENDING:
        plan = predict(name, run, size, "cuda", length)
        if plan.fits(run["budget"] * GIB):
            return size
    raise SystemExit(f"no size fits {run['budget']} GiB with {name}")


def text_batches(length: int, device: torch.device) -> list[torch.Tensor]:
    """One sequence of bytes for each step."""
    content = b"".join(path.read_bytes() for path in sorted(standard_library())[:400])
    tokens = torch.frombuffer(bytearray(content[: STEPS * length]), dtype=torch.uint8).to(torch.int64)
    if tokens.numel() < STEPS * length:
        raise SystemExit(f"the standard library has only {tokens.numel()} bytes of text")
    return list(tokens.view(STEPS, 1, length).to(device))


def make_optimizer(name: str, run: dict[str, Any], model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer itself: bitsandbytes' own where that is meant."""
    if name == "adamw_8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-4)
    optimizer, options = spec(name, run)
    return resolve_optimizer((optimizer, {"lr": 1e-3 if "rank" in run else 1e-4, **options})).build(model)


def train(name: str, size: str, device_name: str, length: int) -> dict[str, Any]:
    """Thirty steps under the limit: memory, times, losses."""
    run, device = RUNS[name], torch.device(device_name)
    cuda = device.type == "cuda"
    if cuda:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction((run["budget"] * GIB - CUDA_CONTEXT) / total, device)
    model = build_model(size, VOCABULARY, length, device, torch.bfloat16, True, 0)
    if run.get("weight_bits") == 8:
        model = lo.nn.quantize_weights_(model)
    optimizer = make_optimizer(name, run, model)
    if run.get("in_backward", True):
        lo.update_in_backward(optimizer, max_grad_norm=1.0)
    batches = text_batches(length, device)
    if cuda:  # building may take more than training: the float copy of a matrix that is quantised
        torch.cuda.synchronize()
        built = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    losses, seconds = [], []
    for tokens in batches:
        began = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))  # waits for the step
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    if not all(map(math.isfinite, losses)):
        raise SystemExit(f"{name}: a loss is not finite: {losses}")
    pace = median(seconds[2:])
    found = {"model": size, "budget_gib": run["budget"], "losses": losses, "seconds_per_step": pace, "seconds": seconds}
    found |= {"tokens_per_second": length / pace, "slowest_step": max(seconds[2:]), "first_step": seconds[0]}
    found["packages"] = packages()  # the peer runs in this process, not in the one that writes the JSON
    if cuda:
        found |= {
            "built_allocated": built,
            "peak_allocated": torch.cuda.max_memory_allocated(device),
            "peak_reserved": torch.cuda.max_memory_reserved(device),
        }
    return found


def one(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """A run in a process of its own, beside its plan."""
    run = RUNS[name]
    size = args.model or (choose_size(name, run, args.length) if run["model"] == "largest" else run["model"])
    plan = predict(name, run, size, args.device, args.length)
    found: dict[str, Any] = {"plan": plan.to_dict(), "fits": plan.fits(run["budget"] * GIB)}
    if args.dry:
        print(f"{plan}\n  fits {run['budget']} GiB: {found['fits']}\n", flush=True)
        return found
    command = [sys.executable, __file__, "--child", name, "--model", size, "--device", args.device]
    done = subprocess.run(
        [*command, "--length", str(args.length)], capture_output=True, text=True, timeout=args.timeout, check=False
    )
    if done.returncode:
        print(f"{name}: failed\n{done.stderr[-3000:]}", flush=True)
        return found | {"error": done.stderr.strip().splitlines()[-1:]}
    measured = json.loads(done.stdout.strip().splitlines()[-1])
    first, last = measured["losses"][0], measured["losses"][-1]
    print(f"{name}: {size}, {measured['seconds_per_step']:.2f} s a step, loss {first:.2f} → {last:.2f}", flush=True)
    if "peak_allocated" in measured:
        measured["error_of_plan"] = plan.peak_bytes / measured["peak_allocated"] - 1.0
        measured["error_of_plan_reserved"] = plan.reserved_bytes / measured["peak_reserved"] - 1.0
        print(
            f"{name}: {size}, peak {measured['peak_allocated'] / GIB:.2f} GiB allocated ({plan.peak_bytes / GIB:.2f} planned, "
            f"{measured['error_of_plan']:+.1%}), {measured['peak_reserved'] / GIB:.2f} reserved ({plan.reserved_bytes / GIB:.2f} "
            f"planned), {measured['tokens_per_second']:.0f} tokens/s",
            flush=True,
        )
    return found | {"measured": measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=RUNS, help="one run")
    parser.add_argument("--model", choices=SIZES, help="this size for every run")
    parser.add_argument("--length", type=int, default=2048, help="tokens of the sequence (default 2048)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--timeout", type=int, default=240, help="seconds for one run (default 240)")
    parser.add_argument("--child", choices=RUNS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(train(args.child, args.model, args.device, args.length)))
        return
    args.dry = args.device == "cuda" and not torch.cuda.is_available()
    results = {name: one(name, args) for name in ([args.only] if args.only else RUNS)}
    if args.dry:
        print("there is no GPU here: these were the plans")
    elif args.device == "cuda":
        write("seven_b", {"steps": STEPS, "gap": GAP, "length": args.length, "runs": results})


if __name__ == "__main__":
    main()
