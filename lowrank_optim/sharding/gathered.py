"""Weights that `fully_shard` (FSDP2) has gathered: plain tensors for a while, which nothing should be made of.

After a forward pass the outermost module's weights stay gathered until backward has run: views of storage that is freed later, so
that a layer or an optimizer made of them is not of this model, and what is written to them is lost. The next forward pass gathers
them again.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lowrank_optim.sharding.dtensor import check_owner, is_sharded


@dataclass(frozen=True)
class Gathered:
    """Parameters that are not to be changed, nor given to an optimizer, by their `id`.

    within: those that a `fully_shard` within the model has gathered, or, with `reshard_after_forward` a number, has put on a smaller
        mesh.
    around: plain ones of layers that a `fully_shard` around the model has taken: gathered, or ignored by it, which nothing here tells
        apart. Not those that it has put on a smaller mesh: they are DTensors, as their shards are.
    """

    within: frozenset[int]
    around: frozenset[int]

    def stands_for_shards(self, param: Tensor) -> bool:
        """Whether the model has shards of this parameter, whatever it is now."""
        return is_sharded(param) or id(param) in self.within

    def check(self, name: str, param: Tensor) -> None:
        """Raise ValueError, with this name, for a parameter that is one of them."""
        if id(param) in self.within:
            raise ValueError(
                f"{name} is sharded, and gathered by fully_shard since the last forward pass; call model.reshard() on all processes "
                "(of every module that fully_shard was called on and that keeps its weights after forward), then this again"
            )
        if id(param) in self.around:
            check_owner(param, name)  # FSDP1 marks modules alike
            raise ValueError(
                f"{name} is a plain tensor in a layer that fully_shard has sharded from outside: gathered for a while, or ignored; "
                "call this before fully_shard, or with the module that it was called on"
            )


def find_gathered(model: nn.Module) -> Gathered:
    """What `fully_shard` has gathered of a model. Nothing changes, so that one process may call it alone."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # where it was not imported, nothing is sharded
    if fsdp is None or not isinstance(model, nn.Module):
        return Gathered(frozenset(), frozenset())
    inside: set[int] = set()
    within: set[int] = set()
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            within |= set(map(id, _stand_ins(module)))
        if isinstance(module, fsdp.FSDPModule | fsdp.FullyShardedDataParallel):
            inside |= set(map(id, module.modules()))
    around = {
        id(param)
        for module in model.modules()
        if getattr(module, "_is_fsdp_managed_module", False) and id(module) not in inside
        for param in module.parameters(recurse=False)
        if not is_sharded(param)
    }
    return Gathered(frozenset(within), frozenset(around))


def put_shards_back(model: nn.Module) -> Gathered:
    """Have the shards of gathered weights put back, so that they can be written to; and what is gathered from around the model.

    For functions that all processes call: one that has done so alone gathers in the next forward pass, where the others do not.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp is not None and isinstance(model, nn.Module) else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()
    return find_gathered(model)


def _stand_ins(module: Any) -> Iterator[Tensor]:
    """The tensors that `fully_shard` registers in the place of the shards of a module, now or at another time."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # older versions of torch have at most one
        groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
    for group in groups:
        for each in group.fsdp_params:
            for name in ("_unsharded_param", "_sharded_post_forward_param"):
                tensor = getattr(each, name, None)
                if isinstance(tensor, Tensor):
                    yield tensor
