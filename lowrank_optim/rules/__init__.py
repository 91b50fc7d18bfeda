"""Update rules on one matrix, small or full."""

from lowrank_optim.rules.adafactor import Adafactor
from lowrank_optim.rules.adam import Adam, TorchAdam
from lowrank_optim.rules.base import Context, Direction, FusedDense, FusedDirection, Rule, Transport
from lowrank_optim.rules.lion import Lion
from lowrank_optim.rules.rmsprop import RMSprop
from lowrank_optim.rules.sgd import SGD

__all__ = [
    "SGD",
    "Adafactor",
    "Adam",
    "Context",
    "Direction",
    "FusedDense",
    "FusedDirection",
    "Lion",
    "RMSprop",
    "Rule",
    "TorchAdam",
    "Transport",
]
