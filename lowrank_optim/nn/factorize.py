"""`factorize_`: give layers of a trained model the two factors of a low-rank weight, with or without data."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank_optim.kernels import as_python
from lowrank_optim.nn.decompositions import (
    best_of_rank,
    output_axes,
    principal_axes,
    project_outputs,
    rank_for_energy,
    widened,
)
from lowrank_optim.nn.low_rank import (
    LowRankEmbedding,
    LowRankLinear,
    check_rank,
    check_rank_option,
    resolved_rank,
)
from lowrank_optim.nn.plain_layers import Kind, kind_of
from lowrank_optim.nn.reparametrized import (
    Patterns,
    ReparametrizedLayer,
    TakenLayer,
    matrix_of,
    put_layers,
    sharing,
    take_hooks,
    take_layers,
)
from lowrank_optim.nn.statistics import Moments, Statistics, TokenCounts, check_statistics

KINDS: tuple[Kind, ...] = ("linear", "conv1d", "embedding")


def factorize_(
    model: nn.Module,
    *,
    rank: int | float | None = None,
    ranks: Mapping[str, int] | None = None,
    energy: float | None = None,
    method: Literal["svd", "features"] = "svd",
    statistics: Mapping[str, Statistics] | None = None,
    freeze_rest: bool = False,
    include: Patterns = None,
    exclude: Patterns = None,
) -> nn.Module:
    """Give layers of a trained model low-rank weights in two factors, in place: W ≈ B A. Returns the model.

    "svd" takes the best rank-r matrix, ‖W − B A‖² = Σ_{k>r} σ_k², with balanced factors U Σ^½ and Σ^½ Vᵀ. "features" takes the best
    rank-r map for the data: with μ and C mean and covariance of the outputs and U the r leading eigenvectors of C,

        B = U,  A = Uᵀ W,  b' = U Uᵀ b + (I − U Uᵀ) μ,    E‖y − y'‖² = Σ_{k>r} λ_k(C)

    which no affine map of rank r beats on these data. An embedding T becomes (T − μ) U, U and the bias μ, every row weighted by how
    often its token comes. Layers that would not get smaller, r·(m + n) ≥ m·n, are left alone, and a warning lists them.

    Call it before the optimizer is built. `param_groups` gives the factors half the weight decay each; a pattern that names them
    (`include="lora_B"`) projects their gradients. `merge_` gives plain layers back. A model on the meta device gets factors without
    numbers, for a plan or for a checkpoint: `{path: layer.rank}` are the `ranks` it was saved with.

    Args:
        model: its plain `nn.Linear`s, Conv1Ds of transformers and, where named, `nn.Embedding`s. Hooks, device and type are kept, and
            biases with "svd"; "features" gives every layer a bias of its own. Layers with tied weights share their factors.
        rank: r, an integer, or a fraction in (0, 1) of the short side of each matrix.
        ranks: in its place, r for each layer by name, as from `select_ranks`; all others are left alone.
        energy: in its place, the share of Σ λ_k to keep, in (0, 1]: of σ² with "svd", of the variance of the outputs with "features".
        method: "svd" or "features".
        statistics: from `collect_statistics`, for "features".
        freeze_rest: train the factors alone: all other parameters of the model get `requires_grad=False`. Otherwise factors are
            trained if the weight was.
        include: patterns of the weights to take, as in `param_groups`; None takes every linear layer but output heads.
        exclude: patterns of weights to leave alone.

    Raises:
        TypeError: no nn.Module.
        ValueError: not one of `rank`, `ranks` and `energy`; a value out of range, with the layer's name; a pattern or a name that
            matches nothing; no layer to take or none that gets smaller; a weight that is not finite, coded, sharded or tied to a
            layer of another kind; statistics that are missing, of another width, not finite, or of fewer rows than the rank.

    Warns:
        UserWarning: of layers that are left alone; of statistics with fewer rows than 5·min(m, n).

    Memory: b·r·(m + n) bytes for a layer in place of b·m·n, at b bytes a number. While it runs, a few float64 matrices (float32 on
    accelerators) of one layer.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
        >>> data = [torch.randn(500, 64) for _ in range(4)]
        >>> statistics = lo.nn.collect_statistics(model, data, include="0")
        >>> model = lo.nn.factorize_(model, rank=16, method="features", statistics=statistics, include="0")
        >>> [(name, tuple(param.shape)) for name, param in model[0].named_parameters()]
        [('lora_A', (16, 64)), ('lora_B', (256, 16)), ('bias', (256,))]

    Papers: features: Yu and Wu, "Compressing Transformers: Features Are Low-Rank, but Weights Are Not!", AAAI 2023;
    Kaushal et al., "LoRD", arXiv:2309.14021.
    """
    rank, energy = map(as_python, (rank, energy))
    _check_arguments(rank, ranks, energy, method, statistics, include, exclude)
    taken = take_layers(model, include, exclude, KINDS, ranks, meta=energy is None, hint="give a rank")
    wanted = _ranks(taken, rank, ranks)
    if method == "features":
        _check_statistics(taken, statistics or {}, wanted)
    made: dict[int, nn.Module] = {}
    shared: dict[int, ReparametrizedLayer | None] = {}
    alone: list[str] = []
    for layer in taken:
        weight = layer.module.weight
        if id(weight) not in shared:
            found = (statistics or {}).get(layer.path)
            shared[id(weight)] = _factorized(layer, wanted[id(weight)], energy, method, found)
        first = shared[id(weight)]
        if first is None:
            alone.append(layer.path)
        else:
            made[id(layer.module)] = _in_place_of(layer.module, first, method)
    if not made:
        raise ValueError(
            f"no layer gets smaller: two factors have rank·(m + n) numbers, the matrices fewer ({_some(alone)}); take a smaller rank"
        )
    if alone:
        warnings.warn(f"left alone, since two factors would not be smaller: {_some(alone)}", UserWarning, stacklevel=2)
    put_layers(model, made)
    if freeze_rest:
        freeze_all_but(model, [param for layer in made.values() for param in layer.parameters() if param.dim() > 1])
    return model


def freeze_all_but(model: nn.Module, trained: Iterable[nn.Parameter]) -> None:
    """Train these parameters of a model and no others."""
    chosen = {id(param) for param in trained}
    for param in model.parameters():
        param.requires_grad_(id(param) in chosen)


def _check_arguments(
    rank: Any, ranks: Any, energy: Any, method: str, statistics: Any, include: Patterns, exclude: Patterns
) -> None:
    if sum(value is not None for value in (rank, ranks, energy)) != 1:
        raise ValueError(
            f"give one of rank, ranks and energy, which say how large the factors are; got rank={rank!r}, ranks={ranks!r}, "
            f"energy={energy!r}"
        )
    if method not in ("svd", "features"):
        raise ValueError(f"method is {method!r}; valid values are 'svd' and 'features'")
    if method == "svd" and statistics is not None:
        raise ValueError("method='svd' looks at the weights alone; leave statistics out, or use method='features'")
    check_rank_option(rank)
    number = isinstance(energy, int | float) and not isinstance(energy, bool)
    if energy is not None and not (number and 0 < energy <= 1):
        raise ValueError(f"energy is {energy!r}; it must be a share in (0, 1]")
    if ranks is not None and not ranks:
        raise ValueError("ranks is empty; there is no layer to take")
    if ranks is not None and (include is not None or exclude is not None):
        raise ValueError("ranks names the layers; leave include and exclude out")


def _ranks(taken: list[TakenLayer], rank: int | float | None, ranks: Mapping[str, int] | None) -> dict[int, int | None]:
    """The rank that is asked for by the `id` of the weight, checked; None with an energy."""
    found: dict[int, int | None] = {}
    for path, _, module in taken:
        m, n = module.weight.shape
        if ranks is None:
            found[id(module.weight)] = None if rank is None else resolved_rank(path, rank, m, n)
        elif path in ranks:
            given = as_python(ranks[path])
            check_rank(path, given, m, n)
            if found.setdefault(id(module.weight), given) != given:
                raise ValueError(f"{path} has rank {given} in ranks, and a layer with the same weight another one")
    return found


def _check_statistics(
    taken: list[TakenLayer], statistics: Mapping[str, Statistics], ranks: Mapping[int, int | None]
) -> None:
    few: list[str] = []
    owners: dict[int, str] = {}
    for layer in taken:
        path, module = layer.path, layer.module
        other = owners.setdefault(id(module.weight), path)
        if other != path:
            raise ValueError(
                f"{path} and {other} share one weight, but have data of their own; method='features' cannot keep them tied: use "
                "method='svd', or exclude them"
            )
        if module.weight.is_meta:
            continue
        check_statistics(path, module, statistics)
        found = statistics[path]
        wanted = ranks[id(module.weight)]
        if wanted is not None and found.count < wanted:
            raise ValueError(
                f"{path}: the statistics have {found.count} rows, fewer than the rank {wanted}; use more data"
            )
        if found.count < 5 * min(module.weight.shape):
            few.append(path)
    if few:
        warnings.warn(
            f"few rows for {_some(few)}: fewer than 5 for each direction; the factors may fit these data only",
            UserWarning,
            stacklevel=3,
        )


# The factors --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _factorized(
    layer: TakenLayer, rank: int | None, energy: float | None, method: str, statistics: Statistics | None
) -> ReparametrizedLayer | None:
    """A new layer without hooks, and without bias unless the method makes one; None if it would not be smaller."""
    module, (m, n) = layer.module, layer.module.weight.shape
    if rank is not None and rank * (m + n) >= m * n:
        return None
    left = right = offset = None
    if not module.weight.is_meta:
        if not bool(torch.isfinite(module.weight).all()):
            raise ValueError(f"{layer.path}.weight is not finite; it has no decomposition")
        if method == "svd":
            left, right = by_svd(widened(matrix_of(module)), rank, energy)
        elif isinstance(statistics, TokenCounts):
            left, right, offset = embedding_by_features(widened(matrix_of(module)), statistics, rank, energy)
        elif statistics is not None:
            bias = None if module.bias is None else widened(module.bias)
            left, right, offset = by_features(widened(matrix_of(module)), bias, statistics, rank, energy)
    found = rank if right is None else right.shape[0]
    assert found is not None  # `take_layers` refuses meta weights with an energy
    if found * (m + n) >= m * n:
        return None
    new = _empty(module, found, method == "features")
    first, second = (new.table, new.lora_B.mT) if isinstance(new, LowRankEmbedding) else (new.lora_B, new.lora_A)
    if left is not None and right is not None:
        first.copy_(left)
        second.copy_(right)
    if offset is not None and new.bias is not None:
        new.bias.copy_(offset)
    for param in new.parameters():
        param.requires_grad_(module.weight.requires_grad)
    old = None if isinstance(new, LowRankEmbedding) else module.bias
    if new.bias is not None and old is not None:
        new.bias.requires_grad_(old.requires_grad)
    return new


def _empty(module: nn.Module, rank: int, bias: bool) -> LowRankLinear | LowRankEmbedding:
    """A layer without numbers."""
    weight: Any = module.weight
    with torch.device("meta"):
        if isinstance(module, nn.Embedding):
            if module.max_norm is not None:
                raise ValueError("an embedding with max_norm changes its rows in each forward and cannot be factorised")
            new: LowRankLinear | LowRankEmbedding = LowRankEmbedding(
                module.num_embeddings,
                module.embedding_dim,
                rank=rank,
                bias=bias,
                padding_idx=module.padding_idx,
                scale_grad_by_freq=module.scale_grad_by_freq,
                sparse=module.sparse,
                dtype=weight.dtype,
            )
        else:
            m, n = weight.shape if kind_of(module) == "linear" else weight.shape[::-1]
            new = LowRankLinear(n, m, rank=rank, bias=bias, dtype=weight.dtype)
            new.plain_class = type(module)
    return new.to_empty(device=weight.device)


def _in_place_of(old: nn.Module, first: ReparametrizedLayer, method: str) -> nn.Module:
    """A layer for this one with the factors of `first`, and with the old bias unless the method made one."""
    new = sharing(first)
    if method == "svd" and not isinstance(old, nn.Embedding):
        new.register_parameter("bias", old._parameters.get("bias"))
    take_hooks(old, new)
    return new


def by_svd(matrix: Tensor, rank: int | None, energy: float | None) -> tuple[Tensor, Tensor]:
    """(U Σ^½, Σ^½ Vᵀ) of a rank, or of the rank that keeps a share of Σ σ²."""
    if rank is None:
        assert energy is not None  # one of both is given
        rank = rank_for_energy(torch.linalg.svdvals(matrix).square(), energy)
    return best_of_rank(matrix, rank)


def by_features(
    matrix: Tensor, bias: Tensor | None, moments: Moments, rank: int | None, energy: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, A, b') for y = W x + b."""
    mean, covariance = moments.mean.to(matrix), moments.covariance.to(matrix)
    offset = matrix.new_zeros(matrix.shape[0]) if bias is None else bias
    if moments.side == "input":
        values, axes = output_axes(matrix, covariance)
        mean = matrix @ mean + offset
    else:
        values, axes = principal_axes(covariance)
    axes = axes[:, : _chosen(values, rank, energy)]
    left, right = project_outputs(matrix, axes)
    return left, right, mean + axes @ (axes.mT @ (offset - mean))


def embedding_by_features(
    table: Tensor, counts: TokenCounts, rank: int | None, energy: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """((T − μ) U, Uᵀ, μ): rows weighted by the counts of their tokens."""
    share = counts.counts.to(table) / counts.count
    mean = share @ table
    centred = table - mean
    values, axes = principal_axes(centred.mT @ (share.unsqueeze(1) * centred))
    axes = axes[:, : _chosen(values, rank, energy)]
    return centred @ axes, axes.mT, mean


def _chosen(values: Tensor, rank: int | None, energy: float | None) -> int:
    if rank is not None:
        return rank
    assert energy is not None  # one of both is given
    return rank_for_energy(values, energy)


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
