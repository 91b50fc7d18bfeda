"""AltLoRA: one factor of a pair at a time, along the projected gradient of the whole matrix, with momentum that follows the other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim.rules.joint import WRITTEN, Answer, Unit
from lowrank_optim.rules.pair_lists import Factors, plain_kind
from lowrank_optim.rules.pair_products import (
    across,
    blend_,
    copy_before,
    grams_after,
    identity_where,
    mean_decay,
    turn_,
)
from lowrank_optim.rules.pairs import Pair, PairRule, Side
from lowrank_optim.rules.small_matrices import by_kind, in_batches, pseudo_inverse, sum_together, widened


@dataclass(frozen=True)
class AlternatingLoRA(PairRule):
    """B at odd steps, A at even ones; beside a frozen factor, the other at every step.

        M_B ← β̃M_B + (1−β̃) g_B M⁺/s²,   B ← B − η M_B        M = AAᵀ, β̃ = β(1−β^(k−1))/(1−β^k), k the turns of B
        M_A ← β̃M_A + (1−β̃) K⁺g_A/s²,   A ← A − η M_A        K = BᵀB, k the turns of A

    s M_B A is the running mean of gradients of the whole matrix, projected on the rows of A. When A has moved, M_B is carried along
    by the least-squares change of basis, M_B ← M_B (A_old A_newᵀ) M_new⁺, and M_A likewise when B has moved. The product B A does
    not depend on the choice of the factors. η is a rate of full fine-tuning with momentum; weights decay when it is their turn.

    beta1: β.

    Memory of a pair: 4r(m+n) bytes.
    """

    name: ClassVar[str] = "altlora"
    takes_frozen: ClassVar[bool] = True
    finishes: ClassVar[bool] = True
    beta1: float = 0.9

    def check(self, options: Mapping[str, Any]) -> None:
        if not 0.0 <= float(options["beta1"]) < 1.0:
            raise ValueError(f"beta1 is {options['beta1']!r}; it must be in [0, 1)")

    def init_joint(
        self, shapes: Sequence[tuple[int, ...]], options: Mapping[str, Any], dtype: torch.dtype, device: torch.device
    ) -> Sequence[dict[str, Tensor]]:
        return [{"exp_avg": torch.zeros(shape, dtype=dtype, device=device)} for shape in shapes]

    def writes(self, unit: Unit) -> bool:
        return unit.is_plain and unit.options["experts"] == 1

    def directions_of(self, units: Sequence[Unit]) -> Sequence[Answer]:
        kinds = [plain_kind(unit) if self.writes(unit) else None for unit in units]

        def together(numbers: list[int]) -> Sequence[Answer]:
            alike = [units[n] for n in numbers]
            return self._directions(alike) if kinds[numbers[0]] is None else self._written(alike)

        return by_kind(kinds, together)

    def _written(self, units: Sequence[Unit]) -> Sequence[Answer]:
        """The whole step of pairs of one kind."""
        number, count = _whose_turn(units[0].contexts[1].step)
        moved, duals = Factors.of(units, [number]), Factors.of(units, [1 - number])
        inverses = pseudo_inverse(duals.grams(duals.weights), duals.eps)
        squares = inverses.new_tensor([float(unit.options["scaling"]) ** 2 for unit in units])
        small = inverses / squares.view(-1, 1, 1)
        share = 1.0 - mean_decay(float(units[0].options["beta1"]), count)
        after, cross = moved.step_(small, [share] * len(units))
        duals.turn_(widened(cross) @ pseudo_inverse(after, moved.eps))
        answer = (None, WRITTEN) if number else (WRITTEN, None)
        return [(answer, None) for _ in units]

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
            move = side.move(momentum.clone() if pair.cautious else momentum)
            answers.append(([move, None] if side.is_a else [None, move], (pair, old)))
        return answers

    def finish(self, units: Sequence[tuple[Unit, Any]]) -> Sequence[None]:
        """The momentum of the factor that did not move follows the one that did."""
        turns = [(_turn(pair), old) for _, (pair, old) in units]
        # Beside a frozen factor there is none.
        turns = [(turn, old) for turn, old in turns if turn[1].grad is not None]
        moved, others = [side for (side, _, _), _ in turns], [other for (_, other, _), _ in turns]
        momenta = [side.tall(side.state["exp_avg"]) for side in moved]
        after, cross = grams_after(moved, [old for _, old in turns], momenta)
        changes = in_batches(lambda gram, both: both @ pseudo_inverse(gram, moved[0].eps), after, cross)
        for side, change in zip(others, changes, strict=True):
            turn_(side.tall(side.state["exp_avg"]), identity_where(change, side.ok))
        return [None for _ in units]


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
