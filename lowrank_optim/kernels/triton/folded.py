"""Adam with folded moments: FOLD neighbours in a row share a moment. A program takes whole blocks of one row."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_optim.kernels.arguments import adam_numbers
from lowrank_optim.kernels.triton.arithmetic import holds, lerp, widen
from lowrank_optim.kernels.triton.elementwise import BLOCK, store_weight
from lowrank_optim.kernels.triton.launching import covered, flags, key_and_start, launch


@triton.jit(do_not_specialize=["key", "start"])
def folded_adam_kernel(
    w_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    ok_ptr,
    cols,
    blocks,
    tiles,
    weight1,
    beta2,
    weight2,
    root_factor,
    root_offset,
    residual,
    alpha,
    keep,
    key: tl.int64,
    start: tl.int64,
    STOCHASTIC: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """w, g (rows, cols) and m, v (rows, blocks), of which a program takes BLOCKS: `tiles` programs for each row."""
    if ok_ptr is not None:
        if not holds(ok_ptr):
            return
    program = tl.program_id(0).to(tl.int64)
    row, tile = program // tiles, program % tiles
    block = tile * BLOCKS + tl.arange(0, BLOCKS)
    col = block[:, None] * FOLD + tl.arange(0, FOLD)[None, :]
    there, inside = block < blocks, col < cols
    index, moment = row * cols + col, row * blocks + block
    g = widen(tl.load(g_ptr + index, mask=inside, other=0.0))
    mean, square = tl.sum(g, axis=1) * (1.0 / FOLD), tl.sum(g * g, axis=1) * (1.0 / FOLD)
    m = lerp(tl.load(m_ptr + moment, mask=there), mean, weight1)
    v = tl.load(v_ptr + moment, mask=there) * beta2 + square * weight2
    tl.store(m_ptr + moment, m, mask=there)
    tl.store(v_ptr + moment, v, mask=there)
    rest = g - mean[:, None]
    root = tl.sqrt_rn(v[:, None] + (rest * rest) * (residual * residual))
    direction = tl.math.div_rn(m[:, None] + rest * residual, root * root_factor + root_offset)
    w = widen(tl.load(w_ptr + index, mask=inside)) * keep - direction * alpha
    store_weight(w_ptr, None, None, index, w, inside, key, start + index, STOCHASTIC)


def folded_adam_dense_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    ok: Tensor | None,
    rounding: Tensor | None,
    fold: int,
) -> Any:
    if not covered(weight, grad, exp_avg, exp_avg_sq):
        return NotImplemented
    if not weight.numel():
        return None
    *adam, residual, alpha, keep = scalars.tolist()
    stochastic, (key, start, *_) = key_and_start(rounding)
    cols = weight.shape[-1]
    # Rows of whole blocks are one long row.
    rows, cols = (weight.numel() // cols, cols) if cols % fold else (1, weight.numel())
    blocks, each = triton.cdiv(cols, fold), max(BLOCK // fold, 1)
    tiles = triton.cdiv(blocks, each)
    launch(
        folded_adam_kernel,
        (rows * tiles,),
        weight,
        weight,
        grad,
        exp_avg,
        exp_avg_sq,
        flags(ok),
        cols,
        blocks,
        tiles,
        *adam_numbers(*adam),
        residual,
        alpha,
        keep,
        key,
        start,
        STOCHASTIC=stochastic and weight.dtype == torch.bfloat16,
        FOLD=fold,
        BLOCKS=each,
    )
    return None


OPERATIONS = {"folded_adam_dense_": folded_adam_dense_}
