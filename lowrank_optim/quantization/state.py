"""The moments of an update rule in 16, 8 or 4 bits: what is stored, and how it is opened for a step and closed again.

    bits    exp_avg                            exp_avg_sq
    16      bfloat16, to nearest               bfloat16, rounded stochastically: to nearest it could not decay
    8, 4    signed codes of row blocks         unsigned codes of row blocks, of the square root

Codes are stored under the moment's own name, scales under `…_scale`. Other moments (Adafactor's rows and columns), and tensors of
fewer than `MIN_CODED` elements, stay as they are. Arithmetic is done on decoded moments, whatever the storage.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank_optim.kernels import stochastic_round
from lowrank_optim.kernels.counter_rng import derive_key
from lowrank_optim.quantization.rows import dequantize_rows, quantize_rows, zero_rows

SIGNED = {"exp_avg": True, "exp_avg_sq": False}
"""The moments that can be coded, and whether they have a sign."""

MIN_CODED = 4096
"""Elements from which a tensor's moments are coded; vectors and tiny matrices are not worth the rounding."""


def is_coded(bits: int, numel: int) -> bool:
    """Whether the moments of a parameter are stored in fewer than 32 bits; `numel` is the global size of its (reduced) gradient."""
    return bits < 32 and numel >= MIN_CODED


def row_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which a moment is coded: rows long enough to share scales.

    Columns of one element (single entries, rank 1) are coded as rows, and convolutions as matrices of their first dimension.
    """
    if len(shape) > 3:
        return shape[0], torch.Size(shape[1:]).numel()
    return (*shape[:-2], shape[-2]) if len(shape) > 1 and shape[-1] == 1 else shape


def zeros(moments: Mapping[str, Tensor], bits: int, device: torch.device) -> dict[str, Tensor]:
    """Stored form of zero moments of these shapes and types (which may be on the meta device)."""
    stored = {}
    for name, like in moments.items():
        if name not in SIGNED:
            stored[name] = torch.zeros(like.shape, dtype=like.dtype, device=device)
        elif bits == 16:
            stored[name] = torch.zeros(like.shape, dtype=torch.bfloat16, device=device)
        else:
            codes = zero_rows(row_shape(tuple(like.shape)), bits, SIGNED[name], device=device)
            stored[name], stored[f"{name}_scale"] = codes
    return stored


def decode(state: Mapping[str, Tensor], shape: tuple[int, ...], bits: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The moments in `dtype` and of `shape`; tensors of the state that are not coded are handed on as they are."""
    opened = dict(state)
    for name in SIGNED.keys() & state.keys():
        if bits == 16:
            opened[name] = state[name].to(dtype)
            continue
        cols = row_shape(shape)[-1]
        value = dequantize_rows(state[name], state[f"{name}_scale"], bits, SIGNED[name], cols=cols, dtype=dtype)
        opened[name] = (value if SIGNED[name] else value.square_()).view(shape)
    return opened


def encode_(state: dict[str, Tensor], moments: Mapping[str, Tensor], bits: int, key: int) -> None:
    """Store moments in the state, in place. `key` is the stream of random numbers of this parameter and step."""
    for name in SIGNED.keys() & state.keys():
        value = moments[name]
        if bits == 16:
            if not SIGNED[name]:
                positions = torch.arange(value.numel(), device=value.device).view(value.shape)
                value = stochastic_round(value.to(torch.float32), derive_key(key, 1), positions)
            state[name].copy_(value)
            continue
        rows = (value if SIGNED[name] else value.sqrt()).reshape(row_shape(tuple(value.shape)))
        codes, scale = quantize_rows(rows, bits, SIGNED[name])
        state[name].copy_(codes)
        state[f"{name}_scale"].copy_(scale)
