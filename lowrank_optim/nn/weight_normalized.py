"""`weight_normalized_`: linear layers whose weight is a trained magnitude times a normalised low-rank update (GradNormLoRP, DoRA)."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank_optim.groups.roles import Role
from lowrank_optim.kernels import as_python, outside_graph
from lowrank_optim.kernels.counter_rng import PURPOSE_FACTOR, make_key, uniform
from lowrank_optim.nn.factorize import freeze_all_but
from lowrank_optim.nn.low_rank import HALF_DECAY, check_rank, check_rank_option, resolved_rank
from lowrank_optim.nn.plain_layers import kind_of
from lowrank_optim.nn.quantized_weight import QuantizedWeight
from lowrank_optim.nn.reparametrized import (
    Patterns,
    ReparametrizedLinear,
    TakenLayer,
    move_hooks,
    put_layers,
    take_layers,
)
from lowrank_optim.nn.weight_normalized_product import WeightNormalizedProduct, direction_norms, merged_weight
from lowrank_optim.sharding.dtensor import is_sharded

Norm = Literal["column", "row"]


class WeightNormalizedLinear(ReparametrizedLinear):
    """A linear layer with weight W = M ∘ V/‖V‖ and V = W₀ + B A: a base, a low-rank update, and magnitudes that are trained apart.

    ‖V‖ are the norms of the columns of V, and M (n) their lengths in W; with norm="row", of the rows, and M has m. A starts uniform
    in ±1/√n, B at 0 and M at the norms of W₀, so that W starts as W₀. Norms are taken in float32 or wider, at least 1e-12: columns
    of zeros stay zero. Neither W nor its gradient is made (`weight_normalized_product`).

    Submodule: `base`, the layer as it was, with its bias: an `nn.Linear` (whose weight may be a `QuantizedWeight`) or a Conv1D.
    Parameters: `lora_A` (r×n), `lora_B` (m×r), `magnitude` (n or m), in the type of the base. Its hooks stay with the base, which is
    read and never called; `take_hooks_of_base` brings them here.

    Args:
        base: the layer.
        rank: r, from 1 to min(m, n).
        norm: "column" (one magnitude for each input, as the paper has it) or "row" (for each output, as the DoRA of peft).
        detach_norm: gradients take ‖V‖ for constant, as DoRA's do: another direction, and r·m·n operations less.
        seed, position: of the initial A; `position` is the layer's number in the model.

    Raises:
        ValueError: a rank out of range, an unknown norm, or another kind of layer.

    Memory: the base, and b·(r·(m + n) + n) bytes at b bytes a number, for trained weights and their gradients each. Backward keeps
    x; with norm="row" also an output, N×m for N tokens. A pass has some rows of V in float32 besides (1 MiB to 4 MiB on a CPU, 16 MiB
    elsewhere), and the decoded base where it is in 8 bits.

    Paper: Huang et al., "Gradient Weight-normalized Low-rank Projection for Efficient LLM Training", arXiv:2412.19616.
    """

    converter = "lowrank_optim.nn.weight_normalized_"
    reads_inner_layers = True

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int,
        norm: Norm = "column",
        detach_norm: bool = False,
        seed: int = 0,
        position: int = 0,
    ) -> None:
        if kind_of(base) not in ("linear", "conv1d"):
            raise ValueError(f"base is a {type(base).__name__}; it must be an nn.Linear or a Conv1D")
        check_norm(norm)
        weight: Any = base.weight
        m, n = weight.shape if kind_of(base) == "linear" else weight.shape[::-1]
        super().__init__(n, m)
        check_rank("", rank, m, n)
        self.plain_class = type(base)
        self.norm, self.detach_norm, self.seed, self.position = norm, detach_norm, seed, position
        self.training = base.training
        self.base = base
        like = {"device": weight.device, "dtype": weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(rank, n, **like))
        self.lora_B = nn.Parameter(torch.empty(m, rank, **like))
        self.magnitude = nn.Parameter(torch.empty(n if norm == "column" else m, **like))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The initial numbers, for which W is W₀."""
        if self.lora_A.is_meta:
            return
        key = make_key(self.seed, self.position, 0, PURPOSE_FACTOR)
        draw = uniform(key, tuple(self.lora_A.shape), self.lora_A.device)
        self.lora_A.copy_(draw.mul_(2).sub_(1).div_(self.in_features**0.5))
        self.lora_B.zero_()
        self.magnitude.copy_(direction_norms(self.base_weight, self.lora_A, self.lora_B, self.norm == "row"))

    def take_hooks_of_base(self) -> None:
        """The forward and backward hooks and the training flag of the base, which has no hooks then."""
        move_hooks(self.base, self)

    @property
    def base_weight(self) -> Tensor:
        """W₀, m×n, as it is stored."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight if self.plain_class is nn.Linear else weight.mT

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        """That of the base."""
        return self.base.bias  # type: ignore[return-value]

    @property
    def rank(self) -> int:
        """r, of B A."""
        return self.lora_A.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """y = x (M ∘ V/‖V‖)ᵀ + b, in the type of x, or in autocast's."""
        self.check_input(x)
        return outside_graph(self._product, x)  # type: ignore[no-any-return]

    def _product(self, x: Tensor) -> Tensor:
        if is_sharded(self.base_weight) or is_sharded(self.lora_A):
            raise RuntimeError(
                "the parameters of a WeightNormalizedLinear are sharded within its forward (by tensor parallelism, or because its "
                "base is sharded by itself); apply fully_shard to the layer or a module around it"
            )
        kind, compute, result = x.device.type, self.lora_A.dtype, x.dtype
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 and x.is_floating_point():
            compute = result = torch.get_autocast_dtype(kind)
        out: Tensor = WeightNormalizedProduct.apply(
            x,
            self.base_weight,
            self.lora_A,
            self.lora_B,
            self.magnitude,
            self.bias,
            self.norm == "row",
            self.detach_norm,
            compute,
            result,
        )
        return out

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W = M ∘ V/‖V‖, m×n."""
        return merged_weight(self.base_weight, self.lora_A, self.lora_B, self.magnitude, self.norm == "row")

    def parameter_roles(self) -> Mapping[str, Role]:
        """Factors decay half as much each, so that B A decays as one matrix, towards W₀; magnitudes do not decay."""
        return {"lora_A": HALF_DECAY, "lora_B": HALF_DECAY, "magnitude": Role("no_decay")}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, norm={self.norm!r}, detach_norm={self.detach_norm}"


def check_norm(norm: Any) -> None:
    """Raise ValueError for something else than "column" and "row"."""
    if norm not in ("column", "row"):
        raise ValueError(
            f"norm is {norm!r}; valid values are 'column' (a magnitude for each input) and 'row' (for each output)"
        )


def weight_normalized_(
    model: nn.Module,
    *,
    rank: int | float = 8,
    norm: Norm = "column",
    detach_norm: bool = False,
    train_base: bool = False,
    freeze_rest: bool = False,
    seed: int = 0,
    include: Patterns = None,
    exclude: Patterns = None,
) -> nn.Module:
    """Give the linear layers of a trained model the weight W = M ∘ (W₀ + B A)/‖W₀ + B A‖, in place (GradNormLoRP). Returns the model.

    W₀ is frozen and stays as it is stored, in 8 bits too; B (m×r), A (r×n) and the magnitudes M are trained, and W starts as W₀. Call
    it before the optimizer is built. The paper projects the gradients of both factors on both sides, and trains M by Adam; that is
    `GaLoreAdamW` with a pattern that names the factors (below). Without a pattern, `param_groups` trains them as they are, with half
    the weight decay each and none for M. `merge_` gives plain layers back.

    Args:
        model: its plain `nn.Linear`s and Conv1Ds of transformers become `WeightNormalizedLinear`s, around the layers as they were.
            Biases, hooks, device and type are kept; layers with tied weights share their parameters. Where a weight was frozen,
            everything that is made of it is frozen.
        rank: r, an integer, or a fraction in (0, 1) of the short side of each matrix.
        norm: ‖·‖ and M of each "column" of W, which belongs to an input (the paper), or of each "row" (peft's DoRA).
        detach_norm: gradients take the norm for constant.
        train_base: W₀ is trained, too, with a gradient of m×n.
        freeze_rest: train factors and magnitudes (and, with `train_base`, W₀) alone: all other parameters get `requires_grad=False`.
        seed: of the initial A, which is the same on every device and in every process.
        include: patterns of the weights to take, as in `param_groups`; None takes every linear layer but output heads.
        exclude: patterns of weights to leave alone.

    Raises:
        TypeError: no nn.Module.
        ValueError: a value out of range, with the layer's name; an unknown norm; a pattern that matches nothing; no layer to take; a
            weight that is not finite, sharded, or tied to a layer of another kind.

    Memory: b·(r·(m + n) + n) bytes for each layer at b bytes a number, and as much for gradients; W₀ as before, without gradient and
    state. Adam on factors projected on both sides to rank r' has 2·r'² numbers for each in place of 2·r·m, and the bases (m + r)·r'.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> model = lo.nn.weight_normalized_(lo.nn.quantize_weights_(model), rank=8, freeze_rest=True)
        >>> groups = lo.param_groups(model, rank=4, include=["lora_A", "lora_B"], proj_type="full")
        >>> optimizer = lo.GaLoreAdamW(groups, lr=1e-3)
        >>> [(name, tuple(param.shape)) for name, param in model[0].named_parameters() if param.requires_grad]
        [('lora_A', (8, 64)), ('lora_B', (256, 8)), ('magnitude', (64,))]

    Paper: Huang et al., "Gradient Weight-normalized Low-rank Projection for Efficient LLM Training", arXiv:2412.19616.
    """
    rank, seed = map(as_python, (rank, seed))
    check_rank_option(rank, needed=True)
    check_norm(norm)
    taken = take_layers(model, include, exclude, ("linear", "conv1d"), meta=True, coded=True)
    ranks = [_checked_rank(layer, rank) for layer in taken]
    trained: list[nn.Parameter] = []
    shared: dict[int, WeightNormalizedLinear] = {}
    made: dict[int, WeightNormalizedLinear] = {}
    for layer, found in zip(taken, ranks, strict=True):
        weight = layer.module.weight
        new = WeightNormalizedLinear(
            layer.module, rank=found, norm=norm, detach_norm=detach_norm, seed=seed, position=layer.position
        )
        if (first := shared.setdefault(id(weight), new)) is not new:
            new.lora_A, new.lora_B, new.magnitude = first.lora_A, first.lora_B, first.magnitude
        else:
            own = [new.lora_A, new.lora_B, new.magnitude]
            for param in own:
                param.requires_grad_(weight.requires_grad)
            trained += [param for param in [*own, *([weight] if train_base else [])] if weight.requires_grad]
        made[id(layer.module)] = new
    for layer in taken:  # only now, when nothing can fail any more, does the model change
        made[id(layer.module)].take_hooks_of_base()
        layer.module.weight.requires_grad_(layer.module.weight.requires_grad and train_base)
    put_layers(model, made)
    if freeze_rest:
        freeze_all_but(model, trained)
    return model


def _checked_rank(layer: TakenLayer, rank: int | float) -> int:
    """The rank of a layer's factors, if it can have them."""
    weight = layer.module.weight
    values = weight.scale if isinstance(weight, QuantizedWeight) else weight
    if not weight.is_meta and not bool(torch.isfinite(values).all()):
        raise ValueError(f"{layer.path}.weight is not finite; it has no norms")
    return resolved_rank(layer.path, rank, *weight.shape)
