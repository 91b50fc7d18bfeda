"""The layer of SLTrain: a linear layer with weight s·B A + S."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank_optim.groups.roles import Role
from lowrank_optim.kernels import compute_dtype, cpu_tensor, outside_graph
from lowrank_optim.kernels.counter_rng import (
    PURPOSE_FACTOR,
    PURPOSE_VALUES,
    make_key,
    signed_key,
    uniform,
    unsigned_key,
)
from lowrank_optim.nn.reparametrized import ReparametrizedLinear
from lowrank_optim.nn.sparse_low_rank_product import SparseLowRankProduct
from lowrank_optim.nn.supports import (
    ColumnSupport,
    SeededSupport,
    StoredSupport,
    Support,
    column_support,
    linear_indices,
    stored_columns,
    support_from_indices,
    support_from_rows,
    support_key,
    uniform_support,
)

SupportName = Literal["random", "uniform", "columns", "residual"]

STRATIFIED = 1
"""The scheme of a support that a seed says, as a checkpoint stores it."""

STORED = ("sparse_index", "sparse_rows", "sparse_columns")
"""Buffers of supports that are stored."""


class SparseLowRankLinear(ReparametrizedLinear):
    """A linear layer with weight W = s·B A + S: low rank plus sparse, the support of S fixed (SLTrain).

    y = s·(x Aᵀ) Bᵀ + x Sᵀ + b; neither W nor its gradient is made (`sparse_low_rank_product`). A and the values of S start uniform in
    ±1/√n, B at 0, so that W starts as S alone. Numbers and support are functions of (seed, position).

    Parameters: `lora_A` (rank×n), `lora_B` (m×rank), `sparse_value` (entries of S, row by row), `bias`; those that would be empty are
    None. `scaling` (1,) with `trainable_scaling`: s = tanh(scaling), 1 at the start.

    Args:
        in_features, out_features, bias, device, dtype: as of `nn.Linear`.
        rank: of B A; 0 leaves S alone.
        density: ⌊density·m·n⌋ entries in S, or max(1, round(density·n)) columns; 0 leaves B A alone.
        alpha: s = alpha/rank; None means s = 1.
        support: "random" (one entry from each of equal strata, from the seed, nothing stored), "uniform" (any subset equally likely;
            row pointers and columns are stored, in 2 bytes each where in_features ≤ 32768, else in 4), "columns" (whole columns,
            drawn at random), or a vector of ascending integers row·n + column in place of `density`.
        trainable_scaling: s is trained; `alpha` must be None.
        save_projection: x Aᵀ is saved for backward, b·N·rank bytes for N tokens, and not computed again: 2·N·rank·n operations less.
        seed, position: of the random numbers; `position` is the layer's number in the model.

    Raises:
        ValueError: a value out of range; the message says which.

    Memory: b·(rank·(m + n) + nnz) bytes at b bytes a number, for weights and for gradients each, and what the support stores. In a
    pass: 2 or 4 bytes per entry for the columns of a "random" support, and matrices of tokens × features. The C++ kernels have
    for each thread 16 tokens × n numbers of float32, or 768 KiB if that is more; Triton's have an integer for 32 elements of W or
    more. Without compiled kernels there are two tiles, each of at most a quarter of m×n and about a million elements, and 8 bytes
    per entry in it.

    Paper: Han et al., "SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining", arXiv:2406.02214.
    """

    converter = "lowrank_optim.nn.sltrain_(model, init='svd')"
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    sparse_value: nn.Parameter | None
    scaling: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int = 128,
        density: float = 0.03,
        alpha: float | None = None,
        bias: bool = True,
        support: SupportName | Tensor = "random",
        trainable_scaling: bool = False,
        save_projection: bool = False,
        seed: int = 0,
        position: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        given = isinstance(support, Tensor)
        check_numbers("", out_features, in_features, rank, 1.0 if given else density, alpha, trainable_scaling)
        if isinstance(support, str) and support not in ("random", "uniform", "columns"):
            raise ValueError(
                f"support is {support!r}; a new layer has 'random', 'uniform', 'columns' or a vector of indices"
            )
        self.rank, self.seed, self.position, self.alpha = rank, seed, position, alpha
        self._scale = alpha / rank if alpha is not None and rank else 1.0
        self.save_projection = save_projection
        self._seeded: SeededSupport | None = None

        def add(name: str, *shape: int) -> None:
            param = None if 0 in shape else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, param)

        add("lora_A", rank, in_features)
        add("lora_B", out_features, rank)
        where = self.lora_A.device if self.lora_A is not None else torch.empty(0, device=device).device
        drawn = self._draw(support, density, where)
        add("sparse_value", 0 if drawn is None else drawn.count)
        if self.sparse_value is not None and drawn is not None:
            self.set_support(drawn)
        if self.lora_A is None and self.sparse_value is None:
            raise ValueError("rank is 0 and there are no indices: nothing would be trained")
        add("scaling", int(trainable_scaling))
        add("bias", out_features if bias else 0)
        self.reset_parameters()

    def _draw(self, support: SupportName | Tensor, density: float, device: torch.device) -> Support | None:
        m, n, key = self.out_features, self.in_features, support_key(self.seed, self.position)
        if isinstance(support, Tensor):
            return support_from_indices(m, n, support.to(device))
        if density == 0:
            return None
        if device.type == "meta" and support != "random":
            raise ValueError(f"support={support!r} cannot be drawn on the meta device; support='random' can")
        if support == "columns":
            return column_support(m, n, max(1, round(density * n)), key, device)
        count = math.floor(density * m * n)
        return SeededSupport(m, n, count, key) if support == "random" else uniform_support(m, n, count, key, device)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The initial numbers: A, the values and the bias uniform in ±1/√n, B = 0, θ = 1."""
        bound = 1 / math.sqrt(self.in_features)
        for stream, param in enumerate((self.lora_A, self.sparse_value, self.bias)):
            if param is not None and not param.is_meta:
                purpose = PURPOSE_VALUES if param is self.sparse_value else PURPOSE_FACTOR
                draw = uniform(make_key(self.seed, self.position, stream, purpose), tuple(param.shape), param.device)
                param.copy_(draw.mul_(2 * bound).sub_(bound))
        if self.lora_B is not None:
            self.lora_B.zero_()
        if self.scaling is not None:
            self.scaling.fill_(1)

    # The support -------------------------------------------------------------------------------------------------------------

    @property
    def entries(self) -> Support | None:
        """Where the entries of S are; None without any."""
        if self.sparse_value is None:
            return None
        if self._seeded is not None:
            return self._seeded
        buffers, m, n = self._buffers, self.out_features, self.in_features
        if (columns := buffers.get("sparse_columns")) is not None:
            return ColumnSupport(m, n, columns)
        pointers, index = buffers["sparse_rows"], buffers["sparse_index"]
        assert pointers is not None  # set_support set both
        assert index is not None
        return StoredSupport(m, n, pointers, index if index.dim() == 1 else index.view(torch.int16).view(-1))

    def set_support(self, support: Support) -> None:
        """Take another support with as many entries; the values stay as they are."""
        if self.sparse_value is None or support.count != self.sparse_value.numel():
            have = 0 if self.sparse_value is None else self.sparse_value.numel()
            raise ValueError(f"the support has {support.count} entries, the layer {have} values")
        for name in STORED:
            self._buffers.pop(name, None)
        self._seeded = support if isinstance(support, SeededSupport) else None
        device = self.sparse_value.device
        if isinstance(support, ColumnSupport):
            self.register_buffer("sparse_columns", support.columns.to(device, torch.int32))
        elif isinstance(support, StoredSupport):
            self.register_buffer("sparse_index", stored_columns(support).to(device))
            self.register_buffer("sparse_rows", support.pointers.to(device, torch.int32))

    # The passes --------------------------------------------------------------------------------------------------------------

    @property
    def scale(self) -> Tensor:
        """s, 0-d float64."""
        if self.scaling is None:
            return cpu_tensor(self._scale, torch.float64)
        return self.scaling.detach().double().tanh().view(())

    def forward(self, x: Tensor) -> Tensor:
        """y = s·(x Aᵀ) Bᵀ + x Sᵀ + b, in the type of x, or in autocast's."""
        self.check_input(x)
        return outside_graph(self._product, x)  # type: ignore[no-any-return]

    def _product(self, x: Tensor) -> Tensor:
        first = self.sparse_value if self.lora_A is None else self.lora_A
        assert first is not None  # a layer has factors or values
        kind, compute, result = x.device.type, first.dtype, x.dtype
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 and x.is_floating_point():
            compute = result = torch.get_autocast_dtype(kind)
        out: Tensor = SparseLowRankProduct.apply(
            x,
            self.lora_A,
            self.lora_B,
            self.sparse_value,
            self.bias,
            self.scaling if self.lora_A is not None else None,
            self._scale,
            self.entries,
            self.save_projection,
            compute,
            result,
        )
        return out

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W = s·B A + S, m×n: the product in float32 (float64 for float64 layers), rounded once."""
        first = self.sparse_value if self.lora_A is None else self.lora_A
        assert first is not None
        wide, m, n = compute_dtype(first.dtype), self.out_features, self.in_features
        weight = torch.zeros(m, n, dtype=wide, device=first.device)
        if self.lora_A is not None and self.lora_B is not None:
            scale = self._scale if self.scaling is None else torch.tanh(self.scaling.to(wide))
            torch.matmul(self.lora_B.to(wide), self.lora_A.to(wide) * scale, out=weight)
        if (entries := self.entries) is not None and self.sparse_value is not None and not weight.is_meta:
            weight.view(-1).index_add_(0, linear_indices(entries, weight.device), self.sparse_value.to(wide))
        return weight.to(first.dtype)

    def parameter_roles(self) -> Mapping[str, Role]:
        """Factors decay half as much each, so that B A decays as a dense matrix would; the values decay as one."""
        roles = {"lora_A": Role(decay_factor=0.5), "lora_B": Role(decay_factor=0.5), "sparse_value": Role()}
        return {name: role for name, role in roles.items() if getattr(self, name) is not None}

    def extra_repr(self) -> str:
        values = 0 if self.sparse_value is None else self.sparse_value.numel()
        return f"{super().extra_repr()}, rank={self.rank}, values={values}, bias={self.bias is not None}"

    # The state dict ----------------------------------------------------------------------------------------------------------

    @property
    def support(self) -> Tensor:
        """(scheme, key, number of entries) of a support that a seed says, (3,) int64: what a checkpoint stores of it."""
        if self._seeded is None:
            raise RuntimeError("the support of this layer is stored: sparse_index and sparse_rows, or sparse_columns")
        return cpu_tensor([STRATIFIED, signed_key(self._seeded.key), self._seeded.count], torch.int64)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._seeded is not None:
            destination[f"{prefix}support"] = self.support
        if self.scaling is None and self.lora_A is not None:
            destination[f"{prefix}scale"] = self.scale

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        _, strict, missing_keys, _, error_msgs = rest
        try:
            missing = self._load_support(state_dict, prefix) + self._load_scale(state_dict, prefix)
            missing_keys.extend(missing if strict else [])
        except ValueError as error:
            error_msgs.append(f"{prefix.rstrip('.')}: {error}")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _load_support(self, state: dict[str, Any], prefix: str) -> list[str]:
        """Take the support out of a state dict, of whatever kind it is there; the keys that are missing."""
        if self.sparse_value is None:
            return []
        m, n = self.out_features, self.in_features
        seeded, index, rows, columns = (state.get(prefix + name) for name in ("support", *STORED))
        found: Support
        if seeded is not None:
            state.pop(f"{prefix}support")
            if seeded.is_meta:
                return []
            if seeded.shape != (3,) or int(seeded[0]) != STRATIFIED:
                raise ValueError(f"support is {seeded.tolist()}; needed: [{STRATIFIED}, key, number of entries]")
            found = SeededSupport(m, n, int(seeded[2]), unsigned_key(int(seeded[1])))
        elif columns is not None:
            found = ColumnSupport(m, n, support_from_indices(1, n, columns).columns)
        elif index is not None and rows is not None:
            found = support_from_rows(m, n, rows, index.view(torch.int16).view(-1) if index.dim() == 2 else index)
            state[f"{prefix}sparse_index"] = stored_columns(found)
        elif index is not None:  # as the released code stores it: row·n + column
            found = support_from_indices(m, n, index)
            state[f"{prefix}sparse_index"], state[f"{prefix}sparse_rows"] = stored_columns(found), found.pointers
            if self.scaling is None and self.lora_A is not None and f"{prefix}scale" not in state:
                if self.alpha is None:
                    raise ValueError(
                        "a checkpoint of the released code does not say alpha; give it to sltrain_(alpha=…)"
                    )
                state[f"{prefix}scale"] = self.scale
        else:
            return [f"{prefix}support"] if self._seeded is not None else []
        self.set_support(found)
        return []

    def _load_scale(self, state: dict[str, Any], prefix: str) -> list[str]:
        name = f"{prefix}scale"
        if self.scaling is not None or self.lora_A is None:
            return []
        if f"{prefix}scaling" in state:
            raise ValueError("the checkpoint trained s (scaling); build the layer with trainable_scaling=True")
        if (scale := state.pop(name, None)) is None:
            return [name]
        if not scale.is_meta:
            self._scale = float(scale)
        return []


def check_numbers(
    path: str, m: int, n: int, rank: int, density: float, alpha: float | None, trainable_scaling: bool
) -> None:
    """Raise ValueError, with the layer's name, for a rank, density or alpha that an m×n layer cannot have."""
    where = f" for {path}, {m}×{n}" if path else f" for a layer of {m}×{n}"
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= min(m, n):
        raise ValueError(f"rank is {rank!r}{where}; it must be an integer from 0 to {min(m, n)}")
    if not 0 <= density <= 1:
        raise ValueError(f"density is {density!r}{where}; it must be from 0 to 1")
    if rank == 0 and density == 0:
        raise ValueError(f"rank and density are both 0{where}: nothing would be trained")
    if rank == 0 and density * m * n < 1:
        raise ValueError(f"rank is 0 and density {density!r} leaves no entry{where}: nothing would be trained")
    if rank == 0 and trainable_scaling:
        raise ValueError(f"rank is 0{where}, so trainable_scaling has nothing to scale")
    if alpha is not None and not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha is {alpha!r}; it must be positive, or None for s = 1")
    if alpha is not None and trainable_scaling:
        raise ValueError(
            f"alpha is {alpha!r}, but with trainable_scaling s = tanh(θ) starts at tanh(1); leave alpha out"
        )
