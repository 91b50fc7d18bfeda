"""Give the linear layers of a model 8-bit weights, and float ones back."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_optim.groups.build import select_matrices
from lowrank_optim.groups.names import Pattern
from lowrank_optim.nn.plain_layers import check_elements, check_real
from lowrank_optim.nn.quantized_weight import QuantizedWeight
from lowrank_optim.sharding.gathered import Gathered, find_gathered

SCALE = "weight_scale"
"""Name, in a state dict, of the scales beside the codes that stand under "weight"."""


def quantize_weights_(
    model: nn.Module,
    *,
    include: Pattern | Iterable[Pattern] | None = None,
    exclude: Pattern | Iterable[Pattern] | None = None,
) -> nn.Module:
    """Store the weights of a model's linear layers in 8 bits, in place; they go on being trained. Returns the model.

    Half of bfloat16's memory. Call it before the optimizer is built. Embeddings, output heads, norms, biases and layers that are not
    `nn.Linear` stay as they are, and are trained as before. The optimizers of this package decode some rows at a time to float32,
    update them, and round stochastically to the new codes, so that updates far below a level count on average. Other optimizers and
    all other writes in place do the same with one whole weight at a time, or raise (`QuantizedWeight`).

    `torch.optim.swa_utils.AveragedModel` keeps its average in 8 bits, too, right on average: noise of about √(n/18) levels after n
    models with equal weights, of √(d/2) levels for an exponential average that is d levels away from the model. A `multi_avg_fn` is
    computed in float32. An `avg_fn`, and on the CPU the default, is computed by torch in the nominal type, where bfloat16 loses small
    steps, as in any bfloat16 model: call `averaged.float()` at the start, which keeps the codes. `dequantize_weights_` of a float32
    average gives one without noise.

    In `state_dict` a weight is two plain tensors: the int8 codes under its own name and the float32 scales under "…weight_scale"; a
    checkpoint with float weights loads, too, and is coded then. A copy, `model.to(device)` and pickling keep the codes.

    Args:
        model: its parameters are replaced, so that tied weights stay tied.
        include: patterns of the weights to take, as in `param_groups`; None takes every linear layer but output heads.
        exclude: patterns of weights to leave alone.

    Raises:
        TypeError: no nn.Module.
        ValueError: a pattern that matches nothing, or no linear layer to take (layers with one input feature are never taken); a
            sharded weight, a complex one, one without elements, one that is tied to a module of another kind. Nothing was changed.

    Memory: m·(n + 4⌈n/256⌉) bytes for an m×n weight; during forward and backward, one decoded matrix.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Linear(512, 8)).bfloat16()
        >>> model = lo.nn.quantize_weights_(model, exclude="1")
        >>> optimizer = lo.QGaLoreAdamW8bit(lo.param_groups(model, rank=64, include="0"), lr=1e-3)
        >>> {name: tensor.dtype for name, tensor in model.state_dict().items() if name.startswith("0.w")}
        {'0.weight': torch.int8, '0.weight_scale': torch.float32}

    Paper: Zhang et al., "Q-GaLore", arXiv:2407.08296 (whose weights are rounded in bfloat16, which loses small updates).
    """
    gathered = find_gathered(model)
    chosen = {id(param) for param in select_matrices(model, include, exclude)}
    taken = [module for module in _linear_layers(model) if id(module.weight) in chosen and module.in_features > 1]
    if not taken:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear weight to quantise (output heads are left alone unless `include` names them)"
        )
    _check_owners(model, {id(module.weight) for module in taken}, gathered)
    made: dict[int, nn.Parameter] = {}
    for module in taken:
        old = module.weight
        if not isinstance(old, QuantizedWeight):
            if id(old) not in made:
                made[id(old)] = nn.Parameter(QuantizedWeight.from_float(old), requires_grad=old.requires_grad)
            module.weight = made[id(old)]
            module.register_state_dict_post_hook(_save)
            module.register_load_state_dict_pre_hook(_load)
    return model


@torch.no_grad()
def dequantize_weights_(model: nn.Module) -> nn.Module:
    """Give float weights, in their nominal type, back to every layer that `quantize_weights_` has taken. Returns the model."""
    made: dict[int, nn.Parameter] = {}
    for module in _linear_layers(model):
        old = module.weight
        if isinstance(old, QuantizedWeight):
            if id(old) not in made:
                made[id(old)] = nn.Parameter(old.decoded(), requires_grad=old.requires_grad)
            module.weight = made[id(old)]
    return model


def _check_owners(model: nn.Module, taken: set[int], gathered: Gathered) -> None:
    for path, module in model.named_modules(remove_duplicate=False):
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(param) in taken and not (isinstance(module, nn.Linear) and name == "weight"):
                raise ValueError(
                    f"{path}.{name} of {type(module).__name__} is tied to a linear layer's weight and cannot be stored in 8 bits; "
                    "leave that weight out (exclude)"
                )
            if id(param) in taken and gathered.stands_for_shards(param):
                raise ValueError(f"{path}.{name} is sharded (DTensor), and weights in 8 bits are not; exclude it")
            if id(param) in taken:
                gathered.check(f"{path}.{name}", param)
                check_real(f"{path}.{name}", param)
                check_elements(f"{path}.{name}", param)


def _linear_layers(model: nn.Module) -> Iterator[nn.Linear]:
    return (module for module in model.modules() if isinstance(module, nn.Linear))


def _save(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    weight = state.get(f"{prefix}weight")
    if isinstance(weight, QuantizedWeight):
        state[f"{prefix}weight"], state[f"{prefix}{SCALE}"] = weight.codes, weight.scale


def _load(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    name, own = f"{prefix}weight", module.weight
    scale, value = state.pop(f"{prefix}{SCALE}", None), state.get(name)
    if not isinstance(value, Tensor) or not isinstance(own, QuantizedWeight):
        if isinstance(value, Tensor) and scale is not None:  # codes, for a layer that has float weights again
            state[name] = QuantizedWeight(value, scale, own.dtype).decoded()  # type: ignore[arg-type]
    elif scale is not None:
        _check_codes(name, value, scale, own)
        state[name] = QuantizedWeight(value, scale, own.dtype)
    elif not value.is_floating_point():
        raise ValueError(f"{name}: the checkpoint has {value.dtype} codes without their scales, {prefix}{SCALE}")
    elif value.shape == own.shape and not isinstance(value, QuantizedWeight):
        # To nearest, and also where `assign` is True.
        state[name] = QuantizedWeight.from_float(value).to(own.dtype)


def _check_codes(name: str, codes: Tensor, scale: Tensor, own: QuantizedWeight) -> None:
    for part, tensor in (("codes", codes), ("scale", scale)):
        mine = getattr(own, part)
        if tensor.shape != mine.shape or tensor.dtype != mine.dtype:
            raise ValueError(
                f"{name}: the checkpoint's {part} are {tuple(tensor.shape)} {tensor.dtype}; needed: {tuple(mine.shape)} {mine.dtype}"
            )
