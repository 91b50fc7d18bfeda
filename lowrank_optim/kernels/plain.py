"""Arithmetic in the types that are written: without autograd, and without autocast."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_KINDS = ("cpu", "cuda", "xpu", "mps", "hpu")


def plain_arithmetic(function: Callable[P, T]) -> Callable[P, T]:
    """The decorated function runs without gradients, and without autocast, which would make matrix products in 16 bits."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        casting = [kind for kind in _KINDS if torch.is_autocast_enabled(kind)]
        with torch.no_grad():
            if not casting:
                return function(*args, **kwargs)
            with ExitStack() as stack:
                for kind in casting:
                    stack.enter_context(torch.autocast(kind, enabled=False))
                return function(*args, **kwargs)

    return run
