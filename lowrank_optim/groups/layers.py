"""`layer_groups`: param groups, split by layer. The optimizers decide when which layer is trained."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn

from lowrank_optim.groups.build import param_groups
from lowrank_optim.groups.layer_report import report_layers
from lowrank_optim.groups.model_layers import (
    CATEGORIES,
    Layer,
    find_layers,
    layer_names,
    listed_layers,
    places,
    summary,
)
from lowrank_optim.groups.parameters import ParamGroup

LayerSpec: TypeAlias = str | nn.Module


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
) -> list[ParamGroup]:
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
    on, extra = _categories("always_on", always_on), _categories("as_layers", as_layers)
    groups = param_groups(model, rank, density=density, weight_decay=weight_decay, **options)
    trainable = {id(param) for group in groups for param in group["params"]}
    found = listed_layers(model, layers) if layers is not None else find_layers(model)
    trained = [layer for layer in found if any(id(param) in trainable for param in layer.parameters())]
    if not trained:
        raise ValueError(
            f"none of the {len(found)} layers found ({layer_names(found)}) has a parameter with requires_grad; if an optimizer has "
            "put them to sleep, call its release()"
        )
    numbers = _numbers(model, trained, trainable, on, extra)
    result, frozen = _split(groups, numbers)
    for _, param in frozen:
        param.requires_grad_(False)
    report_layers(trained, found, result, frozen)
    return result


def _numbers(
    model: nn.Module, layers: list[Layer], trainable: set[int], always_on: list[str], as_layers: list[str]
) -> dict[int, int | None]:
    """The value of `layer` for each parameter, by its `id`; those that are to be frozen are missing."""
    place, categories = places(model, layers)
    outside = {key: categories[key] for key in trainable if key not in place}
    for name in as_layers:
        if not any(name in own for own in outside.values()):
            raise ValueError(
                f"as_layers has {name!r}, but no trainable parameter is of that category; {summary(model, layers)}"
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
    groups: list[ParamGroup], numbers: Mapping[int, int | None]
) -> tuple[list[ParamGroup], list[tuple[str, nn.Parameter]]]:
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


def _categories(argument: str, given: str | Iterable[str]) -> list[str]:
    names = [given] if isinstance(given, str) else list(dict.fromkeys(given))
    for name in names:
        if name not in CATEGORIES:
            raise ValueError(f"{argument} has {name!r}; valid categories are {', '.join(map(repr, CATEGORIES))}")
    return names
