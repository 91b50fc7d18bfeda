"""The float32 weights that an optimizer trains where the model's are bfloat16."""

import torch
from torch import Tensor

from lowrank_optim import kernels
from lowrank_optim.optimizers.base import LowRankOptimizer
from lowrank_optim.sharding.dtensor import dense_sharding, is_sharded, local
from lowrank_optim.step.param_step import kept_error


@torch.no_grad()
def full_precision(optimizer: LowRankOptimizer, param: Tensor) -> Tensor:
    """The weights of a parameter in the precision in which the optimizer trains them, as a new tensor.

    With `weight_error_bits=16`, the float32 number that each bfloat16 weight and its error stand for, to the bit; with 8 bits that
    number rounded to 16 bits of its fraction, within 2⁻¹⁶ of itself. With `master_weights`, the master. Everything else, float32
    parameters among it, has no more than the parameter itself: a copy of that, in float32 (float64 stays).

    A layer that sleeps without state has only its bfloat16 weights. What others have written into a parameter since its last step
    counts; the errors of the old weights are then less than half a unit in the last place of the new ones.

    Args:
        optimizer: of this package.
        param: one of its parameters.

    Returns:
        A tensor of the parameter's shape, on its device; a DTensor where it is one.

    Raises:
        ValueError: the parameter is none of the optimizer's.

    Memory: 4 bytes for each weight, and 4 more while they are made.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> weight = torch.nn.Parameter(torch.ones(64, 32, dtype=torch.bfloat16))
        >>> optimizer = lo.GaLoreAdamW([weight], lr=1e-4, rank=4, weight_error_bits=16)
        >>> weight.grad = torch.ones_like(weight)
        >>> optimizer.step()
        >>> float(weight[0, 0]), round(float(lo.full_precision(optimizer, weight)[0, 0]), 6)
        (1.0, 0.9999)
    """
    if param not in optimizer.plans:
        raise ValueError(
            f"a parameter {tuple(param.shape)} {param.dtype} is none of this {type(optimizer).__name__}'s; give one of those in its "
            "param_groups"
        )
    state = {name: local(tensor) for name, tensor in optimizer.state.get(param, {}).items()}
    weight = local(param).detach()
    if (master := state.get("master")) is not None:
        weight = torch.where(master.to(weight.dtype) == weight, master, weight)
    whole = kernels.joined(weight, kept_error(state))
    whole = whole.to(kernels.compute_dtype(whole.dtype), copy=whole is weight)
    return dense_sharding(param).wrap(whole) if is_sharded(param) else whole
