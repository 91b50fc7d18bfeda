"""Which parameters of a model are low-rank: `param_groups` builds the groups, `describe` shows them.

`param_groups` looks at modules, names and global shapes only, never at values, so it works on the meta device and gives the same
groups in every process. What a group's keys mean is the optimizers' business; here they are only handed on.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lowrank_optim.groups.names import Pattern, star_numbers
from lowrank_optim.groups.options import DEFAULTS, check_values, expand_shorthands, near_option, plain_options
from lowrank_optim.groups.parameters import FoundParameter, ParamGroup, find_parameters, list_names
from lowrank_optim.kernels import as_python
from lowrank_optim.sharding.gathered import find_gathered

_UNSET: Any = object()


def param_groups(
    model: nn.Module,
    rank: int | float | None = _UNSET,
    *,
    density: float | None = None,
    include: Pattern | Iterable[Pattern] | None = None,
    exclude: Pattern | Iterable[Pattern] | None = None,
    weight_decay: float | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    head: Mapping[str, Any] | None = None,
    embeddings: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[ParamGroup]:
    """Parameter groups of a model in which the weight matrices are low-rank, or have a rule of their own.

    | parameter | treatment |
    |---|---|
    | weight of `nn.Linear`; GPT-2 style `Conv1D` (stored transposed); in-projection of `nn.MultiheadAttention` | low-rank |
    | weight of a convolution, transposed ones too (matrix: first dimension × all others) | low-rank |
    | 3-D stack of matrices (experts, m, n) held directly by a module, such as `experts.gate_up_proj` | low-rank |
    | factors `lora_A` and `lora_B` of adapters (AdaLoRA keeps them in dictionaries) | low-rank; see `lora_pairs` for pairs |
    | embeddings, output heads, every weight tied to one of them, other tensors of two or more dimensions | dense |
    | 0-D and 1-D parameters, biases and norms of any dimension, gates of adapters (`lora_E`, `ia3_l`) | dense, weight decay 0 |
    | frozen (`requires_grad=False`) | left out |

    An output head is what `get_output_embeddings()` of the model or a submodule returns, or a module named as in `HEAD_NAMES`
    (`lm_head`, `classifier`, `score`, `head`, …) outside repeated layers; where that module has several layers, its last one. A tied
    weight is one parameter: it appears once, under its first name, and patterns may use any of its names.

    A pattern is matched against full parameter names (`model.layers.3.self_attn.q_proj.weight`):

    * without a wildcard it is a substring: `"attn"`, `"mlp"`, `"layers.3."`;
    * with `*`, `?` or `[…]` it is a glob for the whole name, or for the name without its last part: `"*.q_proj"`;
    * a compiled `re.Pattern` is searched for.

    Args:
        model: the model, on its device; its trainable parameters are grouped.
        rank: number of directions (int ≥ 1), or fraction of each matrix's short side (float in (0, 1]). A matrix whose short side is
            smaller than an int rank stays in the low-rank group, where the optimizer trains it dense. None makes every group dense
            and leaves only the weight decay split; with a `rule` among the options, it may be left out, and matrices have groups of
            their own all the same: `param_groups(model, rule="muon")`.
        density: in place of `rank`, the fraction of the projected side (or of the columns, entries or tensors, as the projector
            says) that has moments, in [0, 1]: FRUGAL's way to say it.
        include: one pattern or several, such as `["attn", "mlp"]`: only matrices that match one are low-rank, the others dense. A
            pattern that names the tensor or its module itself (`"lm_head"`, `"embed"`; not a parent such as `"model"`, nor a bare
            `"*"`) also takes in what is dense by default. None takes what the table says.
        exclude: one pattern or several: matrices that match one are dense (still trained). Wins over `include`.
        weight_decay: decay of all groups but the no-decay one. Not given, the optimizer's default holds there.
        overrides: group options for parameters whose names match a pattern, such as `{"embed": {"lr_factor": 0.1}}`; where several
            match, later ones win. A rank given here makes matrices low-rank, `rank=None` makes them dense.
        head, embeddings: group options of the weights of output heads, and of those of `nn.Embedding` and modules named so, where
            they are dense: `embeddings={"rule": lo.SAGE()}`. A weight that is tied to a head is one. `overrides` win over them.
        **options: further keys of the matrices' groups: `scale`, `update_proj_gap`, `proj_type`, `projector`, `rule`, `lr`, …

    Returns:
        Up to five groups with `params` and `param_names`, empty ones left out: low-rank (one for each layout: as stored, transposed,
        convolution), dense, and dense without decay. Groups that are dense have `rank=None`. Parameters for which `overrides`, or a
        module's `parameter_roles()` (`lowrank_optim.Role`), say something of their own have groups of their own after these.

    Raises:
        ValueError: a pattern matches nothing (the message has the nearest names) or cannot make anything low-rank; nothing is left to
            train or to make low-rank; a value is out of range; `fully_shard` has gathered a parameter that is trained (after a
            forward pass without backward), which no gradient comes to.
        TypeError: `model` is not a module, or a key in `options` is set here or looks like a misspelt argument.

    Examples:
        >>> model = nn.ModuleDict({"attn": nn.Linear(64, 64), "mlp": nn.Linear(64, 256), "norm": nn.LayerNorm(64)})
        >>> groups = param_groups(model, rank=8, include=["attn"], weight_decay=0.1, scale=0.25)
        >>> [group["param_names"] for group in groups]
        [['attn.weight'], ['mlp.weight'], ['attn.bias', 'mlp.bias', 'norm.weight', 'norm.bias']]
        >>> groups[0]["rank"], groups[0]["scale"], [group["weight_decay"] for group in groups]
        (8, 0.25, [0.1, 0.1, 0.0])
    """
    if rank is _UNSET and density is None and "rule" not in options:
        raise TypeError(
            "param_groups needs a rank (rank=None makes every group dense), a density, or a rule for the matrices"
        )
    rank, density, weight_decay = map(as_python, (None if rank is _UNSET else rank, density, weight_decay))
    options = plain_options(options)
    _check_arguments(model, rank, density, include, weight_decay, options)
    low_rank_by = {"rank": rank} if density is None else {"density": density}
    train_low_rank = rank is not None or density is not None or "rule" in options
    gathered = find_gathered(model)
    found = find_parameters(model)
    for entry in found:
        if entry.param.requires_grad:
            gathered.check(entry.names[0], entry.param)
    include_list, exclude_list = _checked_patterns(include, exclude, found)
    at_place = {"head": dict(head or {}), "embeddings": dict(embeddings or {}), "other": {}}
    for pattern in overrides or {}:
        _check_pattern("overrides", pattern, found)
    for changes in (*(overrides or {}).values(), *at_place.values()):
        check_values(
            {**DEFAULTS, "lr": 0.0, "weight_decay": 0.0, "residual": "sign", **expand_shorthands(dict(changes))}
        )

    low_rank: dict[str, list[FoundParameter]] = {"auto": [], "transposed": [], "conv": []}
    dense: list[FoundParameter] = []
    no_decay: list[FoundParameter] = []
    for entry in (entry for entry in found if entry.param.requires_grad):
        if entry.kind == "no_decay":
            no_decay.append(entry)
        elif train_low_rank and _is_low_rank(entry, include_list, exclude_list):
            low_rank[entry.layout].append(entry)
        else:
            dense.append(entry)

    if not (dense or no_decay or any(low_rank.values())):
        raise ValueError("the model has no trainable parameters (requires_grad is False for all, or there are none)")
    if train_low_rank and not any(low_rank.values()):
        candidates = [entry for entry in found if entry.kind != "no_decay"]
        raise ValueError(
            f"no parameter is low-rank with include={include!r}, exclude={exclude!r}; embeddings, output heads and matrices outside "
            f"of known layers are only if include names them. Frozen or not, there are: {list_names(candidates) or 'no matrices'}"
        )

    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    kinds = [
        (entries, low_rank_by | ({} if layout == "auto" else {"layout": layout}) | options | decay)
        for layout, entries in low_rank.items()
    ]
    # An explicit None, so that a `rank` given to the optimizer itself does not reach these.
    kinds += [(dense, {"rank": None} | decay), (no_decay, {"rank": None, "weight_decay": 0.0})]
    plain: list[ParamGroup] = []
    special: list[ParamGroup] = []
    for entries, shared in kinds:
        for own, members in _by_own_options(entries, overrides or {}, at_place if entries is dense else {}):
            names = [entry.names[0] for entry in members]
            group = {"params": [entry.param for entry in members], "param_names": names, **shared, **own}
            (special if own else plain).append(group)
    return plain + special


def select_matrices(
    model: nn.Module,
    include: Pattern | Iterable[Pattern] | None = None,
    exclude: Pattern | Iterable[Pattern] | None = None,
) -> list[nn.Parameter]:
    """The parameters, frozen ones too, that `param_groups` makes low-rank with these patterns; the same errors."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    found = find_parameters(model)
    patterns = _checked_patterns(include, exclude, found)
    return [entry.param for entry in found if entry.kind != "no_decay" and _is_low_rank(entry, *patterns)]


def _by_own_options(
    entries: list[FoundParameter], overrides: Mapping[str, Mapping[str, Any]], at_place: Mapping[str, Mapping[str, Any]]
) -> list[tuple[dict[str, Any], list[FoundParameter]]]:
    """The entries by what their modules, their place and `overrides` say of them, those of which nothing is said first."""
    parted: list[tuple[dict[str, Any], list[FoundParameter]]] = []
    for entry in entries:
        own = {**entry.role.options, **at_place.get(entry.place, {})}
        for pattern, options in overrides.items():
            if entry.matches(pattern):
                own |= options
        for known, members in parted:
            if known == own:
                members.append(entry)
                break
        else:
            parted.append((own, [entry]))
    return sorted(parted, key=lambda part: bool(part[0]))


def _is_low_rank(entry: FoundParameter, include: list[Pattern] | None, exclude: list[Pattern]) -> bool:
    if any(entry.matches(pattern) for pattern in exclude):
        return False
    if include is None:
        return entry.kind == "matrix"
    return any(_takes_in(pattern, entry) for pattern in include)


def _takes_in(pattern: Pattern, entry: FoundParameter) -> bool:
    """Whether `include=pattern` makes this parameter low-rank."""
    return entry.matches(pattern) if entry.kind == "matrix" else entry.kind == "dense" and entry.is_named_by(pattern)


def _checked_patterns(
    include: Pattern | Iterable[Pattern] | None,
    exclude: Pattern | Iterable[Pattern] | None,
    found: list[FoundParameter],
) -> tuple[list[Pattern] | None, list[Pattern]]:
    """Both as lists; raises for patterns without effect."""
    include_list, exclude_list = _pattern_list("include", include), _pattern_list("exclude", exclude) or []
    for argument, patterns in (("include", include_list or []), ("exclude", exclude_list)):
        for pattern in patterns:
            _check_pattern(argument, pattern, found)
    return include_list, exclude_list


def _pattern_list(argument: str, patterns: Pattern | Iterable[Pattern] | None) -> list[Pattern] | None:
    if patterns is None:
        return None
    as_list = [patterns] if isinstance(patterns, str | re.Pattern) else list(patterns)
    for pattern in as_list:
        if not isinstance(pattern, str | re.Pattern):
            raise TypeError(f"{argument} must be strings or compiled regular expressions, got {pattern!r}")
        if pattern == "":
            raise ValueError(f"{argument} has an empty pattern, which would match every parameter")
    return as_list


def _check_pattern(argument: str, pattern: Pattern, found: list[FoundParameter]) -> None:
    """Raise ValueError if the pattern has no effect whatever the parameters' requires_grad."""
    text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
    matching = [entry for entry in found if entry.matches(pattern)]
    if not matching:
        words = dict.fromkeys(
            part for entry in found for name in entry.names for part in [*name.split("."), star_numbers(name)]
        )
        near = difflib.get_close_matches(text, [word for word in words if not word.isdigit()], n=4, cutoff=0.5)
        hint = f"nearest names: {', '.join(near)}" if near else f"the parameters are: {list_names(found)}"
        raise ValueError(f"{argument} pattern {text!r} matches no parameter; {hint}")
    if argument == "include" and not any(_takes_in(pattern, entry) for entry in matching):
        raise ValueError(
            f"include pattern {text!r} matches only parameters that it cannot make low-rank: {list_names(matching)} "
            f"(vectors, biases and norms never are; embeddings, heads and other tensors must be named themselves)"
        )


def _check_arguments(
    model: object,
    rank: object,
    density: float | None,
    include: object,
    weight_decay: float | None,
    options: Mapping[str, Any],
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be an nn.Module (names and modules decide what is low-rank), got {type(model).__name__}"
        )
    for key in options:
        if key in ("params", "param_names", "layout"):
            raise TypeError(f"{key} is set by param_groups for each group; build the groups by hand to choose it")
        if near := near_option(
            key, ["include", "exclude", "weight_decay", "rank", "density", "overrides", "head", "embeddings"]
        ):
            raise TypeError(f"unknown option {key!r}; did you mean {near!r}?")
    if rank is None and density is None and "rule" not in options and (include is not None or options):
        raise ValueError(
            f"rank is None, so every group is dense and {', '.join(options) or 'include'} would have no effect"
        )
    given = {**options, "weight_decay": weight_decay or 0.0, "rank": rank, "density": density}
    # What becomes of the gradient outside is the optimizer's business, so any density may do.
    check_values({**DEFAULTS, "lr": 0.0, "residual": "sign", **expand_shorthands(given)})
