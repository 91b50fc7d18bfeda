"""A step of Muon on the matrices of one LLaMA-350M layer against torch.optim.Muon.

torch's has products in bfloat16 only; the package's are timed in bfloat16 and in float32, its default. Also in subspaces of rank 256
between refreshes (SUMOAdamW). Times are ratios within one run.
"""

import argparse

import torch
from common import interleaved, parameters, write

import lowrank_optim as lo

SHAPES = ((1024, 1024),) * 4 + ((2736, 1024),) * 2 + ((1024, 2736),)
RANK = 256


def matrices() -> list[torch.nn.Parameter]:
    """The same numbers in every call."""
    return parameters(SHAPES, torch.Generator().manual_seed(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="timed steps (default 10)")
    parser.add_argument("--note", default="", help="what else the machine did, for the JSON")
    args = parser.parse_args()
    settings = {"lr": 1e-3, "weight_decay": 0.1}
    steps = {
        "torch_bfloat16": torch.optim.Muon(matrices(), **settings).step,
        "bfloat16": lo.LowRankOptimizer(matrices(), rule=lo.Muon(inner_dtype="bfloat16"), **settings).step,
        "float32": lo.LowRankOptimizer(matrices(), rule=lo.Muon(), **settings).step,
        "subspace": lo.SUMOAdamW(
            [{"params": matrices(), "rank": RANK, "update_proj_gap": 10**9}], stagger=False, **settings
        ).step,
    }
    seconds = interleaved(steps, args.rounds)
    ratios = {name: value / seconds["torch_bfloat16"] for name, value in seconds.items()}
    for name, ratio in ratios.items():
        print(f"{name}: {seconds[name]:.3f} s, {ratio:.3f} of torch.optim.Muon")
    write("muon_step", {"note": args.note, "rank": RANK, "seconds": seconds, "over_torch": ratios})


if __name__ == "__main__":
    main()
