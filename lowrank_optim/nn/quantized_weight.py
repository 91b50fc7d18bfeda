"""A weight matrix that is stored in 8 bits and trained: a tensor of codes and scales that says it is bfloat16.

Forward and backward decode it, one matrix at a time; autograd gives it an ordinary gradient of the nominal type, so that clipping,
accumulation, hooks and optimizers see what they always see. The package's operations (`kernels`) write to it by parts of the rows:
decode in float32, update, code again. Whoever else reads it gets the decoded values; whoever else writes in place gets an error.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from lowrank_optim import kernels
from lowrank_optim.quantization import dequantize_rows, quantize_rows

_aten = torch.ops.aten


class QuantizedWeight(Tensor):
    """An m×n matrix as int8 codes and one float32 scale for each 256 columns of a row (`quantization.rows`, signed).

    Memory: m·(n + 4⌈n/256⌉) bytes.
    """

    rounds_stochastically: ClassVar[bool] = True
    """Updates below half a level would be lost otherwise: optimizers give every write a rounding key."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(
        cls, codes: Tensor, scale: Tensor, dtype: torch.dtype, requires_grad: bool = False
    ) -> "QuantizedWeight":
        self: QuantizedWeight = torch.Tensor._make_wrapper_subclass(
            cls, codes.shape, strides=codes.stride(), dtype=dtype, device=codes.device, requires_grad=requires_grad
        )
        self.codes, self.scale = codes, scale
        return self

    @classmethod
    def from_float(cls, weight: Tensor) -> "QuantizedWeight":
        """Code a matrix, to nearest. Coding what `decoded` returned in float32 gives the same codes."""
        codes, scale = quantize_rows(weight.detach(), 8, True)
        return cls(codes, scale, weight.dtype)

    def decoded(self, dtype: torch.dtype | None = None, rows: slice | None = None) -> Tensor:
        """The matrix, or some of its rows, in its nominal type or another."""
        codes, scale = (self.codes, self.scale) if rows is None else (self.codes[rows], self.scale[rows])
        return dequantize_rows(codes, scale, 8, True, dtype=dtype or self.dtype)

    def store_rows_(self, rows: slice, values: Tensor, key: int | None, start: int) -> None:
        """Code some rows anew, stochastically with a key; `start` is the row-major index of their first element."""
        codes, scale = quantize_rows(values, 8, True, key=key, start=start)
        self.codes[rows].copy_(codes)
        self.scale[rows].copy_(scale)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantizedWeight({tuple(self.shape)}, {self.dtype}, device={self.device}, requires_grad={self.requires_grad})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale"], self.dtype

    @staticmethod
    def __tensor_unflatten__(parts: Mapping[str, Tensor], dtype: torch.dtype, *_: Any) -> "QuantizedWeight":
        return QuantizedWeight(parts["codes"], parts["scale"], dtype)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _OVERRIDES:
            return _OVERRIDES[func](*args, **kwargs)
        if func.namespace == "lowrank_optim" and isinstance(args[0], cls) and func._schema.is_mutable:
            return _by_rows(func, *args)
        written = [
            a for a, s in zip(args, func._schema.arguments, strict=False) if s.alias_info and s.alias_info.is_write
        ]
        if any(isinstance(argument, cls) for argument in written):
            raise NotImplementedError(
                f"{func} writes to a QuantizedWeight {tuple(args[0].shape)} in place, which is stored as 8-bit codes; use "
                "weight.copy_(values), an optimizer of lowrank_optim, or lowrank_optim.nn.dequantize_weights_(model)"
            )
        return func(*tree_map(_decode, tuple(args)), **tree_map(_decode, dict(kwargs)))


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
        return F.linear(input, _decode(weight), bias)
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


def _decode(value: Any) -> Any:
    return value.decoded() if isinstance(value, QuantizedWeight) else value


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


def _copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(target, QuantizedWeight):
        return target.copy_(_decode(source))
    if not isinstance(source, QuantizedWeight):
        source = QuantizedWeight.from_float(source.to(torch.float32).expand(target.shape))
    target.codes.copy_(source.codes)
    target.scale.copy_(source.scale)
    return target


def _moved(
    weight: QuantizedWeight, dtype: torch.dtype | None = None, device: Any = None, **rest: Any
) -> QuantizedWeight:
    """`to`, with another device or nominal type; layout and memory format stay."""
    kept = {name: value for name, value in rest.items() if name in ("non_blocking",)}
    codes, scale = (tensor.to(device=device or tensor.device, **kept) for tensor in (weight.codes, weight.scale))
    if codes is weight.codes:  # `_to_copy` promises a copy
        codes, scale = codes.clone(), scale.clone()
    return QuantizedWeight(codes, scale, dtype or weight.dtype)


def _clone(weight: QuantizedWeight, *, memory_format: Any = None) -> QuantizedWeight:
    return QuantizedWeight(weight.codes.clone(), weight.scale.clone(), weight.dtype)


def _detach(weight: QuantizedWeight) -> QuantizedWeight:
    return QuantizedWeight(weight.codes, weight.scale, weight.dtype)


def _empty_like(weight: QuantizedWeight, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Tensor:
    return torch.empty(weight.shape, dtype=dtype or weight.dtype, device=device or weight.device)


_OVERRIDES: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _detach,
    _aten.alias.default: _detach,
    _aten.clone.default: _clone,
    _aten.copy_.default: _copy_,
    _aten._to_copy.default: _moved,
    _aten.empty_like.default: _empty_like,
}
