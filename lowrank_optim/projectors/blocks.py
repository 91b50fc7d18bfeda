"""Whole tensors in turn: at any time some tensors of a group are trained with moments and the others without (FRUGAL's blocks)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lowrank_optim import kernels
from lowrank_optim.kernels.counter_rng import choose, derive_key
from lowrank_optim.kernels.host import cpu_tensor
from lowrank_optim.projectors.base import Basis, GradientTerm, Projector, Refresh, StepParams, SubspaceSpec, row_squares
from lowrank_optim.projectors.dense_basis import DenseBasis
from lowrank_optim.sharding.param_sharding import LOCAL, ParamSharding

ORDERS = ("random", "ascending", "descending", "mirror")


@lru_cache(maxsize=64)
def _draw(key: int, count: int, active: int) -> frozenset[int]:
    """Which of a group's tensors are active; every one of them asks."""
    return frozenset(choose(key, count, active, torch.device("cpu")).tolist())


@dataclass(frozen=True, kw_only=True)
class Turn(SubspaceSpec):
    """A tensor that takes turns with the other tensors of its group: its place among them.

    position of count; `active` of them are trained with moments at a time; `key` is the group's stream of random numbers.
    """

    position: int
    count: int
    active: int
    key: int


@dataclass(frozen=True)
class WholeBasis:
    """The whole matrix: R is G itself, and nothing lies outside."""

    sharding: ParamSharding = field(default=LOCAL, compare=False)
    disjoint: ClassVar[bool] = True
    splits_rows: ClassVar[bool] = True

    def project(self, grad: Tensor) -> Tensor:
        return grad.to(kernels.compute_dtype(grad.dtype))

    def project_with_norms(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        reduced = self.project(grad)
        return reduced, self.sharding.matrix.sum(row_squares(reduced), -1)

    def lifted_squares(self, reduced: Tensor) -> Tensor:
        return self.sharding.matrix.sum(row_squares(reduced), -1)

    def apply_(self, weight: Tensor, core: Tensor | None, write: StepParams, term: GradientTerm | None = None) -> None:
        update = torch.zeros_like(weight, dtype=kernels.compute_dtype(weight.dtype)) if core is None else core
        if term is not None and term.subtract is None:  # else E = G − lift R, which is 0
            gradient = self.project(term.grad)
            gradient = gradient if term.ok is None else torch.where(term.ok, gradient, 0.0)
            update = torch.addcmul(update, gradient.sign() if term.sign else gradient, term.scale)
        kernels.apply_dense_(weight, update, start=self.sharding.matrix.start, **vars(write))

    def lift_(self, grad: Tensor, reduced: Tensor) -> None:
        grad.copy_(reduced)

    def transport(self, moment: Tensor, old: Self, power: int) -> Tensor:
        return moment

    def overlap(self, old: Self) -> Tensor:
        return kernels.cpu_tensor(1.0, torch.float32)


@dataclass(frozen=True)
class Blocks(Projector):
    """A subspace that is the whole matrix while it is the tensor's turn, and nothing otherwise.

    Args:
        order: which tensors come next at a refresh: "random"; "ascending" or "descending" through the group, beginning again at its
            end; "mirror", as many from the front as, mirrored, from the back.

    round(density · tensors) of a group's tensors have their turn at a time, at least one where the density is above 0; vectors, which
    are trained densely, do not count. Moments are made when it begins and freed when it ends.
    A tensor counts its own steps: one that gets no gradient for a while changes turns later than the others.

    Memory: the rule's moments of the whole tensor during its turn, 8 bytes (`turn`) otherwise.
    """

    order: str = "descending"
    state_lies: ClassVar[Mapping[str, str]] = {"turn": "host"}
    needs_gradient: ClassVar[bool] = False
    staggers: ClassVar[bool] = False
    knows_shards: ClassVar[bool] = True
    has_channels: ClassVar[bool] = False
    sides: ClassVar[tuple[str, ...]] = ("left", "right", "full")
    moments_change_shape: ClassVar[bool] = True
    treatment: ClassVar[str] = "in turn"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ORDERS:
            raise ValueError(f"blocks is {self.order!r}; valid values are {', '.join(map(repr, ORDERS))}")

    @property
    def name(self) -> str:
        return f"blocks:{self.order}"

    def space(self, shape: tuple[int, ...], rank: int, proj_type: str, dtype: torch.dtype) -> SubspaceSpec:
        raise ValueError(
            f"blocks={self.order!r} trains whole tensors, which have no rank; use density=… in place of rank={rank}"
        )

    def space_of_density(
        self, shape: tuple[int, ...], density: float, proj_type: str, dtype: torch.dtype
    ) -> SubspaceSpec:
        return super().space(shape, shape[-1], "right", dtype)

    def arrange(self, spaces: list[SubspaceSpec], density: float | None, key: int) -> list[SubspaceSpec]:
        count = len(spaces)
        active = round((density or 0.0) * count) or math.ceil(density or 0.0)
        if self.order == "mirror" and (count % 2 or active % 2):
            raise ValueError(
                f'blocks="mirror" pairs the tensors of a group, but density {density} takes {active} of {count}; both must be even: '
                'change the density, or use blocks="ascending" or "random"'
            )
        return [Turn(**vars(space), position=i, count=count, active=active, key=key) for i, space in enumerate(spaces)]

    def reduced_shape(self, space: SubspaceSpec, state: Mapping[str, Tensor] | None = None) -> tuple[int, ...]:
        if state is None or self._is_active(space, int(state["turn"])):
            return space.reduced_shape
        return (*space.batch, space.rows, 0)

    def _is_active(self, space: SubspaceSpec, turn: int) -> bool:
        assert isinstance(space, Turn)
        position, count, active = space.position, space.count, space.active
        if self.order == "random":
            return position in _draw(derive_key(space.key, turn), count, active)
        if self.order == "mirror":  # pairs of a tensor and its mirror image
            position, count, active = min(position, count - 1 - position), count // 2, active // 2
        elif self.order == "descending":
            position = count - 1 - position
        return (position - turn * active) % count < active

    def contracted(self, space: SubspaceSpec) -> tuple[int, ...]:
        return ()

    def init(self, space: SubspaceSpec, key: int, device: torch.device) -> dict[str, Tensor]:
        return {"turn": cpu_tensor(0, torch.int64)}

    def refresh(self, request: Refresh) -> dict[str, Tensor] | None:
        return {"turn": request.state["turn"] + (not request.first)}

    def basis(self, space: SubspaceSpec, state: Mapping[str, Tensor], key: int, device: torch.device) -> Basis:
        if self._is_active(space, int(state["turn"])):
            return WholeBasis(space.sharding)
        nothing = torch.empty((*space.batch, space.cols, 0), dtype=space.dtype, device=device)
        return DenseBasis(space.sharding.cols.part(nothing), "right", sharding=space.sharding)
