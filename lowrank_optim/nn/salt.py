"""`salt_`: scale and shift the leading singular values of frozen weights, and add a low-rank change to the rest."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_optim.groups.roles import Role
from lowrank_optim.kernels import as_python
from lowrank_optim.kernels.counter_rng import PURPOSE_FACTOR, make_key, uniform
from lowrank_optim.nn.adapted import AdaptedLinear, scale_of, stored_number, wide
from lowrank_optim.nn.decompositions import leading_triplets
from lowrank_optim.nn.frozen_base import add_adapters_
from lowrank_optim.nn.low_rank import HALF_DECAY, check_rank_option, resolved_rank
from lowrank_optim.nn.reparametrized import Patterns, matrix_of


class SALTLinear(AdaptedLinear):
    """A frozen linear layer with scaled and shifted leading singular values, and a pair of factors in what they leave.

        ΔW = U_r diag(a ∘ σ + c) V_rᵀ + s·(I − U_r U_rᵀ) B A (I − V_r V_rᵀ)

    so that σ_i becomes (1 + a_i)·σ_i + c_i for i ≤ r, and B A touches no direction of these. Parameters: `scale` (r), a, and `shift`
    (r), c, both 0 at the start; `lora_A` (q×n), uniform in ±1/√n, and `lora_B` (m×q), 0. Frozen ones: `left` = U_r (m×r), `right` =
    V_rᵀ (r×n), `singular_values` (r). A state dict holds s under "scaling".

    Args:
        base: an `nn.Linear` (whose weight may be a `QuantizedWeight`) or a Conv1D; `salt_` freezes it.
        rank: r, an integer of at least 1, or a fraction in (0, 1) of min(m, n).
        lora_rank: q, from 1 to min(m, n) − r.
        alpha: s = alpha/lora_rank; None means s = 1.
        seed, position: of A.

    Raises:
        ValueError: another kind of layer; a rank out of range; an alpha that is not positive; a weight that is not finite.

    Memory: the base, and b·((r + q)·(m + n) + 3r) bytes at b bytes a number; 2r + q·(m + n) are trained. Backward keeps x, x V_r and
    x Aᵀ, and the factors as they are without the leading directions, b·q·(m + n) bytes.

    Paper: Elsayed et al., "SALT", arXiv:2503.16055.
    """

    converter = "lowrank_optim.nn.salt_"
    left: nn.Parameter
    right: nn.Parameter
    singular_values: nn.Parameter
    scale: nn.Parameter
    shift: nn.Parameter
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling = stored_number("scaling", "s.")

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int | float,
        lora_rank: int = 8,
        alpha: float | None = None,
        seed: int = 0,
        position: int = 0,
    ) -> None:
        super().__init__(base)
        m, n, device = self.out_features, self.in_features, self.like().device
        rank = resolved_rank("", rank, m, n)
        if isinstance(lora_rank, bool) or not isinstance(lora_rank, int) or not 1 <= lora_rank <= min(m, n) - rank:
            raise ValueError(
                f"lora_rank is {lora_rank!r}; it must be an integer from 1 to min({m}, {n}) − {rank} = {min(m, n) - rank}, what rank="
                f"{rank} leaves"
            )
        self.stored = {"scaling": scale_of(alpha, lora_rank)}
        left, values, right = leading_triplets(matrix_of(base), rank)
        bound = 1 / math.sqrt(n)
        draw = uniform(make_key(seed, position, 0, PURPOSE_FACTOR), (lora_rank, n), device)
        self.keep_(left=left, right=right, singular_values=values)
        self.train_(scale=values.new_zeros(rank), shift=values.new_zeros(rank))
        self.train_(lora_A=draw.mul_(2 * bound).sub_(bound), lora_B=values.new_zeros(m, lora_rank))

    @property
    def rank(self) -> int:
        """r."""
        return self.shift.shape[0]

    def added(self, x: Tensor) -> Tensor:
        """((x V_r) ∘ (a ∘ σ + c)) U_rᵀ + s·(x A'ᵀ) B'ᵀ, the factors without the leading directions."""
        a, b = without(self.lora_A, self.right), without(self.lora_B.mT, self.left.mT).mT
        leading = F.linear(F.linear(x, self.right) * (self.scale * self.singular_values + self.shift), self.left)
        return leading + self.stored["scaling"] * F.linear(F.linear(x, a), b)

    @torch.no_grad()
    def change(self) -> Tensor:
        """ΔW."""
        left, right, values, scale, shift = wide(self.left, self.right, self.singular_values, self.scale, self.shift)
        a, b = wide(self.lora_A, self.lora_B)
        rest = without(b.mT, left.mT).mT @ without(a, right)
        return (left * (scale * values + shift) @ right).add_(rest, alpha=self.stored["scaling"])

    def parameter_roles(self) -> Mapping[str, Role]:
        """Factors decay half as much each; scale and shift as the entries of a dense ΔW would."""
        return {"scale": Role(), "shift": Role(), "lora_A": HALF_DECAY, "lora_B": HALF_DECAY}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, lora_rank={self.lora_A.shape[0]}"


def without(rows: Tensor, basis: Tensor) -> Tensor:
    """Rows (q×n) less their part along the orthonormal rows of a basis (r×n): R − (R Qᵀ) Q."""
    return rows - (rows @ basis.mT) @ basis


def salt_(
    model: nn.Module,
    *,
    rank: int | float,
    lora_rank: int = 8,
    alpha: float | None = None,
    seed: int = 0,
    freeze_rest: bool = True,
    include: Patterns = None,
    exclude: Patterns = None,
) -> nn.Module:
    """Freeze the linear layers of a model; scale and shift their leading singular values, and train a low-rank rest, in place.

        W = U Σ Vᵀ,    σ_i → (1 + a_i)·σ_i + c_i for i ≤ r,    and s·B A in the directions that are left

    `SALTLinear` has the formula. a, c and B start at 0, so that the model starts as it was. Call it before the optimizer is built.
    `merge_` gives plain layers back. Returns the model.

    Args:
        model: its plain `nn.Linear`s (8-bit weights, too, as they are) and Conv1Ds become `SALTLinear`s. Tied layers share their
            parameters. On the meta device the layers have shapes alone: for planning, or to load a checkpoint of the adapted model.
        rank: r, an integer, or a fraction in (0, 1) of the short side of each weight.
        lora_rank: that of B A; r + lora_rank is at most the short side.
        alpha: s = alpha/lora_rank; None means s = 1.
        seed: of A, which is the same on every device and in every process.
        freeze_rest: freeze all other parameters, too, biases and norms among them; False leaves those as they are.
        include: patterns of the weights to take, as in `param_groups`; None takes every linear layer but output heads.
        exclude: patterns of weights to leave alone.

    Raises:
        TypeError: no nn.Module.
        ValueError: a rank or alpha out of range, or a weight that is not finite, with the layer's name; a pattern that matches
            nothing; no layer to take; a weight that is sharded, or tied to something that is no such layer; a layer that has an
            adapter already.

    Memory: the weights, and b·((r + q)·(m + n) + 3r) bytes a layer for lora_rank q; gradients and optimizer state have 2r + q·(m + n)
    numbers. Under `fully_shard` all of it is sharded. While it runs, float64 (float32 on accelerators) singular vectors of one layer.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> model = lo.nn.salt_(model, rank=16, lora_rank=4, include="0")
        >>> [(name, tuple(param.shape)) for name, param in model.named_parameters() if param.requires_grad]
        [('0.scale', (16,)), ('0.shift', (16,)), ('0.lora_A', (4, 64)), ('0.lora_B', (256, 4))]

    Paper: Elsayed et al., "SALT", arXiv:2503.16055.
    """
    rank, lora_rank, alpha, seed = map(as_python, (rank, lora_rank, alpha, seed))
    check_rank_option(rank)
    options: dict[str, Any] = {"rank": rank, "lora_rank": lora_rank, "alpha": alpha, "seed": seed}
    return add_adapters_(
        model, lambda layer: SALTLinear(layer.module, position=layer.position, **options), include, exclude, freeze_rest
    )
