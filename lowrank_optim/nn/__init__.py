"""Layers whose weights are stored in another form than a float matrix."""

from lowrank_optim.nn.quantize import dequantize_weights_, quantize_weights_
from lowrank_optim.nn.quantized_weight import QuantizedWeight
from lowrank_optim.nn.reparametrized import ReparametrizedLinear, merge_
from lowrank_optim.nn.sltrain import sltrain_
from lowrank_optim.nn.sparse_low_rank import SparseLowRankLinear

__all__ = [
    "QuantizedWeight",
    "ReparametrizedLinear",
    "SparseLowRankLinear",
    "dequantize_weights_",
    "merge_",
    "quantize_weights_",
    "sltrain_",
]
