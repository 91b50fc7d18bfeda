"""What the modes of torch would do to a step, and what the host reads.

PlainModes, no_autograd_no_autocast    arithmetic in the types that are written
outside_graph              the step under `torch.compile`
cpu_tensor, as_python      small tensors of counters, keys and numbers; numbers that come as other types than Python's own
"""

from collections.abc import Callable
from functools import wraps
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # imports the compiler when it is first called, and not before

P = ParamSpec("P")
T = TypeVar("T")

_KINDS = ("cpu", "cuda", "xpu", "mps", "hpu")


class PlainModes:
    """A context without gradients and without autocast: `torch.no_grad` and `torch.autocast(enabled=False)` in two calls."""

    def __enter__(self) -> None:
        self._graded = torch.is_grad_enabled()
        self._casting = tuple(filter(torch.is_autocast_enabled, _KINDS))
        torch._C._set_grad_enabled(False)
        for kind in self._casting:
            torch.set_autocast_enabled(kind, False)

    def __exit__(self, *_: object) -> None:
        torch._C._set_grad_enabled(self._graded)
        for kind in self._casting:
            torch.set_autocast_enabled(kind, True)


def no_autograd_no_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """The decorated function runs without gradients, and without autocast, which would make matrix products in 16 bits."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with PlainModes():
            return function(*args, **kwargs)

    return run


def outside_graph(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), never traced.

    A step decides on the host, by counters that change every time, which matrices get a new subspace; its work is a few large
    operations with kernels of their own, in which a compiler finds nothing to fuse. Tracing it would cost a graph break for every
    decision and a recompilation for every count. The operations themselves (`torch.ops.lowrank_optim`) can stand in compiled code.
    """
    return _untraced(function, *args) if torch.compiler.is_compiling() else function(*args)


@_disable_dynamo
def _untraced(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def cpu_tensor(values: Any, dtype: torch.dtype | None) -> Tensor:
    """`torch.tensor(values, dtype=dtype)` on the CPU, whatever the default device is (which is a mode of torch functions, too)."""
    with torch._C.DisableTorchFunction():
        return torch.tensor(values, dtype=dtype)


def check_no_class(what: str, value: object) -> None:
    """Raise TypeError where a class came in place of an object."""
    if isinstance(value, type):
        raise TypeError(f"{what} is the class {value.__name__}; pass an object: {value.__name__}()")


def as_python(value: Any, keep_tensors: bool = False) -> Any:
    """Numbers, truth values and strings of numpy and others (0-d arrays and tensors, too) as Python's own, within tuples and lists.

    `torch.load(weights_only=True)` reads no others. Whatever else it is, is handed on.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        return value if keep_tensors or value.dim() else value.item()
    if type(value) in (tuple, list):
        return type(value)(as_python(each, keep_tensors) for each in value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (Integral, Real)):
        return int(value) if isinstance(value, Integral) else float(value)
    return value.tolist() if hasattr(value, "tolist") else value
