"""Memory counted from the life of tensors, not estimated: works on every device, to the byte."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class Gradients:
    """The largest number of bytes in gradients of a model's parameters that were alive at once, from now on.

    Looks at each gradient right when it is accumulated, so it must be made before anything else registers hooks.
    """

    def __init__(self, model: nn.Module) -> None:
        self._alive: dict[int, int] = {}
        self.peak = 0
        for param in model.parameters():
            frozen = not param.requires_grad
            param.requires_grad_(True).register_post_accumulate_grad_hook(self._look)
            param.requires_grad_(not frozen)

    def _look(self, param: Tensor) -> None:
        assert param.grad is not None
        storage = param.grad.untyped_storage()
        if storage._cdata not in self._alive:
            self._alive[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self._alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self._alive.values()))


class PeakMemory(TorchDispatchMode):
    """The largest number of bytes of tensors that were made within the block and alive at once, and how many are alive now."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}
        self.now = self.peak = 0

    def _free(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)

    def _add(self, tensor: object) -> None:
        if not isinstance(tensor, Tensor) or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        if storage._cdata in self._alive or storage.nbytes() == 0:
            return
        self._alive[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, storage._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {
            t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in known:
                self._add(leaf)
        return out
