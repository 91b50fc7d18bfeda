"""The update rules by name."""

from difflib import get_close_matches

from lowrank_optim.kernels import check_no_class
from lowrank_optim.rules.adafactor import Adafactor
from lowrank_optim.rules.adam import Adam
from lowrank_optim.rules.altlora import AlternatingLoRA
from lowrank_optim.rules.base import Rule
from lowrank_optim.rules.folded_adam import FoldedAdam
from lowrank_optim.rules.lion import Lion
from lowrank_optim.rules.lora_pro import LoRAPro
from lowrank_optim.rules.muon import Muon, NorMuon
from lowrank_optim.rules.normalized import RowNorm, Sinkhorn
from lowrank_optim.rules.riemannian import AdamPair, Riemannian
from lowrank_optim.rules.rite import Rite
from lowrank_optim.rules.rmsprop import RMSprop
from lowrank_optim.rules.sage import SAGE
from lowrank_optim.rules.sgd import SGD

KINDS = (Adam, Adafactor, FoldedAdam, Lion, Muon, NorMuon, RMSprop, RowNorm, SAGE, SGD, Sinkhorn)
PAIRS = (AdamPair, AlternatingLoRA, LoRAPro, Riemannian, Rite)

RULES: dict[str, type[Rule]] = {kind.name: kind for kind in (*KINDS, *PAIRS)}


def rule_from_name(name: str) -> Rule:
    """The rule with its defaults.

    Raises:
        TypeError: for a class.
        ValueError: for an unknown name; the message names the nearest valid one.
    """
    check_no_class("rule", name)
    if name not in RULES:
        near = get_close_matches(str(name), RULES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"rule is {name!r}: {hint}valid names are {', '.join(RULES)}, or pass a Rule; rules of your own have to be given to the "
            "constructor (rule=, dense_rule=, parts=[…], or in a param group)"
        )
    return RULES[name]()
