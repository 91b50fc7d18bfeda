"""The state of a parameter laid out anew: for a group whose rank, parts or bits were changed (`LowRankOptimizer.change_group`), and
for a parameter that keeps its first rows only (`LowRankOptimizer.keep_rows`).

Where the rule stays, moments go along: those of a dense parameter as they are, those of a matrix into the new subspace, if both are
bases of the same side that were computed from gradients. A smaller basis is the leading columns of the old one, a larger one is the
old one and random columns that are orthogonal to it, until its next refresh. Everything else begins afresh, from step 0.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank_optim.kernels.counter_rng import gaussian
from lowrank_optim.projectors.base import Basis, SubspaceSpec
from lowrank_optim.projectors.dense_basis import DenseBasis, TwoSidedBasis
from lowrank_optim.projectors.randomized_svd import householder
from lowrank_optim.projectors.stored_projector import basis_shardings, load, store
from lowrank_optim.quantization.coded_moments import CodedMoments
from lowrank_optim.step.param_step import ParamStep
from lowrank_optim.step.state_names import WEIGHT_ERROR


def carry_over(old: ParamStep, new: ParamStep) -> None:
    """Put into the fresh state of `new` what it can keep of `old`, in place."""
    before, after = old.plan, new.plan
    for name in ("master", *WEIGHT_ERROR):  # are of the weights, however they are trained
        if name in old.state and name in new.state:
            new.state[name].copy_(old.state[name])
    if type(before.rule) is not type(after.rule) or (before.space is None) != (after.space is None):
        return
    matrices = [(plan.layout, plan.space and plan.space.shape) for plan in (before, after)]
    same_matrix = matrices[0] == matrices[1]
    if _same_kind(old.state, new.state) and same_matrix and before.space == after.space:
        for name, tensor in new.state.items():
            tensor.copy_(old.state[name])
        return
    if after.unit:
        return
    if after.space is None:
        moments = {name: old.moments[name] for name in _moment_names(new) if name in old.moments}
    else:
        assert before.space is not None
        stored = before.projector.stores_basis and after.projector.stores_basis
        if not stored or before.space.side != after.space.side or not same_matrix:
            return
        moments = _into_new_subspace(old, new, before.space, after.space)
    if any(moments[name].shape != new.moments[name].shape for name in moments):
        return
    _keep_counters(old.state, new.state)
    if "col_scale" in old.state and "col_scale" in new.state:
        width = min(old.state["col_scale"].shape[-1], new.state["col_scale"].shape[-1])
        new.state["col_scale"][..., :width] = old.state["col_scale"][..., :width]
    for name, tensor in moments.items():
        new.moments[name].copy_(tensor)
    if isinstance(new.moments, CodedMoments):
        new.moments.close(int(new.state["step"]))


def _same_kind(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> bool:
    """Whether two states have tensors of the same names, shapes and types."""
    return old.keys() == new.keys() and all((t.shape, t.dtype) == (old[n].shape, old[n].dtype) for n, t in new.items())


def _moment_names(step: ParamStep) -> list[str]:
    """The tensors of the rule."""
    shape = step.plan.gradient_shape(step.state)
    return list(step.plan.rule.init(shape, step.group, torch.float32, torch.device("meta")))


def _keep_counters(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
    """Counters and the residual's tensors, where both have them."""
    for name in ("step", "last_refresh", "gap", "overlaps", "limiter_norm", "complement_power", "error"):
        if name in old and name in new and old[name].shape == new[name].shape:
            new[name].copy_(old[name])


def _into_new_subspace(old: ParamStep, new: ParamStep, before: SubspaceSpec, after: SubspaceSpec) -> dict[str, Tensor]:
    """Bases of another rank into the new state, and the moments in its coordinates."""
    width = max(before.rank, after.rank)
    key = new.key(int(old.state["step"]))
    bases = load(old.state, before)
    resized = {name: _resized(basis, after, name, key) for name, basis in bases.items()}
    for name, tensor in store(resized, after).items():
        new.state[name].copy_(tensor)
    # Columns of zeros make both as wide as the wider one; their part of the moments is cut off again.
    wide_old = _basis({name: _padded(basis, width) for name, basis in bases.items()}, after)
    wide_new = _basis({name: _padded(basis, width) for name, basis in resized.items()}, after)
    full = before.side == "full"
    kept = [name for name in _moment_names(new) if name in old.moments]
    moments = {name: _padded(old.moments[name], width, rows=full) for name in kept}
    steps = float(old.state["step"])
    old.plan.rule.transport(
        moments, lambda moment, power: wide_new.transport(moment, wide_old, power), old.group, steps
    )
    rows = slice(after.rank) if full else slice(None)
    return {name: moment[..., rows, : after.rank] for name, moment in moments.items()}


def _resized(basis: Tensor, space: SubspaceSpec, name: str, key: int) -> Tensor:
    """The leading columns, or all of them and random ones orthogonal to them."""
    missing = space.rank - basis.shape[-1]
    if missing <= 0:
        return basis[..., : space.rank].clone()
    sharding = basis_shardings(space)[name]
    size = space.cols if name == "basis_right" or space.side == "right" else space.rows
    sketch = sharding.part(gaussian(key, (*space.batch, size, missing), basis.device, basis.dtype), -2)
    return torch.cat([basis, householder(sketch - basis @ sharding.sum(basis.mT @ sketch, -2), sharding)], -1)


def _padded(tensor: Tensor, width: int, rows: bool = False) -> Tensor:
    """A copy with zeros up to `width` columns, and rows."""
    below = width - tensor.shape[-2] if rows else 0
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1], 0, below)).clone()


def _basis(bases: Mapping[str, Tensor], space: SubspaceSpec) -> Basis:
    if space.side == "full":
        return TwoSidedBasis(bases["basis"], bases["basis_right"], sharding=space.sharding)
    return DenseBasis(bases["basis"], space.side, sharding=space.sharding)


# --------------------------------------------------------------------------------------------------------- parameters with fewer rows


def replace_data(param: Tensor, data: Tensor) -> None:
    """Give a parameter other numbers, of another shape, and no gradient. It stays the same object, with its hooks.

    torch remembers the shape for gradients of a parameter as long as any graph lives that it is in, be it of the last loss, and
    forgets it only where `data` comes in another type: hence the detour.
    """
    param.grad = None
    param.data = data.new_empty(0, dtype=torch.float32 if data.dtype == torch.float16 else torch.float16)
    param.data = data


def keep_rows_(param: Tensor, rows: int) -> None:
    """Keep the first rows of a parameter and of its gradient; what the others took is freed."""
    grad = param.grad
    replace_data(param, param.detach()[:rows].clone())
    param.grad = None if grad is None else grad[:rows].clone()


def opened_rows(step: ParamStep, rows: int) -> dict[str, Tensor]:
    """The first rows of a dense parameter's moments, decoded, before the parameter changes."""
    return {name: step.moments[name][:rows].clone() for name in _moment_names(step) if name in step.moments}


def fill_rows(state: Mapping[str, Tensor], moments: Mapping[str, Tensor], new: ParamStep) -> None:
    """Put into the fresh state of a dense parameter with fewer rows what `state`, that of more rows, says of them, in place.

    Every tensor is cut to its first rows, or kept where it has none of its own for each row; codes stay the same codes. Where small
    tensors are stored in another form, `moments` have the numbers.
    """
    for name, tensor in new.state.items():
        old = state.get(name)
        if old is None or old.dtype != tensor.dtype or old.shape[1:] != tensor.shape[1:] or old.dim() != tensor.dim():
            continue
        tensor.copy_(old if old.shape == tensor.shape else old[: tensor.shape[0]])
    coded_otherwise = [name for name in moments if state[name].dtype != new.state[name].dtype]
    for name in coded_otherwise:
        new.moments[name].copy_(moments[name])
    if isinstance(new.moments, CodedMoments):
        new.moments.close(int(new.state["step"]))
