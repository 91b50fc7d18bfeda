"""What can be known of a GPU without one: every kernel of a LLaMA-7B step in machine code, and an estimate of the step.

    python benchmarks/gpu/static.py                   # four architectures; writes benchmarks/results/gpu_static.json in a few minutes
    python benchmarks/gpu/static.py --capability 89   # one of them anew, or with --cuda the CUDA kernels alone
    python benchmarks/gpu/static.py --measure         # on a GPU: the same launches, measured beside the estimate

Triton's kernels are compiled as a step would (`lowrank_optim/kernels/triton/ahead.py`), those of csrc/cuda by nvcc where it is on the
path. Of each: registers, bytes spilled, shared memory, occupancy, instructions for tensor cores. It is an error if one spills, or if
one that multiplies matrices has no such instruction.

The estimate of a step (bfloat16, `launches.SEVEN_B`, no refresh) is the larger of two times: that of the device, the sum over all
launches of the larger of bytes over the memory's rate and products over the tensor cores' (`limits`), and that of the host, launches
times what one took on this processor. Nothing in it was measured on a GPU. It is a bound from below: no kernel reaches these rates,
tensors that are read twice count once, and so do operations of torch that are several launches. `--measure` writes
benchmarks/results/gpu_measured.json.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch

LOCAL = Path(__file__).resolve().parent
sys.path[:0] = [str(LOCAL), str(LOCAL.parent)]

import common  # noqa: E402
import launches  # noqa: E402
import tables  # noqa: E402
from launches import METHODS, SEVEN_B, SLTRAIN, Work  # noqa: E402
from limits import GPUS, Gpu, occupancy  # noqa: E402

from lowrank_optim.kernels.cuda.build import NVCC_FLAGS, SOURCE  # noqa: E402
from lowrank_optim.kernels.triton import ahead, launching  # noqa: E402

ALL = (*METHODS, SLTRAIN)
ESTIMATED = (89, 90)
NOTE = "An estimate: nothing here was measured on a GPU."
CUDA_THREADS = 256


# Machine code -----------------------------------------------------------------------------------------------------------------------


def of_code(capability: int, registers: int, spilled: int, shared_kib: float, threads: int) -> dict[str, Any]:
    """What a kernel takes, and how much of a multiprocessor it fills."""
    return {
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_kib": round(shared_kib, 1),
        "threads": threads,
        "occupancy": occupancy(capability, registers, shared_kib, threads),
    }


def triton_kernels(variants: Iterable[ahead.Variant], capability: int) -> list[dict[str, Any]]:
    """Every variant, compiled."""
    rows = []
    for variant in variants:
        built = ahead.build(variant, capability)
        if built.registers is None or built.spilled is None:
            raise SystemExit("ptxas does not say what kernels take: Triton 3.6 or later is needed")
        row = {"kernel": variant.name, "types": " ".join(kind for _, kind in variant.signature if kind[0] == "*")}
        row |= of_code(capability, built.registers, built.spilled, built.shared_kib, built.threads)
        row["tensor_core"] = ahead.tensor_core_instructions(built.cubin)
        row["faults"] = ahead.faults(built)
        rows.append(row | {"constants": {name: value for name, value in variant.constants if name.isupper()}})
    return rows


def cuda_kernels(capability: int) -> list[dict[str, Any]]:
    """The kernels of csrc/cuda; none where there is no nvcc."""
    if shutil.which("nvcc") is None:
        return []
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *NVCC_FLAGS.split(), "-cubin", f"-arch=sm_{capability}", "-Xptxas", "-v"]
        made = [*command, str(SOURCE / "abi.cu"), "-o", f"{folder}/kernels.cubin"]
        log = subprocess.run(made, capture_output=True, text=True, check=True).stderr
    return read_ptxas(log, capability)


def names_in(mangled: str) -> list[str]:
    """The names in a mangled one, each of which stands behind its length."""
    found, at = [], 0
    while (length := re.compile(r"\d+").search(mangled, at)) is not None:
        at = length.end() + int(length[0])
        found.append(mangled[length.end() : at])
    return found


def read_ptxas(log: str, capability: int) -> list[dict[str, Any]]:
    """What `ptxas -v` says of each kernel."""
    found = []
    for part in log.split("Compiling entry function '")[1:]:
        spilled = sum(int(size) for size in re.findall(r"(\d+) bytes spill", part)[:2])
        registers = re.search(r"Used (\d+) registers", part)
        assert registers is not None, part
        _, *names = names_in(part.partition("'")[0])  # without that of the namespace
        row = {"kernel": " ".join(names), **of_code(capability, int(registers[1]), spilled, 0.0, CUDA_THREADS)}
        found.append(row | {"faults": [f"spills {spilled} bytes"] if spilled else []})
    return found


def said(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The faults of kernels, taken out of their rows, in one list."""
    wrong = [f"{row['kernel']} {fault}" for row in rows for fault in row.pop("faults")]
    for error in wrong:
        print(f"  ERROR: {error}", flush=True)
    return wrong


def cuda_anew(found: dict[str, Any], capability: int) -> dict[str, Any]:
    """The results of an architecture, with the CUDA kernels compiled again."""
    rows = cuda_kernels(capability)
    old = [error for error in found["errors"] if not error.startswith("over_")]
    return found | {"cuda": rows, "errors": old + said(rows)}


# The estimate -----------------------------------------------------------------------------------------------------------------------


def estimate(found: Counter[Work], gpu: Gpu, host: float) -> dict[str, Any]:
    """Of a step: launches, bytes, products, and the larger of the device's and the host's time."""
    device = sum(count * gpu.seconds(work.moved, dict(work.flops)) for work, count in found.items())
    flops = sum(count * size for work, count in found.items() for _, size in work.flops)
    count, own = found.total(), sum(count for work, count in found.items() if work.variant is not None)
    return {
        "kernel_launches": own,
        "torch_operations": count - own,
        "bytes": sum(count * work.moved for work, count in found.items()),
        "flops": flops,
        "device_seconds": device,
        "host_seconds": count * host,
        "step_seconds": max(device, count * host),
    }


def listed(found: Counter[Work], gpu: Gpu, most: int = 30) -> list[dict[str, Any]]:
    """The launches that take longest, equal ones together."""

    def seconds(work: Work) -> float:
        return gpu.seconds(work.moved, dict(work.flops))

    ordered = sorted(found.items(), key=lambda item: -item[1] * seconds(item[0]))
    return [
        {
            "name": work.name,
            "count": count,
            "programs": work.programs,
            "bytes": work.moved,
            "flops": dict(work.flops),
            "roofline_seconds": seconds(work),
        }
        for work, count in ordered[:most]
    ]


def of_capability(capability: int, host: dict[str, float]) -> dict[str, Any]:
    """Kernels, launches and, for the devices of the estimate, times."""
    gpu = GPUS[capability]
    steps = {name: launches.step_of(name, gpu) for name in ALL}
    variants = {work.variant: None for found in steps.values() for work in found if work.variant is not None}
    kernels = triton_kernels(variants, capability)
    cuda = cuda_kernels(capability)
    print(f"sm_{capability}: {len(kernels)} Triton kernels, {len(cuda)} CUDA kernels", flush=True)
    found: dict[str, Any] = {"triton": kernels, "cuda": cuda, "errors": said([*kernels, *cuda])}
    if capability in ESTIMATED:
        found["gpu"] = {"name": gpu.name, "bytes_per_second": gpu.bytes, "flops_per_second": gpu.flops}
        found["estimates"] = {name: estimate(steps[name], gpu, host[name]) for name in ALL}
        found["launches"] = {name: listed(steps[name], gpu) for name in ALL}
        for name, row in found["estimates"].items():
            show(f"estimate, {gpu.name}", name, row)
    return found


def show(title: str, name: str, row: dict[str, Any]) -> None:
    print(
        f"  {title}: {name}: {row['kernel_launches']} kernels and {row['torch_operations']} operations of torch, "
        f"{row['bytes'] / 1e9:.0f} GB, {row['flops'] / 1e12:.1f} Tflop: device {1e3 * row['device_seconds']:.0f} ms, "
        f"host {1e3 * row['host_seconds']:.0f} ms",
        flush=True,
    )


# On a GPU ---------------------------------------------------------------------------------------------------------------------------

LAYERS = 2
"""Of the model that is measured: its steps fit any device."""


def this_gpu() -> Gpu:
    """The device that is there, with the published rates of the nearest one that is known."""
    properties = torch.cuda.get_device_properties(0)
    capability = 10 * properties.major + properties.minor
    same = [gpu for gpu in GPUS.values() if gpu.name in properties.name]
    known = same[0] if same else GPUS[max(key for key in (80, *GPUS) if key <= max(capability, 80))]
    shared = int(getattr(properties, "shared_memory_per_block_optin", 99 * 1024)) // 1024
    name = properties.name if same else f"{properties.name}, by the rates of {known.name}"
    return Gpu(name, known.capability, properties.multi_processor_count, shared, known.bytes, known.flops)


def measured_step(name: str, shape: launches.Shape, device: torch.device) -> tuple[float, dict[str, float]]:
    """Seconds of a step on the device; and of each kind of kernel in one, each launch between two events."""
    if name == SLTRAIN:
        passes = [
            launches.sltrain_pass(*sizes, shape, device, lambda y: y.backward()) for sizes in launches.matrices(shape)
        ]

        def run() -> None:
            for each in passes * shape.layers:
                each()

    else:
        run = launches.ready(METHODS[name], shape, shape.layers, device).step
    run()
    took = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        took.append(begin.elapsed_time(end) / 1e3)
    pairs: list[tuple[str, Any, Any]] = []

    def timed(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        kernel[grid](*args, **options)
        end.record()
        pairs.append((kernel.__name__, begin, end))

    launching.record(timed)
    try:
        run()
    finally:
        launching.record(None)
    torch.cuda.synchronize()
    kernels: Counter[str] = Counter()
    for kernel, begin, end in pairs:
        kernels[kernel] += begin.elapsed_time(end) / 1e3
    return median(took[2:]), dict(kernels)


def measure() -> None:
    """Steps of a model of LAYERS layers, measured on this GPU, beside the estimate for it."""
    gpu, shape = this_gpu(), launches.Shape(*vars(SEVEN_B).values())
    shape = launches.Shape(shape.hidden, shape.ffn, LAYERS, shape.vocabulary, shape.rank, shape.tokens)
    results: dict[str, Any] = {"gpu": gpu.name, "layers": LAYERS, "methods": {}}
    for name in ALL:
        found = launches.step_of(name, gpu, shape)
        seconds, kernels = measured_step(name, shape, torch.device("cuda"))
        row = estimate(found, gpu, launches.host_seconds(name, gpu))
        roofline: Counter[str] = Counter()
        for work, count in found.items():
            roofline[work.name] += count * gpu.seconds(work.moved, dict(work.flops))
        beside = {
            kernel: {"measured_seconds": took, "roofline_seconds": roofline[kernel]} for kernel, took in kernels.items()
        }
        row |= {"measured_seconds": seconds, "over_estimate": seconds / row["step_seconds"], "kernels": beside}
        results["methods"][name] = row
        print(
            f"{name}, {LAYERS} layers: measured {1e3 * seconds:.2f} ms, estimate {1e3 * row['step_seconds']:.2f} ms "
            f"({row['over_estimate']:.2f} times)",
            flush=True,
        )
        for kernel, pair in beside.items():
            print(
                f"    {kernel}: {1e3 * pair['measured_seconds']:.2f} ms, {1e3 * pair['roofline_seconds']:.2f} by its roofline"
            )
        torch.cuda.empty_cache()
    common.write("gpu_measured", results)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--capability", type=int, choices=GPUS, help="one architecture, beside what is written of the others"
    )
    parser.add_argument(
        "--cuda", action="store_true", help="the CUDA kernels anew, beside what is written of the others"
    )
    parser.add_argument("--measure", action="store_true", help="on the GPU that is here")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="where --measure writes")
    args = parser.parse_args()
    if args.measure:
        if not torch.cuda.is_available():
            raise SystemExit("there is no GPU here to measure")
        common.RESULTS = args.out
        measure()
        return 0
    if args.cuda:
        content = tables.results("gpu_static")
        old = content["architectures"]
        content["architectures"] = {key: cuda_anew(found, int(key)) for key, found in old.items()}
        common.write("gpu_static", content)
        return int(any(found["errors"] for found in content["architectures"].values()))
    host = {name: launches.host_seconds(name, GPUS[90]) for name in ALL}
    for name, seconds in host.items():
        print(f"host: {name}: {1e6 * seconds:.1f} µs a launch", flush=True)
    results = dict(tables.results("gpu_static")["architectures"]) if args.capability else {}
    for capability in [args.capability] if args.capability else reversed(GPUS):
        results[str(capability)] = of_capability(capability, host)
        content = {"note": NOTE, "model": vars(SEVEN_B), "host_seconds_per_launch": host, "architectures": results}
        common.write("gpu_static", content)
    return int(any(found["errors"] for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
