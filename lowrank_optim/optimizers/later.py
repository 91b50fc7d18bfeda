"""What an ordinary step leaves for its end, where it is done for all parameters at once; inside backward each goes alone.

The second half of a matrix' step waits for sums over the processes that share its rows of R, which go in one message. Dense
parameters with a fused operation are updated in one launch where a backend can.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.optimizers.job import Job
from lowrank_optim.optimizers.residuals import Reduced
from lowrank_optim.rules import Direction


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

    matrices: their second halves.
    dense: arguments of fused operations, by the operation's name.
    """

    matrices: list[Later] = field(default_factory=list)
    dense: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)

    def run_dense(self) -> None:
        """Update the dense parameters."""
        for op, calls in self.dense.items():
            kernels.run_many(op, calls)


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
