"""The operations as the package calls them: keyword arguments and plain numbers in, one call of `torch.ops.lowrank_optim` out.

Equations, shapes and types are those of the definitions in `reference`.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.kernels import reference
from lowrank_optim.kernels.counter_rng import fill_gaussian_, signed_key, unsigned_key
from lowrank_optim.kernels.dispatch import call, definition
from lowrank_optim.kernels.host import host_tensor
from lowrank_optim.kernels.reference import ResidualTerm


class AdamNumbers(TypedDict):
    """β₁, β₂, ε and t of one step of Adam."""

    beta1: float
    beta2: float
    eps: float
    step: float


def numbers(*values: float) -> Tensor:
    """The `scalars` of an operation, which none changes: parameters of one step share them."""
    if torch._C._len_torch_dispatch_stack():  # a mode may make tensors of its own
        return host_tensor(values, torch.float64)
    return _numbers(values)


@lru_cache(maxsize=64)
def _numbers(values: tuple[float, ...]) -> Tensor:
    return host_tensor(values, torch.float64)


def words(key: int | None, *more: int) -> Tensor | None:
    """The `noise` or `rounding` of an operation; the key's 64 bits as a signed integer. None without a key."""
    if key is None:
        return None
    return host_tensor((signed_key(key), *more), torch.int64)


def key_of(words: Tensor | None) -> tuple[int | None, list[int]]:
    """The inverse of `words`."""
    if words is None:
        return None, [0, 0]
    key, *more = words.tolist()
    return unsigned_key(key), more


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
    return grad, *moments, numbers(adam["beta1"], adam["beta2"], adam["eps"], adam["step"]), ok


def adam_dense_call(
    weight: Tensor,
    grad: Tensor,
    moments: tuple[Tensor, Tensor],
    start: int,
    write: Mapping[str, Any],
    **adam: Unpack[AdamNumbers],
) -> tuple[Any, ...]:
    """The arguments of the operation `adam_dense_`, for `run_many`."""
    scalars = numbers(adam["beta1"], adam["beta2"], adam["eps"], adam["step"], write["alpha"], write["keep"])
    return weight, grad, *moments, scalars, write["ok"], words(write["rounding_key"], start)


def lion_direct_(grad: Tensor, exp_avg: Tensor, *, beta1: float, beta2: float, ok: Tensor | None = None) -> Tensor:
    """Lion's direction and momentum, see `reference.lion_direct_`."""
    result: Tensor = call("lion_direct_", grad, exp_avg, numbers(beta1, beta2), ok)
    return result


def sgd_direct_(
    grad: Tensor, exp_avg: Tensor, *, momentum: float, nesterov: bool = False, ok: Tensor | None = None
) -> Tensor:
    """Momentum and direction of SGD, see `reference.sgd_direct_`."""
    result: Tensor = call("sgd_direct_", grad, exp_avg, numbers(momentum), ok, nesterov)
    return result


def rmsprop_direct_(grad: Tensor, exp_avg_sq: Tensor, *, alpha: float, eps: float, ok: Tensor | None = None) -> Tensor:
    """RMSprop's second moment and direction, see `reference.rmsprop_direct_`."""
    result: Tensor = call("rmsprop_direct_", grad, exp_avg_sq, numbers(alpha, eps), ok)
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
) -> None:
    """W ← keep·W − α·(left @ right + φ ⊙ E), see `reference.apply_`."""
    grad = phi = subtract_left = subtract_right = None
    if residual is not None:
        grad, phi, subtract_left, subtract_right = residual.grad, residual.scale, residual.left, residual.right
    call(
        "apply_",
        weight,
        left,
        right,
        numbers(alpha, 1.0 if isinstance(keep, Tensor) else keep),
        keep if isinstance(keep, Tensor) else None,
        ok,
        None if rounding_key is None else words(rounding_key, start),
        grad,
        phi,
        subtract_left,
        subtract_right,
        residual is not None and residual.sign,
    )


def apply_dense_(
    weight: Tensor,  # modified in place
    direction: Tensor,
    *,
    alpha: float,
    keep: float | Tensor,
    ok: Tensor | None = None,
    rounding_key: int | None = None,
    start: int = 0,
) -> None:
    """W ← keep·W − α·N for a direction of the weight's own shape."""
    number, factor = (1.0, keep) if isinstance(keep, Tensor) else (keep, None)
    call("apply_dense_", weight, direction, numbers(alpha, number), factor, ok, words(rounding_key, start))


def store_(target: Tensor, value: Tensor, rounding_key: int | None, start: int = 0) -> None:
    """target ← value, rounded to the target's type: to nearest, or stochastically with a key."""
    call("stochastic_round_", target, value, words(rounding_key, start))


# ------------------------------------------------------------------------------------- the definitions, with the ops' arguments


@definition("project")
def _project(grad: Tensor, basis: Tensor, right: bool) -> Tensor:
    return reference.project(grad, basis, "right" if right else "left")


@definition("project_with_norms")
def _project_with_norms(grad: Tensor, basis: Tensor, right: bool) -> tuple[Tensor, Tensor]:
    return reference.project_with_norms(grad, basis, "right" if right else "left")


@definition("adam_direct_")
def _adam_direct_(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: Tensor, ok: Tensor | None) -> Tensor:
    beta1, beta2, eps, step = scalars.tolist()
    return reference.adam_direct_(grad, exp_avg, exp_avg_sq, beta1=beta1, beta2=beta2, eps=eps, step=step, ok=ok)


@definition("adam_direct_with_norms_")
def _adam_direct_with_norms_(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: Tensor, ok: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    direction: Tensor = call("adam_direct_", grad, exp_avg, exp_avg_sq, scalars, ok)
    return direction, *reference.row_norms(direction, grad)


@definition("adam_dense_")
def _adam_dense_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    ok: Tensor | None,
    rounding: Tensor | None,
) -> None:
    *adam, alpha, keep = scalars.tolist()
    key, (start, *_) = key_of(rounding)
    flat = [tensor.view(-1) for tensor in (weight, grad, exp_avg, exp_avg_sq)]
    for chunk in reference.row_chunks(weight.numel(), 1):
        w, g, m, v = (tensor[chunk] for tensor in flat)
        g = g.to(m.dtype) if ok is None else torch.where(ok, g.to(m.dtype), 0.0)
        direction = _adam_direct_(g, m, v, numbers(*adam), ok)
        reference.apply_dense_(w, direction, alpha=alpha, keep=keep, ok=ok, rounding_key=key, start=start + chunk.start)


@definition("lion_direct_")
def _lion_direct_(grad: Tensor, exp_avg: Tensor, scalars: Tensor, ok: Tensor | None) -> Tensor:
    beta1, beta2 = scalars.tolist()
    return reference.lion_direct_(grad, exp_avg, beta1=beta1, beta2=beta2, ok=ok)


@definition("sgd_direct_")
def _sgd_direct_(grad: Tensor, exp_avg: Tensor, scalars: Tensor, ok: Tensor | None, nesterov: bool) -> Tensor:
    (momentum,) = scalars.tolist()
    return reference.sgd_direct_(grad, exp_avg, momentum=momentum, nesterov=nesterov, ok=ok)


@definition("rmsprop_direct_")
def _rmsprop_direct_(grad: Tensor, exp_avg_sq: Tensor, scalars: Tensor, ok: Tensor | None) -> Tensor:
    alpha, eps = scalars.tolist()
    return reference.rmsprop_direct_(grad, exp_avg_sq, alpha=alpha, eps=eps, ok=ok)


@definition("apply_")
def _apply_(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    scalars: Tensor,
    keep: Tensor | None,
    ok: Tensor | None,
    rounding: Tensor | None,
    grad: Tensor | None,
    phi: Tensor | None,
    subtract_left: Tensor | None,
    subtract_right: Tensor | None,
    sign: bool,
) -> None:
    alpha, factor = scalars.tolist()
    key, (start, *_) = key_of(rounding)
    residual = None
    if grad is not None and phi is not None:
        residual = ResidualTerm(grad, phi, ok, sign, subtract_left, subtract_right)
    reference.apply_(
        weight,
        left,
        right,
        alpha=alpha,
        keep=factor if keep is None else keep,
        ok=ok,
        rounding_key=key,
        start=start,
        residual=residual,
    )


@definition("apply_dense_")
def _apply_dense_(
    weight: Tensor,
    direction: Tensor,
    scalars: Tensor,
    keep: Tensor | None,
    ok: Tensor | None,
    rounding: Tensor | None,
) -> None:
    alpha, number = scalars.tolist()
    key, (start, *_) = key_of(rounding)
    factor = number if keep is None else keep
    reference.apply_dense_(weight, direction, alpha=alpha, keep=factor, ok=ok, rounding_key=key, start=start)


@definition("stochastic_round_")
def _stochastic_round_(target: Tensor, value: Tensor, rounding: Tensor | None) -> None:
    key, (start, *_) = key_of(rounding)
    reference.store_(target, value, key, start)


@definition("gaussian_")
def _gaussian_(out: Tensor, key: Tensor) -> None:
    fill_gaussian_(out, unsigned_key(*key.tolist()))
