"""`collect_statistics`: mean and covariance of what goes into the layers of a model, or comes out of them, over some data."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lowrank_optim.kernels import as_python
from lowrank_optim.nn.decompositions import widened
from lowrank_optim.nn.plain_layers import check_real, kind_of
from lowrank_optim.nn.reparametrized import Patterns, find_layers, matrix_of


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean (d) and covariance (d×d, divided by the count) of the rows that a linear layer got ("input") or gave ("output")."""

    side: Literal["input", "output"]
    count: int
    mean: Tensor
    covariance: Tensor

    @property
    def second_moment(self) -> Tensor:
        """E[x xᵀ] = C + μ μᵀ, d×d."""
        return torch.addr(self.covariance, self.mean, self.mean)


@dataclass(frozen=True, eq=False)
class TokenCounts:
    """How often each row of an embedding was looked up, (V,) int64."""

    counts: Tensor

    @property
    def count(self) -> int:
        """How many tokens there were."""
        return int(self.counts.sum())


Statistics: TypeAlias = Moments | TokenCounts


def check_statistics(
    path: str, module: nn.Module, statistics: Mapping[str, Statistics], side: str | None = None
) -> None:
    """Raise ValueError unless there are statistics for a layer that fit it."""
    found = statistics.get(path)
    if found is None:
        raise ValueError(
            f"there are no statistics of {path}: it did not run, or was not chosen in lowrank_optim.nn.collect_statistics"
        )
    if kind_of(module) == "embedding":
        rows = matrix_of(module).shape[0]
        if not isinstance(found, TokenCounts) or found.counts.shape != (rows,):
            raise ValueError(f"the statistics of {path} do not fit: needed are counts of {rows} tokens")
    else:
        m, n = matrix_of(module).shape
        if not isinstance(found, Moments):
            raise ValueError(f"the statistics of {path} are {type(found).__name__}; needed are Moments")
        if side is not None and found.side != side:
            raise ValueError(f"the statistics of {path} are of its {found.side}; needed is side={side!r}")
        width = n if found.side == "input" else m
        if found.mean.shape != (width,) or found.covariance.shape != (width, width):
            raise ValueError(
                f"the statistics of {path} are of another layer: its {found.side} has {width} numbers, they have "
                f"{tuple(found.covariance.shape)}"
            )
        if not bool(torch.isfinite(found.covariance).all() & torch.isfinite(found.mean).all()):
            raise ValueError(f"the statistics of {path} are not finite")
    if found.count < 1:
        raise ValueError(f"the statistics of {path} have no rows")


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    side: Literal["auto", "input", "output"] = "auto",
    rows: int | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> dict[str, Statistics]:
    """Run a model over some data and give the statistics of its layers: what `factorize_` and `compensate_` need of the data.

        μ = E[x],   C = E[(x − μ)(x − μ)ᵀ]        over all rows x of a layer's input (n numbers) or output (m numbers)

    The model runs without gradients in evaluation mode; its training flags are what they were afterwards. Layers that get the same
    tensor (queries, keys and values) share one covariance. Layers that did not run are not in the result. Under DDP and fully_shard
    the numbers are those of this process's rows.

    Args:
        model: with plain `nn.Linear`s (8-bit weights, too), Conv1Ds of transformers, and `nn.Embedding`s.
        batches: what the model is called with: a mapping as keywords, a tuple or list as arguments, all else as the only argument.
            Where a mapping has an `attention_mask` (batch×length), positions with 0 do not count.
        side: "input" (needed by `compensate_`), "output" (before any activation), or "auto": the narrower of both.
        rows: no more than so many rows for each layer, the first ones.
        include: patterns of the weights to take, as in `param_groups`; None takes every linear layer but output heads. Embeddings
            and heads are taken if a pattern names them.
        exclude: patterns of weights to leave alone.

    Returns:
        By the layer's name: `Moments` of linear layers, `TokenCounts` of embeddings.

    Raises:
        TypeError: no nn.Module; one tensor or mapping in place of batches.
        ValueError: no batch; a value out of range; a pattern that matches nothing; rows that are not finite, or weights that are not
            floating point, with the layer's name.

    Memory: 8·d² bytes a layer on a CPU (float64), 4·d² elsewhere, for rows of d numbers; 8·V for an embedding.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
        >>> statistics = lo.nn.collect_statistics(model, [torch.randn(100, 16) for _ in range(4)])
        >>> {name: (found.side, found.count, tuple(found.covariance.shape)) for name, found in statistics.items()}
        {'0': ('input', 400, (16, 16)), '2': ('output', 400, (16, 16))}
    """
    rows = as_python(rows)
    if side not in ("auto", "input", "output"):
        raise ValueError(f"side is {side!r}; valid values are 'auto', 'input' and 'output'")
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
        raise ValueError(f"rows is {rows!r}; it must be an integer of at least 1, or None for all")
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(f"batches is a {type(batches).__name__}; it must be an iterable of batches, such as [batch]")
    layers = find_layers(model, include, exclude, ("linear", "conv1d", "embedding"))
    for path, _, module in layers:
        check_real(f"{path}.weight", module.weight)
    gatherer = _Gatherer(rows)
    modes = {module: module.training for module in model.modules()}
    ran = False
    try:
        with ExitStack() as hooks, torch.no_grad():
            for path, _, module in layers:
                hook = gatherer.hook(path, module, side)
                hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            model.eval()
            for batch in batches:
                ran = True
                gatherer.mask = _mask_of(batch)
                _call(model, batch)
                gatherer.last = None
    finally:
        for module, training in modes.items():
            module.training = training
    if not ran:
        raise ValueError("there are no batches (an iterator that has been used up?)")
    return gatherer.finished()


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    else:
        model(batch)


def _mask_of(batch: Any) -> Tensor | None:
    """Which positions count; None for all."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


@dataclass(frozen=True, eq=False)
class _Sums:
    """What has been added up: number of rows, mean, Σ (x − μ)(x − μ)ᵀ. Never written to: layers with the same inputs share it."""

    count: int
    mean: Tensor
    scatter: Tensor


class _Gatherer:
    """The running sums of all layers."""

    def __init__(self, rows: int | None) -> None:
        self.limit = rows
        self.mask: Tensor | None = None
        self.sums: dict[str, _Sums] = {}
        self.sides: dict[str, Literal["input", "output"]] = {}
        self.counts: dict[str, Tensor] = {}
        self.last: tuple[weakref.ref[Tensor], int, _Sums | None, _Sums | None] | None = None

    def hook(self, path: str, module: nn.Module, side: str) -> Callable[..., None]:
        """What a layer calls after its forward."""
        if kind_of(module) == "embedding":
            width: int = module.num_embeddings  # type: ignore[assignment]
            return lambda _, args, kwargs, out: self.count(path, _first(args, kwargs), width)
        weight: Any = module.weight
        m, n = weight.shape if kind_of(module) == "linear" else weight.shape[::-1]
        of_input = side == "input" or (side == "auto" and n <= m)
        self.sides[path] = "input" if of_input else "output"
        return lambda _, args, kwargs, out: self.add(path, _first(args, kwargs) if of_input else out)

    def count(self, path: str, ids: Tensor, width: int) -> None:
        """Count tokens."""
        ids = self._counted(ids.unsqueeze(-1)).flatten()
        known = self.counts.get(path)
        if self.limit is not None:
            ids = ids[: self.limit - (0 if known is None else int(known.sum()))]
        found = torch.bincount(ids, minlength=width)
        self.counts[path] = found if known is None else known + found

    def add(self, path: str, x: Tensor) -> None:
        """Add rows, unless another layer with the same sums has just added them."""
        old = self.sums.get(path)
        version = 0 if x.is_inference() else x._version
        if self.last is not None:
            seen, seen_version, before, after = self.last
            if seen() is x and seen_version == version and before is old:
                if after is not None:
                    self.sums[path] = after
                return
        rows = self._counted(x)
        if self.limit is not None:
            rows = rows[: self.limit - (0 if old is None else old.count)]
        new = old if rows.shape[0] == 0 else _added(old, widened(rows))
        if new is not None:
            self.sums[path] = new
        self.last = (weakref.ref(x), version, old, new)

    def _counted(self, x: Tensor) -> Tensor:
        """The rows that count."""
        mask = self.mask
        if mask is not None and x.shape[: mask.dim()] == mask.shape:
            return x[mask.to(x.device)].flatten(0, -2)
        return x.reshape(-1, x.shape[-1])

    def finished(self) -> dict[str, Statistics]:
        """The statistics of all layers that ran."""
        found: dict[str, Statistics] = {name: TokenCounts(counts) for name, counts in self.counts.items()}
        covariances: dict[int, Tensor] = {}
        for path, sums in self.sums.items():
            count, mean, scatter = sums.count, sums.mean, sums.scatter
            if id(scatter) not in covariances:
                covariances[id(scatter)] = scatter / count
            covariance = covariances[id(scatter)]
            if not bool(torch.isfinite(covariance).all() & torch.isfinite(mean).all()):
                raise ValueError(f"the {self.sides[path]} of {path} is not finite on these batches")
            found[path] = Moments(self.sides[path], count, mean, covariance)
        return found


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    given: Tensor = args[0] if args else next(iter(kwargs.values()))
    return given


def _added(sums: _Sums | None, rows: Tensor) -> _Sums:
    """Sums with more rows, each part about its own mean: nothing cancels, however large the mean is."""
    count, mean = rows.shape[0], rows.mean(0)
    centred = rows - mean
    scatter = centred.mT @ centred
    if sums is None:
        return _Sums(count, mean, scatter)
    total, shift = sums.count + count, mean - sums.mean
    scatter += sums.scatter
    scatter.addr_(shift, shift, alpha=sums.count * count / total)
    return _Sums(total, torch.add(sums.mean, shift, alpha=count / total), scatter)
