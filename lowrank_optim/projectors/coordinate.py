"""Coordinate subspaces: some columns, some rows, or some single entries of the matrix, drawn anew at every refresh."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowrank_optim.kernels.counter_rng import choose, choose_stratified, derive_key
from lowrank_optim.projectors.base import Basis, Projector, Refresh, SubspaceSpec
from lowrank_optim.projectors.coordinate_basis import (
    CoordinateBasis,
    EntryBasis,
    ScatteredCoordinates,
    ScatteredEntries,
)

COORDINATES = ("columns", "rows", "entries")
_SIDE_OF = {"columns": "right", "rows": "left", "entries": "right"}


@dataclass(frozen=True)
class Coordinate(Projector):
    """Distinct columns, rows or entries of the gradient, uniformly at random.

    Args:
        coordinates: "columns", "rows" or "entries"; None takes columns or rows as `proj_type` says.

    `rank` columns (rows) are taken; of entries, as many as those have together: rank times the long side. A density is the fraction
    of the columns, rows or entries, rounded down but at least one. Entries are drawn one from each of that
    many equal strata, in ascending order.

    Memory: 4 bytes for each index (`indices`, int32; int64 for matrices of 2³¹ entries and more).
    """

    coordinates: str | None = None
    state_lies: ClassVar[Mapping[str, str]] = {"indices": "chosen"}
    needs_gradient: ClassVar[bool] = False
    knows_shards: ClassVar[bool] = True
    sees_all: ClassVar[bool] = False
    writes_entries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coordinates not in (None, *COORDINATES):
            raise ValueError(f"coordinates is {self.coordinates!r}; valid values are {', '.join(COORDINATES)}")

    @property
    def name(self) -> str:
        return "coordinate" if self.coordinates is None else f"coordinate:{self.coordinates}"

    @property
    def has_channels(self) -> bool:  # type: ignore[override]
        return self.coordinates != "entries"

    def check(self, proj_type: str) -> None:
        if proj_type == "full":
            raise ValueError(
                'proj_type is "full", which a coordinate projector cannot do; '
                'use coordinates="entries" to select along both sides, or proj_type "std"'
            )
        super().check(proj_type)

    def space(self, shape: tuple[int, ...], rank: int, proj_type: str, dtype: torch.dtype) -> SubspaceSpec:
        side = _SIDE_OF[self.coordinates] if self.coordinates else proj_type
        count = rank * max(shape[-2:]) if self.coordinates == "entries" else rank
        return super().space(shape, count, side, dtype)

    def space_of_density(
        self, shape: tuple[int, ...], density: float, proj_type: str, dtype: torch.dtype
    ) -> SubspaceSpec:
        space = self.space(shape, 0, proj_type, dtype)
        population = space.rows * space.cols if self.coordinates == "entries" else space.basis_rows
        # Rounded down; 0.29 of 100 is 29, whatever floating-point numbers say.
        return replace(space, rank=int(density * population + 1e-6) or math.ceil(density))

    def reduced_shape(self, space: SubspaceSpec, state: Mapping[str, Tensor] | None = None) -> tuple[int, ...]:
        return (*space.batch, space.rank, 1) if self.coordinates == "entries" else space.reduced_shape

    def _draw(self, space: SubspaceSpec, key: int, device: torch.device) -> Tensor:
        if self.coordinates == "entries":
            draw, population = choose_stratified, space.rows * space.cols
        else:
            draw, population = choose, space.basis_rows
        dtype = torch.int32 if population < 2**31 else torch.int64
        if not space.batch:
            return draw(key, population, space.rank, device).to(dtype)
        return torch.stack(
            [draw(derive_key(key, i), population, space.rank, device).to(dtype) for i in range(space.batch[0])]
        )

    def init(self, space: SubspaceSpec, key: int, device: torch.device) -> dict[str, Tensor]:
        return {"indices": self._indices(space, key, device)}

    def contracted(self, space: SubspaceSpec) -> tuple[int, ...]:
        return (-2, -1) if self.coordinates == "entries" else super().contracted(space)

    def _indices(self, space: SubspaceSpec, key: int, device: torch.device) -> Tensor:
        return space.sharding.sharding_of("chosen", space.side).part(self._draw(space, key, device))

    def refresh(self, request: Refresh) -> dict[str, Tensor] | None:
        return {"indices": self._indices(request.space, request.key, request.grad.device)}

    def basis(self, space: SubspaceSpec, state: Mapping[str, Tensor], key: int, device: torch.device) -> Basis:
        scattered = space.sharding.matrix.splits(*self.contracted(space))
        if self.coordinates == "entries":
            return (ScatteredEntries if scattered else EntryBasis)(state["indices"], space.sharding)
        return (ScatteredCoordinates if scattered else CoordinateBasis)(state["indices"], space.side, space.sharding)
