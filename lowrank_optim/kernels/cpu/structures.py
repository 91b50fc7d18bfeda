"""The structures of csrc/cpu/ops.h that the functions of the library take, and their bytes.

`packer(kind)` makes a function from the values of all fields to the bytes of a structure. The values of an inner structure stand in
its place. It takes a tenth of a microsecond; ctypes' own constructors take two. Addresses are integers, 0 where there is nothing.
Fields whose names begin with "_" are the library's own: they are 0, and are not among the values.
"""

import struct
from collections.abc import Callable
from ctypes import Structure, c_bool, c_double, c_float, c_int32, c_int64, c_uint16, c_uint64, c_void_p, sizeof
from typing import cast

_LETTERS = {
    c_bool: "?",
    c_int32: "i",
    c_int64: "q",
    c_uint16: "H",
    c_uint64: "Q",
    c_float: "f",
    c_double: "d",
    c_void_p: "Q",
}
_P, _N = c_void_p, c_int64


class Noise(Structure):
    _fields_ = (("on", c_bool), ("key", c_uint64), ("start", _N), ("offset", c_uint16))


class Rows(Structure):
    _fields_ = (("data", _P), ("dtype", c_int32), ("stride", _N))


class Adam(Structure):
    _fields_ = tuple((name, c_float) for name in ("weight1", "beta2", "weight2", "root_factor", "root_offset"))


class WeightError(Structure):
    _fields_ = (("high", _P), ("low", _P))


class StepParams(Structure):
    _fields_ = (("keep", c_float), ("alpha", c_float), ("rounding", Noise), ("error", WeightError))


_WRITTEN = (("out", _P), ("weight", Rows), ("adam", Adam), ("write", StepParams))
_NORMS = (("norms", _P), ("grad_norms", _P))


class AdamArgs(Structure):
    _fields_ = (
        *(("numel", _N), ("cols", _N)),
        *(("grad", Rows), ("exp_avg", _P), ("exp_avg_sq", _P)),
        *_WRITTEN,
        *_NORMS,
    )


class FoldedAdamArgs(Structure):
    _fields_ = (
        *(("rows", _N), ("cols", _N), ("fold", _N)),
        *(("grad", Rows), ("exp_avg", _P), ("exp_avg_sq", _P)),
        *(("weight", Rows), ("adam", Adam), ("residual", c_float), ("write", StepParams)),
    )


class RuleArgs(Structure):
    _fields_ = (
        *(("rule", c_int32), ("numel", _N), ("grad", _P), ("moment", _P), ("out", _P)),
        *((name, c_float) for name in ("first", "second", "third")),
    )


class Coding(Structure):
    _fields_ = (
        *((name, _N) for name in ("rows", "cols", "block")),
        *(("bits", c_int32), ("col_scale", _P), ("rows_per_scale", _N), ("_inverse", _P)),
    )


class CodedAdamArgs(Structure):
    _fields_ = (
        *(("coding", Coding), ("grad", Rows)),
        *((name, _P) for name in ("ratio", "ratio_scale", "root", "root_scale")),
        *_WRITTEN,
        *(("noise", Noise), *_NORMS, ("_squares", _P)),
    )


class QuantizeArgs(Structure):
    _fields_ = (
        *(("coding", Coding), ("is_signed", c_bool), ("x", Rows)),
        *(("codes", _P), ("scale", _P), ("noise", Noise)),
    )


class DequantizeArgs(Structure):
    _fields_ = (("coding", Coding), ("is_signed", c_bool), ("codes", _P), ("scale", _P), ("x", Rows))


class PackArgs(Structure):
    _fields_ = (("coding", Coding), ("x", Rows), ("codes", _P), ("scale", _P), ("zero", _P))


class UnpackArgs(Structure):
    _fields_ = (("coding", Coding), ("codes", _P), ("scale", _P), ("zero", _P), ("x", Rows))


class UpdateArgs(Structure):
    _fields_ = (
        *(("rows", _N), ("cols", _N), ("weight", Rows), ("write", StepParams)),
        *(("product", Rows), ("grad", Rows), ("subtract", Rows), ("sign", c_bool)),
        *(("phi", _P), ("phi_row", _N), ("phi_col", _N)),
    )


class StoreArgs(Structure):
    _fields_ = (
        *(("rows", _N), ("cols", _N), ("target", Rows), ("value", Rows)),
        *(("rounding", Noise), ("error", WeightError), ("value_error", WeightError)),
    )


class NormArgs(Structure):
    _fields_ = (("numel", _N), ("x", Rows), ("norm", _P), ("_sums", _P))


class LinesArgs(Structure):
    _fields_ = (
        *(("rows", _N), ("cols", _N), ("grad", Rows), ("by_row", c_bool)),
        *((name, _P) for name in ("vector", "dots", "squares")),
    )


class Support(Structure):
    _fields_ = (("rows", _N), ("cols", _N), ("pointers", _P), ("columns", _P), ("narrow", c_bool))


class SparseArgs(Structure):
    _fields_ = (
        *(("support", Support), ("forward", c_bool), ("tokens", _N)),
        *(("values", Rows), ("x", Rows), ("out", Rows)),
    )


class SampledArgs(Structure):
    _fields_ = (("support", Support), ("tokens", _N), ("grad", Rows), ("x", Rows), ("values", _P))


class GaussianArgs(Structure):
    _fields_ = (("out", _P), ("numel", _N), ("key", c_uint64))


class TallArgs(Structure):
    _fields_ = (("size", _N), ("rank", _N), ("wide", c_bool))


class GramArgs(Structure):
    _fields_ = (("tall", TallArgs), ("left", _P), ("right", _P), ("out", _P))


class PairStepArgs(Structure):
    _fields_ = (
        *(("tall", TallArgs), ("weight", _P), ("grad", _P), ("momentum", _P), ("small", _P)),
        *((name, c_float) for name in ("share", "alpha", "keep")),
        *(("after", _P), ("cross", _P), ("_marks", _P)),
    )


class TurnArgs(Structure):
    _fields_ = (("tall", TallArgs), ("form", _P), ("small", _P))


class InversePowerArgs(Structure):
    _fields_ = (
        *(("count", _N), ("rank", _N), ("matrices", _P), ("shift", _P), ("out", _P)),
        *(("tolerance", c_double), ("added", c_double), ("root", c_bool)),
    )


class RiteArgs(Structure):
    _fields_ = (
        *(("tall", TallArgs), ("weight", _P), ("grad", _P), ("momentum", _P), ("moment", _P), ("known", _P)),
        *((name, c_float) for name in ("share", "alpha", "keep")),
        *((name, c_double) for name in ("square_share", "tolerance", "added")),
        ("finite", _P),
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
