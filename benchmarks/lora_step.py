"""A step on the 224 pairs of a LLaMA-7B's linear layers at rank 16, against torch's fused AdamW on the same factors.

python benchmarks/lora_step.py [--rounds 5] [--rank 16] [--layers 32]

Twice: CPU seconds of one thread, and seconds of the clock with all cores, which want a quiet machine.
"""

import argparse
import time
from statistics import median

import torch
from common import rounds_of, write
from torch import nn

import lowrank_optim as lo

SHAPES = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
"""m, n of the linear layers of one block."""

METHODS = {
    "lora_rite": lambda groups: lo.LoRARiteAdamW(groups, lr=1e-4),
    "altlora": lambda groups: lo.AltLoRA(groups, lr=1e-4),
    "lora_pro": lambda groups: lo.LoRAProAdamW(groups, lr=1e-4, moments="none"),
    "riemannian": lambda groups: lo.RiemannianAdamW(groups, lr=1e-4),
    "adamw_pairs": lambda groups: lo.LoRAOptimizer(groups, lr=1e-4),
    "adamw": lambda groups: lo.GaLoreAdamW(groups, lr=1e-4),
}


def pairs(layers: int, rank: int) -> list[tuple[nn.Parameter, nn.Parameter, float]]:
    """Factors with gradients, s = 2."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for m, n in SHAPES * layers:
        factors = []
        for shape in ((rank, n), (m, rank)):
            factor = nn.Parameter(0.02 * torch.randn(shape, generator=generator))
            factor.grad = 0.01 * torch.randn(shape, generator=generator)
            factors.append(factor)
        made.append((*factors, 2.0))
    return made


Pairs = list[tuple[nn.Parameter, nn.Parameter, float]]


def own_copy(made: Pairs) -> Pairs:
    """Other weights with the same gradients: an optimizer's weights are written by nobody else."""

    def copied(factor: nn.Parameter) -> nn.Parameter:
        copy = nn.Parameter(factor.detach().clone())
        copy.grad = factor.grad
        return copy

    return [(copied(a), copied(b), s) for a, b, s in made]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed steps (default 5)")
    parser.add_argument("--layers", type=int, default=32, help="blocks (default 32)")
    parser.add_argument("--rank", type=int, default=16, help="of the pairs (default 16)")
    parser.add_argument("--note", default="", help="what else the machine did, for the JSON")
    args = parser.parse_args()
    made = pairs(args.layers, args.rank)
    flat = [factor for a, b, _ in made for factor in (a, b)]
    optimizers = {name: make(lo.lora_pairs(own_copy(made))) for name, make in METHODS.items()}
    steps = {"fused_adamw": torch.optim.AdamW(flat, lr=1e-4, fused=True).step}
    steps |= {name: optimizer.step for name, optimizer in optimizers.items()}
    state = {name: sum(lo.state_bytes(optimizer).values()) for name, optimizer in optimizers.items()}
    results: dict[str, object] = {"note": args.note, "rank": args.rank, "layers": args.layers, "state_bytes": state}
    cores = torch.get_num_threads()
    for threads, clock in ((1, time.process_time), (cores, time.perf_counter)):
        torch.set_num_threads(threads)
        times = rounds_of(steps, args.rounds, warmup=1, clock=clock)
        seconds = {name: median(values) for name, values in times.items()}
        ratios = {name: value / seconds["fused_adamw"] for name, value in seconds.items()}
        print(f"{threads} threads, {'CPU seconds' if threads == 1 else 'seconds of the clock'}")
        for name, ratio in ratios.items():
            held = f"{state[name] / 1e6:8.1f} MB" if name in state else ""
            print(f"{name:<14} {1e3 * seconds[name]:8.1f} ms  {ratio:5.2f} of fused AdamW {held}")
        found = {"threads": threads, "seconds": seconds, "over_fused_adamw": ratios}
        results |= found if threads == 1 else {"all_cores": found}
    write("lora_step", results)


if __name__ == "__main__":
    main()
