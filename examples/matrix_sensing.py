"""Recover a low-rank matrix X* from Gaussian measurements y_i = ⟨A_i, X*⟩, or from some entries: six small experiments in float64.

    python examples/matrix_sensing.py                              # all parts, tables only
    python examples/matrix_sensing.py rates robust --plot out.png

Matrix sensing is the smallest problem in which low rank matters, and its answers are known, so it shows what can be expected of a
method before a network is trained with it. The parts:

`rates`     Gradient descent on factors. Symmetric factors U Uᵀ of too many columns slow down to ‖UUᵀ − X*‖² ~ T⁻²; with as
            many columns as the rank, or with imbalanced asymmetric factors F Gᵀ, convergence is linear (Xiong, Ding and Du,
            2023).
`scale`     From a small start of size α, imbalanced factors converge at a rate ~ α². One changed step, F ← β·(orthonormal) and G
            so that F Gᵀ stays, makes the rate the same for every α, that of factors of the right width (ibid.).
`robust`    A tenth of the measurements is grossly corrupted, there are fewer of them than unknowns, and the factor is
            square. The sub-gradient method on the l1 loss, with a small initialisation and decaying steps, still finds X*;
            gradient descent on the squared loss fits the corruption (Ma and Fattahi, 2022).
`completion`  Known are entries of X*. Alternating minimisation divides the error by a constant factor in each iteration, exact or
            by sketched, inexact least squares, which take ~ |Ω|·k operations for |Ω|·k² (Gu, Song, Yin and Zhang, 2024).
`subspace`  The full matrix, rank 6, trained by `GaLoreAdamW` of rank 4: it converges because the subspace moves, and stalls
            where it does not. Refresh policies and projectors side by side, and galore_torch where it is installed.
`rotation`  With rank equal to the short side, `GaLoreAdamW` is AdamW on the rotated matrix, to rounding error.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sensing.completion import completion, cost_by_rank
from torch import Tensor

import lowrank_optim as lo
from lowrank_optim.console import accept_any_text

NEVER = 10**9
"""An update_proj_gap that no run reaches: the subspace of the first gradient is kept."""


# --- problems ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Measurements of a hidden matrix: y_i = ⟨A_i, X*⟩ (+ corruption)."""

    target: Tensor  # X*, m×n
    operator: Tensor  # one row vec(A_i)ᵀ for each measurement
    measured: Tensor  # y

    def residual(self, matrix: Tensor) -> Tensor:
        """A(X) − y."""
        return self.operator @ matrix.flatten() - self.measured

    def adjoint(self, values: Tensor) -> Tensor:
        """Σ_i values_i A_i, an m×n matrix; with the residual of X this is the gradient of ½‖A(X) − y‖² in X."""
        return (values @ self.operator).view_as(self.target)


def normal(*shape: int, rng: torch.Generator) -> Tensor:
    """Independent standard normal numbers in float64."""
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def rectangular_problem(rows: int, cols: int, rank: int, count: int, rng: torch.Generator) -> Problem:
    """A Gaussian matrix of the given rank; entries of A_i have variance 1/count, so that ‖A(X)‖ ≈ ‖X‖_F."""
    target = normal(rows, rank, rng=rng) @ normal(rank, cols, rng=rng) / math.sqrt(rank)
    operator = normal(count, rows * cols, rng=rng) / math.sqrt(count)
    return Problem(target, operator, operator @ target.flatten())


def psd_problem(size: int, rank: int, count: int, rng: torch.Generator, corrupted: float = 0.0) -> Problem:
    """A positive semidefinite matrix with eigenvalues from 1 down to 0.6.

    Args:
        corrupted: fraction of the measurements to which noise of ten times the size of X* is added.
    """
    vectors = torch.linalg.qr(normal(size, rank, rng=rng)).Q
    target = vectors * torch.linspace(1.0, 0.6, rank, dtype=torch.float64) @ vectors.T
    operator = normal(count, size * size, rng=rng) / math.sqrt(count)
    hit = torch.rand(count, generator=rng, dtype=torch.float64) < corrupted
    noise = 10.0 * normal(count, rng=rng) / math.sqrt(count)
    return Problem(target, operator, operator @ target.flatten() + hit * noise)


# --- gradient descent on factors -----------------------------------------------------------------------------------------------


def symmetric_descent(problem: Problem, width: int, steps: int, rng: torch.Generator, lr: float = 0.1) -> Tensor:
    """Errors ‖UUᵀ − X*‖_F² of gradient descent on ½‖A(UUᵀ) − y‖², U n×width from a moderate random start."""
    size = problem.target.shape[0]
    gram, image = problem.operator.T @ problem.operator, problem.measured @ problem.operator
    u = 0.5 * normal(size, width, rng=rng) / math.sqrt(size)
    errors = torch.empty(steps, dtype=torch.float64)
    for t in range(steps):
        product = u @ u.T
        errors[t] = (product - problem.target).square().sum()
        grad = (gram @ product.flatten() - image).view(size, size)
        u = u - lr * (grad + grad.T) @ u
    return errors


def rebalanced(f: Tensor, g: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """With F = P S Qᵀ: F ← β P and G ← G Q S / β. FGᵀ stays, and FᵀF = β² I."""
    left, values, right = torch.linalg.svd(f, full_matrices=False)
    return beta * left, g @ right.T * (values / beta)


def asymmetric_descent(
    problem: Problem,
    width: int,
    steps: int,
    rng: torch.Generator,
    lr: float = 0.2,
    scale: float = 1.5,
    beta: float | None = None,
) -> Tensor:
    """Errors ‖FGᵀ − X*‖_F² of gradient descent on ½‖A(FGᵀ) − y‖², F and G n×width.

    F starts at a size α of `scale`, three times larger than G. Descent keeps FᵀF − GᵀG nearly as it is, and this imbalance is what
    makes the convergence linear in the superfluous columns, where symmetric factors vanish together and their gradient with them.
    It is ~ α², and so is the rate.

    With `beta`, one step is changed: `rebalanced`, once ‖A(FGᵀ) − y‖ is below a tenth of ‖y‖.
    """
    size = problem.target.shape[0]
    gram, image = problem.operator.T @ problem.operator, problem.measured @ problem.operator
    f = scale * normal(size, width, rng=rng) / math.sqrt(size)
    g = scale / 3 * normal(size, width, rng=rng) / math.sqrt(size)
    near = 0.1 * problem.measured.norm()
    errors = torch.empty(steps, dtype=torch.float64)
    for t in range(steps):
        product = f @ g.T
        errors[t] = (product - problem.target).square().sum()
        if beta is not None and problem.residual(product).norm() < near:
            (f, g), beta = rebalanced(f, g, beta), None
        grad = (gram @ product.flatten() - image).view(size, size)
        f, g = f - lr * grad @ g, g - lr * grad.T @ f
    return errors


def fit_line(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Slope of the least-squares line through the points, and the share of the variance of y that it explains (R²)."""
    x, y = x - x.mean(), y - y.mean()
    slope = (x @ y) / (x @ x)
    return float(slope), float(1.0 - (y - slope * x).square().sum() / y.square().sum())


def power_law(errors: Tensor) -> tuple[float, float]:
    """Exponent p of errors ~ T^p over the last decade of the run, and R² of the fit (log-log)."""
    start = len(errors) // 10
    times = torch.arange(start, len(errors), dtype=errors.dtype)
    return fit_line(times.log(), errors[start:].log())


def linear_rate(errors: Tensor, below: float = 1e-4, floor: float = 1e-24) -> tuple[float, float]:
    """Slope of log10(errors) per iteration while they fall from `below` to `floor`, and R² of the fit (log-linear)."""
    inside = ((errors < below) & (errors > floor)).nonzero().squeeze(1)
    return fit_line(inside.to(errors.dtype), errors[inside].log10())


def late_rate(errors: Tensor, floor: float = 1e-24) -> tuple[float, float]:
    """Slope of log10(errors) per iteration in the second half of the time before they reach `floor`, and R² of the fit."""
    above = (errors > floor).nonzero().squeeze(1)
    late = above[len(above) // 2 :]
    return fit_line(late.to(errors.dtype), errors[late].log10())


SCALES = (0.4, 0.2, 0.1)


def scale(seed: int = 0) -> dict[tuple[float, bool], Tensor]:
    """Error curves by (α, whether one step is changed): 20×20, rank 3, width 6, the same directions for every α."""
    problem = psd_problem(20, 3, 1200, torch.Generator().manual_seed(seed))

    def run(alpha: float, steps: int, beta: float | None) -> Tensor:
        rng = torch.Generator().manual_seed(seed + 100)
        return asymmetric_descent(problem, 6, steps, rng, scale=alpha, beta=beta)

    # The rate shows once the error is below α⁴, after a time ~ α⁻².
    plain = {(alpha, False): run(alpha, int(400 / alpha**1.3), None) for alpha in SCALES}
    return plain | {(alpha, True): run(alpha, 700, 1.0) for alpha in SCALES}


def rates(seed: int = 0, steps: int = 10_000) -> dict[str, Tensor]:
    """Error curves of the three parametrisations on one problem: 20×20, rank 3, 1200 measurements."""
    rng = torch.Generator().manual_seed(seed)
    rank = 3
    problem = psd_problem(20, rank, 1200, rng)
    return {
        "symmetric, width 3 = rank": symmetric_descent(problem, rank, steps, rng),
        "symmetric, width 6": symmetric_descent(problem, 2 * rank, steps, rng),
        "asymmetric, width 6": asymmetric_descent(problem, 2 * rank, steps, rng),
    }


# --- gross corruption ----------------------------------------------------------------------------------------------------------


def factor_descent(
    problem: Problem, loss: str, init: float, step_size: Callable[[int], float], steps: int, rng: torch.Generator
) -> Tensor:
    """Relative errors ‖UUᵀ − X*‖_F / ‖X*‖_F of (sub-)gradient descent on a square factor U that starts as `init` times a rotation.

    Args:
        loss: "l1", Σ|A(UUᵀ) − y| / √N (a mean, as the A_i carry a factor 1/√N), or "l2", ½‖A(UUᵀ) − y‖².
        step_size: the step size of iteration t = 0, 1, …
    """
    size = problem.target.shape[0]
    u = init * torch.linalg.qr(normal(size, size, rng=rng)).Q
    errors = torch.empty(steps, dtype=torch.float64)
    for t in range(steps):
        product = u @ u.T
        errors[t] = (product - problem.target).norm() / problem.target.norm()
        residual = problem.residual(product)
        values = residual.sign() / math.sqrt(len(residual)) if loss == "l1" else residual
        grad = problem.adjoint(values)
        u = u - step_size(t) * (grad + grad.T) @ u
    return errors


def robust(seed: int = 0, steps: int = 1000) -> dict[str, Tensor]:
    """Error curves on a 40×40 problem of rank 3 with 800 measurements (820 unknowns), a tenth of them corrupted."""
    rng = torch.Generator().manual_seed(seed)
    problem = psd_problem(40, 3, 800, rng, corrupted=0.1)

    def geometric(t: int) -> float:
        return 0.2 * 0.99**t

    def polynomial(t: int) -> float:
        return 0.2 / (1 + t / 50)

    runs = {
        "l1, geometric steps": ("l1", 1e-6, geometric),
        "l1, polynomial steps": ("l1", 1e-6, polynomial),
        "l1, geometric steps, large start": ("l1", 0.3, geometric),
        "l2, constant steps": ("l2", 1e-6, lambda t: 0.1),
    }
    return {name: factor_descent(problem, loss, init, size, steps, rng) for name, (loss, init, size) in runs.items()}


# --- low-rank optimizers on the full matrix --------------------------------------------------------------------------------------


def train(
    problem: Problem,
    optimizer: Callable[[torch.nn.Parameter], torch.optim.Optimizer],
    steps: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Relative errors ‖W − X*‖_F / ‖X*‖_F of a full matrix W, from zero, under the exact gradient of ½‖A(W) − y‖².

    The learning rate falls to zero along a cosine.
    """
    weight = torch.nn.Parameter(torch.zeros_like(problem.target, dtype=dtype))
    opt = optimizer(weight)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    gram, image = (problem.operator.T @ problem.operator).to(dtype), (problem.measured @ problem.operator).to(dtype)
    target = problem.target.to(dtype)
    errors = torch.empty(steps + 1, dtype=torch.float64)
    for t in range(steps):
        errors[t] = (weight.detach() - target).norm() / target.norm()
        weight.grad = (gram @ weight.detach().flatten() - image).view_as(weight)
        opt.step()
        schedule.step()
    errors[steps] = (weight.detach() - target).norm() / target.norm()
    return errors


def determined_problem(seed: int) -> Problem:
    """30×40, rank 6, 1.5 measurements for each entry: least squares alone determines X*."""
    return rectangular_problem(30, 40, 6, 1800, torch.Generator().manual_seed(seed))


def galore(
    gap: int, on_refresh: str = "keep", projector: str = "svd"
) -> Callable[[torch.nn.Parameter], torch.optim.Optimizer]:
    """A builder of `GaLoreAdamW` of rank 4 for one parameter."""

    def build(weight: torch.nn.Parameter) -> torch.optim.Optimizer:
        group = {"params": [weight], "rank": 4, "update_proj_gap": gap, "scale": 1.0}
        return lo.GaLoreAdamW(
            [group], lr=0.1, weight_decay=0.0, projector=projector, on_refresh=on_refresh, stagger=False
        )

    return build


def galore_torch(gap: int) -> Callable[[torch.nn.Parameter], torch.optim.Optimizer]:
    """The same from the galore_torch package (float32 bases whatever the parameter, so train it in float32)."""
    logging.disable()  # it imports transformers, which reports what else could be installed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from galore_torch import GaLoreAdamW
    logging.disable(logging.NOTSET)

    def build(weight: torch.nn.Parameter) -> torch.optim.Optimizer:
        group = {"params": [weight], "rank": 4, "update_proj_gap": gap, "scale": 1.0, "proj_type": "std"}
        return GaLoreAdamW([group], lr=0.1, no_deprecation_warning=True)

    return build


def subspace(seed: int = 0, steps: int = 1000, gap: int = 20) -> dict[tuple[str, str, str], Tensor]:
    """Error curves by (refresh, policy, projector), where refresh is "every 20" or "never"; galore_torch's where it is installed."""
    problem = determined_problem(seed)
    often = f"every {gap}"
    curves = {}
    for projector in ("svd", "randomized_svd"):
        for policy in ("keep", "reset", "rotate"):
            curves[often, policy, projector] = train(problem, galore(gap, policy, projector), steps)
        curves["never", "–", projector] = train(problem, galore(NEVER, projector=projector), steps)
    if importlib.util.find_spec("galore_torch"):
        curves[often, "keep", "galore_torch"] = train(problem, galore_torch(gap), steps, torch.float32)
        curves["never", "–", "galore_torch"] = train(problem, galore_torch(NEVER), steps, torch.float32)
    return curves


# --- full rank is AdamW in rotated coordinates -------------------------------------------------------------------------------------


def rotation(rows: int, cols: int, seed: int = 0, steps: int = 50) -> float:
    """Largest difference between `GaLoreAdamW` with rank = short side and AdamW on the rotated matrix, relative to the weights.

    W V, with V from the SVD of the first gradient (Uᵀ W where the matrix is wide), is trained by `torch.optim.AdamW` with the
    gradient G V and turned back. A basis of full rank loses nothing, so this is all that GaLore does to AdamW there.
    """
    rng = torch.Generator().manual_seed(seed)
    problem = rectangular_problem(rows, cols, 3, rows * cols, rng)
    start = normal(rows, cols, rng=rng)
    options = {"lr": 0.05, "weight_decay": 0.1, "eps": 1e-8}

    weight = torch.nn.Parameter(start.clone())
    group = {"params": [weight], "rank": min(rows, cols), "update_proj_gap": NEVER, "scale": 1.0}
    low_rank = lo.GaLoreAdamW([group], projector="svd", stagger=False, **options)

    u, _, vh = torch.linalg.svd(problem.adjoint(problem.residual(start)), full_matrices=False)
    tall = rows >= cols

    def rotate(matrix: Tensor) -> Tensor:
        return matrix @ vh.T if tall else u.T @ matrix

    def turn_back(matrix: Tensor) -> Tensor:
        return matrix @ vh if tall else u @ matrix

    rotated = torch.nn.Parameter(rotate(start))
    adamw = torch.optim.AdamW([rotated], **options)
    gaps = torch.empty(steps, dtype=torch.float64)
    for t in range(steps):
        weight.grad = problem.adjoint(problem.residual(weight.detach()))
        rotated.grad = rotate(problem.adjoint(problem.residual(turn_back(rotated.detach()))))
        low_rank.step()
        adamw.step()
        gaps[t] = (weight.detach() - turn_back(rotated.detach())).norm() / weight.detach().norm()
    return float(gaps.max())


# --- reports -------------------------------------------------------------------------------------------------------------------


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on the terminal: by rich where it is installed, else in plain columns."""
    if importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.table import Table

        table = Table()
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*row)
        console = Console()
        console.print(f"\n{title}", style="bold", highlight=False)
        console.print(table)
        return
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}")
    for row in [header, *rows]:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def report_rates(curves: dict[str, Tensor]) -> None:
    """Final errors and fitted slopes."""
    rows = []
    for name, errors in curves.items():
        exponent, fit = power_law(errors)
        slow = float(errors[-1]) > 1e-12
        if not slow:
            rate, fit = linear_rate(errors)
        law = f"T^{exponent:.2f}" if slow else f"10^({rate:.4f} T)"
        rows.append([name, f"{float(errors[-1]):.1e}", law, f"{fit:.4f}"])
    steps = len(next(iter(curves.values())))
    print_table(f"Gradient descent on factors, {steps} iterations", ["factors", "‖X − X*‖²", "fitted law", "R²"], rows)


def report_scale(curves: dict[tuple[float, bool], Tensor]) -> None:
    """Fitted rates by the size of the start."""
    rows = []
    for alpha in dict.fromkeys(alpha for alpha, _ in curves):
        plain, changed = (late_rate(curves[alpha, each])[0] for each in (False, True))
        rows.append([f"{alpha:g}", f"10^({plain:.5f} T)", f"10^({changed:.4f} T)"])
    print_table(
        "Imbalanced factors of too many columns from a start of size α", ["α", "descent", "one step changed"], rows
    )


def report_completion(curves: dict[str, tuple[Tensor, int]]) -> None:
    """Final relative errors, factors of an iteration and multiplications."""
    rows = []
    for name, (errors, work) in curves.items():
        rate, _ = fit_line(torch.arange(len(errors), dtype=errors.dtype), errors.log10())
        rows.append([name, f"{float(errors[-1]):.1e}", f"{10**rate:.2f}", f"{work / 1e6:.0f} M"])
    head = ["least squares", "relative error", "factor an iteration", "multiplications"]
    print_table(f"Matrix completion, rank 5, {len(errors)} iterations", head, rows)
    costs = [[str(rank), *(f"{work / 1e6:.1f} M" for work in both)] for rank, both in cost_by_rank().items()]
    print_table("Multiplications for 20 rows of 4000 entries", ["rank", "exact", "sketch, 3 rounds"], costs)


def report_robust(curves: dict[str, Tensor]) -> None:
    """Final relative errors."""
    rows = [[name, f"{float(errors[-1]):.1e}"] for name, errors in curves.items()]
    print_table("A tenth of the measurements grossly corrupted", ["loss and steps", "relative error"], rows)


def report_subspace(curves: dict[tuple[str, str, str], Tensor]) -> None:
    """Final relative errors, one column for each projector."""
    projectors = list(dict.fromkeys(projector for *_, projector in curves))
    settings = sorted({(refresh, policy) for refresh, policy, _ in curves}, key=lambda s: (s[0] == "never", s))
    rows = []
    for setting in settings:
        ends = [curves.get((*setting, projector)) for projector in projectors]
        rows.append([*setting, *("" if errors is None else f"{float(errors[-1]):.1%}" for errors in ends)])
    title = "GaLoreAdamW of rank 4 on a matrix of rank 6: relative error"
    print_table(title, ["refresh", "on_refresh", *projectors], rows)


def report_rotation(seed: int) -> None:
    """Differences from AdamW on the rotated matrix, by shape."""
    rows = [[f"{m}×{n}", f"{rotation(m, n, seed):.1e}"] for m, n in ((30, 20), (20, 30), (24, 24))]
    print_table("Rank = short side, 50 steps: difference from AdamW on W V", ["shape", "relative"], rows)


def draw_rates(axis: Any, curves: dict[str, Tensor]) -> None:
    """Errors of gradient descent on factors, and the slope of too many columns."""
    for name, errors in curves.items():
        axis.loglog(range(1, len(errors) + 1), errors, label=name)
    steps = len(errors)
    times, end = torch.tensor([steps / 100, steps]), float(curves["symmetric, width 6"][-1])
    axis.loglog(times, 4 * end * (times / steps) ** -2.0, "k--", linewidth=1, label="slope $T^{-2}$")
    axis.set(title="Factors: too many columns slow down", xlabel="iteration T", ylabel=r"$\|X - X^*\|_F^2$")
    axis.set_ylim(1e-26, 1e2)


def draw_scale(axis: Any, curves: dict[tuple[float, bool], Tensor]) -> None:
    """Errors by the size of the start."""
    colours = {alpha: f"C{number}" for number, alpha in enumerate(dict.fromkeys(a for a, _ in curves))}
    for (alpha, changed), errors in curves.items():
        style = {"linestyle": "-" if changed else "--", "color": colours[alpha]}
        axis.semilogy(errors, **style, label=None if changed else f"α = {alpha:g}")
    axis.plot([], [], "k-", label="each with one step changed")
    axis.set(title="A small start", xlabel="iteration T", ylabel=r"$\|X - X^*\|_F^2$")
    axis.set_ylim(1e-26, 1e2)
    axis.set_xlim(0, min(len(errors) for (_, changed), errors in curves.items() if not changed))  # no line ends before


def draw_robust(axis: Any, curves: dict[str, Tensor]) -> None:
    """Relative errors of (sub-)gradient descent."""
    for name, errors in curves.items():
        axis.semilogy(errors, label=name)
    axis.set(title="10 % of the measurements corrupted", xlabel="iteration", ylabel=r"$\|UU^T - X^*\|_F\,/\,\|X^*\|_F$")


def draw_completion(axis: Any, curves: dict[str, tuple[Tensor, int]]) -> None:
    """Relative errors of alternating minimisation."""
    for name, (errors, work) in curves.items():
        wide = 4.0 if name.startswith("exact") else 1.5  # that of three rounds lies on it
        label = f"{name}: {work / 1e6:.0f} M multiplications"
        axis.semilogy(torch.arange(1, len(errors) + 1), errors, linewidth=wide, label=label)
    axis.set_xticks(range(0, 1 + max(len(errors) for errors, _ in curves.values()), 5))
    axis.set(title="Completion: 30 % of the entries", xlabel="iteration", ylabel=r"$\|UV^T - M\|_F\,/\,\|M\|_F$")


def draw_subspace(axis: Any, curves: dict[tuple[str, str, str], Tensor]) -> None:
    """Relative errors of the full matrix, by refresh and policy."""
    for (refresh, policy, projector), errors in curves.items():
        if projector == "svd":
            axis.semilogy(errors, label=f"refresh {refresh}" + ("" if refresh == "never" else f", {policy}"))
    axis.set(title="GaLoreAdamW, rank 4 of 6", xlabel="step", ylabel=r"$\|W - X^*\|_F\,/\,\|X^*\|_F$")
    ticks = [1.0, 0.5, 0.2, 0.1, 0.05, 0.02]
    axis.set_yticks(ticks, labels=[f"{tick:.0%}" for tick in ticks])
    axis.minorticks_off()


RUNS: dict[str, tuple[Callable[..., Any], Callable[..., None], Callable[..., None]]] = {
    "rates": (rates, report_rates, draw_rates),
    "scale": (scale, report_scale, draw_scale),
    "robust": (robust, report_robust, draw_robust),
    "completion": (completion, report_completion, draw_completion),
    "subspace": (subspace, report_subspace, draw_subspace),
}
"""Of each part that has curves: what makes them from a seed, prints their table, and draws them."""

PARTS = (*RUNS, "rotation")


def plot(path: Path, curves: dict[str, Any]) -> None:
    """One PNG with a panel for each part that was run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(len(curves), 3)  # as wide as a page
    rows = -(-len(curves) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.4 * columns, 4.2 * rows), squeeze=False, layout="constrained")
    for axis, (part, drawn) in zip(axes.flat, curves.items(), strict=False):
        RUNS[part][2](axis, drawn)
        axis.legend(fontsize=8, loc="lower right" if part == "scale" else "lower left")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(curves) :]:
        axis.set_axis_off()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the chosen parts, print their tables and write the plot."""
    accept_any_text()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", metavar="part", help=f"which parts to run: {', '.join(PARTS)} (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of problems and initialisations (default 0)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="write the error curves to this file")
    args = parser.parse_args(arguments)
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    chosen = args.parts or PARTS
    if args.plot and set(chosen) <= {"rotation"}:
        parser.error(f"--plot needs one of the parts {', '.join(RUNS)}")

    curves = {}
    for part, (run, report, _) in RUNS.items():
        if part in chosen:
            curves[part] = run(args.seed)
            report(curves[part])
    if "rotation" in chosen:
        report_rotation(args.seed)
    if args.plot:
        plot(args.plot, curves)
        print(f"Wrote {args.plot}")


if __name__ == "__main__":
    main()
