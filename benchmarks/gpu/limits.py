"""What the devices of the estimate can do, by what NVIDIA publishes; and how many warps fit on a multiprocessor.

Sources: "NVIDIA Ada GPU Architecture" (whitepaper v2.02, appendix A: GeForce RTX 4090); "NVIDIA H100 Tensor Core GPU Architecture"
(whitepaper v1.04, SXM5); "NVIDIA A100 Tensor Core GPU Architecture" (whitepaper v1.0, the 40 GB card); "NVIDIA Ampere GA102 GPU
Architecture" (whitepaper v2.1, GeForce RTX 3090). Rates are dense (without sparsity), at boost clock, with float32 accumulation.
Limits of a multiprocessor: table "Technical Specifications per Compute Capability" of the CUDA C++ Programming Guide.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A device. bytes: per second, of its memory; flops: per second, by what is multiplied.

    capability: of its code, 10 · major + minor.
    processors: multiprocessors.
    shared_kib: of shared memory that a program may have.
    """

    name: str
    capability: int
    processors: int
    shared_kib: int
    bytes: float
    flops: dict[str, float]

    def seconds(self, moved: float, flops: dict[str, float]) -> float:
        """The roofline: the larger of the times for the bytes and for the products."""
        return max(moved / self.bytes, sum(size / self.flops[kind] for kind, size in flops.items()))


GPUS = {
    80: Gpu("A100", 80, 108, 163, 1555e9, {"bfloat16": 312e12, "tf32": 156e12, "float32": 19.5e12}),
    86: Gpu("RTX 3090", 86, 82, 99, 936e9, {"bfloat16": 71e12, "tf32": 35.6e12, "float32": 35.6e12}),
    89: Gpu("RTX 4090", 89, 128, 99, 1008e9, {"bfloat16": 165.2e12, "tf32": 82.6e12, "float32": 82.6e12}),
    90: Gpu("H100", 90, 132, 227, 3352e9, {"bfloat16": 989.4e12, "tf32": 494.7e12, "float32": 66.9e12}),
}
"""By capability."""


@dataclass(frozen=True)
class Processor:
    """The limits of a multiprocessor: warps, programs, KiB of shared memory."""

    warps: int
    programs: int
    shared_kib: int


PROCESSORS = {
    80: Processor(64, 32, 164),
    86: Processor(48, 16, 100),
    89: Processor(48, 24, 100),
    90: Processor(64, 32, 228),
}
QUARTER = 16384
"""Registers of one of the four schedulers of a multiprocessor; a warp takes them 256 at a time."""


def occupancy(capability: int, registers: int, shared_kib: float, threads: int) -> float:
    """The share of a multiprocessor's warps that can run at a time, by registers, shared memory (1 KiB of each program is the
    system's) and threads."""
    limit, warps = PROCESSORS[capability], -(-threads // 32)
    by_registers = 4 * (QUARTER // (256 * math.ceil(max(registers, 1) * 32 / 256))) // warps
    programs = min(limit.warps // warps, limit.programs, by_registers, int(limit.shared_kib // (shared_kib + 1)))
    return programs * warps / limit.warps
