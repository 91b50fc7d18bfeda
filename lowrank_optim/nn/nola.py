"""`nola_`: train the coefficients of seeded random bases beside frozen weights."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowrank_optim.groups.roles import Role
from lowrank_optim.kernels import as_python, compute_dtype, no_autograd_no_autocast, outside_graph
from lowrank_optim.kernels.counter_rng import (
    PURPOSE_FACTOR,
    derive_key,
    make_key,
    random_words,
    signed_key,
    uniform,
    unsigned_key,
)
from lowrank_optim.nn.adapted import AdaptedLinear, scale_of, stored_number, wide
from lowrank_optim.nn.frozen_base import add_adapters_
from lowrank_optim.nn.low_rank import HALF_DECAY, check_rank_option, resolved_rank
from lowrank_optim.nn.reparametrized import Patterns

PART = 1 << 20
"""Numbers of random bases that are drawn at a time (one basis at least)."""


class RandomMixture(torch.autograd.Function):
    """apply(c, key, shape, bound): Σ_i c_i M_i, in the type of c. M_i has this shape and entries uniform in ±bound, from the key.

    The bases are drawn in parts, in forward and again in backward: ∂c_i = ⟨M_i, G⟩.
    """

    @staticmethod
    @no_autograd_no_autocast
    def forward(ctx: Any, coefficients: Tensor, key: int, shape: tuple[int, int], bound: float) -> Tensor:
        ctx.arguments = key, shape, bound, len(coefficients), coefficients.dtype
        exact = coefficients.to(compute_dtype(coefficients.dtype))
        out = exact.new_zeros(math.prod(shape))
        for part, bases in _bases(key, len(exact), out, bound):
            out.addmv_(bases.mT, exact[part])
        return out.view(shape).to(coefficients.dtype)

    @staticmethod
    @once_differentiable
    @no_autograd_no_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        key, _, bound, count, dtype = ctx.arguments
        exact = grad.to(compute_dtype(dtype)).reshape(-1)
        parts = [bases @ exact for _, bases in _bases(key, count, exact, bound)]
        return torch.cat(parts).to(dtype), None, None, None


def _bases(key: int, count: int, like: Tensor, bound: float) -> Iterator[tuple[slice, Tensor]]:
    """Which bases, and these as rows of the length, the type and on the device of a vector, part by part."""
    size = like.numel()
    step = max(1, PART // size)
    for first in range(0, count, step):
        last = min(count, first + step)
        words = random_words(key, torch.arange(first * size, last * size, device=like.device))
        yield slice(first, last), words.to(like.dtype).mul_(bound * 2.0**-31).view(last - first, size)


class NOLALinear(AdaptedLinear):
    """A frozen linear layer beside a pair of factors that are mixtures of random bases: W + s·B A, A = Σ a_i A_i, B = Σ b_i B_i.

    The k bases A_i (r×n, uniform in ±1/√n) and B_i (m×r, uniform in ±1/√r) are functions of a key and are drawn in every pass, some
    at a time; nothing is stored of them. Parameters: `coefficients_A` (k), a, uniform in ±√(3/k), which gives A the variance of
    LoRA's; `coefficients_B` (k), b, 0 at the start. A state dict holds the key and s under "key" and "scaling".

    Args:
        base: an `nn.Linear` (whose weight may be a `QuantizedWeight`) or a Conv1D; `nola_` freezes it.
        rank: r, an integer from 1 to min(m, n), or a fraction in (0, 1) of it.
        bases: k.
        alpha: s = alpha/rank; None means s = 1.
        seed, position: of the key.

    Raises:
        ValueError: another kind of layer; a rank, number of bases or alpha out of range.

    Memory: the base, and 2k numbers. From forward to backward b·r·(m + n) bytes for A and B at b bytes a number. While bases are
    drawn, about 32 bytes for each of a million numbers, or of the r·max(m, n) of one basis. Each pass draws k·r·(m + n) numbers.

    Paper: Koohpayegani et al., "NOLA", arXiv:2310.02556.
    """

    converter = "lowrank_optim.nn.nola_"
    coefficients_A: nn.Parameter
    coefficients_B: nn.Parameter
    key = stored_number("key", "What the bases are drawn from.")
    scaling = stored_number("scaling", "s.")

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int | float,
        bases: int = 64,
        alpha: float | None = None,
        seed: int = 0,
        position: int = 0,
    ) -> None:
        super().__init__(base)
        self.rank = resolved_rank("", rank, self.out_features, self.in_features)
        if isinstance(bases, bool) or not isinstance(bases, int) or bases < 1:
            raise ValueError(f"bases is {bases!r}; it must be an integer of at least 1")
        key = make_key(seed, position, 0, PURPOSE_FACTOR)
        self.stored = {"key": signed_key(key), "scaling": scale_of(alpha, self.rank)}
        bound = math.sqrt(3 / bases)
        draw = uniform(derive_key(key, 2), (bases,), self.like().device)
        self.train_(coefficients_A=draw.mul_(2 * bound).sub_(bound), coefficients_B=torch.zeros_like(draw))

    def factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A and B for coefficients."""
        key, n = unsigned_key(int(self.stored["key"])), self.in_features
        first = RandomMixture.apply(a, derive_key(key, 0), (self.rank, n), 1 / math.sqrt(n))
        second = RandomMixture.apply(b, derive_key(key, 1), (self.out_features, self.rank), 1 / math.sqrt(self.rank))
        return first, second

    def added(self, x: Tensor) -> Tensor:
        """s·(x Aᵀ) Bᵀ."""
        a, b = outside_graph(self.factors, self.coefficients_A, self.coefficients_B)
        return self.stored["scaling"] * F.linear(F.linear(x, a), b)

    @torch.no_grad()
    def change(self) -> Tensor:
        """s·B A."""
        a, b = wide(*self.factors(self.coefficients_A, self.coefficients_B))
        return (b @ a).mul_(self.stored["scaling"])

    def parameter_roles(self) -> Mapping[str, Role]:
        """The coefficients of each factor decay half as much, so that B A decays as a dense matrix would."""
        return {"coefficients_A": HALF_DECAY, "coefficients_B": HALF_DECAY}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, bases={self.coefficients_A.shape[0]}"


def nola_(
    model: nn.Module,
    *,
    rank: int | float = 8,
    bases: int = 64,
    alpha: float | None = None,
    seed: int = 0,
    freeze_rest: bool = True,
    include: Patterns = None,
    exclude: Patterns = None,
) -> nn.Module:
    """Freeze the linear layers of a model and train mixtures of random low-rank bases beside them, in place. Returns the model.

        y = x Wᵀ + s·(x Aᵀ) Bᵀ + b,    A = Σ_i a_i A_i,    B = Σ_i b_i B_i,    i = 1 … k

    2k numbers are trained and stored in a layer, whatever its size and the rank. The bases are drawn again in every pass. b starts at
    0, so that the model starts as it was. Call it before the optimizer is built. `merge_` gives plain layers with W + s·B A back.

    Args:
        model: its plain `nn.Linear`s (8-bit weights, too, as they are) and Conv1Ds become `NOLALinear`s. Tied layers share their
            coefficients. On the meta device the layers have shapes alone: for planning, or to load a checkpoint.
        rank: r, an integer, or a fraction in (0, 1) of the short side of each weight.
        bases: k. Forward draws k·r·(m + n) random numbers for a layer, and backward again, however few the tokens are.
        alpha: s = alpha/rank; None means s = 1.
        seed: of the bases, which are the same on every device and in every process.
        freeze_rest: freeze all other parameters, too, biases and norms among them; False leaves those as they are.
        include: patterns of the weights to take, as in `param_groups`; None takes every linear layer but output heads.
        exclude: patterns of weights to leave alone.

    Raises:
        TypeError: no nn.Module.
        ValueError: a rank, number of bases or alpha out of range, with the layer's name; a pattern that matches nothing; no layer to
            take; a weight that is sharded, or tied to something that is no such layer; a layer that has an adapter already.

    Memory: the weights, 2k numbers a layer, and as many gradients and twice as many of Adam's moments. `NOLALinear` says what the
    passes need.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> model = lo.nn.nola_(model, rank=4, bases=32, include="0")
        >>> [(name, tuple(param.shape)) for name, param in model.named_parameters() if param.requires_grad]
        [('0.coefficients_A', (32,)), ('0.coefficients_B', (32,))]

    Paper: Koohpayegani et al., "NOLA", arXiv:2310.02556.
    """
    rank, bases, alpha, seed = map(as_python, (rank, bases, alpha, seed))
    check_rank_option(rank)
    options: dict[str, Any] = {"rank": rank, "bases": bases, "alpha": alpha, "seed": seed}
    return add_adapters_(
        model, lambda layer: NOLALinear(layer.module, position=layer.position, **options), include, exclude, freeze_rest
    )
