"""Which layers a model has: `layer_groups` splits param groups by layer, `describe_layers` shows the result.

Layers are found from the structure of the model (repeated modules of one class), never from names of architectures, so that it works
for models nobody has thought of; where it does not, the layers are listed by hand. Who trains which layer when is the optimizers'
business.
"""

import difflib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from lowrank_optim.groups.parameters import ParamGroup

_log = logging.getLogger("lowrank_optim")

CATEGORIES = ("embeddings", "head", "final_norm", "other")
"""What a parameter outside of the layers can be."""

LayerSpec: TypeAlias = str | nn.Module
_CONTAINERS = (nn.ModuleList, nn.Sequential)


def layer_groups(
    model: nn.Module,
    rank: int | float | None = None,
    *,
    density: float | None = None,
    layers: LayerSpec | Iterable[LayerSpec | Sequence[LayerSpec]] | None = None,
    always_on: str | Iterable[str] = CATEGORIES,
    as_layers: str | Iterable[str] = (),
    weight_decay: float | None = None,
    **options: Any,
) -> "list[ParamGroup]":
    """The groups of `param_groups`, split by layer: for `LISAAdamW` and `BAdamW`, which train some layers at a time.

    Each group has a key `layer`: the layer's number, from 0, or None for parameters that are trained all the time. Layers are the
    members of the outermost `nn.ModuleList` or `nn.Sequential` in which a class of modules repeats (`model.layers` of Llama,
    `transformer.h` of GPT-2, `encoder.layer` of BERT, `blocks` of timm), in the model's order; encoder and decoder count through.

    A parameter outside of the layers is of one of these categories:

    | category | parameters |
    |---|---|
    | `"embeddings"` | of `nn.Embedding` and of modules named so: tokens, positions, patches |
    | `"head"` | of the output head, see `param_groups` |
    | `"final_norm"` | of norms that are not within a layer or an embedding |
    | `"other"` | all others, and weights that several layers share |

    A tied weight is of each of its categories. **What is of no category in `always_on` or `as_layers` is frozen here**: the
    `requires_grad` of these parameters becomes False, and no group has them. Parameters that were frozen before are left out, as by
    `param_groups`; a layer that has no others is no layer (and the log warns).

    Args:
        model: the model, with `requires_grad` as it is to be trained.
        rank, density: see `param_groups`; None trains every matrix densely.
        layers: None finds them. A path or module (`"model.layers"`): its children are the layers. A list of paths or modules
            (`["model.layers.0", …]`): each is a layer; an item that is itself a list is one layer of several modules.
        always_on: categories that are trained all the time.
        as_layers: categories that are a layer each, whatever `always_on` says: `"embeddings"` comes before the other layers, the
            rest after them.
        weight_decay: see `param_groups`.
        **options: further keys of the low-rank groups, and `include` and `exclude`, see `param_groups`.

    Returns:
        The groups that are always on, then those of each layer; each with `params`, `param_names` and `layer`.

    Raises:
        ValueError: no layers are found, or a named one does not exist (the message lists what was found); an unknown category; a
            category in `as_layers` without parameters; and what `param_groups` raises.

    The log (`lowrank_optim`, level INFO) says which layers were found and how much of the model is always on; `describe_layers`
    returns it as a table.

    Examples:
        >>> block = lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        >>> model = nn.ModuleDict({"embed": nn.Embedding(10, 8), "layers": nn.ModuleList([block(), block()])})
        >>> [(group["layer"], group["param_names"]) for group in layer_groups(model)][:2]
        [(None, ['embed.weight']), (0, ['layers.0.0.weight'])]
        >>> {group["layer"] for group in layer_groups(model, always_on=())}, model["embed"].weight.requires_grad
        ({0, 1}, False)
    """
    # Not at the top: param_groups imports the optimizers, which import this package.
    from lowrank_optim.groups.build import param_groups

    on, extra = _categories("always_on", always_on), _categories("as_layers", as_layers)
    groups = param_groups(model, rank, density=density, weight_decay=weight_decay, **options)
    trainable = {id(param) for group in groups for param in group["params"]}
    found = _listed_layers(model, layers) if layers is not None else find_layers(model)
    trained = [layer for layer in found if any(id(param) in trainable for param in layer.parameters())]
    if not trained:
        raise ValueError(
            f"none of the {len(found)} layers found ({_names(found)}) has a parameter with requires_grad; if an optimizer has put "
            "them to sleep, call its release()"
        )
    numbers = _numbers(model, trained, trainable, on, extra)
    result, frozen = _split(groups, numbers)
    for _, param in frozen:
        param.requires_grad_(False)
    _report(trained, found, result, frozen)
    return result


def _numbers(
    model: nn.Module, layers: "list[Layer]", trainable: set[int], always_on: list[str], as_layers: list[str]
) -> dict[int, int | None]:
    """The value of `layer` for each parameter, by its `id`; those that are to be frozen are missing."""
    place, categories = _places(model, layers)
    outside = {key: categories[key] for key in trainable if key not in place}
    for name in as_layers:
        if not any(name in own for own in outside.values()):
            raise ValueError(
                f"as_layers has {name!r}, but no trainable parameter is of that category; {_summary(model, layers)}"
            )
    first = [name for name in as_layers if name == "embeddings"]
    last = [name for name in as_layers if name != "embeddings"]
    position = {name: i for i, name in enumerate(first)}
    position |= {name: i for i, name in enumerate(last, len(first) + len(layers))}

    numbers: dict[int, int | None] = {key: i + len(first) for key, i in place.items()}
    for key, own in outside.items():
        if own & set(as_layers):
            numbers[key] = min(position[name] for name in own & set(as_layers))
        elif own & set(always_on):
            numbers[key] = None
    return numbers


def _split(
    groups: "list[ParamGroup]", numbers: Mapping[int, int | None]
) -> "tuple[list[ParamGroup], list[tuple[str, nn.Parameter]]]":
    """(the groups split by layer, those that are always on first; the parameters that have no number)"""
    split: dict[int | None, list[ParamGroup]] = {}
    frozen: list[tuple[str, nn.Parameter]] = []
    for group in groups:
        parts: dict[int | None, ParamGroup] = {}
        for name, param in zip(group["param_names"], group["params"], strict=True):
            if id(param) not in numbers:
                frozen.append((name, param))
                continue
            layer = numbers[id(param)]
            part = parts.setdefault(layer, {**group, "params": [], "param_names": [], "layer": layer})
            part["params"].append(param)
            part["param_names"].append(name)
        for layer, part in parts.items():
            split.setdefault(layer, []).append(part)
    order = sorted(split, key=lambda layer: -1 if layer is None else layer)
    return [part for layer in order for part in split[layer]], frozen


# Finding layers ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One layer: usually one module."""

    name: str
    modules: tuple[nn.Module, ...]

    def parameters(self) -> Iterator[nn.Parameter]:
        for module in self.modules:
            yield from module.parameters()

    def submodules(self) -> Iterator[nn.Module]:
        for module in self.modules:
            yield from module.modules()


def find_layers(model: nn.Module) -> list[Layer]:
    """The repeated layers of a model, in its order.

    Of all outermost lists of modules in which a class repeats, those whose members are made of modules (blocks); only where there are
    none, those of single modules (plain `nn.Linear`).

    Raises:
        ValueError: there are none; the message lists what the model has.
    """
    stacks = list(_stacks("", model))
    blocks = [layer for stack in stacks for layer in stack if _is_block(layer.modules[0])]
    layers = blocks or [layer for stack in stacks for layer in stack]
    if not layers:
        raise ValueError(f"no layers found in {type(model).__name__}; {_summary(model, [])}")
    return list({id(layer.modules[0]): layer for layer in reversed(layers)}.values())[::-1]


def _stacks(path: str, module: nn.Module) -> Iterator[list[Layer]]:
    """The outermost lists of repeated modules at or below `module`."""
    members = _repeated(module) if isinstance(module, _CONTAINERS) else {}
    if members:
        yield [Layer(_join(path, name), (member,)) for name, member in members.items()]
    for name, child in module.named_children():
        if name not in members:
            yield from _stacks(_join(path, name), child)


def _repeated(container: nn.Module) -> dict[str, nn.Module]:
    """The layers in one container, by name; empty where nothing repeats."""
    members = {name: child for name, child in container.named_children() if any(True for _ in child.parameters())}
    classes = [type(child) for child in members.values()]
    blocks = {name: child for name, child in members.items() if _is_block(child)}
    if isinstance(container, nn.ModuleList) and len(blocks) == len(members) and len(set(classes)) < len(classes):
        return blocks  # hybrid models have blocks of several classes in one list
    if repeated := {name: child for name, child in blocks.items() if classes.count(type(child)) > 1}:
        return repeated
    return (
        members
        if len(members) > 1 and len(set(classes)) == 1 and len(members) == len(list(container.children()))
        else {}
    )


def _is_block(module: nn.Module) -> bool:
    """Whether a module is made of modules that have parameters."""
    return any(True for child in module.children() for _ in child.parameters())


def _listed_layers(model: nn.Module, layers: Any) -> list[Layer]:
    """The layers that the caller lists."""
    modules = dict(model.named_modules(remove_duplicate=False))
    names = {id(module): name for name, module in reversed(modules.items())}

    def resolve(item: object) -> tuple[str, nn.Module]:
        if isinstance(item, str) and item in modules:
            return item, modules[item]
        if isinstance(item, nn.Module) and id(item) in names:
            return names[id(item)], item
        if not isinstance(item, str | nn.Module):
            raise TypeError(f"layers must hold module paths or modules, got {item!r}")
        what = repr(item) if isinstance(item, str) else f"a {type(item).__name__}"
        near = difflib.get_close_matches(item, modules, n=3) if isinstance(item, str) else []
        hint = f"nearest names: {', '.join(near)}; " if near else ""
        raise ValueError(f"layers has {what}, which is no module of the model; {hint}{_summary(model, None)}")

    if isinstance(layers, str | nn.Module):
        name, container = resolve(layers)
        found = [Layer(_join(name, child), (module,)) for child, module in container.named_children()]
        if not found:
            raise ValueError(f"layers is {name!r}, which has no children; give a list to make it a layer itself")
    else:
        found = []
        for item in layers:
            parts = [resolve(part) for part in ([item] if isinstance(item, str | nn.Module) else item)]
            found.append(Layer(" + ".join(name for name, _ in parts), tuple(module for _, module in parts)))
        if not found:
            raise ValueError(f"layers is empty; {_summary(model, None)}")
    listed = [(id(module), layer) for layer in found for module in layer.modules]
    for layer in found:
        inside = {id(module) for module in layer.submodules()}
        for key, other in listed:
            if other is not layer and key in inside:
                raise ValueError(f"layers overlap: {other.name} is a part of {layer.name}, or listed twice")
    return found


def _places(model: nn.Module, layers: list[Layer]) -> tuple[dict[int, int], dict[int, set[str]]]:
    """By `id` of a parameter: the position of its layer, if it is in one layer only, and its categories otherwise."""
    from lowrank_optim.groups.parameters import head_weights

    layer_of = {id(module): i for i, layer in enumerate(layers) for module in layer.submodules()}
    heads = head_weights(model)
    owners: dict[int, set[int | None]] = {}
    categories: dict[int, set[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, param in module.named_parameters(recurse=False):
            layer, key = layer_of.get(id(module)), id(param)
            owners.setdefault(key, set()).add(layer)
            own = categories.setdefault(key, set())
            if layer is None:
                own.add(_category(_join(path, name), module, key in heads))
    place: dict[int, int] = {}
    for key, positions in owners.items():
        (position, *others) = positions
        if position is not None and not others:
            place[key] = position
        elif not categories[key]:
            categories[key].add("other")
    return place, categories


def _category(name: str, module: nn.Module, in_head: bool) -> str:
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if in_head:  # before the name is looked at: the head of GPT-NeoX is called embed_out
        return "head"
    if "embed" in f"{name}.{type(module).__name__}".lower():
        return "embeddings"
    return "final_norm" if "Norm" in type(module).__name__ else "other"


def _categories(argument: str, given: str | Iterable[str]) -> list[str]:
    names = [given] if isinstance(given, str) else list(dict.fromkeys(given))
    for name in names:
        if name not in CATEGORIES:
            raise ValueError(f"{argument} has {name!r}; valid categories are {', '.join(map(repr, CATEGORIES))}")
    return names


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _names(layers: list[Layer]) -> str:
    names = [layer.name for layer in layers]
    return ", ".join(names if len(names) <= 3 else [names[0], names[1], "...", names[-1]])


def _summary(model: nn.Module, layers: list[Layer] | None) -> str:
    """What there is, for messages: the layers, or else the modules that might be some."""
    if layers is None:
        layers = [layer for stack in _stacks("", model) for layer in stack]
    if layers:
        return f"there are {len(layers)} layers: {_names(layers)}"
    children = [f"{name} ({type(child).__name__})" for name, child in model.named_children()]
    lists = [
        f"{name} ({type(module).__name__} of {', '.join(type(child).__name__ for child in module) or 'nothing'})"
        for name, module in model.named_modules()
        if isinstance(module, _CONTAINERS) and name
    ]
    return (
        f"no list of modules repeats a class. Lists: {', '.join(lists) or 'none'}; modules: {', '.join(children) or 'none'}. "
        'Name the layers: layers="path.of.their.list" or layers=["path.of.one", …]'
    )


# What was found ------------------------------------------------------------------------------------------------------------------


def _report(
    trained: list[Layer],
    found: list[Layer],
    groups: "list[ParamGroup]",
    frozen: list[tuple[str, nn.Parameter]],
) -> None:
    if len(found) > len(trained):
        rest = [layer for layer in found if layer not in trained]
        _log.warning(
            "%d of %d layers have no parameter with requires_grad and are left out: %s. If an optimizer has put them to sleep, call "
            "its release() first",
            len(rest),
            len(found),
            _names(rest),
        )
    sizes = _sizes(groups)
    total = sum(sizes.values())
    _log.info(
        "%d layers: %s. Always on: %s of %s parameters (%.1f %%). Frozen: %s",
        len(trained),
        _names(trained),
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
