"""`ordered_`: linear layers whose weight is a sum of components, kept in the order of their importance (Maestro)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_optim.groups.roles import Role
from lowrank_optim.kernels import compute_dtype, outside_graph
from lowrank_optim.nn.decompositions import best_of_rank, widened
from lowrank_optim.nn.low_rank import HALF_DECAY, Device, apply_pair, check_rank, product
from lowrank_optim.nn.reparametrized import (
    Patterns,
    ReparametrizedLinear,
    TakenLayer,
    matrix_of,
    replace_layers,
    take_layers,
)
from lowrank_optim.sharding.dtensor import is_sharded
from lowrank_optim.step.relayout import replace_data


class OrderedLinear(ReparametrizedLinear):
    """A linear layer with weight W = Σ_k u_k v_kᵀ, k = 1 … r, of which a forward pass may use the first b components only (Maestro).

        y = (x V_{:b}ᵀ) U_{:b} + bias

    Trained with b drawn anew in each step (`OrderedRanks`), the components take the order of their importance, so that the last ones
    can be dropped. r is min(m, n) at first and falls (`OrderedRanks.shrink_`); it may be 0, and then y is the bias.

    Parameters: `in_factor` (r×n), row k is v_k; `out_factor` (r×m), row k is u_k: the first b components are the first rows of both,
    views without copies. `bias` (m). A checkpoint has them as they are, and the layer takes the rank of the checkpoint that it loads.

    Args:
        in_features, out_features, bias, device, dtype: as of `nn.Linear`.
        rank: r; None means min(m, n).

    Raises:
        ValueError: a rank out of range.

    Memory: b·(r·(m + n) + m) bytes at b bytes a number, for weights and for gradients each. With r = min(m, n) that is more than the
    dense matrix has, twice as much if it is square, until the ranks have fallen. Backward keeps x and x V_{:b}ᵀ.

    Paper: Horváth et al., "Maestro: Uncovering Low-Rank Structures via Trainable Decomposition", ICML 2024, arXiv:2308.14929.
    """

    converter = "lowrank_optim.nn.ordered_"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int | None = None,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        rank = min(out_features, in_features) if rank is None else rank
        check_rank("", rank, out_features, in_features)
        self._active: int | None = None
        self.in_factor = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.out_factor = nn.Parameter(torch.empty(rank, out_features, device=device, dtype=dtype))
        vector = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", vector)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The factors of a matrix such as `nn.Linear` starts with, uniform in ±1/√n, and a bias as there."""
        if self.in_factor.is_meta:
            return
        bound = self.in_features**-0.5
        self.set_weight(self.in_factor.new_empty(self.out_features, self.in_features).uniform_(-bound, bound))
        if self.bias is not None:
            self.bias.uniform_(-bound, bound)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Take the best approximation of a matrix m×n: its leading singular vectors, each times the root of the singular value."""
        left, right = best_of_rank(widened(weight), self.rank)
        self.out_factor.copy_(left.mT)
        self.in_factor.copy_(right)

    @property
    def rank(self) -> int:
        """r, how many components there are."""
        return self.in_factor.shape[0]

    @property
    def active_rank(self) -> int:
        """b, how many components forward uses. Set it to an integer from 0 to r; None uses all."""
        return self.rank if self._active is None else min(self._active, self.rank)

    @active_rank.setter
    def active_rank(self, rank: int | None) -> None:
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= self.rank):
            raise ValueError(f"active_rank is {rank!r}; it must be an integer from 0 to {self.rank}, or None for all")
        self._active = rank

    def importance(self) -> Tensor:
        """‖U_{b:}‖·‖V_{b:}‖ for b = 1 … r, where b: is b and all after it; (r,), in float32 or wider, and nowhere rising."""
        with torch.no_grad():
            return tail_norms(row_norms(self.out_factor)) * tail_norms(row_norms(self.in_factor))

    def forward(self, x: Tensor) -> Tensor:
        """y = (x V_{:b}ᵀ) U_{:b} + bias, in the type of x, or in autocast's."""
        return outside_graph(self._product, x)  # type: ignore[no-any-return]  # each b would be compiled for itself

    def _product(self, x: Tensor) -> Tensor:
        active = self.active_rank
        if active == self.rank:  # a slice would fill a gradient with zeros first
            return apply_pair(x, self.in_factor, self.out_factor.mT, self.bias)
        return apply_pair(x, self.in_factor[:active], self.out_factor[:active].mT, self.bias)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W = Uᵀ V, m×n, of all components."""
        return product(self.out_factor.mT, self.in_factor)

    def parameter_roles(self) -> Mapping[str, Role]:
        """Factors decay half as much each."""
        return {"in_factor": HALF_DECAY, "out_factor": HALF_DECAY}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, bias={self.bias is not None}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        found = [state_dict.get(f"{prefix}{name}") for name in ("in_factor", "out_factor")]
        own = (self.in_factor, self.out_factor)
        limit = min(self.out_features, self.in_features)
        if all(
            isinstance(new, Tensor) and new.dim() == 2 and new.shape[1] == old.shape[1] and not is_sharded(old)
            for new, old in zip(found, own, strict=True)
        ):
            ranks = {new.shape[0] for new in found if new is not None}
            if len(ranks) == 1 and (rank := ranks.pop()) != self.rank and rank <= limit:
                for param in own:
                    replace_data(param, param.new_empty(rank, param.shape[1]))
        super()._load_from_state_dict(state_dict, prefix, *args)


def row_norms(factor: Tensor) -> Tensor:
    """‖f_k‖ of every row (r,), in float32 or wider; of a sharded factor, the whole on every process."""
    norms: Tensor = torch.linalg.vector_norm(factor, dim=1, dtype=compute_dtype(factor.dtype))
    return norms.full_tensor() if is_sharded(norms) else norms  # type: ignore[attr-defined]


def tail_norms(norms: Tensor) -> Tensor:
    """√Σ_{k≥b} ‖f_k‖² for each b, from the norms of rows; the gradient is 0 where a tail is 0."""
    squares = norms.square().flip(0).cumsum(0).flip(0)
    there = squares != 0  # NaN stays NaN
    return torch.where(there, squares, 1.0).sqrt() * there


def ordered_(model: nn.Module, *, include: Patterns = None, exclude: Patterns = None) -> nn.Module:
    """Give the linear layers of a model weights that are sums of ordered components, in place, as Maestro. Returns the model.

    W = Σ_k u_k v_kᵀ over all min(m, n) components, from the singular value decomposition of the weight that a layer has, so that the
    model computes what it did. Training with `OrderedRanks` and `ordered_penalty` (or `OrderedRanks.prox_`) orders the components and
    makes the last ones zero; `OrderedRanks.shrink_` drops them. Call it before the optimizer is built; any optimizer will do.
    `param_groups` gives both factors half the weight decay. `merge_` gives plain layers back.

    Args:
        model: its plain `nn.Linear`s and Conv1Ds of transformers become `OrderedLinear`s. Biases, hooks, device and type are kept;
            layers with tied weights share their factors; frozen weights stay frozen. Weights on the meta device give factors without
            numbers.
        include: patterns of the weights to take, as in `param_groups`; None takes every linear layer but output heads.
        exclude: patterns of weights to leave alone.

    Raises:
        TypeError: no nn.Module.
        ValueError: a pattern that matches nothing; no layer to take; a weight that is not finite, coded, sharded, or tied to a layer
            of another kind.

    Memory: b·d·(m + n) bytes for each layer at b bytes a number, d = min(m, n): up to twice the dense matrix, for weights, gradients
    and state each, until `shrink_`. While it runs, a few float64 matrices (float32 on accelerators) of one layer.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> model = lo.nn.ordered_(model)
        >>> optimizer = lo.LowRankOptimizer(lo.param_groups(model, rank=None), rule="adam", lr=1e-3)
        >>> ranks, x = lo.nn.OrderedRanks(model, seed=0), torch.randn(32, 64)
        >>> with ranks.sample():
        ...     loss = (model(x) - x).square().mean() + 1e-4 * lo.nn.ordered_penalty(model)
        ...     loss.backward()
        >>> optimizer.step()
        >>> ranks.shrink_(threshold=1e-7, optimizer=optimizer)
        {'0': (64, 64), '2': (64, 64)}

    Paper: Horváth et al., "Maestro: Uncovering Low-Rank Structures via Trainable Decomposition", ICML 2024, arXiv:2308.14929.
    """
    taken = take_layers(model, include, exclude, ("linear", "conv1d"), meta=True)
    for path, _, module in taken:
        if not module.weight.is_meta and not bool(torch.isfinite(module.weight).all()):
            raise ValueError(f"{path}.weight is not finite; it has no singular value decomposition")
    replace_layers(model, taken, _make)
    return model


def _make(layer: TakenLayer) -> OrderedLinear:
    old = layer.module
    m, n = matrix_of(old).shape
    with torch.device("meta"):
        new = OrderedLinear(n, m, bias=False, dtype=old.weight.dtype)
    new.plain_class = type(old)
    new.to_empty(device=old.weight.device)
    if not old.weight.is_meta:
        new.set_weight(matrix_of(old))
    for param in new.parameters():
        param.requires_grad_(old.weight.requires_grad)
    return new
