"""Products with the factors of many pairs, and functions of their small matrices, by the functions of the library."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_optim.kernels.cpu import structures
from lowrank_optim.kernels.cpu.arguments import F32
from lowrank_optim.kernels.cpu.library import Declined, OnLibrary
from lowrank_optim.kernels.cpu.structures import packer

LARGEST_RANK = 128
"""Above it, torch's products of whole matrices are as fast, and LAPACK for small ones."""

pack_gram = packer(structures.GramArgs)
pack_pair_step = packer(structures.PairStepArgs)
pack_turn = packer(structures.TurnArgs)
pack_inverse_power = packer(structures.InversePowerArgs)
pack_rite = packer(structures.RiteArgs)


def _size(factor: Tensor, wide: bool) -> int:
    return factor.shape[1 if wide else 0]


def _rank(factors: Sequence[Tensor], wide: Sequence[bool]) -> int:
    """The rank of factors that the library takes; 0 for others."""
    rank = factors[0].shape[0 if wide[0] else 1]
    return rank if factors[0].dtype == F32 and rank <= LARGEST_RANK else 0


class PairOperations(OnLibrary):
    """The operations of `kernels.pair_schemas`."""

    def thin_grams(self, left: Sequence[Tensor], right: Sequence[Tensor], wide: Sequence[bool]) -> Tensor | Declined:
        if not (rank := _rank(left, wide)):
            return NotImplemented
        out = left[0].new_empty((len(left), rank, rank))
        to, step = out.data_ptr(), 4 * rank * rank
        rows = [
            pack_gram(_size(x, lies), rank, lies, x.data_ptr(), y.data_ptr(), to + n * step)
            for n, (x, y, lies) in enumerate(zip(left, right, wide, strict=True))
        ]
        self.library.call_many("thin_grams", rows)
        return out

    def pair_step_(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        momenta: Sequence[Tensor],
        small: Tensor,
        numbers: Tensor,
        wide: Sequence[bool],
    ) -> tuple[Tensor, Tensor] | Declined:
        if not (rank := _rank(weights, wide)):
            return NotImplemented
        after, cross = torch.empty_like(small), torch.empty_like(small)
        at = 0
        places, step = (small.data_ptr(), after.data_ptr(), cross.data_ptr()), 4 * rank * rank
        rows = []
        for weight, grad, momentum, three, lies in zip(weights, grads, momenta, numbers.tolist(), wide, strict=True):
            tensors = weight.data_ptr(), grad.data_ptr(), momentum.data_ptr()
            rows.append(
                pack_pair_step(
                    _size(weight, lies), rank, lies, *tensors, places[0] + at, *three, places[1] + at, places[2] + at
                )
            )
            at += step
        self.library.call_many("pair_step", rows)
        return after, cross

    def thin_turn_(self, forms: Sequence[Tensor], small: Tensor, wide: Sequence[bool]) -> Declined | None:
        if not (rank := _rank(forms, wide)):
            return NotImplemented
        source, step = small.data_ptr(), 4 * rank * rank
        rows = [
            pack_turn(_size(x, lies), rank, lies, x.data_ptr(), source + n * step)
            for n, (x, lies) in enumerate(zip(forms, wide, strict=True))
        ]
        self.library.call_many("thin_turn", rows)
        return None

    def inverse_power(self, matrices: Tensor, shift: Tensor | None, scalars: Tensor, root: bool) -> Tensor | Declined:
        rank = matrices.shape[-1]
        if matrices.dtype != torch.float64 or not 0 < rank <= LARGEST_RANK:
            return NotImplemented
        matrices, shift = matrices.contiguous(), None if shift is None else shift.contiguous()
        out = torch.empty_like(matrices)
        count, places = matrices.numel() // rank**2, (0 if shift is None else shift.data_ptr(), out.data_ptr())
        arguments = pack_inverse_power(count, rank, matrices.data_ptr(), *places, *scalars.tolist(), root)
        self.library.call("inverse_power", arguments)
        return out

    def rite_step_(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        momenta: Sequence[Tensor],
        moments: Sequence[Tensor],
        escaped: Sequence[Tensor],
        known: Tensor,
        numbers: Tensor,
        scalars: Tensor,
        wide: Sequence[bool],
        finite: Tensor | None = None,
    ) -> Declined | None:
        if escaped or not (rank := _rank(weights, wide)):
            return NotImplemented
        added = scalars.tolist()
        of_side = [
            (share, alpha, keep, square_share, *added) for share, square_share, _, alpha, keep in numbers.tolist()
        ]
        place, step = known.data_ptr(), 8 * known.shape[1]
        flags, next_flag = (0, 0) if finite is None else (finite.data_ptr(), 1)
        rows = [
            pack_rite(
                *(weight.shape[lies], rank, lies),
                *(weight.data_ptr(), grad.data_ptr(), momentum.data_ptr(), moment.data_ptr(), place + n * step),
                *of_side[n % 2],
                flags + n * next_flag,
            )
            for n, (weight, grad, momentum, moment, lies) in enumerate(
                zip(weights, grads, momenta, moments, wide, strict=True)
            )
        ]
        self.library.call_many("rite_step", rows)
        return None
