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

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim import kernels
from lowrank_optim.quantization.row_codes import BLOCK, dequantize_rows, quantize_rows


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
    root = exp_avg_sq.to(torch.float32).sqrt()
    ratio = torch.where(root > 0.0, exp_avg.to(torch.float32) / root, 0.0)
    root_codes, root_scale = quantize_rows(
        root, bits, False, block=block, col_scale=col_scale, key=key, turn=turn, start=start
    )
    ratio_codes, ratio_scale = quantize_rows(ratio, bits, True, block=block)
    return MomentCodes(ratio_codes, ratio_scale, root_codes, root_scale)


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
    root = dequantize_rows(codes.root, codes.root_scale, bits, False, cols=cols, block=block, col_scale=col_scale)
    ratio = dequantize_rows(codes.ratio, codes.ratio_scale, bits, True, cols=cols, block=block)
    return ratio.mul_(root), root.square_()


def coded_adam_direct_(
    grad: Tensor,
    codes: MomentCodes,  # modified in place
    bits: int = 8,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    step: float,
    block: int = BLOCK,
    col_scale: Tensor | None = None,
    key: int | None = None,
    turn: int = 0,
    start: int = 0,
    ok: Tensor | None = None,
) -> Tensor:
    """One step of Adam on coded moments: decode, `kernels.adam_direct_`, encode, in one pass where a backend can; returns N.

    N is that of the moments before they are coded again.

    Args:
        grad: (…, cols), float32 or float64.
        ok: 0-d bool on the device; where it is false, the codes stay as they are and N is 0. None means true.

    The others are those of `encode_moments` and `kernels.adam_direct_`.
    """
    adam: kernels.AdamNumbers = {"beta1": beta1, "beta2": beta2, "eps": eps, "step": step}
    noise = kernels.words(key, turn, start)
    call = coded_adam_direct_call(grad, codes, bits, block, col_scale, noise, ok, **adam)
    direction: Tensor = torch.ops.lowrank_optim.coded_adam_direct_(*call)
    return direction


def coded_adam_direct_call(
    grad: Tensor,
    codes: MomentCodes,
    bits: int,
    block: int,
    col_scale: Tensor | None,
    noise: Tensor | None,
    ok: Tensor | None,
    **adam: Unpack[kernels.AdamNumbers],
) -> tuple[Any, ...]:
    """The arguments of the operation `coded_adam_direct_`, for `kernels.run_many`."""
    scalars = kernels.numbers(adam["beta1"], adam["beta2"], adam["eps"], adam["step"])
    return grad, *codes, col_scale, scalars, noise, ok, bits, block


def coded_adam_dense_(
    weight: Tensor,  # modified in place
    grad: Tensor,
    codes: MomentCodes,  # modified in place
    bits: int = 8,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    step: float,
    alpha: float,
    keep: float,
    block: int = BLOCK,
    col_scale: Tensor | None = None,
    key: int | None = None,
    turn: int = 0,
    start: int = 0,
    ok: Tensor | None = None,
    rounding_key: int | None = None,
) -> None:
    """A whole step of Adam with coded moments on a dense parameter (…, cols), contiguous: W ← keep·W − α·N."""
    adam: kernels.AdamNumbers = {"beta1": beta1, "beta2": beta2, "eps": eps, "step": step}
    write = {"alpha": alpha, "keep": keep, "ok": ok, "rounding_key": rounding_key}
    noise = kernels.words(key, turn, start)
    call = coded_adam_dense_call(weight, grad, codes, bits, block, col_scale, noise, start, write, **adam)
    torch.ops.lowrank_optim.coded_adam_dense_(*call)


def coded_adam_dense_call(
    weight: Tensor,
    grad: Tensor,
    codes: MomentCodes,
    bits: int,
    block: int,
    col_scale: Tensor | None,
    noise: Tensor | None,
    start: int,
    write: Mapping[str, Any],
    **adam: Unpack[kernels.AdamNumbers],
) -> tuple[Any, ...]:
    """The arguments of the operation `coded_adam_dense_`, for `kernels.run_many`."""
    scalars = kernels.numbers(adam["beta1"], adam["beta2"], adam["eps"], adam["step"], write["alpha"], write["keep"])
    rounding = kernels.words(write["rounding_key"], start)
    return weight, grad, *codes, col_scale, scalars, noise, write["ok"], rounding, bits, block


@kernels.definition("coded_adam_direct_")
def _coded_adam_direct_(
    grad: Tensor,
    ratio: Tensor,
    ratio_scale: Tensor,
    root: Tensor,
    root_scale: Tensor,
    col_scale: Tensor | None,
    scalars: Tensor,
    noise: Tensor | None,
    ok: Tensor | None,
    bits: int,
    block: int,
) -> Tensor:
    codes = MomentCodes(ratio, ratio_scale, root, root_scale)
    beta1, beta2, eps, step = scalars.tolist()
    key, (turn, start) = kernels.key_of(noise)
    exp_avg, exp_avg_sq = decode_moments(codes, bits, cols=grad.shape[-1], block=block, col_scale=col_scale)
    g = grad.to(torch.float32) if ok is None else torch.where(ok, grad.to(torch.float32), 0.0)
    direction = kernels.adam_direct_(g, exp_avg, exp_avg_sq, beta1=beta1, beta2=beta2, eps=eps, step=step, ok=ok)
    new = encode_moments(exp_avg, exp_avg_sq, bits, block=block, col_scale=col_scale, key=key, turn=turn, start=start)
    for old, value in zip(codes, new, strict=True):
        old.copy_(value if ok is None else torch.where(ok, value, old))
    return direction.to(grad.dtype)


@kernels.definition("coded_adam_direct_with_norms_")
def _coded_adam_direct_with_norms_(grad: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    direction: Tensor = torch.ops.lowrank_optim.coded_adam_direct_(grad, *others)
    return direction, *kernels.row_norms(direction, grad)


@kernels.definition("coded_adam_dense_")
def _coded_adam_dense_(
    weight: Tensor,
    grad: Tensor,
    ratio: Tensor,
    ratio_scale: Tensor,
    root: Tensor,
    root_scale: Tensor,
    col_scale: Tensor | None,
    scalars: Tensor,
    noise: Tensor | None,
    ok: Tensor | None,
    rounding: Tensor | None,
    bits: int,
    block: int,
) -> None:
    if weight.numel() == 0:
        return
    *adam, alpha, keep = scalars.tolist()
    key, (turn, start) = kernels.key_of(noise)
    rounding_key, (first, *_) = kernels.key_of(rounding)
    rows, cols = weight.shape[-2] if weight.dim() > 1 else 1, weight.shape[-1]
    stacks = [
        tensor.view(-1, rows, tensor.shape[-1]) for tensor in (weight, grad, ratio, ratio_scale, root, root_scale)
    ]
    columns = None if col_scale is None else col_scale.expand(*weight.shape[:-2], 1, cols).reshape(-1, cols)
    for i, matrices in enumerate(zip(*stacks, strict=True)):
        for chunk in kernels.row_chunks(rows, cols):
            w, g, *codes = (matrix[chunk] for matrix in matrices)
            own, element = None if columns is None else columns[i], (i * rows + chunk.start) * cols
            part = None if noise is None else kernels.words(key, turn, start + element)
            direction = _coded_adam_direct_(
                g.to(torch.float32), *codes, own, kernels.numbers(*adam), part, ok, bits, block
            )
            kernels.apply_dense_(
                w,
                direction.to(kernels.compute_dtype(w.dtype)),
                alpha=alpha,
                keep=keep,
                ok=ok,
                rounding_key=rounding_key,
                start=first + element,
            )


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
