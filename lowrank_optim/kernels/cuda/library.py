"""The shared library of csrc/cuda: where it is, whether it is ours, its functions and the structures that they take.

It lies beside this file, where `python -m lowrank_optim.kernels.cuda.build` puts it. LOWRANK_OPTIM_CUDA_LIBRARY names another one,
such as the host build, which does on CPU tensors what the device does.
"""

import ctypes
import os
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int32, c_int64, c_uint16, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from lowrank_optim.kernels.dispatch import Unavailable

ABI_VERSION = 4
"""Raised, here and in csrc/cuda/abi.cu, whenever a signature or a structure changes."""

VARIABLE = "LOWRANK_OPTIM_CUDA_LIBRARY"
NAME = "liblowrank_optim_cuda.so"
HERE = Path(__file__).parent
REBUILD = "run `python -m lowrank_optim.kernels.cuda.build` in a checkout, with nvcc on the path"


def _each(kind: Any, *names: str) -> tuple[tuple[str, Any], ...]:
    """Fields of one type."""
    return tuple((name, kind) for name in names)


class Noise(Structure):
    _fields_ = (("on", c_int32), ("shift", c_uint16), ("key", c_uint64), ("start", c_int64))


class Adam(Structure):
    _fields_ = _each(c_float, "weight1", "beta2", "weight2", "root_factor", "root_offset")


class StepParams(Structure):
    _fields_ = (*_each(c_float, "alpha", "keep"), *_each(c_void_p, "error", "error_low"))


class Strided(Structure):
    _fields_ = _each(c_int64, "batch", "row", "col")


class Coding(Structure):
    _fields_ = (
        *_each(c_int64, "rows", "cols", "block"),
        *(("col_scale", c_void_p), ("rows_per_scale", c_int64)),
        *_each(c_int32, "bits", "packed"),
    )


class AdamElement(Structure):
    _fields_ = (
        *_each(c_void_p, "grad", "m", "v", "out", "weight", "ok"),
        *_each(c_int32, "grad_dtype", "weight_dtype"),
        *(("adam", Adam), ("write", StepParams), ("rounding", Noise)),
    )


class RuleElement(Structure):
    _fields_ = (
        *_each(c_void_p, "grad", "moment", "out", "ok"),
        ("rule", c_int32),
        *_each(c_float, "first", "second", "third"),
    )


class GaussianElement(Structure):
    _fields_ = (("out", c_void_p), ("size", c_int64), ("key", c_uint64))


class StoreElement(Structure):
    _fields_ = (
        *_each(c_void_p, "target", "value", "keep", "ok"),
        *_each(c_int64, "rows", "cols"),
        *_each(Strided, "target_by", "value_by"),
        *_each(c_int32, "target_dtype", "flat", "update", "keep_is_double"),
        *(("write", StepParams), ("rounding", Noise)),
    )


class QuantizeBlock(Structure):
    _fields_ = (
        ("coding", Coding),
        *_each(c_void_p, "x", "codes", "scale"),
        *_each(c_int32, "dtype", "with_sign"),
        ("noise", Noise),
    )


class DequantizeBlock(Structure):
    _fields_ = (("coding", Coding), *_each(c_void_p, "codes", "scale", "out"), *_each(c_int32, "dtype", "with_sign"))


class PackBlock(Structure):
    _fields_ = (("coding", Coding), *_each(c_void_p, "basis", "codes", "scale", "zero"), ("dtype", c_int32))


class UnpackBlock(Structure):
    _fields_ = (("coding", Coding), *_each(c_void_p, "codes", "scale", "zero", "out"), ("dtype", c_int32))


class CodedAdamBlock(Structure):
    _fields_ = (
        ("coding", Coding),
        *_each(c_void_p, "grad", "ratio", "ratio_scale", "root", "root_scale", "out", "weight", "ok"),
        *_each(c_int32, "grad_dtype", "weight_dtype"),
        *(("adam", Adam), ("write", StepParams)),
        *_each(Noise, "noise", "rounding"),
    )


SIGNATURES: dict[str, tuple[Any, ...]] = {
    "adam": (POINTER(AdamElement), POINTER(c_int64), c_int64, c_void_p),
    "rule": (POINTER(RuleElement), c_int64, c_void_p),
    "gaussian": (POINTER(GaussianElement), c_void_p),
    "store": (POINTER(StoreElement), c_int64, c_void_p),
    "coded_adam": (POINTER(CodedAdamBlock), c_int64, c_void_p),
    "quantize_rows": (POINTER(QuantizeBlock), c_void_p),
    "dequantize_rows": (POINTER(DequantizeBlock), c_void_p),
    "pack_basis": (POINTER(PackBlock), c_void_p),
    "unpack_basis": (POINTER(UnpackBlock), c_void_p),
}
"""Arguments of every function; the last is the stream."""


class Library:
    """A loaded library."""

    def __init__(self, path: Path, handle: ctypes.CDLL) -> None:
        self.path = path
        self._functions = {name: getattr(handle, f"lowrank_optim_cuda_{name}") for name in SIGNATURES}
        for name, function in self._functions.items():
            function.argtypes, function.restype = SIGNATURES[name], c_int
        self._error = handle.lowrank_optim_cuda_error
        self._error.argtypes, self._error.restype = (c_int,), c_char_p
        handle.lowrank_optim_cuda_build_info.restype = c_char_p
        self.build_info = str(handle.lowrank_optim_cuda_build_info().decode())
        self.on_host = self.build_info == "host"

    def call(self, name: str, *args: Any) -> None:
        """Call a function on a stream, its last argument.

        Raises:
            RuntimeError: the kernel could not be launched.
        """
        code = self._functions[name](*args)
        if code:
            raise RuntimeError(f"lowrank_optim: CUDA cannot run {name}: {self._error(code).decode()} (error {code})")


def open_library(chosen: str | None = None) -> Library:
    """Load the library: `chosen`, the one that LOWRANK_OPTIM_CUDA_LIBRARY names, or the one beside this file.

    Raises:
        Unavailable: it is not there, or not one of this version of the package.
    """
    named = chosen or os.environ.get(VARIABLE)
    path = Path(named) if named else HERE / NAME
    if not path.exists():
        why = f"{VARIABLE}={named}: there is no such file." if named else f"it is not built. To build it: {REBUILD}."
        raise Unavailable(why)
    try:
        handle = ctypes.CDLL(str(path.resolve()))
    except OSError as error:
        raise Unavailable(f"{path} cannot be loaded: {error}. To build it anew: {REBUILD}.") from None
    try:
        version = handle.lowrank_optim_cuda_abi_version()
    except AttributeError:
        raise Unavailable(f"{path} is some other library: it has no lowrank_optim_cuda_abi_version.") from None
    if version != ABI_VERSION:
        raise Unavailable(
            f"{path} was built by another version of lowrank_optim: its ABI number is {version}, this version has "
            f"{ABI_VERSION}. To build it anew: {REBUILD}."
        )
    try:
        return Library(path, handle)
    except AttributeError as error:
        raise Unavailable(f"{path} lacks a function of ABI {ABI_VERSION}: {error}. To build it: {REBUILD}.") from None
