"""Update rules on one matrix, small or full."""

from lowrank_optim.rules.adafactor import Adafactor
from lowrank_optim.rules.adam import Adam
from lowrank_optim.rules.base import Direction, Rule, Transport

__all__ = ["Adafactor", "Adam", "Direction", "Rule", "Transport"]
