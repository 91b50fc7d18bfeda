"""Which parameters of a model are low-rank: `param_groups` builds the groups, `describe` shows them.

`param_groups` looks at modules, names and global shapes only, never at values, so it works on the meta device and gives the same
groups in every process. What a group's keys mean is the optimizers' business; here they are only handed on.
"""

import difflib
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from lowrank_optim.kernels import as_python
from lowrank_optim.optimizers.layout import is_low_rank, make_space, matrix_shape, resolve_rank
from lowrank_optim.optimizers.options import DEFAULTS, check_values, expand_shorthands, plain_options
from lowrank_optim.projectors import Projector, from_name

ParamGroup: TypeAlias = dict[str, Any]
Pattern: TypeAlias = str | re.Pattern[str]

_LANGUAGE_HEADS = ("lm_head", "embed_out", "output_projection", "output_layer", "to_logits", "unembed", "output")
_OTHER_HEADS = ("classifier", "score", "qa_outputs", "head", "heads", "fc")
HEAD_NAMES = frozenset(_LANGUAGE_HEADS + _OTHER_HEADS)
"""Module names that mean an output head, as long as no repeated layer (a number in the path) contains the module."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_MATRIX_MODULES = (nn.Linear, *_CONVOLUTIONS)


_UNSET: Any = object()


def param_groups(
    model: nn.Module,
    rank: int | float | None = _UNSET,
    *,
    density: float | None = None,
    include: Pattern | Iterable[Pattern] | None = None,
    exclude: Pattern | Iterable[Pattern] | None = None,
    weight_decay: float | None = None,
    **options: Any,
) -> list[ParamGroup]:
    """Parameter groups of a model in which the weight matrices are low-rank.

    | parameter | treatment |
    |---|---|
    | weight of `nn.Linear`; GPT-2 style `Conv1D` (stored transposed); in-projection of `nn.MultiheadAttention` | low-rank |
    | weight of a convolution, transposed ones too (matrix: first dimension × all others) | low-rank |
    | 3-D stack of matrices (experts, m, n) held directly by a module, such as `experts.gate_up_proj` | low-rank |
    | embeddings, output heads, every weight tied to one of them, other tensors of two or more dimensions | dense |
    | 0-D and 1-D parameters, biases and norms of any dimension | dense, weight decay 0 |
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
            and leaves only the weight decay split.
        density: in place of `rank`, the fraction of the projected side (or of the columns, entries or tensors, as the projector
            says) that has moments, in [0, 1]: FRUGAL's way to say it.
        include: one pattern or several, such as `["attn", "mlp"]`: only matrices that match one are low-rank, the others dense. A
            pattern that names the tensor or its module itself (`"lm_head"`, `"embed"`; not a parent such as `"model"`, nor a bare
            `"*"`) also takes in what is dense by default. None takes what the table says.
        exclude: one pattern or several: matrices that match one are dense (still trained). Wins over `include`.
        weight_decay: decay of all groups but the no-decay one. Not given, the optimizer's default holds there.
        **options: further keys of the low-rank groups: `scale`, `update_proj_gap`, `proj_type`, `projector`, `lr`, …

    Returns:
        Up to five groups with `params` and `param_names`, empty ones left out: low-rank (one for each layout: as stored, transposed,
        convolution), dense, and dense without decay. Groups that are dense have `rank=None`.

    Raises:
        ValueError: a pattern matches nothing (the message has the nearest names) or cannot make anything low-rank; nothing is left to
            train or to make low-rank; a value is out of range.
        TypeError: `model` is not a module, or a key in `options` is set here or looks like a misspelt argument.

    Examples:
        >>> model = nn.ModuleDict({"attn": nn.Linear(64, 64), "mlp": nn.Linear(64, 256), "norm": nn.LayerNorm(64)})
        >>> groups = param_groups(model, rank=8, include=["attn"], weight_decay=0.1, scale=0.25)
        >>> [group["param_names"] for group in groups]
        [['attn.weight'], ['mlp.weight'], ['attn.bias', 'mlp.bias', 'norm.weight', 'norm.bias']]
        >>> groups[0]["rank"], groups[0]["scale"], [group["weight_decay"] for group in groups]
        (8, 0.25, [0.1, 0.1, 0.0])
    """
    if rank is _UNSET and density is None:
        raise TypeError("param_groups needs a rank (rank=None makes every group dense) or a density")
    rank, density, weight_decay = map(as_python, (None if rank is _UNSET else rank, density, weight_decay))
    options = plain_options(options)
    _check_arguments(model, rank, density, include, weight_decay, options)
    low_rank_by = {"rank": rank} if density is None else {"density": density}
    train_low_rank = rank is not None or density is not None
    found = _find_parameters(model)
    include_list, exclude_list = _checked_patterns(include, exclude, found)

    low_rank: dict[str, list[_Found]] = {"auto": [], "transposed": [], "conv": []}
    dense: list[_Found] = []
    no_decay: list[_Found] = []
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
            f"of known layers are only if include names them. Frozen or not, there are: {_listing(candidates) or 'no matrices'}"
        )

    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    groups = [
        _group(entries, low_rank_by | ({} if layout == "auto" else {"layout": layout}) | options | decay)
        for layout, entries in low_rank.items()
    ]
    # An explicit None, so that a `rank` given to the optimizer itself does not reach these.
    groups += [_group(dense, {"rank": None} | decay), _group(no_decay, {"rank": None, "weight_decay": 0.0})]
    return [group for group in groups if group["params"]]


def select_matrices(
    model: nn.Module,
    include: Pattern | Iterable[Pattern] | None = None,
    exclude: Pattern | Iterable[Pattern] | None = None,
) -> list[nn.Parameter]:
    """The parameters, frozen ones too, that `param_groups` makes low-rank with these patterns; the same errors."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    found = _find_parameters(model)
    patterns = _checked_patterns(include, exclude, found)
    return [entry.param for entry in found if entry.kind != "no_decay" and _is_low_rank(entry, *patterns)]


# What a parameter is ------------------------------------------------------------------------------------------------------------

Kind: TypeAlias = Literal["matrix", "dense", "no_decay"]


@dataclass(frozen=True)
class _Found:
    """One parameter of a model, under all its names, and what it is by default."""

    param: nn.Parameter
    names: tuple[str, ...]
    kind: Kind  # "matrix": low-rank by default; "dense": only if named; "no_decay": never
    layout: str  # of the matrix: "auto", "transposed" or "conv"

    def matches(self, pattern: Pattern) -> bool:
        return any(_matches(pattern, name) for name in self.names)

    def is_named_by(self, pattern: Pattern) -> bool:
        """Whether a pattern that matches is about this very tensor, not about a parent module or about everything."""
        return any(_matches(pattern, name) and _names_itself(pattern, name) for name in self.names)


def _find_parameters(model: nn.Module) -> list[_Found]:
    """Every parameter once, in the order of `model.named_parameters()`, classified by the modules that own it."""
    heads = head_weights(model)
    found: dict[int, _Found] = {}
    # Duplicates are kept while walking: a tied weight is what its strictest owner says, and it answers to all its names.
    for path, module in model.named_modules(remove_duplicate=False):
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            full_name = f"{path}.{name}" if path else name
            if isinstance(param, UninitializedParameter):
                raise ValueError(f"parameter {full_name} has no shape yet (lazy module): run one forward pass first")
            kind, layout = _classify(module, name, param)
            if kind == "matrix" and id(param) in heads:
                kind = "dense"
            if (known := found.get(id(param))) is None:
                found[id(param)] = _Found(param, (full_name,), kind, layout)
                continue
            strictest: Kind = max(known.kind, kind, key=("matrix", "dense", "no_decay").index)
            found[id(param)] = _Found(param, (*known.names, full_name), strictest, known.layout)
    return list(found.values())


def _classify(module: nn.Module, name: str, param: nn.Parameter) -> tuple[Kind, str]:
    """(kind, layout) of the parameter `name` that `module` holds directly."""
    class_name = type(module).__name__
    # Stacked experts have 2-D biases, nn.MultiheadAttention 3-D ones: the name tells, not the dimension.
    if param.ndim < 2 or "bias" in name.split("_"):
        return "no_decay", "auto"
    if name == "weight":
        if isinstance(module, nn.Linear):
            return "matrix", "auto"
        if isinstance(module, _CONVOLUTIONS):
            return "matrix", "conv"
        # transformers.pytorch_utils.Conv1D, a Linear stored as (in, out). Recognised by name, so that transformers is not imported.
        if class_name == "Conv1D" and param.ndim == 2:
            return "matrix", "transposed"
    if "Norm" in class_name:  # nn.LayerNorm((C, H, W)) has a 3-D weight
        return "no_decay", "auto"
    if isinstance(module, nn.MultiheadAttention) and name.endswith("proj_weight"):
        return "matrix", "auto"
    # Learned tokens and positions of vision models, (1, tokens, dim), are 3-D too but no stack of matrices.
    if param.ndim == 3 and param.shape[0] > 1 and "embed" not in f"{class_name}.{name}".lower():
        # transformers marks expert modules whose matrices are stored as (in, out) with this flag (GPT-OSS).
        return "matrix", "transposed" if getattr(module, "is_transposed", False) is True else "auto"
    return "dense", "auto"


def head_weights(model: nn.Module) -> set[int]:
    """`id` of the weights of output heads."""
    heads: list[nn.Module] = []
    for path, module in model.named_modules():
        parts = path.split(".")
        if parts[-1] in HEAD_NAMES and not any(part.isdigit() for part in parts):
            heads.append(module)
        getter = getattr(module, "get_output_embeddings", None)
        if callable(getter):
            try:
                head = getter()
            except (AttributeError, NotImplementedError):  # models without a head inherit the method
                continue
            if isinstance(head, nn.Module):
                heads.append(head)
    weights: set[int] = set()
    for head in heads:
        layers = [m for m in head.modules() if isinstance(m, _MATRIX_MODULES) or type(m).__name__ == "Conv1D"]
        # The last layer alone makes the output: the first layers of a VGG classifier are ordinary large matrices.
        weights |= {id(param) for param in (layers[-1] if layers else head).parameters()}
    return weights


def _is_low_rank(entry: _Found, include: list[Pattern] | None, exclude: list[Pattern]) -> bool:
    if any(entry.matches(pattern) for pattern in exclude):
        return False
    if include is None:
        return entry.kind == "matrix"
    return any(_takes_in(pattern, entry) for pattern in include)


def _takes_in(pattern: Pattern, entry: _Found) -> bool:
    """Whether `include=pattern` makes this parameter low-rank."""
    return entry.matches(pattern) if entry.kind == "matrix" else entry.kind == "dense" and entry.is_named_by(pattern)


def _group(entries: list[_Found], options: Mapping[str, Any]) -> ParamGroup:
    return {"params": [e.param for e in entries], "param_names": [e.names[0] for e in entries], **options}


# Patterns -----------------------------------------------------------------------------------------------------------------------


def _matches(pattern: Pattern, name: str) -> bool:
    if isinstance(pattern, re.Pattern):
        return pattern.search(name) is not None
    if any(wildcard in pattern for wildcard in "*?["):
        return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)
    return pattern in name


def _names_itself(pattern: Pattern, name: str) -> bool:
    """Whether a pattern contains (part of) the tensor's own name: `lm_head` of `model.lm_head.weight`, `A_log` of `mixer.A_log`."""
    parts = name.split(".")
    own = parts[-2] if parts[-1] == "weight" and len(parts) > 1 else parts[-1]
    text = re.sub(r"\\[A-Za-z]", " ", pattern.pattern) if isinstance(pattern, re.Pattern) else pattern
    return any(word in own or own in word for word in re.findall(r"\w\w+", text))


def _checked_patterns(
    include: Pattern | Iterable[Pattern] | None, exclude: Pattern | Iterable[Pattern] | None, found: list[_Found]
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


def _check_pattern(argument: str, pattern: Pattern, found: list[_Found]) -> None:
    """Raise ValueError if the pattern has no effect whatever the parameters' requires_grad."""
    text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
    matching = [entry for entry in found if entry.matches(pattern)]
    if not matching:
        words = dict.fromkeys(
            part for entry in found for name in entry.names for part in [*name.split("."), _star(name)]
        )
        near = difflib.get_close_matches(text, [word for word in words if not word.isdigit()], n=4, cutoff=0.5)
        hint = f"nearest names: {', '.join(near)}" if near else f"the parameters are: {_listing(found)}"
        raise ValueError(f"{argument} pattern {text!r} matches no parameter; {hint}")
    if argument == "include" and not any(_takes_in(pattern, entry) for entry in matching):
        raise ValueError(
            f"include pattern {text!r} matches only parameters that it cannot make low-rank: {_listing(matching)} "
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
        if near := difflib.get_close_matches(key, ["include", "exclude", "weight_decay", "rank"], n=1, cutoff=0.8):
            raise TypeError(f"unknown option {key!r}; did you mean {near[0]!r}?")
    if rank is None and density is None and (include is not None or options):
        raise ValueError(
            f"rank is None, so every group is dense and {', '.join(options) or 'include'} would have no effect"
        )
    given = {**options, "weight_decay": weight_decay or 0.0, "rank": rank, "density": density}
    # What becomes of the gradient outside is the optimizer's business, so any density may do.
    check_values({**DEFAULTS, "lr": 0.0, "residual": "sign", **expand_shorthands(given)})


# The table ----------------------------------------------------------------------------------------------------------------------

LINE_WIDTH = 120
_HEADER = ("parameters", "shape", "side", "rank", "layout", "treatment", "count", "%")
_GROUP_KEYS = (
    "rank",
    "density",
    "update_proj_gap",
    "scale",
    "proj_type",
    "projector",
    "lr",
    "betas",
    "eps",
    "weight_decay",
)


@dataclass(frozen=True)
class _Row:
    """What `describe` says of one tensor; equal rows whose names differ in numbers only are printed once."""

    shape: tuple[int, ...]
    side: str
    rank: str
    layout: str
    treatment: str

    @property
    def cells(self) -> tuple[str, ...]:
        return "x".join(map(str, self.shape)) or "scalar", self.side, self.rank, self.layout, self.treatment


def describe(groups: Iterable[Mapping[str, Any]] | Optimizer) -> str:
    """A plain-text table of what is low-rank, what is dense and what has no weight decay, at most 120 columns wide.

    Tensors of one shape whose names differ in layer numbers only share a row (`model.layers.*.mlp.up_proj.weight x8`). `side` is the
    side of the matrix that is projected, `rank` the rank that it gets; a matrix whose short side is smaller than the rank is shown as
    dense. Percentages are of all parameters in the groups.

    Args:
        groups: the result of `param_groups`, an optimizer or its `param_groups`, or groups written by hand, with or without names.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        >>> print(describe(param_groups(model, rank=16, weight_decay=0.1)))
        group 0: low-rank, rank 16, weight_decay 0.1
          parameters  shape   side   rank  layout  treatment   count       %
          0.weight    256x64  right  16    auto    low-rank   16,384   49.52
          2.weight    64x256  left   16    auto    low-rank   16,384   49.52
        group 1: dense, weight_decay 0.0
          0.bias      256     -      -     -       no decay      256    0.77
          2.bias      64      -      -     -       no decay       64    0.19
        total
          low-rank     2 tensors                              32,768   99.03
          no decay     2 tensors                                 320    0.97
          all          4 tensors                              33,088  100.00
    """
    group_list = list(groups.param_groups if isinstance(groups, Optimizer) else groups)
    for item in group_list:
        if not isinstance(item, Mapping):
            raise TypeError(
                f"describe takes param groups (dicts) or an optimizer, got an iterable of {type(item).__name__}"
            )
    tensors = [list(_named_tensors(group)) for group in group_list]
    total = sum(tensor.numel() for group in tensors for _, tensor in group)

    lines: list[tuple[str, ...] | str] = []
    sums: dict[str, tuple[int, int]] = {}
    for index, (group, members) in enumerate(zip(group_list, tensors, strict=True)):
        lines += textwrap.wrap(
            f"group {index}: {_summary(group)}", LINE_WIDTH, subsequent_indent=" " * len(f"group {index}: ")
        )
        rows: dict[tuple[str, _Row], list[tuple[str, int]]] = {}
        for name, tensor in members:
            row = _row(group, tuple(tensor.shape))
            rows.setdefault((_star(name), row), []).append((name, tensor.numel()))
            kind = row.treatment.partition(" (")[0]
            count, size = sums.get(kind, (0, 0))
            sums[kind] = count + 1, size + tensor.numel()
        if index == 0:
            lines.append(_HEADER)
        for (_, row), named in rows.items():
            size = sum(numel for _, numel in named)
            lines.append((_collapse([name for name, _ in named]), *row.cells, f"{size:,}", _percent(size, total)))

    lines.append("total")
    sums["all"] = sum(count for count, _ in sums.values()), total
    totals = [(kind, f"{count:,} tensor{'s' * (count != 1)}", size) for kind, (count, size) in sums.items()]
    return _render(lines, [(kind, count, f"{size:,}", _percent(size, total)) for kind, count, size in totals])


def _row(group: Mapping[str, Any], shape: tuple[int, ...]) -> _Row:
    group = {**DEFAULTS, **expand_shorthands(plain_options(group))}
    layout = group["layout"]
    if not is_low_rank(group):
        return _Row(shape, "-", "-", "-", "no decay" if group.get("weight_decay") == 0 else "dense")
    matrix = matrix_shape(shape, layout)
    if matrix is None:
        return _Row(shape, "-", "-", "-", "dense (empty)" if 0 in shape else f"dense ({len(shape)}-D)")
    projector = group["projector"]
    projector = projector if isinstance(projector, Projector) else from_name(projector)
    space = make_space(matrix, group, projector, torch.float32)
    if space is None:
        short = min(matrix[-2:])
        return _Row(shape, "-", "-", layout, f"dense ({short} < {resolve_rank(group['rank'], short)})")
    if projector.resizes:
        return _Row(shape, "-", "-", layout, "in turn")
    return _Row(shape, space.side, str(space.rank), layout, "low-rank")


def _named_tensors(group: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a group's members; tensors without a name are called unnamed."""
    params = group["params"]
    if isinstance(params, Tensor):
        params = [params]
    if isinstance(params, Iterator):
        raise TypeError("a group's params are an iterator, which describing would use up; give a list")
    names = group.get("param_names")
    for index, item in enumerate(params):
        if isinstance(item, Tensor):
            yield names[index] if names is not None else "(unnamed)", item
        else:
            yield item


def _summary(group: Mapping[str, Any]) -> str:
    kind = "low-rank" if is_low_rank(group) else "dense"
    keys = [
        key for key in _GROUP_KEYS if group.get(key) is not None and (kind == "low-rank" or key not in _GROUP_KEYS[:6])
    ]
    return ", ".join([kind, *(f"{key} {group[key]}" for key in keys)])


def _star(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _collapse(names: list[str]) -> str:
    """One name for tensors whose names differ in numbers only: a number that varies becomes `*`."""
    if len(names) == 1:
        return names[0]
    parts = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(part[0] if len(set(part)) == 1 else "*" for part in parts) + f" x{len(names)}"


def _listing(entries: list[_Found], limit: int = 12) -> str:
    """The names of parameters, collapsed, for an error message."""
    by_pattern: dict[str, list[str]] = {}
    for entry in entries:
        by_pattern.setdefault(_star(entry.names[0]), []).append(entry.names[0])
    shown = [_collapse(names) for names in by_pattern.values()]
    return ", ".join(shown[:limit]) + (f" and {len(shown) - limit} more" if len(shown) > limit else "")


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f}" if whole else "0.00"


def _render(lines: list[tuple[str, ...] | str], totals: list[tuple[str, str, str, str]]) -> str:
    """Lay out rows (tuples) in common columns under headings (strings), with the totals under the last two columns."""
    rows = [line for line in lines if not isinstance(line, str)] or [_HEADER]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[-2:] = [max(widths[-2 + i], *(len(line[2 + i]) for line in totals)) for i in (0, 1)]
    widths[0] = min(widths[0], LINE_WIDTH - sum(widths[1:]) - 2 * len(widths))
    aligned: Sequence[Callable[[str, int], str]] = [str.ljust] * 6 + [str.rjust] * 2

    def line_of(cells: tuple[str, ...]) -> str:
        cells = (_shorten(cells[0], widths[0]), *cells[1:])
        return "  " + "  ".join(align(cell, width) for align, cell, width in zip(aligned, cells, widths, strict=True))

    left = sum(widths[:6]) + 2 * 5
    out = [line if isinstance(line, str) else line_of(line) for line in lines]
    for kind, count, size, percent in totals:
        middle = f"{kind:<10}{count:>12}".ljust(left)
        out.append(f"  {middle}  {size.rjust(widths[-2])}  {percent.rjust(widths[-1])}")
    return "\n".join(out)


def _shorten(text: str, width: int) -> str:
    """Cut the middle out of a text that is too long; both ends of a parameter name matter."""
    if len(text) <= width:
        return text
    head = (width - 3) // 3
    return f"{text[:head]}...{text[len(text) - (width - 3 - head) :]}"
