"""Compiling kernels without a device: what operations would launch for given arguments is recorded, and built for a chosen GPU.

The recorded arguments are specialised as Triton's launcher does (multiples of 16, ones, None), so what is built is what would run.
Not for a process with TRITON_INTERPRET=1, whose kernels are Python functions.
"""

import io
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lowrank_optim.kernels.triton import launching

TARGETS = (80, 86, 89, 90)
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227}
"""Shared memory that a program may have, by compute capability."""

PRODUCTS = frozenset({"project_kernel", "apply_kernel", "sparse_kernel", "sampled_kernel"})
"""Kernels that multiply matrices: for tensor cores."""

_TENSOR_CORE = re.compile(rb"\b(?:H|HG|I|IG|Q|QG|D|B)MMA\b")
"""Instructions of the machine code that are for tensor cores: HMMA, and HGMMA of Hopper, and those of other types."""

_POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Variant:
    """A kernel with the types, constants and properties of its arguments; equal ones are one binary."""

    kernel: Any = field(compare=False)
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Built:
    """A cubin and what it takes.

    shared_kib: shared memory of a program.
    registers: of a thread.
    spilled: bytes that a thread's instructions store to memory and load again for want of registers.
    stack: bytes of a thread's memory: for what is spilled, and arrays of library functions.
    The last three are None where ptxas does not say them.
    """

    variant: Variant
    capability: int
    cubin: bytes
    shared_kib: float
    registers: int | None
    spilled: int | None
    stack: int | None

    @property
    def threads(self) -> int:
        """Of a program."""
        return 32 * int(dict(self.variant.options)["num_warps"])


def named(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a launch by name, constants included."""
    constants = {name: value for name, value in options.items() if name in kernel.arg_names}
    return dict(zip(kernel.arg_names, args, strict=False)) | constants


def describe(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Variant:
    """What Triton would compile for a launch."""
    values = named(kernel, args, options)
    signature, constants, aligned = {}, {}, []
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        fixed = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not fixed):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
                aligned.append(place)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = parameter.annotation_type or ("i32" if -(2**31) <= value < 2**31 else "i64")
            if not fixed and value % 16 == 0:
                aligned.append(place)
    rest = {name: value for name, value in options.items() if name not in kernel.arg_names}
    pairs = [tuple(sorted(mapping.items())) for mapping in (constants, rest)]
    return Variant(kernel, kernel.__name__, tuple(signature.items()), pairs[0], tuple(aligned), pairs[1])


@contextmanager
def handed_to(recorder: launching.Recorder, kib: int, processors: int | None = None) -> Iterator[None]:
    """Every launch inside goes to `recorder`, as on a device with so much shared memory and so many multiprocessors; none runs."""
    before = launching._shared_kib, launching._processors
    launching._shared_kib = lambda device: kib  # type: ignore[assignment]
    if processors is not None:
        launching._processors = lambda device: processors  # type: ignore[assignment]
    launching.record(recorder)
    try:
        yield
    finally:
        launching.record(None)
        launching._shared_kib, launching._processors = before


@contextmanager
def recorded(kib: int = 227) -> Iterator[list[Variant]]:
    """The different launches of everything that is called inside, see `handed_to`."""
    found: dict[Variant, None] = {}
    variants: list[Variant] = []
    with handed_to(lambda kernel, grid, args, options: found.setdefault(describe(kernel, args, options)), kib):
        try:
            yield variants
        finally:
            variants.extend(found)


def build(variant: Variant, capability: int) -> Built:
    """Compile one variant to a cubin, whatever Triton's cache holds: what ptxas says of it is in no cache."""
    attributes = {(place,): [["tt.divisibility", 16]] for place in variant.aligned}
    source = ASTSource(variant.kernel, dict(variant.signature), dict(variant.constants), attributes)
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), redirect_stdout(io.StringIO()) as said:
        triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(variant.options))
    return Built(variant, capability, made.asm["cubin"], made.metadata.shared / 1024, *_resources(said.getvalue()))


def _resources(log: str) -> tuple[int | None, int | None, int | None]:
    """Registers, spilled bytes and stack of a thread, from what ptxas says."""
    used = re.search(r"Used (\d+) registers", log)
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = int(used[1]) if used else None
    return (registers, None, None) if frame is None else (registers, int(frame[2]) + int(frame[3]), int(frame[1]))


def tensor_core_instructions(cubin: bytes) -> dict[str, int] | None:
    """How many instructions for tensor cores the machine code has, by name; None without the nvdisasm that comes with triton."""
    try:
        tool = triton.knobs.nvidia.nvdisasm.path
    except (AttributeError, RuntimeError):
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        code = subprocess.run([tool, "-c", str(path)], capture_output=True, check=True).stdout
    return dict(Counter(name.decode() for name in _TENSOR_CORE.findall(code)))


def faults(built: Built) -> list[str]:
    """What must not be: more shared memory than there is, registers that spill, a product without tensor cores."""
    found = []
    if built.shared_kib > SHARED_KIB[built.capability]:
        found.append(f"takes {built.shared_kib} KiB of shared memory")
    if built.spilled:
        found.append(f"spills {built.spilled} bytes")
    if built.variant.name in PRODUCTS and tensor_core_instructions(built.cubin) == {}:
        found.append("has no instruction for tensor cores")
    return found


def variants_of(calls: list[Callable[[], object]], capability: int) -> list[Variant]:
    """What these calls of operations launch on a GPU of this capability."""
    with recorded(SHARED_KIB[capability]) as found:
        for call in calls:
            call()
    return found
