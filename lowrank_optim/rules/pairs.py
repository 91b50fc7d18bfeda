"""What rules for the two factors of an adapter share: W = W₀ + s B A is trained through A (r×n) and B (m×r).

Both factors are seen in one form, tall: Aᵀ (n×r) and B (m×r), with the gradients g_Aᵀ and g_B. A formula that stands for one side
stands for the other; each side's *dual* is the other one. Stacks of E experts have a leading dimension.

    parameter A (E·r, n)   expert-major: rows e·r … e·r + r − 1 are those of expert e
    parameter B (m, r·E)   expert-minor: columns e, e + E, e + 2E, … are those of expert e

Sharded factors are seen with their ranks whole. Where the ranks are split over processes (`fully_shard` splits the rows of A), parts
are exchanged for parts of the long side and back, an all-to-all of the factor's elements; Gram matrices are sums of r² numbers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim.rules.base import Context, Direction
from lowrank_optim.rules.joint import JointRule, Unit
from lowrank_optim.rules.small_matrices import sum_together
from lowrank_optim.sharding.dtensor import dense_sharding, local, matrix_sharding
from lowrank_optim.sharding.param_sharding import LOCAL, MeshParamSharding, ParamSharding
from lowrank_optim.sharding.tensor_sharding import MeshSharding


def matrix_of(param: Tensor) -> tuple[int, int]:
    """The shape of a factor as a matrix: convolutions are their first dimension × the rest."""
    return param.shape[0], math.prod(param.shape[1:])


@dataclass(frozen=True)
class Side:
    """One factor of a pair, in its tall form.

    is_a: whether it is A, so that the tall form is its transpose.
    experts: E.
    weight: (E, d, r), a view of the weights, or a copy where they are of another type or lie elsewhere.
    grad: (E, d, r); None for a frozen factor.
    state: of the parameter, tensors as they lie.
    context: of the parameter.
    step: `Unit.steps`.
    """

    is_a: bool
    experts: int
    weight: Tensor
    grad: Tensor | None
    state: Mapping[str, Tensor]
    context: Context
    step: tuple[float, float | Tensor]

    @staticmethod
    def of(unit: Unit, number: int) -> "Side":
        """The first factor, A, or the second."""
        context, grad, experts = unit.contexts[number], unit.grads[number], unit.options["experts"]
        is_a = number == 0
        seen = None if grad is None else tall(_gathered(grad, context.sharding, is_a), is_a, experts)
        step = unit.steps[number] if unit.steps else (0.0, 1.0)
        return Side(is_a, experts, _weight(context, is_a, experts), seen, unit.states[number], context, step)

    def written(self) -> Tensor:
        """The weights as they are now that they were written, in the form of `weight`."""
        return _weight(self.context, self.is_a, self.experts)

    @property
    def ok(self) -> Tensor | None:
        """Where false, nothing may change."""
        return self.context.ok

    @property
    def eps(self) -> float:
        """Of the type of arithmetic."""
        return torch.finfo(self.weight.dtype).eps

    @property
    def long(self) -> int:
        """d on all processes together."""
        sharding = self.context.sharding.reduced
        rows, cols = sharding.whole_shape(self.flat(self.weight))
        return cols if self.is_a else rows

    @property
    def sharding(self) -> tuple[Any, int]:
        """Over which processes a sum over d goes: a sharding, and its dimension."""
        return self.context.sharding.reduced, -1 if self.is_a else -2

    def tall(self, matrix: Tensor) -> Tensor:
        """The tall view of a tensor that lies as the factor does, such as its momentum."""
        return tall(matrix, self.is_a, self.experts)

    def flat(self, form: Tensor) -> Tensor:
        """The matrix of a tall form."""
        experts, size, rank = form.shape
        if experts == 1:
            return form[0].mT if self.is_a else form[0]
        if self.is_a:
            return form.mT.reshape(experts * rank, size)
        return form.permute(1, 2, 0).reshape(size, rank * experts)

    def put_back(self, form: Tensor) -> Tensor:
        """A tall form as the parameter lies, in its shape."""
        matrix, sharding = self.flat(form), self.context.sharding
        rank, across = (-2, -1) if self.is_a else (-1, -2)
        if sharding is not LOCAL and sharding.matrix.splits():
            if not sharding.reduced.splits():
                matrix = sharding.matrix.part(matrix)
            elif sharding.matrix.splits(rank):
                matrix = sharding.matrix.exchange(matrix, across, rank)
        return matrix.reshape(self.context.weight.shape)

    def move(self, form: Tensor | None) -> Direction | None:
        """What to apply to the factor, from a tall form; 0 where nothing may change, None for a frozen factor."""
        if form is None:
            return None
        return Direction(self.put_back(form if self.ok is None else torch.where(self.ok, form, 0.0)))


def _weight(context: Context, is_a: bool, experts: int) -> Tensor:
    weight = context.weight
    if weight.dtype not in (torch.float32, torch.float64):
        weight = weight.float()
    return tall(_gathered(weight, context.sharding, is_a), is_a, experts)


def tall(matrix: Tensor, is_a: bool, experts: int) -> Tensor:
    """(E, d, r) from the matrix of a factor; a view."""
    if experts == 1:
        return (matrix.mT if is_a else matrix)[None]
    rows, cols = matrix.shape
    if is_a:
        return matrix.view(experts, rows // experts, cols).mT
    return matrix.view(rows, cols // experts, experts).permute(2, 0, 1)


def _gathered(tensor: Tensor, sharding: ParamSharding, is_a: bool) -> Tensor:
    """A factor, or its gradient, as a matrix in which the ranks are whole."""
    matrix = tensor if tensor.dim() == 2 else tensor.flatten(1)
    if sharding is LOCAL or not sharding.matrix.splits():
        return matrix
    if not sharding.reduced.splits():
        return sharding.matrix.gather(matrix, -2, -1)
    rank, across = (-2, -1) if is_a else (-1, -2)
    return sharding.matrix.exchange(matrix, rank, across) if sharding.matrix.splits(rank) else matrix


@dataclass(frozen=True)
class Pair:
    """Both sides of one pair, the options that hold for it, and what is known of the step.

    cautious: `Unit.cautious`.
    linear: the step makes the weights κW − αN, but for rounding in the type of arithmetic, with κ well above 0 (`Side.step`).
    """

    a: Side
    b: Side
    options: Mapping[str, Any]
    cautious: bool
    linear: bool

    @staticmethod
    def of(unit: Unit) -> "Pair":
        a, b = Side.of(unit, 0), Side.of(unit, 1)
        linear = not unit.cautious and not unit.options["l1"]
        for side in (a, b):
            keep = side.step[1]
            linear = (
                linear and side.context.weight.dtype == side.weight.dtype and isinstance(keep, float) and keep > 0.5
            )
        return Pair(a, b, unit.options, unit.cautious, linear)

    @property
    def sides(self) -> tuple[tuple[Side, Side], tuple[Side, Side]]:
        """Each side with its dual."""
        return (self.a, self.b), (self.b, self.a)

    @property
    def scaling(self) -> float:
        """s."""
        return float(self.options["scaling"])


@dataclass(frozen=True)
class PairRule(JointRule):
    """A rule for pairs: parameters A₁, B₁, A₂, B₂, … as `lora_pairs` gives them, stepped from A and B at the start of the step.

    Groups hold `scalings`, s of each pair (1 where there is none), and `experts` (1).
    """

    masks: ClassVar[bool] = True
    knows_shards: ClassVar[bool] = True
    decays_last: ClassVar[bool] = False

    # ------------------------------------------------------------------------------------------------------------- units

    def unit_options(self, options: Mapping[str, Any], number: int) -> Mapping[str, Any]:
        scalings, experts = options.get("scalings"), options.get("experts")
        return {
            **options,
            "scaling": 1.0 if scalings is None else scalings[number],
            "experts": 1 if experts is None else experts[number],
        }

    def check_unit(self, names: Sequence[str], params: Sequence[Tensor], options: Mapping[str, Any]) -> None:
        frozen = not any(param.requires_grad for param in params)
        check_pair(names, params, options["scaling"], options["experts"])
        if self.takes_frozen or frozen or all(param.requires_grad for param in params):
            return
        raise ValueError(
            f"{type(self).__name__} trains both factors of a pair, and of {' and '.join(names)} one does not require a gradient; "
            "train both, or use LoRAProAdamW or AltLoRA, which train one factor beside a frozen one"
        )

    def unit_shapes(self, params: Sequence[Tensor]) -> Sequence[tuple[int, ...]]:
        return [matrix_of(param) for param in params]

    def unit_shardings(self, params: Sequence[Tensor], options: Mapping[str, Any]) -> Sequence[ParamSharding] | None:
        return [_sharding(param, number == 0) for number, param in enumerate(params)]

    # ----------------------------------------------------------------------------------------------------------- one step

    def directions(
        self,
        grads: Sequence[Tensor],
        states: Sequence[Mapping[str, Tensor]],
        options: Mapping[str, Any],
        contexts: Sequence[Context],
    ) -> Sequence[Direction]:
        unit = Unit(tuple(grads), tuple(states), options, tuple(contexts))
        ((directions, _),) = self.directions_of([unit])
        return [
            direction for direction in directions if isinstance(direction, Direction)
        ]  # none is fused, outside of a step

    def check_start(self, names: Sequence[str], params: Sequence[Tensor], options: Mapping[str, Any]) -> None:
        whole = [dense_sharding(param).gather(local(param).detach(), *range(-param.dim(), 0)) for param in params]
        forms = [tall(each.reshape(matrix_of(each)), n == 0, options["experts"]) for n, each in enumerate(whole)]
        sizes = [torch.linalg.vector_norm(form.double(), dim=-2) for form in forms]
        threshold = float(options["lr"]) * float(options["lr_factor"]) * float(options["l1"])
        if not bool((sizes[0] * sizes[1] > threshold).any()):
            raise ValueError(
                f"l1={options['l1']} would set every rank-one term of {' and '.join(names)} to zero in the first step, because B is "
                'zero or smaller than the threshold. Nothing was changed; train with l1=0 first, then set group["l1"]'
            )

    def shrink_(self, unit: Unit, steps: Sequence[float], l1: float) -> None:
        """b_k, a_k ← f b_k, f a_k with f = √max(0, 1 − ηξ/(‖b_k‖‖a_k‖)): a soft threshold on the size of each rank-one term."""
        sides = [Side.of(unit, number) for number in (0, 1)]
        squares = [torch.linalg.vector_norm(side.weight, dim=-2).square() for side in sides]
        norms = [square.sqrt() for square in sum_together(squares, [side.sharding for side in sides])]
        size = norms[0] * norms[1]
        left = (1.0 - max(steps) * l1 / size).clamp_min(0.0)
        factor = torch.where(size > 0.0, left, 0.0).sqrt().unsqueeze(-2)
        for side, grad in zip(sides, unit.grads, strict=True):
            # Beside a frozen factor, the other takes all of the threshold.
            own = factor if all(each is not None for each in unit.grads) else factor.square()
            if grad is not None:
                shrunk, weight = side.put_back(side.weight * own), side.context.weight
                weight.copy_(shrunk if side.ok is None else torch.where(side.ok, shrunk, weight))


def check_pair(names: Sequence[str], params: Sequence[Tensor], scaling: object, experts: int) -> None:
    """Raise ValueError for two parameters that are no factors of one product, naming them."""
    both = " and ".join(f"{name} {tuple(param.shape)}" for name, param in zip(names, params, strict=True))
    if params[0] is params[1]:
        raise ValueError(f"{names[0]} is A and B of one pair")
    (rank, n), (m, other) = (matrix_of(param) for param in params)
    if rank != other:
        raise ValueError(
            f"{both} are no pair: A has {rank} rows and B {other} columns. A is r×n and B m×r, in this order, both in one group; "
            "lowrank_optim.lora_pairs(model) puts them so"
        )
    if rank % experts:
        raise ValueError(f"{both} are a pair of {experts} experts, but {rank} ranks are no multiple of that")
    if rank // experts > min(m, n):
        raise ValueError(
            f"{both} have rank {rank // experts}, above the shorter side {min(m, n)} of their product; use a rank of at most that"
        )
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)) or not 0.0 < abs(scaling) < math.inf:
        raise ValueError(f"the scaling of {both} is {scaling!r}; it must be a finite number other than 0")


def _sharding(param: Tensor, is_a: bool) -> ParamSharding:
    """Where a factor lies, and its momentum: split along the long side, with the ranks whole."""
    own = dense_sharding(param)
    if not isinstance(own, MeshSharding):
        return LOCAL
    matrix = matrix_sharding(param, "conv" if param.dim() > 2 else "auto", matrix_of(param))
    assert isinstance(matrix, MeshSharding)
    rank, across = (-2, -1) if is_a else (-1, -2)
    if matrix.splits(rank) and (matrix.splits(across) or len(matrix.groups(rank)) > 1):
        raise ValueError(
            f"a factor {tuple(param.shape)} lies on a mesh as {matrix.placements}, split along its ranks and along another dimension "
            "of mesh or matrix; shard adapters with fully_shard alone, or leave them whole"
        )
    moved = matrix.moved({rank + 2: across + 2}, matrix.shape) if matrix.splits(rank) else matrix
    return MeshParamSharding(matrix=matrix, reduced=moved, lines=matrix, param=own)
