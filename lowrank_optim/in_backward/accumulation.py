"""What is kept of a parameter's gradients between the micro-batches of one step: plain tensors in its optimizer state.

A matrix whose update needs only R keeps ΣRᵢ; the sum is exact while the basis stands. Everything else keeps ΣGᵢ. The norm of a
gradient of which only ΣRᵢ is kept comes from a sketch. With E = G − lift R, the part outside the subspace, and an orthonormal basis,

    ‖ΣGᵢ‖² = ‖ΣRᵢ‖² + Σ‖Eᵢ‖² + Σ_{i≠j} ⟨Eᵢ, Eⱼ⟩        ‖Eᵢ‖² = ‖Gᵢ‖² − ‖Rᵢ‖²

where only the last sum is not known exactly: with s random vectors Ω of signs/√s, made orthogonal to the basis so that EΩ = GΩ, its
unbiased estimate is ‖ΣEᵢΩ‖² − Σ‖EᵢΩ‖².
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.kernels.counter_rng import random_bits
from lowrank_optim.projectors import Basis, StepParams, SubspaceSpec
from lowrank_optim.sharding.dtensor import is_sharded
from lowrank_optim.sharding.param_sharding import LOCAL
from lowrank_optim.step.param_plan import ParamPlan

PROBES = 8
"""s, the random vectors of a sketch."""


def keeps_whole(plan: ParamPlan) -> bool:
    """Whether a parameter keeps ΣG, in every step; the others keep ΣR in steps without a refresh."""
    # The norm of a sum of R's takes a sketch of whole lines.
    return plan.space is None or plan.residual.uses_gradient or plan.sharding is not LOCAL


def kept_bytes(plan: ParamPlan, gradient: int, state: Mapping[str, Tensor] | None) -> int:
    """Bytes that a parameter keeps between the micro-batches of a step without a refresh; its gradient has `gradient` bytes."""
    if plan.space is None or keeps_whole(plan):
        return gradient + 8
    numbers = math.prod(plan.whole_moment_shape(state)) + math.prod(sketch_shape(plan.space)) + 1
    return numbers * plan.space.dtype.itemsize + 8


def count(state: dict[str, Tensor]) -> int:
    """Count one micro-batch more; returns how many there are now."""
    if "micro_batches" not in state:
        state["micro_batches"] = kernels.cpu_tensor(0, torch.int64)
    state["micro_batches"] += 1
    return int(state["micro_batches"])


def add(state: dict[str, Tensor], name: str, value: Tensor) -> None:
    """state[name] ← state[name] + value, in place; the first value is kept as it is."""
    if name in state:
        state[name].add_(value)
    else:
        state[name] = value


def add_projected(
    state: dict[str, Tensor], grad: Tensor, reduced: Tensor, basis: Basis, space: SubspaceSpec, key: int
) -> None:
    """Add one micro-batch of a matrix: R, and what the norm of the whole gradient needs.

    Args:
        state: `projected_sum` ΣR, `sketch_sum` ΣEΩ and `squares_sum` Σ(‖E‖² − ‖EΩ‖²); made or modified in place.
        grad: G, the matrix view.
        reduced: R, which is kept where it is the first.
        basis, space: the subspace of R.
        key: of the random vectors, the same for all micro-batches of a step.
    """
    sketch = kernels.project(grad, *_probe(basis, space, key, grad.device))
    squares = kernels.norm(grad).square() - sketch.square().sum()
    if _norms_are_inside(basis):
        squares -= reduced.square().sum()
    add(state, "projected_sum", reduced)
    add(state, "sketch_sum", sketch)
    add(state, "squares_sum", squares)


def accumulated_norm(state: Mapping[str, Tensor], basis: Basis) -> Tensor:
    """‖ΣG‖ of a matrix that keeps ΣR, 0-d."""
    inside = state["projected_sum"].square().sum() if _norms_are_inside(basis) else 0.0
    outside = state["squares_sum"] + state["sketch_sum"].square().sum()
    norm: Tensor = (inside + outside).clamp_min(0.0).sqrt()
    return norm


def template(param: Tensor, saved: Mapping[str, Tensor], plan: ParamPlan) -> dict[str, Tensor]:
    """Types and shapes of the accumulators in a checkpoint, as tensors without memory."""
    meta, space = torch.device("meta"), plan.space
    like = {"micro_batches": torch.empty((), dtype=torch.int64, device=meta)}
    if "projected_sum" not in saved or space is None:
        return like | {"grad_sum": param.detach() if is_sharded(param) else torch.empty_like(param, device=meta)}
    shapes = {"projected_sum": plan.whole_moment_shape(saved), "sketch_sum": sketch_shape(space), "squares_sum": ()}
    return like | {name: torch.empty(shape, dtype=space.dtype, device=meta) for name, shape in shapes.items()}


def sketch_shape(space: SubspaceSpec) -> tuple[int, ...]:
    """Shape of EΩ."""
    return (*space.batch, space.cols if space.side == "left" else space.rows, PROBES)


def _probe(basis: Basis, space: SubspaceSpec, key: int, device: torch.device) -> tuple[Tensor, str]:
    """Ω, (…, d, s) on the projected side d, and that side; outside of the subspace where its norms can be taken exactly."""
    side = "left" if space.side == "left" else "right"
    shape = (PROBES, space.cols) if side == "right" else (space.rows, PROBES)
    signs = random_bits(key, torch.arange(shape[0] * shape[1], device=device)) & 1
    probe = signs.to(space.dtype).mul_(2.0).sub_(1.0).mul_(PROBES**-0.5).view(shape)
    probe = probe.expand(*space.batch, *shape).clone()
    if _norms_are_inside(basis):
        basis.apply_(probe, basis.project(probe), StepParams(1.0, 1.0))  # Ω ← Ω − B(BᵀΩ)
    return (probe.mT if side == "right" else probe), side


def _norms_are_inside(basis: Basis) -> bool:
    """Whether ‖G‖² = ‖R‖² + ‖G − lift R‖², and lines of a matrix can be made orthogonal to the subspace."""
    return getattr(basis, "splits_rows", False)
