"""Where the parts of a tensor lie: sums, gathers and slices over the processes that share it.

A `TensorSharding` describes one tensor of the step (the matrix view of a weight, R, a basis). The class itself is the trivial one:
this process holds the tensor whole, and every operation hands on what it was given. `MeshSharding` is the same for the local part of
a DTensor. Code on plain tensors that asks its sharding wherever it sums over a dimension is right for both:

    contracting a dimension that is not split is local; contracting one that is split leaves a sum over the processes that split it
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement


class TensorSharding:
    """A tensor that this process holds whole. Dimensions are counted from the end: −2 rows, −1 columns."""

    start: int = 0
    """Row-major index of the first local element in the whole tensor: where its random numbers begin."""

    def local_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the part held here, of a tensor that is split like this one (its other dimensions may differ)."""
        return shape

    def splits(self, *dims: int) -> bool:
        """Whether one of these dimensions (any, if none is given) is split."""
        return False

    def sum(self, tensor: Tensor, *dims: int) -> Tensor:
        """`tensor` summed over the processes that split these dimensions (all, if none is given), in place where possible."""
        return tensor

    def norm(self, norms: Tensor, *dims: int) -> Tensor:
        """√Σ‖·‖² over the processes that split these dimensions, from the norms of the local parts."""
        return norms

    def mean(self, tensor: Tensor, dim: int) -> Tensor:
        """The mean of the whole tensor over `dim`."""
        return tensor.mean(dim)

    def numel(self, tensor: Tensor) -> int:
        """The elements of the whole tensor of which `tensor` is the local part."""
        return tensor.numel()

    def whole_shape(self, tensor: Tensor) -> tuple[int, ...]:
        """The shape of the whole tensor of which `tensor` is the local part."""
        return tuple(tensor.shape)

    def offset(self, dim: int) -> int:
        """Index of the first local element along a dimension."""
        return 0

    def groups(self, *dims: int) -> "list[ProcessGroup]":
        """The process groups that split these dimensions (any, if none is given)."""
        return []

    def gather(self, tensor: Tensor, *dims: int) -> Tensor:
        """The tensor with these dimensions whole."""
        return tensor

    def exchange(self, tensor: Tensor, held: int, wanted: int) -> Tensor:
        """Parts along dimension `wanted`, from parts along `held`, which become whole: an all-to-all of this tensor's elements."""
        return tensor

    def part(self, tensor: Tensor, *dims: int) -> Tensor:
        """What is held here of a tensor that is whole in these dimensions (all, if none is given)."""
        return tensor

    def agree(self, tensor: Tensor) -> Tensor:
        """The same bits on all processes that hold the same part."""
        return tensor

    def wrap(self, tensor: Tensor) -> Tensor:
        """The local part as it stands in the optimizer's state: itself, or a DTensor."""
        return tensor

    def drop(self, dim: int) -> "TensorSharding":
        """The sharding of a tensor without dimension `dim`."""
        return self

    def only(self, *dims: int) -> "TensorSharding":
        """The sharding of a tensor that is split along these dimensions only, and held whole in all others."""
        return self


UNSHARDED = TensorSharding()


@dataclass(frozen=True)
class MeshSharding(TensorSharding):
    """The local part of a tensor of `shape` that lies on `mesh` as `placements` (of `torch.distributed.tensor`) say."""

    mesh: "DeviceMesh"
    placements: "tuple[Placement, ...]"
    shape: tuple[int, ...]

    @cached_property
    def _split(self) -> dict[int, list[int]]:
        """The mesh dimensions of more than one process, by the dimension of the tensor (from the end) that they split."""
        split: dict[int, list[int]] = {}
        for number, placement in enumerate(self.placements):
            dim = getattr(placement, "dim", None)
            if dim is not None and self.mesh.size(number) > 1:
                split.setdefault(dim - len(self.shape), []).append(number)
        return split

    @cached_property
    def _part(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape of the local part, and its offset in the whole tensor."""
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        shape, offset = compute_local_shape_and_global_offset(self.shape, self.mesh, self.placements)
        return tuple(shape), tuple(offset)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Index of the first local element along every dimension."""
        return self._part[1]

    def offset(self, dim: int) -> int:
        return self.offsets[dim]

    @cached_property
    def start(self) -> int:  # type: ignore[override]
        """Exact where only the leading dimension is split; else parts of other processes begin elsewhere, and none overlap."""
        shape, offset = self._part
        return sum(
            math.prod(shape[:dim]) * offset[dim] * math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))
        )

    def groups(self, *dims: int) -> "list[ProcessGroup]":
        numbers = [n for dim, found in self._split.items() if not dims or dim in dims for n in found]
        return [self.mesh.get_group(number) for number in sorted(numbers)]

    def splits(self, *dims: int) -> bool:
        return any(not dims or dim in dims for dim in self._split)

    def local_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        own = self._part[0]
        return tuple(own[d] if d in self._split else size for d, size in zip(_from_end(shape), shape, strict=True))

    def whole_shape(self, tensor: Tensor) -> tuple[int, ...]:
        return tuple(
            self.shape[d] if d in self._split else size
            for d, size in zip(_from_end(tensor.shape), tensor.shape, strict=True)
        )

    def sum(self, tensor: Tensor, *dims: int) -> Tensor:
        groups = self.groups(*dims)
        if not groups:
            return tensor
        tensor = tensor.contiguous()
        for group in groups:
            torch.distributed.all_reduce(tensor, group=group)
        return tensor

    def norm(self, norms: Tensor, *dims: int) -> Tensor:
        if not self.splits(*dims):
            return norms
        total: Tensor = self.sum(norms.double().square(), *dims)  # float64: squares neither overflow nor vanish
        return total.sqrt().to(norms.dtype)

    def mean(self, tensor: Tensor, dim: int) -> Tensor:
        if dim not in self._split:
            return tensor.mean(dim)
        return self.sum(tensor.sum(dim), dim) / self.shape[dim]

    def numel(self, tensor: Tensor) -> int:
        return math.prod(self.whole_shape(tensor))

    def gather(self, tensor: Tensor, *dims: int) -> Tensor:
        if not self.splits(*dims):
            return tensor
        from torch.distributed.tensor import Replicate

        gone = {number for dim, found in self._split.items() if dim in dims for number in found}
        placements = [Replicate() if n in gone else placement for n, placement in enumerate(self.placements)]
        whole: Tensor = self.wrap(tensor.contiguous()).redistribute(placements=placements).to_local()  # type: ignore[attr-defined]
        return whole

    def exchange(self, tensor: Tensor, held: int, wanted: int) -> Tensor:
        """Of one process group that splits one of the two dimensions; both are cut as `Shard` cuts them."""
        (group,) = self.groups(held) or self.groups(wanted)
        have, get = (_chunks(self.shape[dim], group.size()) for dim in (held, wanted))
        own = get[group.rank()]
        sent = torch.cat([piece.flatten() for piece in tensor.split(get, wanted)])
        rest = math.prod(
            size for dim, size in zip(_from_end(tensor.shape), tensor.shape, strict=True) if dim not in (held, wanted)
        )
        sizes = [rest * length * own for length in have]
        came = sent.new_empty(sum(sizes))
        torch.distributed.all_to_all_single(
            came, sent, sizes, [rest * tensor.shape[held] * n for n in get], group=group
        )
        shapes = [list(tensor.shape) for _ in have]
        for shape, length in zip(shapes, have, strict=True):
            shape[held], shape[wanted] = length, own
        return torch.cat([piece.view(shape) for piece, shape in zip(came.split(sizes), shapes, strict=True)], held)

    def part(self, tensor: Tensor, *dims: int) -> Tensor:
        shape, offset = self._part
        own = tensor
        for dim in self._split:
            if not dims or dim in dims:
                own = own.narrow(dim, offset[dim], shape[dim])
        # A slice would keep the whole tensor alive.
        return tensor if own is tensor else own.clone(memory_format=torch.contiguous_format)

    def agree(self, tensor: Tensor) -> Tensor:
        split = {number for found in self._split.values() for number in found}
        for number in range(self.mesh.ndim):
            if number not in split and self.mesh.size(number) > 1:
                tensor = tensor.contiguous()
                torch.distributed.broadcast(tensor, group=self.mesh.get_group(number), group_src=0)
        return tensor

    def wrap(self, tensor: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

        shape = torch.Size(self.whole_shape(tensor))
        strides = _strides(shape)
        if tensor.device.type in (self.mesh.device_type, "meta"):
            return DTensor.from_local(tensor, self.mesh, self.placements, run_check=False, shape=shape, stride=strides)
        # Offloaded to the host: from_local would move the tensor to the mesh's devices.
        spec = DTensorSpec(self.mesh, self.placements, TensorMeta(shape, strides, tensor.dtype))
        return DTensor(tensor, spec, requires_grad=False)

    def drop(self, dim: int) -> "MeshSharding":
        gone = dim + len(self.shape)
        moved = {d: (d if d < gone else d - 1) for d in range(len(self.shape)) if d != gone}
        return self.moved(moved, (*self.shape[:gone], *self.shape[gone + 1 :]))

    def only(self, *dims: int) -> "MeshSharding":
        kept = [dim + len(self.shape) for dim in dims if dim + len(self.shape) >= 0]
        return self.moved({dim: dim for dim in kept}, self.shape)

    def moved(self, dims: Mapping[int, int], shape: tuple[int, ...]) -> "MeshSharding":
        """The sharding of a tensor of `shape` whose dimension dims[d] is split as d is here; its others are whole."""
        from torch.distributed.tensor import Replicate

        def move(placement: "Placement") -> "Placement":
            dim: int | None = getattr(placement, "dim", None)
            return placement_along(placement, dims[dim]) if dim is not None and dim in dims else Replicate()

        return MeshSharding(self.mesh, tuple(move(placement) for placement in self.placements), shape)


def placement_along(placement: Any, dim: int) -> Any:
    """The placement with another dimension."""
    from torch.distributed.tensor import Shard

    factor = getattr(placement, "split_factor", None)
    return Shard(dim) if factor is None else type(placement)(dim, split_factor=factor)


def _chunks(length: int, parts: int) -> list[int]:
    """How `Shard` cuts a dimension: equal chunks, of which the last may be shorter or empty."""
    chunk = -(-length // parts)
    return [min(max(length - number * chunk, 0), chunk) for number in range(parts)]


def _from_end(shape: tuple[int, ...]) -> range:
    return range(-len(shape), 0)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
