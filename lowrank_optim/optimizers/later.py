"""The second half of a matrix' step: what waits for sums over the processes that share its rows of R.

In an ordinary step all matrices come to this point first, so that their sums go in one message; inside backward each goes alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

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
