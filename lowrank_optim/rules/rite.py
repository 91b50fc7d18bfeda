"""LoRA-RITE: Adam on a pair, with moments in coordinates in which the choice of the two factors makes no difference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.kernels import widened
from lowrank_optim.rules.base import Direction
from lowrank_optim.rules.joint import Answer, Unit, UnitLists
from lowrank_optim.rules.pair_gradients import ADAM
from lowrank_optim.rules.pair_lists import Factors, answers_of, plain_kind
from lowrank_optim.rules.pair_products import (
    across,
    blend_,
    copy_before,
    grams,
    grams_after,
    mean_decay,
    oks_of,
    stacked,
    turn_,
    where_ok,
)
from lowrank_optim.rules.pairs import Pair, PairRule, Side
from lowrank_optim.rules.small_matrices import by_kind, pseudo_inverse_root, sum_together

CHANGED = (
    "factors of LoRARiteAdamW are others than those that its last step has written (an average was swapped in, or weights loaded). "
    "They are taken as they are, with the moments in the same coordinates. Later changes are taken without a warning"
)


@dataclass(frozen=True)
class Rite(PairRule):
    """LoRA-RITE with its moments moved into the new coordinates at the end of each step.

    For one side with weights X, tall gradient g (d×r; g_Aᵀ or g_B), and W = K^(−1/2) of the Gram matrix K = YᵀY of its dual factor Y:

        U = g W                                   the gradient in the orthonormal basis Q = Y W
        V ← β̃₂ V + (1−β̃₂) UᵀU/d                  β̃ = β(1−β^(t−1))/(1−β^t)
        D ← β̃₁ D + (1−β̃₁) U (V + ρI)^(−1/2) W,   X ← X − η D

    and, once the weights are written, D and V are carried into the basis of the new Y, with P = Q_newᵀ Q_old:

        D ← D (Y_oldᵀ Y_new) K_new⁺,   V ← P V Pᵀ

    The released code keeps M, with D = M W, and both orthonormal bases, and does the second part at the start of the next step; the
    numbers are the same. Its QR factors are replaced by polar ones (Q = Y K^(−1/2)), which have no sign to choose.
    (V + ρI)^(−1/2) is Z diag(1/(√(w+ρ) + ε)) Zᵀ, and 0 where w + ρ is below r times the rounding error of the largest: gradients of
    low rank move the factors too.

    betas, eps: β₁, β₂, ε.
    escape: ρ grows by what the change of coordinates loses of V: ρ ← β̃₂(ρ + e), e the least of two measures, the largest loss of an
        eigenvalue and the loss of the trace.

    Memory of a pair: 4r(m+n) + 8r² bytes, half of AdamW's; 8 bytes more with `escape`. Beside the state, 16r² bytes on a CPU:
    K^(−1/2) of the weights that a step wrote is kept for the next one, which sees by all their bits whether they are the same.
    """

    name: ClassVar[str] = "lora_rite"
    finishes: ClassVar[bool] = True
    finds_nonfinite: ClassVar[bool] = True
    state_lies: ClassVar[Mapping[str, str]] = {"exp_avg_gram": "whole", "escaped": "whole"}
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    escape: bool = False

    def check(self, options: Mapping[str, Any]) -> None:
        ADAM.check(options)
        if not isinstance(options["escape"], bool):
            raise ValueError(f"escape is {options['escape']!r}; it must be True or False")

    def structure(self, options: Mapping[str, Any]) -> tuple[Any, ...]:
        return (options["escape"],)

    def init_joint(
        self, shapes: Sequence[tuple[int, ...]], options: Mapping[str, Any], dtype: torch.dtype, device: torch.device
    ) -> Sequence[dict[str, Tensor]]:
        experts, (ranks, _) = options["experts"], shapes[0]
        rank = ranks // experts
        made = []
        for shape in shapes:
            state = {"exp_avg": shape, "exp_avg_gram": (experts, rank, rank)}
            state |= {"escaped": (experts,)} if options["escape"] else {}
            made.append({name: torch.zeros(each, dtype=dtype, device=device) for name, each in state.items()})
        return made

    def writes(self, unit: Unit) -> bool:
        return unit.is_plain and unit.options["experts"] == 1

    def directions_of(self, units: Sequence[Unit]) -> Sequence[Answer]:
        pairs = [None if self.writes(unit) else Pair.of(unit) for unit in units]
        for unit, pair in zip(units, pairs, strict=True):
            if pair is not None:  # whose weights are written elsewhere
                unit.memo.pop("known", None)
        kinds = [plain_kind(unit) if pair is None else _kind(pair) for unit, pair in zip(units, pairs, strict=True)]

        def together(numbers: list[int]) -> list[Answer]:
            chosen = [pair for n in numbers if (pair := pairs[n]) is not None]
            return self._directions(chosen) if chosen else answers_of(self, [units[n] for n in numbers])

        return by_kind(kinds, together)

    def writes_lists(self, options: Mapping[str, Any]) -> bool:
        return True

    def write_lists(self, units: UnitLists) -> str | None:
        factors, options = Factors.of(units), units.options
        beta1, beta2 = options["betas"]
        numbers = [
            (1.0 - mean_decay(beta1, step), 1.0 - mean_decay(beta2, step), mean_decay(beta2, step + 1.0), alpha, keep)
            for step, (alpha, keep) in zip(units.counts, units.steps, strict=True)
        ]
        known = self._known(units.memos, factors.weights)
        kernels.rite_step_(
            *(factors.weights, factors.grads, factors.momenta),
            [state["exp_avg_gram"] for state in units.states],
            [state["escaped"] for state in units.states] if options["escape"] else [],
            known,
            numbers,
            factors.weights[0].shape[0] * factors.eps,
            float(options["eps"]),
            factors.wide,
            units.finite,
        )
        if units.memos[0].get("warned") or kernels.is_watched() or not bool(known[:, -1].any()):
            return None
        for memo in units.memos:
            memo["warned"] = True
        return CHANGED

    def _known(self, memos: Sequence[dict[str, Any]], weights: Sequence[Tensor]) -> Tensor:
        """Two rows for each pair: what is known of its weights since its last step, or zeros where that is nothing."""
        places = [memo.get("known", (None, 0)) for memo in memos]
        known: Tensor | None = places[0][0]
        shape = (len(weights), min(weights[0].shape) ** 2 + 2)
        if (
            known is None
            or known.shape != shape
            or any(table is not known or row != 2 * n for n, (table, row) in enumerate(places))
        ):
            known = torch.zeros(shape, dtype=torch.float64)
            for n, (memo, (table, row)) in enumerate(zip(memos, places, strict=True)):
                if table is not None and table.shape[1] == shape[1]:
                    known[2 * n : 2 * n + 2] = table[row : row + 2]
                memo["known"] = (known, 2 * n)
        return known

    def _directions(self, pairs: Sequence[Pair]) -> list[Answer]:
        """Of pairs of one kind; their small matrices stand in stacks (pairs, 2, E, r, r)."""
        sides = [side for pair in pairs for side, _ in pair.sides]
        both = _Both.of(pairs)
        roots = pseudo_inverse_root(stacked(grams(pairs)), both.eps)
        squares = sum_together([across(_grad(side), _grad(side)) for side in sides], [side.sharding for side in sides])
        means = torch._foreach_mul(squares, [1.0 / side.long for side in sides])
        scalers, moments = self._scalers(both, roots, widened(stacked(means)))
        both.store("exp_avg_gram", moments)
        old = [copy_before(side, pair) for pair in pairs for side, _ in pair.sides]
        moves: list[Direction | None] = []
        shares = len(pairs) * both.shares(0)
        for side, scaler, share in zip(sides, scalers.flatten(0, 1).unbind(), shares, strict=True):
            momentum = side.tall(side.state["exp_avg"])
            blend_(momentum, _grad(side), scaler, share, side.ok)
            moves.append(side.move(momentum.clone() if pairs[0].cautious else momentum))
        return [
            (moves[2 * n : 2 * n + 2], (pair, old[2 * n : 2 * n + 2], root))
            for n, (pair, root) in enumerate(zip(pairs, roots.unbind(), strict=True))
        ]

    def _scalers(self, both: "_Both", roots: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
        """W (V + ρI)^(−1/2) W with the new V, and V ← β̃₂V + (1−β̃₂) W gᵀg W/d."""
        duals = roots.flip(1)
        before, shares = both.stored("exp_avg_gram"), both.shares(1)
        squares = (duals @ means @ duals).to(before.dtype)
        moments = torch.stack([before[:, k].lerp(squares[:, k], share) for k, share in enumerate(shares)], 1)
        moments = where_ok(both.oks, moments, before)
        shift = both.stored("escaped") if both.escapes else None
        scalers = pseudo_inverse_root(moments, both.eps, shift, float(both.options["eps"]))
        return duals @ scalers @ duals, moments

    def finish(self, units: Sequence[tuple[Unit, Any]]) -> Sequence[None]:
        """D ← D (Y_oldᵀ Y_new) K_new⁺, V ← P V Pᵀ."""
        kept = [known for _, known in units]
        return by_kind([_kind(pair) for pair, _, _ in kept], lambda numbers: self._turn([kept[n] for n in numbers]))

    def _turn(self, kept: Sequence[tuple[Pair, Sequence[Tensor | None], Tensor]]) -> list[None]:
        """The end of the step of pairs of one kind."""
        pairs = [pair for pair, _, _ in kept]
        sides = [side for pair in pairs for side, _ in pair.sides]
        both, momenta = _Both.of(pairs), [side.tall(side.state["exp_avg"]) for side in sides]
        after, cross = map(stacked, grams_after(sides, [each for _, old, _ in kept for each in old], momenta))
        known = after, cross, torch.stack([root for _, _, root in kept])
        changes, moments = self._carried(both, known, both.stored("exp_avg_gram"))
        for momentum, change in zip(momenta, changes.flatten(0, 1).unbind(), strict=True):
            turn_(momentum, change)
        both.store("exp_avg_gram", moments)
        return [None for _ in kept]

    def _carried(self, both: "_Both", known: tuple[Tensor, Tensor, Tensor], moments: Tensor) -> tuple[Tensor, Tensor]:
        """(Y_oldᵀ Y_new) K_new⁺ and P V Pᵀ, from X_newᵀX_new, X_oldᵀX_new and the old K^(−1/2) of each side; ρ in the states."""
        after, cross, before = known
        roots = pseudo_inverse_root(after, both.eps)
        same = torch.eye(roots.shape[-1], dtype=roots.dtype, device=roots.device)
        changes = where_ok(both.oks, (cross @ roots @ roots).flip(1), same)
        turns = where_ok(both.oks, (roots @ cross.mT @ before).flip(1), same)
        old = widened(moments)
        new = turns @ old @ turns.mT
        if both.escapes:
            self._escape(both, old, new)
        return changes, new

    def _escape(self, both: "_Both", before: Tensor, after: Tensor) -> None:
        """ρ ← β̃₂(ρ + e), for the next step."""
        escaped, beta2 = both.stored("escaped"), float(both.options["betas"][1])
        decays = torch.tensor([[mean_decay(beta2, step + 1.0)] for step in both.steps], dtype=escaped.dtype)
        grown = (escaped + kernels.escaped_of(before, after).to(escaped.dtype)) * decays.to(escaped.device)
        oks = None if both.oks is None else both.oks.view(-1, 1, 1)
        both.store("escaped", where_ok(oks, grown, escaped))


@dataclass(frozen=True)
class _Both:
    """Both sides of pairs of one kind.

    states: of all factors, A's before B's.
    options, steps: of the first pair: its group's, and the steps that A and B have seen.
    eps: of the type that Gram matrices were summed in.
    oks: which pairs may change; None for all.
    """

    states: Sequence[Mapping[str, Tensor]]
    options: Mapping[str, Any]
    steps: Sequence[float]
    eps: float
    oks: Tensor | None

    @staticmethod
    def of(pairs: Sequence[Pair]) -> "_Both":
        sides = [side for pair in pairs for side, _ in pair.sides]
        steps = [side.context.step for side in sides[:2]]
        return _Both([side.state for side in sides], pairs[0].options, steps, sides[0].eps, oks_of(pairs))

    @property
    def escapes(self) -> bool:
        """The option `escape`."""
        return "escaped" in self.states[0]

    def shares(self, number: int) -> list[float]:
        """1 − β̃ for A and for B, of β₁ or β₂."""
        beta = float(self.options["betas"][number])
        return [1.0 - mean_decay(beta, step) for step in self.steps]

    def stored(self, name: str) -> Tensor:
        """A state tensor of all factors, (pairs, 2, …)."""
        return stacked([state[name] for state in self.states])

    def store(self, name: str, stack: Tensor) -> None:
        """Write it back."""
        torch._foreach_copy_([state[name] for state in self.states], list(stack.flatten(0, 1).unbind()))


def _kind(pair: Pair) -> tuple[Any, ...]:
    """Pairs of one kind are computed together."""
    experts, _, rank = pair.a.weight.shape
    return rank, experts, pair.a.context.step, pair.b.context.step, pair.linear, pair.a.ok is None


def _grad(side: Side) -> Tensor:
    assert side.grad is not None
    return side.grad
