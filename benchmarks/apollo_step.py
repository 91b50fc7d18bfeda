"""Steps of APOLLO, APOLLO-Mini and FRUGAL on the matrices of one LLaMA-350M layer, against their floors and against peers.

    APOLLO at rank n/4       apollo-torch's step. APOLLO draws its Gaussian basis anew in each step, apollo-torch stores it.
    APOLLO-Mini at rank 1    its floor: a norm of G, one pass over it, and W ← W − αG, one over both; and torch's fused AdamW.
    FRUGAL at rank n/4       its floor: three products for each matrix, R = G B, W ← W − N Bᵀ and R Bᵀ, whose difference from G it
                             takes the sign of. GaLore has the first two.

Steps between refreshes, with weight decay. Times are ratios within one run.

    python benchmarks/apollo_step.py [--rounds 30]
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import interleaved, parameters, write
from galore_step import SHAPES, floor
from step_time import apollo_torch

import lowrank_optim as lo

RANK = 256
LR = 1e-4


def passes(params: list[torch.nn.Parameter]) -> Callable[[], None]:
    """‖G‖, then W ← W − αG, for every matrix."""
    weights, grads = [p.detach() for p in params], [p.grad for p in params]

    def run() -> None:
        for weight, grad in zip(weights, grads, strict=True):
            torch.linalg.vector_norm(grad)
            weight.add_(grad, alpha=-1e-9)

    return run


def three_products(params: list[torch.nn.Parameter]) -> Callable[[], None]:
    """The floor of GaLore, and R Bᵀ of every matrix into room for the largest."""
    two, room = floor(params, RANK), torch.empty(max(p.numel() for p in params))
    factors = [(torch.randn(p.shape[0], RANK), torch.randn(RANK, p.shape[1])) for p in params]

    def run() -> None:
        two()
        for param, (left, right) in zip(params, factors, strict=True):
            torch.mm(left, right, out=room[: param.numel()].view(param.shape))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="timed steps (default 30)")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)

    def ours(method: type, rank: int = RANK, **options: Any) -> Callable[[], object]:
        group = {"params": parameters(SHAPES, generator), "rank": rank, "update_proj_gap": 10**9, **options}
        return method([group], lr=LR).step

    steps = {
        "apollo": ours(lo.APOLLOAdamW),
        "apollo_torch": apollo_torch(parameters(SHAPES, generator), RANK).step,
        "apollo_mini": ours(lo.APOLLOMiniAdamW, rank=1),
        "apollo_mini_floor": passes(parameters(SHAPES, generator)),
        "fused_adamw": torch.optim.AdamW(parameters(SHAPES, generator), lr=LR, fused=True).step,
        "frugal": ours(lo.FrugalAdamW, projector="randomized_svd"),
        "three_products": three_products(parameters(SHAPES, generator)),
        "galore": ours(lo.GaLoreAdamW),
    }
    seconds = interleaved(steps, args.rounds, warmup=3)

    def ratio(name: str, to: str) -> float:
        return seconds[name] / seconds[to]

    result = {
        "rank": RANK,
        "seconds": seconds,
        "apollo_over_apollo_torch": ratio("apollo", "apollo_torch"),
        "apollo_mini_over_floor": ratio("apollo_mini", "apollo_mini_floor"),
        "apollo_mini_over_fused_adamw": ratio("apollo_mini", "fused_adamw"),
        "floor_over_fused_adamw": ratio("apollo_mini_floor", "fused_adamw"),
        "frugal_over_three_products": ratio("frugal", "three_products"),
        "frugal_over_galore": ratio("frugal", "galore"),
    }
    print(
        f"APOLLO at rank {RANK}: {result['apollo_over_apollo_torch']:.2f}x apollo-torch's time; APOLLO-Mini: "
        f"{result['apollo_mini_over_floor']:.2f}x the passes over G and W, {result['apollo_mini_over_fused_adamw']:.2f}x fused AdamW "
        f"(the passes: {result['floor_over_fused_adamw']:.2f}x); FRUGAL: {result['frugal_over_three_products']:.2f}x three products, "
        f"{result['frugal_over_galore']:.2f}x GaLore"
    )
    write("apollo_step", result)


if __name__ == "__main__":
    main()
