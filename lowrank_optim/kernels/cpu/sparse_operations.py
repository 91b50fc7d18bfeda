"""Products with a sparse plus low-rank matrix by the functions of the library; the low-rank part is torch's."""

from typing import Any

from torch import Tensor

from lowrank_optim.kernels.arguments import TYPES, storable
from lowrank_optim.kernels.cpu import structures
from lowrank_optim.kernels.cpu.arguments import (
    F32,
    flat,
    readable,
    support_of,
)
from lowrank_optim.kernels.cpu.library import Declined, OnLibrary
from lowrank_optim.kernels.cpu.structures import packer
from lowrank_optim.kernels.sparse_reference import low_rank

pack_sparse = packer(structures.SparseArgs)
pack_sampled = packer(structures.SampledArgs)


class SparseOperations(OnLibrary):
    """The operations of `kernels.sparse_schemas`."""

    def sltrain_forward(
        self,
        x: Tensor,
        u: Tensor | None,
        lora_b: Tensor | None,
        bias: Tensor | None,
        values: Tensor,
        pointers: Tensor,
        columns: Tensor,
    ) -> Tensor | Declined:
        if not storable(x):
            return NotImplemented
        out = low_rank(x, u, None if lora_b is None else lora_b.mT, bias, pointers.numel() - 1)
        self._add_sparse(True, out, x, values, support_of(pointers, columns, x.shape[-1]))
        return out

    def sltrain_backward_input(
        self,
        grad: Tensor,
        q: Tensor | None,
        lora_a: Tensor | None,
        values: Tensor,
        pointers: Tensor,
        columns: Tensor,
        cols: int,
    ) -> Tensor | Declined:
        if not storable(grad):
            return NotImplemented
        out = low_rank(grad, q, lora_a, None, cols)
        self._add_sparse(False, out, grad, values, support_of(pointers, columns, cols))
        return out

    def _add_sparse(self, forward: bool, out: Tensor, x: Tensor, values: Tensor, support: tuple[Any, ...]) -> None:
        values, tokens = values.contiguous(), x.shape[:-1].numel()
        x, stride = readable(x)
        lines = (x.data_ptr(), TYPES[x.dtype], stride)
        there = (out.data_ptr(), TYPES[out.dtype], out.shape[-1])
        self.library.call("sparse", pack_sparse(*support, forward, tokens, *flat(values), *lines, *there))

    def sampled_product(self, grad: Tensor, x: Tensor, pointers: Tensor, columns: Tensor) -> Tensor | Declined:
        if not storable(x):
            return NotImplemented
        out, tokens = x.new_zeros(columns.numel(), dtype=F32), x.shape[:-1].numel()
        support = support_of(pointers, columns, x.shape[-1])
        (grad, grad_stride), (x, stride) = readable(grad), readable(x)
        lines = (grad.data_ptr(), TYPES[grad.dtype], grad_stride, x.data_ptr(), TYPES[x.dtype], stride)
        self.library.call("sampled", pack_sampled(*support, tokens, *lines, out.data_ptr()))
        return out.to(x.dtype)
