"""AltLoRA: one factor of a pair at a time, along the projected gradient of the whole matrix, with momentum that follows the other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim.kernels import widened
from lowrank_optim.rules.joint import Answer, Unit, UnitLists
from lowrank_optim.rules.pair_lists import Factors, answers_of, plain_kind
from lowrank_optim.rules.pair_products import (
    across,
    blend_,
    copy_before,
    grams_after,
    identity_where,
    mean_decay,
    times,
    turn_,
)
from lowrank_optim.rules.pairs import Pair, PairRule, Side
from lowrank_optim.rules.small_matrices import by_kind, in_batches, pseudo_inverse, sum_together


@dataclass(frozen=True)
class AlternatingLoRA(PairRule):
    """B at odd steps, A at even ones; beside a frozen factor, the other at every step.

        M_B ← β̃M_B + (1−β̃) g_B M⁺/s²,   B ← B − η M_B        M = AAᵀ, β̃ = β(1−β^(k−1))/(1−β^k), k the turns of B
        M_A ← β̃M_A + (1−β̃) K⁺g_A/s²,   A ← A − η M_A        K = BᵀB, k the turns of A

    s M_B A is the running mean of gradients of the whole matrix, projected on the rows of A. When A has moved, M_B is carried along
    by the least-squares change of basis, M_B ← M_B (A_old A_newᵀ) M_new⁺, and M_A likewise when B has moved. The product B A does
    not depend on the choice of the factors. η is a rate of full fine-tuning with momentum; weights decay when it is their turn.

    With `second_moment` (AltLoRA+) the momentum is divided, element by element, by the root of the running squares of g̃ = g_B M⁺/s²:

        V_B ← β̃₂V_B + (1−β̃₂) g̃∘g̃,   B ← B − η M_B/(√V_B + ε)        A likewise

    V is not carried along, for squares of elements do not follow a change of basis, so that the product depends on the choice of the
    factors then. Rates are those of Adam on the factors.

    beta1: β.
    second_moment: keep V.
    beta2, eps: β₂ and ε of V.

    Memory of a pair: 4r(m+n) bytes, 8r(m+n) with `second_moment`.
    """

    name: ClassVar[str] = "altlora"
    takes_frozen: ClassVar[bool] = True
    finishes: ClassVar[bool] = True
    beta1: float = 0.9
    second_moment: bool = False
    beta2: float = 0.999
    eps: float = 1e-8

    def check(self, options: Mapping[str, Any]) -> None:
        for name in ("beta1", "beta2"):
            if not 0.0 <= float(options[name]) < 1.0:
                raise ValueError(f"{name} is {options[name]!r}; it must be in [0, 1)")
        if not float(options["eps"]) >= 0.0:
            raise ValueError(f"eps is {options['eps']!r}; it must be at least 0")
        if not isinstance(options["second_moment"], bool):
            raise ValueError(f"second_moment is {options['second_moment']!r}; it must be True or False")

    def structure(self, options: Mapping[str, Any]) -> tuple[Any, ...]:
        return (options["second_moment"],)

    def init_joint(
        self, shapes: Sequence[tuple[int, ...]], options: Mapping[str, Any], dtype: torch.dtype, device: torch.device
    ) -> Sequence[dict[str, Tensor]]:
        names = ("exp_avg", "exp_avg_sq") if options["second_moment"] else ("exp_avg",)
        return [{name: torch.zeros(shape, dtype=dtype, device=device) for name in names} for shape in shapes]

    def writes(self, unit: Unit) -> bool:
        return unit.is_plain and unit.options["experts"] == 1 and not unit.options["second_moment"]

    def directions_of(self, units: Sequence[Unit]) -> Sequence[Answer]:
        kinds = [plain_kind(unit) if self.writes(unit) else None for unit in units]

        def together(numbers: list[int]) -> Sequence[Answer]:
            alike = [units[n] for n in numbers]
            return self._directions(alike) if kinds[numbers[0]] is None else answers_of(self, alike)

        return by_kind(kinds, together)

    def writes_lists(self, options: Mapping[str, Any]) -> bool:
        return not options["second_moment"]

    def write_lists(self, units: UnitLists) -> None:
        number, count = _whose_turn(units.counts[1])
        moved, duals = Factors.of(units, [number]), Factors.of(units, [1 - number])
        inverses = pseudo_inverse(duals.grams(duals.weights), duals.eps)
        squares = inverses.new_tensor([scaling**2 for scaling in units.scalings])
        share = 1.0 - mean_decay(float(units.options["beta1"]), count)
        after, cross = moved.step_(inverses / squares.view(-1, 1, 1), [share] * len(units.memos))
        duals.turn_(widened(cross) @ pseudo_inverse(after, moved.eps))

    def _directions(self, units: Sequence[Unit]) -> Sequence[Answer]:
        pairs = [Pair.of(unit) for unit in units]
        turns = [_turn(pair) for pair in pairs]
        duals = [dual for _, dual, _ in turns]
        eps = duals[0].eps
        found = sum_together([across(dual.weight, dual.weight) for dual in duals], [dual.sharding for dual in duals])
        inverses = in_batches(lambda gram: pseudo_inverse(gram, eps), found)
        answers: list[Answer] = []
        for pair, (side, _, count), inverse in zip(pairs, turns, inverses, strict=True):
            assert side.grad is not None
            old, momentum = copy_before(side, pair), side.tall(side.state["exp_avg"])
            share = 1.0 - mean_decay(float(pair.options["beta1"]), count)
            blend_(momentum, side.grad, inverse / pair.scaling**2, share, side.ok)
            form = momentum.clone() if pair.cautious else momentum
            if pair.options["second_moment"]:
                form = _scaled(side, pair.options, momentum, times(side.grad, inverse / pair.scaling**2), count)
            move = side.move(form)
            answers.append(([move, None] if side.is_a else [None, move], (pair, old, form)))
        return answers

    def finish(self, units: Sequence[tuple[Unit, Any]]) -> Sequence[None]:
        """The momentum of the factor that did not move follows the one that did."""
        turns = [(_turn(pair), old, form) for _, (pair, old, form) in units]
        # Beside a frozen factor there is none.
        turns = [turn for turn in turns if turn[0][1].grad is not None]
        moved, others = [side for (side, _, _), *_ in turns], [other for (_, other, _), *_ in turns]
        after, cross = grams_after(moved, [old for _, old, _ in turns], [form for *_, form in turns])
        changes = in_batches(lambda gram, both: both @ pseudo_inverse(gram, moved[0].eps), after, cross)
        for side, change in zip(others, changes, strict=True):
            turn_(side.tall(side.state["exp_avg"]), identity_where(change, side.ok))
        return [None for _ in units]


def _scaled(side: Side, options: Mapping[str, Any], momentum: Tensor, grad: Tensor, count: int) -> Tensor:
    """M/(√V + ε), after V was moved towards the squares of `grad`, in tall form."""
    squares = side.tall(side.state["exp_avg_sq"])
    moved = squares.lerp(grad.square(), 1.0 - mean_decay(float(options["beta2"]), count))
    squares.copy_(moved if side.ok is None else torch.where(side.ok, moved, squares))
    return momentum / (squares.sqrt() + float(options["eps"]))


def _turn(pair: Pair) -> tuple[Side, Side, int]:
    """The side that moves in this step, its dual, and how many turns it has had with this one."""
    if pair.a.grad is None or pair.b.grad is None:
        side, dual = (pair.b, pair.a) if pair.a.grad is None else (pair.a, pair.b)
        return side, dual, int(side.context.step)
    number, count = _whose_turn(pair.b.context.step)
    return (pair.b, pair.a, count) if number else (pair.a, pair.b, count)


def _whose_turn(step: float) -> tuple[int, int]:
    """0 for A or 1 for B, which moves in this step, and how many turns it has had with this one."""
    return int(step) % 2, (int(step) + 1) // 2
