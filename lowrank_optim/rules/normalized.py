"""Gradients whose rows or columns are brought to one size: by rows or by columns (SCALE, RMNP), and by both in turn (SinkGD)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.rules.base import Context, Direction, FusedDense, MeanRule, Transport
from lowrank_optim.sharding.tensor_sharding import TensorSharding

AXES = ("rows", "columns")
UNITS = ("rms", "norm")


@dataclass(frozen=True)
class NormalizedRule(MeanRule):
    """A rule for matrices that normalises R, or with `momentum` m ← μm + (1−μ)R. Without momentum it has no state."""

    on_matrices: ClassVar[bool] = True
    masks: ClassVar[bool] = True
    knows_shards: ClassVar[bool] = True
    decays_last: ClassVar[bool] = False
    momentum: float = 0.0

    def check(self, options: Mapping[str, Any]) -> None:
        super().check(options)
        if not float(options["norm_eps"]) > 0.0:
            raise ValueError(f"norm_eps is {options['norm_eps']!r}; it must be above 0")

    def structure(self, options: Mapping[str, Any]) -> tuple[Any, ...]:
        return (options["momentum"] > 0.0,)

    def init(
        self, shape: tuple[int, ...], options: Mapping[str, Any], dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        return super().init(shape, options, dtype, device) if options["momentum"] > 0.0 else {}

    def averaged(
        self, grad: Tensor, state: Mapping[str, Tensor], options: Mapping[str, Any], ok: Tensor | None
    ) -> Tensor:
        """m after this step, or R itself; a gradient to be ignored leaves m as it is."""
        if "exp_avg" not in state or grad.numel() == 0:  # or a tensor whose turn it is not (FRUGAL's blocks)
            return grad
        moment, new = state["exp_avg"], 1.0 - float(options["momentum"])
        share = new if ok is None else kernels.masked_scalar(ok, new, 0.0, moment.dtype)
        for chunk in kernels.row_chunks(moment.shape[0], moment[:1].numel()):  # no copy as large as an output head
            part = grad[chunk].to(moment.dtype)
            moment[chunk].lerp_(part if ok is None else torch.where(ok, part, 0.0), share)
        return moment

    def transport(self, state: Mapping[str, Tensor], move: Transport, options: Mapping[str, Any], step: float) -> None:
        if "exp_avg" in state:
            super().transport(state, move, options, step)


@dataclass(frozen=True)
class RowNorm(NormalizedRule):
    """N_i = m_i / max(rms_j(m_ij), ε) for every row i, with m ← μm + (1−μ)R, or R where μ is 0.

    A row of a weight of `nn.Linear` is an output neuron; SCALE calls it a column. Of a convolution the matrix is out × the rest, and
    the matrices of a stack are each for themselves. In a subspace rows are those of R.

    SCALE has momentum 0 for all matrices, 0.9 for the head, and normalises the columns of the embedding (`lo.SCALEOptimizer`).
    RMNP has momentum for all matrices, and rows of length 1; embeddings, head and vectors are trained by AdamW:

        lo.LowRankOptimizer(lo.param_groups(model, rule=lo.RowNorm(momentum=0.95, unit="norm")), rule="adam")

    `optimizer.step()` reads the gradient of a dense parameter twice on a CPU (without momentum the first time also shows whether it
    is finite), and makes no tensor of its size. Sharded matrices are not gathered. Whole rows that lie on several processes (FSDP2)
    need no message; of rows that are cut, or of columns if these are normalised and rows are split, the sums of squares go over the
    wire, one number of the compute type for each. Normalising is not linear: micro-batches have to be summed before it, as `step` and
    `update_in_backward` do.

    momentum: μ.
    axis: "rows", or "columns".
    unit: "rms": N has lines of root mean square 1; "norm": of length 1.
    norm_eps: ε, the size from which a line is normalised.

    Memory: nothing, and 4 bytes for each element of R with momentum (8 in float64).

    Papers: Glentis et al., "A Minimalist Optimizer Design for LLM Pretraining", ICML 2026, arXiv:2506.16659 (SCALE); Deng et al.,
    "RMNP: Row-Momentum Normalized Preconditioning for Scalable Matrix-Based Optimization", ICML 2026, arXiv:2603.20527.
    """

    keeps_errors: ClassVar[bool] = True
    name: ClassVar[str] = "row_norm"
    axis: str = "rows"
    unit: str = "rms"
    norm_eps: float = 1e-8

    def check(self, options: Mapping[str, Any]) -> None:
        super().check(options)
        for name, valid in (("axis", AXES), ("unit", UNITS)):
            if options[name] not in valid:
                raise ValueError(f"{name} is {options[name]!r}; valid values are {', '.join(map(repr, valid))}")

    def lines_to_measure(self, options: Mapping[str, Any]) -> int | None:
        return None if options["momentum"] > 0.0 else _dimension(options)

    def direction(
        self, grad: Tensor, state: Mapping[str, Tensor], options: Mapping[str, Any], context: Context
    ) -> Direction:
        seen = self.averaged(grad, state, options, context.ok)
        return Direction(seen * self._factors(seen, options, context))

    def fused_dense(
        self,
        weight: Tensor,
        grad: Tensor,
        state: Mapping[str, Tensor],
        options: Mapping[str, Any],
        context: Context,
    ) -> FusedDense | None:
        """W ← keep·W − α φ ⊙ m."""
        seen = self.averaged(grad, state, options, context.ok)
        term = kernels.ResidualTerm(seen, self._factors(seen, options, context), context.ok)
        nothing = kernels.no_factors(weight, term.scale.dtype)

        def call(write: Mapping[str, Any]) -> tuple[Any, ...]:
            return kernels.apply_call(weight, nothing, term, context.sharding.matrix.start, write)

        return FusedDense("apply_", call)

    def _factors(self, seen: Tensor, options: Mapping[str, Any], context: Context) -> Tensor:
        """φ, (…, rows, 1) or (…, 1, columns); 0 where the gradient is to be ignored."""
        dim, sharding = _dimension(options), context.sharding.reduced
        squares = sharding.sum(kernels.line_sums(seen, dim, 2), dim) if context.squares is None else context.squares
        length = sharding.whole_shape(seen)[dim] if options["unit"] == "rms" else 1
        factors = (squares / max(length, 1)).sqrt_().clamp_min_(float(options["norm_eps"])).reciprocal_()
        return factors if context.ok is None else torch.where(context.ok, factors, 0.0)


def _dimension(options: Mapping[str, Any]) -> int:
    return -1 if options["axis"] == "rows" else -2


@dataclass(frozen=True)
class Sinkhorn(NormalizedRule):
    """N = s·X with X ← R, then `iterations` times X_i ← √n·X_i/(‖X_i‖+ε) for rows i, X_j ← √m·X_j/(‖X_j‖+ε) for columns j.

    N is s·diag(u) R diag(v): the vectors u and v are iterated on the squares of R, and X is made once. A line of zeros stays one, and
    factors are bounded where their squares would overflow (elements 10⁻¹⁸ times as large as others).

    Of a convolution the matrix is out × the rest, and the matrices of a stack are each for themselves; in a subspace X is R. Sharded
    matrices are not gathered: in each iteration one number of the compute type for each column goes over the wire where rows are
    split, for each row where columns are. Normalising is not linear: micro-batches have to be summed before it, as `step` and
    `update_in_backward` do.

    momentum: μ of m ← μm + (1−μ)R, in place of R; 0 in the paper.
    iterations: 5 in the paper.
    step_scale: s, 0.05 in the paper, whose learning rate is 0.02. Weight decay is by η, not by ηs.
    norm_eps: ε.

    Memory: nothing, and 4 bytes for each element of R with momentum (8 in float64). A step takes one
    temporary tensor of R's size, two on accelerators.

    Paper: Scetbon et al., "Gradient Multi-Normalization for Stateless and Scalable LLM Training", NeurIPS 2025, arXiv:2502.06742.
    """

    name: ClassVar[str] = "sinkhorn"
    iterations: int = 5
    step_scale: float = 1.0
    norm_eps: float = 1e-8

    def check(self, options: Mapping[str, Any]) -> None:
        super().check(options)
        iterations = options["iterations"]
        if isinstance(iterations, bool) or not isinstance(iterations, int) or not 1 <= iterations < 1000:
            raise ValueError(f"iterations is {iterations!r}; it must be an int from 1 to 999")
        if not float(options["step_scale"]) > 0.0:
            raise ValueError(f"step_scale is {options['step_scale']!r}; it must be above 0")

    def direction(
        self, grad: Tensor, state: Mapping[str, Tensor], options: Mapping[str, Any], context: Context
    ) -> Direction:
        seen = self.averaged(grad, state, options, context.ok)
        squares = seen.square()
        rows, columns = _balance(squares, context.sharding.reduced, options["iterations"], float(options["norm_eps"]))
        size = rows * float(options["step_scale"])
        size = size if context.ok is None else torch.where(context.ok, size, 0.0)
        return Direction(torch.mul(seen, size, out=squares).mul_(columns.mT))


def _balance(squares: Tensor, sharding: TensorSharding, iterations: int, eps: float) -> tuple[Tensor, Tensor]:
    """u (…, m, 1) and v (…, n, 1) of Sinkhorn's diag(u) R diag(v), from the local part of R's squares."""
    *batch, m, n = squares.shape
    rows, columns = (squares.new_ones((*batch, size, 1)) for size in (m, n))
    whole_rows, whole_columns = sharding.whole_shape(squares)[-2:]
    for _ in range(iterations):
        rows = _scaled(rows, sharding.sum(squares @ columns.square(), -1), whole_columns, eps)
        columns = _scaled(columns, sharding.sum(squares.mT @ rows.square(), -2), whole_rows, eps)
    return rows, columns


def _scaled(factor: Tensor, sums: Tensor, length: int, eps: float) -> Tensor:
    """The factors that bring lines to the norm √length; `sums` are the squares of their norms without `factor`."""
    norms = factor * sums.sqrt()
    largest = torch.finfo(factor.dtype).max ** 0.47
    return torch.where(norms > 0.0, factor * length**0.5 / (norms + eps), factor).clamp_max_(largest)
