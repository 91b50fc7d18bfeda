"""Layers whose weights are stored in another form than a float matrix."""

from lowrank_optim.nn.quantize import dequantize_weights_, quantize_weights_
from lowrank_optim.nn.quantized_weight import QuantizedWeight

__all__ = ["QuantizedWeight", "dequantize_weights_", "quantize_weights_"]
