"""Adam (Kingma and Ba, 2015) with decoupled weight decay (Loshchilov and Hutter, 2019)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.quantization.coded_moments import CodedMoments
from lowrank_optim.rules.base import Context, Direction, FusedDense, FusedDirection, Rule, Transport


def check_betas(betas: Any) -> None:
    """Raise ValueError unless `betas` is two numbers in [0, 1)."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(0.0 <= float(beta) < 1.0 for beta in betas):
        raise ValueError(f"betas is {betas!r}; it must be two numbers in [0, 1)")


@dataclass(frozen=True)
class Adam(Rule):
    """N = (m/bc₁) / (√(v/bc₂) + ε) with m ← β₁m + (1−β₁)R, v ← β₂v + (1−β₂)R², bcᵢ = 1 − βᵢᵗ.

    With `match_reference` the form of the released low-rank optimizers: ε is added to the uncorrected √v, and the step size is
    η√bc₂/bc₁.

    Memory: 8 bytes for each element of R (16 in float64).
    """

    name: ClassVar[str] = "adam"
    elementwise: ClassVar[bool] = True
    masks: ClassVar[bool] = True
    keeps_errors: ClassVar[bool] = True
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def check(self, options: Mapping[str, Any]) -> None:
        check_betas(options["betas"])
        if not float(options["eps"]) >= 0.0:
            raise ValueError(f"eps is {options['eps']!r}; it must be at least 0")

    def init(
        self, shape: tuple[int, ...], options: Mapping[str, Any], dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        return {name: torch.zeros(shape, dtype=dtype, device=device) for name in ("exp_avg", "exp_avg_sq")}

    def direction(
        self, grad: Tensor, state: Mapping[str, Tensor], options: Mapping[str, Any], context: Context
    ) -> Direction:
        return Adam.fused_direction(self, grad, state, options, context).run()

    def fused_direction(
        self, grad: Tensor, state: Mapping[str, Tensor], options: Mapping[str, Any], context: Context
    ) -> FusedDirection:
        shape, (numbers, correction) = grad.shape, self._numbers(options, context)
        norms = context.norms
        if type(state) is CodedMoments and (codes := state.codes()) is not None:
            op, args = (
                "coded_adam_direct_",
                state.adam_direct_call(grad, codes, int(context.age), context.ok, **numbers),
            )
            norms = norms and args[0].shape == shape  # columns of one element are coded as rows
        else:
            moments = state["exp_avg"], state["exp_avg_sq"]
            op, args = "adam_direct_", kernels.adam_direct_call(grad, moments, context.ok, **numbers)

        def direction(result: Any) -> Direction:
            matrix, lengths = (result[0], result[1:]) if norms else (result, None)
            return Direction(
                matrix if matrix.shape == shape else matrix.view(shape), correction=correction, norms=lengths
            )

        return FusedDirection(f"{op}with_norms_" if norms else op, args, direction)

    def fused_dense(
        self,
        weight: Tensor,
        grad: Tensor,
        state: Mapping[str, Tensor],
        options: Mapping[str, Any],
        context: Context,
    ) -> FusedDense | None:
        numbers, _ = self._numbers(options, context)
        codes = state.codes() if type(state) is CodedMoments else None
        plain = codes is None and not isinstance(state, CodedMoments)
        if codes is None and not (plain and state["exp_avg"].is_contiguous() and state["exp_avg_sq"].is_contiguous()):
            return None
        # Other memory orders (channels last) go through a copy, so that they give the same bits.
        target, part = weight.contiguous(), grad.contiguous()

        def call(write: Mapping[str, Any]) -> tuple[Any, ...]:
            if codes is not None and isinstance(state, CodedMoments):
                return state.adam_dense_call(target, part, codes, int(context.age), write, **numbers)
            moments, start = (state["exp_avg"], state["exp_avg_sq"]), context.sharding.matrix.start
            return kernels.adam_dense_call(target, part, moments, start, write, **numbers)

        # Copies must not wait with others: together they could be as large as the model.
        copied = target is not weight or part is not grad
        after = (lambda: target is weight or weight.copy_(target)) if copied else None
        return FusedDense("adam_dense_" if codes is None else "coded_adam_dense_", call, after)

    def _numbers(self, options: Mapping[str, Any], context: Context) -> tuple[kernels.AdamNumbers, float]:
        """β₁, β₂, ε and t of the operations, and the factor of N that is the bias correction."""
        beta1, beta2 = map(float, options["betas"])
        eps, correction = float(options["eps"]), 1.0
        if options["match_reference"] and self.decays_last:
            # Released code that decays after the update is transformers' old AdamW, whose ε has this form, too:
            # m/(√v + ε) with step η√bc₂/bc₁ is the corrected form with ε/√bc₂ in place of ε.
            root = (1.0 - beta2**context.step) ** 0.5
            eps, correction = eps / root, root / (1.0 - beta1**context.step)
        return {"beta1": beta1, "beta2": beta2, "eps": eps, "step": context.step}, correction

    def mean_gradient(self, state: Mapping[str, Tensor], options: Mapping[str, Any], step: float) -> Tensor | None:
        return state["exp_avg"] / (1.0 - float(options["betas"][0]) ** step) if step >= 1 else None

    def gradient_share(self, options: Mapping[str, Any]) -> float:
        return 1.0 - float(options["betas"][1])

    def memory(self, options: Mapping[str, Any]) -> float:
        beta1 = float(options["betas"][0])
        return beta1 / (1.0 - beta1)

    def transport(self, state: Mapping[str, Tensor], move: Transport, options: Mapping[str, Any], step: float) -> None:
        """m ← m C; v ← |(1−β₂ᵗ) [(v̂ − m̂²)(C∘C) + (m̂ C)²]|, hats bias-corrected: LDAdam's rule (Robert et al., 2025)."""
        if step < 1:
            return
        beta1, beta2 = map(float, options["betas"])
        bc1, bc2 = 1.0 - beta1**step, 1.0 - beta2**step
        exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        moved = move(exp_avg, 1)
        variance = move(exp_avg_sq / bc2 - (exp_avg / bc1).square(), 2)
        exp_avg_sq.copy_(variance.add_((moved / bc1).square()).mul_(bc2).abs_())
        exp_avg.copy_(moved)


@dataclass(frozen=True)
class TorchAdam(Adam):
    """Adam for methods whose released code has torch's form of ε and decay, so that `match_reference` changes neither."""

    decays_last: ClassVar[bool] = False


@dataclass(frozen=True)
class CondaAdam(Adam):
    """Adam whose squares stay as they are at a refresh: v of the k-th singular vector is read as that of the new one (Conda)."""

    def transport(self, state: Mapping[str, Tensor], move: Transport, options: Mapping[str, Any], step: float) -> None:
        """m ← m C."""
        state["exp_avg"].copy_(move(state["exp_avg"], 1))
