"""Tensors without numbers that pass for tensors on a device, and a record of the memory that they would take.

Every tensor of the device is a meta tensor: torch's own shape functions run, nothing is allocated, and no device has to exist.
Two modes make code take the path that it takes on the real device:

    `Disguise`   at the level of torch functions: a meta tensor says that it is on the device ("cuda:0"), and what is made or moved
                 there becomes a meta tensor. Attention is the kernel that the device would choose.
    `Recorder`   at the level of operators: every storage that comes or goes is an event of a `Timeline`. Tensors of the host, such as
                 an optimizer's `step`, are real and keep their values. A value that is read from a tensor without numbers is
                 answered as for a healthy run: true, and finite (1).

The values of integer tensors made on a CPU that is itself the device (`arange`) are real up to `SMALL_INTEGERS`, for code that
shuffles layers by them.
"""

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_optim.planner.simulation import shapes
from lowrank_optim.planner.simulation.replay import Replays, repeated
from lowrank_optim.planner.simulation.shapes import META
from lowrank_optim.planner.simulation.timeline import Block, Moment, Timeline
from lowrank_optim.step.nonfinite import SkippedUpdates

SMALL_INTEGERS = 4096
_aten = torch.ops.aten
_READS = (_aten._local_scalar_dense.default, _aten.is_nonzero.default, _aten.equal.default)


class DataNeeded(Exception):
    """The forward pass reads a value of a tensor without numbers."""


def is_bare(tensor: Tensor) -> bool:
    """Whether this is a tensor without numbers, whatever it says itself."""
    with torch._C.DisableTorchFunction():
        return tensor.is_meta


def unwrapped(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the memory: those within a wrapper subclass, or the tensor itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from unwrapped(getattr(tensor, name))


def storage_bytes(tensor: Tensor) -> int:
    """Bytes of the storages of a tensor."""
    return sum(inner.untyped_storage().nbytes() for inner in unwrapped(tensor))


def bare(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor without its numbers, of a floating type in `dtype`."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        inner = {name: bare(getattr(tensor, name)) for name in names}
        made: Tensor = type(tensor).__tensor_unflatten__(inner, context, tensor.size(), tensor.stride())  # type: ignore[attr-defined]
        return made
    dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=META)


def backward(loss: Tensor) -> None:
    """`loss.backward()` whose hooks run in disguise, too: torch takes a mode away while it runs a function of its own."""
    _engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


class Recorder(TorchDispatchMode):
    """Writes the life of storages into a timeline.

    Attributes:
        moment: when it is now; set by the simulation.
        may_read: whether values of tensors without numbers may be read: in an optimizer step, where the answer is known.
        counts_host: whether real tensors count, because the host is the device.
    """

    def __init__(self, counts_host: bool) -> None:
        super().__init__()
        self.timeline = Timeline()
        self.moment = Moment("", "building", "")
        self.may_read = True
        self.counts_host = counts_host
        self._blocks: dict[int, Block] = {}

    def claim(self, tensor: Tensor, kind: str, owner: str, part: str = "", rows: int = 0) -> None:
        """Say what a tensor's storage is (see `Block`); one that is not known yet enters the record now."""
        for inner in unwrapped(tensor):
            if self.counts(inner):
                self.watch(inner)
                if (block := self._blocks.get(inner.untyped_storage()._cdata)) is not None:
                    block.kind, block.owner, block.part, block.rows = kind, owner, part, rows

    def watch(self, tensor: Tensor) -> None:
        """Record a storage from now until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._blocks or not (size := storage.nbytes()):
            return
        block = self._blocks[key] = Block(size, self.moment.layer, self._in_forward())
        self.timeline.events.append((block, True, self.moment))
        weakref.finalize(storage, self._freed, key)

    def block_of(self, tensor: Tensor) -> Block | None:
        """The record of a tensor's storage, if there is one."""
        with torch._C.DisableTorchFunction():
            return self._blocks.get(tensor.untyped_storage()._cdata)

    def _in_forward(self) -> bool:
        """Whether this is a forward pass; those that a checkpoint repeats within backward enable gradients, backward does not."""
        return self.moment.phase == "forward" or (self.moment.phase == "backward" and torch.is_grad_enabled())

    def _freed(self, key: int) -> None:
        block = self._blocks.pop(key, None)
        if block is not None:
            block.outlived = not self._in_forward()
            self.timeline.events.append((block, False, self.moment))

    def counts(self, tensor: Tensor) -> bool:
        """Whether a tensor's memory is the device's."""
        return self.counts_host or is_bare(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a wrapper: its own operators come here one by one
        # In backward, the disguise would hide from this function, too, what it looks for.
        with torch._C.DisableTorchFunction():
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        given = list(_tensors(args)) + (list(_tensors(kwargs.values())) if kwargs else [])
        without_numbers = [tensor for tensor in given if tensor.is_meta]
        if without_numbers and func in _READS:
            return self._answer(func, without_numbers[0])
        if without_numbers and len(without_numbers) < len(given):
            # All on one device; but scalars may lie on the host, and operators of packages take short vectors there on purpose.
            least = 1 if func.namespace == "aten" else 2
            args, kwargs = _all_meta(args, least), {name: _all_meta(value, least) for name, value in kwargs.items()}
        known = {tensor.untyped_storage()._cdata for tensor in given}
        on_meta = without_numbers or (not given and kwargs.get("device") == META)
        if without_numbers and func is _aten.nonzero.default and self.may_read:
            out: Any = shapes.nonzero(without_numbers[0])
        else:
            out = shapes.run(func, args, kwargs) if on_meta else func(*args, **kwargs)
        for tensor in _tensors(out if isinstance(out, (tuple, list)) else (out,)):
            if self.counts(tensor) and tensor.untyped_storage()._cdata not in known:
                self.watch(tensor)
        return out

    def _answer(self, func: Any, tensor: Tensor) -> Any:
        if not self.may_read:
            raise DataNeeded(f"{func} on a tensor of shape {tuple(tensor.shape)}")
        if func is not _aten._local_scalar_dense.default or tensor.dtype == torch.bool:
            return True
        return 1.0 if tensor.is_floating_point() else 1


def _tensors(items: Any) -> Iterator[Tensor]:
    """The tensors among arguments or results, which nest at most in lists."""
    for item in items:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            yield from _tensors(item)


def _all_meta(item: Any, least: int) -> Any:
    """The arguments with real tensors of `least` or more dimensions as meta tensors."""
    if isinstance(item, Tensor):
        return item if item.is_meta or item.dim() < least else bare(item)
    if type(item) in (list, tuple):
        return type(item)(_all_meta(part, least) for part in item)
    return item


_DEVICE = torch.Tensor.device.__get__
_TYPES = {
    torch.Tensor.is_cuda.__get__: "cuda",  # type: ignore[attr-defined]
    torch.Tensor.is_cpu.__get__: "cpu",  # type: ignore[attr-defined]
    torch.Tensor.is_xpu.__get__: "xpu",  # type: ignore[attr-defined]
    torch.Tensor.is_meta.__get__: "meta",  # type: ignore[attr-defined]
}
_INTEGER_FACTORIES = (torch.arange, torch.randperm)


class Disguise(TorchFunctionMode):
    """Meta tensors say that they are on `device`, and what would be made or moved there becomes one."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _DEVICE:  # made anew at every access, so that `is` never holds
            real = func(*args)
            return self.device if real.type == "meta" else real
        if func in _TYPES:
            real_type = _DEVICE(args[0]).type
            return (self.device.type if real_type == "meta" else real_type) == _TYPES[func]
        if func is F.scaled_dot_product_attention:
            return attention(self.device.type, *args, **kwargs)
        if func in (torch.Tensor.cuda, torch.Tensor.cpu):
            kind = "cuda" if func is torch.Tensor.cuda else "cpu"
            return self._moved(args[0], torch.device(kind))
        if len(args) > 1 or kwargs:
            target = _target(args[1:], kwargs) if func is torch.Tensor.to else None
            if target is not None and not self._is_ours(target):
                dtypes = [arg for arg in (*args[1:], kwargs.get("dtype")) if isinstance(arg, torch.dtype)]
                moved = self._moved(args[0], target)
                return moved.to(dtypes[0]) if dtypes else moved
            args = (*args[:1], *(self._meta(arg, func is torch.Tensor.to) for arg in args[1:]))
            if kwargs.get("device") is not None:
                kwargs = {**kwargs, "device": self._device(kwargs["device"])}
            kwargs.pop("pin_memory", None)
        out = func(*args, **kwargs)
        if func in _INTEGER_FACTORIES and self.device.type == "cpu" and out.is_meta and out.numel() <= SMALL_INTEGERS:
            return func(*args, **{**kwargs, "device": "cpu"})
        return out

    def _is_ours(self, device: torch.device) -> bool:
        return device.type in (self.device.type, "meta")

    def _device(self, device: Any) -> torch.device:
        device = torch.device(device) if not isinstance(device, torch.device) else device
        return META if self._is_ours(device) else device

    def _meta(self, argument: Any, names_devices: bool) -> Any:
        is_device = isinstance(argument, torch.device) or (names_devices and isinstance(argument, str))
        return self._device(argument) if is_device else argument

    def _moved(self, tensor: Tensor, target: torch.device) -> Tensor:
        """A tensor on another device: without numbers on ours, zeros on the host."""
        if self._is_ours(target):
            return tensor.to(META)
        return torch.zeros(tensor.shape, dtype=tensor.dtype) if _DEVICE(tensor).type == "meta" else tensor


def _target(args: Sequence[Any], kwargs: dict[str, Any]) -> torch.device | None:
    """The device in the arguments of `Tensor.to`."""
    if (device := kwargs.get("device")) is not None:
        return torch.device(device)
    for arg in args:
        if isinstance(arg, torch.device):
            return arg
        if isinstance(arg, str):
            return torch.device(arg)
        if isinstance(arg, Tensor):
            return _DEVICE(arg)
    return None


EFFICIENT_TAKES_GROUPS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)
"""Whether memory-efficient attention takes fewer heads of key and value than of the query (pytorch/pytorch#191085)."""


def attention(
    device: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot-product attention by the kernel that torch chooses on the device, so that what it keeps for backward is counted.

    On accelerators, as aten/src/ATen/native/transformers/cuda/sdp_utils.cpp chooses: flash attention for 16-bit types without a mask,
    memory-efficient attention otherwise; neither forms the scores. Where key and value have fewer heads than the query (groups),
    flash attention takes them with `enable_gqa`, and memory-efficient attention from torch 2.14 on (`EFFICIENT_TAKES_GROUPS`); the
    math kernel, which is left before, repeats the heads and forms the scores. On the CPU: its flash kernel. All for 4-D inputs with
    head sizes up to 256; anything else is torch's own choice for meta tensors, the math kernel.
    """
    plain = (
        query.dim() == 4
        and query.shape[-1] == value.shape[-1] <= 256
        and (attn_mask is None or attn_mask.dim() in (2, 4))
    )
    causal = {"is_causal": is_causal, "scale": scale}
    flash = query.dtype in (torch.float16, torch.bfloat16) and attn_mask is None and query.shape[-1] % 8 == 0
    if plain and device != "cpu" and not query.shape[:2] == key.shape[:2] == value.shape[:2]:
        plain = enable_gqa and (flash or EFFICIENT_TAKES_GROUPS)
    if not plain or (device == "cpu" and dropout_p > 0.0):
        return _undisguised(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    # torch makes a mask one of numbers, which is kept for backward.
    if attn_mask is not None and not attn_mask.is_floating_point():
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    if device == "cpu":
        out: Tensor = _aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
        return out
    if flash:
        out = _aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, **causal)[0]
        return out
    bias = None
    if attn_mask is not None:
        bias = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    keeps = torch.is_grad_enabled()  # the logarithms of sums
    out = _aten._scaled_dot_product_efficient_attention(query, key, value, bias, keeps, dropout_p, **causal)[0]
    return out


_undisguised: Callable[..., Tensor] = F.scaled_dot_product_attention


@contextmanager
def _replaced(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """An attribute replaced within the block; nothing happens where there is none."""
    if not hasattr(owner, name):
        yield
        return
    inherited, original = name not in vars(owner), getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        delattr(owner, name) if inherited else setattr(owner, name, original)


def _for_wrappers(device: torch.device) -> Iterator[AbstractContextManager[None]]:
    """For tensor subclasses that wrap others (int8 weights): what they make is on the meta device, in and out of disguise."""

    def make(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("device") == device:
            kwargs["device"] = META
        made: Tensor = wrap(*args, **kwargs)
        return made

    def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda kind=device.type: function(device.type if kind == "meta" else kind)

    wrap = torch.Tensor._make_wrapper_subclass
    yield _replaced(torch.Tensor, "_make_wrapper_subclass", staticmethod(make))
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        yield _replaced(torch, name, on_device(getattr(torch, name)))


def _capable(device: torch.device) -> AbstractContextManager[None]:
    """A GPU that is not there says that it can do what today's can (compute capability 9.0), as mixtures of experts ask it."""
    if device.type != "cuda":
        return nullcontext()
    return _replaced(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def one_text_a_row() -> AbstractContextManager[None]:
    """Answers for transformers, which looks into every batch whether it packs several texts into a row: it does not."""
    masks = sys.modules.get("transformers.masking_utils")
    return _replaced(masks, "find_packed_sequence_indices", lambda position_ids: None)


@contextmanager
def pretend(device: torch.device) -> Iterator[Recorder]:
    """Within this block meta tensors pass for tensors on the device, and their memory is recorded."""
    recorder = Recorder(counts_host=device.type == "cpu")
    with ExitStack() as stack:
        stack.enter_context(recorder)
        stack.enter_context(Disguise(device))
        # Copies counters to the host now and then, through pinned memory and an event of a real device.
        stack.enter_context(_replaced(SkippedUpdates, "poll", lambda self: None))
        stack.enter_context(_capable(device))
        # Draws again until all numbers lie within bounds, which those of meta tensors never do.
        stack.enter_context(_replaced(torch.nn.init, "_no_grad_trunc_normal_", lambda tensor, *_, **__: tensor))
        for replacement in _for_wrappers(device):
            stack.enter_context(replacement)
        replays = Replays(recorder.timeline, lambda: recorder.moment, recorder.block_of)
        stack.enter_context(repeated(replays, _replaced))
        yield recorder
