"""The plain layers that others take the place of: which kinds there are, and whether a layer can be replaced."""

from collections.abc import Mapping
from typing import Literal, TypeAlias

from torch import Tensor, nn

from lowrank_optim.groups.parameters import FoundParameter
from lowrank_optim.nn.quantized_weight import QuantizedWeight
from lowrank_optim.sharding.gathered import Gathered

Kind: TypeAlias = Literal["linear", "conv1d", "embedding", "convolution"]

KIND_NAMES: dict[Kind, str] = {
    "linear": "nn.Linear",
    "conv1d": "Conv1D",
    "embedding": "nn.Embedding",
    "convolution": "convolution",
}


def kind_of(module: nn.Module) -> Kind | None:
    """Which plain layer a module is; None for all others, subclasses too."""
    if type(module) is nn.Linear:
        return "linear"
    if type(module) is nn.Embedding:
        return "embedding"
    if type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return "convolution"
    # Of transformers, a linear layer stored as (in, out); by its name, so that transformers is not imported.
    if type(module).__name__ == "Conv1D" and "nf" in module.__dict__:
        return "conv1d"
    return None


def check_owners(found: list[FoundParameter], model: nn.Module, taken: Mapping[int, Kind | None]) -> None:
    """Raise for taken weights that some module of another kind holds, too; `taken` has the kind by the `id` of the weight."""
    names = {id(entry.param): entry.names for entry in found}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(param) in taken and not (kind_of(module) == taken[id(param)] and name == "weight"):
                kind = "an embedding" if taken[id(param)] == "embedding" else "a linear layer"
                raise ValueError(
                    f"{path}.{name} of {type(module).__name__} is tied to the weight of {kind} "
                    f"({', '.join(other for other in names[id(param)] if other != f'{path}.{name}')}), which therefore cannot be "
                    "replaced; leave it out (exclude)"
                )


def check_layer(path: str, module: nn.Linear, meta: bool, coded: bool, hint: str, gathered: Gathered) -> None:
    """Raise ValueError for a layer whose weight cannot be replaced."""
    weight = module.weight
    if isinstance(weight, QuantizedWeight) and not coded:
        raise ValueError(f"{path}.weight is stored in 8 bits; call lowrank_optim.nn.dequantize_weights_ first")
    if gathered.stands_for_shards(weight):
        raise ValueError(
            f"{path}.weight is sharded (DTensor); replace the layers before fully_shard or parallelize_module"
        )
    gathered.check(f"{path}.weight", weight)
    check_real(f"{path}.weight", weight)
    check_elements(f"{path}.weight", weight)
    if weight.is_meta and not meta:
        raise ValueError(
            f"{path}.weight is on the meta device and has no numbers; materialise the model first{hint and f', or {hint}'}"
        )
    if "forward" in module.__dict__:
        raise ValueError(
            f"{path} has a forward of its own, set by another library; replace the layers before that, or exclude it"
        )


def check_real(name: str, weight: Tensor) -> None:
    """Raise ValueError for a weight of complex numbers or of integers."""
    if not weight.is_floating_point():
        raise ValueError(f"{name} is {weight.dtype}; floating-point weights are needed")


def check_elements(name: str, weight: Tensor) -> None:
    """Raise ValueError for a weight that has none."""
    if not weight.numel():
        raise ValueError(f"{name} is {tuple(weight.shape)}, without elements; exclude it")
