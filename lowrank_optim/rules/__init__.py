"""Update rules on one matrix, small or full."""

from lowrank_optim.rules.adafactor import Adafactor
from lowrank_optim.rules.adam import Adam, CondaAdam, TorchAdam
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
from lowrank_optim.rules.joint import JointRule, masked_directions
from lowrank_optim.rules.lion import Lion
from lowrank_optim.rules.muon import Muon, NorMuon
from lowrank_optim.rules.normalized import RowNorm, Sinkhorn
from lowrank_optim.rules.registry import RULES, rule_from_name
from lowrank_optim.rules.rmsprop import RMSprop
from lowrank_optim.rules.sage import SAGE
from lowrank_optim.rules.sgd import SGD

__all__ = [
    "RULES",
    "SAGE",
    "SGD",
    "Adafactor",
    "Adam",
    "CondaAdam",
    "Context",
    "Direction",
    "FoldedAdam",
    "FusedDense",
    "FusedDirection",
    "JointRule",
    "Lion",
    "MomentumRule",
    "Muon",
    "NorMuon",
    "RMSprop",
    "RowNorm",
    "Rule",
    "Sinkhorn",
    "TorchAdam",
    "Transport",
    "masked_direction",
    "masked_directions",
    "rule_from_name",
]
