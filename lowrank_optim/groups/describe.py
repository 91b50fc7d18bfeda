"""A plain-text table of param groups: what is low-rank, what is dense, what has no weight decay."""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_optim.groups.matrices import is_low_rank, make_space, matrix_shape, resolve_rank
from lowrank_optim.groups.names import collapse_names, shorten, star_numbers
from lowrank_optim.groups.options import DEFAULTS, expand_shorthands, plain_options
from lowrank_optim.groups.parts import PartRegistry
from lowrank_optim.projectors import Projector, from_name

LINE_WIDTH = 120

_HEADER = ("parameters", "shape", "side", "rank", "layout", "treatment", "count", "%")

_SUBSPACE_KEYS = ("rank", "density", "update_proj_gap", "scale", "proj_type", "projector")

_RULE_KEYS = ("lr", "betas", "eps", "weight_decay", "weight_error_bits")

_FLAGS = ("cautious", "cautious_decay")


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
    dense. Percentages are of all parameters in the groups. Factors of pairs (`lora_pairs`) are shown with their rank and scaling s.

    Args:
        groups: the result of `param_groups`, an optimizer or its `param_groups`, or groups written by hand, with or without names.

    Examples:
        >>> from torch import nn
        >>> from lowrank_optim import describe, param_groups
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
    registry: PartRegistry | None = getattr(groups, "parts", None)
    differing = [key for key in ("rule", "residual") if len({group.get(key) for group in group_list}) > 1]
    tensors = [list(_named_tensors(group)) for group in group_list]
    total = sum(tensor.numel() for group in tensors for _, tensor in group)

    lines: list[tuple[str, ...] | str] = []
    sums: dict[str, tuple[int, int]] = {}
    for index, (group, members) in enumerate(zip(group_list, tensors, strict=True)):
        lines += textwrap.wrap(
            f"group {index}: {_summary(group, differing)}", LINE_WIDTH, subsequent_indent=" " * len(f"group {index}: ")
        )
        rows: dict[tuple[str, _Row], list[tuple[str, int]]] = {}
        for place, (name, tensor) in enumerate(members):
            row = _row_of_pair(group, tensor, place) or _row(group, tuple(tensor.shape), registry)
            rows.setdefault((star_numbers(name), row), []).append((name, tensor.numel()))
            kind = row.treatment.partition(" (")[0]
            count, size = sums.get(kind, (0, 0))
            sums[kind] = count + 1, size + tensor.numel()
        if index == 0:
            lines.append(_HEADER)
        for (_, row), named in rows.items():
            size = sum(numel for _, numel in named)
            lines.append((collapse_names([name for name, _ in named]), *row.cells, f"{size:,}", _percent(size, total)))

    lines.append("total")
    sums["all"] = sum(count for count, _ in sums.values()), total
    totals = [(kind, f"{count:,} tensor{'s' * (count != 1)}", size) for kind, (count, size) in sums.items()]
    table = _render(lines, [(kind, count, f"{size:,}", _percent(size, total)) for kind, count, size in totals])
    said = [handle.description for handle in handles_of(groups)] if isinstance(groups, Optimizer) else []
    return "\n".join(
        [table, *(line for text in said for line in textwrap.wrap(text, LINE_WIDTH, subsequent_indent="  "))]
    )


def handles_of(optimizer: Optimizer) -> list[Any]:
    """What acts on the weights of an optimizer after its steps (`truncate_ranks`, an attached `SpectralSchedule`).

    The owners of its hooks that say what they do (`description`), which steps take memory of their own (`heavy_steps`), and come to
    these when they are asked to (`make_due`). Of a wrapper (Accelerate's), those of the optimizer inside.
    """
    hooks = getattr(optimizer, "_optimizer_step_post_hooks", None)
    if hooks is None:
        inner = getattr(optimizer, "optimizer", None)
        return [] if inner is None else handles_of(inner)
    owners = (getattr(hook, "__self__", None) for hook in hooks.values())
    return [owner for owner in owners if hasattr(owner, "heavy_steps")]


def _row_of_pair(group: Mapping[str, Any], tensor: Tensor, place: int) -> _Row | None:
    """A factor of a pair, with its rank and scaling; None for all other tensors."""
    if not group.get("pairs"):
        return None
    experts, scaling = group["experts"][place // 2], group["scalings"][place // 2]
    rank = tensor.shape[place % 2] // experts
    kind = f"pair (s {scaling:g})" if experts == 1 else f"pair (s {scaling:g}, {experts} experts)"
    return _Row(tuple(tensor.shape), "BA"[place % 2 == 0], str(rank), "-", kind)


def _row(group: Mapping[str, Any], shape: tuple[int, ...], registry: PartRegistry | None) -> _Row:
    group = {**DEFAULTS, **expand_shorthands(plain_options(group))}
    layout = group["layout"]
    if not is_low_rank(group):
        return _Row(shape, "-", "-", "-", "no decay" if group.get("weight_decay") == 0 else "dense")
    matrix = matrix_shape(shape, layout)
    if matrix is None:
        return _Row(shape, "-", "-", "-", "dense (empty)" if 0 in shape else f"dense ({len(shape)}-D)")
    projector = group["projector"]
    if not isinstance(projector, Projector):
        projector = from_name(projector) if registry is None else registry.projector_of(projector)
    space = make_space(matrix, group, projector, torch.float32)
    if space is None:
        short = min(matrix[-2:])
        return _Row(shape, "-", "-", layout, f"dense ({short} < {resolve_rank(group['rank'], short)})")
    if projector.moments_change_shape:
        return _Row(shape, "-", "-", layout, projector.treatment)
    return _Row(shape, space.side, str(space.rank), layout, projector.treatment)


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


def _summary(group: Mapping[str, Any], differing: Iterable[str]) -> str:
    if is_low_rank(group):
        kind, keys = "low-rank", (*differing, *_SUBSPACE_KEYS, *_RULE_KEYS)
    else:
        kind = "pairs" if group.get("pairs") else "dense"
        keys = (*(key for key in differing if key == "rule"), *_RULE_KEYS)
    values = [f"{key} {group[key]}" for key in keys if group.get(key) is not None]
    return ", ".join([kind, *values, *filter(group.get, _FLAGS)])


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
        cells = (shorten(cells[0], widths[0]), *cells[1:])
        return "  " + "  ".join(align(cell, width) for align, cell, width in zip(aligned, cells, widths, strict=True))

    left = sum(widths[:6]) + 2 * 5
    out = [line if isinstance(line, str) else line_of(line) for line in lines]
    for kind, count, size, percent in totals:
        middle = f"{kind:<10}{count:>12}".ljust(left)
        out.append(f"  {middle}  {size.rjust(widths[-2])}  {percent.rjust(widths[-1])}")
    return "\n".join(out)
