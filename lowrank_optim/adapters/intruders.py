"""Intruder dimensions: leading directions of trained weights that are like none of the weights before training."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_optim.adapters.layers import Factors, base_of, columns_of, find_factors
from lowrank_optim.groups.matrices import matrix_shape, matrix_view
from lowrank_optim.groups.parameters import find_parameters
from lowrank_optim.kernels import no_autograd_no_autocast
from lowrank_optim.nn.decompositions import widened
from lowrank_optim.sharding.dtensor import is_sharded

_log = logging.getLogger("lowrank_optim")

WIDTH = 1e-3
"""Singular values that are nearer than this share of the largest are taken for equal."""


@dataclass(frozen=True)
class LayerIntruders:
    """The leading directions of one layer, largest singular value first.

    similarities: c_j, in [0, 1].
    values: σ_j of the trained weights.
    matched: the largest singular value of the directions of W₀ that u_j is like; 0 for those outside of W₀'s columns.
    clusters: how many these are; 1 where W₀ has no other singular value near.
    outside: ‖(I − P)u_j‖², P the projection on the columns of W₀.
    count: how many c_j are below the threshold.
    """

    similarities: tuple[float, ...]
    values: tuple[float, ...]
    matched: tuple[float, ...]
    clusters: tuple[int, ...]
    outside: tuple[float, ...]
    count: int


@dataclass(frozen=True)
class Intruders:
    """What `intruder_dimensions` returns; `print` shows it as a table.

    layers: by name.
    threshold: ε.
    """

    layers: dict[str, LayerIntruders]
    threshold: float

    @property
    def total(self) -> int:
        """The number of intruders of all layers."""
        return sum(each.count for each in self.layers.values())

    @property
    def counts(self) -> dict[str, int]:
        """The number of intruders of each layer."""
        return {name: each.count for name, each in self.layers.items()}

    def __str__(self) -> str:
        width = max([len("layer"), *map(len, self.layers)])
        lines = [f"{'layer':{width}}  intruders  least c  its sigma  outside  largest cluster"]
        for name, each in self.layers.items():
            least = min(range(len(each.similarities)), key=each.similarities.__getitem__)
            lines.append(
                f"{name:{width}}  {each.count:4d} of {len(each.values):2d}  {each.similarities[least]:7.3f}  "
                f"{each.values[least]:9.3g}  {each.outside[least]:7.3f}  {max(each.clusters):15d}"
            )
        looked = sum(len(each.values) for each in self.layers.values())
        lines.append(f"{'all':{width}}  {self.total:4d} of {looked:2d}  (c < {self.threshold:g})")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw the similarities, one row for each layer, one column for each direction; intruders have a ring. Needs matplotlib.

        Args:
            path: where to, a .png, .svg or .pdf.
        """
        from matplotlib.figure import Figure

        most = max(len(each.values) for each in self.layers.values())
        rows = [[*each.similarities, *[math.nan] * (most - len(each.values))] for each in self.layers.values()]
        figure = Figure(figsize=(3.5 + 0.3 * most, 1.4 + 0.22 * len(rows)), dpi=140, layout="constrained")
        ax = figure.subplots()
        image = ax.imshow(rows, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto", interpolation="nearest")
        rings = [(j, i) for i, row in enumerate(rows) for j, c in enumerate(row) if c < self.threshold]
        if rings:
            across, down = zip(*rings, strict=True)
            ax.scatter(across, down, s=30, facecolors="none", edgecolors="#D55E00", linewidths=1.2)
        ax.set_yticks(range(len(rows)), list(self.layers), fontsize=7)
        ax.set_xticks(range(most), [str(j + 1) for j in range(most)], fontsize=7)
        ax.set_xlabel("singular vector after training")
        figure.colorbar(image, label="similarity to one before")
        figure.savefig(path)


@no_autograd_no_autocast
def intruder_dimensions(
    model: nn.Module,
    top_k: int = 10,
    threshold: float = 0.5,
    adapter: str | None = None,
    *,
    base: nn.Module | None = None,
) -> Intruders:
    """Count the intruder dimensions of adapters: leading left singular vectors of W = W₀ + s B A that are like none of W₀'s.

        c_j = max over clusters of ‖V_clusterᵀ u_j‖,   intruders: {j ≤ k : c_j < ε}

    u_j are those of W, v_i those of W₀, all m of them: where W₀ has fewer columns than rows, the rest is one cluster, of σ = 0. A
    cluster are directions whose singular values differ by 0.001 σ₁ at most, for single vectors of equal values mean nothing. A
    direction outside of W₀'s columns is therefore like this cluster, and no intruder; `outside` says how much of it lies there.
    Models with many intruders are said to forget more of what they knew. The model stays as it is.

    Args:
        model: with adapters of peft: linear layers (quantised, too), DoRA, Conv1D, convolutions, embeddings. Stacks of experts, and
            factors that are no plain product, are left out, and logged. Or, with `base`, any trained or merged model.
        top_k: k, of each layer; at most the shorter side is looked at.
        threshold: ε.
        adapter: only this one; None takes all.
        base: the model before training. All matrices that have the same names in both are compared; adapters are not looked for.

    Returns:
        `layers` by name, `total`, `counts`; `print` and `plot(path)` show it.

    Raises:
        ValueError: no adapters, or no matrix that is in both; weights that are not finite, sharded or merged, by name; an argument
            out of range.

    Memory: one layer at a time: some copies of its weights and two d×d matrices, d the shorter side, in float64 (float32 on
    accelerators). Time: 2 symmetric eigenvalue decompositions of d×d a layer.

    Paper: Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion of Equivalence", 2024, arXiv:2410.21228.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> before, after = torch.nn.Linear(12, 8), torch.nn.Linear(12, 8)
        >>> after.load_state_dict(before.state_dict())
        <All keys matched successfully>
        >>> lo.diagnostics.intruder_dimensions(after, base=before).total
        0
    """
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"top_k is {top_k!r}; it must be a whole number of at least 1")
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"threshold is {threshold!r}; it must be in (0, 1]")
    matrices = _of_adapters(model, adapter) if base is None else _of_models(model, base)
    layers = {}
    for name, before, after in matrices:
        for matrix in (before, after):
            if not bool(torch.isfinite(matrix).all()):
                raise ValueError(f"the weights of {name} hold NaN or infinity")
        layers[name] = compare(before, after, top_k, threshold)
    if not layers:
        raise ValueError("there is no layer to compare" if base is None else "the models have no matrix in common")
    return Intruders(layers, threshold)


def compare(before: Tensor, after: Tensor, top_k: int, threshold: float) -> LayerIntruders:
    """The leading left singular vectors of a matrix beside all of another one."""
    vectors, values = left_singular(before)
    new, sizes = left_singular(after)
    count = min(top_k, len(sizes))
    shares = (vectors.mT @ new[:, :count]).square()
    outside = (1.0 - shares.sum(0)).clamp_min(0.0)
    if vectors.shape[1] < vectors.shape[0]:  # the rest of a complete basis, of singular value 0
        shares, values = torch.cat([shares, outside[None]]), torch.cat([values, values.new_zeros(1)])
    # Clusters are windows: those that begin at each value, largest first, and hold what is at most WIDTH σ₁ smaller.
    ends = torch.searchsorted(-values, -(values - WIDTH * values[0]), right=True)
    sums = torch.cat([torch.zeros_like(shares[:1]), shares.cumsum(0)])
    windows = sums[ends] - sums[:-1]
    best, where = windows.max(0)
    similar = [min(1.0, math.sqrt(c)) for c in best.clamp_min(0.0).tolist()]
    members = torch.arange(1, len(values) + 1, device=values.device)
    members[-1] += before.shape[0] - len(values)
    return LayerIntruders(
        tuple(similar),
        tuple(sizes[:count].tolist()),
        tuple(values[where].tolist()),
        tuple((members[ends[where] - 1] - where).tolist()),
        tuple(outside.tolist()) if vectors.shape[1] < vectors.shape[0] else (0.0,) * count,
        sum(c < threshold for c in similar),
    )


def left_singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """U (m×d) and σ, largest first, d = min(m, n): by the eigenvectors of R Rᵀ, where W or W = Q R is the matrix.

    Squares lose the vectors of σ < √ε σ₁ among each other, which are one cluster.
    """
    wide, q = widened(matrix), None
    if wide.shape[0] > wide.shape[1]:
        q, wide = torch.linalg.qr(wide)
    squares, vectors = torch.linalg.eigh(wide @ wide.mT)
    vectors = vectors.flip(-1)
    return vectors if q is None else q @ vectors, squares.flip(-1).clamp_min(0.0).sqrt()


# Which matrices -----------------------------------------------------------------------------------------------------------------


def _of_models(model: nn.Module, base: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The matrices of both models, by name; of a stack each one."""
    known = {name: entry.param for entry in find_parameters(base) for name in entry.names}
    for entry in find_parameters(model):
        name, shape = entry.names[0], tuple(entry.param.shape)
        if entry.kind == "no_decay" or matrix_shape(shape, entry.layout) is None or name not in known:
            continue
        if known[name].shape != shape:
            raise ValueError(f"{name} is {shape}, and {tuple(known[name].shape)} in the base")
        forms = []
        for param in (known[name], entry.param):
            _check_plain(name, param)
            matrix = matrix_view(param.detach(), entry.layout)
            forms.append(matrix.reshape(-1, *matrix.shape[-2:]))
        for number, (before, after) in enumerate(zip(*forms, strict=True)):
            yield (name if len(forms[0]) == 1 else f"{name}[{number}]"), before, after


def _of_adapters(model: nn.Module, adapter: str | None) -> Iterator[tuple[str, Tensor, Tensor]]:
    """W₀ and W of each layer, by its name and that of the adapter."""
    every = [each for each in find_factors(model) if adapter is None or each.adapter == adapter]
    if not every:
        raise ValueError("the model has no adapters" if adapter is None else f"the model has no adapter {adapter!r}")
    for each in every:
        for factor in (each.a, each.b):
            _check_plain(each.path, factor)
        if getattr(each.layer, "merged", False):
            raise ValueError(f"the adapter of {each.path} is merged into its weights; call unmerge_adapter() first")
        before = None if each.why_not or each.experts > 1 else _base_matrix(each)
        a, b = widened(each.a.flatten(1)), widened(each.b.flatten(1))
        if before is None or before.shape != (b.shape[0], a.shape[1]):
            why = each.why_not or "its base is no matrix that the product can be added to"
            _log.warning("intruder dimensions leave %s out: %s", each.path, why)
            continue
        after = before.to(b.dtype) + each.scaling * (b @ a)
        magnitudes = getattr(each.layer, "lora_magnitude_vector", {})
        if each.adapter in magnitudes:
            norms = torch.linalg.vector_norm(after, dim=1)
            size = magnitudes[each.adapter].weight.detach().flatten().to(after.dtype)
            after = after * (size / norms).unsqueeze(1)
        yield f"{each.path}.{each.adapter}", before, after


def _check_plain(name: str, tensor: Tensor) -> None:
    if is_sharded(tensor):
        raise ValueError(f"{name} is sharded (DTensor); look at the unsharded model, from a full state dict")


def _base_matrix(each: Factors) -> Tensor | None:
    """W₀ as the product lies; quantised weights are seen through their layer."""
    layer: Any = each.layer
    base = base_of(layer)
    while hasattr(base, "base_layer"):
        base = base.base_layer
    weight = getattr(base, "weight", None)
    if base is None:
        return None
    if isinstance(weight, Tensor) and weight.is_floating_point() and type(weight) is nn.Parameter:
        _check_plain(each.path, weight)
        matrix = weight.detach().flatten(1)
        turned = each.is_embedding or getattr(layer, "fan_in_fan_out", False)
        return matrix.mT if turned else matrix
    if each.a.dim() != 2 or each.is_embedding:
        return None
    return torch.cat(list(columns_of(base, each.b.shape[0], each.a.shape[1], each.a)), 1)
