"""Bases of subspaces in 8 or 4 bits, as Q-GaLore stores them.

Groups are up to `group` consecutive columns of one row, each between its own least and greatest element:

    zero = min,   scale = (max − min)/(2ᵇ − 1),   code = round((x − zero)/scale),   decoded = zero + code · scale

The zero point is a float and not a code: the released quantiser rounds it to an integer and clamps it to the code range, which
destroys groups that do not straddle 0 (values from 0.9 to 1.1 all come back as 0.2).

A group never spans two rows, so any split of the rows splits codes, scales and zero points alike. Below 256 columns that costs
8/r bytes per element, and buys accuracy: at r = 32 and 4 bits a row in a group takes 0.75 bytes per element for a relative error of
0.080, four rows 0.56 bytes for 0.103 (benchmarks/results/state_format.json). From r = 128 on the overhead is 0.06 bytes or less.
"""

import math

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.kernels.checks import check_coding, coded_shapes

GROUP = 256
"""Columns that share a scale and a zero point."""


def pack_basis(basis: Tensor, bits: int = 4, group: int = GROUP) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points of a basis; |decoded − x| ≤ scale/2 but for rounding errors.

    A group of equal elements is exact. A group that holds NaN or infinity, or whose span overflows, decodes to NaN throughout.

    Args:
        basis: (…, d, r), floating.
        bits: 8 or 4.
        group: columns that share a scale and a zero point; rows of fewer columns are one group each.

    Returns:
        codes: uint8, (…, d, r) for 8 bits, (…, d, ⌈r/2⌉) for 4 (see `pack_nibbles`).
        scale: float32 (…, d, ⌈r/group⌉).
        zero: float32, as `scale`.

    Raises:
        ValueError: bits other than 8 and 4, group < 1, or a tensor that is no matrix.

    Memory: bits/8 + 8/min(group, r) bytes per element, see `packed_basis_bytes`.
    """
    codes, scale, zero = kernels.call("pack_basis", basis, bits, group)
    return codes, scale, zero


def unpack_basis(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int = 4,
    group: int = GROUP,
    *,
    cols: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The basis (…, d, r) that `pack_basis` stored: zero + code · scale.

    It is close to orthonormal, not orthonormal.

    Args:
        codes: from `pack_basis`; so are `scale` and `zero`.
        bits: as in `pack_basis`; so is `group`.
        cols: r; needed for 4 bits where it is odd.
        dtype: of the result; the arithmetic is float32.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if cols is None:
        cols = codes.shape[-1] * (1 if bits == 8 else 2)
    basis: Tensor = kernels.call("unpack_basis", codes, scale, zero, bits, group, cols, dtype)
    return basis


def packed_basis_shapes(
    shape: tuple[int, ...], bits: int = 4, group: int = GROUP
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the codes and of the scales (and zero points) of a (…, d, r) basis."""
    check_coding(bits, group, "group")
    if len(shape) < 2:
        raise ValueError(f"a basis is a (…, d, r) matrix; got shape {shape}")
    return coded_shapes(shape, bits, group)


def packed_basis_bytes(shape: tuple[int, ...], bits: int = 4, group: int = GROUP) -> int:
    """Exact bytes of a packed (…, d, r) basis: d · (⌈r·bits/8⌉ + 8·⌈r/group⌉).

    Example:
        >>> packed_basis_bytes((4096, 1024), 4) / (4096 * 1024)
        0.53125
    """
    codes, scale = packed_basis_shapes(shape, bits, group)
    return math.prod(codes) + 8 * math.prod(scale)
