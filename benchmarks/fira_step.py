"""A FiraAdamW step on the matrices of one LLaMA-350M layer against the same step written out with torch ops.

The written-out step is what the released code does, operation by operation and with its m×n temporaries (galore-torch's style): lift
R, subtract it from G, scale, take the norm, limit, lift N, add, update. The package's step reads G twice and forms no residual.
Rank n/8, no refreshes; also the bytes that each allocates at its peak, counted from the tensors alive at a time. Times are ratios
within one run.
"""

import argparse
import gc
from collections.abc import Callable

import torch
from common import interleaved, parameters, write
from galore_step import SHAPES
from memory_tracker import PeakMemory

import lowrank_optim as lo

RANK = 128
LR, ALPHA, BETAS, EPS, DECAY = 1e-3, 0.25, (0.9, 0.999), 1e-6, 0.01


def written_out(params: list[torch.nn.Parameter]) -> Callable[[], None]:
    """Fira in torch ops, one line for each operation of the method."""
    states = []
    for p in params:
        basis = torch.linalg.qr(torch.randn(p.shape[1], RANK)).Q.T.contiguous()
        zeros = torch.zeros(p.shape[0], RANK)
        states.append({"step": 0, "basis": basis, "m": zeros, "v": zeros.clone(), "norm": None})

    @torch.no_grad()
    def run() -> None:
        for p, state in zip(params, states, strict=True):
            state["step"] += 1
            grad, basis, m, v = p.grad, state["basis"], state["m"], state["v"]
            r = torch.matmul(grad, basis.T)
            m.mul_(BETAS[0]).add_(r, alpha=1 - BETAS[0])
            v.mul_(BETAS[1]).addcmul_(r, r, value=1 - BETAS[1])
            n = m / v.sqrt().add_(EPS)
            residual = grad - torch.matmul(r, basis) * ALPHA
            scale = n.norm(dim=1) / (r.norm(dim=1) + 1e-8)
            scaled = residual * scale.unsqueeze(1)
            norm = scaled.norm()
            if state["norm"] is not None:
                limit = max(norm / (state["norm"] + 1e-8), 1.01) / 1.01
                scaled, norm = scaled / limit, norm / limit
            state["norm"] = norm
            update = torch.matmul(n, basis) * ALPHA + scaled
            size = LR * (1 - BETAS[1] ** state["step"]) ** 0.5 / (1 - BETAS[0] ** state["step"])
            p.add_(update, alpha=-size)
            p.add_(p, alpha=-LR * DECAY)

    return run


def peak_bytes(step: Callable[[], object]) -> int:
    gc.collect()
    with PeakMemory() as memory:
        step()
    return memory.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="timed steps (default 40)")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    params = parameters(SHAPES, generator)
    groups = [{"params": params, "rank": RANK, "update_proj_gap": 10**9}]
    ours = lo.FiraAdamW(groups, lr=LR, scale=ALPHA, weight_decay=DECAY)
    steps = {"ours": ours.step, "written_out": written_out(parameters(SHAPES, generator))}
    seconds = interleaved(steps, args.rounds, warmup=3)
    peaks = {name: peak_bytes(step) for name, step in steps.items()}
    largest = max(p.numel() * p.element_size() for p in params)
    result = {
        "rank": RANK,
        "seconds": seconds,
        "speedup": seconds["written_out"] / seconds["ours"],
        "temporary_bytes": peaks,
        "largest_matrix_bytes": largest,
    }
    print(
        f"rank {RANK}: {result['speedup']:.2f}x faster than the step written out; temporaries "
        f"{peaks['ours'] / 2**20:.1f} MiB against {peaks['written_out'] / 2**20:.1f} MiB (largest matrix {largest / 2**20:.1f} MiB)"
    )
    write("fira_step", result)


if __name__ == "__main__":
    main()
