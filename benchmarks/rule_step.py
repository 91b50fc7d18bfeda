"""A dense step of each rule for matrices on those of one LLaMA-350M layer, against torch's fused AdamW.

Whole steps of the optimizer, with weight decay. Muon is in `muon_step.py`. Times are ratios within one run.

    python benchmarks/rule_step.py [--rounds 30]
"""

import argparse

import torch
from common import interleaved, write
from muon_step import matrices

import lowrank_optim as lo

RULES: dict[str, lo.Rule] = {
    "row_norm": lo.RowNorm(),
    "row_norm, columns": lo.RowNorm(axis="columns"),
    "row_norm, momentum": lo.RowNorm(momentum=0.9),
    "folded_adam": lo.FoldedAdam(),
    "folded_adam, level 8": lo.FoldedAdam(level=8),
    "sinkhorn": lo.Sinkhorn(),
    "sage": lo.SAGE(),
    "lion": lo.Lion(),
    "adam": lo.Adam(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="timed steps (default 30)")
    parser.add_argument("--note", default="", help="what else the machine did, for the JSON")
    args = parser.parse_args()
    settings = {"lr": 1e-3, "weight_decay": 0.1}
    steps = {"fused_adamw": torch.optim.AdamW(matrices(), fused=True, **settings).step}
    for name, rule in RULES.items():
        steps[name] = lo.LowRankOptimizer(matrices(), rule=rule, **settings).step
    seconds = interleaved(steps, args.rounds, warmup=3)
    ratios = {name: value / seconds["fused_adamw"] for name, value in seconds.items()}
    for name, ratio in ratios.items():
        print(f"{name:<20} {1e3 * seconds[name]:7.2f} ms  {ratio:5.2f} of fused AdamW")
    write("rule_step", {"note": args.note, "seconds": seconds, "over_fused_adamw": ratios})


if __name__ == "__main__":
    main()
