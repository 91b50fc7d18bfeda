"""`compensate_`: a low-rank pair beside each compressed layer that makes up, on data, for what compression has lost."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_optim.groups.names import Pattern, matches
from lowrank_optim.kernels import as_python
from lowrank_optim.nn.decompositions import output_axes, project_outputs, widened
from lowrank_optim.nn.factorize import freeze_all_but
from lowrank_optim.nn.low_rank import CompensatedLinear, LowRankLinear, check_rank_option, resolved_rank
from lowrank_optim.nn.plain_layers import check_elements, check_real, kind_of
from lowrank_optim.nn.reparametrized import Patterns, matrix_of, put_layers
from lowrank_optim.nn.statistics import Moments, Statistics, check_statistics
from lowrank_optim.sharding.gathered import Gathered, find_gathered


def compensate_(
    model: nn.Module,
    reference: nn.Module | Mapping[str, Tensor],
    *,
    rank: int | float,
    statistics: Mapping[str, Statistics],
    freeze_rest: bool = False,
    include: Patterns = None,
    exclude: Patterns = None,
) -> nn.Module:
    """Add a low-rank pair to the compressed layers of a model, in place, as EoRA. Returns the model.

    With Δ = W − W_c (the weight of the reference less the compressed one), H = E[x xᵀ] and U the r leading eigenvectors of Δ H Δᵀ,

        y = W_c x + B (A x) + b,    B = U,  A = Uᵀ Δ,    E‖(Δ − B A) x‖² = Σ_{k>r} λ_k(Δ H Δᵀ)

    the least error of any pair of this rank on the data. B A projects Δ, so that no input gets worse than without it, however few
    the data; the paper's form has an inverse of a root of H in it, and can. The layers stay as they are, 8-bit weights too, as
    `base` of a `CompensatedLinear`. Layers with tied weights keep sharing them, and have pairs of their own, for their own data.

    Args:
        model: compressed: by `quantize_weights_`, by `factorize_(method="svd")`, by pruning; layers have the names of the
            reference.
        reference: the model before compression, or its weights by name (`"layers.0.q.weight"` or `"layers.0.q"`), as it stores them.
        rank: r, an integer, or a fraction in (0, 1) of the short side of each matrix.
        statistics: from `collect_statistics(reference, …, side="input")`; the layers that they are of are taken: `nn.Linear`s,
            Conv1Ds and `LowRankLinear`s.
        freeze_rest: train the pairs alone: all other parameters of the model get `requires_grad=False`.
        include: patterns; only layers whose name with ".weight" matches one are taken. None takes all that statistics are of.
        exclude: patterns of layers to leave alone.

    Raises:
        TypeError: no nn.Module.
        ValueError: a rank out of range; a name that the model or the reference does not have; a pattern that matches nothing; weights
            of different shapes, not finite, complex, without elements, sharded or on the meta device; statistics of another width, of
            outputs, or not finite; a layer that has a pair already.

    Memory: b·r·(m + n) bytes for each layer at b bytes a number. While it runs, a few float64 matrices (float32 on accelerators) of
    one layer.

    Example:
        >>> import copy, torch, lowrank_optim as lo
        >>> reference = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> statistics = lo.nn.collect_statistics(reference, [torch.randn(500, 64)], side="input")
        >>> model = lo.nn.quantize_weights_(copy.deepcopy(reference))
        >>> model = lo.nn.compensate_(model, reference, rank=8, statistics=statistics)
        >>> [(name, tuple(param.shape)) for name, param in model[0].named_parameters()]
        [('lora_A', (8, 64)), ('lora_B', (256, 8)), ('base.weight', (256, 64)), ('base.bias', (256,))]

    Paper: Liu et al., "EoRA", arXiv:2410.21271.
    """
    rank = as_python(rank)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    check_rank_option(rank, needed=True)
    names = _chosen(statistics, include, exclude)
    layers = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name not in layers:
            near = ", ".join(get_close_matches(name, layers, n=4, cutoff=0.3))
            raise ValueError(f"there are statistics of {name!r}, which the model does not have; nearest names: {near}")
    gathered = find_gathered(model)
    ranks = {name: _check(name, layers[name], reference, rank, statistics, gathered) for name in names}
    made: dict[int, CompensatedLinear] = {}
    pairs = [(name, *_pair(layers[name], reference, name, ranks[name], statistics[name])) for name in names]
    for name, left, right in pairs:
        if id(layers[name]) not in made:
            made[id(layers[name])] = new = CompensatedLinear(layers[name], rank=ranks[name])
            with torch.no_grad():
                new.lora_B.copy_(left)
                new.lora_A.copy_(right)
    for new in made.values():  # only now, when nothing can fail any more, does the model change
        new.take_hooks_of_base()
    put_layers(model, made)
    if freeze_rest:
        freeze_all_but(model, [param for new in made.values() for param in new.parameters(recurse=False)])
    return model


def _chosen(statistics: Mapping[str, Statistics], include: Patterns, exclude: Patterns) -> list[str]:
    """The layers with statistics that patterns choose."""

    def chosen(what: str, patterns: Patterns) -> set[str]:
        found: set[str] = set()
        for pattern in _listed(patterns):
            own = {name for name in statistics if matches(pattern, f"{name}.weight")}
            if not own:
                raise ValueError(
                    f"{what} pattern {pattern!r} matches no layer that there are statistics of: {', '.join(statistics)}"
                )
            found |= own
        return found

    wanted, unwanted = chosen("include", include), chosen("exclude", exclude)
    names = [name for name in statistics if (include is None or name in wanted) and name not in unwanted]
    if not names:
        raise ValueError("there are no statistics of any layer; collect them with lowrank_optim.nn.collect_statistics")
    return names


def _listed(patterns: Patterns) -> list[Pattern]:
    if patterns is None:
        return []
    return list(patterns) if isinstance(patterns, Iterable) and not isinstance(patterns, str) else [patterns]


def _check(name: str, module: nn.Module, reference: Any, rank: int | float, statistics: Any, gathered: Gathered) -> int:
    """Raise ValueError unless a layer can get a pair; the rank of it."""
    if isinstance(module, CompensatedLinear):
        raise ValueError(f"{name} has a pair already; call merge_, or exclude it")
    if kind_of(module) not in ("linear", "conv1d") and not isinstance(module, LowRankLinear):
        raise ValueError(
            f"{name} is a {type(module).__name__}; an nn.Linear, a Conv1D or a LowRankLinear can get a pair: exclude it"
        )
    for own, param in module.named_parameters():
        if gathered.stands_for_shards(param) or param.is_meta:
            raise ValueError(f"{name} is sharded or on the meta device; its weight must be there as a whole")
        gathered.check(f"{name}.{own}", param)
        check_real(f"{name}.{own}", param)
        check_elements(f"{name}.{own}", param)
    weight, target = matrix_of(module), _target(name, module, reference)
    if target.shape != weight.shape:
        raise ValueError(f"{name} is {tuple(weight.shape)}, in the reference {tuple(target.shape)}")
    if not bool(torch.isfinite(weight).all() & torch.isfinite(target).all()):
        raise ValueError(f"{name}: the weight, or that of the reference, is not finite")
    check_statistics(name, module, statistics, side="input")
    return resolved_rank(name, rank, *weight.shape)


def _target(name: str, module: nn.Module, reference: nn.Module | Mapping[str, Tensor]) -> Tensor:
    """The weight m×n of a layer in the reference."""
    if isinstance(reference, nn.Module):
        found = dict(reference.named_modules(remove_duplicate=False)).get(name)
        if found is None or not isinstance(getattr(found, "weight", None), Tensor):
            raise ValueError(f"the reference has no layer {name!r} with a weight")
        return matrix_of(found)
    weight = reference.get(f"{name}.weight", reference.get(name))
    if weight is None:
        raise ValueError(f"the reference has no {name!r} and no '{name}.weight'")
    transposed = kind_of(module) == "conv1d" or (
        isinstance(module, LowRankLinear) and module.plain_class is not nn.Linear
    )
    return weight.detach().mT if transposed else weight.detach()


@torch.no_grad()
def _pair(module: nn.Module, reference: Any, name: str, rank: int, moments: Any) -> tuple[Tensor, Tensor]:
    """(U, Uᵀ Δ)."""
    assert isinstance(moments, Moments)  # checked
    weight = matrix_of(module)
    lost = widened(_target(name, module, reference).to(weight.device)) - widened(weight)
    _, axes = output_axes(lost, moments.second_moment.to(lost))
    left, right = project_outputs(lost, axes[:, :rank])
    return left.to(weight.dtype), right.to(weight.dtype)
