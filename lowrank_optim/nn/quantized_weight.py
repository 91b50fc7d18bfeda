"""A weight matrix that is stored in 8 bits and trained: a tensor of codes and scales that says it is bfloat16.

Forward and backward decode it, one matrix at a time; autograd gives it an ordinary gradient of the nominal type, so that clipping,
accumulation, hooks and optimizers see what they always see. One rule holds for every operation of torch:

    reads     get the decoded values
    views     are live: `w[:10]`, `w.t()`, … decode when they are read, and code the whole weight anew when they are written to
    writes    decode in float32, run the operation on it, round stochastically to the new codes; or raise before anything has changed

`coded_operations` keeps it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lowrank_optim.kernels.counter_rng import derive_key
from lowrank_optim.nn.coded_operations import (
    Call,
    CodedTensor,
    by_rows,
    check_write,
    one_by_one,
    read,
    with_memory,
    write,
    written,
)
from lowrank_optim.quantization import dequantize_rows, quantize_rows

_aten = torch.ops.aten


class _Decoding(CodedTensor):
    """Every operation comes by here; those that read or write memory below the dispatcher are caught first."""

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

    def show(self, call: Call, like: Tensor) -> "WeightView":
        # Of the codes, not of the tensor that holds them now: `weight.data = …` leaves old views with the old codes, as elsewhere.
        assert isinstance(self.whole, QuantizedWeight)
        return WeightView(_detach(self.whole), (*self.calls, call), like.shape, like.stride(), like.storage_offset())

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
        coded = [value for value in written(func, args, kwargs) if isinstance(value, CodedTensor)]
        if not coded:
            return read(func, args, kwargs)
        check_write(func, coded[0])
        name = func._schema.name
        if name.startswith(("aten::_foreach_", "aten::_fused_")):
            return one_by_one(func, args, kwargs)
        if func.namespace == "lowrank_optim" and isinstance(args[0], QuantizedWeight):
            return by_rows(func, *args)
        return write(func, args, kwargs)


def _inference(memory: Tensor) -> AbstractContextManager[Any]:
    """Views of ordinary tensors are ordinary ones in inference mode, too."""
    return torch.inference_mode(memory.is_inference()) if torch.is_inference_mode_enabled() else nullcontext()


class QuantizedWeight(_Decoding):
    """An m×n matrix as int8 codes and one float32 scale for each 256 columns of a row (`quantization.row_codes`, signed).

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

    _whole: QuantizedWeight

    @staticmethod
    def __new__(
        cls, whole: QuantizedWeight, calls: tuple[Call, ...], size: Any, stride: Any, offset: Any
    ) -> "WeightView":
        with _inference(whole):
            self: WeightView = torch.Tensor._make_wrapper_subclass(
                cls, size, stride, offset, dtype=whole.dtype, device=whole.device
            )
        self._whole, self.calls = whole, calls
        return self

    @property
    def whole(self) -> QuantizedWeight:
        return self._whole

    def decoded(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.within(self.whole.decoded(dtype))

    def within(self, dense: Tensor) -> Tensor:
        for func, args, kwargs, index in self.calls:
            plain_args, plain_kwargs = tree_map(with_memory(dense), (args, kwargs))
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
    if torch.is_autocast_enabled(kind) and input.dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(kind)
        input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
        with torch.amp.autocast(kind, enabled=False):
            return _apply_linear(input, weight, bias)
    return _apply_linear(input, weight, bias)


def _apply_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    result: Tensor = _Linear.apply(x, weight, bias)
    return result


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


def _no_memory(weight: Tensor) -> str:
    return (
        f"a QuantizedWeight {tuple(weight.shape)} is stored as 8-bit codes and has no memory of type {weight.dtype} to be shared or "
        "replaced; read weight.decoded(), write with weight.copy_(values) under torch.no_grad()"
    )


def _refuse_memory(weight: Tensor, *_: Any, **__: Any) -> NoReturn:
    raise RuntimeError(_no_memory(weight))


def _storage(weight: Tensor) -> torch.UntypedStorage:
    """What `torch.compile` tells memory by. Copies into it would end the process, and resizing would say nothing."""
    message, storage = _no_memory(weight), weight.untyped_storage()

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(message)

    for name in ("copy_", "resize_"):
        setattr(storage, name, refuse)
    return storage


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
    Tensor.untyped_storage: _storage,
    Tensor.__dlpack__: _refuse_memory,
}
"""Functions that never reach the dispatcher."""
