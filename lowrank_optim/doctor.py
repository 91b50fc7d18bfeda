"""`lowrank-optim doctor`: which kernels run here, why others do not, and whether they are right."""

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterator

import torch

from lowrank_optim._version import __version__
from lowrank_optim.kernels import Loaded, dispatch
from lowrank_optim.kernels.comparison import Case, answer, compare
from lowrank_optim.kernels.cpu import library
from lowrank_optim.kernels.selftest import quick_cases

SHOWN = "{:22} {}\n"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command of the command line."""
    parser = subparsers.add_parser(
        "doctor",
        help="which kernels run here, and whether they are right",
        description=(
            "Prints versions, the backends that are available and why the others are not, and compares every operation of every "
            "backend with its definition on small cases. Exit status 1 if one of them differs."
        ),
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 if the self-test fails."""
    forced = os.environ.get(dispatch.VARIABLE)
    sys.stdout.writelines(_machine())
    sys.stdout.write("\nBackends\n")
    for name, backend in dispatch.backends().items():
        sys.stdout.writelines(_backend(name, backend))
    sys.stdout.write(SHOWN.format("  reference", "available for every device (torch ops)"))
    if forced:
        valid = (*dispatch.BACKENDS, "reference")
        problem = "" if forced in valid else f": there is no such backend; valid: {', '.join(valid)}"
        sys.stdout.write(f"\n{dispatch.VARIABLE}={forced}{problem}\n")
    begun = time.perf_counter()
    loaded = [(name, backend) for name, backend in dispatch.backends().items() if isinstance(backend, Loaded)]
    failures = sum(_report(name, backend) for name, backend in loaded)
    took = time.perf_counter() - begun
    verdict = f"{failures} operations FAILED" if failures else "all operations agree with their definitions"
    sys.stdout.write(f"\nSelf-test: {verdict} ({took:.1f} s)\n")
    return 1 if failures else 0


def _machine() -> Iterator[str]:
    yield SHOWN.format("lowrank_optim", __version__)
    yield SHOWN.format("torch", torch.__version__)
    yield SHOWN.format("Python", platform.python_version())
    yield SHOWN.format("platform", platform.platform())
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    yield SHOWN.format("accelerator", accelerator)
    yield SHOWN.format("threads", torch.get_num_threads())


def _backend(name: str, backend: Loaded | dispatch.Unavailable) -> Iterator[str]:
    if not isinstance(backend, Loaded):
        yield SHOWN.format(f"  {name}", f"not available: {backend}")
        return
    yield SHOWN.format(
        f"  {name}", f"available for {', '.join(sorted(backend.devices))}: {len(backend.operations)} operations"
    )
    if name == "cpu":
        built = library.open_library()
        yield SHOWN.format("    library", built.path)
        yield SHOWN.format("    compiler, flags", built.build_info)
        yield SHOWN.format("    instruction set", built.simd)
        runtime = library.openmp_of_torch()
        yield SHOWN.format("    threads", "its own" if runtime is None else f"torch's OpenMP, {runtime._name}")
    elif backend.about:
        yield SHOWN.format("   ", backend.about)


def _report(name: str, backend: Loaded) -> int:
    """Compare every operation of a backend with its definition, a line each; returns how many differ."""
    device = "cuda" if "cuda" in backend.devices and torch.cuda.is_available() else "cpu"
    sys.stdout.write(f"\nSelf-test of {name} on {device}\n")
    results: dict[str, list[tuple[float, str]]] = {}
    for case in quick_cases():
        compared = _compare(backend, case, device) if case.op in backend.operations else None
        if compared is not None:
            results.setdefault(case.op, []).append(compared)
    width, failed = max(map(len, results), default=0), 0
    for op, found in results.items():
        error = max(0.0, *(error for error, _ in found))
        failures = [failure for _, failure in found if failure]
        failed += bool(failures)
        verdict = "FAILED" if failures else "ok"
        cases = "1 case, " if len(found) == 1 else f"{len(found)} cases,"
        sys.stdout.write(f"  {op:{width}} {verdict:7} {cases:9} largest error {error:.1e}\n")
        for failure in failures:
            sys.stdout.write(f"    {failure}\n")
    return failed


def _compare(backend: Loaded, case: Case, device: str) -> tuple[float, str] | None:
    """The error, and what is wrong ("" if nothing is); None for what the backend need not have. Whatever it raises is a failure of
    the self-test, not of doctor.
    """
    try:
        got = answer(backend.operations[case.op], case, device)
        want = answer(dispatch._DEFINITIONS[case.op], case, device)
    except Exception as error:
        return torch.inf, f"{case.label}: {type(error).__name__}: {error}"
    if got is None and case.op in backend.partly:
        return None
    if got is None or want is None:
        return torch.inf, f"{case.label}: the backend declines what it should do"
    found = compare(case, got, want)
    return found.error, f"{case.label}: {found.failure}" if found.failure else ""
