"""Optimizer state in few bits: moments by blocks of a row, and packed bases. Functions on plain tensors.

The definitions of the operations that they call are in `kernels.coded_reference`.
"""

from lowrank_optim.kernels.nibbles import pack_nibbles, unpack_nibbles
from lowrank_optim.quantization.adam_codes import (
    MomentCodes,
    column_scale,
    decode_moments,
    encode_moments,
    scale_is_due,
)
from lowrank_optim.quantization.basis_codes import (
    GROUP,
    pack_basis,
    packed_basis_bytes,
    packed_basis_shapes,
    unpack_basis,
)
from lowrank_optim.quantization.row_codes import (
    BLOCK,
    dequantize_rows,
    quantize_rows,
    quantized_bytes,
    quantized_shapes,
    zero_rows,
)

__all__ = [
    "BLOCK",
    "GROUP",
    "MomentCodes",
    "column_scale",
    "decode_moments",
    "dequantize_rows",
    "encode_moments",
    "pack_basis",
    "pack_nibbles",
    "packed_basis_bytes",
    "packed_basis_shapes",
    "quantize_rows",
    "quantized_bytes",
    "quantized_shapes",
    "scale_is_due",
    "unpack_basis",
    "unpack_nibbles",
    "zero_rows",
]
