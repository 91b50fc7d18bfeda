"""Operators on tensors without numbers, fast: what an operator makes of given shapes is worked out once.

torch finds the shape of a result in Python for many operators, which is most of the time that a simulation takes; a model repeats the
same ones in every layer. Results are made anew each time, so that every one is an allocation of its own; views are left to torch.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

META = torch.device("meta")
_LIMIT = 100_000
_made: dict[Any, Any] = {}


class _Uncertain(Exception):
    """Arguments that no key stands for."""


@cache
def _returns(func: Any) -> tuple[int, ...] | str | None:
    """What an operator gives back: "new" tensors, positions of the arguments that it wrote to, or None: it has to be run.

    Views have to be run, and so do operators that change the shape of an argument.
    """
    schema = func._schema
    if func.namespace == "profiler" or torch.Tag.inplace_view in func.tags or schema.is_mutable is None:
        return None
    written = {}
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written[frozenset(argument.alias_info.before_set)] = position
    results = []
    for result in schema.returns:
        if result.alias_info is None:
            if not str(result.type).startswith(("Tensor", "List[Tensor]")):
                return None
            continue
        if not result.alias_info.is_write:
            return None
        results.append(written[frozenset(result.alias_info.before_set)])
    if written:
        return tuple(results) if len(results) == len(schema.returns) else None
    aliased = any(argument.alias_info is not None for argument in schema.arguments)
    return None if aliased or not results or func._schema.name in _RUN else "new"


# What they return may be an argument itself, or depends on values.
_RUN = frozenset(
    f"aten::{name}" for name in ("lift_fresh", "_local_scalar_dense", "is_nonzero", "nonzero", "_unsafe_view", "detach")
)


def grouped_product(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None
) -> Tensor:
    """The form of `aten._grouped_mm`, whose own function for meta tensors refuses all types but bfloat16.

    Columns of both, or rows of a against matrices b, or the other way round, are in groups, one for each expert.
    """
    groups = offs.numel() if offs is not None else a.shape[0]
    stacked = (groups,) if a.dim() == b.dim() else ()
    return torch.empty(*stacked, a.shape[-2], b.shape[-1], dtype=out_dtype or a.dtype, device=META)


_OWN: dict[Any, Any] = {}
if hasattr(torch.ops.aten, "_grouped_mm"):
    _OWN[torch.ops.aten._grouped_mm.default] = grouped_product


def run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """func(*args, **kwargs), where at least one tensor, or the device that is asked for, is without numbers."""
    returns, func = _returns(func), _OWN.get(func, func)
    if returns is None:
        return func(*args, **kwargs)
    try:
        options = tuple([(name, _key(value)) for name, value in kwargs.items()])
        key = (func, torch.get_default_dtype(), tuple([_key(a) for a in args]), options)
        known = _made.get(key)
    except (_Uncertain, TypeError):
        return func(*args, **kwargs)
    if known is None:
        out = func(*args, **kwargs)
        if len(_made) >= _LIMIT:
            _made.clear()
        if returns != "new":
            _made[key] = True
        elif all(t is None or t.device == META for t in (out if isinstance(out, (tuple, list)) else (out,))):
            _made[key] = _form(out)
        return out
    if isinstance(returns, str):
        return _make(known)
    names = func._schema.arguments
    back = [args[i] if i < len(args) else kwargs[names[i].name] for i in returns]
    return back[0] if len(back) == 1 else tuple(back) if back else None


def nonzero(tensor: Tensor) -> Tensor:
    """What `tensor.nonzero()` returns at most: the places of all elements."""
    return torch.empty((tensor.numel(), tensor.dim()), dtype=torch.int64, device=META)


def _key(item: Any) -> Any:
    """What decides the result's shape, in a form that can be looked up."""
    if isinstance(item, Tensor):
        if item.layout is not torch.strided or type(item) not in (Tensor, torch.nn.Parameter):
            raise _Uncertain
        return (item.shape, item.stride(), item.dtype, item.is_meta)
    if isinstance(item, (list, tuple)):
        return tuple([_key(part) for part in item])
    return (type(item), item)  # 1, 1.0 and True are equal, but not alike


def _form(out: Any) -> Any:
    if out is None:  # such as the gradient of a scale that a normalisation does not have
        return None
    if isinstance(out, Tensor):
        return (out.shape, out.stride(), out.dtype)
    return (type(out), [_form(part) for part in out])


def _make(form: Any) -> Any:
    if form is None:
        return None
    if len(form) == 3:
        return torch.empty_strided(form[0], form[1], dtype=form[2], device=META)
    kind, parts = form
    return kind(map(_make, parts))
