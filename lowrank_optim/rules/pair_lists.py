"""The factors of many pairs of one kind as lists, for the operations that step them all at once (`kernels.pair_schemas`)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.rules.joint import WRITTEN, Answer, JointRule, Unit, UnitLists


@dataclass(frozen=True)
class Factors:
    """Factors as they lie in memory, A and B of each pair, or one of the two.

    weights, grads, momenta: matrices.
    wide: whether each is A, which lies as r×d.
    steps: `Unit.steps` of each.
    """

    weights: list[Tensor]
    grads: list[Tensor]
    momenta: list[Tensor]
    wide: list[bool]
    steps: list[tuple[float, float]]

    @staticmethod
    def of(units: UnitLists, places: Sequence[int] = (0, 1)) -> "Factors":
        """Those of these places in each pair."""
        chosen = slice(None) if len(places) == 2 else slice(places[0], None, 2)
        count = len(units.memos)
        return Factors(
            _matrices(units.weights[chosen]),
            _matrices(units.grads[chosen]),
            [state["exp_avg"] for state in units.states[chosen]],
            [place == 0 for place in places] * count,
            [units.steps[place] for place in places] * count,
        )

    @property
    def eps(self) -> float:
        """Of the type of arithmetic."""
        return torch.finfo(self.weights[0].dtype).eps

    @property
    def long(self) -> list[int]:
        """d of each."""
        return [weight.shape[1 if lies else 0] for weight, lies in zip(self.weights, self.wide, strict=True)]

    def grams(self, forms: list[Tensor]) -> Tensor:
        """XᵀX of each, (N, r, r)."""
        return kernels.thin_grams(forms, forms, self.wide)

    def step_(self, small: Tensor, shares: Sequence[float]) -> tuple[Tensor, Tensor]:
        """D ← (1−share)D + share·g S, X ← κX − αD; X_newᵀX_new and X_oldᵀX_new, (N, r, r).

        Args:
            small: S of each, (N, r, r), of any type.
            shares: of each.
        """
        numbers = [(share, alpha, keep) for share, (alpha, keep) in zip(shares, self.steps, strict=True)]
        small = small.to(self.weights[0].dtype).contiguous()
        return kernels.pair_step_(self.weights, self.grads, self.momenta, small, numbers, self.wide)

    def turn_(self, small: Tensor) -> None:
        """D ← D S."""
        kernels.thin_turn_(self.momenta, small.to(self.momenta[0].dtype).contiguous(), self.wide)


def _matrices(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Convolutions are their first dimension × the rest."""
    return [tensor if tensor.dim() == 2 else tensor.flatten(1) for tensor in tensors]


def plain_kind(unit: Unit) -> tuple[object, ...]:
    """Units of one kind, and one group, are stepped together: rank, type, the steps that both factors have seen, their α and κ."""
    a, b = unit.contexts
    return "plain", a.weight.shape[0], a.weight.dtype, a.weight.device, a.step, b.step, unit.steps


def answers_of(rule: JointRule, units: Sequence[Unit]) -> list[Answer]:
    """Step plain pairs of one kind; the first answer has what there is to warn of."""
    said = rule.write_lists(UnitLists.of(units))
    return [((WRITTEN, WRITTEN), None if n else said) for n in range(len(units))]
