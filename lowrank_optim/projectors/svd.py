"""The exact subspace: leading singular vectors of the current gradient by a full SVD.

Slow (seconds for a 4096×4096 matrix on a CPU); it is here for parity with published results and as the yardstick for
`RandomizedSVD`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_optim.kernels.counter_rng import choose, derive_key
from lowrank_optim.projectors.base import Basis, Projector, Space, align_signs, usable
from lowrank_optim.projectors.bases import DenseBasis, TwoSidedBasis


def unit_vectors(space: Space, size: int, key: int, device: torch.device) -> Tensor:
    """`rank` distinct unit vectors of length `size`, drawn by the key, as a (…, size, rank) basis.

    The basis of a parameter that has not had a usable gradient yet: orthonormal, and free to make.
    """
    basis = torch.zeros(*space.batch, size, space.rank, dtype=space.dtype, device=device)
    matrices = basis.view(-1, size, space.rank)
    for i, matrix in enumerate(matrices):
        matrix[choose(derive_key(key, i), size, space.rank, device), torch.arange(space.rank, device=device)] = 1.0
    return basis


class StoredProjector(Projector):
    """A projector whose basis is computed from a gradient and stored: `basis`, and `basis_right` when both sides are projected."""

    def init(self, space: Space, key: int, device: torch.device) -> dict[str, Tensor]:
        if space.side == "full":
            left = unit_vectors(space, space.rows, derive_key(key, 1), device)
            return {"basis": left, "basis_right": unit_vectors(space, space.cols, key, device)}
        return {"basis": unit_vectors(space, space.basis_rows, key, device)}

    def basis(self, space: Space, state: Mapping[str, Tensor], key: int, device: torch.device) -> Basis:
        if space.side == "full":
            return TwoSidedBasis(state["basis"], state["basis_right"])
        return DenseBasis(state["basis"], space.side)

    def refresh(
        self, grad: Tensor, space: Space, state: Mapping[str, Tensor], key: int, first: bool
    ) -> dict[str, Tensor] | None:
        ok = usable(grad)
        # The one place of a step where the host waits for the device, on refresh steps only.
        if not bool(ok.any()):
            return None
        grad = grad.to(space.dtype)
        if space.batch:
            # Matrices of a stack without a usable gradient (experts without tokens) keep their basis.
            grad = torch.where(ok, grad, 0.0)
            new = self.compute(grad, space, state, key, first)
            return {name: torch.where(ok, tensor, state[name]) for name, tensor in new.items()}
        return self.compute(grad, space, state, key, first)

    def compute(
        self, grad: Tensor, space: Space, state: Mapping[str, Tensor], key: int, first: bool
    ) -> dict[str, Tensor]:
        """The new bases for finite gradients in the compute type, compact in memory."""
        raise NotImplementedError


@dataclass(frozen=True)
class SVD(StoredProjector):
    """The leading r singular vectors of the gradient, exactly.

    Args:
        align: flip the signs of new basis vectors towards the old ones (see `align_signs`). The released GaLore code does not.

    Memory: 4·d·r bytes for the basis (d the projected side); a refresh needs the full thin SVD besides.
    """

    align: bool = True

    @property
    def name(self) -> str:
        return "svd" if self.align else "svd:unaligned"

    def compute(
        self, grad: Tensor, space: Space, state: Mapping[str, Tensor], key: int, first: bool
    ) -> dict[str, Tensor]:
        u, _, vh = torch.linalg.svd(grad, full_matrices=False)
        left, right = u[..., : space.rank], vh[..., : space.rank, :].mT
        factors = {"left": {"basis": left}, "right": {"basis": right}, "full": {"basis": left, "basis_right": right}}
        new = factors[space.side]
        if self.align and not first:
            new = {name: align_signs(tensor, state[name]) for name, tensor in new.items()}
        # A slice would keep the whole factor alive.
        return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in new.items()}
