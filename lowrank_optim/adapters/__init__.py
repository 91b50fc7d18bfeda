"""Low-rank adapters: which parameters of a model are pairs, and what can be done to them besides training."""

from lowrank_optim.adapters.forward_noise import ForwardNoise, noise_in_forward
from lowrank_optim.adapters.initial import lora_sb_
from lowrank_optim.adapters.intruders import Intruders, LayerIntruders, intruder_dimensions
from lowrank_optim.adapters.pairs import lora_pairs, update_scalings
from lowrank_optim.adapters.prune import prune_ranks_
from lowrank_optim.adapters.row_scaling import RowScaling, scale_rows_in_backward

__all__ = [
    "ForwardNoise",
    "Intruders",
    "LayerIntruders",
    "RowScaling",
    "intruder_dimensions",
    "lora_pairs",
    "lora_sb_",
    "noise_in_forward",
    "prune_ranks_",
    "scale_rows_in_backward",
    "update_scalings",
]
