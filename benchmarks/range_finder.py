"""RandomizedSVD against the exact SVD: captured energy and time, cold (first refresh) and warm (on a drifted gradient).

The gradients have singular values k^-0.7 plus noise, the slow decay that makes the subspace hard to find. "Energy" is
‖G B‖² over that of the exact rank-r subspace of the same gradient. Times are ratios within one run.
"""

import argparse

import torch
from common import interleaved, write
from torch import Tensor

from lowrank_optim.projectors import SVD, Projector, RandomizedSVD, Refresh

SHAPES = ((1024, 2736), (4096, 4096))


def slow_decay(rows: int, cols: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Factors U, σ, V of a matrix with σ_k = k^-0.7."""
    short = min(rows, cols)
    u = torch.linalg.qr(torch.randn(rows, short, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(cols, short, generator=generator)).Q
    return u, torch.arange(1, short + 1) ** -0.7, v


def gradient(factors: tuple[Tensor, Tensor, Tensor], generator: torch.Generator, noise: float = 0.1) -> Tensor:
    """U diag(σ) Vᵀ plus Gaussian noise with `noise` times its Frobenius norm."""
    u, sigma, v = factors
    signal = (u * sigma) @ v.T
    extra = torch.randn(signal.shape, generator=generator)
    return signal + extra * (noise * signal.norm() / extra.norm())


def drift(
    factors: tuple[Tensor, Tensor, Tensor], generator: torch.Generator, amount: float = 0.3
) -> tuple[Tensor, Tensor, Tensor]:
    """The factors after their singular vectors were turned: each is mixed with `amount` times a random direction."""
    u, sigma, v = factors

    def turn(q: Tensor) -> Tensor:
        extra = torch.randn(q.shape, generator=generator) / q.shape[0] ** 0.5
        return torch.linalg.qr(q + amount * extra).Q

    return turn(u), sigma, turn(v)


def energy(grad: Tensor, basis: Tensor, side: str) -> float:
    projected = grad @ basis if side == "right" else grad.T @ basis
    return float(projected.square().sum())


def measure(rows: int, cols: int, rounds: int) -> dict[str, float | int | str]:
    generator = torch.Generator().manual_seed(0)
    factors = slow_decay(rows, cols, generator)
    first, later = gradient(factors, generator), gradient(drift(factors, generator), generator)
    projector, exact = RandomizedSVD(), SVD(align=False)
    rank = min(rows, cols) // 4
    space = projector.space((rows, cols), rank, "std", torch.float32)

    def refresh(which: Projector, grad: Tensor, state: dict[str, Tensor], is_first: bool) -> dict[str, Tensor]:
        new = which.refresh(Refresh(grad, space, state, 1, is_first))
        assert new is not None
        return new

    start = projector.init(space, 0, first.device)
    cold = refresh(projector, first, start, True)
    warm = refresh(projector, later, cold, False)
    best = {"cold": refresh(exact, first, start, True), "warm": refresh(exact, later, cold, False)}
    ours = {
        "cold": lambda: refresh(projector, first, start, True),
        "warm": lambda: refresh(projector, later, cold, False),
    }
    seconds = interleaved(ours, rounds, warmup=1)
    seconds |= interleaved({"exact": lambda: refresh(exact, later, cold, False)}, 1, warmup=0)
    side = space.side
    return {
        "shape": f"{rows}x{cols}",
        "rank": rank,
        "energy_cold": energy(first, cold["basis"], side) / energy(first, best["cold"]["basis"], side),
        "energy_warm": energy(later, warm["basis"], side) / energy(later, best["warm"]["basis"], side),
        "old_basis_on_drifted": energy(later, cold["basis"], side) / energy(later, best["warm"]["basis"], side),
        "seconds_exact": seconds["exact"],
        "seconds_cold": seconds["cold"],
        "seconds_warm": seconds["warm"],
        "speedup_cold": seconds["exact"] / seconds["cold"],
        "speedup_warm": seconds["exact"] / seconds["warm"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="timed refreshes of each kind (default 3)")
    args = parser.parse_args()
    results = []
    for rows, cols in SHAPES:
        row = measure(rows, cols, args.rounds)
        results.append(row)
        print(
            f"{row['shape']} rank {row['rank']}: energy cold {row['energy_cold']:.4f}, warm {row['energy_warm']:.4f} "
            f"(old basis {row['old_basis_on_drifted']:.4f}); {row['speedup_cold']:.1f}x (cold) and "
            f"{row['speedup_warm']:.1f}x (warm) faster than the exact SVD's {row['seconds_exact']:.2f} s"
        )
    write("range_finder", results)


if __name__ == "__main__":
    main()
