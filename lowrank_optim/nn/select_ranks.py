"""`select_ranks`: how much rank each layer of a trained model needs, by one threshold on the singular values of all."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank_optim.kernels import as_python
from lowrank_optim.nn.decompositions import widened
from lowrank_optim.nn.reparametrized import Patterns, matrix_of, take_layers


def select_ranks(
    model: nn.Module,
    *,
    reduction: float,
    normalize: Literal["minmax", "max"] = "minmax",
    budget: Literal["ranks", "parameters"] = "ranks",
    min_ratio: float = 0.5,
    step: float | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> dict[str, int]:
    """Choose ranks for `factorize_` by one threshold on the singular values of all layers (WeLore). The model stays as it is.

    Singular values are normalised for each layer, σ̂ = (σ − σ_min)/(σ_max − σ_min), and k is the smallest threshold for which

        Σ_l #{σ̂_l < k} / Σ_l d_l ≥ reduction,      d_l = min(m_l, n_l)

    A layer keeps r_l = #{σ̂_l ≥ k}. It is a low-rank component if a share of at least `min_ratio` is cut and r·(m + n) < m·n; others
    are better left dense and frozen (`factorize_(…, freeze_rest=True)`). A flat spectrum has nothing to cut.

    Args:
        model: its plain `nn.Linear`s and Conv1Ds of transformers; layers with tied weights count once.
        reduction: the share to cut, in (0, 1).
        normalize: "minmax" as above, or "max", σ̂ = σ/σ_max.
        budget: what `reduction` is a share of: "ranks" as above, or "parameters", the numbers in the weights that are left after
            `factorize_` with the result.
        min_ratio: least share of the singular values that is cut from a low-rank component, in [0, 1).
        step: k is the first of 0, step, 2·step, …; None takes the exact value.
        include: patterns of the weights to take, as in `param_groups`; None takes every linear layer but output heads.
        exclude: patterns of weights to leave alone.

    Returns:
        The rank of each low-rank component by the name of the layer.

    Raises:
        TypeError: no nn.Module.
        ValueError: a value out of range; a reduction that cannot be reached, with the largest that can; a pattern that matches
            nothing, no layer to take; a weight that is not finite, coded, sharded or on the meta device.

    Memory: the singular values, and a float64 copy (float32 on accelerators) of one weight at a time.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.copy_(torch.randn(64, 4) @ torch.randn(4, 64))
        >>> lo.nn.select_ranks(model, reduction=0.47, include=["0", "2"])
        {'0': 4}

    Paper: Jaiswal et al., "From GaLore to WeLore", arXiv:2407.11239, whose code reads k off a table for two models.
    """
    reduction, min_ratio, step = map(as_python, (reduction, min_ratio, step))
    if not (isinstance(reduction, float) and 0 < reduction < 1):
        raise ValueError(f"reduction is {reduction!r}; it must be a share in (0, 1)")
    if not (isinstance(min_ratio, int | float) and 0 <= min_ratio < 1):
        raise ValueError(f"min_ratio is {min_ratio!r}; it must be a share in [0, 1)")
    if step is not None and not (isinstance(step, float) and 0 < step < 1):
        raise ValueError(f"step is {step!r}; it must be in (0, 1), or None for the exact threshold")
    if normalize not in ("minmax", "max"):
        raise ValueError(f"normalize is {normalize!r}; valid values are 'minmax' and 'max'")
    if budget not in ("ranks", "parameters"):
        raise ValueError(f"budget is {budget!r}; valid values are 'ranks' and 'parameters'")
    taken = take_layers(model, include, exclude, ("linear", "conv1d"))
    spectra: dict[int, Tensor] = {}
    for path, _, module in taken:
        if not bool(torch.isfinite(module.weight).all()):
            raise ValueError(f"{path}.weight is not finite; it has no singular values")
    for _, _, module in taken:
        if id(module.weight) not in spectra:
            values = torch.linalg.svdvals(widened(matrix_of(module))).double().cpu()
            spectra[id(module.weight)] = normalized(values, normalize)
    sizes = {id(module.weight): tuple(matrix_of(module).shape) for _, _, module in taken}

    def kept(key: int, cut: int) -> int | None:
        """The rank of a low-rank component of whose singular values some are cut; None for others."""
        (m, n), total = sizes[key], spectra[key].numel()
        rank = total - cut
        return rank if cut >= min_ratio * total and rank * (m + n) < m * n else None

    def parameters(cuts: Sequence[int]) -> float:
        """The share of the numbers that is saved."""
        left = whole = 0
        for key, cut in zip(spectra, cuts, strict=True):
            (m, n), rank = sizes[key], kept(key, cut)
            whole += m * n
            left += m * n if rank is None else rank * (m + n)
        return 1 - left / whole

    share = parameters if budget == "parameters" else None
    cuts = dict(zip(spectra, threshold(list(spectra.values()), reduction, step, share)[1], strict=True))
    found = {path: kept(id(module.weight), cuts[id(module.weight)]) for path, _, module in taken}
    return {path: rank for path, rank in found.items() if rank is not None}


def normalized(values: Tensor, how: str) -> Tensor:
    """Singular values between 0 and 1, ascending; all 1 for a flat spectrum."""
    low = values[-1] if how == "minmax" else torch.zeros_like(values[-1])
    eps = torch.finfo(values.dtype).eps
    if values[0] - values[-1] <= eps * values.numel() * values[0]:
        return torch.ones_like(values)
    return ((values - low) / (values[0] - low)).flip(0)


def threshold(
    spectra: list[Tensor], target: float, step: float | None, share: Callable[[Sequence[int]], Any] | None = None
) -> tuple[float, list[int]]:
    """The smallest threshold for which `share` of the numbers of values below it, by spectrum, is the target; and these numbers.

    Args:
        spectra: of each matrix the normalised singular values, ascending.
        target: the share to reach.
        step: of a grid from 0 on; None takes the exact value.
        share: of the cuts; None takes the cut singular values among all.
    """
    total = sum(values.numel() for values in spectra)

    def cuts(k: float) -> list[int]:
        bound = torch.tensor(k, dtype=torch.float64)
        return [int(torch.searchsorted(values, bound)) for values in spectra]

    def reached(k: float) -> bool:
        found = cuts(k)
        return (sum(found) / total if share is None else share(found)) >= target - 1e-12

    if step is None:  # just above each value but the largest of a layer, which is 1
        values = torch.cat(spectra).unique()
        values = values[values < 1]
        candidates = torch.nextafter(values, torch.full_like(values, math.inf)).tolist()
    else:
        candidates = [step * i for i in range(math.floor(1 / step + 1e-9) + 1)]
    first, last = 0, len(candidates)  # `reached` holds from some candidate on
    while first < last:
        middle = (first + last) // 2
        first, last = (first, middle) if reached(candidates[middle]) else (middle + 1, last)
    if first == len(candidates):
        most = cuts(candidates[-1]) if candidates else [0] * len(spectra)
        best = sum(most) / total if share is None else share(most)
        raise ValueError(f"reduction is {target}; with these layers and options it can be at most {best:.4g}")
    return candidates[first], cuts(candidates[first])
