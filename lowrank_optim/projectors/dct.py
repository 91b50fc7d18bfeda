"""Subspaces of cosines: some vectors of the discrete cosine transform, of which only the numbers are kept."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lowrank_optim import kernels
from lowrank_optim.kernels.counter_rng import choose, derive_key
from lowrank_optim.projectors.base import Basis, Projector, Refresh, SubspaceSpec, usable
from lowrank_optim.projectors.dense_basis import DenseBasis


def cosines(places: Tensor, waves: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """The vectors `waves` (…, r) of the orthonormal DCT-II of this size, at `places` (k,): (…, k, r).

        q_ij = √(2/d)·cos(π i (2j + 1)/2d),   q_0j = √(1/d),   i the wave, j the place

    Of the 4d different values a table is made in float64, so that an entry does not depend on what else is asked for.
    """
    table = torch.arange(4 * size, device=waves.device, dtype=torch.float64).mul_(math.pi / (2 * size)).cos_()
    table = table.mul_(math.sqrt(2.0 / size)).to(dtype)
    whole = torch.int32 if 2 * size * size < 2**31 else torch.int64
    turns = ((2 * places + 1).to(whole).unsqueeze(-1) * waves.to(whole).unsqueeze(-2)).remainder_(4 * size)
    found = table.index_select(0, turns.view(-1)).view(turns.shape)
    return found.mul_((waves == 0).to(dtype).mul_(math.sqrt(0.5) - 1.0).add_(1.0).unsqueeze(-2))


def transformed(lines: Tensor) -> Tensor:
    """The DCT-II of every row of `lines` (…, d), orthonormal: that of the cosines above, by a Fourier transform of the same size.

    The row is taken at its even places forwards, then at its odd ones backwards (Makhoul, 1980).
    """
    size = lines.shape[-1]
    if lines.numel() == 0:  # a process that holds no row of a matrix, or no matrix of a stack
        return torch.empty_like(lines)
    mixed = torch.fft.fft(torch.cat([lines[..., ::2], lines[..., 1::2].flip(-1)], -1))
    angle = torch.arange(size, device=lines.device, dtype=torch.float64).mul_(-math.pi / (2 * size))
    length = torch.full_like(angle, math.sqrt(2.0 / size))
    length[0] = math.sqrt(1.0 / size)
    turn = torch.polar(length, angle).to(mixed.dtype)
    coefficients: Tensor = (mixed * turn).real
    return coefficients


@dataclass(frozen=True)
class CosineBasis(DenseBasis):
    """Some vectors of a DCT: `waves` (…, r), all different, and their matrix. From one to another, moments are selected."""

    waves: Tensor | None = None

    def _place_in(self, old: Self) -> Tensor:
        """For every wave its place among those of `old`, −1 where it is none of them."""
        assert self.waves is not None
        assert old.waves is not None
        size = int(self._spread.whole_shape(self.matrix)[-2])
        waves = old.waves.to(torch.int64)
        places = torch.full((*waves.shape[:-1], size), -1, dtype=torch.int64, device=waves.device)
        places.scatter_(-1, waves, torch.arange(waves.shape[-1], device=waves.device).expand_as(waves))
        return places.gather(-1, self.waves.to(torch.int64))

    def transport(self, moment: Tensor, old: Self, power: int) -> Tensor:
        """The columns of the waves that both have, as they are; 0 for new ones."""
        places = self._place_in(old).unsqueeze(-2)
        index = places.clamp_min(0).expand(*moment.shape[:-1], places.shape[-1])
        return torch.where(places >= 0, moment.gather(-1, index), 0.0)

    def overlap(self, old: Self) -> Tensor:
        return (self._place_in(old) >= 0).to(self.matrix.dtype).mean()


@dataclass(frozen=True)
class DCT(Projector):
    """The r vectors of the discrete cosine transform that hold most of the gradient, by the norms of G's coefficients (DCT-AdamW).

    A refresh transforms the gradient's rows (columns for side "left") and sums the squares of each coefficient. All matrices of one
    size have the same transform, so that r numbers are all that is kept of a basis.

    Vectors that are chosen again keep their place, and so their moments, also where the subspace is refreshed at every step. Moments
    of new ones begin at 0 with `on_refresh="rotate"`; with "keep" they are those of the vectors that left. Under "rotate" Adam's
    second moments go through a difference and a sum, which may turn their last bits.

    A gradient that is split along the projected side is gathered on refresh steps; one that is split along the other sends d sums.

    Memory: 4 bytes for each of r numbers (`indices`, int32); a step works with one d×r matrix, a refresh with a few
    million numbers besides.

    Paper: Modoranu et al., "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models",
    ICLR 2026, arXiv:2505.17967.
    """

    name: ClassVar[str] = "dct"
    state_lies: ClassVar[Mapping[str, str]] = {"indices": "chosen"}
    knows_shards: ClassVar[bool] = True

    def init(self, space: SubspaceSpec, key: int, device: torch.device) -> dict[str, Tensor]:
        keys = [derive_key(key, i) for i in range(math.prod(space.batch))]
        drawn = [choose(each, space.basis_rows, space.rank, device) for each in keys]
        whole = torch.stack(drawn).view(*space.batch, space.rank).to(torch.int32)
        return {"indices": space.sharding.sharding_of("chosen", space.side).part(whole)}

    def refresh(self, request: Refresh) -> dict[str, Tensor] | None:
        space, sharding, old = request.space, request.space.sharding, request.state["indices"]
        ok = usable(request.grad, sharding.matrix)
        # The host waits for the device here, on refresh steps only.
        if not bool(sharding.matrix.sum(ok.any().float(), -3)):
            return None
        dim, other = (-1, -2) if space.side == "right" else (-2, -1)
        lines = sharding.matrix.gather(request.grad, dim)
        lines = lines if space.side == "right" else lines.mT
        # Squares of a gradient of any size must neither overflow nor vanish.
        norm = torch.linalg.vector_norm(lines, dim=(-2, -1), keepdim=True, dtype=space.dtype)
        size = sharding.matrix.norm(norm, other).clamp_min_(torch.finfo(space.dtype).tiny)
        energy = torch.zeros((*lines.shape[:-2], 1, lines.shape[-1]), dtype=space.dtype, device=lines.device)
        for chunk in kernels.row_chunks(lines.shape[-2], lines.shape[-1] * max(math.prod(lines.shape[:-2]), 1)):
            part = transformed(lines[..., chunk, :].to(space.dtype) / size)
            energy.add_(part.square_().sum(-2, keepdim=True))
        energy = sharding.matrix.sum(energy, other).squeeze(-2)
        new = in_place(energy.topk(space.rank).indices, old)
        new = torch.where(ok.squeeze(-1), new, old)
        return {"indices": sharding.sharding_of("chosen", space.side).agree(new)}

    def basis(self, space: SubspaceSpec, state: Mapping[str, Tensor], key: int, device: torch.device) -> Basis:
        sharding, waves = space.sharding, state["indices"]
        own = sharding.rows if space.side == "left" else sharding.cols
        places = own.part(torch.arange(space.basis_rows, device=device).unsqueeze(-1), -2).squeeze(-1)
        return CosineBasis(cosines(places, waves, space.basis_rows, space.dtype), space.side, True, sharding, waves)


def in_place(chosen: Tensor, old: Tensor) -> Tensor:
    """`chosen` (…, r), in any order, as `old` has it: what is in both at its place, what is new at the places that are free."""
    chosen, old = chosen.to(old.dtype).sort(-1).values, old.contiguous()
    stays = (old.unsqueeze(-1) == chosen.unsqueeze(-2)).any(-1)
    fresh = (chosen.unsqueeze(-1) != old.unsqueeze(-2)).all(-1)
    # The places that are free, in order, take the new ones, in order.
    waiting = chosen.gather(-1, fresh.logical_not().to(torch.int8).argsort(dim=-1, stable=True))
    turn = stays.logical_not().cumsum(-1).sub_(1).clamp_min_(0)
    return torch.where(stays, old, waiting.gather(-1, turn))
