"""SAGE (Lee and Kim, 2026): Lion for embedding tables, with smaller steps in columns whose gradients are large."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.rules.base import Context, Direction, Transport
from lowrank_optim.rules.lion import Lion
from lowrank_optim.sharding.tensor_sharding import TensorSharding


@dataclass(frozen=True)
class SAGE(Lion):
    """N = H ∘ sign(β₁m + (1−β₁)R), then m ← β₂m + (1−β₂)R, with one H_j ≤ 1 for each column j:

        s_j = mean_i |R_ij|,   S ← β₂S + (1−β₂)s,   H_j = min(rms(S)/S_j, rms(s)/s_j, 1)

    Rows are tokens, columns the dimensions of the embedding. Columns without gradient have H_j = 1. The released code takes the sign
    after m has changed; here, as in the paper and in Lion, before.

    The rule is for tables: embeddings, position embeddings, heads, stacks of codebooks. Give it a group of their own,
    `lo.param_groups(model, rule=lo.Sinkhorn(), embeddings={"rule": lo.SAGE()})`. Sharded tables are not gathered: where rows are
    split, the sums of columns go over the wire, one number of the compute type for each, and one number where columns are.

    betas: β₁ and β₂.

    Memory: 4 bytes for each element of R and for each of its columns (8 in float64).

    Paper: Lee and Kim, "SAGE: Sign-Adaptive Gradient for Memory-Efficient LLM Optimization", Findings of ACL 2026, arXiv:2604.07663.
    """

    name: ClassVar[str] = "sage"
    elementwise: ClassVar[bool] = False
    on_matrices: ClassVar[bool] = True
    knows_shards: ClassVar[bool] = True
    rotates_shards: ClassVar[bool] = False
    state_lies: ClassVar[Mapping[str, str]] = {"exp_avg_abs": "columns"}

    def init(
        self, shape: tuple[int, ...], options: Mapping[str, Any], dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        columns = torch.zeros((*shape[:-2], shape[-1]), dtype=dtype, device=device)
        return {**super().init(shape, options, dtype, device), "exp_avg_abs": columns}

    def direction(
        self, grad: Tensor, state: Mapping[str, Tensor], options: Mapping[str, Any], context: Context
    ) -> Direction:
        sharding, new = context.sharding.reduced, 1.0 - float(options["betas"][1])
        rows = max(sharding.whole_shape(grad)[-2], 1)
        now = sharding.sum(kernels.line_sums(grad, -2, 1).squeeze(-2), -2) / rows
        share = new if context.ok is None else kernels.masked_scalar(context.ok, new, 0.0, grad.dtype)
        mean = state["exp_avg_abs"].lerp_(now, share)
        columns = sharding.drop(-2)
        damping = torch.minimum(_damping(mean, columns), _damping(now, columns))
        matrix = super().direction(grad, state, options, context).matrix
        return Direction(matrix.mul_(damping.unsqueeze(-2)))

    def transport(self, state: Mapping[str, Tensor], move: Transport, options: Mapping[str, Any], step: float) -> None:
        """m ← m C; S² ← S² (C∘C), as if the columns were not correlated."""
        super().transport(state, move, options, step)
        mean = state["exp_avg_abs"]
        squares = mean.square().unsqueeze(-2).expand_as(state["exp_avg"]).contiguous()
        mean.copy_(move(squares, 2).mean(-2).sqrt_())


def _damping(sizes: Tensor, columns: TensorSharding) -> Tensor:
    """min(rms(s)/s_j, 1); 1 where s_j is 0."""
    rms = columns.mean(sizes.square(), -1).sqrt_().unsqueeze(-1)
    return torch.where(sizes > 0.0, rms / sizes, 1.0).clamp_max_(1.0)
