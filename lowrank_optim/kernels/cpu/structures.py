"""The structures of csrc/cpu/ops.h that the functions of the library take, and their bytes.

`packer(kind)` makes a function from the values of all fields to the bytes of a structure. The values of an inner structure stand in
its place. It takes a tenth of a microsecond; ctypes' own constructors take two. Addresses are integers, 0 where there is nothing.
Fields whose names begin with "_" are the library's own: they are 0, and are not among the values.
"""

import struct
from collections.abc import Callable
from ctypes import Structure, c_bool, c_float, c_int32, c_int64, c_uint16, c_uint64, c_void_p, sizeof
from typing import cast

_LETTERS = {c_bool: "?", c_int32: "i", c_int64: "q", c_uint16: "H", c_uint64: "Q", c_float: "f", c_void_p: "Q"}
_P, _N = c_void_p, c_int64


class Noise(Structure):
    _fields_ = (("on", c_bool), ("key", c_uint64), ("start", _N), ("offset", c_uint16))


class Rows(Structure):
    _fields_ = (("data", _P), ("dtype", c_int32), ("stride", _N))


class Adam(Structure):
    _fields_ = tuple((name, c_float) for name in ("weight1", "beta2", "weight2", "correction", "floor"))


class Write(Structure):
    _fields_ = (("keep", c_float), ("alpha", c_float), ("rounding", Noise))


class AdamArgs(Structure):
    _fields_ = (
        ("numel", _N),
        ("cols", _N),
        ("grad", Rows),
        ("exp_avg", _P),
        ("exp_avg_sq", _P),
        ("out", _P),
        ("weight", Rows),
        ("adam", Adam),
        ("write", Write),
        ("norms", _P),
        ("grad_norms", _P),
    )


def packer(kind: type[Structure]) -> Callable[..., bytes]:
    """The function from the values of the fields of a structure to its bytes."""
    return struct.Struct("=" + _format(kind)).pack


def _format(kind: type[Structure]) -> str:
    """The fields in the letters of `struct`, with the padding between them that the compiler leaves."""
    letters, end = "", 0
    for name, inner, *_ in kind._fields_:
        at = getattr(kind, name).offset
        size = sizeof(inner)
        letters += "x" * (at - end)
        letters += (
            "x" * size if name.startswith("_") else _LETTERS.get(inner) or _format(cast("type[Structure]", inner))
        )
        end = at + size
    return letters + "x" * (sizeof(kind) - end)
