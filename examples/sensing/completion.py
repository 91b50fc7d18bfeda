"""Matrix completion by alternating minimisation, with least squares that are solved exactly, or by a sketch and a few iterations.

Of a matrix M (m×n) of rank k the entries in Ω are known. In turn, with V orthonormal,

    u_i ← argmin ‖V_{Ω_i} u − M_{i,Ω_i}‖²   for each row i,      U ← orthonormal,      then the same for the columns

and the error falls by a constant factor each time (Jain, Netrapalli and Sanghavi, 2013). Exact solutions cost |Ω|·k² operations. The
factor stays where they are inexact, and a sketch makes them cheap (Gu, Song, Yin and Zhang, 2024, arXiv:2302.11068): with S of 4k
rows and two numbers ±1/√2 in each column, S V_{Ω_i} = Q R costs 2·|Ω_i|·k, and V_{Ω_i} R⁻¹ is so well conditioned that conjugate
gradients gain a digit in two or three rounds of 2·|Ω_i|·k. Together Õ(|Ω|·k), and 8·k³ for each row.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

OVERSAMPLING = 4
"""Rows of the sketch over k."""

NONZEROS = 2
"""Numbers in each column of the sketch."""


@dataclass(frozen=True)
class Seen:
    """The known entries of a matrix, row by row; rows with fewer than the longest are filled with zeros."""

    columns: Tensor  # m×L
    values: Tensor  # m×L
    there: Tensor  # m×L, 1 where there is an entry, else 0

    @classmethod
    def of(cls, matrix: Tensor, mask: Tensor) -> Seen:
        """The entries of a matrix where the mask is True."""
        counts = mask.sum(1)
        columns = mask.byte().argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
        there = torch.arange(columns.shape[1]) < counts.unsqueeze(1)
        return cls(columns, torch.where(there, matrix.gather(1, columns), 0.0), there.to(matrix.dtype))

    @property
    def count(self) -> int:
        """|Ω|."""
        return int(self.there.sum())

    def rows_of(self, factor: Tensor) -> Tensor:
        """V_{Ω_i} for each row i: m×L×k."""
        return factor[self.columns] * self.there.unsqueeze(2)


@dataclass(frozen=True)
class Completion:
    """A hidden matrix of low rank, and its known entries from both sides."""

    target: Tensor  # M, m×n
    by_rows: Seen
    by_columns: Seen


def completion_problem(rows: int, cols: int, rank: int, share: float, rng: torch.Generator) -> Completion:
    """A Gaussian matrix of the given rank, each entry known with probability `share`."""
    left, right = (torch.randn(size, rank, generator=rng, dtype=torch.float64) for size in (rows, cols))
    target = left @ right.T / math.sqrt(rank)
    mask = torch.rand(rows, cols, generator=rng) < share
    return Completion(target, Seen.of(target, mask), Seen.of(target.T.contiguous(), mask.T))


Solver = Callable[[Seen, Tensor], tuple[Tensor, int]]
"""(entries, V) → the solution for each row (m×k), and how many multiplications it took."""


def exact_rows(seen: Seen, factor: Tensor) -> tuple[Tensor, int]:
    """Least squares of each row by LAPACK: by scipy where it is installed, else by torch."""
    k = factor.shape[1]
    found = torch.empty(len(seen.values), k, dtype=factor.dtype)
    for i, (there, columns, values) in enumerate(zip(seen.there.bool(), seen.columns, seen.values, strict=True)):
        found[i] = _least_squares(factor[columns[there]], values[there])
    return found, seen.count * k * k


def _least_squares(matrix: Tensor, values: Tensor) -> Tensor:
    if importlib.util.find_spec("scipy"):
        from scipy.linalg import lstsq

        return torch.from_numpy(lstsq(matrix.numpy(), values.numpy())[0])
    return torch.linalg.lstsq(matrix, values.unsqueeze(1), driver="gelsd").solution.squeeze(1)


def sketched_rows(rounds: int, rng: torch.Generator) -> Solver:
    """A solver by a sketch, and rounds of conjugate gradients on V_{Ω_i} R⁻¹; none leaves the sketch's own solution."""

    def solve(seen: Seen, factor: Tensor) -> tuple[Tensor, int]:
        a, y = seen.rows_of(factor), seen.values
        m, length, k = a.shape
        size = OVERSAMPLING * k
        sketch, image = a.new_zeros(m, size, k), a.new_zeros(m, size)
        for _ in range(NONZEROS):  # row number l of each V_{Ω_i} goes to row `to[l]`, with a sign
            to = torch.randint(size, (length,), generator=rng)
            sign = (torch.randint(2, (length,), generator=rng) * 2 - 1).to(a.dtype) / math.sqrt(NONZEROS)
            sketch.index_add_(1, to, a * sign.unsqueeze(1))
            image.index_add_(1, to, y * sign)
        q, r = torch.linalg.qr(sketch)

        def by_r(z: Tensor) -> Tensor:  # R⁻¹ z
            return torch.linalg.solve_triangular(r, z.unsqueeze(2), upper=True).squeeze(2)

        def gradient(rest: Tensor) -> Tensor:  # R⁻ᵀ Aᵀ rest
            return torch.linalg.solve_triangular(r.mT, a.mT @ rest.unsqueeze(2), upper=False).squeeze(2)

        x = by_r((q.mT @ image.unsqueeze(2)).squeeze(2))
        rest = y - (a @ x.unsqueeze(2)).squeeze(2)
        grad = gradient(rest)
        direction, square = grad, grad.square().sum(1, keepdim=True)
        least = 1e-28 * square  # a row that is solved is left alone: rounding errors would grow
        for _ in range(rounds):
            step = by_r(direction)
            change = (a @ step.unsqueeze(2)).squeeze(2)
            length_of_step = torch.where(square > least, square / change.square().sum(1, keepdim=True), 0.0)
            x = x + length_of_step * step
            rest = rest - length_of_step * change
            grad = gradient(rest)
            before, square = square, grad.square().sum(1, keepdim=True)
            direction = grad + torch.where(before > least, square / before, 0.0) * direction
        products = a.numel() * (NONZEROS + 2 + 2 * rounds)
        return x, products + m * k * k * (2 * size + 3 + 2 * rounds)

    return solve


def start(problem: Completion, rank: int, rng: torch.Generator, rounds: int = 8) -> Tensor:
    """The leading right singular vectors of the matrix with 0 for what is not known, by block power iteration: n×k."""
    v = torch.randn(problem.target.shape[1], rank, generator=rng, dtype=torch.float64)
    for _ in range(rounds):
        for seen in (problem.by_rows, problem.by_columns):
            v = torch.linalg.qr((seen.values.unsqueeze(1) @ seen.rows_of(v)).squeeze(1)).Q
    return v


def alternating_minimisation(
    problem: Completion, rank: int, solver: Solver, iterations: int, rng: torch.Generator
) -> tuple[Tensor, int]:
    """Relative errors ‖U Vᵀ − M‖_F / ‖M‖_F after each iteration (both sides), and the multiplications of all solutions."""
    v, work = start(problem, rank, rng), 0
    errors = torch.empty(iterations, dtype=torch.float64)
    for t in range(iterations):
        u, of_rows = solver(problem.by_rows, v)
        u = torch.linalg.qr(u).Q
        v, of_columns = solver(problem.by_columns, u)
        errors[t] = (u @ v.T - problem.target).norm() / problem.target.norm()
        v, work = torch.linalg.qr(v).Q, work + of_rows + of_columns
    return errors, work


def completion(seed: int = 0, iterations: int = 20) -> dict[str, tuple[Tensor, int]]:
    """Error curves and multiplications of exact and inexact solutions: 300×240, rank 5, three entries of ten known."""
    rng = torch.Generator().manual_seed(seed)
    problem = completion_problem(300, 240, 5, 0.3, rng)
    exact = "exact, scipy" if importlib.util.find_spec("scipy") else "exact"
    solvers: dict[str, Solver] = {exact: exact_rows}
    solvers |= {f"sketch, {rounds} round{'s' * (rounds != 1)}": sketched_rows(rounds, rng) for rounds in (3, 1, 0)}
    starts = seed + 1
    return {
        name: alternating_minimisation(problem, 5, solver, iterations, torch.Generator().manual_seed(starts))
        for name, solver in solvers.items()
    }


def cost_by_rank(
    seed: int = 0, ranks: tuple[int, ...] = (8, 16, 32), rows: int = 20, cols: int = 8000
) -> dict[int, tuple[int, int]]:
    """Multiplications of the exact and of the sketched solution (3 rounds) for some long rows, half of them known, by rank."""
    rng = torch.Generator().manual_seed(seed)
    found = {}
    for rank in ranks:
        problem = completion_problem(rows, cols, rank, 0.5, rng)
        factor = torch.linalg.qr(torch.randn(cols, rank, generator=rng, dtype=torch.float64)).Q
        solvers: tuple[Solver, Solver] = (exact_rows, sketched_rows(3, rng))
        exact, sketched = (solve(problem.by_rows, factor)[1] for solve in solvers)
        found[rank] = exact, sketched
    return found
