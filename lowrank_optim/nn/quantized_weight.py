"""A weight matrix that is stored in 8 bits and trained: a tensor of codes and scales that says it is bfloat16.

Forward and backward decode it, one matrix at a time; autograd gives it an ordinary gradient of the nominal type, so that clipping,
accumulation, hooks and optimizers see what they always see. One rule holds for every operation of torch:

    reads     get the decoded values
    views     are live: `w[:10]`, `w.t()`, … decode when they are read, and code the whole weight anew when they are written to
    writes    decode in float32, run the operation on it, round stochastically to the new codes; or raise before anything has changed

What is read, viewed or written is seen from the operation's schema and from what it returns, so that there is no list of operations.
The package's operations (`kernels`) write by parts of the rows, for which only some rows are decoded at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NoReturn, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from lowrank_optim import kernels
from lowrank_optim.kernels.counter_rng import derive_key
from lowrank_optim.quantization import dequantize_rows, quantize_rows

_aten = torch.ops.aten


class _Decoding(Tensor):
    """A tensor without memory of its own. Operations that read or write memory below the dispatcher are caught here."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        run = _BELOW_DISPATCH.get(func, func)
        with torch._C.DisableTorchFunctionSubclass():
            return run(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(argument.alias_info for argument in func._schema.arguments):
            parts = func.decompose(*args, **kwargs)  # inference mode hands over operations that are made of others
            if parts is not NotImplemented:
                return parts
        if func in _WHOLE_WEIGHT and isinstance(args[0], QuantizedWeight):
            return _WHOLE_WEIGHT[func](*args, **kwargs)
        if func is _aten.copy_.default and _same_form(*args[:2]):
            return args[0].copy_codes_(args[1])
        written = [value for value in _written(func, args, kwargs) if isinstance(value, _CODED)]
        if not written:
            return _read(func, args, kwargs)
        _check_write(func, written[0])
        name = func._schema.name
        if name.startswith(("aten::_foreach_", "aten::_fused_")):
            return _one_by_one(func, args, kwargs)
        if func.namespace == "lowrank_optim" and isinstance(args[0], QuantizedWeight):
            return _by_rows(func, *args)
        return _write(func, args, kwargs)


def _inference(memory: Tensor) -> AbstractContextManager[Any]:
    """Views of ordinary tensors are ordinary ones in inference mode, too."""
    return torch.inference_mode(memory.is_inference()) if torch.is_inference_mode_enabled() else nullcontext()


class QuantizedWeight(_Decoding):
    """An m×n matrix as int8 codes and one float32 scale for each 256 columns of a row (`quantization.rows`, signed).

    Every write rounds stochastically, so that updates far below a level count on average, with a key that depends on the new values
    and on the number of writes so far: processes that write the same values, get the same codes. A value that comes rounded to 16
    bits (`w.copy_(bfloat16)`) is coded to nearest. A code whose value has not changed stays, unless its block gets a new scale.

    Memory: m·(n + 4⌈n/256⌉) bytes.
    """

    rounds_stochastically: ClassVar[bool] = True
    """Updates below half a level would be lost otherwise: optimizers give every write a rounding key."""

    codes: Tensor
    scale: Tensor
    writes: list[int]
    """How many writes have been rounded stochastically: one number, shared with tensors that share the codes."""

    @staticmethod
    def __new__(
        cls,
        codes: Tensor,
        scale: Tensor,
        dtype: torch.dtype,
        requires_grad: bool = False,
        *,
        writes: list[int] | None = None,
    ) -> "QuantizedWeight":
        with _inference(codes):
            self: QuantizedWeight = torch.Tensor._make_wrapper_subclass(
                cls, codes.shape, strides=codes.stride(), dtype=dtype, device=codes.device, requires_grad=requires_grad
            )
        self.codes, self.scale, self.writes = codes, scale, [0] if writes is None else writes
        return self

    @classmethod
    def from_float(cls, weight: Tensor) -> "QuantizedWeight":
        """Code a matrix, to nearest. Coding what `decoded` returned in float32 gives the same codes."""
        codes, scale = quantize_rows(weight.detach(), 8, True)
        return cls(codes, scale, weight.dtype)

    @property
    def whole(self) -> "QuantizedWeight":
        return self

    @property
    def wide(self) -> torch.dtype:
        """The type in which writes are computed."""
        return torch.promote_types(self.dtype, torch.float32)

    def decoded(self, dtype: torch.dtype | None = None, rows: slice | None = None) -> Tensor:
        """The matrix, or some of its rows, in its nominal type or another."""
        codes, scale = (self.codes, self.scale) if rows is None else (self.codes[rows], self.scale[rows])
        return dequantize_rows(codes, scale, 8, True, dtype=dtype or self.dtype)

    def within(self, dense: Tensor) -> Tensor:
        """The memory of this tensor in a decoded whole weight: all of it."""
        return dense

    def store_(self, values: Tensor, nearest: bool) -> None:
        """Code the whole matrix anew."""
        key = None
        if not (nearest or values.is_meta):
            bits = values.view(torch.int32 if values.dtype == torch.float32 else torch.int64)
            key = derive_key(derive_key(0, int(bits.sum())), self.writes[0])
            self.writes[0] += 1
        self.store_rows_(slice(None), values, key, 0)

    def store_rows_(self, rows: slice, values: Tensor, key: int | None, start: int) -> None:
        """Code some rows anew, stochastically with a key; `start` is the row-major index of their first element."""
        codes, scale = quantize_rows(values, 8, True, key=key, start=start)
        self.codes[rows].copy_(codes)
        self.scale[rows].copy_(scale)

    def copy_codes_(self, source: "QuantizedWeight") -> "QuantizedWeight":
        """Take over the codes of a weight of the same shape."""
        self.codes.copy_(source.codes)
        self.scale.copy_(source.scale)
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantizedWeight({tuple(self.shape)}, {self.dtype}, device={self.device}, requires_grad={self.requires_grad})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale"], self.dtype

    @staticmethod
    def __tensor_unflatten__(parts: Mapping[str, Tensor], dtype: torch.dtype, *_: Any) -> "QuantizedWeight":
        return QuantizedWeight(parts["codes"], parts["scale"], dtype)


class WeightView(_Decoding):
    """A view of an 8-bit weight: the operations that make it, which are repeated on the decoded weight for each read and write.

    Memory: none. A copy (`copy.deepcopy`, pickle) is a plain tensor.
    """

    whole: QuantizedWeight
    calls: "tuple[_Call, ...]"

    @staticmethod
    def __new__(
        cls, whole: QuantizedWeight, calls: "tuple[_Call, ...]", size: Any, stride: Any, offset: Any
    ) -> "WeightView":
        with _inference(whole):
            self: WeightView = torch.Tensor._make_wrapper_subclass(
                cls, size, stride, offset, dtype=whole.dtype, device=whole.device
            )
        self.whole, self.calls = whole, calls
        return self

    def decoded(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values, in the nominal type or another."""
        return self.within(self.whole.decoded(dtype))

    def within(self, dense: Tensor) -> Tensor:
        """The memory of this tensor in a decoded whole weight."""
        for func, args, kwargs, index in self.calls:
            plain_args, plain_kwargs = tree_map(_with_memory(dense), (args, kwargs))
            dense = tree_leaves(func(*plain_args, **plain_kwargs))[index]
        return dense

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["whole"], (self.calls, self.storage_offset())

    @staticmethod
    def __tensor_unflatten__(parts: Mapping[str, Any], context: Any, size: Any, stride: Any) -> "WeightView":
        calls, offset = context
        return WeightView(parts["whole"], calls, size, stride, offset)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"WeightView({tuple(self.shape)}, {self.dtype}, device={self.device}) of {self.whole!r}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = memo.setdefault(id(self), self.decoded())
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.decoded().__reduce_ex__(protocol)


def _same_form(target: Tensor, source: Tensor) -> bool:
    whole = isinstance(target, QuantizedWeight) and isinstance(source, QuantizedWeight)
    return whole and target.shape == source.shape


_CODED = (QuantizedWeight, WeightView)
_Call: TypeAlias = tuple[Any, Sequence[Any], Mapping[str, Any], int]
"""An operation, its arguments with `_MEMORY` for the tensor whose memory it shows, and which of its results is meant."""
_MEMORY = "memory"


def _with_memory(dense: Tensor) -> Callable[[Any], Any]:
    return lambda value: dense if value is _MEMORY else _decode(value)


def _decode(value: Any) -> Any:
    return value.decoded() if isinstance(value, _CODED) else value


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
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


def _check_write(func: Any, weight: QuantizedWeight | WeightView) -> None:
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


def _read(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation on decoded values. Results that share their memory are views, whatever the schema says."""
    coded = {id(value): (value, value.decoded()) for value in tree_leaves((args, kwargs)) if isinstance(value, _CODED)}
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
                results[index] = _view(source, (func, args, kwargs, index), result)
    return tree_unflatten(results, form)


def _view(source: QuantizedWeight | WeightView, call: _Call, like: Tensor) -> WeightView:
    func, args, kwargs, index = call
    args, kwargs = tree_map(lambda value: _MEMORY if value is source else value, (args, kwargs))
    calls = (*(source.calls if isinstance(source, WeightView) else ()), (func, args, kwargs, index))
    # Of the codes, not of the tensor that holds them now: `weight.data = …` leaves old views with the old codes, as elsewhere.
    return WeightView(_detach(source.whole), calls, like.shape, like.stride(), like.storage_offset())


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.layout == torch.strided and a.untyped_storage()._cdata == b.untyped_storage()._cdata


def _one_by_one(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
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
    written = [value for value in _written(func, (), given) if isinstance(value, _CODED)]
    if not written:
        func(**given)
        return
    _write(func, (), given)
    # Autograd counts the writes of other operations, but leaves those on lists to their kernels.
    torch.autograd.graph.increment_version([value for value in written if not value.is_inference()])


def _write(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation that changes weights on their values in float32 and code the changed weights anew.

    Plain tensors of a weight's nominal type become float32, too, for the operation's sake; those that it changes are copied back.
    """
    leaves = {id(value): value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
    written = {id(value): leaves[id(value)] for value in _written(func, args, kwargs) if isinstance(value, Tensor)}
    weights = {id(value.whole.codes): value.whole for value in written.values() if isinstance(value, _CODED)}
    wide = next(iter(weights.values())).wide
    nominal = {weight.dtype for weight in weights.values()}
    matrices = {name: weight.decoded(wide) for name, weight in weights.items()}

    def dense(value: Tensor) -> Tensor:
        if isinstance(value, _CODED):
            return value.within(matrices[id(value.whole.codes)]) if id(value) in written else value.decoded(wide)
        return value.to(wide) if value.dtype in nominal else value

    plain = {name: dense(value) for name, value in leaves.items()}
    plain_args, plain_kwargs = tree_map(lambda value: plain.get(id(value), value), (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    for name, value in written.items():
        if plain[name].shape != value.shape:
            raise RuntimeError(
                f"{func} needs a result of shape {tuple(plain[name].shape)}; got a {type(value).__name__} {tuple(value.shape)}, "
                "which cannot be resized"
            )
    given = [value for value in leaves.values() if not isinstance(value, _CODED)]
    nearest = _moves(func, args) and any(value.dtype in (torch.bfloat16, torch.float16) for value in given)
    for name, weight in weights.items():
        weight.store_(matrices[name], nearest)
    for name, value in written.items():
        if not isinstance(value, _CODED) and plain[name] is not value:
            value.copy_(plain[name])
    own = {id(plain[name]): value for name, value in written.items()}
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


class _Linear(torch.autograd.Function):
    """x Wᵀ + b with W decoded once in forward and once in backward, and kept in neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.linear(x, weight.decoded(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        grad_x = grad @ weight.decoded(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = grad_bias = None
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.mT @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, QuantizedWeight):
        return F.linear(input, weight, bias)
    kind = input.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
        with torch.amp.autocast(kind, enabled=False):
            return _apply_linear(input, weight, bias)
    return _apply_linear(input, weight, bias)


def _apply_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    result: Tensor = _Linear.apply(x, weight, bias)
    return result


def _by_rows(func: Any, weight: QuantizedWeight, *args: Any) -> None:
    """Run one of the package's in-place operations on some rows at a time, in float32, and code them again, rounded stochastically.

    Every tensor with the weight's number of rows is taken by rows, state (moments, codes, scales) included: it is contiguous, so
    that its rows are views.
    """
    schema = func._schema.arguments[1:]
    rounding = next(value for value, argument in zip(args, schema, strict=True) if argument.name == "rounding")
    key, (start, *_) = kernels.key_of(rounding)
    rows, cols = weight.shape
    for chunk in kernels.row_chunks(rows, cols):
        first = chunk.start * cols
        parts = []
        for value, argument in zip(args, schema, strict=True):
            if argument.name == "rounding":
                value = None  # nothing is rounded before it is coded
            elif argument.name == "noise" and value is not None:
                value = value + kernels.host_tensor([0, 0, first], torch.int64)
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


def _moved(
    weight: QuantizedWeight, dtype: torch.dtype | None = None, device: Any = None, **rest: Any
) -> QuantizedWeight:
    """`to`, with another device or nominal type; layout and memory format stay."""
    kept = {name: value for name, value in rest.items() if name in ("non_blocking",)}
    codes, scale = (tensor.to(device=device or tensor.device, **kept) for tensor in (weight.codes, weight.scale))
    if codes is weight.codes:  # `_to_copy` promises a copy
        codes, scale = codes.clone(), scale.clone()
    return QuantizedWeight(codes, scale, dtype or weight.dtype, writes=[*weight.writes])


def _clone(weight: QuantizedWeight, *, memory_format: Any = None) -> QuantizedWeight:
    return QuantizedWeight(weight.codes.clone(), weight.scale.clone(), weight.dtype, writes=[*weight.writes])


def _detach(weight: QuantizedWeight) -> QuantizedWeight:
    return QuantizedWeight(weight.codes, weight.scale, weight.dtype, writes=weight.writes)


def _empty_like(weight: QuantizedWeight, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Tensor:
    return torch.empty(weight.shape, dtype=dtype or weight.dtype, device=device or weight.device)


_WHOLE_WEIGHT: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _detach,
    _aten.alias.default: _detach,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _moved,
    _aten.empty_like.default: _empty_like,
}
"""Operations whose result keeps the codes, or needs no values."""


@torch.no_grad()
def _set_data(weight: QuantizedWeight | WeightView, value: Tensor) -> None:
    """`weight.data = value`: a weight gets new codes, of its own if the value is a plain tensor."""
    if isinstance(weight, WeightView):
        _refuse_memory(weight)
    if not isinstance(value, QuantizedWeight):
        if value.shape != weight.shape or not value.is_floating_point():
            raise ValueError(
                f"data of a QuantizedWeight {tuple(weight.shape)} {weight.dtype} was set to {tuple(value.shape)} {value.dtype}; "
                "needed: a floating tensor of the same shape, or a QuantizedWeight"
            )
        coded: Any = weight.detach().clone().to(value.device, value.dtype)
        value = coded.copy_(value)
    assert isinstance(value, QuantizedWeight)
    Tensor.data.__set__(weight, value)  # type: ignore[attr-defined]
    weight.codes, weight.scale = value.codes, value.scale


def _share(weight: QuantizedWeight | WeightView) -> QuantizedWeight | WeightView:
    weight.whole.codes.share_memory_()
    weight.whole.scale.share_memory_()
    return weight


def _is_shared(weight: QuantizedWeight | WeightView) -> bool:
    shared: bool = weight.whole.codes.is_shared()
    return shared


def _refuse_memory(weight: Tensor, *_: Any, **__: Any) -> NoReturn:
    raise RuntimeError(
        f"a QuantizedWeight {tuple(weight.shape)} is stored as 8-bit codes and has no memory of type {weight.dtype} to be shared or "
        "replaced; read weight.decoded(), write with weight.copy_(values) under torch.no_grad()"
    )


_BELOW_DISPATCH: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    _aten.set_data: _set_data,
    _aten.set_data.default: _set_data,
    Tensor.share_memory_: _share,
    Tensor.is_shared: _is_shared,
    Tensor.apply_: _refuse_memory,
    Tensor._typed_storage: _refuse_memory,
    Tensor.storage: _refuse_memory,
    Tensor.__dlpack__: _refuse_memory,
}
"""Functions that never reach the dispatcher."""
