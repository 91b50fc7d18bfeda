"""Adafactor (Shazeer and Stern, 2018): a factored second moment, update clipping and steps relative to the weights' size."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.rules.base import Context, Direction, Rule, Transport
from lowrank_optim.sharding.tensor_sharding import TensorSharding


def _rms(x: Tensor, sharding: TensorSharding) -> Tensor:
    norm = sharding.norm(torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)))
    return norm.div_(max(sharding.numel(x), 1) ** 0.5)


def _inverse_root(row: Tensor, col: Tensor, rows: TensorSharding) -> Tensor:
    """1/√V for V = row colᵀ / mean(row); `rows` is the sharding of `row`."""
    return (row / rows.mean(row, -1).unsqueeze(-1)).rsqrt_().unsqueeze(-1) * col.rsqrt().unsqueeze(-2)


@dataclass(frozen=True)
class Adafactor(Rule):
    """U = R/√V / max(1, RMS(R/√V)/d), V = row colᵀ / mean(row), step ρ·max(ε₂, RMS(W)).

        row ← β̂ row + (1−β̂) mean_cols(R² + ε₁),  col likewise,  β̂ = 1 − t^decay_rate
        ρ = η, or η·min(10⁻², 1/√t) with `relative_step` (10⁻⁶·t in place of 10⁻² with `warmup_init`)

    With `beta1`, the step is averaged: A ← β₁A + (1−β₁)·step·U, and A is applied. Matrices are factored, vectors are not.

    Memory: 4 bytes for each row and each column of R, and 4 for each element with `beta1`.
    """

    name: ClassVar[str] = "adafactor"
    decays_last: ClassVar[bool] = False
    knows_shards: ClassVar[bool] = True
    masks: ClassVar[bool] = True
    rotates_shards: ClassVar[bool] = False
    state_lies: ClassVar[Mapping[str, str]] = {"exp_avg_sq_row": "rows", "exp_avg_sq_col": "columns"}
    beta1: float | None = None
    eps: tuple[float, float] = (1e-30, 1e-3)
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    scale_parameter: bool = True
    relative_step: bool = True
    warmup_init: bool = False

    def check(self, options: Mapping[str, Any]) -> None:
        beta1, eps = options["beta1"], options["eps"]
        if beta1 is not None and not 0.0 <= beta1 < 1.0:
            raise ValueError(f"beta1 is {beta1!r}; it must be None or in [0, 1)")
        if not isinstance(eps, (tuple, list)) or len(eps) != 2 or not all(e >= 0.0 for e in eps):
            raise ValueError(f"eps is {eps!r}; Adafactor needs two numbers of at least 0 (for R² and for RMS(W))")
        if not options["clip_threshold"] > 0.0:
            raise ValueError(f"clip_threshold is {options['clip_threshold']!r}; it must be above 0")
        if not options["decay_rate"] <= 0.0:
            raise ValueError(f"decay_rate is {options['decay_rate']!r}; it must be at most 0")
        if options["warmup_init"] and not options["relative_step"]:
            raise ValueError("warmup_init is True, which needs relative_step=True (leave lr at None)")

    def structure(self, options: Mapping[str, Any]) -> tuple[Any, ...]:
        return (options["beta1"] is None,)

    def init(
        self, shape: tuple[int, ...], options: Mapping[str, Any], dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        shapes = {"exp_avg_sq": shape}
        if len(shape) >= 2:
            shapes = {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": (*shape[:-2], shape[-1])}
        if options["beta1"] is not None:
            shapes["exp_avg"] = shape
        return {name: torch.zeros(size, dtype=dtype, device=device) for name, size in shapes.items()}

    def direction(
        self, grad: Tensor, state: Mapping[str, Tensor], options: Mapping[str, Any], context: Context
    ) -> Direction:
        eps1, eps2 = options["eps"]
        sharding = context.sharding.reduced
        size = _step_size(options, context.age, context.weight, context.sharding.matrix, eps2)
        if sharding.numel(grad) == 0:  # a tensor whose turn it is not (FRUGAL's blocks): means over nothing are NaN
            return Direction(grad, 1.0, size)
        # 1 − β̂, and 0 where the gradient is to be ignored.
        fresh = kernels.scalar(context.step ** options["decay_rate"], grad.dtype, grad.device)
        fresh = fresh if context.ok is None else fresh * context.ok
        square = grad.square().add_(eps1)
        if "exp_avg_sq" in state:
            update = state["exp_avg_sq"].lerp_(square, fresh).rsqrt().mul_(grad)
        else:
            row = state["exp_avg_sq_row"].lerp_(sharding.mean(square, -1), fresh)
            col = state["exp_avg_sq_col"].lerp_(sharding.mean(square, -2), fresh)
            update = _inverse_root(row, col, sharding.drop(-1)).mul_(grad)
        update.mul_(size / (_rms(update, sharding) / options["clip_threshold"]).clamp_min(1.0))
        if options["beta1"] is not None:
            weight_of_new = kernels.scalar(1.0 - options["beta1"], grad.dtype, grad.device)
            update = state["exp_avg"].lerp_(update, weight_of_new if context.ok is None else weight_of_new * context.ok)
        if context.ok is not None:
            update, size = update.masked_fill(~context.ok, 0.0), size * context.ok
        return Direction(update, 1.0, size)

    def averages_updates(self, options: Mapping[str, Any]) -> bool:
        return options["beta1"] is not None

    def gradient_share(self, options: Mapping[str, Any]) -> float:
        return 0.0  # the average is one of steps, whose columns are alike

    def transport(self, state: Mapping[str, Tensor], move: Transport, options: Mapping[str, Any], step: float) -> None:
        """A ← A C; V ← V (C∘C), factored again."""
        if step < 1:
            return
        if "exp_avg" in state:
            state["exp_avg"].copy_(move(state["exp_avg"], 1))
        row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        moved = move(row.unsqueeze(-1) * col.unsqueeze(-2) / row.mean(-1, keepdim=True).unsqueeze(-1), 2)
        row.copy_(moved.mean(-1)).clamp_min_(options["eps"][0])
        col.copy_(moved.mean(-2)).clamp_min_(options["eps"][0])


def _step_size(options: Mapping[str, Any], age: float, weight: Tensor, sharding: TensorSharding, eps2: float) -> Tensor:
    """The step size as a 0-d tensor on the weight's device."""
    size = float(options["lr"]) * float(options["lr_factor"])
    if options["relative_step"]:
        size *= min(1e-6 * age if options["warmup_init"] else 1e-2, age**-0.5)
    if options["scale_parameter"]:
        return _rms(weight, sharding).clamp_min(eps2) * size
    return kernels.scalar(size, kernels.compute_dtype(weight.dtype), weight.device)
