"""The group lasso on ordered components: as a term of a loss, and as a proximal step (Maestro)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowrank_optim.nn.ordered import OrderedLinear, row_norms, tail_norms
from lowrank_optim.sharding.dtensor import dense_sharding, local


class OrderedLayer(NamedTuple):
    """Modules with the same two factors, under the name of the first."""

    path: str
    modules: list[OrderedLinear]

    @property
    def rank(self) -> int:
        """r."""
        return self.modules[0].rank

    @property
    def factors(self) -> list[nn.Parameter]:
        """Both of them."""
        return [self.modules[0].in_factor, self.modules[0].out_factor]


def ordered_layers(model: nn.Module) -> list[OrderedLayer]:
    """The ordered layers of a model.

    Raises:
        ValueError: there are none.
    """
    found: dict[int, OrderedLayer] = {}
    for path, module in model.named_modules():
        if isinstance(module, OrderedLinear):
            found.setdefault(id(module.in_factor), OrderedLayer(path, [])).modules.append(module)
    if not found:
        raise ValueError(f"{type(model).__name__} has no ordered layer; make some with lowrank_optim.nn.ordered_")
    return list(found.values())


def ordered_penalty(model: nn.Module) -> Tensor:
    """Σ over ordered layers and b = 1 … r of ‖U_{b:}‖ + ‖V_{b:}‖, where b: is component b and all after it: 0-d, to add to a loss.

    A group lasso on nested groups, which weighs later components more. Its gradient for v_b is v_b Σ_{k≤b} 1/‖V_{k:}‖, and 0 where a
    tail is 0. Layers with tied weights count once. Computed in float32 or wider. Adam rescales it with the gradient of the loss;
    `OrderedRanks.prox_` is exact for any optimizer.

    Raises:
        ValueError: the model has no ordered layer.

    Memory: a few numbers for each component of both factors (r×m and r×n), and in backward one copy of a factor.

    Paper: Horváth et al., "Maestro: Uncovering Low-Rank Structures via Trainable Decomposition", ICML 2024, arXiv:2308.14929.
    """
    layers = ordered_layers(model)
    device = layers[0].factors[0].device
    norms = [tail_norms(row_norms(factor)).sum() for layer in layers for factor in layer.factors]
    return torch.stack([norm.to(device) for norm in norms]).sum()


@torch.no_grad()
def proximal_step_(factors: list[nn.Parameter], step_size: float) -> None:
    """The proximal step of step_size·Σ_b ‖F_{b:}‖ for each factor F, in place (`OrderedRanks.prox_`)."""
    for factor in factors:
        if factor.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"factors are {factor.dtype}, in which a small shrinkage is rounded away; keep them in float32 (with autocast), or "
                "add ordered_penalty(model) to the loss"
            )
    if not factors:
        return
    found = [row_norms(factor) for factor in factors]
    joined = torch.cat([norms.to(found[0].device) for norms in found]).to("cpu", torch.float64)
    norms = joined.split([len(each) for each in found])
    kept = prox_factors(nn.utils.rnn.pad_sequence(list(norms)), step_size)
    for factor, scale in zip(factors, kept.unbind(1), strict=True):
        rows = dense_sharding(factor).part(scale[: factor.shape[0]].unsqueeze(1), -2)
        local(factor).mul_(rows.to(factor.device, factor.dtype))


def prox_factors(norms: Tensor, step_size: float) -> Tensor:
    """What each component is multiplied by in the proximal step; norms r×f, of f factors, padded with zeros."""
    rest = norms.new_zeros(norms.shape[1:])
    kept = torch.empty_like(norms)
    for b in reversed(range(len(norms))):
        whole = torch.hypot(norms[b], rest)  # of the tail as it is by now
        rest = (whole - step_size).clamp_min_(0.0)
        kept[b] = torch.where(whole > 0, rest / whole, 1.0)
    return kept.cumprod(0)
