"""Codes of rows and of bases by the functions of the library."""

import torch
from torch import Tensor

from lowrank_optim.kernels.arguments import TYPES, storable
from lowrank_optim.kernels.checks import empty_codes
from lowrank_optim.kernels.cpu import structures
from lowrank_optim.kernels.cpu.arguments import (
    F32,
    coding_of,
    columns_of,
    noise_of,
    readable,
)
from lowrank_optim.kernels.cpu.library import Declined, OnLibrary
from lowrank_optim.kernels.cpu.structures import packer

pack_quantize = packer(structures.QuantizeArgs)
pack_dequantize = packer(structures.DequantizeArgs)
pack_pack = packer(structures.PackArgs)
pack_unpack = packer(structures.UnpackArgs)


class CodeOperations(OnLibrary):
    """The operations that only code or decode."""

    def quantize_rows(
        self, x: Tensor, col_scale: Tensor | None, noise: Tensor | None, bits: int, signed: bool, block: int
    ) -> tuple[Tensor, Tensor] | Declined:
        columns = columns_of(col_scale, x.shape)
        if not storable(x) or columns is None:
            return NotImplemented
        x, stride = readable(x)
        codes, scale = empty_codes(x, bits, signed, block)
        coding, matrix = coding_of(x.shape, block, bits, columns), (x.data_ptr(), TYPES[x.dtype], stride)
        to = codes.data_ptr(), scale.data_ptr()
        self.library.call("quantize_rows", pack_quantize(*coding, signed, *matrix, *to, *noise_of(noise)))
        return codes, scale

    def dequantize_rows(
        self,
        codes: Tensor,
        scale: Tensor,
        col_scale: Tensor | None,
        bits: int,
        signed: bool,
        block: int,
        cols: int,
        dtype: torch.dtype,
    ) -> Tensor | Declined:
        shape = torch.Size((*codes.shape[:-1], cols))
        columns = columns_of(col_scale, shape)
        if dtype not in TYPES or columns is None:
            return NotImplemented
        codes, scale = codes.contiguous(), scale.contiguous()
        out = codes.new_empty(shape, dtype=dtype)
        coding, matrix = coding_of(shape, block, bits, columns), (out.data_ptr(), TYPES[dtype], cols)
        source = codes.data_ptr(), scale.data_ptr()
        self.library.call("dequantize_rows", pack_dequantize(*coding, signed, *source, *matrix))
        return out

    def pack_basis(self, basis: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor] | Declined:
        if not storable(basis):
            return NotImplemented
        basis, stride = readable(basis)
        codes, scale = empty_codes(basis, bits, False, group)
        zero = torch.zeros_like(scale)
        coding, matrix = coding_of(basis.shape, group, bits), (basis.data_ptr(), TYPES[basis.dtype], stride)
        to = codes.data_ptr(), scale.data_ptr(), zero.data_ptr()
        self.library.call("pack_basis", pack_pack(*coding, *matrix, *to))
        return codes, scale, zero

    def unpack_basis(
        self, codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int, cols: int, dtype: torch.dtype
    ) -> Tensor | Declined:
        if dtype not in TYPES or scale.dtype != F32 or zero.dtype != F32:
            return NotImplemented
        codes, scale, zero = codes.contiguous(), scale.contiguous(), zero.contiguous()
        out = codes.new_empty((*codes.shape[:-1], cols), dtype=dtype)
        coding, matrix = coding_of(out.shape, group, bits), (out.data_ptr(), TYPES[dtype], cols)
        source = codes.data_ptr(), scale.data_ptr(), zero.data_ptr()
        self.library.call("unpack_basis", pack_unpack(*coding, *source, *matrix))
        return out
