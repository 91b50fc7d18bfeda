"""Random subspaces, regenerated from a key whenever they are needed and never stored."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowrank_optim.kernels.counter_rng import derive_key, gaussian
from lowrank_optim.projectors.base import Basis, Projector, Refresh, SubspaceSpec
from lowrank_optim.projectors.dense_basis import DenseBasis, TwoSidedBasis
from lowrank_optim.projectors.randomized_svd import cholesky_qr, orthonormalize

KINDS = ("gaussian", "orthonormal")


@dataclass(frozen=True)
class Random(Projector):
    """A random basis: independent Gaussian entries of variance 1/r, or orthonormal columns.

    A Gaussian basis is as cheap as its random numbers; P Pᵀ is the identity on average. The orthonormal one costs a Cholesky-QR a
    step besides.

    Memory: nothing is kept; a step works with one d×r matrix at a time, also where the weights are sharded.
    """

    kind: str = "orthonormal"
    needs_gradient: ClassVar[bool] = False
    knows_shards: ClassVar[bool] = True
    sides: ClassVar[tuple[str, ...]] = ("left", "right", "full")

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Random's kind is {self.kind!r}; valid values are {', '.join(KINDS)}")

    @property
    def orthonormal(self) -> bool:  # type: ignore[override]
        return self.kind == "orthonormal"

    @property
    def name(self) -> str:
        return "random" if self.kind == Random.kind else f"random:{self.kind}"

    def init(self, space: SubspaceSpec, key: int, device: torch.device) -> dict[str, Tensor]:
        return {}

    def refresh(self, request: Refresh) -> dict[str, Tensor] | None:
        return {}

    def basis(self, space: SubspaceSpec, state: Mapping[str, Tensor], key: int, device: torch.device) -> Basis:
        orthonormal, sharding = self.kind == "orthonormal", space.sharding
        if space.side == "full":
            left = sharding.rows.part(self._matrix(space, space.rows, derive_key(key, 1), device))
            right = sharding.cols.part(self._matrix(space, space.cols, key, device))
            return TwoSidedBasis(left, right, orthonormal, sharding)
        own = sharding.rows if space.side == "left" else sharding.cols
        basis = own.part(self._matrix(space, space.basis_rows, key, device))
        return DenseBasis(basis, space.side, orthonormal, sharding)

    def _matrix(self, space: SubspaceSpec, size: int, key: int, device: torch.device) -> Tensor:
        matrix = gaussian(key, (*space.batch, size, space.rank), device, space.dtype)
        if self.kind == "gaussian":
            return matrix.mul_(space.rank**-0.5)
        if 2 * space.rank <= size:
            # A tall Gaussian matrix is so well conditioned that Cholesky-QR cannot fail: no check, and no wait for the device.
            return cholesky_qr(matrix, passes=2)[0]
        return orthonormalize(matrix)
