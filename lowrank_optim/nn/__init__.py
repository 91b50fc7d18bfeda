"""Layers whose weights are stored in another form than a float matrix."""

from lowrank_optim.nn.adapted import AdaptedLayer, AdaptedLinear
from lowrank_optim.nn.compensate import compensate_
from lowrank_optim.nn.factorize import factorize_
from lowrank_optim.nn.loldu import LoLDULinear, loldu_
from lowrank_optim.nn.low_rank import CompensatedLinear, LowRankEmbedding, LowRankLinear
from lowrank_optim.nn.nola import NOLALinear, nola_
from lowrank_optim.nn.ordered import OrderedLinear, ordered_
from lowrank_optim.nn.ordered_penalty import ordered_penalty
from lowrank_optim.nn.ordered_ranks import OrderedRanks
from lowrank_optim.nn.quantize import dequantize_weights_, quantize_weights_
from lowrank_optim.nn.quantized_weight import QuantizedWeight
from lowrank_optim.nn.reparametrized import ReparametrizedLayer, ReparametrizedLinear, merge_
from lowrank_optim.nn.salt import SALTLinear, salt_
from lowrank_optim.nn.select_ranks import select_ranks
from lowrank_optim.nn.sltrain import sltrain_
from lowrank_optim.nn.sparse_low_rank import SparseLowRankLinear
from lowrank_optim.nn.spectral import spectral_
from lowrank_optim.nn.spectral_linear import SpectralLinear
from lowrank_optim.nn.statistics import Moments, TokenCounts, collect_statistics
from lowrank_optim.nn.svfit import SVFitLinear, svfit_
from lowrank_optim.nn.truncate import truncate_
from lowrank_optim.nn.tucker import TuckerConvolution, tucker_adapters_
from lowrank_optim.nn.weight_normalized import WeightNormalizedLinear, weight_normalized_

__all__ = [
    "AdaptedLayer",
    "AdaptedLinear",
    "CompensatedLinear",
    "LoLDULinear",
    "LowRankEmbedding",
    "LowRankLinear",
    "Moments",
    "NOLALinear",
    "OrderedLinear",
    "OrderedRanks",
    "QuantizedWeight",
    "ReparametrizedLayer",
    "ReparametrizedLinear",
    "SALTLinear",
    "SVFitLinear",
    "SparseLowRankLinear",
    "SpectralLinear",
    "TokenCounts",
    "TuckerConvolution",
    "WeightNormalizedLinear",
    "collect_statistics",
    "compensate_",
    "dequantize_weights_",
    "factorize_",
    "loldu_",
    "merge_",
    "nola_",
    "ordered_",
    "ordered_penalty",
    "quantize_weights_",
    "salt_",
    "select_ranks",
    "sltrain_",
    "spectral_",
    "svfit_",
    "truncate_",
    "tucker_adapters_",
    "weight_normalized_",
]
