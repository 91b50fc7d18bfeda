"""What an ordinary step leaves for its end, where it is done for all parameters at once; inside backward each goes alone.

Directions of small matrices are computed in one launch where a backend can, before their second halves follow one by one. A second
half waits for sums over the processes that share its rows of R, which go in one message. Dense parameters with a fused operation are
updated in one launch, too.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.residuals.base import Reduced
from lowrank_optim.rules import Direction, FusedDirection
from lowrank_optim.sharding.param_sharding import HERE
from lowrank_optim.step.param_step import Job

SMALL = 2**18
"""Elements of R, or of a basis if that has more, up to which a matrix is small: the launch costs more than the work."""

TOGETHER = 2**22
"""Elements of small matrices that wait at most: 16 MiB of R, as much of bases that are not stored, and then of directions."""


@dataclass(frozen=True)
class Later:
    """Everything that is left to do for one matrix, whose `reduced.sums` are those of this process."""

    job: Job
    weight: Tensor
    move: Direction
    reduced: Reduced

    @property
    def waits(self) -> bool:
        """Whether other processes have a part of the sums."""
        return self.reduced.sums is not None and self.job.layout.shards.reduced.splits(-2)


@dataclass
class Waiting:
    """Of one step, in order.

    directions: of small matrices, each with what goes on from there.
    elements: of the small matrices since directions were computed last.
    matrices: second halves of matrices.
    dense: arguments of fused operations, by the operation's name.
    """

    directions: list[tuple[FusedDirection, Callable[[Direction], None]]] = field(default_factory=list)
    elements: int = 0
    matrices: list[Later] = field(default_factory=list)
    dense: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)

    def takes(self, job: Job) -> bool:
        """Whether a matrix's direction waits. Makes room for it: what waits already is computed where it would be too much together.

        Room is made by the sizes of whole matrices only, so that all processes go through their messages in the same order.
        """
        elements = _elements(job)
        if elements > SMALL:
            return False
        if self.elements + elements > TOGETHER:
            self.run_directions()
        self.elements += elements
        return job.in_place and not _may_be_copies(job)

    def run_directions(self) -> None:
        """Compute the directions that wait, and go on from each."""
        waiting, self.directions, self.elements = self.directions, [], 0
        found: list[Any] = [None] * len(waiting)
        for op in dict.fromkeys(fused.op for fused, _ in waiting):
            same = [i for i, (fused, _) in enumerate(waiting) if fused.op == op]
            for i, matrix in zip(same, kernels.run_many(op, [waiting[i][0].args for i in same]), strict=True):
                found[i] = matrix
        for (fused, go_on), matrix in zip(waiting, found, strict=True):
            go_on(fused.direction(matrix))

    def run(self) -> None:
        """Update the dense parameters, and the matrices whose directions wait."""
        for op, calls in self.dense.items():
            kernels.run_many(op, calls)
        self.run_directions()


def _elements(job: Job) -> int:
    """Elements of R as a whole, or of the largest basis if that has more."""
    layout, state = job.layout, job.state
    assert layout.space is not None
    *batch, lines, cols = layout.whole_moment_shape(job.param, state)
    return math.prod(batch) * max(lines, layout.space.rows, layout.space.cols) * cols


def _may_be_copies(job: Job) -> bool:
    """Whether a convolution's weight and gradient may be copies, to be matrices: together, they could be as large as the model."""
    layout, grad = job.layout, job.param.grad
    if layout.layout != "conv" and job.param.dim() <= 3:
        return False
    return layout.shards is not HERE or grad is None or not (job.weight.is_contiguous() and grad.is_contiguous())


def summed(steps: Iterable[Later]) -> list[Later]:
    """The steps with sums over all processes: one message for all that lie on the same ones."""
    steps = list(steps)
    alike: dict[tuple[object, ...], list[int]] = {}
    for number, step in enumerate(steps):
        if step.waits:
            key = (step.weight.device, *step.job.layout.shards.reduced.groups(-2))
            alike.setdefault(key, []).append(number)
    for numbers in alike.values():
        parts = [sums for n in numbers if (sums := steps[n].reduced.sums) is not None]
        flat = torch.cat([part.flatten() for part in parts])
        flat = steps[numbers[0]].job.layout.shards.reduced.sum(flat, -2)
        for n, part, whole in zip(numbers, parts, flat.split([part.numel() for part in parts]), strict=True):
            steps[n] = replace(steps[n], reduced=replace(steps[n].reduced, sums=whole.view(part.shape)))
    return steps
