"""What the linear layers of the model are: dense ones, or factors with or without a sparse part, trained in their place."""

from typing import TYPE_CHECKING

from torch import nn

import lowrank_optim as lo

if TYPE_CHECKING:
    from pretraining.run import Config

PARAMETRIZATIONS = {
    "none": "dense layers, W",
    "low_rank": "W = s·B A",
    "sltrain": "W = s·B A + S, S with a fixed random support",
}
"""By name, with the weight of a layer. All but "none" are trained by the package's AdamW, from the first step on."""

DENSITY = 0.03
"""Of S, where none is given: that of the paper up to 1B parameters."""

FRACTION = 0.25
"""The rank, where none is given, over the hidden size."""


def density_of(config: "Config") -> float:
    """The fraction of the entries that S has."""
    if config.parametrization == "low_rank":
        return 0.0
    return DENSITY if config.density is None else config.density


def parametrize(config: "Config", model: nn.Module) -> nn.Module:
    """The model with the layers that a run has; factors and values are drawn from its seed.

    Raises:
        ValueError: a rank, density or alpha that a layer cannot have; the message names the layer and the valid range.
    """
    if config.parametrization == "none":
        return model
    rank = FRACTION if config.rank is None else config.rank
    if isinstance(rank, float):  # of the hidden size, the short side of every layer
        rank = max(1, round(rank * model.config.hidden_size))
    options = {"rank": rank, "density": density_of(config), "alpha": config.alpha, "seed": config.seed}
    return lo.nn.sltrain_(model, init="fresh", **options)
