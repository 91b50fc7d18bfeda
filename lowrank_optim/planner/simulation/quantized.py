"""int8 weights in a plan: the adapter to `lowrank_optim.nn.quantize_weights_`."""

from importlib import import_module

from torch import nn

from lowrank_optim.planner.errors import PlanError


def quantize_weights(model: nn.Module) -> nn.Module:
    """The model with int8 weights in its linear layers, changed in place.

    Raises:
        PlanError: this version has no int8 weights.
    """
    try:
        quantize = import_module("lowrank_optim.nn").quantize_weights_
    except (ModuleNotFoundError, AttributeError) as error:
        raise PlanError(
            "weight_bits is 8, but this version of lowrank_optim has no lowrank_optim.nn.quantize_weights_"
        ) from error
    changed = quantize(model)
    return changed if isinstance(changed, nn.Module) else model
