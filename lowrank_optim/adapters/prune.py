"""Adapters made smaller: rank columns that are zero are dropped."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_optim.adapters.layers import Factors, check_factors, find_factors
from lowrank_optim.rules.pairs import matrix_of, tall
from lowrank_optim.sharding.dtensor import is_sharded


@torch.no_grad()
def prune_ranks_(model: nn.Module, adapter: str | None = None) -> dict[str, int]:
    """Drop the rank-one terms s b_k a_k that are zero, from all adapters of a model, in place; the model computes what it did before.

    The option `l1` of a group of pairs, and of gates (KaSA's `lora_diag`), sets terms to zero. What is left goes into the ordinary
    fields of peft: r, lora_alpha (so that s stays), and the config's `rank_pattern` and `alpha_pattern`, so that the adapter is saved
    and loaded as any other. A layer keeps one term, if all are zero. Experts of one layer share their rank: a term is dropped where
    it is zero for all of them. Build a new optimizer afterwards, for the parameters are other ones.

    Args:
        model: with adapters of peft.
        adapter: only this one; None takes all.

    Returns:
        The new rank of each adapter layer that became smaller, by name.

    Raises:
        ValueError: the model has no adapters, or none of this name; a layer whose factors do not multiply, or are sharded
            (`fully_shard` would put the old ones back).

    Paper: Ding et al., "Sparse Low-rank Adaptation of Pre-trained Language Models", EMNLP 2023, arXiv:2311.11696.
    """
    every = [each for each in find_factors(model) if adapter is None or each.adapter == adapter]
    if not every:
        raise ValueError("the model has no adapters" if adapter is None else f"the model has no adapter {adapter!r}")
    check_factors(model, every)
    for each in every:
        if is_sharded(each.a) or is_sharded(each.b):
            raise ValueError(f"{each.path} is sharded (DTensor); prune the unsharded model, from a full state dict")
    kept = [_terms(each) for each in every]
    changed = {}
    for each, keep in zip(every, kept, strict=True):
        if keep.numel() < each.a.shape[0] // each.experts:
            _write(model, each, keep)
            changed[f"{each.path}.{each.adapter}"] = keep.numel()
    return changed


def _terms(factors: Factors) -> Tensor:
    """The indices of the terms to keep."""
    if factors.a.shape[0] != factors.b.shape[1]:
        raise ValueError(f"{factors.path}: {factors.why_not}, so that no term can be told")
    forms = [
        tall(factor.reshape(matrix_of(factor)), is_a, factors.experts)
        for factor, is_a in ((factors.a, True), (factors.b, False))
    ]
    sizes = [form.abs().amax(-2) if form.shape[-2] else form.sum(-2) for form in forms]
    alive = ((sizes[0] > 0) & (sizes[1] > 0)).any(0)
    gate = getattr(factors.layer, "lora_diag", {})
    if factors.adapter in gate:
        alive = alive & (gate[factors.adapter].reshape(-1) != 0)
    found = alive.nonzero().flatten()
    return found if found.numel() else torch.zeros(1, dtype=torch.int64, device=alive.device)


def _write(model: nn.Module, factors: Factors, keep: Tensor) -> None:
    """Smaller factors and the numbers that belong to them."""
    layer: Any = factors.layer
    name, rank, experts = factors.adapter, keep.numel(), factors.experts
    rows = factors.a.reshape(experts, -1, *factors.a.shape[1:]).index_select(1, keep).flatten(0, 1)
    columns = (
        factors.b.reshape(factors.b.shape[0], -1, experts, *factors.b.shape[2:]).index_select(1, keep).flatten(1, 2)
    )
    if factors.is_embedding:
        layer.lora_embedding_A[name] = _parameter(rows, factors.a)
        layer.lora_embedding_B[name] = _parameter(columns, factors.b)
    else:
        first, second = layer.lora_A[name], layer.lora_B[name]
        first.weight, second.weight = _parameter(rows, factors.a), _parameter(columns, factors.b)
        for module, sizes in ((first, ("out_features", "out_channels")), (second, ("in_features", "in_channels"))):
            for size in sizes:
                if hasattr(module, size):
                    setattr(module, size, rank * experts)
    if name in getattr(layer, "lora_diag", {}):
        gate = layer.lora_diag[name]
        layer.lora_diag[name] = _parameter(gate.reshape(-1).index_select(0, keep), gate)
    roots = getattr(layer, "use_rslora", {}).get(name, False)
    alpha = layer.scaling[name] * (math.sqrt(rank) if roots else rank)
    layer.r[name], layer.lora_alpha[name] = rank, alpha
    config = getattr(model, "peft_config", {}).get(name)
    if config is not None:
        key = factors.path.removeprefix("base_model.model.").replace(".base_layer", "")
        if hasattr(layer, "parameter_name"):  # of stacks of experts, patterns name the parameter
            key = f"{key}.{layer.parameter_name}"
        config.rank_pattern = {**(config.rank_pattern or {}), key: rank}
        config.alpha_pattern = {**(config.alpha_pattern or {}), key: alpha}


def _parameter(tensor: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous(), requires_grad=like.requires_grad)
