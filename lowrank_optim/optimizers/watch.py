"""How far a step has come.

In the first step of a large model every matrix gets its first basis, which takes minutes. `watch_step` reports meanwhile, from
`optimizer.step()` and from updates in backward. Nothing is counted while nobody watches.
"""

import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lowrank_optim.optimizers.base import LowRankOptimizer
from lowrank_optim.step.batching import Step

# What one element of a gradient costs, in products for each direction of a subspace; reading and writing dense moments as some more.
PROJECTED, REFRESHED, DENSE = 4, 32, 64


@dataclass(frozen=True)
class StepProgress:
    """How far a step has come; printed, it is a line.

    step: its number, from 1.
    name: the parameter that was updated last.
    done, total: parameters that were updated, and that this step can update.
    refreshed: of the latter, the matrices that get a new basis.
    share: of the work that is done, from 0 to 1: elements of a matrix, times its rank; more where it gets a new basis.
    seconds: since the step began with its first parameter.
    """

    step: int
    name: str
    done: int
    total: int
    refreshed: int
    share: float
    seconds: float

    @property
    def seconds_left(self) -> float:
        """What is left at this pace; infinite while nothing is done."""
        return self.seconds * (1.0 - self.share) / self.share if self.share > 0.0 else float("inf")

    def __str__(self) -> str:
        bases = f", {self.refreshed:,} of them with a new basis" if self.refreshed else ""
        return (
            f"step {self.step}: {self.done:,} of {self.total:,} parameters{bases}, {duration(self.seconds)}, "
            f"about {duration(self.seconds_left)} left"
        )


def duration(seconds: float) -> str:
    """Seconds for a person.

    Example:
        >>> duration(41.2), duration(200), duration(7500)
        ('41 s', '3 min 20 s', '2 h 5 min')
    """
    if seconds < 60 or seconds == float("inf"):
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class StepWatch:
    """What `watch_step` returns. The optimizer calls `begin`, `updated`, `follow` and `end`."""

    def __init__(self, optimizer: LowRankOptimizer, report: Callable[[StepProgress], None], every: float) -> None:
        self._optimizer, self._report, self._every = weakref.ref(optimizer), report, every
        self.end()

    def remove(self) -> None:
        """Report no more. Nothing happens where that was done."""
        optimizer = self._optimizer()
        if optimizer is not None and optimizer._watch is self:
            del optimizer._watch

    def __enter__(self) -> "StepWatch":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def begin(self) -> None:
        """The first parameter of a step is about to be updated; of later ones nothing is noted."""
        optimizer = self._optimizer()
        if self._work or optimizer is None:
            return
        self._began = self._reported = time.perf_counter()
        for param, plan in optimizer.plans.items():
            if not param.requires_grad or not optimizer.is_trained(param):
                continue
            cost = DENSE
            if plan.space is not None:
                due = optimizer.trained(param).refresh_is_due
                self._refreshed += due
                cost = (REFRESHED if due else PROJECTED) * max(1, plan.space.rank)
            self._work[param] = param.numel() * cost

    def updated(self, *params: Tensor) -> None:
        """Parameters have been updated; reports if it is time."""
        if not self._done.isdisjoint(params):  # in another step: the one before was broken off
            self.end()
            self.begin()
        known = [param for param in params if param in self._work]  # of a pair, one may be frozen
        self._done.update(known)
        now, optimizer = time.perf_counter(), self._optimizer()
        if now - self._reported < self._every or not known or optimizer is None:
            return
        self._reported = now
        share = sum(self._work[param] for param in self._done) / sum(self._work.values())
        name, step = optimizer.plan_of(known[-1]).name, int(optimizer.state[known[-1]]["step"])
        counts = (len(self._done), len(self._work), self._refreshed)
        self._report(StepProgress(step, name, *counts, share, now - self._began))

    def follow(self, step: Step, params: tuple[Tensor, ...]) -> Step:
        """The step of these parameters, noted at its beginning and its end."""
        self.begin()
        yield from step
        self.updated(*params)

    def end(self) -> None:
        """The step is over."""
        self._work: dict[Tensor, int] = {}
        self._done: set[Tensor] = set()
        self._refreshed, self._began, self._reported = 0, 0.0, 0.0


def to_stderr(progress: StepProgress) -> None:
    """Write the line."""
    sys.stderr.write(f"{progress}\n")
    sys.stderr.flush()


def watch_step(
    optimizer: LowRankOptimizer, report: Callable[[StepProgress], None] = to_stderr, *, every: float = 10.0
) -> StepWatch:
    """Report how far a long step has come, from within it.

    The first step of a large model takes minutes, for every matrix gets its first basis. Later steps are short and report nothing.
    Works in `optimizer.step()` and, with `update_in_backward`, within backward, whose own time then counts. The time left is that
    of the work left, by the pace so far.

    Args:
        optimizer: of this package.
        report: called with a `StepProgress`; by default its line goes to stderr. It must not change parameters or state.
        every: seconds from one report to the next; a step that takes less reports nothing.

    Returns:
        A handle; `remove()`, or the end of a `with` block, ends the reports. One watch at a time.

    Raises:
        TypeError: not an optimizer of this package.
        ValueError: `every` is negative.
        RuntimeError: the optimizer is watched already.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = torch.nn.Linear(64, 32, bias=False)
        >>> optimizer = lo.GaLoreAdamW(lo.param_groups(model, rank=8), lr=1e-2)
        >>> with lo.watch_step(optimizer, lambda p: print(p.name, p.done, "of", p.total), every=0):
        ...     model(torch.ones(4, 64)).sum().backward()
        ...     optimizer.step()
        weight 1 of 1
    """
    if not isinstance(optimizer, LowRankOptimizer):
        raise TypeError(
            f"watch_step needs an optimizer of lowrank_optim, got {type(optimizer).__module__}.{type(optimizer).__name__}"
        )
    if not every >= 0.0:
        raise ValueError(f"every is {every!r}; it must be a number of seconds, 0 or more")
    if optimizer._watch is not None:
        raise RuntimeError(
            "this optimizer is watched already: call remove() on the handle of the other watch_step first"
        )
    watch = StepWatch(optimizer, report, every)
    optimizer._watch = watch
    return watch
