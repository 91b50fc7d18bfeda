"""The problem that parts are tried on: a few tensors of different shapes, drawn towards targets of low rank."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lowrank_optim.groups.parts import Part
from lowrank_optim.optimizers.base import LowRankOptimizer
from lowrank_optim.projectors import SVD, Projector
from lowrank_optim.residuals import Residual
from lowrank_optim.rules import Adam, JointRule, Rule

RANK = 8

MATRICES: dict[str, tuple[int, ...]] = {
    "tall": (520, 12),  # R has so many elements that its moments can be coded
    "wide": (12, 520),
    "stack": (2, 20, 28),
    "square": (24, 24),
}

DENSE: dict[str, tuple[int, ...]] = {"embedding": (70, 66), "vector": (33,)}

PAIRS: tuple[tuple[int, ...], ...] = ((RANK, 20), (24, RANK))


@lru_cache(maxsize=256)
def _drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, device="cpu")
    for dim in range(-min(len(shape), 2), 0):
        size = torch.linspace(0.5, 1.5, shape[dim], device="cpu")
        drawn = drawn * (size.unsqueeze(-1) if dim == -2 else size)
    return drawn


def numbers(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers, always the same; rows and columns differ in size."""
    return _drawn(shape, seed).to(dtype, copy=True)


def target(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """What a tensor is drawn to: of rank 3, where it is a matrix."""
    if len(shape) < 2:
        return numbers(shape, seed, dtype)
    left, right = numbers((*shape[:-1], 3), seed), numbers((*shape[:-2], 3, shape[-1]), seed + 50)
    return (left @ right).to(dtype)


def kind_of(part: Part) -> str:
    """The argument of the constructor that takes this part."""
    kinds = {"rule": Rule, "projector": Projector, "residual": Residual}
    for kind, base in kinds.items():
        if isinstance(part, base):
            return kind
    raise TypeError(f"a check takes a Rule, a Projector or a Residual, got {type(part).__name__}")


def size_of(part: Part) -> dict[str, Any]:
    """The size of the subspace: a rank, or a density for projectors that have no ranks."""
    if isinstance(part, Projector):
        try:
            part.space((24, 24), RANK, "std", torch.float32)
        except ValueError:
            return {"density": 0.5}
    return {"rank": RANK}


class Run:
    """Tensors and the optimizer that trains them with a copy of a part, so that nothing which the part keeps is shared.

    Args:
        part: the rule, projector or residual.
        options: of the optimizer.
        dtype: of the parameters.
        mesh: where the parameters are sharded.
    """

    def __init__(
        self,
        part: Part,
        options: Mapping[str, Any] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        mesh: Any = None,
    ) -> None:
        joint = part.arity if isinstance(part, JointRule) else 0
        matrices = {} if joint else MATRICES
        dense = {f"{n}": PAIRS[n % 2] for n in range(2 * joint)} if joint else DENSE
        shapes = {**matrices, **dense}
        values = {name: 0.25 * numbers(shape, 7 * n) for n, (name, shape) in enumerate(shapes.items())}
        self.params = {name: nn.Parameter(_sharded(value.to(dtype), mesh)) for name, value in values.items()}
        self.targets = {name: target(shape, 7 * n + 1, dtype) for n, (name, shape) in enumerate(shapes.items())}
        groups: list[dict[str, Any]] = []
        if matrices:
            whole = isinstance(part, Rule) and not part.in_subspaces
            size = {"rank": None} if whole else size_of(part)
            groups.append({"params": [(name, self.params[name]) for name in matrices], **size})
        others = [name for name in dense if isinstance(part, Rule) and part.on_matrices and len(dense[name]) < 2]
        groups.append({"params": [(name, self.params[name]) for name in dense if name not in others], "rank": None})
        if others:
            groups.append({"params": [(name, self.params[name]) for name in others], "rank": None, "rule": Adam()})
        reset = isinstance(part, Projector) and part.moments_change_shape
        usual = {"rule": Adam(), "projector": SVD(), "lr": 1e-2, "weight_decay": 0.01, "update_proj_gap": 2}
        usual |= {"on_refresh": "reset"} if reset else {}
        self.optimizer = LowRankOptimizer(groups, **{**usual, kind_of(part): deepcopy(part), **(options or {})})
        self.mesh = mesh

    def _noise(self, name: str, step: int) -> Tensor:
        param = self.params[name]
        return 0.1 * numbers(tuple(param.shape), 1000 + 31 * step + len(name), param.dtype)

    def backward(self, step: int) -> None:
        """Gradients of ½‖W − T‖² with noise that differs from step to step; updates in backward happen here."""
        if self.mesh is not None:
            for name, param in self.params.items():
                grad = whole(param) - self.targets[name] + self._noise(name, step)
                param.grad = _sharded(grad, self.mesh)
            return
        loss = [
            (0.5 * (p - self.targets[name]).square() + self._noise(name, step) * p).sum()
            for name, p in self.params.items()
        ]
        torch.stack(loss).sum().backward()

    def train(self, steps: range) -> Self:
        """Steps with these numbers."""
        for step in steps:
            self.backward(step)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def loss(self) -> float:
        """How far the tensors are from their targets."""
        return sum(
            float((whole(p).double() - self.targets[name].double()).square().sum()) for name, p in self.params.items()
        )

    def tensors(self) -> dict[str, Tensor]:
        """Copies of all weights and of the whole state."""
        found = {f"weight of {name}": whole(param) for name, param in self.params.items()}
        for name, param in self.params.items():
            found |= {f"state {key!r} of {name}": whole(tensor) for key, tensor in self.optimizer.state[param].items()}
        return found


def whole(tensor: Tensor) -> Tensor:
    """A copy of a tensor, sharded or not, as an ordinary one."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()


def difference(got: Mapping[str, Tensor], needed: Mapping[str, Tensor], tolerance: float = 0.0) -> str | None:
    """The first difference in words, or None; without a tolerance, to the bit."""
    if got.keys() != needed.keys():
        return f"tensors that are only in one: {', '.join(sorted(got.keys() ^ needed.keys()))}"
    for name, tensor in needed.items():
        came = got[name]
        if (came.shape, came.dtype) != (tensor.shape, tensor.dtype):
            return f"{name} is {came.dtype} {tuple(came.shape)}, not {tensor.dtype} {tuple(tensor.shape)}"
        same = tolerance == 0.0 and torch.equal(came.nan_to_num(nan=0.125), tensor.nan_to_num(nan=0.125))
        if same or not came.numel():
            continue
        largest = float((came.double() - tensor.double()).abs().nan_to_num(nan=torch.inf).max())
        size = max(1.0, float(tensor.double().abs().max()))
        if tolerance == 0.0 or not largest <= tolerance * size:
            return f"{name} differs by up to {largest:.3g}"
    return None


def _sharded(tensor: Tensor, mesh: Any) -> Tensor:
    if mesh is None:
        return tensor
    from torch.distributed.tensor import DTensor, Shard

    made: Tensor = DTensor.from_local(tensor, mesh, [Shard(0)])
    return made


@contextmanager
def one_process_mesh() -> Iterator[Any]:
    """A mesh of this process alone; None where torch has no process groups, or this process trains with others."""
    distributed = torch.distributed
    started = distributed.is_available() and not distributed.is_initialized()
    if not distributed.is_available() or (not started and distributed.get_world_size() > 1):
        yield None
        return
    if started:
        store = distributed.HashStore()  # type: ignore[attr-defined]
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        from torch.distributed.device_mesh import init_device_mesh

        yield init_device_mesh("cpu", (1,))
    finally:
        if started:
            distributed.destroy_process_group()
