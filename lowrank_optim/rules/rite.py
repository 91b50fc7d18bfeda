"""LoRA-RITE: Adam on a pair, with moments in coordinates in which the choice of the two factors makes no difference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim.rules.base import Direction
from lowrank_optim.rules.joint import Answer, Unit
from lowrank_optim.rules.pair_gradients import check_adam
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
from lowrank_optim.rules.small_matrices import by_kind, pseudo_inverse_root, sum_together, widened


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

    Memory of a pair: 4r(m+n) + 8r² bytes, half of AdamW's; 8 bytes more with `escape`.
    """

    name: ClassVar[str] = "lora_rite"
    finishes: ClassVar[bool] = True
    state_lies: ClassVar[Mapping[str, str]] = {"exp_avg_gram": "whole", "escaped": "whole"}
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    escape: bool = False

    def check(self, options: Mapping[str, Any]) -> None:
        check_adam(options)
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

    def directions_of(self, units: Sequence[Unit]) -> Sequence[Answer]:
        pairs = [Pair.of(unit) for unit in units]
        return by_kind([_kind(pair) for pair in pairs], lambda numbers: self._directions([pairs[n] for n in numbers]))

    def _directions(self, pairs: Sequence[Pair]) -> list[Answer]:
        """Of pairs of one kind; their small matrices stand in stacks (pairs, 2, E, r, r), those of A before those of B."""
        sides = [side for pair in pairs for side, _ in pair.sides]
        options, eps, dtype = pairs[0].options, sides[0].eps, sides[0].weight.dtype
        beta1, beta2 = map(float, options["betas"])
        roots = pseudo_inverse_root(stacked(grams(pairs)), eps)
        duals = roots.flip(1)
        squares = sum_together([across(_grad(side), _grad(side)) for side in sides], [side.sharding for side in sides])
        means = torch._foreach_mul(squares, [1.0 / side.long for side in sides])
        moments = self._moments(pairs, duals @ widened(stacked(means)) @ duals, beta2)
        scalers = pseudo_inverse_root(moments, eps, self._shifts(sides), float(options["eps"]))
        scalers = (duals @ scalers @ duals).to(dtype)
        old = [copy_before(side, pair) for pair in pairs for side, _ in pair.sides]
        moves: list[Direction | None] = []
        for side, scaler in zip(sides, scalers.flatten(0, 1).unbind(), strict=True):
            momentum = side.tall(side.state["exp_avg"])
            blend_(momentum, _grad(side), scaler, 1.0 - mean_decay(beta1, side.context.step), side.ok)
            moves.append(side.move(momentum.clone() if pairs[0].cautious else momentum))
        return [
            (moves[2 * n : 2 * n + 2], (pair, old[2 * n : 2 * n + 2], root))
            for n, (pair, root) in enumerate(zip(pairs, roots.unbind(), strict=True))
        ]

    def _moments(self, pairs: Sequence[Pair], means: Tensor, beta2: float) -> Tensor:
        """V ← β̃₂V + (1−β̃₂)·means in the states, and as a stack."""
        stored = [side.state["exp_avg_gram"] for pair in pairs for side, _ in pair.sides]
        before = stacked(stored)
        shares = [1.0 - mean_decay(beta2, side.context.step) for side, _ in pairs[0].sides]
        after = torch.stack(
            [before[:, k].lerp(means[:, k].to(before.dtype), share) for k, share in enumerate(shares)], 1
        )
        after = where_ok(oks_of(pairs), after, before)
        torch._foreach_copy_(stored, list(after.flatten(0, 1).unbind()))
        return after

    def _shifts(self, sides: Sequence[Side]) -> Tensor | float:
        """ρ of each side, as a stack (pairs, 2, E)."""
        if "escaped" not in sides[0].state:
            return 0.0
        return stacked([side.state["escaped"] for side in sides])

    def finish(self, units: Sequence[tuple[Unit, Any]]) -> Sequence[None]:
        """D ← D (Y_oldᵀ Y_new) K_new⁺, V ← P V Pᵀ."""
        kept = [known for _, known in units]
        return by_kind([_kind(pair) for pair, _, _ in kept], lambda numbers: self._turn([kept[n] for n in numbers]))

    def _turn(self, kept: Sequence[tuple[Pair, Sequence[Tensor | None], Tensor]]) -> list[None]:
        """The end of the step of pairs of one kind."""
        pairs = [pair for pair, _, _ in kept]
        sides = [side for pair in pairs for side, _ in pair.sides]
        eps, dtype = sides[0].eps, sides[0].weight.dtype
        momenta = [side.tall(side.state["exp_avg"]) for side in sides]
        found = grams_after(sides, [each for _, both, _ in kept for each in both], momenta)
        after, cross = map(stacked, found)
        roots, oks = pseudo_inverse_root(after, eps), oks_of(pairs)
        same = torch.eye(roots.shape[-1], dtype=roots.dtype, device=roots.device)
        changes = where_ok(oks, (cross @ roots @ roots).flip(1), same).to(dtype)
        turns = where_ok(oks, (roots @ cross.mT @ torch.stack([root for _, _, root in kept])).flip(1), same)
        stored = [side.state["exp_avg_gram"] for side in sides]
        moments = widened(stacked(stored))
        turned = turns @ moments @ turns.mT
        for momentum, change in zip(momenta, changes.flatten(0, 1).unbind(), strict=True):
            turn_(momentum, change)
        if "escaped" in sides[0].state:
            beta2 = float(pairs[0].options["betas"][1])
            for side, own, new in zip(sides, moments.flatten(0, 1), turned.flatten(0, 1), strict=True):
                self._escape(side, own, new, beta2)
        torch._foreach_copy_(stored, list(turned.flatten(0, 1).unbind()))
        return [None for _ in kept]

    def _escape(self, side: Side, before: Tensor, after: Tensor, beta2: float) -> None:
        """ρ ← β̃₂(ρ + e), for the next step."""
        values = [torch.linalg.eigvalsh((each + each.mT).nan_to_num() / 2.0) for each in (before, after)]
        largest = (values[0] - values[1]).amax(-1).clamp_min(0.0)
        trace = (values[0] - values[1]).sum(-1).clamp_min(0.0)
        escaped, decay = side.state["escaped"], mean_decay(beta2, side.context.step + 1.0)
        grown = (escaped + torch.minimum(largest, trace).to(escaped.dtype)) * decay
        escaped.copy_(grown if side.ok is None else torch.where(side.ok, grown, escaped))


def _kind(pair: Pair) -> tuple[Any, ...]:
    """Pairs of one kind are computed together."""
    experts, _, rank = pair.a.weight.shape
    return rank, experts, pair.a.context.step, pair.b.context.step, pair.linear, pair.a.ok is None


def _grad(side: Side) -> Tensor:
    assert side.grad is not None
    return side.grad
