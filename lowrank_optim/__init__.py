"""Memory-efficient optimizers for PyTorch: the public names, nothing else."""

from typing import Any

from lowrank_optim._version import __version__
from lowrank_optim.optimizers import (
    METHODS,
    APOLLOAdamW,
    APOLLOMiniAdamW,
    FiraAdamW,
    FrugalAdamW,
    FrugalLion,
    FrugalSGD,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    LDAdamW,
    LowRankOptimizer,
    QGaLoreAdamW8bit,
    by_name,
    state_bytes,
)
from lowrank_optim.optimizers.residuals import (
    ErrorFeedback,
    GradientScaled,
    NoResidual,
    NormScaled,
    Residual,
    SGDResidual,
    SignResidual,
)
from lowrank_optim.param_groups import describe, param_groups
from lowrank_optim.projectors import SVD, Blocks, Coordinate, PowerIteration, Projector, Random, RandomizedSVD
from lowrank_optim.rules import SGD, Adafactor, Adam, Lion, RMSprop, Rule

__all__ = [
    "METHODS",
    "SGD",
    "SVD",
    "APOLLOAdamW",
    "APOLLOMiniAdamW",
    "Adafactor",
    "Adam",
    "Blocks",
    "Coordinate",
    "ErrorFeedback",
    "FiraAdamW",
    "FrugalAdamW",
    "FrugalLion",
    "FrugalSGD",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GradientScaled",
    "LDAdamW",
    "Lion",
    "LowRankOptimizer",
    "NoResidual",
    "NormScaled",
    "PowerIteration",
    "Projector",
    "QGaLoreAdamW8bit",
    "RMSprop",
    "Random",
    "RandomizedSVD",
    "Residual",
    "Rule",
    "SGDResidual",
    "SignResidual",
    "__version__",
    "by_name",
    "describe",
    "param_groups",
    "state_bytes",
]


def __getattr__(name: str) -> Any:
    """`lowrank_optim.integrations`, imported when it is first asked for."""
    if name == "integrations":
        from importlib import import_module

        return import_module("lowrank_optim.integrations")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
