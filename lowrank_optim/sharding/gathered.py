"""Weights that `fully_shard` (FSDP2) has gathered: plain tensors for a while, which nothing should be made of."""

import sys
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from lowrank_optim.sharding.dtensor import is_sharded


def reshard(model: nn.Module) -> set[int]:
    """Have `fully_shard` put the shards back where it has left weights gathered, so that they are DTensors, which callers know.

    After a forward pass the outermost module's weights stay gathered until backward has run: views of storage that is freed later,
    so that a layer made of them is not sharded, and what is written to them is lost. The next forward pass gathers them again.

    Returns:
        The `id` of plain parameters that a module around this model has sharded: they may be gathered, and are not to be changed.
        Parameters that a `fully_shard` within the model ignores are not among them.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # where it was not imported, nothing is sharded
    if fsdp is None or not isinstance(model, nn.Module):
        return set()
    within: set[int] = set()
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()
        if isinstance(
            module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
        ):  # the latter is refused by `check_owner`
            within |= set(map(id, module.modules()))
    return {
        id(param)
        for module in model.modules()
        if getattr(module, "_is_fsdp_managed_module", False) and id(module) not in within
        for param in module.parameters(recurse=False)
        if not is_sharded(param)
    }


def check_not_gathered(name: str, param: Tensor, gathered: Collection[int]) -> None:
    """Raise ValueError for a parameter that a `fully_shard` around the model has gathered."""
    if id(param) in gathered:
        raise ValueError(
            f"{name} is gathered for a while by fully_shard, which was called on a module around this one; call this before "
            "fully_shard, or with that module"
        )
