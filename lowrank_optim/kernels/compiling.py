"""The step under `torch.compile`: it runs outside of the graph.

A step decides on the host, by counters that change every time, which matrices get a new subspace; its work is a few large operations
with kernels of their own, in which a compiler finds nothing to fuse. Tracing it would cost a graph break for every decision and a
recompilation for every count. The operations themselves (`torch.ops.lowrank_optim`) can stand in compiled code.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._compile import _disable_dynamo  # imports the compiler when it is first called, and not before


def outside_graph(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), never traced."""
    return _untraced(function, *args) if torch.compiler.is_compiling() else function(*args)


@_disable_dynamo
def _untraced(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)
