"""Functions whose allocations are known: what a call allocates and frees is recorded once, and repeated for arguments alike in form.

Layers are equal, so that the long loops of a step (over the blocks of a coded moment, over the parts of a support) come again for
each of them, on tensors that have no numbers. A repeated call makes the events of the recorded one and new tensors for its results:
the timeline is the same to the byte, and nothing is run.

Only what the record itself shows to be repeatable is repeated. A call that frees a block from before, keeps one that it does not
return, or returns a view, is run every time.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.kernels.counter_rng import Stratified
from lowrank_optim.nn.supports import SeededSupport
from lowrank_optim.planner.simulation.shapes import META
from lowrank_optim.planner.simulation.timeline import Block, Moment, Timeline
from lowrank_optim.projectors import Refresh
from lowrank_optim.projectors.randomized_svd import RandomizedSVD
from lowrank_optim.quantization.coded_moments import CodedMoments
from lowrank_optim.step.param_plan import ParamPlan

Key = Callable[..., Hashable]
"""From the arguments of a call, what decides its allocations; `Unlike` is raised where nothing that can be compared does."""


class Unlike(Exception):
    """A call that is like no other."""


@dataclass(frozen=True, slots=True)
class _Event:
    """A block is made, or freed. number: of the block within the call."""

    number: int
    made: bool
    size: int
    in_forward: bool
    outlived: bool


@dataclass(frozen=True, slots=True)
class _New:
    """A tensor among the results, which has all of its block."""

    number: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Tape:
    """What a call does. results: `_New`s, None, or tuples and dicts of them."""

    events: list[_Event]
    results: Any


# Forms -----------------------------------------------------------------------------------------------------------------------------


def form(item: Any) -> Hashable:
    """Of a tensor, what operators see of it; values of small host tensors, which code branches on; other things as they are."""
    if isinstance(item, Tensor):
        with torch._C.DisableTorchFunction():
            if type(item) not in (Tensor, torch.nn.Parameter) or item.layout is not torch.strided:
                raise Unlike
            if not item.is_meta and item.numel() > 8:
                raise Unlike
            value = None if item.is_meta else tuple(item.flatten().tolist())
            return (item.shape, item.stride(), item.dtype, value)
    if isinstance(item, Mapping):
        return tuple([(name, form(value)) for name, value in item.items()])
    known: Hashable = item
    return known


def _of_moments(moments: CodedMoments, *args: Any) -> Hashable:
    """The random stream and the number of the step change numbers only."""
    if type(moments) is not CodedMoments:
        raise Unlike
    tensors = [form(arg) for arg in args if arg is None or isinstance(arg, Tensor)]
    kept = {name: tensor for name, tensor in moments.state.items() if name.startswith(("exp_", "col_"))}
    opened = None if moments._open is None else form(moments._open)
    return (moments.shape, moments.bits, moments.dtype, moments.start, form(kept), opened, *tensors)


def _of_strata(strata: Stratified, start: int, stop: int, device: torch.device) -> Hashable:
    return (stop - start, device)


def _of_refresh(plan: ParamPlan, request: Refresh) -> Hashable:
    if not isinstance(plan.projector, RandomizedSVD) or plan.sum_dtype is not None:
        raise Unlike
    given = (form(request.grad), form(request.state), form(request.momentum), form(request.weight))
    return (plan.projector, plan.space, request.first, *given)


REPEATED: tuple[tuple[type, str, Key], ...] = (
    (CodedMoments, "row_sums", _of_moments),
    (CodedMoments, "column_sums", _of_moments),
    (CodedMoments, "rescale_", _of_moments),
    (Stratified, "_turned", _of_strata),
    (SeededSupport, "compressed", lambda support, device: (support, device)),
    (ParamPlan, "refresh", _of_refresh),
)
"""Methods that are repeated, with their keys."""


# Recording and repeating -----------------------------------------------------------------------------------------------------------


class Replays:
    """The calls of one simulation. `moment`, `in_forward` and `block_of` are those of its recorder."""

    def __init__(
        self, timeline: Timeline, moment: Callable[[], Moment], block_of: Callable[[Tensor], Block | None]
    ) -> None:
        self.timeline, self.moment, self.block_of = timeline, moment, block_of
        self._tapes: dict[Hashable, _Tape] = {}
        self._thread = get_ident()

    def repeating(self, function: Callable[..., Any], key_of: Key) -> Callable[..., Any]:
        """The function, run for arguments that are new, and repeated for others."""

        @wraps(function)
        def call(*args: Any) -> Any:
            if get_ident() != self._thread:  # which trains, while this one plans
                return function(*args)
            try:
                key = (function, self.moment().phase, torch.is_grad_enabled(), key_of(*args))
                tape = self._tapes.get(key)
            except (Unlike, TypeError):
                return function(*args)
            if tape is not None:
                return self._repeat(tape)
            first, moment = len(self.timeline.events), self.moment()
            result = function(*args)
            if moment == self.moment() and (made := self._recorded(first, result)) is not None:
                self._tapes[key] = made
            return result

        return call

    def _recorded(self, first: int, result: Any) -> _Tape | None:
        """The tape of the events from number `first` on, or None where they cannot be repeated."""
        numbers: dict[Block, int] = {}
        events, left = [], set()
        for block, made, _ in self.timeline.events[first:]:
            if made:
                numbers[block] = len(numbers)
                left.add(block)
            elif block in left:
                left.discard(block)
            else:
                return None
            events.append(_Event(numbers[block], made, block.size, block.in_forward, block.outlived))
        returned: list[int] = []
        try:
            results = self._described(result, numbers, returned)
        except Unlike:
            return None
        claimed = any(block.kind for block in numbers)
        return (
            None if claimed or sorted(returned) != sorted(numbers[block] for block in left) else _Tape(events, results)
        )

    def _described(self, item: Any, numbers: Mapping[Block, int], returned: list[int]) -> Any:
        if item is None:
            return None
        if type(item) is tuple:
            return tuple([self._described(part, numbers, returned) for part in item])
        if type(item) is dict:
            return {name: self._described(part, numbers, returned) for name, part in item.items()}
        block = self.block_of(item) if type(item) is Tensor else None
        with torch._C.DisableTorchFunction():
            if block is None or block not in numbers or not item.is_meta or item.requires_grad:
                raise Unlike
            if item.storage_offset() or item.numel() * item.element_size() != block.size:
                raise Unlike
            returned.append(numbers[block])
            return _New(numbers[block], tuple(item.shape), item.stride(), item.dtype)

    def _repeat(self, tape: _Tape) -> Any:
        """The events of a call once more, and its results."""
        new = {made.number: made for made in _leaves(tape.results)}
        blocks: dict[int, Block] = {}
        tensors: dict[int, Tensor] = {}
        events, moment = self.timeline.events, self.moment()
        for event in tape.events:
            if not event.made:
                block = blocks.pop(event.number)
                block.outlived = event.outlived
            elif (made := new.get(event.number)) is not None:
                tensor = torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device=META)
                found = self.block_of(tensor)
                assert found is not None
                found.in_forward = event.in_forward
                blocks[event.number], tensors[event.number] = found, tensor
                continue  # the recorder has written it
            else:
                block = blocks[event.number] = Block(event.size, moment.layer, event.in_forward)
            events.append((block, event.made, moment))
        return _filled(tape.results, tensors)


def _leaves(results: Any) -> Iterator[_New]:
    if isinstance(results, _New):
        yield results
    for part in results.values() if isinstance(results, dict) else results if isinstance(results, tuple) else ():
        yield from _leaves(part)


def _filled(results: Any, tensors: Mapping[int, Tensor]) -> Any:
    if isinstance(results, _New):
        return tensors[results.number]
    if isinstance(results, dict):
        return {name: _filled(part, tensors) for name, part in results.items()}
    return tuple([_filled(part, tensors) for part in results]) if isinstance(results, tuple) else None


@contextmanager
def repeated(replays: Replays, replaced: Callable[..., AbstractContextManager[None]]) -> Iterator[None]:
    """Within this block the methods of `REPEATED` are repeated; `replaced(owner, name, replacement)` replaces an attribute."""
    with ExitStack() as stack:
        for owner, name, key_of in REPEATED:
            stack.enter_context(replaced(owner, name, replays.repeating(getattr(owner, name), key_of)))
        yield
