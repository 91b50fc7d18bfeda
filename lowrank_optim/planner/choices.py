"""Which optimizer is meant: a class, a name, (class or name, options), or a function of the model; and how it is built."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_optim import optimizers
from lowrank_optim.groups.build import param_groups
from lowrank_optim.groups.layers import layer_groups
from lowrank_optim.nn import AdaptedLayer, ReparametrizedLinear
from lowrank_optim.optimizers import FULL_RANK_METHODS, LAYERWISE_METHODS, METHODS, LISAAdamW, LowRankOptimizer
from lowrank_optim.optimizers.layer_switching import LayerSwitching
from lowrank_optim.planner.errors import PlanError, did_you_mean

GROUP_OPTIONS = ("rank", "density", "include", "exclude", "head", "embeddings")
"""Options that decide which parameters are low-rank: they go to `param_groups`."""

DEFAULT_RANK = 0.25
"""Rank of a low-rank optimizer for which none is given: a quarter of the short side (none for reparametrised layers)."""


class AdamW8bit(Optimizer):
    """The memory of bitsandbytes' AdamW8bit, for planning only: it updates nothing.

    Two bytes for every element of a tensor of at least 4096, and a float32 per 256 of them for each moment; smaller tensors keep
    float32 moments. Made in the first step, as there; its kernel needs no other memory.
    """

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and not self.state[param]:
                    self.state[param] = self._moments(param)

    @staticmethod
    def _moments(param: Tensor) -> dict[str, Tensor]:
        if param.numel() < 4096:
            return {name: torch.zeros_like(param, dtype=torch.float32) for name in ("state1", "state2")}
        codes = {name: torch.zeros_like(param, dtype=torch.uint8) for name in ("state1", "state2")}
        blocks = -(-param.numel() // 256)
        scales = {f"{name}_scale": torch.zeros(blocks, dtype=torch.float32, device=param.device) for name in codes}
        return codes | scales


@dataclass(frozen=True)
class OptimizerChoice:
    """An optimizer that can be built for any model.

    name: for people.
    kind: the class, or None for a function.
    """

    name: str
    kind: type[Optimizer] | None
    build: Callable[[nn.Module], Optimizer]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def updates_in_backward(self) -> bool:
        """Whether it can update inside backward."""
        return self.kind is not None and issubclass(self.kind, LowRankOptimizer)


def names() -> list[str]:
    """The short names of all optimizers."""
    return ["adamw", "adamw_8bit", "sgd", *METHODS, *FULL_RANK_METHODS, *LAYERWISE_METHODS]


def _by_name(name: str) -> type[Optimizer]:
    ours: dict[str, type[Optimizer]] = {**METHODS, **FULL_RANK_METHODS, **LAYERWISE_METHODS}
    classes: dict[str, type[Optimizer]] = {cls.__name__: cls for cls in (*ours.values(), LowRankOptimizer)}
    theirs: dict[str, type[Optimizer]] = {
        key: cls
        for key, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
    }
    by_any_name = theirs | classes | ours | {"adamw_8bit": AdamW8bit}
    table: dict[str, type[Optimizer]] = {_plain(key): cls for key, cls in by_any_name.items()}
    if _plain(name) in table:
        return table[_plain(name)]
    known = [*names(), *classes, *theirs]
    hint = did_you_mean(name, known)
    raise PlanError(f"there is no optimizer {name!r}: {hint}Names are {', '.join(names())}, and those of torch.optim")


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def with_options(argument: Any) -> tuple[Any, dict[str, Any]]:
    """What (thing, options) holds; any other argument is a thing without options."""
    if isinstance(argument, (tuple, list)) and len(argument) == 2 and isinstance(argument[1], Mapping):
        return argument[0], dict(argument[1])
    return argument, {}


def resolve_optimizer(optimizer: Any, **defaults: Any) -> OptimizerChoice:
    """The optimizer that an argument means.

    Args:
        optimizer: a class, a name, (class or name, options), or a function that builds an optimizer for a model. Options of this
            package's classes may hold `GROUP_OPTIONS`, for `lowrank_optim.param_groups`.
        **defaults: options that hold where none are given and the class has them.

    Raises:
        PlanError: an unknown name, with the nearest ones; nothing that builds an optimizer.
    """
    optimizer, options = with_options(optimizer)
    kind = _by_name(optimizer) if isinstance(optimizer, str) else optimizer
    if isinstance(kind, type) and issubclass(kind, Optimizer):
        if issubclass(kind, LowRankOptimizer):
            options = defaults | options
        return OptimizerChoice(kind.__name__, kind, lambda model: _build(kind, model, dict(options)), options)
    if callable(kind) and not isinstance(kind, type):
        return OptimizerChoice(getattr(kind, "__name__", "optimizer"), None, kind, options)
    raise PlanError(
        f"optimizer is {optimizer!r}; give an optimizer class, a name ({', '.join(names())}), (class, options), or a function that "
        "builds one for a model"
    )


def _build(kind: type[Optimizer], model: nn.Module, options: dict[str, Any]) -> Optimizer:
    """An optimizer for the parameters of a model; every message of its own becomes a `PlanError`."""
    try:
        if not issubclass(kind, LowRankOptimizer):
            return kind((p for p in model.parameters() if p.requires_grad), **options)
        groups = {name: options.pop(name) for name in GROUP_OPTIONS if name in options}
        if issubclass(kind, LayerSwitching):
            return _build_layerwise(kind, model, groups, options)
        if "rank" not in groups and "density" not in groups:
            rank = 1 if kind is optimizers.APOLLOMiniAdamW else _default_rank(model)
            groups = {**(kind.matrix_options or {"rank": rank}), **groups}
        return kind(param_groups(model, **groups), **options)
    except (TypeError, ValueError) as error:
        raise PlanError(f"{kind.__name__}: {error}") from error


def _default_rank(model: nn.Module) -> float | None:
    """None, which trains every parameter by the rule itself, where the layers are factors already."""
    factored = any(isinstance(module, AdaptedLayer | ReparametrizedLinear) for module in model.modules())
    return None if factored else DEFAULT_RANK


def _build_layerwise(
    kind: type[LowRankOptimizer], model: nn.Module, groups: dict[str, Any], options: dict[str, Any]
) -> Optimizer:
    made = layer_groups(model, **({"rank": None} | groups))
    if kind is LISAAdamW and "sampling" not in options:
        # The draw that takes most: the last layers, whose gradients come while most activations are still kept.
        layers = sorted({group["layer"] for group in made if group.get("layer") is not None})
        awake = set(layers[-options.get("active_layers", 2) :])
        options["sampling"] = lambda layer, params: float(layer in awake)
    return kind(made, **options)
