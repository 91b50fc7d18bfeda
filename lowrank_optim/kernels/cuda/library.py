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


class Noise(Structure):
    _fields_ = (("on", c_int32), ("shift", c_uint16), ("key", c_uint64), ("start", c_int64))


class Adam(Structure):
    _fields_ = tuple((name, c_float) for name in ("weight1", "beta2", "weight2", "root_factor", "root_offset"))


class StepParams(Structure):
    _fields_ = (("alpha", c_float), ("keep", c_float), ("error", c_void_p), ("error_low", c_void_p))


class Strided(Structure):
    _fields_ = (("batch", c_int64), ("row", c_int64), ("col", c_int64))


class Coding(Structure):
    _fields_ = (
        ("rows", c_int64),
        ("cols", c_int64),
        ("block", c_int64),
        ("col_scale", c_void_p),
        ("rows_per_scale", c_int64),
        ("bits", c_int32),
        ("packed", c_int32),
    )


class AdamElement(Structure):
    _fields_ = (
        ("grad", c_void_p),
        ("m", c_void_p),
        ("v", c_void_p),
        ("out", c_void_p),
        ("weight", c_void_p),
        ("ok", c_void_p),
        ("grad_dtype", c_int32),
        ("weight_dtype", c_int32),
        ("adam", Adam),
        ("write", StepParams),
        ("rounding", Noise),
    )


class RuleElement(Structure):
    _fields_ = (
        ("grad", c_void_p),
        ("moment", c_void_p),
        ("out", c_void_p),
        ("ok", c_void_p),
        ("rule", c_int32),
        ("first", c_float),
        ("second", c_float),
        ("third", c_float),
    )


class GaussianElement(Structure):
    _fields_ = (("out", c_void_p), ("size", c_int64), ("key", c_uint64))


class StoreElement(Structure):
    _fields_ = (
        ("target", c_void_p),
        ("value", c_void_p),
        ("keep", c_void_p),
        ("ok", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("target_by", Strided),
        ("value_by", Strided),
        ("target_dtype", c_int32),
        ("flat", c_int32),
        ("update", c_int32),
        ("keep_is_double", c_int32),
        ("write", StepParams),
        ("rounding", Noise),
    )


class QuantizeBlock(Structure):
    _fields_ = (
        ("coding", Coding),
        ("x", c_void_p),
        ("codes", c_void_p),
        ("scale", c_void_p),
        ("dtype", c_int32),
        ("with_sign", c_int32),
        ("noise", Noise),
    )


class DequantizeBlock(Structure):
    _fields_ = (
        ("coding", Coding),
        ("codes", c_void_p),
        ("scale", c_void_p),
        ("out", c_void_p),
        ("dtype", c_int32),
        ("with_sign", c_int32),
    )


class PackBlock(Structure):
    _fields_ = (
        ("coding", Coding),
        ("basis", c_void_p),
        ("codes", c_void_p),
        ("scale", c_void_p),
        ("zero", c_void_p),
        ("dtype", c_int32),
    )


class UnpackBlock(Structure):
    _fields_ = (
        ("coding", Coding),
        ("codes", c_void_p),
        ("scale", c_void_p),
        ("zero", c_void_p),
        ("out", c_void_p),
        ("dtype", c_int32),
    )


class CodedAdamBlock(Structure):
    _fields_ = (
        ("coding", Coding),
        ("grad", c_void_p),
        ("ratio", c_void_p),
        ("ratio_scale", c_void_p),
        ("root", c_void_p),
        ("root_scale", c_void_p),
        ("out", c_void_p),
        ("weight", c_void_p),
        ("ok", c_void_p),
        ("grad_dtype", c_int32),
        ("weight_dtype", c_int32),
        ("adam", Adam),
        ("write", StepParams),
        ("noise", Noise),
        ("rounding", Noise),
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
