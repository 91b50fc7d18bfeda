"""How frozen-base adapters come into a model: `add_adapters_`, which `svfit_`, `salt_`, `loldu_`, `nola_` and others call."""

from collections.abc import Callable

import torch
from torch import nn

from lowrank_optim.nn.adapted import AdaptedLayer
from lowrank_optim.nn.factorize import freeze_all_but
from lowrank_optim.nn.plain_layers import Kind
from lowrank_optim.nn.reparametrized import (
    Patterns,
    ReparametrizedLayer,
    TakenLayer,
    put_layers,
    sharing,
    take_layers,
)


def add_adapters_(
    model: nn.Module,
    make: Callable[[TakenLayer], AdaptedLayer],
    include: Patterns,
    exclude: Patterns,
    freeze_rest: bool,
    kinds: tuple[Kind, ...] = ("linear", "conv1d"),
) -> nn.Module:
    """Put a layer with something trained beside it in the place of each taken one, and freeze what was there.

    Args:
        model: changed in place, once all layers are made.
        make: the new layer for a taken one; it may raise ValueError, which gets the layer's name.
        include, exclude, kinds: which layers, as of `take_layers`.
        freeze_rest: freeze the rest of the model, too, and not the weights of taken layers alone.

    Raises:
        TypeError: no nn.Module.
        ValueError: as `take_layers` and `make`; a layer that lies in a reparametrised one.
    """
    taken = take_layers(model, include, exclude, kinds, meta=True, coded=True)
    _check_alone(model, taken)
    shared: dict[int, AdaptedLayer] = {}
    made: dict[int, nn.Module] = {}
    for layer in taken:
        first = shared.get(id(layer.module.weight))
        try:
            new = make(layer) if first is None else sharing(first)
        except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            raise ValueError(f"{layer.path}: {error}") from error
        new.base = layer.module
        shared.setdefault(id(layer.module.weight), new)
        made[id(layer.module)] = new
    for layer in taken:
        made[id(layer.module)].take_hooks_of_base()  # type: ignore[operator]
        layer.module.weight.requires_grad_(False)
    put_layers(model, made)
    if freeze_rest:
        own = [param for new in made.values() for param in new.parameters(recurse=False)]
        freeze_all_but(model, [param for param in own if param.requires_grad])
    return model


def _check_alone(model: nn.Module, taken: list[TakenLayer]) -> None:
    """Raise ValueError where a layer has something beside it already."""
    chosen = {id(layer.module): layer.path for layer in taken}
    for outer in model.modules():
        if isinstance(outer, ReparametrizedLayer):
            for child in outer.modules():
                if id(child) in chosen:
                    raise ValueError(
                        f"{chosen[id(child)]} lies in a {type(outer).__name__}; a layer has one adapter: leave it out (exclude), "
                        "or call lowrank_optim.nn.merge_ first"
                    )
