"""The layers of a model, and what the parameters outside of them are.

Layers are found from the structure of the model (repeated modules of one class), never from names of architectures, so that it works
for models nobody has thought of; where it does not, the layers are listed by hand.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from lowrank_optim.groups.parameters import head_weights

CATEGORIES = ("embeddings", "head", "final_norm", "other")
"""What a parameter outside of the layers can be."""

_CONTAINERS = (nn.ModuleList, nn.Sequential)


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
        raise ValueError(f"no layers found in {type(model).__name__}; {summary(model, [])}")
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
    alike = len(members) > 1 and len(set(classes)) == 1 and len(members) == len(list(container.children()))
    return members if alike else {}


def _is_block(module: nn.Module) -> bool:
    """Whether a module is made of modules that have parameters."""
    return any(True for child in module.children() for _ in child.parameters())


def listed_layers(model: nn.Module, layers: Any) -> list[Layer]:
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
        raise ValueError(f"layers has {what}, which is no module of the model; {hint}{summary(model, None)}")

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
            raise ValueError(f"layers is empty; {summary(model, None)}")
    listed = [(id(module), layer) for layer in found for module in layer.modules]
    for layer in found:
        inside = {id(module) for module in layer.submodules()}
        for key, other in listed:
            if other is not layer and key in inside:
                raise ValueError(f"layers overlap: {other.name} is a part of {layer.name}, or listed twice")
    return found


def places(model: nn.Module, layers: list[Layer]) -> tuple[dict[int, int], dict[int, set[str]]]:
    """By `id` of a parameter: the position of its layer, if it is in one layer only, and its categories otherwise."""
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


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def layer_names(layers: list[Layer]) -> str:
    names = [layer.name for layer in layers]
    return ", ".join(names if len(names) <= 3 else [names[0], names[1], "...", names[-1]])


def summary(model: nn.Module, layers: list[Layer] | None) -> str:
    """What there is, for messages: the layers, or else the modules that might be some."""
    if layers is None:
        layers = [layer for stack in _stacks("", model) for layer in stack]
    if layers:
        return f"there are {len(layers)} layers: {layer_names(layers)}"
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
