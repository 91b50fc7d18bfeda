"""Which backend runs an operation.

    reference    torch ops, any device: the definition
    cpu          csrc/cpu, C++
    triton       CUDA (and whatever else Triton runs on); CPU tensors under its interpreter
    cuda         csrc/cuda, for CUDA without Triton

A backend is a package `lowrank_optim.kernels.<name>` with a function `load()` that returns a `Loaded`, or raises `Unavailable` with
the reason. Its functions take the arguments of the operation (`schemas`), checked; they may return NotImplemented, before they have
changed anything, for arguments that they do not cover (float64, unusual strides): the reference then does the work.

The environment variable LOWRANK_OPTIM_BACKEND names the one backend to use beside the reference.
"""

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

from torch import Tensor

from lowrank_optim.kernels import schemas

VARIABLE = "LOWRANK_OPTIM_BACKEND"
BACKENDS = ("cpu", "triton", "cuda")
"""In order of preference on a device that several serve; the reference comes last."""

Kernel = Callable[..., Any]


class Unavailable(RuntimeError):
    """Why a backend cannot be used here."""


@dataclass(frozen=True)
class Loaded:
    """A backend that works: the device types that it serves, its operations by name, and what `lowrank-optim doctor` says of it."""

    devices: frozenset[str]
    operations: Mapping[str, Kernel]
    about: str = ""


_DEFINITIONS: dict[str, Kernel] = {}


def definition(name: str) -> Callable[[Kernel], Kernel]:
    """The decorated function is the reference for an operation; it takes the operation's arguments."""

    def register(function: Kernel) -> Kernel:
        _DEFINITIONS[name] = function
        schemas.implement(name, _dispatcher(name))
        return function

    return register


def _dispatcher(name: str) -> Kernel:
    check, define = schemas.CHECKS[name], _DEFINITIONS[name]

    def kernel(*args: Any) -> Any:
        check(*args)
        device = next(arg for arg in args if isinstance(arg, Tensor)).device.type
        for operations in _chain(device, os.environ.get(VARIABLE)):
            if name in operations:
                result = operations[name](*args)
                if result is not NotImplemented:
                    return result
        return define(*args)

    return kernel


@cache
def _chain(device: str, forced: str | None) -> tuple[Mapping[str, Kernel], ...]:
    """The operations of the backends that serve a device type, in order of preference."""
    if not forced:
        loaded = [backend for backend in map(_try, BACKENDS) if isinstance(backend, Loaded)]
        return tuple(backend.operations for backend in loaded if device in backend.devices)
    if forced == "reference":
        return ()
    backend = _try(forced) if forced in BACKENDS else None
    if isinstance(backend, Loaded) and device in backend.devices:
        return (backend.operations,)
    there = [name for name in BACKENDS if isinstance(other := _try(name), Loaded) and device in other.devices]
    if backend is None:
        near = get_close_matches(forced, (*BACKENDS, "reference"), n=1)
        why = f"there is no such backend{f'; did you mean {near[0]!r}?' if near else ''}"
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
        return why
    return loaded


def backends() -> dict[str, Loaded | Unavailable]:
    """Every backend by name: what it is, or why it cannot be used on this machine."""
    return {name: _try(name) for name in BACKENDS}


def forget() -> None:
    """Look for the backends again, for tests."""
    _try.cache_clear()
    _chain.cache_clear()
