"""The exact subspace: leading singular vectors of the current gradient by a full SVD.

Slow (seconds for a 4096×4096 matrix on a CPU); it is here for parity with published results and as the yardstick for
`RandomizedSVD`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowrank_optim.projectors.base import Refresh, align_signs
from lowrank_optim.projectors.stored_projector import StoredProjector, basis_shardings


@dataclass(frozen=True)
class SVD(StoredProjector):
    """The leading r singular vectors of the gradient, exactly.

    Args:
        align: flip the signs of new basis vectors towards the old ones (see `align_signs`). The released GaLore code does not.

    Memory: 4·d·r bytes for the basis (d the projected side); a refresh needs the full thin SVD besides, and of a sharded matrix the
    whole gradient, on every process.
    """

    sides: ClassVar[tuple[str, ...]] = ("left", "right", "full")
    knows_shards: ClassVar[bool] = True
    align: bool = True

    @property
    def name(self) -> str:
        return "svd" if self.align else "svd:unaligned"

    def released(self) -> "SVD":
        return SVD(align=False)

    def compute(self, request: Refresh) -> dict[str, Tensor]:
        space, sharding = request.space, request.space.sharding
        # Every process that shares the matrix gathers it, on refresh steps only.
        u, _, vh = torch.linalg.svd(sharding.matrix.gather(request.grad, -2, -1), full_matrices=False)
        left, right = sharding.rows.part(u[..., : space.rank], -2), sharding.cols.part(vh[..., : space.rank, :].mT, -2)
        factors = {"left": {"basis": left}, "right": {"basis": right}, "full": {"basis": left, "basis_right": right}}
        new = factors[space.side]
        if self.align and not request.first:
            shardings = basis_shardings(space)
            new = {name: align_signs(tensor, request.state[name], shardings[name]) for name, tensor in new.items()}
        # A slice would keep the whole factor alive.
        return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in new.items()}
