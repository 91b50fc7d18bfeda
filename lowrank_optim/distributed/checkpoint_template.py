"""Loading a sharded checkpoint whose optimizer state has other tensors than a fresh optimizer.

`torch.distributed.checkpoint.load` fills the tensors that it is given. Where methods take turns (FRUGAL with blocks, LISA, BAdam)
only tensors awake at the time have state, and those of a fresh optimizer are others than those of the checkpoint.
"""

import os
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.sharding.dtensor import is_sharded


def match_checkpoint(state_dict: MutableMapping[str, Any], checkpoint_id: str | os.PathLike[str]) -> None:
    """Make the optimizer states in a template of `torch.distributed.checkpoint.load` those of the checkpoint, in place.

        template = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        lowrank_optim.distributed.match_checkpoint(template, path)
        torch.distributed.checkpoint.load(template, checkpoint_id=path)
        set_model_state_dict(model, template["model"])
        optimizer.load_state_dict(template["optimizer"])

    Tensors that have another size there get it, with their placements; missing ones come whole, to every process; those that are not
    in the checkpoint go. Nothing else changes, and nothing is read but the checkpoint's metadata.

    Raises:
        ValueError: there is no such checkpoint; or the optimizer's part is flattened (`flatten_optimizer_state_dict`).
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    try:
        metadata = FileSystemReader(checkpoint_id).read_metadata()
    except FileNotFoundError as error:
        raise ValueError(f"{checkpoint_id} is no checkpoint of torch.distributed.checkpoint: {error}") from None
    saved = {tuple(path): key for key, path in metadata.planner_data.items()}
    for path, part in _optimizers(state_dict):
        kept: dict[str, dict[str, Any]] = {}
        for at, key in saved.items():
            if at[: len(path)] != path or len(at) != len(path) + 2:
                continue
            param, name = at[len(path) :]
            entry, own = metadata.state_dict_metadata[key], part.get(param, {}).get(name)
            kept.setdefault(param, {})[name] = _like(entry, own) if hasattr(entry, "size") else own
        part.clear()
        part.update(kept)


def _optimizers(
    tree: MutableMapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """The `state` of every optimizer state dict in the tree, with the path to it."""
    if "param_groups" in tree and isinstance(tree.get("state"), dict):
        yield (*path, "state"), tree["state"]
        return
    flat = [name for name in tree if isinstance(name, str) and name.startswith("param_groups.")]
    if flat:
        raise ValueError(
            f"the optimizer's part is flattened ({flat[0]}): take get_optimizer_state_dict without "
            "flatten_optimizer_state_dict, here and where the checkpoint is saved"
        )
    for name, branch in tree.items():
        if isinstance(branch, dict):
            yield from _optimizers(branch, (*path, name))


def _like(entry: Any, own: Tensor | None) -> Tensor:
    """The tensor itself where it has the saved size and type, else an empty one that has."""
    size, dtype = entry.size, entry.properties.dtype
    if own is not None and own.shape == size and own.dtype == dtype:
        return own
    if own is not None and is_sharded(own) and own.dim() == len(size):
        from torch.distributed.tensor import empty

        sharded: Tensor = empty(*size, dtype=dtype, device_mesh=own.device_mesh, placements=own.placements)  # type: ignore[attr-defined]
        return sharded
    return torch.empty(size, dtype=dtype, device=None if own is None else own.device)
