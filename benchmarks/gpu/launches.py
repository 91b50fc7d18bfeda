"""What a step launches on a GPU, found without one: kernels and operations of torch, their bytes and products, and the host's time.

`step_of` runs a step on tensors without numbers. Every operation of the package goes to its Triton function, whose launches are
written down and not made; an operation that Triton leaves alone goes to its definition, as on a device. `host_seconds` times the same
step on small real tensors, with all that Triton does for a launch but the driver's own call.
"""

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import triton
from limits import Gpu
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

import lowrank_optim as lo
from lowrank_optim.kernels import Loaded, Unavailable, dispatch
from lowrank_optim.kernels import torch as torch_backend
from lowrank_optim.kernels.triton import ahead, coded, elementwise, folded, products, sparse
from lowrank_optim.planner.choices import resolve_optimizer
from lowrank_optim.planner.simulation.pretend import backward, pretend

BF16, META, CUDA = torch.bfloat16, torch.device("meta"), torch.device("cuda")
MODULES = (elementwise, folded, coded, products, sparse)
TRITON = {name: operation for module in MODULES for name, operation in module.OPERATIONS.items()}


# Models -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Of a LLaMA."""

    hidden: int
    ffn: int
    layers: int
    vocabulary: int
    rank: int
    tokens: int


SEVEN_B = Shape(4096, 11008, 32, 32_000, 1024, 2048)
SMALL = Shape(128, 352, 8, 256, 32, 64)
"""Of the host's time: as small as takes the same path, so that little but launching is in it."""


class Layer(nn.Module):
    """The parameters of a decoder layer of LLaMA."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(hidden, hidden, bias=False))
        self.gate_proj, self.up_proj = (nn.Linear(hidden, ffn, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(ffn, hidden, bias=False)
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)


class Llama(nn.Module):
    """The parameters of a LLaMA."""

    def __init__(self, shape: Shape, layers: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape.hidden, shape.ffn) for _ in range(layers))
        self.norm = nn.RMSNorm(shape.hidden)
        self.lm_head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)


@dataclass(frozen=True)
class Method:
    """An optimizer by name, the options that it is given, and how many bits its weights have; `rank`: whether it has the shape's."""

    optimizer: str
    rank: bool = False
    weight_bits: int = 16
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, model: nn.Module, rank: int) -> torch.optim.Optimizer:
        options = {**self.options, **({"rank": rank} if self.rank else {})}
        return resolve_optimizer((self.optimizer, {"lr": 1e-3, **options})).build(model)


METHODS = {
    "GaLore 8-bit": Method("galore_8bit", rank=True),
    "APOLLO-Mini": Method("apollo_mini"),
    "Fira": Method("fira", rank=True),
    "Q-GaLore, int8 weights": Method("qgalore", rank=True, weight_bits=8),
    "Muon": Method("muon_adamw"),
    "AdamW, 8-bit state": Method("galore_8bit", options={"rank": None}),
}
SLTRAIN = "SLTrain, forward and backward"
"""Of the linear layers of all decoder layers, with `SEVEN_B.tokens` tokens."""


def matrices(shape: Shape) -> Iterator[tuple[int, int]]:
    """(in, out) of the linear layers of a decoder layer."""
    yield from ((shape.hidden, shape.hidden),) * 4
    yield from ((shape.hidden, shape.ffn),) * 2
    yield shape.ffn, shape.hidden


# What is launched -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """A launch: equal ones are counted together.

    variant: of a Triton kernel; None for an operation of torch, which is one launch or a few.
    programs: of the grid.
    moved: bytes that have to be read and written, each tensor once.
    flops: of the products that are made, by what is multiplied; several where one is made exact by several.
    """

    name: str
    variant: ahead.Variant | None
    programs: int
    moved: int
    flops: tuple[tuple[str, float], ...] = ()


IN_PLACE: dict[str, set[str]] = {
    "adam_direct_kernel": {"m_ptr", "v_ptr"},
    "adam_dense_kernel": {"w_ptr", "m_ptr", "v_ptr", "high_ptr", "low_ptr"},
    "folded_adam_kernel": {"w_ptr", "m_ptr", "v_ptr"},
    "one_moment_kernel": {"m_ptr"},
    "coded_adam_kernel": {"ratio_ptr", "ratio_scale_ptr", "root_ptr", "root_scale_ptr", "high_ptr", "low_ptr"},
    "apply_kernel": {"w_ptr", "high_ptr", "low_ptr"},
}
"""Arguments that a kernel reads and writes."""


def _bytes(tensor: Tensor) -> int:
    """Of the elements of a tensor that lie in different places."""
    places = math.prod(size for size, step in zip(tensor.shape, tensor.stride(), strict=True) if step)
    return places * tensor.element_size() if tensor.numel() else 0


def _moved(name: str, values: dict[str, Any]) -> int:
    twice = set(IN_PLACE.get(name, ()))
    if name == "store_kernel" and values["UPDATE"]:
        twice |= {"w_ptr", "high_ptr", "low_ptr"}
    if name == "coded_adam_kernel" and values["DENSE"]:
        twice |= {"out_ptr"}
    tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
    return sum(_bytes(tensor) * (2 if key in twice else 1) for key, tensor in tensors.items())


def _flops(name: str, grid: tuple[int, ...], values: dict[str, Any]) -> dict[str, float]:
    """Of the products of a kernel; float32 operands take three products in tf32 at full precision."""
    if name not in ahead.PRODUCTS:
        return {}
    if name == "project_kernel":
        operand, passes = values["b_ptr"], 1 if values["low_ptr"] is None else 2
        size = 2.0 * grid[2] * values["lines"] * values["rank"] * values["depth"] * passes
    elif name == "apply_kernel":
        operand, passes = values["left_ptr"], 1 if values["left_low_ptr"] is None else 3
        size = 2.0 * grid[1] * values["rows"] * values["cols"] * (values["rank"] + values["inner"]) * passes
    else:
        operand = values["x_ptr"]
        size = 2.0 * values["tokens"] * values["rows"] * values["cols"]
        if name == "sparse_kernel" and values["inner_ptr"] is not None:
            size += 2.0 * values["tokens"] * values["rank"] * values["rows" if values["FORWARD"] else "cols"]
    if operand.dtype != torch.float32:
        return {"bfloat16": size}
    return {"tf32": size * (3 if values["PRECISION"] == "tf32x3" else 1)}


def work_of(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> Work:
    """What a launch does."""
    values, variant = ahead.named(kernel, args, options), ahead.describe(kernel, args, options)
    flops = _flops(variant.name, grid, values)
    return Work(variant.name, variant, math.prod(grid), _moved(variant.name, values), tuple(flops.items()))


_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""Operations of torch that multiply matrices, and where their first factor stands."""


def _torch_work(func: Any, args: Any, given: list[Tensor], out: list[Tensor]) -> Work | None:
    """What an operation of torch does on the device; None where it launches nothing."""
    name = func._schema.name.partition("::")[2]
    views = any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)
    there = [tensor for tensor in (*given, *out) if tensor.is_meta]
    if views or not there or name.startswith(("empty", "new_empty")) or name in ("_unsafe_view", "lift_fresh"):
        return None
    flops: dict[str, float] = {}
    if name in _PRODUCTS:
        a, b = args[_PRODUCTS[name]], args[_PRODUCTS[name] + 1]
        kind = "float32" if a.dtype == torch.float32 else "bfloat16"
        flops[kind] = 2.0 * a.numel() * b.shape[-1]
    return Work(f"torch {name}", None, 0, sum(map(_bytes, there)), tuple(flops.items()))


def _tensors(items: Any) -> Iterator[Tensor]:
    for item in items if isinstance(items, (tuple, list)) else (items,):
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (tuple, list)):
            yield from _tensors(item)


class Trace(TorchDispatchMode):
    """Counts what would be launched."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Work] = Counter()
        self.on = False
        self.ways = [TRITON, torch_backend.load().operations, dispatch._DEFINITIONS]

    def launched(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if self.on:
            self.found[work_of(kernel, grid, args, options)] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # 8-bit weights: their own operations come here one by one
        with torch._C.DisableTorchFunction():
            given = [*_tensors(list(args)), *_tensors(list((kwargs or {}).values()))]
            if func.namespace == "lowrank_optim" and any(tensor.is_meta for tensor in given):
                with self:
                    return self._operation(func._schema.name.partition("::")[2], args)
            out = func(*args, **(kwargs or {}))
            if self.on and (work := _torch_work(func, args, given, list(_tensors(out)))) is not None:
                self.found[work] += 1
            return out

    def _operation(self, name: str, args: Any) -> Any:
        for way in self.ways:
            if name in way and (out := way[name](*args)) is not NotImplemented:
                return out
        raise RuntimeError(f"nothing runs {name}")


def settle(optimizer: torch.optim.Optimizer, step: int = 100) -> None:
    """Let so many steps have passed since every subspace was made: none is due now, nor any column scale."""
    for state in optimizer.state.values():
        for name, value in (("step", step), ("last_refresh", step - 10), ("gap", 10**6)):
            if name in state:
                state[name].fill_(value)
    for group in optimizer.param_groups:
        if "update_proj_gap" in group:
            group["update_proj_gap"] = 10**6


def ready(method: Method, shape: Shape, layers: int, device: torch.device) -> torch.optim.Optimizer:
    """An optimizer in the middle of training, with gradients."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(BF16)
    try:
        with device:
            model: nn.Module = Llama(shape, layers)
    finally:
        torch.set_default_dtype(default)
    if method.weight_bits == 8:
        model = lo.nn.quantize_weights_(model)
    optimizer = method.build(model, shape.rank)
    optimizer._mask_on_device = (
        True  # whether gradients are finite is decided there, also where the device is a stand-in
    )
    for param in model.parameters():
        param.grad = torch.randn(param.shape, device=device).to(BF16) if device.type != "meta" else None
        if device.type == "meta":
            param.grad = torch.empty(param.shape, dtype=BF16, device=device)
    settle(optimizer)
    return optimizer


def _traced(run: Callable[[], Callable[[], object]], gpu: Gpu) -> Counter[Work]:
    """What a step launches on a device; `run` makes everything ready and returns the step."""
    trace = Trace()
    with pretend(CUDA), trace, ahead.handed_to(trace.launched, gpu.shared_kib, gpu.processors):
        step = run()
        trace.on = True
        step()
        trace.on = False
    return trace.found


def step_of(name: str, gpu: Gpu, shape: Shape = SEVEN_B) -> Counter[Work]:
    """What an ordinary step of a method launches: no refresh, no new column scales. Layers are equal, so two models tell all."""
    if name == SLTRAIN:
        found: Counter[Work] = Counter()
        for sizes, number in Counter(matrices(shape)).items():
            once = _traced(lambda sizes=sizes: sltrain_pass(*sizes, shape, META, backward), gpu)
            found.update({work: number * shape.layers * count for work, count in once.items()})
        return found
    method = METHODS[name]
    one, two = (_traced(lambda n=n: ready(method, shape, n, META).step, gpu) for n in (1, 2))
    return Counter({work: one[work] + (shape.layers - 1) * (count - one[work]) for work, count in two.items()})


def sltrain_pass(
    n: int, m: int, shape: Shape, device: torch.device, back: Callable[[Tensor], object]
) -> Callable[[], object]:
    """Forward and backward of one layer of SLTrain, made ready."""
    layer = lo.nn.SparseLowRankLinear(n, m, rank=shape.rank, density=0.05, bias=False, device=device, dtype=BF16)
    x = torch.zeros(shape.tokens, n, dtype=BF16, device=device, requires_grad=True)

    def run() -> None:
        back(layer(x).sum())

    return run


# The host's time --------------------------------------------------------------------------------------------------------------------


class _Compiled:
    """What Triton takes for a compiled kernel; running it does nothing."""

    function = packed_metadata = None
    launches = 0

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *_: Any) -> None:
        _Compiled.launches += 1


class _Driver:
    """What Triton asks of a device's driver before a launch."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return -1  # no real one: kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def launched_by_nobody() -> Iterator[None]:
    """On CPU tensors, everything that Triton's backend does on a GPU, but for the last call: nothing runs."""
    real, compile_, driver = dispatch._try, triton.compiler.compile, triton.runtime.driver._active
    ways: dict[str, Any] = {"triton": Loaded(frozenset({"cpu"}), TRITON), "torch": real("torch")}
    dispatch._try = cache(lambda name: ways.get(name, Unavailable("not asked for")))
    triton.compiler.compile = lambda *_, **__: _Compiled()
    triton.runtime.driver.set_active(_Driver())
    chosen = os.environ.pop(dispatch.VARIABLE, None)
    dispatch.forget()
    try:
        yield
    finally:
        dispatch._try, triton.compiler.compile, triton.runtime.driver._active = real, compile_, driver
        if chosen is not None:
            os.environ[dispatch.VARIABLE] = chosen
        dispatch.forget()


def host_seconds(name: str, gpu: Gpu, rounds: int = 12) -> float:
    """Seconds of this processor for one launch (or operation of torch) of a step: the least of a few steps, over what it launches."""
    cpu = torch.device("cpu")
    with launched_by_nobody():
        if name == SLTRAIN:
            passes = [sltrain_pass(*sizes, SMALL, cpu, lambda y: y.backward()) for sizes in matrices(SMALL)]

            def run() -> None:
                for _ in range(SMALL.layers):
                    for each in passes:
                        each()

        else:
            optimizer = ready(METHODS[name], SMALL, SMALL.layers, cpu)

            def run() -> None:
                optimizer.step()

        took = []
        for _ in range(rounds):
            began = time.thread_time()
            run()
            took.append(time.thread_time() - began)
    return min(took) / sum(step_of(name, gpu, SMALL).values())
