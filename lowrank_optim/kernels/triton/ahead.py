"""Compiling kernels without a device: what operations would launch for given arguments is recorded, and built for a chosen GPU.

The recorded arguments are specialised as Triton's launcher does (multiples of 16, ones, None), so what is built is what would run.
Not for a process with TRITON_INTERPRET=1, whose kernels are Python functions.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    """A cubin and what it takes: registers of a thread, bytes of its stack (for registers that spill), KiB of shared memory."""

    variant: Variant
    capability: int
    cubin: bytes
    shared_kib: float
    registers: int | None
    spilled: int | None


def _describe(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Variant:
    values = dict(zip(kernel.arg_names, args, strict=False)) | {
        name: value for name, value in options.items() if name in kernel.arg_names
    }
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
def recorded(kib: int = 227) -> Iterator[list[Variant]]:
    """The launches of everything that is called inside, on a device with so much shared memory; nothing runs."""
    found: dict[Variant, None] = {}
    shared = launching._shared_kib
    launching._shared_kib = lambda device: kib  # type: ignore[assignment]
    launching.record(lambda kernel, args, options: found.setdefault(_describe(kernel, args, options)))
    variants: list[Variant] = []
    try:
        yield variants
    finally:
        launching.record(None)
        launching._shared_kib = shared
        variants.extend(found)


def build(variant: Variant, capability: int) -> Built:
    """Compile one variant to a cubin."""
    attributes = {(place,): [["tt.divisibility", 16]] for place in variant.aligned}
    source = ASTSource(variant.kernel, dict(variant.signature), dict(variant.constants), attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(variant.options))
    cubin = made.asm["cubin"]
    registers, spilled = _resources(cubin)
    return Built(variant, capability, cubin, made.metadata.shared / 1024, registers, spilled)


def _resources(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers and stack of a thread, from the cuobjdump that comes with triton."""
    try:
        tool = triton.knobs.nvidia.cuobjdump.path
    except (AttributeError, RuntimeError):
        return None, None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [tool, "-res-usage", str(path)]
        said = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False).stdout
    registers, stack = re.search(r"REG:(\d+)", said), re.search(r"STACK:(\d+)", said)
    return (int(registers[1]) if registers else None), (int(stack[1]) if stack else None)


def variants_of(calls: list[Callable[[], object]], capability: int) -> list[Variant]:
    """What these calls of operations launch on a GPU of this capability."""
    with recorded(SHARED_KIB[capability]) as found:
        for call in calls:
            call()
    return found
