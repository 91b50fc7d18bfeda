"""The options that every optimizer of the package shares: names, defaults, valid ranges.

An option may stand in the constructor or in a param group. Anything else raises, but for the keys that torch, schedulers and
trainers put into groups, which are carried along.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Real
from operator import itemgetter
from typing import Any, TypedDict

from torch import Tensor

from lowrank_optim.kernels import as_python
from lowrank_optim.projectors import PROJ_TYPES, Projector, from_name
from lowrank_optim.residuals import Residual
from lowrank_optim.rules import Rule

LAYOUTS = ("auto", "conv", "transposed")
ON_REFRESH = ("keep", "reset", "rotate")
ON_NONFINITE = ("skip", "propagate", "raise")
BITS = (32, 16, 8, 4)
LARGEST = 3e38
"""The largest step size: numbers of a step are float32."""


class Options(TypedDict, total=False):
    """Keyword-only options of every optimizer.

    rank: columns of the basis; an int, or a float in (0, 1] as a fraction of the short side; None trains densely.
    density: in place of rank, the fraction of the projected side (of all entries, of all tensors) that has moments, in [0, 1].
    update_proj_gap: steps between two refreshes of the subspace.
    scale: α, multiplies the lifted update.
    proj_type: which side is projected: "std", "reverse_std", "left", "right" or "full".
    projector: "randomized_svd", "svd", "random", "coordinate", "dct", or a `Projector`.
    coordinates: "columns", "rows" or "entries", for `projector="coordinate"`.
    blocks: "random", "ascending", "descending" or "mirror": whole tensors in turn, in place of a subspace of each.
    on_refresh: what happens to the moments when the subspace changes: "keep", "reset" or "rotate".
    stagger: spreading the refreshes of the parameters over the gap.
    overlap_threshold: refresh a matrix less often once its subspace stands still: where ‖P_oldᵀP_new‖²/r over the last `queue_size`
        refreshes averages at least this, its gap is multiplied by `gap_factor`. None keeps the gap.
    queue_size, gap_factor: see `overlap_threshold`.
    stochastic_rounding: round bfloat16 weights stochastically.
    weight_error_bits: keep what rounding drops from bfloat16 weights, 8 or 16 bits for each, as `weight_error` in the state, so that
        weights of 3 or 4 bytes are trained (see `lowrank_optim.full_precision`); None drops it.
    cautious: leave out the elements of an update that the gradient disagrees with, and enlarge the others (Liang et al., 2024).
    cautious_decay: decay only weights that the update makes smaller (Chen et al., 2025).
    maximize: ascend instead of descend.
    seed: of all random choices.
    on_nonfinite: "skip" a parameter's update when its gradient is not finite, "propagate" it, or "raise".
    match_reference: reproduce the authors' released code with its quirks; also turns `stagger` off.
    state_bits: bits of an element of the moments: 32, 16 (bfloat16), 8 or 4 (codes with a scale per block of a row); tensors of fewer
        than 4096 elements keep 32.
    basis_bits: bits of an element of a stored basis: 32, 16 (bfloat16), 8 or 4 (packed codes).
    layout: how a tensor is seen as a matrix: "auto", "conv" (first dimension × the rest) or "transposed" (stored (in, out)).
    lr_factor, decay_factor: of a group, multiply its learning rate and its weight decay.
    lr_ratio: of a group of pairs (`lora_pairs`), the learning rate of B relative to that of A (LoRA+).
    l1: ξ of a proximal step after each update, p ← sign(p)·max(|p| − ηξ, 0), of dense parameters; of pairs, on the rank-one terms.
    exact_sums: sums of subspaces in float64, rounded once, so that any number of processes have the same bits; slow, for tests.
    fused, foreach, capturable, differentiable: accepted for the sake of loops written for torch.optim, and without effect.
    """

    rank: int | float | None
    density: float | None
    update_proj_gap: int
    scale: float
    proj_type: str
    projector: str | Projector
    coordinates: str | None
    blocks: str | None
    on_refresh: str
    stagger: bool
    overlap_threshold: float | None
    queue_size: int
    gap_factor: float
    stochastic_rounding: bool
    weight_error_bits: int | None
    cautious: bool
    cautious_decay: bool
    maximize: bool
    seed: int
    on_nonfinite: str
    match_reference: bool
    state_bits: int
    basis_bits: int
    layout: str
    lr_factor: float
    decay_factor: float
    lr_ratio: float
    l1: float
    exact_sums: bool
    fused: bool | None
    foreach: bool | None
    capturable: bool
    differentiable: bool


DEFAULTS: dict[str, Any] = {
    "rank": None,
    "density": None,
    "update_proj_gap": 200,
    "scale": 1.0,
    "proj_type": "std",
    "projector": "randomized_svd",
    "on_refresh": "keep",
    "stagger": True,
    "overlap_threshold": None,
    "queue_size": 5,
    "gap_factor": 2.0,
    "stochastic_rounding": False,
    "weight_error_bits": None,
    "cautious": False,
    "cautious_decay": False,
    "maximize": False,
    "seed": 0,
    "on_nonfinite": "skip",
    "match_reference": False,
    "state_bits": 32,
    "basis_bits": 32,
    "layout": "auto",
    "lr_factor": 1.0,
    "decay_factor": 1.0,
    "lr_ratio": 1.0,
    "l1": 0.0,
    "exact_sums": False,
}

_LAID_OUT = (
    *("rule", "residual", "rank", "density", "proj_type", "projector", "layout"),
    *("state_bits", "basis_bits", "weight_error_bits"),
)

STRUCTURAL = (*_LAID_OUT, "layer", "layerwise", "sampling", "sleeping_state", "master_weights")
"""Group keys that decide what the state tensors are and mean; a checkpoint must agree on them."""

_FIXED = (*_LAID_OUT, "seed", "match_reference", "queue_size", "exact_sums", "cautious")
_fixed_values = itemgetter(*_FIXED)


def structure(group: Mapping[str, Any], rule: Rule) -> tuple[Any, ...]:
    """Everything in a group that its state was made for; `Optimizer.change_group` changes it, an edit of the live group cannot."""
    return (*_fixed_values(group), group["overlap_threshold"] is None, *rule.structure(group))


def check_structure(group: Mapping[str, Any], made_for: tuple[Any, ...], rule: Rule, number: int) -> None:
    """Raise ValueError where an option that decides about the state was edited in a live group.

    Args:
        group: as it is now.
        made_for: its `structure` when the state was made.
        rule: of the group, then.
        number: of the group.
    """
    if (now := structure(group, rule)) == made_for:
        return
    for name, new, old in zip(_FIXED, now, made_for, strict=False):
        if new != old:
            what = f"{name} is {new!r} in param group {number}, whose state was made for {old!r}"
            call = f"{name}={new!r}"
            break
    else:
        what, call = f"an option of param group {number} was edited that decides which state there is", "…"
    raise ValueError(
        f"{what}; nothing was changed. Set it back, and call optimizer.change_group({number}, {call}), which makes the state anew"
    )


SHORTHANDS = ("coordinates", "blocks")
"""Options that say which projector is meant; they become part of its name and are not kept."""

CARRIED: Collection[str] = {
    *("params", "param_names", "fused", "foreach", "capturable", "differentiable", "amsgrad", "decoupled_weight_decay"),
    *("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr", "lr_scale"),
    *("name", "group_name", "layer", "grad_norms", "state_format"),
    *("truncation_step", "truncation_last", "truncation_ranks"),
    *("pairs", "scalings", "experts"),  # of `lora_pairs`
}
"""Group keys of torch, its schedulers and trainers, kept as they are."""


def plain_options(options: Mapping[str, Any], keep_tensors: bool = False) -> dict[str, Any]:
    """The options of a group with Python's own numbers; a learning rate may be a tensor, as in torch."""
    kept = ("lr", *CARRIED)
    return {
        name: value if name in ("params", "param_names") else as_python(value, keep_tensors or name in kept)
        for name, value in options.items()
    }


def check_names(given: Iterable[str], valid: Iterable[str], where: str, carried: Collection[str] = CARRIED) -> None:
    """Raise TypeError for the first unknown name, also none of `carried`; the message names the nearest valid one."""
    valid = sorted(set(valid))
    for name in given:
        if name not in valid and name not in carried:
            raise _unknown(name, near_option(name, valid, 0.6), valid, where)


def check_group_names(given: Iterable[str], valid: Iterable[str]) -> None:
    """Raise TypeError for a group key that is nearly an option's name; other unknown keys are somebody else's, and carried along."""
    valid = sorted(set(valid))
    for name in given:
        if name not in valid and name not in CARRIED and (near := near_option(name, valid)):
            raise _unknown(name, near, valid, "a param group")


def near_option(name: str, valid: Sequence[str], cutoff: float = 0.8) -> str | None:
    """The name that is one slip away, or else the most alike of those above `cutoff`; None if there is none."""
    slips = [option for option in valid if _is_one_slip(str(name), option)]
    slips.sort(key=lambda option: option != "lr")  # which is written more often than any other
    return next(iter(slips or get_close_matches(str(name), valid, n=1, cutoff=cutoff)), None)


def _is_one_slip(name: str, option: str) -> bool:
    """Whether the names differ by one letter left out, added or replaced, or by two neighbours exchanged."""
    ends = [(name[i:], option[i:]) for i in range(len(name) + 1) if name[:i] == option[:i]]
    return any(a[1:] == b[1:] or a[1:] == b or a == b[1:] or (a[:2] == b[1::-1] and a[2:] == b[2:]) for a, b in ends)


def _unknown(name: str, near: str | None, valid: Iterable[str], where: str) -> TypeError:
    hint = f"did you mean {near!r}? " if near else ""
    return TypeError(f"unknown option {name!r} in {where}: {hint}valid options are {', '.join(valid)}")


def check_values(options: Mapping[str, Any]) -> None:
    """Raise ValueError for a value out of range: name, value, valid range."""
    for name in ("lr", "weight_decay"):
        value = options[name]
        if not _is_number(value) or not float(value) >= 0.0:
            raise ValueError(f"{name} is {value!r}; it must be a number of at least 0")
        if not float(value) <= LARGEST:
            raise ValueError(f"{name} is {value!r}; it must be at most {LARGEST:g}")
    _check_rank(options["rank"])
    _check_density(options)
    gap = options["update_proj_gap"]
    if isinstance(gap, bool) or not isinstance(gap, int) or gap < 1:
        raise ValueError(f"update_proj_gap is {gap!r}; it must be an int of at least 1")
    scale = options["scale"]
    if not _is_number(scale) or not abs(float(scale)) < float("inf"):
        raise ValueError(f"scale is {scale!r}; it must be a finite number")
    if isinstance(options["seed"], bool) or not isinstance(options["seed"], int):
        raise ValueError(f"seed is {options['seed']!r}; it must be an int")
    for name, valid in (
        ("proj_type", PROJ_TYPES),
        ("on_refresh", ON_REFRESH),
        ("on_nonfinite", ON_NONFINITE),
        ("layout", LAYOUTS),
    ):
        if options[name] not in valid:
            raise ValueError(f"{name} is {options[name]!r}; valid values are {', '.join(map(repr, valid))}")
    for name in ("lr_factor", "decay_factor", "lr_ratio", "l1"):
        if not _is_number(options[name]) or not 0.0 <= float(options[name]) < float("inf"):
            raise ValueError(f"{name} is {options[name]!r}; it must be a finite number of at least 0")
    for name in (
        *("stagger", "stochastic_rounding", "maximize", "match_reference", "exact_sums"),
        *("cautious", "cautious_decay"),
    ):
        if not isinstance(options[name], bool):
            raise ValueError(f"{name} is {options[name]!r}; it must be True or False")
    for name in ("state_bits", "basis_bits"):
        if options[name] not in BITS:
            raise ValueError(f"{name} is {options[name]!r}; valid values are {', '.join(map(str, BITS))}")
    _check_lazy_refresh(options)
    _check_weight_error(options)
    if options["match_reference"] and options["cautious_decay"]:
        raise ValueError(
            "match_reference and cautious_decay are both True; released code decays all weights after the update, so choose one"
        )
    for name in ("differentiable", "amsgrad"):
        if options.get(name):
            raise ValueError(
                f"{name} is True, which the low-rank optimizers do not support; use torch.optim.AdamW for it"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, (Real, Tensor)) and not isinstance(value, bool)


def _check_rank(rank: Any) -> None:
    if rank is None:
        return
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise ValueError(f"rank is {rank!r}; it must be an int of at least 1, a float in (0, 1], or None")
    if isinstance(rank, float) and not 0.0 < rank <= 1.0:
        raise ValueError(
            f"rank is {rank!r}; a float is a fraction of the short side and must be in (0, 1]; write an int for a count"
        )
    if isinstance(rank, int) and rank < 1:
        raise ValueError(f"rank is {rank!r}; it must be at least 1 (None trains densely)")


def _check_density(options: Mapping[str, Any]) -> None:
    density = options["density"]
    if density is None:
        return
    if not _is_number(density) or not 0.0 <= float(density) <= 1.0:
        raise ValueError(f"density is {density!r}; it must be a number in [0, 1]")
    if options["rank"] is not None:
        raise ValueError(f"rank is {options['rank']!r} and density {density!r}; give one of them, the other None")
    if float(density) == 0.0 and options.get("residual", "none") not in ("sgd", "sign"):
        raise ValueError(
            'density is 0 and nothing outside of the subspace is trained either: use residual "sgd" or "sign", or more density'
        )


def _check_lazy_refresh(options: Mapping[str, Any]) -> None:
    threshold, size, factor = (options[name] for name in ("overlap_threshold", "queue_size", "gap_factor"))
    if threshold is not None and (not _is_number(threshold) or not 0.0 <= float(threshold) <= 1.0):
        raise ValueError(f"overlap_threshold is {threshold!r}; it must be None or a number in [0, 1]")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"queue_size is {size!r}; it must be an int of at least 1")
    if not _is_number(factor) or not 1.0 <= float(factor) < float("inf"):
        raise ValueError(f"gap_factor is {factor!r}; it must be a finite number of at least 1")


def _check_weight_error(options: Mapping[str, Any]) -> None:
    bits = options["weight_error_bits"]
    if bits is None:
        return
    if bits not in (8, 16):
        raise ValueError(f"weight_error_bits is {bits!r}; valid values are None, 8 and 16")
    for name in ("stochastic_rounding", "master_weights"):
        if options.get(name):
            raise ValueError(
                f"weight_error_bits is {bits} and {name} True, two ways to keep small updates of bfloat16 weights; use one of them"
            )


def expand_shorthands(given: dict[str, Any]) -> dict[str, Any]:
    """The options with `coordinates` and `blocks` written into the projector's name, and of `rank` and `density` only one.

    Whoever names one of `rank` and `density` (or `rank=None`, which makes a group dense) means the other to be None.
    """
    short = {name: value for name in SHORTHANDS if (value := given.pop(name, None)) is not None}
    if short:
        kind = {"coordinates": "coordinate", "blocks": "blocks"}
        name, value = next(iter(short.items()))
        projector = given.get("projector", kind[name])
        if len(short) > 1 or projector != kind[name]:
            others = [f"{key}={value!r}" for key, value in {"projector": projector, **short}.items()]
            raise ValueError(
                f"{', '.join(others)} do not go together; blocks, coordinates and a projector exclude each other"
            )
        given["projector"] = f"{kind[name]}:{value}"
    for name, other in (("rank", "density"), ("density", "rank")):
        if name in given and other not in given:
            given[other] = None
    return given


def check_parts(rule: Rule, projector: Projector, residual: Residual, options: Mapping[str, Any]) -> None:
    """Raise ValueError for parts that do not go together, by what they say of themselves."""
    if residual.uses_norms and (options["proj_type"] == "full" or not projector.has_channels):
        what = 'proj_type="full"' if projector.has_channels else f"projector={projector.name!r}"
        raise ValueError(
            f"{what} has no rows or columns for residual={residual.name!r} to scale; use proj_type std, reverse_std, left or "
            'right, or residual "none", "sgd" or "sign"'
        )
    if residual.needs_orthonormal and not projector.orthonormal:
        raise ValueError(
            f"projector={projector.name!r} is not orthonormal, so G − lift R is not what lies outside the subspace, and "
            f'residual={residual.name!r} diverges; use projector="random", or residual "norm_scaled" or "gradient_scaled"'
        )
    if residual.feeds_back and rule.averages_updates(options) and options["on_refresh"] == "rotate":
        raise ValueError(
            f"{type(rule).__name__} averages updates, not gradients, so what a rotation loses cannot be fed back; use beta1=None, or "
            'on_refresh "keep"'
        )


def check_combination(projector: Projector, options: Mapping[str, Any]) -> None:
    """Raise ValueError for options that make no sense together with this projector."""
    if projector.moments_change_shape and not projector.narrows and options["on_refresh"] != "reset":
        raise ValueError(
            f"on_refresh is {options['on_refresh']!r}, but projector={projector.name!r} frees the moments of a tensor when its "
            'turn ends; use on_refresh="reset"'
        )
    if not projector.stores_basis and options["basis_bits"] != 32:
        raise ValueError(
            f"basis_bits is {options['basis_bits']}, but projector={projector.name!r} stores no basis; leave it at 32, or use "
            'projector "randomized_svd" or "svd"'
        )
    if not projector.stores_basis and options["overlap_threshold"] is not None:
        raise ValueError(
            f"overlap_threshold is {options['overlap_threshold']!r}, but projector={projector.name!r} stores no basis, so "
            'that nothing is compared; use None, or projector "randomized_svd" or "svd"'
        )


def projector_option(options: Mapping[str, Any]) -> Projector:
    """The projector that a constructor's options (shorthands written out) ask for."""
    # The released code takes the exact subspace; a cheaper one has to be asked for.
    projector = options.get("projector", "svd" if options.get("match_reference") else DEFAULTS["projector"])
    return projector if isinstance(projector, Projector) else from_name(projector)
