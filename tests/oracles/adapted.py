"""A linear layer with an adapter, with the attributes that peft's layers have."""

import torch
from torch import Tensor, nn


class Adapted(nn.Module):
    """y = W₀x + c + s B A x."""

    def __init__(self, n: int, m: int, rank: int, scaling: float = 2.0, seed: int = 0, bias: bool = True) -> None:
        super().__init__()
        self.base_layer, self.scaling = nn.Linear(n, m, bias=bias), {"default": scaling}
        self.lora_A = nn.ModuleDict({"default": nn.Linear(n, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, m, bias=False)})
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.randn(param.shape, generator=generator) / 4.0)
        self.base_layer.requires_grad_(False)

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B."""
        return self.lora_A["default"].weight, self.lora_B["default"].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.scaling["default"] * self.lora_B["default"](self.lora_A["default"](x))


def two_layers(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A tall one and a wide one."""
    return nn.Sequential(Adapted(12, 40, 3, seed=1), nn.Tanh(), Adapted(40, 7, 3, scaling=0.5, seed=2)).to(dtype)
