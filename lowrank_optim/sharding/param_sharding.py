"""One parameter of the step across processes: where its weights, its bases and R lie, and how R gets to the processes that keep it.

The step works on local parts. `LOCAL` is the parameter that lies on one process; `MeshParamSharding` is made from the placements of a
DTensor (`sharding.dtensor`). With the basis B along the contracted side of G (columns for side "right", rows for "left"):

    contracted side    R = Σ over processes of (local G)(local B)      moments lie with
    whole              nothing to sum: 0 bytes                         the rows of R, as the weights do
    split              a reduce-scatter (`collect`), and an all-gather a share of R's rows each: sums are kept once
                       of N before it is lifted (`lift`)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowrank_optim.sharding.tensor_sharding import UNSHARDED, MeshSharding, TensorSharding

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _collective(*names: str) -> Callable[..., Any]:
    """A function of torch.distributed by its first name that there is: torch 2.13 renames some."""
    for name in names:
        if hasattr(torch.distributed, name):
            return getattr(torch.distributed, name)  # type: ignore[no-any-return]
    return lambda *_, **__: None  # torch without process groups, where nothing is sharded


_reduce_scatter = _collective("reduce_scatter_single", "reduce_scatter_tensor")
_all_gather = _collective("all_gather_single", "all_gather_into_tensor")


@dataclass(frozen=True)
class ParamSharding:
    """A parameter that this process holds whole; every operation hands on what it was given.

    matrix: the sharding of the weights' matrix view (…, m, n); of a dense parameter, its own.
    rows, cols: of tall matrices (…, m, ·) and (…, n, ·), such as bases.
    reduced: of R, the moments and the direction.
    param: of the parameter in its own shape.
    whole: whether R and the moments are kept whole on every process, although the weights are not.
    """

    matrix: TensorSharding = UNSHARDED
    rows: TensorSharding = UNSHARDED
    cols: TensorSharding = UNSHARDED
    reduced: TensorSharding = UNSHARDED
    param: TensorSharding = UNSHARDED
    whole: bool = False

    def moment_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the part of a moment that is kept here."""
        return shape

    def collect(self, partial: Tensor) -> Tensor:
        """The rows of R that are kept here, from the product (…, d, r) of the local parts."""
        return partial

    def collect_with(self, partial: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        """`collect` of R and of one number for each of its rows, in one message."""
        return partial, squares

    def lift(self, core: Tensor) -> Tensor:
        """The inverse of `collect`: the rows (…, d, ·) that the local part of the weights needs, from those kept here."""
        return core

    def sharding_of(self, lies: str, side: str | None) -> TensorSharding:
        """Where a state tensor lies.

        Args:
            lies: "reduced" (as R, and R's moments), "rows" or "columns" (one number for each of R's), "column scale" (in a row),
                "matrix" (as the matrix), "stack" (one number for each matrix), "basis" (along the projected side), "basis_right" (the
                second of two), "chosen" (indices, whole but for the stack), "param" (as the parameter), or
                "whole" (the same on all processes).
            side: the projected one, None for a dense parameter.
        """
        if lies == "basis":
            return self.cols if side == "right" else self.rows
        if lies == "stack":
            return self.matrix.drop(-1).drop(-1)
        if lies == "chosen":
            return self.matrix.only(-3).drop(-1)
        if lies == "column scale":
            return self.reduced.only(-3, -1)
        if lies in ("rows", "columns"):
            return self.reduced.drop(-1 if lies == "rows" else -2)
        if lies == "whole":
            return self.matrix.only()
        shardings = {"reduced": self.reduced, "matrix": self.matrix, "param": self.param, "basis_right": self.cols}
        return shardings[lies]


LOCAL = ParamSharding()


@dataclass(frozen=True, kw_only=True)
class MeshParamSharding(ParamSharding):
    """The local part of a DTensor.

    lines: the sharding of R before it is summed: as the weights' rows or columns lie.
    partial: the groups over which R is a sum.
    scatter: whether each process of the one group in `partial` keeps a share of the rows of R.
    """

    lines: MeshSharding
    partial: "tuple[ProcessGroup, ...]" = ()
    scatter: bool = False

    def moment_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        same = isinstance(self.reduced, MeshSharding) and len(shape) == len(self.reduced.shape)
        return (self.reduced if same else self.matrix).local_shape(shape)  # else a convolution, coded as a matrix

    def collect(self, partial: Tensor) -> Tensor:
        if partial.shape[-1] == 0:  # no subspace
            return self.reduced.part(partial) if self.scatter else partial
        if self.scatter:
            return self._scatter(partial)
        if self.partial:
            partial = partial.contiguous()
        for group in self.partial:
            torch.distributed.all_reduce(partial, group=group)
        return self.lines.gather(partial, -2) if self.whole else partial

    def collect_with(self, partial: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        if not self.partial and not self.whole:
            return partial, squares
        reduced, squares = self.collect(torch.cat([partial, squares], -1)).split([partial.shape[-1], 1], -1)
        return reduced.contiguous(), squares

    def lift(self, core: Tensor) -> Tensor:
        if self.scatter:
            return self._gather(core)
        return self.lines.part(core, -2) if self.whole else core

    def _scatter(self, partial: Tensor) -> Tensor:
        """Equal chunks of rows, as `Shard` cuts them; the last ones may be shorter or empty."""
        (group,) = self.partial
        lines, size = partial.shape[-2], group.size()
        chunk = -(-lines // size)
        rows = partial.new_zeros((chunk * size, *partial.shape[:-2], partial.shape[-1]))
        rows[:lines] = partial.movedim(-2, 0)
        own = rows.new_empty((chunk, *rows.shape[1:]))
        _reduce_scatter(own, rows, group=group)
        kept = min(max(lines - group.rank() * chunk, 0), chunk)
        return own[:kept].movedim(0, -2).contiguous()

    def _gather(self, core: Tensor) -> Tensor:
        (group,) = self.partial
        lines, size = self.lines.shape[-2], group.size()
        chunk = -(-lines // size)
        own = core.new_zeros((chunk, *core.shape[:-2], core.shape[-1]))
        own[: core.shape[-2]] = core.movedim(-2, 0)
        rows = own.new_empty((chunk * size, *own.shape[1:]))
        _all_gather(rows, own, group=group)
        return rows[:lines].movedim(0, -2).contiguous()
