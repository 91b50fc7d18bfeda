"""The shared library of csrc/cpu: where it is, whether it is ours, and its functions with their argument types (`structures`).

The library is built by `pip install` (setup.py) and lies beside this file. LOWRANK_OPTIM_CPU_LIBRARY names another one: a build with
sanitizers, say. A library with another ABI number than ABI_VERSION comes from another version of the package and is not used.
"""

import ctypes
import json
import os
import re
from collections.abc import Sequence
from ctypes import c_char_p, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch

from lowrank_optim.kernels.dispatch import PROCESS, Unavailable

ABI_VERSION = 14
"""Raised, here and in csrc/cpu/abi.cpp, whenever a signature or a structure changes."""

VARIABLE = "LOWRANK_OPTIM_CPU_LIBRARY"
NAME = "liblowrank_optim_cpu.so"
RECORD = "build.json"
"""Beside the library: what setup.py did, and why it failed where it did."""

HERE = Path(__file__).parent
MAPS = Path("/proc/self/maps")
"""The libraries of this process, on Linux."""
REBUILD = (
    "with a C++17 compiler, `pip install --force-reinstall --no-deps --no-binary lowrank-optim lowrank-optim` (in a checkout, `.` in "
    "place of the last word)"
)

_ONE, _MANY = (c_char_p,), (c_int64, c_char_p)

SIGNATURES: dict[str, tuple[type, ...]] = {
    "adam": _MANY,
    "rule": _ONE,
    "folded_adam": _ONE,
    "coded_adam": _MANY,
    "norms": _MANY,
    "quantize_rows": _ONE,
    "dequantize_rows": _ONE,
    "pack_basis": _ONE,
    "unpack_basis": _ONE,
    "update": _ONE,
    "gaussian": _ONE,
    "lines": _ONE,
    "store": _ONE,
    "sparse": _ONE,
    "sampled": _ONE,
    "thin_grams": _MANY,
    "pair_step": _MANY,
    "thin_turn": _MANY,
    "inverse_power": _ONE,
    "rite_step": _MANY,
}
"""Arguments of every function but the last, the number of threads: the bytes of a structure, or of several and before them their
number."""


class Library:
    """A loaded library; `functions` has them under the names of SIGNATURES. They return 0, or 1 where there is no memory."""

    def __init__(self, path: Path, handle: ctypes.CDLL) -> None:
        self.path = path
        self._handle = handle
        self.functions = {name: getattr(handle, f"lowrank_optim_{name}") for name in SIGNATURES}
        for name, function in self.functions.items():
            function.argtypes, function.restype = (*SIGNATURES[name], c_int), c_int
        for name in ("build_info", "simd"):
            getattr(handle, f"lowrank_optim_{name}").restype = c_char_p
        handle.lowrank_optim_use_simd.argtypes = (c_char_p,)
        handle.lowrank_optim_use_openmp.argtypes, handle.lowrank_optim_use_openmp.restype = (c_void_p, c_void_p), None

    def call(self, name: str, *args: int | bytes) -> None:
        """Call a function on torch's number of threads."""
        if self.functions[name](*args, torch.get_num_threads()):
            raise MemoryError(f"lowrank_optim: no memory for the working space of {name}")

    def call_many(self, name: str, structures: Sequence[bytes]) -> None:
        """Call a function of several structures, where there are any."""
        if structures and self.functions[name](len(structures), b"".join(structures), torch.get_num_threads()):
            raise MemoryError(f"lowrank_optim: no memory for the working space of {name}")

    @property
    def build_info(self) -> str:
        """Compiler and flags."""
        return str(self._handle.lowrank_optim_build_info().decode())

    @property
    def simd(self) -> str:
        """The instruction set in use: "avx512", "avx2" or "baseline"."""
        return str(self._handle.lowrank_optim_simd().decode())

    def use_openmp(self, runtime: "ctypes.CDLL | None") -> None:
        """Run on the threads of an OpenMP runtime from now on; None: on threads of the library's own."""
        names = ("GOMP_parallel", "omp_get_thread_num")
        self._handle.lowrank_optim_use_openmp(
            *(ctypes.cast(getattr(runtime, name), c_void_p) if runtime else None for name in names)
        )

    def use_simd(self, name: str) -> bool:
        """Use an instruction set from now on; False if the processor or the library does not have it."""
        return not self._handle.lowrank_optim_use_simd(name.encode())


Declined = Any
"""NotImplemented: an operation is left to another backend, or to its definition."""


class OnLibrary:
    """Operations that call the functions of one library."""

    def __init__(self, library: Library) -> None:
        self.library = library


def open_library() -> Library:
    """Load the library.

    Raises:
        Unavailable: it is not there, or not one of this version of the package.
    """
    chosen = os.environ.get(VARIABLE)
    path = Path(chosen) if chosen else HERE / NAME
    if not path.exists():
        raise Unavailable(f"{VARIABLE}={chosen}: there is no such file." if chosen else _not_built())
    where = f"{path} ({VARIABLE})" if chosen else str(path)
    try:
        handle = ctypes.CDLL(str(path.resolve()))
    except OSError as error:
        raise Unavailable(f"{where} cannot be loaded: {error}. To build it: {REBUILD}.") from None
    try:
        version = handle.lowrank_optim_abi_version()
    except AttributeError:
        raise Unavailable(f"{where} is some other library: it has no lowrank_optim_abi_version.") from None
    if version != ABI_VERSION:
        raise Unavailable(
            f"{where} was built by another version of lowrank_optim: its ABI number is {version}, this version has "
            f"{ABI_VERSION}. To build it anew: {REBUILD}."
        )
    try:
        library = Library(path, handle)
    except AttributeError as error:
        raise Unavailable(f"{where} lacks a function of ABI {ABI_VERSION}: {error}. To build it: {REBUILD}.") from None
    if os.getpid() == PROCESS:  # the threads of a runtime stay behind in a fork, which it does not notice
        library.use_openmp(openmp_of_torch())
    return library


def openmp_of_torch() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch has loaded, if it can be found and speaks GCC's dialect (LLVM's and Intel's do)."""
    try:
        maps = os.fsdecode(MAPS.read_bytes())  # anybody may have mapped a file of any name
    except OSError:
        return None
    torch_has = sorted(set(re.findall(r"/\S.*/torch(?:\.libs|/lib)/lib(?:gomp|iomp5|omp)\b[^/\n]*\.so[^/\n]*", maps)))
    try:
        runtime = ctypes.CDLL(torch_has[0])
        return runtime if hasattr(runtime, "GOMP_parallel") and hasattr(runtime, "omp_get_thread_num") else None
    except (OSError, IndexError):
        return None


def _not_built() -> str:
    """Why there is no library, as setup.py has recorded it."""
    try:
        record = json.loads((HERE / RECORD).read_text(encoding="utf-8"))
        reason = str(record["error"])
    except (OSError, ValueError, KeyError):
        return f"it was not built. To build it: {REBUILD}."
    return f"it could not be built: {reason} To build it: {REBUILD}."
