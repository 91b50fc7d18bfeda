"""Param groups of adapters: the two factors of each pair one after the other, with what an optimizer has to know of them."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_optim.adapters.layers import Factors, check_factors, find_factors, lone_factors
from lowrank_optim.groups.options import DEFAULTS, check_values, near_option, plain_options
from lowrank_optim.groups.parameters import FoundParameter, ParamGroup, find_parameters
from lowrank_optim.rules.pairs import check_pair
from lowrank_optim.sharding.gathered import find_gathered

_log = logging.getLogger("lowrank_optim")

FROZEN = ("skip", "keep")


@dataclass(frozen=True)
class _Pair:
    names: tuple[str | None, str | None]
    params: tuple[Tensor, Tensor]
    scaling: float
    experts: int


def lora_pairs(
    model: nn.Module | Iterable[tuple[Tensor, Tensor, float]],
    adapter: str | None = None,
    *,
    lr_ratio: float = 1.0,
    weight_decay: float | None = None,
    frozen: str = "skip",
    freeze: str | None = None,
    **options: Any,
) -> list[ParamGroup]:
    """Parameter groups of a model with low-rank adapters, in which the two factors of each pair belong together.

    W = W₀ + s B A. For `lo.LoRARiteAdamW`, `lo.LoRAProAdamW`, `lo.AltLoRA`, `lo.RiemannianAdamW` and `lo.LoRAOptimizer`, which step
    both factors at once; every other optimizer trains them one by one, with `lr_ratio`.

    | layer of peft | A, B |
    |---|---|
    | Linear, Conv1D of GPT-2, quantised bases, attention | `lora_A.<adapter>.weight` r×n, `lora_B.<adapter>.weight` m×r |
    | Embedding | `lora_embedding_A.<adapter>`, `lora_embedding_B.<adapter>` |
    | convolutions | first dimension × the rest; where groups leave factors that do not multiply, they are dense |
    | stacks of E experts (`target_parameters`) | E pairs, stepped as one |
    | DoRA, aLoRA, VeLoRA | as above; magnitudes and biases are dense, without decay |
    | KaSA, AdaLoRA, MonteCLoRA | no plain products: dense, and logged |

    s is `layer.scaling[adapter]`, of each layer its own (rsLoRA, alpha and rank patterns). After `set_scale` and its like, call
    `lo.update_scalings(optimizer, model)`.

    Args:
        model: with adapters of peft; or (A, B, s) triples of anything else.
        adapter: only pairs of this adapter; None takes all.
        lr_ratio: learning rate of B relative to that of A; LoRA+ takes 16. Schedulers change `lr` alone, and the ratio stays.
        weight_decay: decay of all groups but the one without decay; not given, the optimizer's default holds.
        frozen: "skip" leaves out pairs of which both factors are frozen, such as those of adapters that are not active; "keep" takes
            them in, to be trained once they are unfrozen. A pair with one frozen factor is always taken in.
        freeze: "A" or "B" freezes this factor of every pair (LoRA-FA: "A").
        **options: further keys of the group of pairs: `lr`, `l1`, …

    Returns:
        Up to three groups with `params` and `param_names`: pairs A₁, B₁, A₂, B₂, … with `pairs`, `scalings`, `experts` and
        `lr_ratio`; all other trainable parameters; of these, vectors, biases and norms, without decay.

    Raises:
        ValueError: there are no pairs, or none of this adapter; a parameter that is in two pairs; factors that do not multiply; a
            rank above a side; a scaling of 0; a value out of range; `fully_shard` has gathered a factor or another parameter (after a
            forward pass without backward), which no gradient comes to.
        TypeError: `model` is neither a module nor triples; a key is nearly an option's name.

    Paper of LoRA+: Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", ICML 2024, arXiv:2402.12354.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> a, b = torch.nn.Parameter(torch.randn(4, 32)), torch.nn.Parameter(torch.zeros(64, 4))
        >>> (group,) = lo.lora_pairs([(a, b, 2.0)], lr_ratio=16)
        >>> group["scalings"], group["lr_ratio"], len(group["params"])
        ([2.0], 16, 2)
    """
    options = plain_options(options)
    _check_arguments(lr_ratio, weight_decay, frozen, freeze, options)
    rest: list[ParamGroup] = []
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    if isinstance(model, nn.Module):
        found, left = _pairs_of(model, adapter)
        rest = _others(model, left, decay)
    else:
        found = _triples(model)
    _check_pairs(found)
    if freeze is not None:
        for pair in found:
            pair.params["AB".index(freeze)].requires_grad_(False)
    taken = [pair for pair in found if frozen == "keep" or any(param.requires_grad for param in pair.params)]
    if not taken:
        raise ValueError('all factors are frozen (requires_grad is False): train some, or take frozen="keep"')
    group: ParamGroup = {
        "params": [param for pair in taken for param in pair.params],
        "rank": None,
        "pairs": True,
        "scalings": [float(pair.scaling) for pair in taken],
        "experts": [pair.experts for pair in taken],
        "lr_ratio": lr_ratio,
        **decay,
        **options,
    }
    names = [name for pair in taken for name in pair.names]
    if None not in names:
        group["param_names"] = names
    return [group, *rest]


def update_scalings(optimizer: Optimizer, model: nn.Module) -> None:
    """Read the scalings of all pairs again, after something has changed them (`set_scale`, `scale_layer`).

    Raises:
        ValueError: a scaling is 0, or `fully_shard` has gathered factors, which are not those of the optimizer; nothing was changed.
    """
    factors = list(find_factors(model))
    check_factors(model, factors)
    scalings = {id(each.a): each for each in factors}
    changed = []
    for group in optimizer.param_groups:
        if not group.get("pairs"):
            continue
        new = list(group["scalings"])
        for number, param in enumerate(group["params"][::2]):
            if (each := scalings.get(id(param))) is not None:
                check_pair((f"A of {each.path}", "B"), (each.a, each.b), each.scaling, each.experts)
                new[number] = float(each.scaling)
        changed.append((group, new))
    for group, new in changed:
        group["scalings"] = new


def _check_arguments(
    lr_ratio: Any, weight_decay: float | None, frozen: str, freeze: str | None, options: Mapping[str, Any]
) -> None:
    if frozen not in FROZEN:
        raise ValueError(f"frozen is {frozen!r}; valid values are {', '.join(map(repr, FROZEN))}")
    if freeze not in (None, "A", "B"):
        raise ValueError(f"freeze is {freeze!r}; valid values are None, 'A' and 'B'")
    for key in options:
        if key in ("params", "param_names", "pairs", "scalings", "experts", "rank", "density"):
            raise TypeError(f"{key} is set by lora_pairs; build the groups by hand to choose it")
        if near := near_option(key, ["adapter", "lr_ratio", "weight_decay", "frozen", "freeze"]):
            raise TypeError(f"unknown option {key!r}; did you mean {near!r}?")
    given = {"lr": 0.0, "weight_decay": weight_decay or 0.0, "lr_ratio": lr_ratio, **options}
    check_values({**DEFAULTS, **given})


def _pairs_of(model: nn.Module, adapter: str | None) -> tuple[list[_Pair], set[int]]:
    """The pairs of a model, and the ids of the parameters that its other groups must not hold."""
    if lone := next(lone_factors(model), None):
        raise ValueError(
            f"{lone} has no partner in its layer, so that it is no pair; the adapter was not built or loaded as a whole"
        )
    every = list(find_factors(model))
    if not every:
        raise ValueError(
            "the model has no layers with adapters (lora_A, lora_B and scaling, as peft makes them); for adapters of your own give "
            "lora_pairs([(A, B, s), …])"
        )
    known = sorted({each.adapter for each in every})
    if adapter is not None and adapter not in known:
        raise ValueError(f"there is no adapter {adapter!r}; the model has {', '.join(known)}")
    wanted = [each for each in every if adapter is None or each.adapter == adapter]
    check_factors(model, wanted)
    _report(wanted)
    pairs = [each for each in wanted if each.why_not is None]
    if not pairs:
        raise ValueError(
            f"no factors of the model are pairs: {wanted[0].path}: {wanted[0].why_not}; train such adapters with "
            "lo.param_groups(model, rank=None)"
        )
    names = {id(param): name for name, param in reversed(list(model.named_parameters(remove_duplicate=False)))}
    others = {id(param) for each in every for param in (each.a, each.b) if each.why_not is None or each not in wanted}
    return [
        _Pair((names.get(id(each.a)), names.get(id(each.b))), (each.a, each.b), each.scaling, each.experts)
        for each in pairs
    ], others


def _report(factors: Sequence[Factors]) -> None:
    """Log once for each reason why factors are trained one by one."""
    reasons: dict[str, list[str]] = {}
    for each in factors:
        if each.why_not is not None:
            reasons.setdefault(each.why_not, []).append(each.path)
    for reason, paths in reasons.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        _log.warning("the factors of %s%s are no pair: %s; they are trained one by one", paths[0], more, reason)


def _others(model: nn.Module, left_out: set[int], decay: Mapping[str, Any]) -> list[ParamGroup]:
    """The groups of all other trainable parameters."""
    dense: list[FoundParameter] = []
    plain: list[FoundParameter] = []
    gathered = find_gathered(model)
    for entry in find_parameters(model):
        if entry.param.requires_grad and id(entry.param) not in left_out:
            gathered.check(entry.names[0], entry.param)
            (plain if entry.kind == "no_decay" else dense).append(entry)
    return [
        {"params": [e.param for e in entries], "param_names": [e.names[0] for e in entries], "rank": None, **shared}
        for entries, shared in ((dense, decay), (plain, {"weight_decay": 0.0}))
        if entries
    ]


def _triples(given: Any) -> list[_Pair]:
    found = []
    try:
        triples = [tuple(each) for each in given]
    except TypeError:
        triples = [()]
    for each in triples:
        if len(each) != 3 or not isinstance(each[0], Tensor) or not isinstance(each[1], Tensor):
            raise TypeError(
                f"lora_pairs takes a module, or (A, B, s) triples of two tensors and a number, got {type(given).__name__}"
            )
        found.append(_Pair((None, None), each[:2], each[2], 1))
    if not found:
        raise ValueError("there are no pairs: the list of (A, B, s) is empty")
    return found


def _check_pairs(pairs: Sequence[_Pair]) -> None:
    seen: dict[int, str] = {}
    for number, pair in enumerate(pairs):
        names = [name or f"{'AB'[place]} of pair {number}" for place, name in enumerate(pair.names)]
        check_pair(names, pair.params, pair.scaling, pair.experts)
        for name, param in zip(names, pair.params, strict=True):
            if id(param) in seen:
                raise ValueError(
                    f"{name} {tuple(param.shape)} is in two pairs, as {seen[id(param)]} too (tied weights), with no single "
                    "product to follow; untie it, or train the model with lo.param_groups(model, rank=None)"
                )
            seen[id(param)] = name
