"""Layers with low-rank weights: a linear layer and an embedding of two factors, and a pair of factors beside another layer."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_optim.groups.roles import Role
from lowrank_optim.kernels import compute_dtype
from lowrank_optim.nn.adapted import AdaptedLinear, wide
from lowrank_optim.nn.plain_layers import kind_of
from lowrank_optim.nn.reparametrized import ReparametrizedLayer, ReparametrizedLinear

HALF_DECAY = Role(decay_factor=0.5)
"""Of two factors: their product decays as a dense matrix would."""

Device = torch.device | str | int | None


def check_rank(path: str, rank: int, m: int, n: int) -> None:
    """Raise ValueError unless 1 ≤ rank ≤ min(m, n)."""
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(m, n):
        where = f"{path}: " if path else ""
        raise ValueError(f"{where}rank is {rank!r}; it must be an integer from 1 to min({m}, {n}) = {min(m, n)}")


def check_rank_option(rank: Any, needed: bool = False) -> None:
    """Raise ValueError unless it is an integer of at least 1, a fraction in (0, 1), or None where none is needed."""
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    if (needed or rank is not None) and not whole and not (isinstance(rank, float) and 0 < rank < 1):
        raise ValueError(f"rank is {rank!r}; it must be an integer of at least 1, or a fraction in (0, 1)")


def resolved_rank(path: str, rank: int | float, m: int, n: int) -> int:
    """The rank for an m×n matrix, checked."""
    found = max(1, round(rank * min(m, n))) if isinstance(rank, float) else rank
    check_rank(path, found, m, n)
    return found


def apply_pair(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """(x Aᵀ) Bᵀ + b, in the type of x, or in autocast's."""
    if torch.is_autocast_enabled(x.device.type) or x.dtype == a.dtype:
        return F.linear(F.linear(x, a), b, bias)
    return F.linear(F.linear(x.to(a.dtype), a), b, bias).to(x.dtype)


def product(b: Tensor, a: Tensor) -> Tensor:
    """B A, in float32 or wider, rounded once."""
    wide = compute_dtype(a.dtype)
    return (b.to(wide) @ a.to(wide)).to(a.dtype)


class LowRankLinear(ReparametrizedLinear):
    """A linear layer with weight W = B A of rank r: y = (x Aᵀ) Bᵀ + b.

    Parameters: `lora_A` (r×n), `lora_B` (m×r), `bias` (m). Both start uniform, A in ±1/√n and B in ±√(3/r), which gives the entries
    of W the variance of `nn.Linear`.

    Args:
        in_features, out_features, bias, device, dtype: as of `nn.Linear`.
        rank: r, from 1 to min(m, n).

    Raises:
        ValueError: a rank out of range.

    Memory: b·(r·(m + n) + m) bytes at b bytes a number, for weights and for gradients each. Backward keeps x and x Aᵀ.
    """

    converter = "lowrank_optim.nn.factorize_"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        check_rank("", rank, out_features, in_features)
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        vector = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", vector)
        self.reset_parameters()

    @property
    def rank(self) -> int:
        """r."""
        return self.lora_A.shape[0]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The initial numbers."""
        bound = 1 / math.sqrt(self.in_features)
        self.lora_A.uniform_(-bound, bound)
        self.lora_B.uniform_(-math.sqrt(3 / self.rank), math.sqrt(3 / self.rank))
        if self.bias is not None:
            self.bias.uniform_(-bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """y = (x Aᵀ) Bᵀ + b, in the type of x, or in autocast's."""
        return apply_pair(x, self.lora_A, self.lora_B, self.bias)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W = B A, m×n."""
        return product(self.lora_B, self.lora_A)

    def parameter_roles(self) -> Mapping[str, Role]:
        """Factors decay half as much each."""
        return {"lora_A": HALF_DECAY, "lora_B": HALF_DECAY}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, bias={self.bias is not None}"


class LowRankEmbedding(ReparametrizedLayer):
    """An embedding of rank r: a token gets its row of a narrow table (V×r), times Bᵀ (r×d), plus a bias.

    Parameters: `table` (V×r), `lora_B` (d×r), `bias` (d) or None. `padding_idx` keeps gradients from one row of the table.

    Args:
        num_embeddings, embedding_dim, padding_idx, scale_grad_by_freq, sparse, device, dtype: as of `nn.Embedding`; `sparse` is for
            the gradient of the table.
        rank: r, from 1 to min(V, d).
        bias: whether there is one.

    Raises:
        ValueError: a rank out of range.

    Memory: b·(r·(V + d) + d) bytes at b bytes a number.
    """

    converter = "lowrank_optim.nn.factorize_"
    bias: nn.Parameter | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        rank: int,
        bias: bool = False,
        padding_idx: int | None = None,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_rank("", rank, num_embeddings, embedding_dim)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.scale_grad_by_freq, self.sparse = scale_grad_by_freq, sparse
        self.table = nn.Parameter(torch.empty(num_embeddings, rank, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(embedding_dim, rank, device=device, dtype=dtype))
        vector = nn.Parameter(torch.empty(embedding_dim, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", vector)
        self.reset_parameters()

    @property
    def rank(self) -> int:
        """r."""
        return self.table.shape[1]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The table normal with variance 1, B normal with variance 1/r, the bias 0: entries have the variance of `nn.Embedding`."""
        self.table.normal_()
        self.lora_B.normal_(0, 1 / math.sqrt(self.rank))
        if self.bias is not None:
            self.bias.zero_()
        if self.padding_idx is not None:
            self.table[self.padding_idx].zero_()

    def forward(self, ids: Tensor) -> Tensor:
        """table[ids] Bᵀ + bias, in the type of the table."""
        narrow = F.embedding(
            ids, self.table, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq, sparse=self.sparse
        )
        return F.linear(narrow, self.lora_B, self.bias).to(self.table.dtype)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The table of `nn.Embedding`, V×d."""
        wide = compute_dtype(self.table.dtype)
        weight = self.table.to(wide) @ self.lora_B.to(wide).mT
        if self.bias is not None:
            weight += self.bias.to(wide)
        return weight.to(self.table.dtype)

    def plain(self, weight: nn.Parameter) -> nn.Module:
        """An `nn.Embedding` with this weight."""
        made = nn.Embedding(
            self.num_embeddings,
            self.embedding_dim,
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
            device="meta",
        )
        made.weight = weight
        return made

    def weight_parameters(self) -> list[nn.Parameter]:
        """All of them: the bias is a part of every row."""
        return list(self.parameters())

    def parameter_roles(self) -> Mapping[str, Role]:
        """Factors decay half as much each."""
        return {"table": HALF_DECAY, "lora_B": HALF_DECAY}

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}, bias={self.bias is not None}"


class CompensatedLinear(AdaptedLinear):
    """A linear layer and a pair of factors beside it: y = base(x) + (x Aᵀ) Bᵀ.

    Submodule: `base`, the layer as it was, with its bias: an `nn.Linear` (whose weight may be a `QuantizedWeight`), a Conv1D or a
    `LowRankLinear`. Parameters: `lora_A` (r×n), `lora_B` (m×r), in the type of the base; both 0 at the start. Its hooks stay with
    the base; `take_hooks_of_base` brings them here.

    Args:
        base: the layer.
        rank: r, from 1 to min(m, n).

    Raises:
        ValueError: a rank out of range, or another kind of layer.

    Memory: the base, and b·r·(m + n) bytes at b bytes a number.
    """

    converter = "lowrank_optim.nn.compensate_"
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, base: nn.Module, *, rank: int) -> None:
        if kind_of(base) not in ("linear", "conv1d") and not isinstance(base, LowRankLinear):
            raise ValueError(f"base is a {type(base).__name__}; it must be an nn.Linear, a Conv1D or a LowRankLinear")
        super().__init__(base)
        m, n, device = self.out_features, self.in_features, self.like().device
        check_rank("", rank, m, n)
        self.train_(lora_A=torch.zeros(rank, n, device=device), lora_B=torch.zeros(m, rank, device=device))
        self.training = base.training

    @property
    def rank(self) -> int:
        """r, of the pair."""
        return self.lora_A.shape[0]

    def added(self, x: Tensor) -> Tensor:
        """(x Aᵀ) Bᵀ."""
        return F.linear(F.linear(x, self.lora_A), self.lora_B)

    @torch.no_grad()
    def change(self) -> Tensor:
        """B A."""
        b, a = wide(self.lora_B, self.lora_A)
        return b @ a

    def parameter_roles(self) -> Mapping[str, Role]:
        """Factors decay half as much each."""
        return {"lora_A": HALF_DECAY, "lora_B": HALF_DECAY}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"
