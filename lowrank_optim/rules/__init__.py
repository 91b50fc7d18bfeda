"""Update rules on one matrix, small or full."""

from lowrank_optim.rules.adafactor import Adafactor
from lowrank_optim.rules.adam import Adam, CondaAdam, TorchAdam
from lowrank_optim.rules.altlora import AlternatingLoRA
from lowrank_optim.rules.base import (
    Context,
    Direction,
    FusedDense,
    FusedDirection,
    MomentumRule,
    Rule,
    Transport,
    masked_direction,
)
from lowrank_optim.rules.folded_adam import FoldedAdam
from lowrank_optim.rules.joint import JointRule, Unit, masked_directions, soft_threshold_
from lowrank_optim.rules.lion import Lion
from lowrank_optim.rules.lora_pro import LoRAPro
from lowrank_optim.rules.muon import Muon, NorMuon
from lowrank_optim.rules.normalized import RowNorm, Sinkhorn
from lowrank_optim.rules.pairs import PairRule
from lowrank_optim.rules.registry import RULES, rule_from_name
from lowrank_optim.rules.riemannian import AdamPair, Riemannian
from lowrank_optim.rules.rite import Rite
from lowrank_optim.rules.rmsprop import RMSprop
from lowrank_optim.rules.sage import SAGE
from lowrank_optim.rules.sgd import SGD

__all__ = [
    "RULES",
    "SAGE",
    "SGD",
    "Adafactor",
    "Adam",
    "AdamPair",
    "AlternatingLoRA",
    "CondaAdam",
    "Context",
    "Direction",
    "FoldedAdam",
    "FusedDense",
    "FusedDirection",
    "JointRule",
    "Lion",
    "LoRAPro",
    "MomentumRule",
    "Muon",
    "NorMuon",
    "PairRule",
    "RMSprop",
    "Riemannian",
    "Rite",
    "RowNorm",
    "Rule",
    "Sinkhorn",
    "TorchAdam",
    "Transport",
    "Unit",
    "masked_direction",
    "masked_directions",
    "rule_from_name",
    "soft_threshold_",
]
