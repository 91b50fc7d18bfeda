"""From the placements of a DTensor to the shardings of a step, and what cannot be covered: refused by name, with what works instead.

`torch.distributed.tensor` is imported only where a parameter is a DTensor: that takes half a second.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.kernels.host import cpu_tensor
from lowrank_optim.sharding.param_sharding import LOCAL, MeshParamSharding, ParamSharding
from lowrank_optim.sharding.tensor_sharding import UNSHARDED, MeshSharding, TensorSharding

SUPPORTED = (
    "supported are Replicate and Shard along dimension 0 of any parameter (fully_shard, also with replicas: HSDP), along both "
    "dimensions of a matrix (tensor parallelism), and along any of a stack of matrices"
)


_PLAIN = (Tensor, torch.nn.Parameter)
"""Types that say at once that a tensor is no DTensor; an attribute that is not there takes longer."""


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; a plain tensor is returned as it is."""
    if type(tensor) in _PLAIN or not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def local_grad(param: Tensor) -> Tensor:
    """The local part of a parameter's gradient, which is laid out as the parameter first (a pending sum is summed)."""
    grad = param.grad
    assert grad is not None
    if type(grad) in _PLAIN:
        return grad
    if is_sharded(grad) and grad.placements != param.placements:  # type: ignore[attr-defined]
        with torch.no_grad():
            param.grad = grad = grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
    return local(grad)


def wait_for_host_copy(param: Tensor) -> None:
    """Wait until the gradient of a parameter that `fully_shard` keeps on the host (`CPUOffloadPolicy`) has arrived there.

    The copy is on the accelerator's current stream while hooks of parameters run, and need not have ended
    (https://github.com/pytorch/pytorch/pull/180666). A step needs no such call: backward ends with it.
    """
    if is_sharded(param) and param.device.type == "cpu" and param.device_mesh.device_type != "cpu":  # type: ignore[attr-defined]
        torch.get_device_module(param.device_mesh.device_type).current_stream().synchronize()  # type: ignore[attr-defined]


def check_owner(param: Tensor, kind: str) -> None:
    """Raise ValueError for a parameter that another framework has flattened; `kind` names it in the message."""
    flat = getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False)
    if flat or type(param).__name__ == "FlatParameter":
        raise ValueError(
            f"{kind} belongs to FullyShardedDataParallel (FSDP1), which flattens parameters, so that no matrix is left to project; "
            "use torch.distributed.fsdp.fully_shard (FSDP2), or DistributedDataParallel"
        )
    if hasattr(param, "ds_id") or hasattr(param, "ds_tensor") or hasattr(param, "_hp_mapping"):
        raise ValueError(
            f"{kind} is partitioned by DeepSpeed ZeRO, which flattens parameters, so that no matrix is left to project; use "
            "torch.distributed.fsdp.fully_shard (FSDP2), DistributedDataParallel, or DeepSpeed with zero_optimization stage 0"
        )


def dense_sharding(param: Tensor) -> TensorSharding:
    """The sharding of a parameter in its own shape."""
    if not is_sharded(param):
        return UNSHARDED
    return MeshSharding(param.device_mesh, tuple(param.placements), tuple(param.shape))  # type: ignore[attr-defined]


def check_placements(param: Tensor, kind: str, layout: str) -> None:
    """Raise ValueError for placements that the step does not cover."""
    if not is_sharded(param):
        return
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    where = f"{kind} lies on a mesh {tuple(mesh.shape)} as {tuple(placements)}; {SUPPORTED}"
    if mesh.get_coordinate() is None:
        raise ValueError(f"{kind} lies on a mesh that this process is not part of: {mesh}")
    matrix_dims = 2 if layout == "conv" or param.dim() > 3 else param.dim()
    for number, placement in enumerate(placements):
        dim, size = getattr(placement, "dim", None), mesh.size(number)
        if dim is None and not placement.is_replicate():
            raise ValueError(where)
        if dim is None or size == 1:
            continue
        folded = matrix_dims < param.dim()
        if dim >= matrix_dims or (folded and dim == 1 and param.shape[1] % size):
            raise ValueError(f"{where}; of a convolution, the second one where its size is a multiple of the processes")


def dense_param_sharding(
    param: Tensor, coded: bool, matrix: TensorSharding | None = None, folded: tuple[int, ...] | None = None
) -> ParamSharding:
    """The shards of a parameter that is trained directly.

    Args:
        coded: whether its moments are stored in row blocks.
        matrix: the sharding of the matrix view; None where it is trained in its own shape.
        folded: the shape of the moments, where they have fewer columns than the matrix.
    """
    sharding = dense_sharding(param)
    if not isinstance(sharding, MeshSharding):
        return LOCAL
    if isinstance(matrix, MeshSharding):
        if coded and matrix.splits(-1):  # blocks would span processes
            return MeshParamSharding(matrix=sharding, reduced=sharding.only(), lines=sharding, whole=True)
        moments = matrix if folded is None else matrix.moved({dim: dim for dim in range(len(folded))}, folded)
        return MeshParamSharding(matrix=matrix, reduced=moments, lines=matrix)
    if coded and sharding.splits(-1) and (param.dim() < 4 or sharding.splits(-2, -1)):  # blocks would span processes
        return MeshParamSharding(matrix=sharding, reduced=sharding.only(), lines=sharding, whole=True)
    reduced = sharding
    if coded and param.dim() > 3:  # coded as a matrix of its first dimension
        reduced = sharding.moved({0: 0}, (param.shape[0], param.shape[1:].numel()))
    return MeshParamSharding(matrix=sharding, reduced=reduced, lines=sharding)


def matrix_sharding(param: Tensor, layout: str, shape: Sequence[int]) -> TensorSharding:
    """The sharding of a parameter's matrix view, which has `shape`."""
    sharding = dense_sharding(param)
    if not isinstance(sharding, MeshSharding):
        return UNSHARDED
    last = param.dim() - 1
    dims = {dim: dim for dim in range(param.dim())}
    if layout == "transposed" and param.dim() in (2, 3):
        dims |= {last: last - 1, last - 1: last}
    return sharding.moved({dim: to for dim, to in dims.items() if to < len(shape)}, tuple(shape))


def low_rank_sharding(
    matrix: TensorSharding, reduced_shape: tuple[int, ...], contracted: tuple[int, ...], coded: bool
) -> ParamSharding:
    """The shards of a matrix in a subspace.

    Args:
        matrix: the sharding of its matrix view.
        reduced_shape: the whole shape of R.
        contracted: the dimensions of the matrix, −2 and −1, that the projection sums over; of the others, one becomes the rows of R.
            With −3, R belongs to the stack as a whole.
        coded: whether the moments are stored in row blocks.
    """
    if not isinstance(matrix, MeshSharding):
        return LOCAL
    shape, ndim = matrix.shape, len(matrix.shape)
    batch = {dim: dim for dim in range(ndim - 2)}
    rows = matrix.moved({**batch, ndim - 2: ndim - 2}, (*shape[:-1], 1))
    cols = matrix.moved({**batch, ndim - 1: ndim - 2}, (*shape[:-2], shape[-1], 1))
    if not contracted:  # whole tensors: R is the gradient
        return MeshParamSharding(matrix=matrix, rows=rows, cols=cols, reduced=matrix, lines=matrix)
    kept_whole = matrix.only() if -3 in contracted else matrix.only(-3)
    free = rows if contracted == (-1,) else cols if contracted == (-2,) else kept_whole
    lines = free.moved({dim: dim for dim in range(ndim - 1)}, reduced_shape)
    partial = tuple(matrix.groups(*contracted))
    one_row = coded and reduced_shape[-1] == 1  # coded as one row, whose blocks would span processes
    whole = one_row and (lines.splits(-2) or bool(partial))
    scatter = not whole and len(partial) == 1 and not lines.splits() and len(contracted) < 2
    reduced = lines.only(-3) if whole else lines
    if scatter:
        reduced = _scattered(matrix, lines, contracted)
    return MeshParamSharding(
        matrix=matrix, rows=rows, cols=cols, reduced=reduced, lines=lines, partial=partial, scatter=scatter, whole=whole
    )


def _scattered(matrix: MeshSharding, lines: MeshSharding, contracted: tuple[int, ...]) -> MeshSharding:
    """The sharding of R where each process of the group that the matrix is split over keeps a share of its rows."""
    (group,) = matrix.groups(*contracted)
    from torch.distributed.tensor import Shard

    placements = [
        Shard(len(lines.shape) - 2) if matrix.mesh.size(n) > 1 and matrix.mesh.get_group(n) == group else placement
        for n, placement in enumerate(lines.placements)
    ]
    return MeshSharding(lines.mesh, tuple(placements), lines.shape)


class LocalState(dict[str, Tensor]):
    """The local parts of one parameter's state; a tensor that is put in or taken out is put into the state, or taken out, too.

    Args:
        state: as it is kept.
        place: (name, local tensor) → the tensor as it is kept.
    """

    def __init__(self, state: dict[str, Tensor], place: Callable[[str, Tensor], Tensor]) -> None:
        super().__init__({name: local(tensor) for name, tensor in state.items()})
        self._state, self._place = state, place

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        if tensor is not self.get(name):
            self._state[name] = self._place(name, tensor)
        super().__setitem__(name, tensor)

    def pop(self, name: str) -> Tensor:  # type: ignore[override]
        del self._state[name]
        return super().pop(name)


def placed(tensor: Tensor, sharding: TensorSharding) -> Tensor:
    """A tensor of the state as it is kept: scalars plain, the others with the placements of `sharding`."""
    if tensor.dim() == 0 or is_sharded(tensor):
        return tensor
    if isinstance(sharding, MeshSharding) and len(sharding.shape) > tensor.dim():  # R of one column is coded as a row
        sharding = sharding.drop(-1)
    return sharding.wrap(tensor)


def as_tensor(value: Any) -> Tensor:
    """A tensor itself, wherever it lies, or a number's, on the CPU: whatever the default device is."""
    return value if isinstance(value, Tensor) else cpu_tensor(value, None)


def like(value: Any, template: Tensor, device: torch.device) -> Tensor:
    """A copy of a saved tensor, whole or sharded in any way, with the type and the placements of `template`, on `device`."""
    if not is_sharded(template):
        value = value.full_tensor() if is_sharded(value) else as_tensor(value)
        copy: Tensor = value.detach().to(dtype=template.dtype, device=device, copy=True)
        return copy
    sharding = MeshSharding(template.device_mesh, tuple(template.placements), tuple(template.shape))  # type: ignore[attr-defined]
    if not is_sharded(value):
        part = sharding.part(as_tensor(value))
    elif value.device_mesh == sharding.mesh:
        part = value.redistribute(placements=sharding.placements).to_local()
    else:
        part = sharding.part(value.full_tensor())
    return sharding.wrap(part.detach().to(dtype=template.dtype, device=device, copy=True))
