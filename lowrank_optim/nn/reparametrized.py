"""What linear layers whose weight is a function of other parameters have in common, and how they come into a model and out of it.

`ReparametrizedLinear` takes the place of an `nn.Linear`. `take_linears` finds and checks the layers, `put_layers` exchanges them,
`merge_` gives plain layers back. Nothing in a model changes before all of it has been checked.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lowrank_optim.groups.build import select_matrices
from lowrank_optim.groups.names import Pattern
from lowrank_optim.groups.parameters import FoundParameter, find_parameters
from lowrank_optim.groups.roles import Role
from lowrank_optim.nn.quantized_weight import QuantizedWeight

Patterns = Pattern | Iterable[Pattern] | None

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


class ReparametrizedLinear(nn.Module):
    """A linear layer whose weight is computed from other parameters.

    A class of this kind says `merged` (the m×n weight), `forward`, `parameter_roles` (how each parameter is trained) and `converter`,
    the function that makes it. The bias is a parameter as in `nn.Linear`. `weight` is the merged matrix, without gradient, for code
    that asks for its type, device or shape; it is computed at each access and cannot be set.
    """

    converter = ""
    in_features: int
    out_features: int
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    def merged(self) -> Tensor:
        """The weight, m×n, in the type of the parameters."""
        raise NotImplementedError

    def parameter_roles(self) -> Mapping[str, Role]:
        """How `param_groups` treats the parameters."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The merged weight; no gradient flows through it."""
        if any(isinstance(param, DTensor) for param in self._parameters.values()):
            raise RuntimeError(
                f"the parameters of this {type(self).__name__} are sharded (DTensor); its weight can be had within its forward, or "
                "from an unsharded model"
            )
        with torch.no_grad():
            return self.merged()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                f"the weight of {type(self).__name__} is computed from its parameters and cannot be set; use lowrank_optim.nn.merge_ "
                "to have a plain nn.Linear again"
            )
        super().__setattr__(name, value)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if state_dict.pop(f"{prefix}weight", None) is not None:
            error_msgs.append(
                f"{prefix}weight is a dense weight; {type(self).__name__} has none. Load it into the plain model first, then call "
                f"{self.converter}"
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class TakenLinear(NamedTuple):
    """A linear layer that is to be replaced: its name, and its position among all linear layers of the model."""

    path: str
    position: int
    module: nn.Linear


def take_linears(model: nn.Module, include: Patterns, exclude: Patterns, *, meta: bool = False) -> list[TakenLinear]:
    """The plain `nn.Linear`s of a model that patterns choose, each once.

    Args:
        model: the model; nothing is changed.
        include, exclude: as of `param_groups`: without `include` all but output heads.
        meta: whether weights on the meta device are allowed.

    Raises:
        TypeError: no nn.Module.
        ValueError: a pattern without effect; no layer to take; a layer that cannot be replaced: of another class, with a weight that
            is coded, sharded, not floating point, or tied to something that is no linear layer.
    """
    chosen = {id(param) for param in select_matrices(model, include, exclude)}
    if isinstance(model, nn.Linear):
        raise ValueError(
            "the model is itself an nn.Linear and cannot be replaced in place; put it into an nn.Sequential"
        )
    if isinstance(include, Iterable) and not isinstance(include, str):
        include = list(include)
    linears = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, ReparametrizedLinear))
    ]
    taken = [
        TakenLinear(path, position, module)
        for position, (path, module) in enumerate(linears)
        if type(module) is nn.Linear and id(module._parameters.get("weight")) in chosen
    ]
    if not taken:
        raise ValueError(
            f"{type(model).__name__} has no plain nn.Linear to take with include={include!r}, exclude={exclude!r} (convolutions, "
            "subclasses of nn.Linear and the layers within nn.MultiheadAttention stay as they are; output heads are taken only if "
            "`include` names them)"
        )
    for pattern in [include] if not isinstance(include, list) else include:
        own = {id(param) for param in select_matrices(model, pattern)} if pattern is not None else chosen
        if not any(id(layer.module.weight) in own for layer in taken) and not own - chosen:
            raise ValueError(
                f"include pattern {pattern!r} matches no plain nn.Linear, only layers that cannot be taken"
            )
    _check_owners(find_parameters(model), model, {id(layer.module.weight) for layer in taken})
    for path, _, module in taken:
        _check_layer(path, module, meta)
    return taken


def put_layers(model: nn.Module, made: Mapping[int, nn.Module]) -> None:
    """Put modules in the place of those whose `id` is a key, wherever the model holds them."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in made:
                setattr(parent, name, made[id(child)])


def take_over(old: nn.Module, new: nn.Module) -> None:
    """Give the new module the bias, the forward and backward hooks, and the training flag of the old one."""
    new.register_parameter("bias", old._parameters.get("bias"))
    new.training = old.training
    for name in HOOKS:  # the same dicts, so that the handles of the hooks still remove them
        if name in old.__dict__:
            new.__dict__[name] = old.__dict__[name]


@torch.no_grad()
def merge_(model: nn.Module) -> nn.Module:
    """Give plain `nn.Linear`s back in the place of all reparametrised layers (`sltrain_`), in place. Returns the model.

    The weight is the merged matrix, computed in float32 (float64 for float64 layers) and rounded once. Biases, hooks and the training
    flag are kept. Layers that share their parameters share the weight, and a layer whose parameters are all frozen has a frozen one.

    Raises:
        TypeError: no nn.Module.
        ValueError: the model has no such layer, or is one itself.

    Memory: the dense weights; one layer at a time beyond that.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
        >>> model = lo.nn.merge_(lo.nn.sltrain_(model, rank=8, density=0.03, init="fresh"))
        >>> type(model[0]).__name__, tuple(model[0].weight.shape)
        ('Linear', (128, 64))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, ReparametrizedLinear):
        raise ValueError(
            f"the model is itself a {type(model).__name__} and cannot be replaced in place; put it into an nn.Sequential"
        )
    found = [(path, each) for path, each in model.named_modules() if isinstance(each, ReparametrizedLinear)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no layer that lowrank_optim.nn made")
    for path, module in found:
        own = dict(module.named_parameters(recurse=False))
        if any(isinstance(param, DTensor) for param in own.values()):
            raise ValueError(f"{path} is sharded (DTensor); merge the unsharded model, from a full state dict")
    weights: dict[tuple[int, ...], nn.Parameter] = {}
    made: dict[int, nn.Module] = {}
    for _, module in found:
        own = {name: param for name, param in module.named_parameters(recurse=False) if name != "bias"}
        key = tuple(id(param) for param in own.values())
        if key not in weights:
            weights[key] = nn.Parameter(module.merged(), requires_grad=any(p.requires_grad for p in own.values()))
        plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        plain.weight = weights[key]
        take_over(module, plain)
        made[id(module)] = plain
    put_layers(model, made)
    return model


def _check_owners(found: list[FoundParameter], model: nn.Module, taken: set[int]) -> None:
    """Raise for taken weights that some other module holds, too."""
    names = {id(entry.param): entry.names for entry in found}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(param) in taken and not (type(module) is nn.Linear and name == "weight"):
                raise ValueError(
                    f"{path}.{name} of {type(module).__name__} is tied to the weight of a linear layer "
                    f"({', '.join(other for other in names[id(param)] if other != f'{path}.{name}')}), which therefore cannot be "
                    "replaced; leave it out (exclude)"
                )


def _check_layer(path: str, module: nn.Linear, meta: bool) -> None:
    weight = module.weight
    if isinstance(weight, QuantizedWeight):
        raise ValueError(f"{path}.weight is stored in 8 bits; call lowrank_optim.nn.dequantize_weights_ first")
    if isinstance(weight, DTensor):
        raise ValueError(
            f"{path}.weight is sharded (DTensor); replace the layers before fully_shard or parallelize_module"
        )
    if not weight.is_floating_point():
        raise ValueError(f"{path}.weight is {weight.dtype}; floating-point weights are needed")
    if weight.is_meta and not meta:
        raise ValueError(
            f"{path}.weight is on the meta device and has no numbers; materialise the model first, or use init='fresh'"
        )
    if "forward" in module.__dict__:
        raise ValueError(
            f"{path} has a forward of its own, set by another library; replace the layers before that, or exclude it"
        )
