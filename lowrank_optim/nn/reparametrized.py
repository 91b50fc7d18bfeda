"""What layers whose weight is a function of other parameters have in common, and how they come into a model and out of it.

`ReparametrizedLinear` takes the place of an `nn.Linear` (or of a Conv1D of transformers, its transpose). `take_layers` finds and
checks the layers, `put_layers` exchanges them, `merge_` gives plain layers back. Nothing in a model changes before all of it has been
checked.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lowrank_optim.groups.build import select_matrices
from lowrank_optim.groups.names import Pattern
from lowrank_optim.groups.parameters import find_parameters
from lowrank_optim.groups.roles import Role
from lowrank_optim.nn.plain_layers import KIND_NAMES, Kind, check_layer, check_owners, kind_of
from lowrank_optim.nn.quantized_weight import QuantizedWeight
from lowrank_optim.sharding.dtensor import is_sharded
from lowrank_optim.sharding.gathered import find_gathered

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


class ReparametrizedLayer(nn.Module):
    """A layer whose weight is computed from other parameters.

    A class of this kind says `merged` (the weight), `plain` (the layer that it stands for), `forward`, `parameter_roles` (how each
    parameter is trained) and `converter`, the function that makes it. `weight` is the merged matrix, without gradient, for code that
    asks for its type, device or shape; it is computed at each access and cannot be set.
    """

    converter = ""
    reads_inner_layers: ClassVar[bool] = False
    """Whether it reads the parameters of layers within it, so that these cannot be replaced by others."""

    def merged(self) -> Tensor:
        """The weight, m×n, in the type of the parameters."""
        raise NotImplementedError

    def plain(self, weight: nn.Parameter) -> nn.Module:
        """The layer that this one stands for, with this weight."""
        raise NotImplementedError

    def weight_parameters(self) -> list[nn.Parameter]:
        """The parameters that the weight is computed from."""
        return [param for name, param in self.named_parameters() if name.split(".")[-1] != "bias"]

    def parameter_roles(self) -> Mapping[str, Role]:
        """How `param_groups` treats the parameters."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The merged weight, as the plain layer stores it; no gradient flows through it."""
        if any(map(is_sharded, self.parameters())):
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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        *_, error_msgs = rest
        if state_dict.pop(f"{prefix}weight", None) is not None:
            error_msgs.append(
                f"{prefix}weight is a dense weight; {type(self).__name__} has none. Load it into the plain model first, then call "
                f"{self.converter}"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)


Layer = TypeVar("Layer", bound=ReparametrizedLayer)


class ReparametrizedLinear(ReparametrizedLayer):
    """A linear layer whose weight is computed from other parameters. The bias is a parameter as in `nn.Linear`."""

    in_features: int
    out_features: int
    bias: nn.Parameter | None
    plain_class: type[nn.Module] = nn.Linear
    """Of the layer that this one stands for: `nn.Linear`, or a Conv1D, which stores the transpose."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    def check_input(self, x: Tensor) -> None:
        """Raise ValueError unless x ends in `in_features`."""
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"the input is {tuple(x.shape)}; its last dimension must be in_features, {self.in_features}"
            )

    @property
    def weight(self) -> Tensor:
        """The merged weight, as the plain layer stores it; no gradient flows through it."""
        weight = super().weight
        return weight if self.plain_class is nn.Linear else weight.mT

    def plain(self, weight: nn.Parameter) -> nn.Module:
        """An `nn.Linear`, or a Conv1D, with this weight and the bias of this layer."""
        sizes = (self.in_features, self.out_features)
        with torch.device("meta"):
            made = self.plain_class(*sizes if self.plain_class is nn.Linear else reversed(sizes))
        made.register_parameter("weight", weight)
        made.register_parameter("bias", self.bias)
        return made

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def matrix_of(module: nn.Module) -> Tensor:
    """The weight of a plain or reparametrised layer without gradient: m×n, of embeddings and convolutions as they store it."""
    if isinstance(module, ReparametrizedLayer):
        return module.merged()
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    if isinstance(weight, QuantizedWeight):
        weight = weight.decoded()
    return weight.mT if kind_of(module) == "conv1d" else weight


class TakenLayer(NamedTuple):
    """A layer that is to be replaced: its name, and its position among all layers of these kinds in the model."""

    path: str
    position: int
    module: Any


def find_layers(
    model: nn.Module,
    include: Patterns,
    exclude: Patterns,
    kinds: tuple[Kind, ...] = ("linear",),
    names: Collection[str] | None = None,
) -> list[TakenLayer]:
    """The plain layers of some kinds in a model that patterns choose, each once.

    Args:
        model: the model; nothing is changed.
        include, exclude: as of `param_groups`: without `include` all but output heads and embeddings.
        kinds: which layers.
        names: in place of patterns, the layers' own names; others with the same weight come along.

    Raises:
        TypeError: no nn.Module.
        ValueError: a pattern without effect; a name that is none of such a layer; no layer to take.
    """
    if isinstance(include, Iterable) and not isinstance(include, str):
        include = list(include)
    chosen = {id(param) for param in select_matrices(model, include, exclude)}
    if names is not None:
        chosen = _named(model, kinds, names)
    held = {
        id(inner)
        for module in model.modules()
        if isinstance(module, ReparametrizedLayer) and module.reads_inner_layers
        for inner in module.children()
    }
    labels = [KIND_NAMES[kind] for kind in kinds]
    wanted = ", ".join(labels[:-1]) + " or " * (len(labels) > 1) + labels[-1]
    if kind_of(model) in kinds:
        raise ValueError(
            f"the model is itself an {type(model).__name__} and cannot be replaced in place; put it into an nn.Sequential"
        )
    layers = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, ReparametrizedLinear)) or kind_of(module) in kinds
    ]
    taken = [
        TakenLayer(path, position, module)
        for position, (path, module) in enumerate(layers)
        if kind_of(module) in kinds and id(module) not in held and id(module._parameters.get("weight")) in chosen
    ]
    if not taken:
        raise ValueError(
            f"{type(model).__name__} has no plain {wanted} to take with include={include!r}, exclude={exclude!r} (other layers, "
            "subclasses of these and the layers within nn.MultiheadAttention stay as they are; output heads and embeddings are "
            "taken only if `include` names them)"
        )
    for pattern in [include] if not isinstance(include, list) else include:
        own = {id(param) for param in select_matrices(model, pattern)} if pattern is not None else chosen
        if not any(id(layer.module.weight) in own for layer in taken) and not own - chosen:
            raise ValueError(f"include pattern {pattern!r} matches no plain {wanted}, only layers that cannot be taken")
    return taken


def _named(model: nn.Module, kinds: tuple[Kind, ...], names: Collection[str]) -> set[int]:
    """The `id` of the weights of layers with these names."""
    layers = {path: module for path, module in model.named_modules(remove_duplicate=False) if kind_of(module) in kinds}
    for name in names:
        if name not in layers:
            near = ", ".join(get_close_matches(str(name), layers, n=4, cutoff=0.3))
            raise ValueError(f"{name!r} is no plain linear layer or embedding of the model; nearest names: {near}")
    return {id(layers[name].weight) for name in names}


def take_layers(
    model: nn.Module,
    include: Patterns,
    exclude: Patterns,
    kinds: tuple[Kind, ...] = ("linear",),
    names: Collection[str] | None = None,
    *,
    meta: bool = False,
    coded: bool = False,
    hint: str = "",
) -> list[TakenLayer]:
    """The layers that `find_layers` gives, checked.

    Args:
        model, include, exclude, kinds, names: as there.
        meta: whether weights on the meta device are allowed.
        coded: whether weights in 8 bits are allowed.
        hint: what to do about one on the meta device.

    Raises:
        TypeError: no nn.Module.
        ValueError: as `find_layers`; a layer that cannot be replaced: with a weight that is coded, sharded, not floating point, or
            tied to a layer of another kind.
    """
    gathered = find_gathered(model)
    taken = find_layers(model, include, exclude, kinds, names)
    check_owners(find_parameters(model), model, {id(layer.module.weight): kind_of(layer.module) for layer in taken})
    for path, _, module in taken:
        check_layer(path, module, meta, coded, hint, gathered)
    return taken


def put_layers(model: nn.Module, made: Mapping[int, nn.Module]) -> None:
    """Put modules in the place of those whose `id` is a key, wherever the model holds them."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in made:
                setattr(parent, name, made[id(child)])


def replace_layers(
    model: nn.Module, taken: list[TakenLayer], make: Callable[[TakenLayer], ReparametrizedLinear]
) -> None:
    """Put new layers in the place of taken ones, with their biases, hooks and training flags; those of one weight share their own."""
    shared: dict[int, ReparametrizedLinear] = {}
    made: dict[int, nn.Module] = {}
    for layer in taken:
        first = shared.get(id(layer.module.weight))
        new = make(layer) if first is None else sharing(first)
        shared.setdefault(id(layer.module.weight), new)
        new.register_parameter("bias", layer.module._parameters.get("bias"))
        take_hooks(layer.module, new)
        made[id(layer.module)] = new
    put_layers(model, made)


def sharing(first: Layer) -> Layer:
    """Another layer of this kind with the parameters and buffers of the first, without its hooks and submodules."""
    new = type(first).__new__(type(first))
    nn.Module.__init__(new)
    new.__dict__.update({name: value for name, value in first.__dict__.items() if name not in nn.Module().__dict__})
    new._parameters.update(first._parameters)
    new._buffers.update(first._buffers)
    return new


def take_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give the new module the forward and backward hooks, and the training flag of the old one."""
    new.training = old.training
    for name in HOOKS:  # the same dicts, so that the handles of the hooks still remove them
        if name in old.__dict__:
            new.__dict__[name] = old.__dict__[name]


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """`take_hooks` from a module that the new one goes on calling or reading: it has none then."""
    take_hooks(old, new)
    old.__dict__.update({name: nn.Module().__dict__[name] for name in HOOKS})


@torch.no_grad()
def merge_(model: nn.Module) -> nn.Module:
    """Give plain layers back in the place of all reparametrised ones (`sltrain_`, `factorize_`, …), in place. Returns the model.

    The weight is the merged matrix, computed in float32 (float64 for float64 layers) and rounded once. Biases, hooks and the training
    flag are kept. Layers that share their parameters share the weight, and a layer whose parameters are all frozen has a frozen one.
    Layers come back as what they were: `nn.Linear`, `nn.Embedding`, Conv1D. An 8-bit weight with a pair beside it (`compensate_`)
    becomes a float one.

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
    if isinstance(model, ReparametrizedLayer):
        raise ValueError(
            f"the model is itself a {type(model).__name__} and cannot be replaced in place; put it into an nn.Sequential"
        )
    found = [(path, each) for path, each in model.named_modules() if isinstance(each, ReparametrizedLayer)]
    inner = {id(child) for _, each in found for child in each.modules() if child is not each}
    found = [(path, each) for path, each in found if id(each) not in inner]
    if not found:
        raise ValueError(f"{type(model).__name__} has no layer that lowrank_optim.nn made")
    gathered = find_gathered(model)
    for path, module in found:
        if any(map(gathered.stands_for_shards, module.parameters())):
            raise ValueError(f"{path} is sharded (DTensor); merge the unsharded model, from a full state dict")
        for name, param in module.named_parameters():
            gathered.check(f"{path}.{name}", param)
    weights: dict[tuple[int, ...], nn.Parameter] = {}
    made: dict[int, nn.Module] = {}
    for _, module in found:
        own = module.weight_parameters()
        key = tuple(map(id, own))
        if key not in weights:
            weights[key] = nn.Parameter(module.weight.contiguous(), requires_grad=any(p.requires_grad for p in own))
        made[id(module)] = plain = module.plain(weights[key])
        take_hooks(module, plain)
    put_layers(model, made)
    return model
