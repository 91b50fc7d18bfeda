"""Updates inside backward on a LLaMA-60M in bfloat16: peak memory of a step and time per step, beside ordinary stepping.

Memory is counted from the life of tensors (`memory_tracker.py`), to the byte: everything that forward, backward and step make, beyond
weights and optimizer state, which exist before. "floor" drops each gradient in a hook and updates nothing: what forward and backward
take with one gradient alive at a time. Times are medians of interleaved steps of one process, their ratio the median over rounds of
the two times in one round; a ratio of two ordinary runs beside it shows the noise of the machine. On the CPU they are CPU time of one
thread, which other processes disturb less than they disturb the clock on the wall.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from common import rounds_of, write
from memory_tracker import Gradients, PeakMemory

import lowrank_optim as lo

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from pretraining.configs import build_model

VOCABULARY = 32_000
RANK = 128
KINDS = ("ordinary", "in_backward")


def build(kind: str, size: str, dtype: torch.dtype, device: torch.device, method: str = "galore"):
    """A model, its optimizer, and the function that runs one step."""
    model = build_model(size, VOCABULARY, 2048, device, dtype, False, seed=0)
    gradients = Gradients(model)
    optimizer = None
    if kind == "floor":
        for param in model.parameters():
            param.register_post_accumulate_grad_hook(drop)
    else:
        optimizer = lo.by_name(method)(lo.param_groups(model, rank=RANK), lr=1e-3)
    if kind == "in_backward":
        lo.update_in_backward(optimizer)

    def step(tokens: torch.Tensor) -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return model, gradients, step


def drop(param: torch.Tensor) -> None:
    param.grad = None


def measure_memory(size: str, dtype: torch.dtype, device: torch.device, tokens: torch.Tensor) -> dict[str, object]:
    """Peak bytes of a step, beyond weights and state, and of gradients alone."""
    results: dict[str, object] = {}
    for kind in ("floor", *KINDS):
        model, gradients, step = build(kind, size, dtype, device)
        step(tokens)  # the first step makes the bases
        gradients.peak = 0
        with PeakMemory() as memory:
            step(tokens)
        results[kind] = {"peak": memory.peak, "gradients": gradients.peak}
        sizes = [param.nbytes for param in model.parameters()]
        results["weights"], results["largest_gradient"], results["all_gradients"] = sum(sizes), max(sizes), sum(sizes)
        del model, gradients, step
    return results


def measure_time(
    size: str, dtype: torch.dtype, device: torch.device, tokens: torch.Tensor, rounds: int, method: str
) -> dict[str, float | str]:
    """Seconds a step of both kinds, interleaved, and the median ratio within a round; `again` is a second ordinary run."""
    steps: dict[str, Callable[[], object]] = {
        name: partial(build(kind, size, dtype, device, method)[2], tokens)
        for name, kind in (("ordinary", "ordinary"), ("in_backward", "in_backward"), ("again", "ordinary"))
    }
    times = rounds_of(steps, rounds, clock=time.perf_counter if device.type == "cuda" else time.process_time)
    ratios = [a / b for a, b in zip(times["in_backward"], times["ordinary"], strict=True)]
    noise = [a / b for a, b in zip(times["again"], times["ordinary"], strict=True)]
    return {
        "optimizer": method,
        "seconds_ordinary": median(times["ordinary"]),
        "seconds_in_backward": median(times["in_backward"]),
        "ratio": median(ratios),
        "ratio_of_fastest": min(times["in_backward"]) / min(times["ordinary"]),
        "ratio_of_two_ordinary_runs": median(noise),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="60m", help="size, as in examples/pretrain.py (default 60m)")
    parser.add_argument("--length", type=int, default=64, help="tokens of the one sequence (default 64)")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each kind (default 15)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    tokens = torch.randint(0, VOCABULARY, (1, args.length), generator=torch.Generator().manual_seed(0)).to(device)
    memory = measure_memory(args.model, dtype, device, tokens)
    floor, ordinary, ours = (memory[kind] for kind in ("floor", *KINDS))
    mib = 2**20
    print(
        f"peak beyond weights and state: {ordinary['peak'] / mib:.1f} MiB ordinary, {ours['peak'] / mib:.1f} in backward, "
        f"{floor['peak'] / mib:.1f} without any update; gradients alive: {ordinary['gradients'] / mib:.1f}, "
        f"{ours['gradients'] / mib:.1f} (the largest is {memory['largest_gradient'] / mib:.1f})"
    )
    times = []
    for method in ("galore", "fira", "apollo"):
        row = measure_time(args.model, dtype, device, tokens, args.rounds, method)
        print(
            f"{method}: {row['seconds_ordinary']:.3f} s a step, in backward {row['ratio']:.3f}x of it "
            f"(fastest {row['ratio_of_fastest']:.3f}x; a second ordinary run {row['ratio_of_two_ordinary_runs']:.3f}x)"
        )
        times.append(row)
    setting = {"model": args.model, "dtype": args.dtype, "length": args.length, "batch": 1, "rank": RANK}
    write("in_backward", {"setting": setting, "memory": memory, "time": times})


if __name__ == "__main__":
    main()
