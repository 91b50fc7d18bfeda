"""Memory-efficient optimizers for PyTorch: the public names, nothing else."""

from lowrank_optim._version import __version__
from lowrank_optim.optimizers import METHODS, GaLoreAdafactor, GaLoreAdamW, LowRankOptimizer, by_name, state_bytes
from lowrank_optim.projectors import SVD, Coordinate, Projector, Random, RandomizedSVD
from lowrank_optim.rules import Adafactor, Adam, Rule

__all__ = [
    "METHODS",
    "SVD",
    "Adafactor",
    "Adam",
    "Coordinate",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "LowRankOptimizer",
    "Projector",
    "Random",
    "RandomizedSVD",
    "Rule",
    "__version__",
    "by_name",
    "state_bytes",
]
