"""The optimizers, by class and by short name."""

from difflib import get_close_matches

from lowrank_optim.optimizers.alice import AliceAdamW
from lowrank_optim.optimizers.apollo import APOLLOAdamW, APOLLOMiniAdamW
from lowrank_optim.optimizers.badam import BAdamW
from lowrank_optim.optimizers.base import LowRankOptimizer
from lowrank_optim.optimizers.conda import CondaAdamW
from lowrank_optim.optimizers.fira import FiraAdamW
from lowrank_optim.optimizers.foam import FOAMAdamW
from lowrank_optim.optimizers.frugal import FrugalAdamW, FrugalLion, FrugalSGD
from lowrank_optim.optimizers.full_precision import full_precision
from lowrank_optim.optimizers.galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from lowrank_optim.optimizers.ldadam import LDAdamW
from lowrank_optim.optimizers.lisa import LISAAdamW
from lowrank_optim.optimizers.lora import AltLoRA, LoRAOptimizer, LoRAProAdamW, LoRARiteAdamW, RiemannianAdamW
from lowrank_optim.optimizers.lora_sb import LoRASBAdamW
from lowrank_optim.optimizers.muon import MuonAdamW, SUMOAdamW
from lowrank_optim.optimizers.normalized import SCALEOptimizer, SinkGDAdamW
from lowrank_optim.optimizers.perturbation import MomentumPerturbation, perturb_by_momentum
from lowrank_optim.optimizers.qgalore import QGaLoreAdamW8bit
from lowrank_optim.optimizers.sara import SaRAAdamW
from lowrank_optim.optimizers.sizes import state_bytes
from lowrank_optim.optimizers.spectral_schedule import SpectralSchedule
from lowrank_optim.optimizers.subtrack import SubTrackAdamW
from lowrank_optim.optimizers.truncation import RankTruncation, truncate_ranks
from lowrank_optim.optimizers.watch import StepProgress, StepWatch, watch_step

__all__ = [
    "FULL_RANK_METHODS",
    "LAYERWISE_METHODS",
    "METHODS",
    "APOLLOAdamW",
    "APOLLOMiniAdamW",
    "AliceAdamW",
    "AltLoRA",
    "BAdamW",
    "CondaAdamW",
    "FOAMAdamW",
    "FiraAdamW",
    "FrugalAdamW",
    "FrugalLion",
    "FrugalSGD",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "LDAdamW",
    "LISAAdamW",
    "LoRAOptimizer",
    "LoRAProAdamW",
    "LoRARiteAdamW",
    "LoRASBAdamW",
    "LowRankOptimizer",
    "MomentumPerturbation",
    "MuonAdamW",
    "QGaLoreAdamW8bit",
    "RankTruncation",
    "RiemannianAdamW",
    "SCALEOptimizer",
    "SUMOAdamW",
    "SaRAAdamW",
    "SinkGDAdamW",
    "SpectralSchedule",
    "StepProgress",
    "StepWatch",
    "SubTrackAdamW",
    "by_name",
    "full_precision",
    "perturb_by_momentum",
    "state_bytes",
    "truncate_ranks",
    "watch_step",
]

METHODS: dict[str, type[LowRankOptimizer]] = {
    "galore": GaLoreAdamW,
    "galore_8bit": GaLoreAdamW8bit,
    "galore_adafactor": GaLoreAdafactor,
    "fira": FiraAdamW,
    "apollo": APOLLOAdamW,
    "apollo_mini": APOLLOMiniAdamW,
    "frugal": FrugalAdamW,
    "frugal_lion": FrugalLion,
    "frugal_sgd": FrugalSGD,
    "ldadam": LDAdamW,
    "qgalore": QGaLoreAdamW8bit,
    "muon_adamw": MuonAdamW,
    "sumo": SUMOAdamW,
    "scale": SCALEOptimizer,
    "sinkgd": SinkGDAdamW,
    "alice": AliceAdamW,
    "subtrack": SubTrackAdamW,
    "conda": CondaAdamW,
    "sara": SaRAAdamW,
}
"""Short names, as command lines and trainers use them."""

FULL_RANK_METHODS: dict[str, type[LowRankOptimizer]] = {"foam": FOAMAdamW}
"""Short names of those whose groups can have no rank or density."""

LAYERWISE_METHODS: dict[str, type[LowRankOptimizer]] = {"lisa": LISAAdamW, "badam": BAdamW}
"""Short names of those that are built from `layer_groups`."""


def by_name(name: str) -> type[LowRankOptimizer]:
    """The optimizer class that a short name stands for.

    Raises:
        ValueError: for an unknown name; the message names the nearest and all valid ones.
    """
    methods = METHODS | FULL_RANK_METHODS | LAYERWISE_METHODS
    if name not in methods:
        near = get_close_matches(name, methods, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"method is {name!r}: {hint}valid names are {', '.join(methods)}")
    return methods[name]
