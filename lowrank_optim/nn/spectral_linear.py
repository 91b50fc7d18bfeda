"""The layer of Sparse Spectral Training: a linear layer with weight U Σ Vᵀ, of which some triplets are trained at a time."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_optim.groups.roles import Role
from lowrank_optim.kernels import compute_dtype, outside_graph
from lowrank_optim.kernels.counter_rng import PURPOSE_TRIPLETS, make_key, uniform
from lowrank_optim.nn.decompositions import widened
from lowrank_optim.nn.low_rank import Device
from lowrank_optim.nn.reparametrized import ReparametrizedLinear
from lowrank_optim.nn.spectral_product import SpectralProduct
from lowrank_optim.sharding.dtensor import is_sharded

FACTORS = ("sigma", "u_active", "v_active", "u_frozen", "v_frozen", "order")


class SpectralLinear(ReparametrizedLinear):
    """A linear layer with weight W = U Σ Vᵀ, all of its d = min(m, n) triplets: y = ((x V) ∘ Σ) Uᵀ + b (SST).

    All values Σ are trained, and the vectors of `rank` triplets, which `SpectralSchedule` changes from time to time. Gradients of
    vectors lack the factor Σ_i (`spectral_product`), and the schedule keeps vectors at length 1 and values at 0 or more: the layer
    needs one.

    Parameters: `sigma` (d), `u_active` (m×r), `v_active` (n×r), `bias` (m). Buffers: `u_frozen` (m×(d−r)), `v_frozen` (n×(d−r)), and
    `order` (d) int32, the places in `sigma` of the trained triplets (ascending), then of the others.

    Args:
        in_features, out_features, bias, device, dtype: as of `nn.Linear`.
        rank: triplets whose vectors are trained; d or more trains all.
        enhanced: leave the factor Σ_i out of the gradients of vectors, as the paper; False gives the true gradients.
        tangent: take the part along the vector out of its gradient, which the normalisation undoes, so that moments have none of it.
        save_projection: P = x V is saved for backward, b·N·d bytes for N tokens, and not computed again.
        mixture: share of the uniform part in the draws, in [0, 1].
        seed, position: of the draws; `position` is the layer's number in the model.

    Raises:
        ValueError: a rank below 1, a mixture that is no share.

    Memory: weights b·(d·(m + n) + d + m) bytes at b bytes a number, which is more than the b·m·n of a dense layer (twice that of a
    square one). Gradients b·(r·(m + n) + d + m). In a pass, two matrices of tokens × d.

    Paper: Zhao et al., "Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks", arXiv:2405.15481.
    """

    converter = "lowrank_optim.nn.spectral_"
    u_frozen: Tensor
    v_frozen: Tensor
    order: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int = 64,
        enhanced: bool = True,
        tangent: bool = False,
        save_projection: bool = False,
        mixture: float = 0.5,
        bias: bool = True,
        seed: int = 0,
        position: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        check_active(rank)
        check_mixture(mixture)
        count = min(in_features, out_features)
        rank = min(rank, count)
        self.enhanced, self.tangent, self.save_projection = enhanced, tangent, save_projection
        self.mixture, self.seed, self.position = mixture, seed, position

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        self.sigma = nn.Parameter(empty(count))
        self.u_active = nn.Parameter(empty(out_features, rank))
        self.v_active = nn.Parameter(empty(in_features, rank))
        self.register_buffer("u_frozen", empty(out_features, count - rank))
        self.register_buffer("v_frozen", empty(in_features, count - rank))
        self.register_buffer("order", torch.empty(count, device=device, dtype=torch.int32))
        self.register_parameter("bias", nn.Parameter(empty(out_features)) if bias else None)
        self.reset_parameters()

    @property
    def rank(self) -> int:
        """r, the triplets whose vectors are trained."""
        return self.u_active.shape[1]

    @property
    def active(self) -> Tensor:
        """The places of these triplets in `sigma`, ascending, int32."""
        return self.order[: self.rank]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A weight and a bias uniform in ±1/√n, as of `nn.Linear`; the weight is decomposed."""
        bound = 1 / math.sqrt(self.in_features)
        if not self.sigma.is_meta:
            weight = torch.empty(self.out_features, self.in_features, device=self.sigma.device)
            self.set_weight(weight.uniform_(-bound, bound))
        if self.bias is not None:
            self.bias.uniform_(-bound, bound)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Take the triplets of an m×n weight, and draw those that are trained."""
        for name, tensor in self._decomposed(weight).items():
            getattr(self, name).copy_(tensor)

    def _decomposed(self, weight: Tensor) -> dict[str, Tensor]:
        """Parameters and buffers for a weight, in its type."""
        u, sigma, v = (part.to(weight.dtype) for part in decompose(weight))
        order = self.draw(sigma, 0, self.mixture)
        rank = self.rank
        trained, rest = order[:rank], order[rank:]
        parts = (sigma, u[:, trained], v[:, trained], u[:, rest], v[:, rest], order)
        return dict(zip(FACTORS, parts, strict=True))

    def draw(self, sigma: Tensor, number: int, mixture: float) -> Tensor:
        """`order` of draw number `number`: which triplets are trained, (d) int32, for all values `sigma`."""
        key = make_key(self.seed, self.position, number, PURPOSE_TRIPLETS)
        return draw_triplets(sigma, self.rank, mixture, key).to(sigma.device)

    @torch.no_grad()
    def vectors(self, u_active: Tensor, v_active: Tensor) -> tuple[Tensor, Tensor]:
        """(U, V), m×d and n×d, in the order of `sigma`; the arguments are the parameters of these names, whole."""
        place = self.order.long()
        parts = ((u_active, self.u_frozen), (v_active, self.v_frozen))
        u, v = (
            torch.empty(a.shape[0], len(place), device=a.device, dtype=a.dtype).index_copy_(
                1, place, torch.cat([a, b], 1)
            )
            for a, b in parts
        )
        return u, v

    @torch.no_grad()
    def set_frozen(self, u: Tensor, v: Tensor, order: Tensor) -> None:
        """Take another `order`, and the vectors that are not trained from those of all triplets."""
        self.order.copy_(order)
        self.u_frozen.copy_(u[:, order[self.rank :]])
        self.v_frozen.copy_(v[:, order[self.rank :]])

    def forward(self, x: Tensor) -> Tensor:
        """y = ((x V) ∘ Σ) Uᵀ + b, in the type of x, or in autocast's."""
        self.check_input(x)
        return outside_graph(self._product, x)  # type: ignore[no-any-return]

    def _product(self, x: Tensor) -> Tensor:
        kind, compute, result = x.device.type, self.u_active.dtype, x.dtype
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 and x.is_floating_point():
            compute = result = torch.get_autocast_dtype(kind)
        own = (self.sigma, self.u_active, self.v_active, self.bias, self.u_frozen, self.v_frozen, self.order)
        how = (self.enhanced, self.tangent, self.save_projection)
        out: Tensor = SpectralProduct.apply(x, *own, *how, compute, result)
        return out

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W = U Σ Vᵀ, m×n: in float32 (float64 for float64 layers), rounded once."""
        wide, rank = compute_dtype(self.sigma.dtype), self.rank
        values = self.sigma.to(wide).index_select(0, self.order)
        weight = (self.u_active.to(wide) * values[:rank]) @ self.v_active.to(wide).mT
        weight.addmm_(self.u_frozen.to(wide) * values[rank:], self.v_frozen.to(wide).mT)
        return weight.to(self.sigma.dtype)

    def parameter_roles(self) -> Mapping[str, Role]:
        """Values decay; vectors do not, since the normalisation would undo it."""
        return {"sigma": Role(), "u_active": Role("no_decay"), "v_active": Role("no_decay")}

    def extra_repr(self) -> str:
        triplets = self.sigma.numel()
        return f"{super().extra_repr()}, rank={self.rank}, triplets={triplets}, bias={self.bias is not None}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """A dense weight under this layer's name is decomposed."""
        weight = state_dict.get(f"{prefix}weight")
        given = any(f"{prefix}{name}" in state_dict for name in FACTORS)
        if weight is not None and not given and not weight.is_meta and not is_sharded(self.sigma):
            matrix = weight if self.plain_class is nn.Linear else weight.mT
            if matrix.shape == (self.out_features, self.in_features) and bool(torch.isfinite(matrix).all()):
                del state_dict[f"{prefix}weight"]
                state_dict.update({prefix + name: tensor for name, tensor in self._decomposed(matrix).items()})
        super()._load_from_state_dict(state_dict, prefix, *rest)


def decompose(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U, Σ, V), m×d, d and n×d, in float64 on a CPU, float32 elsewhere; Σ descending."""
    u, sigma, right = torch.linalg.svd(widened(weight), full_matrices=False)
    return u, sigma, right.mT


def draw_triplets(sigma: Tensor, count: int, mixture: float, key: int) -> Tensor:
    """`count` of d places, drawn one after another without replacement, ascending, then the others; (d) int32 on the CPU.

    Each draw takes place i with a probability ∝ p_i = mixture/d + (1 − mixture) Σ_i/ΣΣ among those that are left: the first in a race
    of exponential clocks with these rates. If all values are 0, all places are as likely. Places of p_i = 0 come last.
    """
    values = sigma.detach().to("cpu", torch.float64).clamp_min(0).nan_to_num(0.0)
    total, size = values.sum(), values.numel()
    share = values / total if total > 0 else torch.full_like(values, 1 / size)
    rates = mixture / size + (1 - mixture) * share
    times = uniform(key, (size,), values.device, torch.float64).log_().neg_() / rates
    turn = times.argsort(stable=True)
    return torch.cat([turn[:count].sort().values, turn[count:].sort().values]).int()


def check_active(rank: Any) -> None:
    """Raise ValueError for a number of trained triplets that no layer can have."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(
            f"rank is {rank!r}; it must be an integer of at least 1: the triplets whose vectors are trained"
        )


def check_mixture(mixture: Any) -> None:
    """Raise ValueError for something else than a share."""
    if isinstance(mixture, bool) or not isinstance(mixture, int | float) or not 0 <= mixture <= 1:
        raise ValueError(f"mixture is {mixture!r}; it must be a share in [0, 1]")
