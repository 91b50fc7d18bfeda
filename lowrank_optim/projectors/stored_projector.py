"""Bases that are computed from gradients and kept in the state, in 32 or 16 bits or as packed 8- or 4-bit codes."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowrank_optim.kernels.counter_rng import choose, derive_key
from lowrank_optim.projectors.base import Basis, Projector, Refresh, SubspaceSpec, usable
from lowrank_optim.projectors.dense_basis import DenseBasis, TwoSidedBasis
from lowrank_optim.quantization import pack_basis, unpack_basis
from lowrank_optim.sharding.tensor_sharding import TensorSharding


def unit_vectors(space: SubspaceSpec, size: int, key: int, device: torch.device) -> Tensor:
    """`rank` distinct unit vectors of length `size`, drawn by the key, as a (…, size, rank) basis.

    The basis of a parameter that has not had a usable gradient yet: orthonormal, and free to make.
    """
    basis = torch.zeros(*space.batch, size, space.rank, dtype=space.dtype, device=device)
    matrices = basis.view(-1, size, space.rank)
    for i, matrix in enumerate(matrices):
        matrix[choose(derive_key(key, i), size, space.rank, device), torch.arange(space.rank, device=device)] = 1.0
    return basis


def basis_shardings(space: SubspaceSpec) -> dict[str, TensorSharding]:
    """Where the bases lie: each along the side of the matrix that it projects."""
    return {name: space.sharding.sharding_of(name, space.side) for name in ("basis", "basis_right")}


def agree(bases: Mapping[str, Tensor], space: SubspaceSpec) -> dict[str, Tensor]:
    """The same bits on all processes that hold the same part, whatever the arithmetic that made them."""
    return {name: basis_shardings(space)[name].agree(basis) for name, basis in bases.items()}


def store(bases: Mapping[str, Tensor], space: SubspaceSpec) -> dict[str, Tensor]:
    """State tensors for bases in the compute type: themselves, in bfloat16, or `name`, `name_scale` and `name_zero` when packed."""
    if space.basis_bits == 32:
        return dict(bases)
    if space.basis_bits == 16:
        return {name: basis.to(torch.bfloat16) for name, basis in bases.items()}
    state = {}
    for name, basis in bases.items():
        state[name], state[f"{name}_scale"], state[f"{name}_zero"] = pack_basis(basis, space.basis_bits)
    return state


def load(state: Mapping[str, Tensor], space: SubspaceSpec) -> dict[str, Tensor]:
    """The bases that `store` put into the state, in the compute type."""
    if space.basis_bits == 32 and space.side != "full":
        return {"basis": state["basis"].to(space.dtype)}
    names = ("basis", "basis_right") if space.side == "full" else ("basis",)
    if space.basis_bits >= 16:
        return {name: state[name].to(space.dtype) for name in names}
    unpacked = {}
    for name in names:
        codes, scale, zero = (state[f"{name}{part}"] for part in ("", "_scale", "_zero"))
        unpacked[name] = unpack_basis(codes, scale, zero, space.basis_bits, cols=space.rank, dtype=space.dtype)
    return unpacked


class StoredProjector(Projector):
    """A projector whose basis is computed from a gradient and stored: `basis`, and `basis_right` when both sides are projected.

    A subclass is a frozen dataclass with a `name` and `compute`. One that makes a `basis_right` for side "full" sets
    `sides = ("left", "right", "full")`, and one that works on local parts `knows_shards = True`.
    """

    state_lies: ClassVar[Mapping[str, str]] = {"basis": "basis", "basis_right": "basis_right"}
    stores_basis: ClassVar[bool] = True

    def init(self, space: SubspaceSpec, key: int, device: torch.device) -> dict[str, Tensor]:
        shardings = basis_shardings(space)
        keys = {"basis": derive_key(key, 1), "basis_right": key} if space.side == "full" else {"basis": key}
        sizes = {"basis": space.rows if space.side == "full" else space.basis_rows, "basis_right": space.cols}
        whole = {name: unit_vectors(space, sizes[name], keys[name], device) for name in keys}
        return store({name: shardings[name].part(basis) for name, basis in whole.items()}, space)

    def basis(self, space: SubspaceSpec, state: Mapping[str, Tensor], key: int, device: torch.device) -> Basis:
        bases, exact = load(state, space), space.basis_bits == 32
        if space.side == "full":
            return TwoSidedBasis(bases["basis"], bases["basis_right"], exact, space.sharding)
        return DenseBasis(bases["basis"], space.side, exact, space.sharding)

    def refresh(self, request: Refresh) -> dict[str, Tensor] | None:
        grad, space = request.grad, request.space
        ok = usable(grad, space.sharding.matrix)
        # The one place of a step where the host waits for the device, on refresh steps only.
        if not bool(space.sharding.matrix.sum(ok.any().float(), -3)):
            return None
        grad, old = grad.to(space.dtype), load(request.state, space)
        if not space.batch:
            return store(agree(self.compute(replace(request, grad=grad, state=old)), space), space)
        # Matrices of a stack without a usable gradient (experts without tokens) keep their basis.
        new = self.compute(replace(request, grad=torch.where(ok, grad, 0.0), state=old))
        kept = {name: torch.where(ok, tensor, old[name]) for name, tensor in new.items()}
        return store(agree(kept, space), space)

    @abstractmethod
    def compute(self, request: Refresh) -> dict[str, Tensor]:
        """The new bases, compact in memory, for a finite gradient in the compute type; `request.state` are the ones before, likewise.

        Where a parameter is sharded, gradient and bases are the local parts.
        """


@dataclass(frozen=True)
class MomentumMixture(StoredProjector):
    """A projector whose basis comes from ρ lift(m̂) + (1−ρ) G, m̂ the bias-corrected momentum; `kind` is its name at the default ρ."""

    kind: ClassVar[str]
    uses_momentum: ClassVar[bool] = True
    knows_shards: ClassVar[bool] = True
    rho: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.rho <= 1.0:
            raise ValueError(f"rho is {self.rho!r}; it must be in [0, 1]")

    @property
    def name(self) -> str:
        return self.kind if self.rho == type(self).rho else f"{self.kind}:{self.rho!r}"
