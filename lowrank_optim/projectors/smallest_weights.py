"""SaRA's subspace: the entries of a matrix whose weights are smallest, chosen from the weights and not from gradients."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from lowrank_optim.projectors.base import Basis, Projector, Refresh, SubspaceSpec
from lowrank_optim.projectors.coordinate import Coordinate
from lowrank_optim.projectors.coordinate_basis import ChosenEntries

_ENTRIES = Coordinate("entries")


@dataclass(frozen=True)
class SmallestWeights(Projector):
    """The entries of smallest magnitude |w|, once and for all; entries that are not chosen are neither updated nor decayed.

    A `rank` takes rank times the long side of the entries of each matrix, a density its fraction of them; of equal magnitudes, those
    that come first in row-major order. Of these, `threshold` leaves the ones with |w| < threshold: with `density=1.0`, all such
    entries of the matrix, of which there may be none.

    The entries are chosen when the optimizer is built, and once more at the first step, where other weights may have been loaded in
    between. A refresh never takes an entry in. With `shrinks`, the one at step `update_proj_gap`, and no other, drops those that have
    grown: |w| ≥ threshold, or, without a threshold, above the largest magnitude that was chosen in that matrix. The moments of the
    others stay as they are (`on_refresh="rotate"`), or begin again ("reset").

    Args:
        threshold: τ > 0; None takes all that `rank` or `density` give.
        shrinks: whether entries that have grown are dropped at step `update_proj_gap`.

    Raises:
        ValueError: a threshold that is no positive number.

    Memory: `indices`, 4 bytes for each entry (8 in matrices of 2³¹ entries and more); 4 for each matrix if it shrinks without a
    threshold (`limit`). Choosing takes the magnitudes of one matrix, and 8 bytes for each entry to sort them; a sharded matrix is
    gathered for it. Every process keeps all indices.

    Paper: Hu et al., "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation", ICLR 2025,
    arXiv:2409.06633.
    """

    threshold: float | None = None
    shrinks: bool = False
    state_lies: ClassVar[Mapping[str, str]] = {"indices": "whole", "limit": "whole"}
    needs_gradient: ClassVar[bool] = False
    uses_weights: ClassVar[bool] = True
    narrows: ClassVar[bool] = True
    knows_shards: ClassVar[bool] = True
    sees_all: ClassVar[bool] = False
    staggers: ClassVar[bool] = False
    has_channels: ClassVar[bool] = False
    writes_entries: ClassVar[bool] = True
    decays_rest: ClassVar[bool] = False
    moments_change_shape: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        tau = self.threshold
        if tau is not None and (isinstance(tau, (bool, str)) or not 0.0 < tau < float("inf")):
            raise ValueError(f"threshold is {tau!r}; it must be None, or a number above 0")

    @property
    def name(self) -> str:
        words = ([] if self.threshold is None else [repr(float(self.threshold))]) + ["shrinks"] * self.shrinks
        return ":".join(["smallest_weights", *([",".join(words)] if words else [])])

    @classmethod
    def from_variant(cls, variant: str) -> "SmallestWeights":
        """What the part of a name behind the colon stands for: "0.002", "shrinks", "0.002,shrinks"."""
        words = variant.split(",") if variant else []
        shrinks = words[-1:] == ["shrinks"]
        thresholds = words[:-1] if shrinks else words
        if len(thresholds) > 1:
            raise ValueError("it has too many parts")
        return cls(float(thresholds[0]) if thresholds else None, shrinks)

    @property
    def refreshes(self) -> int:  # type: ignore[override]
        return int(self.shrinks)

    @property
    def treatment(self) -> str:  # type: ignore[override]
        return "entries" if self.threshold is None else f"entries (|w| < {self.threshold:g})"

    # ------------------------------------------------------------------------------------------------------------- shapes

    def space(self, shape: tuple[int, ...], rank: int, proj_type: str, dtype: torch.dtype) -> SubspaceSpec:
        return _ENTRIES.space(shape, rank, proj_type, dtype)

    def space_of_density(
        self, shape: tuple[int, ...], density: float, proj_type: str, dtype: torch.dtype
    ) -> SubspaceSpec:
        return _ENTRIES.space_of_density(shape, density, proj_type, dtype)

    def reduced_shape(self, space: SubspaceSpec, state: Mapping[str, Tensor] | None = None) -> tuple[int, ...]:
        return (prod(space.batch) * space.rank if state is None else state["indices"].shape[-1], 1)

    def contracted(self, space: SubspaceSpec) -> tuple[int, ...]:
        return (-3, -2, -1) if space.batch else (-2, -1)

    # ------------------------------------------------------------------------------------------------------------ entries

    def init(self, space: SubspaceSpec, key: int, device: torch.device) -> dict[str, Tensor]:
        dtype = torch.int32 if prod(space.shape) < 2**31 else torch.int64
        state = {"indices": torch.empty(0, dtype=dtype, device=device)}
        if self.shrinks and self.threshold is None:
            state["limit"] = torch.zeros(prod(space.batch), dtype=space.dtype, device=device)
        return state

    def refresh(self, request: Refresh) -> dict[str, Tensor] | None:
        space, old, weight = request.space, dict(request.state), request.weight
        if weight is None:
            raise ValueError(f"projector={self.name!r} chooses entries by the weights, and was not given any")
        if request.first:
            whole = space.sharding.matrix.gather(weight, *range(-weight.dim(), 0)).to(space.dtype)
            return self._chosen(whole.abs(), space, old)
        # What has grown is dropped; a sharded matrix sends the chosen entries only.
        indices, entries = old["indices"].to(torch.int64), prod(space.shape[-2:])
        sizes = self._basis(space, old["indices"]).project(weight).squeeze(-1).abs()
        stays = sizes <= old["limit"][indices // entries] if "limit" in old else self._is_below(sizes)
        return old | {"indices": old["indices"][stays.nonzero().squeeze(-1)]}

    def _chosen(self, sizes: Tensor, space: SubspaceSpec, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state for magnitudes (…, m, n) of the whole weights."""
        entries = prod(space.shape[-2:])
        matrices = sizes.reshape(-1, entries)
        found, limits = [], []
        for number, matrix in enumerate(matrices):
            places = smallest(matrix, space.rank)
            limits.append(matrix[places].amax() if places.numel() else matrix.new_zeros(()))
            if self.threshold is not None and not matrix.is_meta:
                places = places[self._is_below(matrix[places]).nonzero().squeeze(-1)]
            found.append(places + number * entries)
        new = {"indices": torch.cat(found).to(old["indices"].dtype)}
        return new | ({"limit": torch.stack(limits)} if "limit" in old else {})

    def _is_below(self, sizes: Tensor) -> Tensor:
        return torch.ones_like(sizes, dtype=torch.bool) if self.threshold is None else sizes < self.threshold

    def basis(self, space: SubspaceSpec, state: Mapping[str, Tensor], key: int, device: torch.device) -> Basis:
        return self._basis(space, state["indices"])

    @staticmethod
    def _basis(space: SubspaceSpec, indices: Tensor) -> ChosenEntries:
        return ChosenEntries(indices, space.shape, space.sharding)


def smallest(sizes: Tensor, count: int) -> Tensor:
    """Positions of the `count` smallest numbers of a vector, ascending; of equal ones, those that come first. NaN is the largest."""
    if count >= sizes.numel():
        return torch.arange(sizes.numel(), device=sizes.device)
    return sizes.sort(stable=True).indices[:count].sort().values
