"""Any operation of torch on tensors that are stored as codes: reads, writes, and the views that their results are.

What is read, viewed or written is seen from the operation's schema and from what it returns, so that there is no list of operations.
The package's operations (`kernels`) write by parts of the rows, for which only some rows are decoded at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from lowrank_optim import kernels

_aten = torch.ops.aten

Call: TypeAlias = tuple[Any, Sequence[Any], Mapping[str, Any], int]
"""An operation, its arguments with `_MEMORY` for the tensor whose memory it shows, and which of its results is meant."""
_MEMORY = "memory"


class CodedMatrix(Protocol):
    """A whole matrix that is stored as codes."""

    codes: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """(rows, columns)"""

    @property
    def wide(self) -> torch.dtype:
        """The type in which writes are computed."""

    def decoded(self, dtype: torch.dtype | None = None, rows: slice | None = None) -> Tensor:
        """The matrix, or some of its rows, in its nominal type or another."""

    def store_(self, values: Tensor, nearest: bool) -> None:
        """Code the whole matrix anew."""

    def store_rows_(self, rows: slice, values: Tensor, key: int | None, start: int) -> None:
        """Code some rows anew."""


class CodedTensor(Tensor):
    """A tensor without memory of its own: a matrix that is stored as codes, or a view of one."""

    calls: tuple[Call, ...] = ()
    """The operations that make a view, one after the other; none for the whole matrix."""

    @property
    def whole(self) -> CodedMatrix:
        """The matrix."""
        raise NotImplementedError

    def decoded(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values, in the nominal type or another."""
        raise NotImplementedError

    def within(self, dense: Tensor) -> Tensor:
        """The memory of this tensor in the decoded whole matrix."""
        raise NotImplementedError

    def show(self, call: Call, like: Tensor) -> "CodedTensor":
        """The view of this tensor that an operation returns; `like` is its result on decoded values."""
        raise NotImplementedError


def with_memory(dense: Tensor) -> Callable[[Any], Any]:
    return lambda value: dense if value is _MEMORY else _decode(value)


def _decode(value: Any) -> Any:
    return value.decoded() if isinstance(value, CodedTensor) else value


def written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that an operation writes to, out of lists, too.

    Collectives do not say so in their schemas: those with an underscore at the end write to their first argument.
    """
    schema = func._schema
    found = []
    for i, argument in enumerate(schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        by_name = func.namespace == "c10d" and i == 0 and schema.name.endswith("_")
        if by_name or (argument.alias_info is not None and argument.alias_info.is_write):
            found += tree_leaves(value)
    return found


def check_write(func: Any, weight: CodedTensor) -> None:
    """Raise NotImplementedError for operations that write to memory later, or that bind a tensor to other memory."""
    if func.namespace in ("c10d", "_c10d_functional"):
        raise NotImplementedError(
            f"{func} writes to a QuantizedWeight {tuple(weight.shape)}, whose codes it cannot reach; send weight.codes and "
            "weight.scale, or a copy (weight.decoded()), and weight.copy_(values) what has arrived"
        )
    if torch.Tag.inplace_view in func.tags:
        raise NotImplementedError(
            f"{func} gives a QuantizedWeight {tuple(weight.shape)} another shape or memory in place, which is stored as 8-bit codes; "
            "use weight.copy_(values) for new values, or lowrank_optim.nn.dequantize_weights_(model)"
        )


def read(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation on decoded values. Results that share their memory are views, whatever the schema says."""
    coded = {
        id(value): (value, value.decoded()) for value in tree_leaves((args, kwargs)) if isinstance(value, CodedTensor)
    }
    plain_args, plain_kwargs = tree_map(
        lambda value: coded[id(value)][1] if id(value) in coded else value, (args, kwargs)
    )
    results, form = tree_flatten(func(*plain_args, **plain_kwargs))
    for index, result in enumerate(results):
        for source, dense in coded.values():
            if isinstance(result, Tensor) and _share_memory(result, dense):
                if result.dtype != dense.dtype or result.is_neg():
                    raise NotImplementedError(
                        f"{func} shows the bits of a {dense.dtype} matrix, but a QuantizedWeight is stored as 8-bit codes; use "
                        "weight.decoded()"
                    )
                results[index] = source.show(_call(source, func, args, kwargs, index), result)
    return tree_unflatten(results, form)


def _call(source: CodedTensor, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], index: int) -> Call:
    args, kwargs = tree_map(lambda value: _MEMORY if value is source else value, (args, kwargs))
    return func, args, kwargs, index


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.layout == torch.strided and a.untyped_storage()._cdata == b.untyped_storage()._cdata


def one_by_one(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Run an operation on lists (`_foreach_*_`, `_fused_*_`) for one parameter at a time: one decoded matrix in memory."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    count = len(args[0])

    def part(name: str, value: Any, i: int) -> Any:
        listed = isinstance(value, list | tuple) and len(value) == count
        return value[i : i + 1] if listed or (name == "scalars" and isinstance(value, Tensor)) else value

    for i in range(count):
        _run_one(func, {name: part(name, value, i) for name, value in given.items()})


def _run_one(func: Any, given: Mapping[str, Any]) -> None:
    coded = [value for value in written(func, (), given) if isinstance(value, CodedTensor)]
    if not coded:
        func(**given)
        return
    write(func, (), given)
    # Autograd counts the writes of other operations, but leaves those on lists to their kernels.
    torch.autograd.graph.increment_version([value for value in coded if not value.is_inference()])


def write(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation that changes weights on their values in float32 and code the changed weights anew.

    Plain tensors of a weight's nominal type become float32, too, for the operation's sake; those that it changes are copied back.
    """
    leaves = {id(value): value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
    changed = {id(value): leaves[id(value)] for value in written(func, args, kwargs) if isinstance(value, Tensor)}
    weights = {id(value.whole.codes): value.whole for value in changed.values() if isinstance(value, CodedTensor)}
    wide = next(iter(weights.values())).wide
    nominal = {weight.dtype for weight in weights.values()}
    matrices = {name: weight.decoded(wide) for name, weight in weights.items()}

    def dense(value: Tensor) -> Tensor:
        if isinstance(value, CodedTensor):
            return value.within(matrices[id(value.whole.codes)]) if id(value) in changed else value.decoded(wide)
        return value.to(wide) if value.dtype in nominal else value

    plain = {name: dense(value) for name, value in leaves.items()}
    plain_args, plain_kwargs = tree_map(lambda value: plain.get(id(value), value), (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    for name, value in changed.items():
        if plain[name].shape != value.shape:
            raise RuntimeError(
                f"{func} needs a result of shape {tuple(plain[name].shape)}; got a {type(value).__name__} {tuple(value.shape)}, "
                "which cannot be resized"
            )
    given = [value for value in leaves.values() if not isinstance(value, CodedTensor)]
    nearest = _moves(func, args) and any(value.dtype in (torch.bfloat16, torch.float16) for value in given)
    for name, weight in weights.items():
        weight.store_(matrices[name], nearest)
    for name, value in changed.items():
        if not isinstance(value, CodedTensor) and plain[name] is not value:
            value.copy_(plain[name])
    own = {id(plain[name]): value for name, value in changed.items()}
    return tree_map(lambda value: own.get(id(value), value), result)


def _moves(func: Any, args: Sequence[Any]) -> bool:
    """Whether an operation stores values as they come. Those of 16 bits are coded to nearest: w.copy_(w.bfloat16()) would drift."""
    adds = len(args) > 3 and args[3] is True  # index_put_ and put_, accumulate
    return func in _MOVES and not adds


_MOVES = {
    _aten.copy_.default,
    _aten._foreach_copy_.default,
    _aten.index_copy_.default,
    _aten.index_put_.default,
    _aten.masked_scatter_.default,
    _aten.put_.default,
    _aten.scatter_.src,
}


def by_rows(func: Any, weight: CodedMatrix, *args: Any) -> None:
    """Run one of the package's in-place operations on some rows at a time, in float32, and code them again, rounded stochastically.

    Every tensor with the weight's number of rows is taken by rows, state (moments, codes, scales) included: it is contiguous, so
    that its rows are views.
    """
    schema = func._schema.arguments[1:]
    rounding = next(value for value, argument in zip(args, schema, strict=False) if argument.name == "rounding")
    key, (start, *_) = kernels.unpack_key(rounding)
    rows, cols = weight.shape
    for chunk in kernels.row_chunks(rows, cols):
        first = chunk.start * cols
        parts = []
        for value, argument in zip(args, schema, strict=False):  # without what rounding drops: nothing is kept of it
            if argument.name == "rounding":
                value = None  # nothing is rounded before it is coded
            elif argument.name == "noise" and value is not None:
                value = value + kernels.cpu_tensor([0, 0, first], torch.int64)
            elif isinstance(value, Tensor) and _has_rows(argument.name, value, rows):
                value = value[chunk]
            parts.append(value)
        values = weight.decoded(torch.float32, chunk)
        func(values, *parts)
        weight.store_rows_(chunk, values, key, start + first)


_WHOLE = ("right", "subtract_right", "scalars", "keep", "ok", "col_scale")


def _has_rows(name: str, value: Tensor, rows: int) -> bool:
    """Whether an argument is cut with the rows of the weight; φ may be for rows, for columns or for the whole."""
    return name not in _WHOLE and (name != "phi" or value.shape[-2] == rows > 1)
