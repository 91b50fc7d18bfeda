"""What helps to choose a rank and a gap between refreshes: ranks of weights and gradients, how far subspaces move, what they hold.

`effective_ranks` looks at a model, `subspace_energy` at an optimizer of the package after backward, `subspace_overlap` goes along
with its steps. All give numbers by layer; `plot` draws them. `intruder_dimensions` compares adapters with the weights that they
change.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lowrank_optim.adapters.intruders import Intruders, LayerIntruders, intruder_dimensions
from lowrank_optim.groups.matrices import matrix_shape, matrix_view
from lowrank_optim.groups.parameters import find_parameters
from lowrank_optim.kernels import compute_dtype, no_autograd_no_autocast
from lowrank_optim.optimizers import LowRankOptimizer
from lowrank_optim.projectors.base import Basis
from lowrank_optim.projectors.dense_basis import DenseBasis
from lowrank_optim.sharding.dtensor import is_sharded
from lowrank_optim.sharding.param_sharding import LOCAL
from lowrank_optim.step.param_plan import ParamPlan
from lowrank_optim.step.trained_param import TrainedParam

__all__ = [
    "EffectiveRank",
    "Intruders",
    "LayerIntruders",
    "Overlap",
    "SubspaceOverlap",
    "effective_ranks",
    "intruder_dimensions",
    "plot",
    "subspace_energy",
    "subspace_overlap",
]


# Ranks --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EffectiveRank:
    """How many directions a matrix with singular values σ has.

    entropy: exp(−Σ p log p) for p = σ/Σσ; d for equal values, 1 for a matrix of rank 1.
    stable: Σσ²/max σ².
    energy: the smallest r with Σ_{k≤r} σ² ≥ share·Σσ².
    full: d = min(m, n).
    """

    entropy: float
    stable: float
    energy: float
    full: int


@torch.no_grad()
def effective_ranks(
    model: nn.Module, of: Literal["weights", "gradients"] = "weights", *, share: float = 0.9
) -> dict[str, EffectiveRank]:
    """The effective ranks of a model's matrices, or of their gradients after backward, by the name of the parameter.

    Embeddings, heads and convolutions (as out × rest) are there, too; of a stack of matrices the mean. A zero matrix is left out.

    Args:
        model: the model.
        of: "weights", or "gradients" for the parameters that have one.
        share: of Σσ² that `energy` is about.

    Raises:
        TypeError: no nn.Module.
        ValueError: a value out of range; no matrix, or none with a gradient; one that is sharded or not finite, by name.

    Memory: a copy of one matrix in float64 (float32 on accelerators).

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = torch.nn.Linear(8, 8, bias=False)
        >>> _ = torch.nn.init.eye_(model.weight)
        >>> lo.diagnostics.effective_ranks(model)["weight"]
        EffectiveRank(entropy=8.0, stable=8.0, energy=8.0, full=8)

    Paper: entropy: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if of not in ("weights", "gradients"):
        raise ValueError(f"of is {of!r}; valid values are 'weights' and 'gradients'")
    if not 0 < share <= 1:
        raise ValueError(f"share is {share!r}; it must be in (0, 1]")
    found: dict[str, EffectiveRank] = {}
    seen = 0
    for entry in find_parameters(model):
        tensor = entry.param if of == "weights" else entry.param.grad
        if entry.kind == "no_decay" or tensor is None or matrix_shape(tuple(entry.param.shape), entry.layout) is None:
            continue
        seen += 1
        if is_sharded(tensor):
            raise ValueError(
                f"{entry.names[0]} is sharded (DTensor); look at the unsharded model, from a full state dict"
            )
        matrix = matrix_view(tensor.detach(), entry.layout)
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError(f"{entry.names[0]}: the {of[:-1]} is not finite")
        values = torch.linalg.svdvals(matrix.to(torch.float64 if matrix.device.type == "cpu" else torch.float32))
        ranks = [_ranks(each, share) for each in values.double().cpu().view(-1, values.shape[-1]) if each[0] > 0]
        if ranks:
            entropy, stable, energy = (sum(part) / len(ranks) for part in zip(*ranks, strict=True))
            found[entry.names[0]] = EffectiveRank(entropy, stable, energy, values.shape[-1])
    if not seen:
        raise ValueError("no matrix has a gradient; call this after backward" if of == "gradients" else "no matrix")
    return found


def _ranks(values: Tensor, share: float) -> tuple[float, float, float]:
    """Entropy, stable rank, and rank for a share, of singular values, largest first."""
    p = values / values.sum()
    entropy = -torch.special.xlogy(p, p).sum()
    squares = values.square()
    sums = squares.cumsum(0)
    reached = sums >= share * sums[-1] * (1 - 1e-12)
    return round(float(entropy.exp()), 9), float(squares.sum() / squares[0]), float(int(reached.nonzero()[0]) + 1)


# Subspaces ----------------------------------------------------------------------------------------------------------------------


def _subspaces(optimizer: LowRankOptimizer) -> list[tuple[Tensor, ParamPlan]]:
    """The matrices that an optimizer trains in subspaces."""
    if not isinstance(optimizer, LowRankOptimizer):
        raise TypeError(f"optimizer must be one of this package, got {type(optimizer).__name__}")
    found = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            plan = optimizer.plan_of(param)
            if plan.space is None or plan.projector.moments_change_shape or plan.space.rank == 0:
                continue
            if plan.sharding is not LOCAL:
                raise ValueError(f"{plan.name} is sharded (DTensor); its subspace cannot be looked at")
            found.append((param, plan))
    if not found:
        raise ValueError("the optimizer trains no matrix in a subspace (no group has a rank, or blocks take turns)")
    return found


def _standing(optimizer: LowRankOptimizer, param: Tensor) -> TrainedParam | None:
    """A parameter with its state; None as long as it has no subspace from a gradient."""
    if not optimizer.state.get(param):
        return None
    trained = optimizer.trained(param)
    return trained if int(trained.state["last_refresh"]) >= 0 else None


@no_autograd_no_autocast
def subspace_energy(optimizer: LowRankOptimizer) -> dict[str, float]:
    """The share of each gradient that lies in its subspace, ‖P G‖²/‖G‖² with P the orthogonal projection, by parameter.

    Call it between backward and `step`, after the first step. The subspaces are those that stand; a refresh that is due comes later.
    Small numbers say that the subspace is old (a smaller gap) or too small (a higher rank). For gradients that are random, it is r/n.

    Args:
        optimizer: of the package; the parameters with a gradient are looked at.

    Raises:
        TypeError: another optimizer.
        ValueError: no matrix has a rank, or none has both a gradient and a subspace yet; a sharded one.

    Memory: two matrices of the size of one gradient.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = torch.nn.Linear(32, 16, bias=False)
        >>> optimizer = lo.GaLoreAdamW(lo.param_groups(model, rank=4, include="weight"), lr=1e-3)
        >>> x = torch.randn(2, 32)  # gradients of rank 2
        >>> for _ in range(2):
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     model(x).square().sum().backward()
        >>> optimizer.step()
        >>> round(lo.diagnostics.subspace_energy(optimizer)["weight"], 3)
        1.0
    """
    found: dict[str, float] = {}
    for param, plan in _subspaces(optimizer):
        trained = _standing(optimizer, param)
        if param.grad is None or trained is None:
            continue
        grad = trained.local_grad()
        grad = grad.to(compute_dtype(grad.dtype))
        basis = trained.basis()
        inside = torch.zeros_like(grad)
        basis.lift_(inside, basis.project(grad))
        whole = float(grad.square().sum())
        if whole > 0:
            found[plan.name] = float(inside.square().sum()) / whole
    if not found:
        raise ValueError(
            "no matrix has both a gradient and a subspace; call this after backward, from the second step on"
        )
    return found


class Overlap(NamedTuple):
    """A refresh: the parameter's step, from 1 on, its name, and the share of the old subspace that the new one holds."""

    step: int
    name: str
    overlap: float


class SubspaceOverlap:
    """What `subspace_overlap` returns. `rows`: every refresh so far but the first of each parameter; `remove()` ends it."""

    def __init__(self, optimizer: LowRankOptimizer) -> None:
        self.rows: list[Overlap] = []
        self._names = {
            param: tuple(plan.projector.init(plan.space, 0, plan.device))
            for param, plan in _subspaces(optimizer)
            if plan.space is not None
        }
        self._old: dict[Tensor, tuple[int, dict[str, Tensor]]] = {}
        self._look(optimizer)
        self._hook = optimizer.register_step_post_hook(self._look)

    @property
    def latest(self) -> dict[str, float]:
        """The overlap at the last refresh of each parameter, by name."""
        return {row.name: row.overlap for row in self.rows}

    @property
    def mean(self) -> dict[str, float]:
        """The mean over all refreshes of each parameter, by name."""
        by_name: dict[str, list[float]] = {}
        for row in self.rows:
            by_name.setdefault(row.name, []).append(row.overlap)
        return {name: sum(values) / len(values) for name, values in by_name.items()}

    def remove(self) -> None:
        """Look no more, and free the copies."""
        self._hook.remove()
        self._old.clear()

    @no_autograd_no_autocast
    def _look(self, optimizer: Any, *_: Any) -> None:
        """Compare the subspaces that have changed with the copies of those before."""
        for param, plan in _subspaces(optimizer):
            trained = _standing(optimizer, param)
            if trained is None or param not in self._names:
                continue
            refreshed = int(trained.state["last_refresh"])
            known = self._old.get(param)
            if known is not None and known[0] == refreshed:
                continue
            if known is not None:
                old = trained.basis_of({**trained.state, **known[1]}, known[0])
                self.rows.append(Overlap(refreshed + 1, plan.name, _overlap(trained.basis(), old)))
            self._old[param] = refreshed, {name: trained.state[name].clone() for name in self._names[param]}


def _overlap(new: Basis, old: Basis) -> float:
    """‖P_oldᵀ P_new‖²/r with orthonormal bases."""
    if isinstance(new, DenseBasis) and isinstance(old, DenseBasis) and not new.orthonormal:
        new, old = (replace(each, matrix=torch.linalg.qr(each.matrix)[0], orthonormal=True) for each in (new, old))
    index, before = getattr(new, "indices", None), getattr(old, "indices", None)
    if isinstance(index, Tensor) and isinstance(before, Tensor):  # of columns, rows or entries
        return float((index.unsqueeze(-1) == before.unsqueeze(-2)).any(-1).double().mean())
    return float(new.overlap(old))


def subspace_overlap(optimizer: LowRankOptimizer) -> SubspaceOverlap:
    """Record, from now on, how much successive subspaces have in common: ‖P_oldᵀ P_new‖²/r.

    It is 1 for the same subspace, and about r/n for random ones.

    Overlaps near 1 say that refreshes could be rarer (a larger `update_proj_gap`), small ones that they come too late or that the
    gradient has no leading directions. For both sides ("full") it is the mean of the two. Columns, rows and entries count those that
    were chosen before. Updates in backward and accumulation are seen, too, at the end of each step.

    Args:
        optimizer: of the package, with a rank in some group; it goes on as before. The record is not in its checkpoints.

    Returns:
        A `SubspaceOverlap`: `rows`, `latest` and `mean` by parameter, `remove()`.

    Raises:
        TypeError: another optimizer.
        ValueError: no matrix has a rank; a sharded one.

    Memory: a copy of each stored basis, as it is stored.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = torch.nn.Linear(32, 16, bias=False)
        >>> groups = lo.param_groups(model, rank=2, include="weight", update_proj_gap=1)
        >>> optimizer = lo.GaLoreAdamW(groups, lr=1e-3)
        >>> overlap, x = lo.diagnostics.subspace_overlap(optimizer), torch.randn(2, 32)
        >>> for _ in range(3):
        ...     model(x).square().sum().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> [(row.step, round(row.overlap, 3)) for row in overlap.rows]
        [(2, 1.0), (3, 1.0)]
    """
    return SubspaceOverlap(optimizer)


# The picture --------------------------------------------------------------------------------------------------------------------


def plot(numbers: Mapping[str, Mapping[str, float]], path: str | Path) -> None:
    """Draw numbers by layer: one panel for each title, one bar for each name. The file's ending says the format.

    Args:
        numbers: by title, such as `{"overlap": overlap.mean, "energy": subspace_energy(optimizer)}`, what is to be drawn by name.
        path: where to, a .png, .svg or .pdf.

    Raises:
        ValueError: nothing to draw.
        ImportError: matplotlib is not there.
    """
    panels = {title: values for title, values in numbers.items() if values}
    if not panels:
        raise ValueError("there are no numbers to draw")
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for values in panels.values() for name in values))
    size = (2.5 + 3.2 * len(panels), 1.2 + 0.22 * len(names))
    figure = Figure(figsize=size, dpi=140, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (title, values) in zip(axes, panels.items(), strict=True):
        places = [place for place, name in enumerate(names) if name in values]
        ax.barh(places, [values[names[place]] for place in places], color="#0072B2", height=0.7)
        ax.set_title(title, fontsize=10)
        ax.set_xlim(left=0)
        ax.grid(axis="x", alpha=0.25)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(names)), names, fontsize=7)
    axes[0].invert_yaxis()
    figure.savefig(path)
