"""How steps of parameters run: one alone, or all of a step together, so that small launches and messages become few large ones.

The step of a parameter is a generator. It yields what others may do with it, an operation (`Launch`), a sum over processes (`Sum`) or
something that a rule computes for many parameters at once (`Shared`), and goes on with the answer.

    alone(step)        answers each request at once: updates in backward
    together(steps)    lets requests wait for those of other parameters: an ordinary step

What waits is bounded. Its size counts whole matrices, so that all processes send their messages in the same order.
"""

from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.sharding.tensor_sharding import TensorSharding

SMALL = 2**18
"""Elements up to which an operation waits for others: the launch costs more than the work."""

TOGETHER = 2**22
"""Elements of launches that wait at most: 16 MiB of R, as much of bases that are not stored, and then of directions."""

SUMMED_TOGETHER = 2**25
"""Elements of matrices whose sums wait at most, for one message: 128 MiB of R on all processes together, as much of directions."""


@dataclass(frozen=True)
class Launch:
    """An operation of `kernels`; the answer is what it returns.

    elements: what the waiting step keeps in memory, in elements of the largest of its tensors; 0 for nothing besides the state.
    """

    op: str
    args: tuple[Any, ...]
    elements: int = 0

    def run(self) -> Any:
        """The answer, now."""
        return kernels.call(self.op, *self.args)

    @property
    def waits(self) -> bool:
        """Whether it is small, and run faster with others."""
        return self.elements <= SMALL and kernels.batches(self.op, self.args[0])


@dataclass(frozen=True)
class Sum:
    """A tensor to be summed over the processes that split the rows of another; the answer is the sum.

    sharding: of that other tensor.
    elements: as of `Launch`.
    """

    part: Tensor
    sharding: TensorSharding
    elements: int
    waits = True

    def run(self) -> Tensor:
        """The answer, now."""
        return self.sharding.sum(self.part, -2)


@dataclass(frozen=True)
class Shared:
    """Something that is computed for many steps at once; the answer is that to the own argument.

    compute: from a list of arguments, the list of answers.
    key: requests of one key may be answered by one call.
    elements: as of `Launch`, but of whole tensors, for the call may send messages.
    """

    compute: Callable[[Sequence[Any]], Sequence[Any]]
    key: Hashable
    argument: Any
    elements: int
    waits = True

    def run(self) -> Any:
        """The answer, now."""
        (answer,) = self.compute([self.argument])
        return answer


Request: TypeAlias = Launch | Sum | Shared
Step: TypeAlias = Generator[Request, Any, None]


def alone(step: Step) -> None:
    """Run the step of one parameter to its end."""
    request = next(step, None)
    while request is not None:
        request = _go_on(step, request.run())


def together(steps: Iterable[Step]) -> None:
    """Run the steps of many parameters to their ends.

    If one raises, all that have begun are finished, and none is begun: every other parameter is stepped, or as it was.
    """
    waiting: list[tuple[Step, Request]] = []
    launched = summed = 0
    try:
        for step in steps:
            request = next(step, None)
            while request is not None and not request.waits:
                request = _go_on(step, request.run())
            if request is None:
                continue
            launch, total = (0, request.elements) if isinstance(request, Sum) else (request.elements, 0)
            launched, summed = launched + launch, summed + total
            if launched > TOGETHER or summed > SUMMED_TOGETHER:
                ready, waiting = waiting, [(step, request)]
                launched, summed = launch, total
                _finish(ready)
            else:
                waiting.append((step, request))
    finally:
        _finish(waiting)


def _go_on(step: Step, answer: Any) -> Request | None:
    """The next request of a step; None at its end."""
    try:
        return step.send(answer)
    except StopIteration:
        return None


def _finish(waiting: list[tuple[Step, Request]]) -> None:
    """Answer all requests, and those that follow, until every step has ended; then raise what the first step raised, if any did."""
    failed: list[BaseException] = []
    while waiting:
        steps, requests = zip(*waiting, strict=True)
        answers = [requests[0].run()] if len(requests) == 1 else _answers(requests)
        waiting = []
        for step, answer in zip(steps, answers, strict=True):
            try:
                request = step.send(answer)
            except StopIteration:
                continue
            except BaseException as error:
                failed.append(error)
                continue
            waiting.append((step, request))
    if failed:
        try:
            raise failed[0]
        finally:
            failed.clear()  # else the error would hold itself, and with it all gradients


def _answers(requests: Sequence[Request]) -> list[Any]:
    """Operations of one name in one launch, sums over the same processes in one message."""
    answers: list[Any] = [None] * len(requests)
    alike: dict[tuple[Any, ...], list[int]] = {}
    for number, request in enumerate(requests):
        if isinstance(request, Launch):
            key: tuple[Any, ...] = (request.op,)
        elif isinstance(request, Shared):
            key = ("shared", request.key)
        else:
            key = (request.part.device, request.part.dtype, *request.sharding.groups(-2))
        alike.setdefault(key, []).append(number)
    for numbers in alike.values():
        first = requests[numbers[0]]
        if isinstance(first, Launch):
            found = kernels.run_many(first.op, [r.args for n in numbers if isinstance(r := requests[n], Launch)])
        elif isinstance(first, Shared):
            found = list(first.compute([r.argument for n in numbers if isinstance(r := requests[n], Shared)]))
        else:
            parts = [r.part for n in numbers if isinstance(r := requests[n], Sum)]
            flat = first.sharding.sum(torch.cat([part.flatten() for part in parts]), -2)
            sums = flat.split([part.numel() for part in parts])
            found = [whole.view(part.shape) for whole, part in zip(sums, parts, strict=True)]
        for number, answer in zip(numbers, found, strict=True):
            answers[number] = answer
    return answers
