"""LoRA-RITE: Adam on a pair, with moments in coordinates in which the choice of the two factors makes no difference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim.rules.base import Direction
from lowrank_optim.rules.joint import Answer, Unit
from lowrank_optim.rules.pairs import (
    Pair,
    PairRule,
    Side,
    across,
    blend_,
    check_adam,
    grams,
    grams_after,
    identity_where,
    times,
)
from lowrank_optim.rules.small_matrices import in_batches, pseudo_inverse_root, sum_together, widened


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
        sides = [side for pair in pairs for side, _ in pair.sides]
        options, eps = pairs[0].options, sides[0].eps
        roots = in_batches(lambda gram: pseudo_inverse_root(gram, eps), grams(pairs))  # of A, of B, of A, …
        duals = [roots[number ^ 1] for number in range(len(sides))]
        squares = sum_together([across(_grad(side), _grad(side)) for side in sides], [side.sharding for side in sides])
        means = in_batches(lambda root, square: root @ widened(square) @ root, duals, squares)
        for side, mean in zip(sides, means, strict=True):
            share = 1.0 - _decay(float(options["betas"][1]), side.context.step)
            moment = side.state["exp_avg_gram"]
            moved = moment.lerp((mean / side.long).to(moment.dtype), share)
            moment.copy_(moved if side.ok is None else torch.where(side.ok, moved, moment))
        dtype = sides[0].weight.dtype
        scalers = in_batches(
            lambda root, scaler: (root @ scaler @ root).to(dtype), duals, self._scalers(sides, options)
        )
        moves: list[Direction | None] = []
        for side, scaler in zip(sides, scalers, strict=True):
            share = 1.0 - _decay(float(options["betas"][0]), side.context.step)
            momentum = side.tall(side.state["exp_avg"])
            blend_(momentum, _grad(side), scaler, share, side.ok)
            moves.append(side.move(momentum))
        # What is known of the factors that are about to change.
        old = [(side.weight.clone(), root) for side, root in zip(sides, roots, strict=True)]
        return [(moves[number : number + 2], old[number : number + 2]) for number in range(0, len(sides), 2)]

    def _scalers(self, sides: Sequence[Side], options: Mapping[str, Any]) -> list[Tensor]:
        """(V + ρI)^(−1/2) of each side."""
        eps, added = sides[0].eps, float(options["eps"])
        grams = [side.state["exp_avg_gram"] for side in sides]
        if not options["escape"]:
            return in_batches(lambda gram: pseudo_inverse_root(gram, eps, added=added), grams)
        shifts = [side.state["escaped"] for side in sides]
        return in_batches(lambda gram, shift: pseudo_inverse_root(gram, eps, shift, added), grams, shifts)

    def finish(self, units: Sequence[tuple[Unit, Any]]) -> Sequence[None]:
        """D ← D (Y_oldᵀ Y_new) K_new⁺, V ← P V Pᵀ."""
        pairs = [Pair.of(unit) for unit, _ in units]
        old = [known for _, both in units for known in both]
        sides = [side for pair in pairs for side, _ in pair.sides]
        eps = sides[0].eps
        after, cross = grams_after(sides, [weight for weight, _ in old])
        roots = in_batches(lambda gram: pseudo_inverse_root(gram, eps), after)
        changes = in_batches(lambda root, both: (widened(both).mT @ root @ root).to(both.dtype), roots, cross)
        turns = in_batches(lambda root, both, before: root @ widened(both) @ before, roots, cross, [r for _, r in old])
        turns = [identity_where(turns[number ^ 1], side.ok) for number, side in enumerate(sides)]
        moments = [side.state["exp_avg_gram"] for side in sides]
        turned = in_batches(lambda turn, moment: turn @ widened(moment) @ turn.mT, turns, moments)
        for number, (side, moment, after_turn) in enumerate(zip(sides, moments, turned, strict=True)):
            momentum = side.tall(side.state["exp_avg"])
            momentum.copy_(times(momentum, identity_where(changes[number ^ 1], side.ok)))
            if "escaped" in side.state:
                self._escape(side, widened(moment), after_turn, float(pairs[number // 2].options["betas"][1]))
            moment.copy_(after_turn)
        return [None for _ in units]

    def _escape(self, side: Side, before: Tensor, after: Tensor, beta2: float) -> None:
        """ρ ← β̃₂(ρ + e), for the next step."""
        values = [torch.linalg.eigvalsh((each + each.mT).nan_to_num() / 2.0) for each in (before, after)]
        largest = (values[0] - values[1]).amax(-1).clamp_min(0.0)
        trace = (values[0] - values[1]).sum(-1).clamp_min(0.0)
        escaped, decay = side.state["escaped"], _decay(beta2, side.context.step + 1.0)
        grown = (escaped + torch.minimum(largest, trace).to(escaped.dtype)) * decay
        escaped.copy_(grown if side.ok is None else torch.where(side.ok, grown, escaped))


def _grad(side: Side) -> Tensor:
    assert side.grad is not None
    return side.grad


def _decay(beta: float, step: float) -> float:
    """β̃ = β(1−β^(t−1))/(1−β^t): a mean of t numbers with weights β^age, without bias."""
    return float(beta * (1.0 - beta ** (step - 1.0)) / (1.0 - beta**step))
