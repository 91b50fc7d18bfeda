"""A GaLoreAdamW step on the matrices of one LLaMA-350M layer, against its floor and against galore-torch.

The floor is the two matrix products that no implementation can avoid: R = G B, and W ← W − α N Bᵀ in place. The steady step
excludes refreshes; the amortised one adds a refresh of every matrix every `gap` steps. Without weight decay, as in the published
recipes; what decay adds (it scales W, which the floor does not) stands beside it. Times are ratios within one run.
"""

import argparse
from collections.abc import Callable

import torch
from common import interleaved, parameters, write

import lowrank_optim as lo

SHAPES = ((1024, 1024),) * 4 + ((2736, 1024),) * 3
GAP = 200


def floor(params: list[torch.nn.Parameter], rank: int) -> Callable[[], None]:
    """The two products for every matrix, with preallocated small matrices."""
    weights, grads = [p.detach() for p in params], [p.grad for p in params]
    bases = [torch.linalg.qr(torch.randn(w.shape[1], rank)).Q.contiguous() for w in weights]
    small = [torch.zeros(w.shape[0], rank) for w in weights]

    def run() -> None:
        for weight, grad, basis, r in zip(weights, grads, bases, small, strict=True):
            torch.mm(grad, basis, out=r)
            weight.addmm_(r, basis.T, alpha=-1e-9)

    return run


def set_gap(optimizer: torch.optim.Optimizer, gap: int) -> None:
    """A gap of 1 makes every step refresh every matrix."""
    for group in optimizer.param_groups:
        group["update_proj_gap"] = gap
    for state in optimizer.state.values():
        if "projector" in state:  # galore-torch keeps its own copy
            state["projector"].update_proj_gap = gap


def measure(rank: int, rounds: int, refresh_rounds: int) -> dict[str, float | int]:
    from galore_torch import GaLoreAdamW as Peer

    generator = torch.Generator().manual_seed(0)
    options = {"rank": rank, "update_proj_gap": 10**9, "scale": 0.25, "proj_type": "std"}

    def group() -> list[dict[str, object]]:
        return [{"params": parameters(SHAPES, generator), **options}]

    ours = lo.GaLoreAdamW(group(), lr=1e-3, weight_decay=0.0)
    decaying = lo.GaLoreAdamW(group(), lr=1e-3, weight_decay=0.01)
    peer = Peer(group(), lr=1e-3, weight_decay=0.0, no_deprecation_warning=True)
    steps = {
        "floor": floor(parameters(SHAPES, generator), rank),
        "ours": ours.step,
        "decaying": decaying.step,
        "galore_torch": peer.step,
    }
    steady = interleaved(steps, rounds, warmup=3)

    def refreshing(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def run() -> None:
            set_gap(optimizer, 1)
            optimizer.step()
            set_gap(optimizer, 10**9)

        return run

    refresh = interleaved({"ours": refreshing(ours), "galore_torch": refreshing(peer)}, refresh_rounds, warmup=0)
    amortised = {name: steady[name] + (refresh[name] - steady[name]) / GAP for name in refresh}
    return {
        "rank": rank,
        "seconds_floor": steady["floor"],
        "steady_over_floor": steady["ours"] / steady["floor"],
        "steady_over_floor_with_decay": steady["decaying"] / steady["floor"],
        "galore_torch_steady_over_floor": steady["galore_torch"] / steady["floor"],
        "seconds_refresh_step": refresh["ours"],
        "seconds_refresh_step_galore_torch": refresh["galore_torch"],
        "amortised_over_galore_torch": amortised["ours"] / amortised["galore_torch"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="timed steady steps (default 30)")
    parser.add_argument("--refresh-rounds", type=int, default=3, help="timed refreshes of the layer (default 3)")
    args = parser.parse_args()
    results = []
    for rank in (64, 256):
        row = measure(rank, args.rounds, args.refresh_rounds)
        results.append(row)
        print(
            f"rank {rank}: steady step {row['steady_over_floor']:.3f}x the two products "
            f"({row['steady_over_floor_with_decay']:.3f}x with weight decay) "
            f"(galore-torch {row['galore_torch_steady_over_floor']:.3f}x); refresh of the layer "
            f"{row['seconds_refresh_step']:.2f} s (galore-torch {row['seconds_refresh_step_galore_torch']:.2f} s); "
            f"amortised over a gap of {GAP}: {row['amortised_over_galore_torch']:.3f}x galore-torch's time"
        )
    write("galore_step", results)


if __name__ == "__main__":
    main()
