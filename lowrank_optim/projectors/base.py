"""What a projector is: the contract, the choice of side, and the shapes that follow from it.

A projector is an immutable recipe. It holds no tensors: what it needs to remember lives in the optimizer state of each parameter
(`basis` or `indices`; a random basis is regenerated from its key), and it hands out a `Basis`, which projects gradients, applies
updates and carries moments from an older basis of the same kind.

Side logic (m×n gradient, basis B with orthonormal columns, low-rank matrix R always "tall"):

    side     basis            R              update of W
    right    B: n×r           G B   (m×r)    N Bᵀ
    left     B: m×r           Gᵀ B  (n×r)    B Nᵀ
    full     A: m×r, B: n×r   AᵀG B (r×r)    A N Bᵀ
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from lowrank_optim.kernels import WeightError, as_python
from lowrank_optim.sharding.param_sharding import LOCAL, ParamSharding
from lowrank_optim.sharding.tensor_sharding import UNSHARDED, TensorSharding

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")


def choose_side(proj_type: str, rows: int, cols: int) -> str:
    """The projected side of a rows×cols matrix: "right", "left" or "full".

    `std` projects the short side, so that basis and moments are smallest; `reverse_std` the long one. Square matrices count as tall
    (`std`: right, `reverse_std`: left). The other values name the side themselves.
    """
    tall = rows >= cols
    sides = {"std": "right" if tall else "left", "reverse_std": "left" if tall else "right"}
    return sides.get(proj_type, proj_type)


@dataclass(frozen=True)
class SubspaceSpec:
    """The shape of a low-rank problem: one matrix, or a stack of them, and the subspace it is projected to.

    Depends on the parameter's global shape and its options only, never on gradients. All sizes are those of the whole matrix; what
    this process holds of it, `sharding` says.
    """

    batch: tuple[int, ...]  # () for a matrix, (experts,) for a stack
    rows: int
    cols: int
    rank: int  # of single entries, their number
    side: str
    dtype: torch.dtype  # compute type: float32, or float64 for float64 parameters
    basis_bits: int = 32
    sharding: ParamSharding = field(default=LOCAL, compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the gradient's matrix view."""
        return (*self.batch, self.rows, self.cols)

    @property
    def reduced_shape(self) -> tuple[int, ...]:
        """Shape of R, of the moments and of the direction."""
        tall = {"right": self.rows, "left": self.cols, "full": self.rank}[self.side]
        return (*self.batch, tall, self.rank)

    @property
    def basis_rows(self) -> int:
        """Length of the basis vectors (of the right basis when both sides are projected)."""
        return self.rows if self.side == "left" else self.cols

    def share(self, density: float) -> int:
        """The fraction `density` of the basis vectors that there can be, at least one where it is above 0."""
        side = {"left": self.rows, "right": self.cols, "full": min(self.rows, self.cols)}[self.side]
        return min(round(density * side), self.rows, self.cols) or math.ceil(density)


@dataclass(frozen=True)
class GradientTerm:
    """The part φ ⊙ E of an update that is not low-rank.

    grad: G, the gradient's matrix view.
    scale: φ, one number for every row of R, (…, d, 1), or for the whole matrix, (…, 1, 1); compute type.
    ok: 0-d bool, false where G may hold NaN and is to be ignored; None means true.
    by_channel: whether φ has one number for every row of R, and so lies where R's rows lie.
    subtract: R, to take E = G − lift R; None takes E = G.
    sign: take the sign of E.
    """

    grad: Tensor
    scale: Tensor
    ok: Tensor | None = None
    subtract: Tensor | None = None
    sign: bool = False
    by_channel: bool = False


@dataclass(frozen=True)
class StepParams:
    """How an update goes into the weights; the fields are arguments of `kernels.apply_`. A basis hands them on as they are."""

    alpha: float
    keep: float | Tensor
    ok: Tensor | None = None
    rounding_key: int | None = None
    error: WeightError | None = None


@dataclass(frozen=True)
class Refresh:
    """What a new subspace of one matrix is computed from.

    grad: G, the gradient's matrix view (…, m, n), in its own type; of a sharded parameter the local part.
    space: the shape of the low-rank problem.
    state: the projector's tensors, of the subspace before.
    key: the stream of random numbers of this parameter and step: 64 bits without a sign, for `torch.Generator().manual_seed`.
    first: whether the state holds no basis of a gradient yet.
    momentum: the rule's bias-corrected momentum in the old basis, for projectors that use it (`uses_momentum`); else None.
    weight: the weights' matrix view, in their own type, for projectors that choose by them (`uses_weights`); else None. Not modified.
    """

    grad: Tensor
    space: SubspaceSpec
    state: Mapping[str, Tensor]
    key: int
    first: bool = False
    momentum: Tensor | None = None
    weight: Tensor | None = None


class Basis(Protocol):
    """A subspace at one moment: what the step needs of it.

    A basis may also have a `splits_rows`: True where every row of G (or column, by the side) is the sum of its part in lift R and one
    orthogonal to it. The norm of a sum of R's is then exact inside the subspace.
    """

    @property
    def sharding(self) -> ParamSharding:
        """Where the parts of matrix, basis and R lie."""

    @property
    def disjoint(self) -> bool:
        """Whether the subspace is made of entries of the matrix, so that G − lift R is 0 on them and G elsewhere."""

    def project(self, grad: Tensor) -> Tensor:
        """R for a gradient's matrix view, in the compute type."""

    def project_with_norms(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """R, and ‖g_j‖² of the row or column of G behind each row of R, (…, d, 1)."""

    def lifted_squares(self, reduced: Tensor) -> Tensor:
        """‖P r_j‖² for every row r_j of R, (…, d, 1): ‖r_j‖² where P is orthonormal, r_jᵀPᵀP r_j elsewhere."""

    def apply_(self, weight: Tensor, core: Tensor | None, write: StepParams, term: GradientTerm | None = None) -> None:
        """W ← keep·W − α·(lift(core) + term), in place. No core lifts to nothing."""

    def lift_(self, grad: Tensor, reduced: Tensor) -> None:
        """Make `grad` the matrix in the subspace whose projection is R."""

    def transport(self, moment: Tensor, old: Self, power: int) -> Tensor:
        """A matrix in the coordinates of `old`, expressed in those of this basis: M C with C = P_oldᵀ P_new.

        With `power=2` the entries of C are squared, as second moments need (LDAdam's rule).
        """

    def overlap(self, old: Self) -> Tensor:
        """How much of the subspace `old` this one holds, ‖P_oldᵀP_new‖²/r in [0, 1], as a 0-d tensor; the mean over a stack."""


class Projector(ABC):
    """How a subspace is chosen. Subclasses are frozen dataclasses, shared by all parameters.

    The attributes are of the class. Subclasses set them without a type.

    Attributes:
        name: in groups and checkpoints, which hold no fields: other fields need another name.
        needs_gradient: False where a refresh does not look at the gradient, and so cannot fail.
        sees_all: every entry of the gradient has a part in R (if R has entries), where every NaN shows; so in any `DenseBasis`.
        stores_basis: the state holds a basis that was computed from gradients, which can be stored in few bits, and can stand still;
            so in any `StoredProjector`.
        uses_momentum: `Refresh.momentum` is wanted.
        uses_weights: `Refresh.weight` is wanted. `refresh` is called when the state is made, too, so that there is a subspace then.
        orthonormal: the basis vectors are, so that G − lift R is what lies outside of the subspace.
        has_channels: a row of R belongs to a row or a column of the matrix, so that it has a norm there to scale by.
        sides: what can be projected, of "left", "right", "full".
        writes_entries: single columns, rows or entries of the weights are written, which weights stored in few bits cannot take.
        moments_change_shape: R has another shape after a refresh; moments can only be reset, unless it `narrows`.
        narrows: each subspace is part of the one before. Moments of what is left go along (`Basis.transport`) with
            `on_refresh="rotate"`, and all its state may change its shape.
        refreshes: how many there are after the first one, at multiples of `update_proj_gap`; None has no end.
        decays_rest: False where weights outside of the subspace do not decay.
        treatment: what `describe` calls its matrices.
        staggers: False where all tensors of a group have to be refreshed on the same step.
        knows_shards: gradients and bases may be local parts (`SubspaceSpec.sharding`). If False, sharded parameters are refused.
        state_lies: where each state tensor lies: "host" (read by the host in every step, kept on the CPU), or, if parameters are
            sharded, "basis" (along the projected side), "basis_right" (the second of two), "chosen" (indices); has to name all if
            `knows_shards`.
    """

    state_lies: ClassVar[Mapping[str, str]] = {}
    needs_gradient: ClassVar[bool] = True
    sees_all: ClassVar[bool] = True
    staggers: ClassVar[bool] = True
    stores_basis: ClassVar[bool] = False
    uses_momentum: ClassVar[bool] = False
    knows_shards: ClassVar[bool] = False
    orthonormal: ClassVar[bool] = True
    has_channels: ClassVar[bool] = True
    sides: ClassVar[tuple[str, ...]] = ("left", "right")
    writes_entries: ClassVar[bool] = False
    moments_change_shape: ClassVar[bool] = False
    uses_weights: ClassVar[bool] = False
    narrows: ClassVar[bool] = False
    refreshes: ClassVar[int | None] = None
    decays_rest: ClassVar[bool] = True
    treatment: ClassVar[str] = "low-rank"

    def __post_init__(self) -> None:
        """Fields are Python's own numbers, as names and checkpoints need them."""
        for part in fields(self):  # type: ignore[arg-type]
            object.__setattr__(self, part.name, as_python(getattr(self, part.name)))

    @property
    @abstractmethod
    def name(self) -> str:
        """The string that `from_name` rebuilds this projector from; saved in checkpoints."""

    def check(self, proj_type: str) -> None:
        """Raise ValueError where this projector cannot do `proj_type`."""
        if proj_type not in PROJ_TYPES:
            raise ValueError(f"proj_type is {proj_type!r}; valid values are {', '.join(PROJ_TYPES)}")
        if proj_type not in ("std", "reverse_std", *self.sides):
            raise ValueError(
                f"proj_type is {proj_type!r}, which projector={self.name!r} cannot do; use std, reverse_std, {', '.join(self.sides)}"
            )

    def check_group(self, options: Mapping[str, Any]) -> None:
        """Raise ValueError where this projector does not go together with the options of a group."""
        if self.narrows and options["on_refresh"] == "keep":
            raise ValueError(
                f"on_refresh is 'keep', but projector={self.name!r} drops entries at a refresh, and their moments with them; use "
                'on_refresh="rotate", which keeps the moments of the others, or "reset"'
            )
        if not self.decays_rest and (options["cautious"] or options["cautious_decay"]):
            raise ValueError(
                f"cautious or cautious_decay is True; they are for whole matrices, and projector={self.name!r} writes to chosen "
                "entries only: leave both at False, or use another projector"
            )

    def space(self, shape: tuple[int, ...], rank: int, proj_type: str, dtype: torch.dtype) -> SubspaceSpec:
        """The low-rank problem for a gradient of `shape` (…, m, n)."""
        *batch, rows, cols = shape
        return SubspaceSpec(tuple(batch), rows, cols, rank, choose_side(proj_type, rows, cols), dtype)

    def space_of_density(
        self, shape: tuple[int, ...], density: float, proj_type: str, dtype: torch.dtype
    ) -> SubspaceSpec:
        """As `space`, with the fraction `density` in [0, 1] of the projected side as rank."""
        space = self.space(shape, 0, proj_type, dtype)
        return replace(space, rank=space.share(density))

    def arrange(self, spaces: list[SubspaceSpec], density: float | None, key: int) -> list[SubspaceSpec]:
        """The spaces of one group, told of each other."""
        return spaces

    def reduced_shape(self, space: SubspaceSpec, state: Mapping[str, Tensor] | None = None) -> tuple[int, ...]:
        """Shape of R and of the moments."""
        return space.reduced_shape

    def contracted(self, space: SubspaceSpec) -> tuple[int, ...]:
        """The dimensions of G that the projection sums over, −2 and −1, in this order."""
        return {"right": (-1,), "left": (-2,), "full": (-2, -1)}[space.side]

    @abstractmethod
    def init(self, space: SubspaceSpec, key: int, device: torch.device) -> dict[str, Tensor]:
        """State tensors before the first gradient: a valid basis, if not yet a good one."""

    @abstractmethod
    def refresh(self, request: Refresh) -> dict[str, Tensor] | None:
        """New values for the tensors that `init` made, or None where this gradient cannot give a basis (zero or non-finite).

        Nothing is modified.
        """

    def released(self) -> "Projector":
        """The projector as the released code of its method has it (`match_reference`)."""
        return self

    @abstractmethod
    def basis(self, space: SubspaceSpec, state: Mapping[str, Tensor], key: int, device: torch.device) -> Basis:
        """The subspace that the state (or, where nothing is stored, the key of the last refresh) stands for."""


def usable(grad: Tensor, sharding: TensorSharding = UNSHARDED) -> Tensor:
    """For each matrix of the stack, whether it is finite and not all zero: (…, 1, 1) bool, the same on all processes."""
    norm = sharding.sum(torch.linalg.vector_norm(grad, dim=(-2, -1), keepdim=True), -2, -1)
    flag: Tensor = torch.isfinite(norm) & (norm > 0)
    return flag


def row_squares(matrix: Tensor) -> Tensor:
    """‖row‖² of every row, (…, d, 1)."""
    norm: Tensor = torch.linalg.vector_norm(matrix, dim=-1, keepdim=True)
    return norm.square_()


def align_signs(new: Tensor, old: Tensor, sharding: TensorSharding = UNSHARDED) -> Tensor:
    """Flip basis vectors so that each has a non-negative product with the old vector of its column.

    Singular vectors have no sign of their own. Moments that are kept across a refresh are read in the new coordinates, and a flipped
    vector would turn its column of the momentum against the gradient.
    """
    return torch.where(sharding.sum((new * old).sum(-2, keepdim=True), -2) < 0, -new, new)
