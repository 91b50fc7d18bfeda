"""What layers have in common that hold another layer, frozen, and train something beside it: y = base(x) + x ΔWᵀ."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_optim.groups.roles import Role
from lowrank_optim.kernels import compute_dtype, cpu_tensor
from lowrank_optim.nn.plain_layers import kind_of
from lowrank_optim.nn.reparametrized import (
    ReparametrizedLayer,
    ReparametrizedLinear,
    matrix_of,
    move_hooks,
)


def stored_number(name: str, doc: str) -> property:
    """An attribute that is one of the `stored` numbers of a layer, as a state dict holds it: int64 or float64 on the CPU."""

    def value(layer: "AdaptedLayer") -> Tensor:
        number = layer.stored[name]
        return cpu_tensor(number, torch.int64 if isinstance(number, int) else torch.float64)

    return property(value, doc=doc)


class AdaptedLayer(ReparametrizedLayer):
    """A layer beside another one: y = base(x) + the same with ΔW in the place of the weight, ΔW a function of few parameters.

    Submodule: `base`, the layer as it was, with its bias. A class of this kind says `added` (what x gives with ΔW) and `change` (ΔW).
    """

    base: nn.Module
    stored: dict[str, int | float]
    """Numbers without which ΔW is another: a state dict holds them, as 0-d tensors, which are attributes (`stored_number`)."""

    def added(self, x: Tensor) -> Tensor:
        """What ΔW gives for x, in the type of the parameters or in autocast's."""
        raise NotImplementedError

    def change(self) -> Tensor:
        """ΔW in the shape of the base's weight (a Conv1D's: m×n), in float32 or wider."""
        raise NotImplementedError

    @property
    def bias(self) -> nn.Parameter | None:
        """That of the base."""
        return self.base.bias  # type: ignore[return-value]

    def like(self) -> Tensor:
        """A tensor of the type and on the device of the base's weight."""
        return next(self.base.parameters())

    def forward(self, x: Tensor) -> Tensor:
        """base(x) + what ΔW gives, in the type of base(x)."""
        out: Tensor = self.base(x)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(next(self.parameters(recurse=False)).dtype)
        return out + self.added(x).to(out.dtype)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W + ΔW: the sum in float32 (float64 for float64 layers), rounded once."""
        whole = self.change()
        return whole.add_(matrix_of(self.base).to(whole.dtype)).to(next(self.parameters(recurse=False)).dtype)

    def train_(self, **tensors: Tensor) -> None:
        """Trained parameters with these values, in the type and on the device of the base."""
        self._hold(True, tensors)

    def keep_(self, **tensors: Tensor) -> None:
        """Frozen parameters: `fully_shard` shards them, and DDP sends them once and not in every forward, as it does buffers."""
        self._hold(False, tensors)

    def _hold(self, trained: bool, tensors: Mapping[str, Tensor]) -> None:
        like = self.like()
        for name, tensor in tensors.items():  # copies: a slice of a singular vector matrix would keep all of it
            value = tensor.to(like.device, like.dtype, copy=True, memory_format=torch.contiguous_format)
            self.register_parameter(name, nn.Parameter(value, requires_grad=trained))

    def take_hooks_of_base(self) -> None:
        """The forward and backward hooks and the training flag of the base, which has no hooks then."""
        move_hooks(self.base, self)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.__dict__.get("stored", {}):
            destination[f"{prefix}{name}"] = getattr(self, name)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        _, strict, missing_keys, *_ = rest
        numbers = self.__dict__.get("stored", {})
        for name, value in numbers.items():
            found = state_dict.pop(f"{prefix}{name}", None)
            if found is None:
                missing_keys.extend([f"{prefix}{name}"] if strict else [])
            elif not found.is_meta:
                numbers[name] = type(value)(found)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class AdaptedLinear(AdaptedLayer, ReparametrizedLinear):  # type: ignore[override]
    """A linear layer beside a frozen one. The base is an `nn.Linear`, whose weight may be a `QuantizedWeight`, or a Conv1D."""

    def __init__(self, base: nn.Module) -> None:
        if isinstance(base, ReparametrizedLinear):
            n, m, plain = base.in_features, base.out_features, base.plain_class
        elif kind_of(base) in ("linear", "conv1d"):
            (m, n), plain = base.weight.shape, type(base)  # type: ignore[misc]
            m, n = (m, n) if plain is nn.Linear else (n, m)
        else:
            raise ValueError(f"base is a {type(base).__name__}; it must be an nn.Linear or a Conv1D")
        ReparametrizedLinear.__init__(self, n, m)
        self.plain_class, self.base = plain, base


class DiagonalLinear(AdaptedLinear):
    """ΔW = L diag(d) R, with L (m×r) and R (r×n) fixed: y = base(x) + ((x Rᵀ) ∘ d) Lᵀ.

    Parameters: `shift` (r), d, 0 at the start. Frozen ones: `left` (m×r), `right` (r×n).
    """

    left: nn.Parameter
    right: nn.Parameter
    shift: nn.Parameter

    @property
    def rank(self) -> int:
        """r."""
        return self.shift.shape[0]

    def added(self, x: Tensor) -> Tensor:
        """((x Rᵀ) ∘ d) Lᵀ."""
        return F.linear(F.linear(x, self.right) * self.shift, self.left)

    @torch.no_grad()
    def change(self) -> Tensor:
        """L diag(d) R."""
        left, shift, right = wide(self.left, self.shift, self.right)
        return left * shift @ right

    def parameter_roles(self) -> Mapping[str, Role]:
        """d decays as the entries of a dense ΔW would."""
        return {"shift": Role()}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


def wide(*tensors: Tensor) -> list[Tensor]:
    """In the type that merged weights are computed in."""
    return [tensor.to(compute_dtype(tensor.dtype)) for tensor in tensors]


def scale_of(alpha: float | None, rank: int) -> float:
    """s = alpha/rank, or 1 without alpha.

    Raises:
        ValueError: an alpha that is not positive.
    """
    if alpha is None:
        return 1.0
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
        raise ValueError(f"alpha is {alpha!r}; it must be positive, or None for s = 1")
    return alpha / rank
