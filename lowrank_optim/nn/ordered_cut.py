"""Ordered layers made smaller: which components are kept, and the cut through parameters and optimizer state."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank_optim.kernels import cpu_tensor
from lowrank_optim.nn.ordered_penalty import OrderedLayer
from lowrank_optim.sharding.dtensor import is_sharded
from lowrank_optim.step.relayout import keep_rows_


def kept_rank(layer: OrderedLayer, threshold: float) -> int:
    """The rank that a layer is left with."""
    if any(map(is_sharded, layer.factors)):
        raise ValueError(
            f"{layer.path} is sharded (DTensor); shrink the unsharded model, from a full state dict, then shard it"
        )
    importance = layer.modules[0].importance()
    if importance.is_meta:
        raise ValueError(f"{layer.path} is on the meta device and has no numbers")
    if not bool(torch.isfinite(importance).all()):
        raise ValueError(f"{layer.path} is not finite; its components have no importance")
    # Compared in float64, since the threshold would be rounded otherwise.
    return int((importance.double() >= cpu_tensor(threshold, torch.float64).to(importance.device)).sum())


def check_held(layers: list[OrderedLayer], optimizer: torch.optim.Optimizer | None) -> None:
    """Raise ValueError for an optimizer without the factors that are trained."""
    if optimizer is None:
        return
    if not isinstance(getattr(optimizer, "param_groups", None), list):
        raise ValueError(f"optimizer is {optimizer!r}; it must be the optimizer that trains the factors, or None")
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    missing = [each.path for each in layers if any(p.requires_grad and id(p) not in held for p in each.factors)]
    if missing:
        raise ValueError(
            f"the {type(optimizer).__name__} does not hold the factors of {', '.join(missing[:8])}; give the optimizer that trains "
            "them, built after ordered_"
        )


def keep_components_(rows: Mapping[Tensor, int], optimizer: torch.optim.Optimizer | None) -> None:
    """Keep the first rows of parameters, and of the state that an optimizer has of them."""
    held = set() if optimizer is None else {p for group in optimizer.param_groups for p in group["params"]}
    own = {param: count for param, count in rows.items() if param in held}
    if optimizer is not None and hasattr(optimizer, "keep_rows"):
        optimizer.keep_rows(own)
    elif optimizer is not None:
        _cut_state(own, optimizer)
    for param, count in rows.items():
        if param.shape[0] != count:
            keep_rows_(param, count)


def _cut_state(rows: Mapping[Tensor, int], optimizer: torch.optim.Optimizer) -> None:
    """Keep the first rows of state tensors of the parameters' shapes; numbers stay, anything else raises ValueError."""
    kept: list[tuple[dict[str, Tensor], str, Tensor]] = []
    for param, count in rows.items():
        state = optimizer.state.get(param, {})
        for name, value in state.items():
            if not isinstance(value, Tensor) or not value.dim():
                continue
            if value.shape != param.shape:
                raise ValueError(
                    f"the state {name!r} of {type(optimizer).__name__} is {tuple(value.shape)} for a factor {tuple(param.shape)} and "
                    "cannot be cut; shrink without optimizer, and build a new one"
                )
            kept.append((state, name, value[:count].clone()))
    for state, name, value in kept:
        state[name] = value
