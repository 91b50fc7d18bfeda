"""The definition of Adam with folded moments, in torch ops, for any device: neighbours in a row share a moment."""

import torch
from torch import Tensor

from lowrank_optim.kernels.arguments import adam_numbers, unpack_key
from lowrank_optim.kernels.compute import masked_scalar, row_chunks
from lowrank_optim.kernels.dispatch import definition
from lowrank_optim.kernels.reference import write_


def fold_means(x: Tensor, fold: int) -> tuple[Tensor, Tensor]:
    """The means of `fold` neighbours in a row, and of their squares, (…, ⌈cols/fold⌉); beyond the end of a row are zeros."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % fold))
    blocks = padded.unflatten(-1, (-1, fold))
    return blocks.mean(-1), blocks.square().mean(-1)


def unfold(x: Tensor, fold: int, cols: int) -> Tensor:
    """Each number `fold` times, a new tensor of `cols` columns."""
    return x.repeat_interleave(fold, -1)[..., :cols]


@definition("folded_adam_dense_")
def folded_adam_dense_(
    weight: Tensor,  # modified in place
    grad: Tensor,
    exp_avg: Tensor,  # modified in place
    exp_avg_sq: Tensor,  # modified in place
    scalars: Tensor,
    ok: Tensor | None,
    rounding: Tensor | None,
    fold: int,
) -> None:
    """Adam on the means ḡ of `fold` neighbours and on the means q of their squares, with the rest e of every element.

        m ← β₁m + (1−β₁)ḡ,   v ← β₂v + (1−β₂)q,   e = g − ḡ
        N = ((m + κe)/bc₁) / (√((v + κ²e²)/bc₂) + ε),   W ← keep·W − α·N

    Args:
        weight, grad: (…, cols), any floating types.
        exp_avg, exp_avg_sq: m and v, (…, ⌈cols/fold⌉), in the compute type. Beyond the end of a row g is 0.
        scalars: β₁, β₂, ε, t, κ, α and keep.
        ok, rounding: as in `adam_dense_`.
        fold: a power of two.
    """
    if weight.numel() == 0:
        return
    *adam, residual, alpha, keep = scalars.tolist()
    weight1, beta2, weight2, factor, offset = adam_numbers(*adam)
    key, (start, *_) = unpack_key(rounding)
    cols = weight.shape[-1]
    matrices = [tensor.view(-1, tensor.shape[-1]) for tensor in (weight, grad, exp_avg, exp_avg_sq)]
    for chunk in row_chunks(len(matrices[0]), cols):
        w, g, m, v = (matrix[chunk] for matrix in matrices)
        g = g.to(m.dtype) if ok is None else torch.where(ok, g.to(m.dtype), 0.0)
        mean, square = fold_means(g, fold)
        m.lerp_(mean, weight1 if ok is None else ok.to(m.dtype) * weight1)
        v.mul_(beta2 if ok is None else masked_scalar(ok, beta2, 1.0, v.dtype)).add_(square, alpha=weight2)
        rest = g - unfold(mean, fold, cols)
        root = unfold(v, fold, cols).addcmul_(rest, rest, value=residual**2).sqrt_().mul_(factor).add_(offset)
        direction = unfold(m, fold, cols).add_(rest, alpha=residual).div_(root)
        direction = direction if ok is None else direction.masked_fill_(~ok, 0.0)
        first = start + chunk.start * cols
        write_(w, direction.contiguous(), alpha=alpha, keep=keep, ok=ok, rounding_key=key, start=first)
