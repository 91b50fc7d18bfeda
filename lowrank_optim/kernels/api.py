"""The operations as the package calls them: keyword arguments and plain numbers in, one call of `torch.ops.lowrank_optim` out.

Equations, shapes and types are those of the definitions in `reference`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.kernels import pair_reference  # noqa: F401 (defines operations)
from lowrank_optim.kernels.arguments import pack_key, pack_scalars
from lowrank_optim.kernels.dispatch import call
from lowrank_optim.kernels.host import cpu_tensor
from lowrank_optim.kernels.reference import ResidualTerm
from lowrank_optim.kernels.rounding import WeightError


class AdamNumbers(TypedDict):
    """β₁, β₂, ε and t of one step of Adam."""

    beta1: float
    beta2: float
    eps: float
    step: float


def project(grad: Tensor, basis: Tensor, side: str) -> Tensor:
    """R = G B for side "right" (m×r), R = Gᵀ B for side "left" (n×r), with float32 accumulation."""
    result: Tensor = call("project", grad, basis, side == "right")
    return result


def project_with_norms(grad: Tensor, basis: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """R, and ‖g_j‖² of every row ("right") or column ("left") of G."""
    reduced, squares = call("project_with_norms", grad, basis, side == "right")
    return reduced, squares


def adam_direct_(
    grad: Tensor,
    exp_avg: Tensor,  # modified in place
    exp_avg_sq: Tensor,  # modified in place
    *,
    beta1: float,
    beta2: float,
    eps: float,
    step: float,
    ok: Tensor | None = None,
) -> Tensor:
    """Adam's moments and direction, see `reference.adam_direct_`."""
    adam: AdamNumbers = {"beta1": beta1, "beta2": beta2, "eps": eps, "step": step}
    result: Tensor = call("adam_direct_", *adam_direct_call(grad, (exp_avg, exp_avg_sq), ok, **adam))
    return result


def adam_direct_call(
    grad: Tensor, moments: tuple[Tensor, Tensor], ok: Tensor | None, **adam: Unpack[AdamNumbers]
) -> tuple[Any, ...]:
    """The arguments of the operation `adam_direct_`, for `run_many`."""
    return grad, *moments, pack_scalars(adam["beta1"], adam["beta2"], adam["eps"], adam["step"]), ok


def adam_dense_call(
    weight: Tensor,
    grad: Tensor,
    moments: tuple[Tensor, Tensor],
    start: int,
    write: Mapping[str, Any],
    **adam: Unpack[AdamNumbers],
) -> tuple[Any, ...]:
    """The arguments of the operation `adam_dense_`, for `run_many`."""
    scalars = pack_scalars(adam["beta1"], adam["beta2"], adam["eps"], adam["step"], write["alpha"], write["keep"])
    rounding = pack_key(write["rounding_key"], start)
    return weight, grad, *moments, scalars, write["ok"], rounding, *(write["error"] or ())


def folded_adam_dense_call(
    weight: Tensor,
    grad: Tensor,
    moments: tuple[Tensor, Tensor],
    start: int,
    write: Mapping[str, Any],
    *,
    residual: float,
    fold: int,
    **adam: Unpack[AdamNumbers],
) -> tuple[Any, ...]:
    """The arguments of the operation `folded_adam_dense_`, for `run_many`; `residual` is κ."""
    numbers = adam["beta1"], adam["beta2"], adam["eps"], adam["step"], residual
    scalars = pack_scalars(*numbers, write["alpha"], write["keep"])
    return weight, grad, *moments, scalars, write["ok"], pack_key(write["rounding_key"], start), fold


def lion_direct_(grad: Tensor, exp_avg: Tensor, *, beta1: float, beta2: float, ok: Tensor | None = None) -> Tensor:
    """Lion's direction and momentum, see `reference.lion_direct_`."""
    result: Tensor = call("lion_direct_", grad, exp_avg, pack_scalars(beta1, beta2), ok)
    return result


def sgd_direct_(
    grad: Tensor, exp_avg: Tensor, *, momentum: float, nesterov: bool = False, ok: Tensor | None = None
) -> Tensor:
    """Momentum and direction of SGD, see `reference.sgd_direct_`."""
    result: Tensor = call("sgd_direct_", grad, exp_avg, pack_scalars(momentum), ok, nesterov)
    return result


def rmsprop_direct_(grad: Tensor, exp_avg_sq: Tensor, *, alpha: float, eps: float, ok: Tensor | None = None) -> Tensor:
    """RMSprop's second moment and direction, see `reference.rmsprop_direct_`."""
    result: Tensor = call("rmsprop_direct_", grad, exp_avg_sq, pack_scalars(alpha, eps), ok)
    return result


def apply_(
    weight: Tensor,  # modified in place
    left: Tensor,
    right: Tensor,
    *,
    alpha: float,
    keep: float | Tensor,
    ok: Tensor | None = None,
    rounding_key: int | None = None,
    start: int = 0,
    residual: ResidualTerm | None = None,
    error: WeightError | None = None,
) -> None:
    """W ← keep·W − α·(left @ right + φ ⊙ E), see `reference.apply_`."""
    write = {"alpha": alpha, "keep": keep, "ok": ok, "rounding_key": rounding_key, "error": error}
    call("apply_", *apply_call(weight, (left, right), residual, start, write))


def apply_call(
    weight: Tensor,
    factors: tuple[Tensor, Tensor],
    residual: ResidualTerm | None,
    start: int,
    write: Mapping[str, Any],
) -> tuple[Any, ...]:
    """The arguments of the operation `apply_`, for `run_many`."""
    grad = phi = subtract_left = subtract_right = None
    if residual is not None:
        grad, phi, subtract_left, subtract_right = residual.grad, residual.scale, residual.left, residual.right
    keep, key = write["keep"], write["rounding_key"]
    return (
        weight,
        *factors,
        pack_scalars(write["alpha"], 1.0 if isinstance(keep, Tensor) else keep),
        keep if isinstance(keep, Tensor) else None,
        write["ok"],
        None if key is None else pack_key(key, start),
        grad,
        phi,
        subtract_left,
        subtract_right,
        residual is not None and residual.sign,
        *(write["error"] or ()),
    )


def no_factors(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors of a zero matrix of the weight's shape: rank 0, no memory."""
    *batch, rows, cols = weight.shape
    return weight.new_empty((*batch, rows, 0), dtype=dtype), weight.new_empty((*batch, 0, cols), dtype=dtype)


def apply_dense_(
    weight: Tensor,  # modified in place
    direction: Tensor,
    *,
    alpha: float,
    keep: float | Tensor,
    ok: Tensor | None = None,
    rounding_key: int | None = None,
    start: int = 0,
    error: WeightError | None = None,
) -> None:
    """W ← keep·W − α·N for a direction of the weight's own shape."""
    number, factor = (1.0, keep) if isinstance(keep, Tensor) else (keep, None)
    scalars, rounding = pack_scalars(alpha, number), pack_key(rounding_key, start)
    call("apply_dense_", weight, direction, scalars, factor, ok, rounding, *(error or ()))


def store_(
    target: Tensor, value: Tensor, rounding_key: int | None, start: int = 0, error: WeightError | None = None
) -> None:
    """target ← value, rounded to the target's type: to nearest, stochastically with a key, or with what that drops in `error`."""
    call("stochastic_round_", target, value, pack_key(rounding_key, start), *(error or ()))


def thin_grams(left: Sequence[Tensor], right: Sequence[Tensor], wide: Sequence[bool]) -> Tensor:
    """XᵀY of every two factors, see `pair_reference.thin_grams`."""
    result: Tensor = call("thin_grams", left, right, wide)
    return result


def pair_step_(
    weights: Sequence[Tensor],  # modified in place
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],  # modified in place
    small: Tensor,
    numbers: Sequence[tuple[float, float, float]],
    wide: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """The step of every factor with share, α and κ, see `pair_reference.pair_step_`."""
    after, cross = call("pair_step_", weights, grads, momenta, small, cpu_tensor(numbers, torch.float64), wide)
    return after, cross


def thin_turn_(forms: Sequence[Tensor], small: Tensor, wide: Sequence[bool]) -> None:
    """X ← X S, see `pair_reference.thin_turn_`."""
    call("thin_turn_", forms, small, wide)


def inverse_power(
    matrices: Tensor, tolerance: float, *, root: bool, shift: Tensor | None = None, added: float = 0.0
) -> Tensor:
    """The inverse, or its root, of symmetric matrices, see `pair_reference.inverse_power`."""
    result: Tensor = call("inverse_power", matrices, shift, pack_scalars(tolerance, added), root)
    return result


def rite_step_(
    weights: Sequence[Tensor],  # modified in place
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],  # modified in place
    moments: Sequence[Tensor],  # modified in place
    escaped: Sequence[Tensor],  # modified in place
    known: Tensor,  # modified in place
    numbers: Sequence[tuple[float, float, float, float, float]],
    tolerance: float,
    added: float,
    wide: Sequence[bool],
    finite: Tensor | None = None,  # modified in place
) -> None:
    """A step of LoRA-RITE, see `pair_schemas.rite_step_`."""
    tables = cpu_tensor(numbers, torch.float64), pack_scalars(tolerance, added)
    call("rite_step_", weights, grads, momenta, moments, escaped, known, *tables, wide, finite)
