"""Memory-efficient optimizers for PyTorch: the public names, nothing else."""

from typing import TYPE_CHECKING, Any

from lowrank_optim import distributed, nn
from lowrank_optim._version import __version__
from lowrank_optim.adapters import (
    ForwardNoise,
    RowScaling,
    lora_pairs,
    lora_sb_,
    noise_in_forward,
    prune_ranks_,
    scale_rows_in_backward,
    update_scalings,
)
from lowrank_optim.groups.build import param_groups
from lowrank_optim.groups.describe import describe
from lowrank_optim.groups.layer_report import describe_layers
from lowrank_optim.groups.layers import layer_groups
from lowrank_optim.groups.roles import Role
from lowrank_optim.in_backward import UpdateInBackward, update_in_backward
from lowrank_optim.optimizers import (
    FULL_RANK_METHODS,
    LAYERWISE_METHODS,
    METHODS,
    AliceAdamW,
    AltLoRA,
    APOLLOAdamW,
    APOLLOMiniAdamW,
    BAdamW,
    CondaAdamW,
    FiraAdamW,
    FOAMAdamW,
    FrugalAdamW,
    FrugalLion,
    FrugalSGD,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    LDAdamW,
    LISAAdamW,
    LoRAOptimizer,
    LoRAProAdamW,
    LoRARiteAdamW,
    LoRASBAdamW,
    LowRankOptimizer,
    MomentumPerturbation,
    MuonAdamW,
    QGaLoreAdamW8bit,
    RankTruncation,
    RiemannianAdamW,
    SaRAAdamW,
    SCALEOptimizer,
    SinkGDAdamW,
    SpectralSchedule,
    StepProgress,
    StepWatch,
    SubTrackAdamW,
    SUMOAdamW,
    by_name,
    full_precision,
    perturb_by_momentum,
    state_bytes,
    truncate_ranks,
    watch_step,
)
from lowrank_optim.projectors import (
    DCT,
    SVD,
    Blocks,
    Coordinate,
    GrassmannTracking,
    MomentumSVD,
    PowerIteration,
    Projector,
    Random,
    RandomizedSVD,
    SmallestWeights,
)
from lowrank_optim.projectors.base import Basis, GradientTerm, Refresh, StepParams, SubspaceSpec, usable
from lowrank_optim.projectors.dense_basis import DenseBasis
from lowrank_optim.projectors.stored_projector import StoredProjector
from lowrank_optim.residuals.base import Residual, ResidualInput, Update
from lowrank_optim.residuals.complement import ComplementScaled
from lowrank_optim.residuals.gradient import ErrorFeedback, NoResidual, SGDResidual, SignResidual
from lowrank_optim.residuals.scaled import GradientScaled, NormScaled
from lowrank_optim.rules import (
    SAGE,
    SGD,
    Adafactor,
    Adam,
    Context,
    Direction,
    FoldedAdam,
    JointRule,
    Lion,
    MomentumRule,
    Muon,
    NorMuon,
    RMSprop,
    RowNorm,
    Rule,
    Sinkhorn,
)

if TYPE_CHECKING:
    from lowrank_optim.planner import MemoryPlan, plan

__all__ = [
    "DCT",
    "FULL_RANK_METHODS",
    "LAYERWISE_METHODS",
    "METHODS",
    "SAGE",
    "SGD",
    "SVD",
    "APOLLOAdamW",
    "APOLLOMiniAdamW",
    "Adafactor",
    "Adam",
    "AliceAdamW",
    "AltLoRA",
    "BAdamW",
    "Basis",
    "Blocks",
    "ComplementScaled",
    "CondaAdamW",
    "Context",
    "Coordinate",
    "DenseBasis",
    "Direction",
    "ErrorFeedback",
    "FOAMAdamW",
    "FiraAdamW",
    "FoldedAdam",
    "ForwardNoise",
    "FrugalAdamW",
    "FrugalLion",
    "FrugalSGD",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GradientScaled",
    "GradientTerm",
    "GrassmannTracking",
    "JointRule",
    "LDAdamW",
    "LISAAdamW",
    "Lion",
    "LoRAOptimizer",
    "LoRAProAdamW",
    "LoRARiteAdamW",
    "LoRASBAdamW",
    "LowRankOptimizer",
    "MemoryPlan",
    "MomentumPerturbation",
    "MomentumRule",
    "MomentumSVD",
    "Muon",
    "MuonAdamW",
    "NoResidual",
    "NorMuon",
    "NormScaled",
    "PowerIteration",
    "Projector",
    "QGaLoreAdamW8bit",
    "RMSprop",
    "Random",
    "RandomizedSVD",
    "RankTruncation",
    "Refresh",
    "Residual",
    "ResidualInput",
    "RiemannianAdamW",
    "Role",
    "RowNorm",
    "RowScaling",
    "Rule",
    "SCALEOptimizer",
    "SGDResidual",
    "SUMOAdamW",
    "SaRAAdamW",
    "SignResidual",
    "SinkGDAdamW",
    "Sinkhorn",
    "SmallestWeights",
    "SpectralSchedule",
    "StepParams",
    "StepProgress",
    "StepWatch",
    "StoredProjector",
    "SubTrackAdamW",
    "SubspaceSpec",
    "Update",
    "UpdateInBackward",
    "__version__",
    "by_name",
    "describe",
    "describe_layers",
    "distributed",
    "full_precision",
    "layer_groups",
    "lora_pairs",
    "lora_sb_",
    "nn",
    "noise_in_forward",
    "param_groups",
    "perturb_by_momentum",
    "plan",
    "prune_ranks_",
    "scale_rows_in_backward",
    "state_bytes",
    "truncate_ranks",
    "update_in_backward",
    "update_scalings",
    "usable",
    "watch_step",
]


def __getattr__(name: str) -> Any:
    """`lowrank_optim.diagnostics`, `.integrations`, `.testing` and the planner, imported when they are first asked for."""
    if name in ("diagnostics", "integrations", "testing"):
        from importlib import import_module

        return import_module(f"lowrank_optim.{name}")
    if name in ("plan", "MemoryPlan"):
        from lowrank_optim import planner

        return getattr(planner, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
