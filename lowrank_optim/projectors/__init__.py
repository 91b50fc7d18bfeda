"""Subspaces of gradients: how a basis is chosen, stored and used."""

from collections.abc import Callable
from difflib import get_close_matches

from lowrank_optim.kernels import check_no_class
from lowrank_optim.projectors.base import PROJ_TYPES, Basis, GradientTerm, Projector, Refresh, StepParams, SubspaceSpec
from lowrank_optim.projectors.blocks import Blocks
from lowrank_optim.projectors.coordinate import Coordinate
from lowrank_optim.projectors.dct import DCT
from lowrank_optim.projectors.grassmann import GrassmannTracking
from lowrank_optim.projectors.momentum_svd import MomentumSVD
from lowrank_optim.projectors.power_iteration import PowerIteration
from lowrank_optim.projectors.random import Random
from lowrank_optim.projectors.randomized_svd import RandomizedSVD
from lowrank_optim.projectors.smallest_weights import SmallestWeights
from lowrank_optim.projectors.svd import SVD

__all__ = [
    "DCT",
    "PROJ_TYPES",
    "SVD",
    "Basis",
    "Blocks",
    "Coordinate",
    "GradientTerm",
    "GrassmannTracking",
    "MomentumSVD",
    "PowerIteration",
    "Projector",
    "Random",
    "RandomizedSVD",
    "Refresh",
    "SmallestWeights",
    "StepParams",
    "SubspaceSpec",
    "from_name",
]


def _svd(variant: str) -> Projector:
    if variant not in ("", "unaligned"):
        raise ValueError(f"the only variant is 'unaligned', not {variant!r}")
    return SVD(align=not variant)


_BUILDERS: dict[str, Callable[[str], Projector]] = {
    "randomized_svd": RandomizedSVD.from_variant,
    "svd": _svd,
    "random": lambda variant: Random(variant) if variant else Random(),
    "coordinate": lambda variant: Coordinate(variant or None),
    "power_iteration": lambda variant: PowerIteration(float(variant)) if variant else PowerIteration(),
    "blocks": lambda variant: Blocks(variant) if variant else Blocks(),
    "grassmann_tracking": lambda variant: GrassmannTracking(*([float(variant)] if variant else [])),
    "momentum_svd": lambda variant: MomentumSVD(*([float(variant)] if variant else [])),
    "smallest_weights": SmallestWeights.from_variant,
    "dct": lambda variant: DCT(*([variant] if variant else [])),
}


def from_name(name: str) -> Projector:
    """The projector that a name such as "randomized_svd", "random:gaussian" or "coordinate:rows" stands for.

    Raises:
        TypeError: for a class.
        ValueError: for an unknown name; the message names the nearest valid one.
    """
    check_no_class("projector", name)
    kind, _, variant = str(name).partition(":")
    if kind not in _BUILDERS:
        near = get_close_matches(kind, _BUILDERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"projector is {name!r}: {hint}valid names are {', '.join(_BUILDERS)}, or pass a Projector")
    try:
        return _BUILDERS[kind](variant)
    except (TypeError, ValueError) as error:
        raise ValueError(f"projector is {name!r}, of which {variant!r} is no variant of {kind}: {error}") from error
