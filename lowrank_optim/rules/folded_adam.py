"""FOAM (Wen et al., 2026): Adam whose moments are those of means of neighbours, with the rest of every element beside them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.kernels.checks import LARGEST_FOLD
from lowrank_optim.rules.adam import Adam
from lowrank_optim.rules.base import Context, Direction, FusedDense
from lowrank_optim.sharding.param_sharding import ParamSharding

LEVELS = range(LARGEST_FOLD.bit_length())


@dataclass(frozen=True)
class FoldedAdam(Adam):
    """Adam on the means of f = 2^level neighbours in a row, and the rest of every element in numerator and denominator:

        ḡ = mean(g),  q = mean(g²) of each f neighbours,   m ← β₁m + (1−β₁)ḡ,   v ← β₂v + (1−β₂)q,   e = g − ḡ
        N = s·((m + κe)/bc₁) / (√((v + κ²e²)/bc₂) + ε),   bcᵢ = 1 − βᵢᵗ

    No product and no basis: a step is one pass over weights and gradient. With level 0 it is Adam. A row is one of torch's matrix,
    the inputs of an output neuron; of a convolution the matrix is out × the rest, and the matrices of a stack are each for
    themselves. Where the columns are no multiple of f, the last block counts as if zeros followed, as in the released code.

    The rule is for whole matrices: vectors, and groups with a rank, are refused by name. Sharded matrices are not gathered, and
    nothing goes over the wire. Where columns are split, their number has to be a multiple of f times the processes that split them,
    unless moments have 8 or 4 bits: those are kept whole on every process, as Adam's are.

    N is not linear in the gradient: micro-batches have to be summed before it, as `step` and `update_in_backward` do.

    betas: β₁ and β₂.
    eps: ε. `match_reference` means for it what it means for `Adam`.
    level: the logarithm of f, from 0 to 10. 2 in the paper, 8 in its FOAM-Mini.
    residual_scale: κ, 1 in the paper. 0 leaves out the rest, and all neighbours have one update.
    step_scale: s, 0.25 in the paper, whose learning rate is 0.01. Weight decay is by η, not by ηs.

    Memory: 8/f bytes for each element (16/f in float64), 2/f with `state_bits=8`.

    Paper: Wen et al., "FOAM: Blocked State Folding for Memory-Efficient LLM Training", ICML 2026, arXiv:2512.07112.
    """

    name: ClassVar[str] = "folded_adam"
    elementwise: ClassVar[bool] = False
    on_matrices: ClassVar[bool] = True
    knows_shards: ClassVar[bool] = True
    in_subspaces: ClassVar[bool] = False
    level: int = 2
    residual_scale: float = 1.0
    step_scale: float = 1.0

    def check(self, options: Mapping[str, Any]) -> None:
        super().check(options)
        level = options["level"]
        if isinstance(level, bool) or not isinstance(level, int) or level not in LEVELS:
            raise ValueError(
                f"level is {level!r}; it must be an int from 0 to {LEVELS[-1]}: 2^level neighbours share a moment"
            )
        if not float(options["residual_scale"]) >= 0.0:
            raise ValueError(f"residual_scale is {options['residual_scale']!r}; it must be at least 0")
        if not float(options["step_scale"]) > 0.0:
            raise ValueError(f"step_scale is {options['step_scale']!r}; it must be above 0")

    def check_matrix(
        self, shape: tuple[int, ...], side: str | None, sharding: ParamSharding, options: Mapping[str, Any]
    ) -> None:
        if sharding.whole or not sharding.matrix.splits(-1):
            return
        parts, fold = 1, 2 ** options["level"]
        for group in sharding.matrix.groups(-1):
            parts *= group.size()
        if shape[-1] % (parts * fold):
            raise ValueError(
                f"has {shape[-1]} columns on {parts} processes, which cut blocks of {fold} neighbours (level={options['level']}): "
                f"needed is a multiple of {parts * fold}; use a smaller level, or Shard(0), which splits rows"
            )

    def structure(self, options: Mapping[str, Any]) -> tuple[Any, ...]:
        return (options["level"],)

    def moment_shape(self, shape: tuple[int, ...], options: Mapping[str, Any]) -> tuple[int, ...]:
        return (*shape[:-1], -(-shape[-1] // 2 ** options["level"]))

    def moment_gradient(self, grad: Tensor, options: Mapping[str, Any]) -> Tensor:
        """√q"""
        fold, dtype = 2 ** options["level"], kernels.compute_dtype(grad.dtype)
        if not grad.numel():
            return grad.new_zeros(self.moment_shape(tuple(grad.shape), options), dtype=dtype)
        rows = grad.reshape(-1, grad.shape[-1])
        chunks = kernels.row_chunks(*rows.shape)
        roots = torch.cat([kernels.fold_means(rows[chunk].to(dtype), fold)[1].sqrt_() for chunk in chunks])
        return roots.view(self.moment_shape(tuple(grad.shape), options))

    def init(
        self, shape: tuple[int, ...], options: Mapping[str, Any], dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        return super().init(self.moment_shape(shape, options), options, dtype, device)

    def direction(
        self, grad: Tensor, state: Mapping[str, Tensor], options: Mapping[str, Any], context: Context
    ) -> Direction:
        """What the step takes from weights of 0."""
        matrix = torch.zeros_like(grad, memory_format=torch.contiguous_format)
        fused = self.fused_dense(matrix, grad, state, options, context)
        write = {"alpha": -1.0, "keep": 1.0, "ok": context.ok, "rounding_key": None}
        kernels.call(fused.op, *fused.call(write))
        return Direction(matrix)

    def fused_dense(
        self,
        weight: Tensor,
        grad: Tensor,
        state: Mapping[str, Tensor],
        options: Mapping[str, Any],
        context: Context,
    ) -> FusedDense:
        numbers, _ = self._numbers(options, context)
        fold, residual, scale = (2 ** options["level"], *(float(options[n]) for n in ("residual_scale", "step_scale")))
        target, part = weight.contiguous(), grad.contiguous()
        moments, start = (state["exp_avg"], state["exp_avg_sq"]), context.sharding.matrix.start

        def call(write: Mapping[str, Any]) -> tuple[Any, ...]:
            scaled = {**write, "alpha": scale * write["alpha"]}
            return kernels.folded_adam_dense_call(
                target, part, moments, start, scaled, residual=residual, fold=fold, **numbers
            )

        copied = target is not weight or part is not grad
        return FusedDense("folded_adam_dense_", call, (lambda: weight.copy_(target)) if copied else None)
