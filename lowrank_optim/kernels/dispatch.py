"""Which backend runs an operation.

    reference    torch ops, any device: the definition
    cpu          csrc/cpu, C++
    triton       CUDA (and whatever else Triton runs on); CPU tensors under its interpreter
    cuda         csrc/cuda, for CUDA without Triton
    torch        torch ops in place, any device: what takes many passes, where nothing else is there

A backend is a package `lowrank_optim.kernels.<name>` with a function `load()` that returns a `Loaded`, or raises `Unavailable` with
the reason. Its functions take the arguments of the operation (`schemas`), checked; they may return NotImplemented, before they have
changed anything, for arguments that they do not cover (float64, unusual strides): the reference then does the work.

The environment variable LOWRANK_OPTIM_BACKEND names the one backend to use beside the reference.
"""

import importlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache, partial
from itertools import filterfalse
from operator import is_not
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lowrank_optim.kernels import compute, schemas

VARIABLE = "LOWRANK_OPTIM_BACKEND"
BACKENDS = ("cpu", "triton", "cuda", "torch")
"""In order of preference on a device that several serve; the reference comes last."""

EVERY_DEVICE = "every device"
"""In `Loaded.devices`: the backend serves all types."""

PROCESS = os.getpid()
"""That imported the package: others are forks of it."""

Kernel = Callable[..., Any]


class Unavailable(RuntimeError):
    """Why a backend cannot be used here."""


@dataclass(frozen=True)
class Loaded:
    """A backend that works.

    devices: the types that it serves.
    operations: by name.
    about: what `lowrank-optim doctor` says of it.
    many: by name of the operation, functions of a list of its arguments, which return what it returns for each, NotImplemented
        where they left it alone (`run_many`); "norm", of a list of contiguous tensors (`norms`); and "line_squares", of a matrix or
        a stack of them, and whether its lines are rows (`line_sums`).
    partly: the operations that it has for some types of tensors and devices only.
    """

    devices: frozenset[str]
    operations: Mapping[str, Kernel]
    about: str = ""
    many: Mapping[str, Kernel] = field(default_factory=dict)
    partly: frozenset[str] = frozenset()

    def serves(self, device: str) -> bool:
        """Whether it works on tensors on this type of device."""
        return device in self.devices or EVERY_DEVICE in self.devices


def for_one(function: Kernel, *args: Any) -> Any:
    """What a function of `Loaded.many` returns for one operation's arguments."""
    return function([args])[0]


_DEFINITIONS: dict[str, Kernel] = {}
_OPERATIONS: dict[str, Any] = {}
_KERNELS: dict[str, Kernel] = {}
_WRITTEN: dict[str, dict[int, list[int]]] = {}  # by how many arguments there are
_IS_THERE: Any = partial(is_not, None)
# Every operation asks for the variable, and `os.environ` decodes it anew each time, in three calls of Python.
_environment: Callable[[Any], Any] = os.environ._data.get  # type: ignore[attr-defined]
_KEY = os.environ.encodekey(VARIABLE)
_SHORT = (torch.float32, torch.bfloat16, torch.float16)


def definition(name: str) -> Callable[[Kernel], Kernel]:
    """The decorated function is the reference for an operation; it takes the operation's arguments."""

    def register(function: Kernel) -> Kernel:
        _DEFINITIONS[name] = function
        _KERNELS[name] = _dispatcher(name)
        schemas.implement(name, _KERNELS[name])
        return function

    return register


def _dispatcher(name: str) -> Kernel:
    check, define = schemas.CHECKS[name], _DEFINITIONS[name]
    _OPERATIONS[name] = getattr(torch.ops.lowrank_optim, name).default
    arguments = _OPERATIONS[name]._schema.arguments
    written = [i for i, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write]
    _WRITTEN[name] = places = {n: [i for i in written if i < n] for n in range(len(arguments) + 1)}

    def kernel(*args: Any) -> Any:
        check(*args)
        for run in _ways(name, args[0].device.type, _environment(_KEY)):
            result = run(*args)
            if result is not NotImplemented:
                if written:
                    _changed(map(args.__getitem__, places[len(args)]))
                return result
        return define(*args)

    def kernel_of_lists(*args: Any) -> Any:
        check(*args)
        for run in _ways(name, args[0][0].device.type, _environment(_KEY)):
            result = run(*args)
            if result is not NotImplemented:
                _changed(
                    tensor
                    for i in places[len(args)]
                    for tensor in (args[i] if isinstance(args[i], (list, tuple)) else args[i : i + 1])
                )
                return result
        return define(*args)

    return kernel_of_lists if str(arguments[0].type) == "List[Tensor]" else kernel


@cache
def _ways(name: str, device: str, chosen: Any) -> tuple[Kernel, ...]:
    """The functions of the backends for an operation, in order of preference."""
    return tuple(backend.operations[name] for backend in _chain(device, chosen) if name in backend.operations)


def _changed(tensors: Iterable[Tensor | None]) -> None:
    """Tell autograd: a tensor that was saved for a backward pass must not be used with other values."""
    increment_version(list(filterfalse(Tensor.is_inference, filter(_IS_THERE, tensors))))


def is_watched() -> bool:
    """Whether a mode of torch is active (the planner's, say) or a profiler, which want to see every operation."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._autograd._profiler_enabled()
    )


def _is_plain(arguments: Iterable[Any]) -> bool:
    """Whether the tensors among these arguments are in memory for all to see.

    Others (fake ones, quantised weights, views with a negative bit, zeros without memory) have ways of their own, which only the
    operation itself goes. What stands in a list, of many parameters, was looked at when the step began (`step.entrance`).
    """
    for argument in arguments:
        if argument is None:
            continue
        kind = type(argument)
        if kind is Tensor or kind is torch.nn.Parameter:
            if argument.is_neg() or argument._is_zerotensor():
                return False
        elif issubclass(kind, Tensor):
            return False
    return True


def call(name: str, *args: Any) -> Any:
    """An operation: at once where nobody has to see it, which saves half of what a small one takes, else through torch."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or is_watched() or not _is_plain(args):
        return _OPERATIONS[name](*args)
    return _KERNELS[name](*args)


def run_many(name: str, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """What an operation returns for the arguments of each of `calls`: in one launch for all on a device where a backend can.

    Nothing that one of them writes may be read by another.
    """
    if len(calls) == 1:
        return [call(name, *calls[0])]
    results: list[Any] = [NotImplemented] * len(calls)
    left: dict[torch.device | None, list[int]] = {}
    watched = is_watched()
    for i, args in enumerate(calls):
        left.setdefault(None if watched or not _is_plain(args) else args[0].device, []).append(i)
    for device, same in left.items():
        for backend in _chain(device.type, _environment(_KEY)) if device and len(same) > 1 else ():
            if name in backend.many:
                for i in same:
                    schemas.CHECKS[name](*calls[i])
                for i, result in zip(same, backend.many[name]([calls[i] for i in same]), strict=True):
                    results[i] = result
                done = [calls[i] for i in same if results[i] is not NotImplemented]
                _changed(args[place] for args in done for place in _WRITTEN[name][len(args)])
                same = [i for i in same if results[i] is NotImplemented]
        for i in same:
            results[i] = call(name, *calls[i])
    return results


def batches(name: str, tensor: Tensor) -> bool:
    """Whether a backend runs an operation faster for many tensors like this one together."""
    return not is_watched() and _batches(name, tensor.device.type, _environment(_KEY))


@cache
def _batches(name: str, device: str, chosen: Any) -> bool:
    return any(name in backend.many for backend in _chain(device, chosen))


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The norm of each tensor, 0-d: in one launch where a backend can."""
    found: list[Tensor | None] = [None] * len(tensors)
    together: dict[torch.device, list[int]] = {}
    if not is_watched():
        for i, x in enumerate(tensors):
            if _is_plain((x,)) and x.dtype in _SHORT and x.is_contiguous():
                together.setdefault(x.device, []).append(i)
    for device, same in together.items():
        chain = _chain(device.type, _environment(_KEY))
        measure = next((backend.many["norm"] for backend in chain if "norm" in backend.many), None)
        if measure is not None:
            for i, norm in zip(same, measure([tensors[i] for i in same]).unbind(), strict=True):
                found[i] = norm
    return [compute.norm(x) if norm is None else norm for x, norm in zip(tensors, found, strict=True)]


def line_sums(tensor: Tensor, dim: int, power: int) -> Tensor:
    """Σ |x| (`power` 1) or Σ x² (2) of every row (`dim` −1) or column (−2), see `compute.line_sums`; squares in one pass where a
    backend can."""
    # A profiler and a default device, which is a mode of functions, change no bits.
    seen = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or not _is_plain((tensor,))
    if power == 2 and not seen and tensor.dtype in _SHORT:
        for backend in _chain(tensor.device.type, _environment(_KEY)):
            if "line_squares" in backend.many:
                sums: Tensor = backend.many["line_squares"](tensor, dim == -1)
                if sums is not NotImplemented:
                    return sums
    return compute.line_sums(tensor, dim, power)


@cache
def _chain(device: str, chosen: Any) -> tuple[Loaded, ...]:
    """The backends that serve a device type, in order of preference; `chosen` is the variable's value in the environment."""
    forced = os.fsdecode(chosen) if chosen else ""
    if not forced:
        loaded = [backend for backend in map(_try, BACKENDS) if isinstance(backend, Loaded)]
        return tuple(backend for backend in loaded if backend.serves(device))
    if forced == "reference":
        return ()
    backend = _try(forced) if forced in BACKENDS else None
    if isinstance(backend, Loaded) and backend.serves(device):
        return (backend,)
    there = [name for name in BACKENDS if isinstance(other := _try(name), Loaded) and other.serves(device)]
    if backend is None:
        near = get_close_matches(forced.lower(), (*BACKENDS, "reference"), n=1)
        why = f"there is no such backend{f'; did you mean {near[0]!r}?' if near else '.'}"
    elif isinstance(backend, Unavailable):
        why = str(backend)
    else:
        why = f"it serves {', '.join(sorted(backend.devices))} tensors, and these are on {device}"
    raise ValueError(f"{VARIABLE}={forced}: {why} Available for {device}: {', '.join((*there, 'reference'))}.")


@cache
def _try(name: str) -> Loaded | Unavailable:
    try:
        loaded: Loaded = importlib.import_module(f"lowrank_optim.kernels.{name}").load()
    except Unavailable as why:
        return why.with_traceback(None)  # whose frames would keep the tensors of their callers alive
    return loaded


def backends() -> dict[str, Loaded | Unavailable]:
    """Every backend by name: what it is, or why it cannot be used on this machine."""
    return {name: _try(name) for name in BACKENDS}


def forget() -> None:
    """Look for the backends again, for tests."""
    _try.cache_clear()
    _chain.cache_clear()
    _ways.cache_clear()
    _batches.cache_clear()
