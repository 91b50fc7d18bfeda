"""What `layer_groups` has found: the table `describe_layers`, and a line in the log."""

import logging
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lowrank_optim.groups.model_layers import Layer, layer_names
from lowrank_optim.groups.parameters import ParamGroup

_log = logging.getLogger("lowrank_optim")


def report_layers(
    trained: list[Layer], found: list[Layer], groups: list[ParamGroup], frozen: list[tuple[str, nn.Parameter]]
) -> None:
    """Log what `layer_groups` has made: of the layers found those that are trained, the groups, and what was frozen, by name."""
    if len(found) > len(trained):
        rest = [layer for layer in found if layer not in trained]
        _log.warning(
            "%d of %d layers have no parameter with requires_grad and are left out: %s. If an optimizer has put them to sleep, call "
            "its release() first",
            len(rest),
            len(found),
            layer_names(rest),
        )
    sizes = _sizes(groups)
    total = sum(sizes.values())
    _log.info(
        "%d layers: %s. Always on: %s of %s parameters (%.1f %%). Frozen: %s",
        len(trained),
        layer_names(trained),
        f"{sizes[None]:,}",
        f"{total:,}",
        100 * sizes[None] / total,
        ", ".join(name for name, _ in frozen) or "none",
    )


def _sizes(groups: Iterable[Mapping[str, Any]]) -> dict[int | None, int]:
    """Numbers of parameters by layer, with None for those that are always on."""
    sizes: dict[int | None, int] = {None: 0}
    for group in groups:
        layer = group.get("layer")
        sizes[layer] = sizes.get(layer, 0) + sum(param.numel() for param in group["params"])
    return sizes


def describe_layers(groups: Iterable[Mapping[str, Any]] | Optimizer, active_layers: int = 2) -> str:
    """A plain-text table of the layers, and of how much of what is trained at a time is always on.

    Args:
        groups: the result of `layer_groups`, or an optimizer built from it.
        active_layers: how many layers are trained at a time (the largest ones are taken); an optimizer knows which.

    Examples:
        >>> from lowrank_optim import layer_groups
        >>> block = lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        >>> model = nn.ModuleDict({"embed": nn.Embedding(10, 8), "layers": nn.ModuleList([block() for _ in range(6)])})
        >>> print(describe_layers(layer_groups(model)))
        always on             80   13.16 %
        layers 0-5    6 x     88   14.47 % each
        all                  608  100.00 %
        2 layers at a time   256   42.11 %, of which always on 31.25 %
    """
    group_list = list(groups.param_groups if isinstance(groups, Optimizer) else groups)
    sizes = _sizes(group_list)
    total, always = sum(sizes.values()), sizes.pop(None)
    layers = {layer: count for layer, count in sizes.items() if layer is not None}
    if any("awake" in group for group in group_list):
        awake = sorted({group["layer"] for group in group_list if group.get("awake") and group["layer"] is not None})
        at_a_time = f"layers {', '.join(map(str, awake))} awake"
        trained = always + sum(layers[layer] for layer in awake)
    else:
        at_a_time = f"{active_layers} layer{'s' * (active_layers != 1)} at a time"
        trained = always + sum(sorted(layers.values(), reverse=True)[:active_layers])

    def percent(count: int) -> str:
        return f"{100 * count / max(total, 1):6.2f} %"

    rows = [("always on", "", always, percent(always))]
    for size, run in groupby(sorted(layers), key=layers.__getitem__):
        first, *others = run
        label = f"layers {first}-{others[-1]}" if others else f"layer {first}"
        times, each = (f"{len(others) + 1} x ", " each") if others else ("", "")
        rows.append((label, times, size, percent(size) + each))
    rows.append(("all", "", total, percent(total)))
    rows.append(
        (at_a_time, "", trained, f"{percent(trained)}, of which always on {100 * always / max(trained, 1):.2f} %")
    )
    left = max(len(label) + len(times) for label, times, _, _ in rows)
    right = max(len(f"{size:,}") for _, _, size, _ in rows) + 3
    return "\n".join(
        f"{label}{times:>{left - len(label)}}{size:{right},}  {share}" for label, times, size, share in rows
    )
