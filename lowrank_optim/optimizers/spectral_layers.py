"""What Sparse Spectral Training does to the parameters of one layer between two steps; sharded or not.

`fully_shard` splits the vectors (m×r, n×r) by rows, and the values. The buffers of a layer are whole in every process.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_optim.kernels import compute_dtype
from lowrank_optim.nn.decompositions import widened
from lowrank_optim.nn.spectral_linear import SpectralLinear, decompose
from lowrank_optim.sharding.dtensor import dense_sharding, is_sharded, local
from lowrank_optim.sharding.gathered import put_shards_back
from lowrank_optim.sharding.tensor_sharding import TensorSharding

VECTORS = ("u_active", "v_active")
PARAMETERS = ("sigma", *VECTORS)


class SpectralLayer(NamedTuple):
    """Layers with one set of parameters, and the name of the first."""

    path: str
    modules: tuple[SpectralLinear, ...]

    def param(self, name: str) -> Tensor:
        """A parameter: looked up each time, since `fully_shard` and loading with assign=True put others in their place."""
        return getattr(self.modules[0], name)  # type: ignore[no-any-return]

    @property
    def trained(self) -> bool:
        """Whether any of its parameters requires a gradient."""
        return any(self.param(name).requires_grad for name in PARAMETERS)


def settle_vectors(param: Tensor, old: Tensor | None, share: float) -> None:
    """v ← v/‖v‖ for each column, after a step of which only a share counts; one that is zero or not finite is taken back.

    Args:
        param: u or v, changed in place.
        old: its part in this process before the step; None where there was no step.
        share: of the change, in (0, 1].
    """
    part = local(param)
    before = (part if old is None else old).to(compute_dtype(part.dtype))
    new = torch.lerp(before, part.to(before.dtype), share) if share < 1 else part.to(before.dtype)
    norms = dense_sharding(param).norm(torch.linalg.vector_norm(new, dim=0), -2)
    fits = norms.isfinite() & (norms > 0)
    part.copy_(torch.where(fits, new / norms.masked_fill(~fits, 1.0), before))


def settle_values(param: Tensor, old: Tensor | None, share: float) -> None:
    """Σ ← max(Σ, 0), after a step of which only a share counts; arguments as of `settle_vectors`."""
    part = local(param)
    if old is not None and share < 1:
        part.copy_(torch.lerp(old, part, share))
    part.clamp_(min=0)


def renew(layer: SpectralLayer, number: int, mixture: float, again: bool) -> tuple[str, ...]:
    """Write the vectors back, decompose W again if asked, and make draw number `number`; W stays what it was.

    Returns the names of the parameters that have other numbers now.

    Raises:
        RuntimeError: a weight to be decomposed is not finite; nothing was changed.
    """
    first = layer.modules[0]
    params = [layer.param(name) for name in PARAMETERS]
    splits = [dense_sharding(param) for param in params]
    sigma, u, v = (split.gather(local(param), -param.dim()) for split, param in zip(splits, params, strict=True))
    u, v = first.vectors(u, v)
    if again:
        u, sigma, v = _decomposed_again(layer.path, u, sigma, v, splits[0].only())
    order = first.draw(sigma, number, mixture)
    for module in layer.modules:  # tied layers hold the same buffers, unless the model was moved since
        module.set_frozen(u, v, order)
    active = order[: first.rank]
    for param, split, whole in zip(params, splits, (sigma, u[:, active], v[:, active]), strict=True):
        local(param).copy_(split.part(whole))
    return PARAMETERS if again else VECTORS


def _decomposed_again(
    path: str, u: Tensor, sigma: Tensor, v: Tensor, everywhere: TensorSharding
) -> tuple[Tensor, Tensor, Tensor]:
    """SVD(U Σ Vᵀ), each part in the type that it had, the same bits in all processes."""
    weight = (widened(u) * widened(sigma)) @ widened(v).mT
    if not bool(torch.isfinite(weight).all()):
        raise RuntimeError(f"the weight of {path} is not finite; it has no singular value decomposition")
    u, sigma, v = (everywhere.agree(part.to(u.dtype).contiguous()) for part in decompose(weight))
    return u, sigma, v


def layers_of(model: nn.Module, optimizer: Optimizer) -> list[SpectralLayer]:
    """The spectral layers of a model of which an optimizer holds parameters, checked.

    Raises:
        TypeError: no nn.Module, or no optimizer of torch's kind.
        ValueError: there are none; an optimizer that makes its state when it is built; parameters that are split otherwise than
            `fully_shard` splits them, or offloaded to the host.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    put_shards_back(model)
    found: dict[int, list[tuple[str, SpectralLinear]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, SpectralLinear):
            found.setdefault(id(module.sigma), []).append((path, module))
    if not found:
        raise ValueError(f"{type(model).__name__} has no SpectralLinear; call lowrank_optim.nn.spectral_(model) first")
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    layers = [SpectralLayer(members[0][0], tuple(module for _, module in members)) for members in found.values()]
    put_parameters_back(model, layers)
    layers = [layer for layer in layers if any(id(layer.param(name)) in held for name in PARAMETERS)]
    if not layers:
        raise ValueError(
            f"the {type(optimizer).__name__} holds no parameter of a SpectralLinear; build it after spectral_ (and fully_shard)"
        )
    if isinstance(optimizer, torch.optim.Adagrad):
        raise ValueError("Adagrad makes its state when it is built, and cannot begin afresh; use another optimizer")
    for layer in layers:
        for name in PARAMETERS:
            _check_split(f"{layer.path}.{name}", layer.param(name))
    return layers


def put_parameters_back(model: nn.Module, layers: list[SpectralLayer]) -> None:
    """Have the shards of parameters put back that an evaluation leaves gathered: what is written to them would be lost.

    Raises:
        ValueError: `fully_shard` was called on a module around the model.
    """
    gathered = put_shards_back(model)
    for layer in layers if gathered.around else []:
        for name in PARAMETERS:
            gathered.check(f"{layer.path}.{name}", layer.param(name))


def _check_split(name: str, param: Tensor) -> None:
    if not is_sharded(param):
        return
    if param.dim() == 2 and dense_sharding(param).splits(-1):
        raise ValueError(
            f"{name} is split along its ranks (tensor parallelism); SpectralSchedule knows fully_shard, which splits rows, and "
            "DistributedDataParallel"
        )
    if param.device.type != param.device_mesh.device_type:  # type: ignore[attr-defined]
        raise ValueError(f"{name} is offloaded to the host (CPUOffloadPolicy), which SpectralSchedule does not cover")
