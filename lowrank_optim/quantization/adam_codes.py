"""Adam's moments in 8 or 4 bits: √v in unsigned levels, and m/√v in signed ones.

What the step uses is the direction m̂/(√v̂ + ε), so its ratio is what is coded, not m: an error of the code is an error of the
direction of the same size, whatever the magnitude of the element.

    root ≈ √v     unsigned, columns divided by `col_scale`, rounded by `key` and `turn`
    ratio ≈ m/√v  signed, to nearest                                 decoded  v = root²,  m = ratio · root

Nearest rounding freezes v: with β₂ = 0.999 a step changes √v by less than half of a level, so that an element follows the largest
of its block and not its own gradients. Stochastic rounding is right on average, and with a `turn` (see `quantize_rows`) an element
that shrinks evenly is rounded evenly, which takes a tenth to a sixth off the error.

`col_scale` is measured on √v itself (`column_scale`), 1, 2, 4, 8, … steps after moments begin or change their basis: the columns of a
projected gradient differ by orders of magnitude, and no scale that is taken once, from one gradient, fits them for long.

How this was chosen: the small LLaMA of examples/pretraining, rank 32, betas (0.9, 0.999), gap 200, moments in each format beside the
float32 ones; mean ‖N' − N‖/‖N‖ of the direction after 1,000 steps (benchmarks/state_format.py, results/state_format.json):

                                                                   low-rank matrices    embedding and head
    8 bits   m/√v and √v linear, √v by turns, columns measured           0.021                0.029
             √v rounded stochastically, independent draws                0.026                0.033
             √v rounded to nearest                                       0.032                0.052
             √v in squares of levels                                     0.033                0.038
             columns: root of the first R's root mean square             0.027                0.034
             without column scale                                        0.049                0.034
             m instead of m/√v, √v to nearest, no column scale           0.129                0.067
             dynamic maps of m and v (bitsandbytes), no column scale     0.161                0.102
    4 bits   m/√v and √v linear, √v by turns, columns measured           0.260                0.320
             √v in 16 logarithmic levels                                 0.295                0.319
             √v rounded to nearest                                       0.408                0.456
             dynamic m, linear v, blocks of 128 (torchao)                0.677                0.587

On one layer of hidden size 1024, rank 256, after 100 steps of small batches, where rows are wide and spectra steep, the error of
8 bits is 0.019 in blocks of 256 and 0.015 in blocks of 64; with columns scaled by the first R it is 0.106, without 0.190
(bitsandbytes' maps: 0.128).

Trained with these moments for 500 steps, the model ends at a validation loss of 1.0019 (8 bits) and 0.9990 (4 bits) times that of
float32 moments, with betas (0.9, 0.95) at 0.9991 and 0.9974 times; means of four seeds, whose own ratios differ by half a percent.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.quantization.row_codes import BLOCK


class MomentCodes(NamedTuple):
    """Both moments as they are stored; shapes and types are those of `quantize_rows`."""

    ratio: Tensor
    ratio_scale: Tensor
    root: Tensor
    root_scale: Tensor


def encode_moments(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    bits: int = 8,
    *,
    block: int = BLOCK,
    col_scale: Tensor | None = None,
    key: int | None = None,
    turn: int = 0,
    start: int = 0,
) -> MomentCodes:
    """Codes and scales of m and v.

    Where v is 0 (or √v below `MIN_SCALE`), m is stored as 0.

    Args:
        exp_avg: m, (…, cols), floating.
        exp_avg_sq: v ≥ 0, the same shape.
        bits: 8 or 4.
        block: columns that share a scale.
        col_scale: divides √v, (cols,) or broadcastable (…, 1, cols); see `column_scale`. None means 1.
        key: of the parameter, the same in every step (`counter_rng.make_key`); None rounds to nearest, which is for tests.
        turn: the step number.
        start: row-major index of the first element in the whole matrix.

    Memory: 2·(bits/8 + 4/block) bytes per element.
    """
    noise = kernels.pack_key(key, turn, start)
    return MomentCodes(*kernels.encode_adam(exp_avg, exp_avg_sq, col_scale, noise, bits, block))


def decode_moments(
    codes: MomentCodes,
    bits: int = 8,
    *,
    cols: int | None = None,
    block: int = BLOCK,
    col_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """m and v, float32, for the arguments that they were encoded with.

    Args:
        codes: from `encode_moments`.
        cols: columns of the matrix; needed for 4 bits where it is odd.
    """
    if cols is None:
        cols = codes.ratio.shape[-1] * (1 if bits == 8 else 2)
    return kernels.decode_adam(codes, col_scale, bits, block, cols)


def column_scale(sums: Tensor) -> Tensor:
    """The `col_scale` of a matrix from Σ (v/v̄)⁴ of its columns (…, 1, cols), v̄ the mean, or the sum, of v over the row.

    Eighth roots, relative to the largest one and rounded to bfloat16, so that sums in another order give the same scale.

    The largest √v of a row, in units of the scale, decides how fine its codes are. Rows count alike, frequent tokens and rare ones,
    and a column counts by its largest values in them: near the scale for which the largest ones of rows are smallest.

    Columns of zeros count as 2⁻²⁰ of the largest; where all are zero, or one is not finite, the scale is 1.

    Returns:
        float32 (…, 1, cols), positive.
    """
    root = sums.sqrt().sqrt().sqrt()
    largest = root.amax(-1, keepdim=True) if root.shape[-1] else root.new_ones((*root.shape[:-1], 1))
    unit = torch.where((largest > 0.0) & torch.isfinite(largest), root / largest, 1.0)
    return unit.clamp_min(2.0**-20).to(torch.bfloat16).to(torch.float32)


def scale_is_due(steps: int) -> bool:
    """Whether columns are measured anew, `steps` steps (from 1) after their moments began or changed their basis: 1, 2, 4, 8, …"""
    return steps > 0 and steps & (steps - 1) == 0
