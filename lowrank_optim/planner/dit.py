"""The diffusion transformer (DiT, https://arxiv.org/abs/2212.09748), for plans of it by config; it needs no other package.

A noisy latent is cut into patches. Blocks of attention and MLP are modulated by the time and the class (adaLN-Zero). The output is
the noise and its variance, of which the loss takes the noise. Weights stay as they are made: nothing trains this model here.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NEEDED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "patch_size",
    "image_size",
    "num_channels",
    "num_labels",
)
"""Fields of its config; `intermediate_size` is four times the hidden size where it is left out."""

FREQUENCIES = 256


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    """Attention and MLP, each modulated: x ← x + g ⊙ f((1 + s) ⊙ norm(x) + b), with b, s, g from the condition."""

    def __init__(self, hidden: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, ffn), nn.GELU(approximate="tanh"), nn.Linear(ffn, hidden))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 6 * hidden))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attention(_modulated(self.norm1(x), shift1, scale1))
        out: Tensor = x + gate2.unsqueeze(1) * self.mlp(_modulated(self.norm2(x), shift2, scale2))
        return out

    def attention(self, x: Tensor) -> Tensor:
        samples, tokens, hidden = x.shape
        query, key, value = self.qkv(x).view(samples, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(samples, tokens, hidden))
        return out


class DiT(nn.Module):
    """The whole model, from the fields of its config (`NEEDED`)."""

    def __init__(self, fields: Mapping[str, Any], layers: int) -> None:
        super().__init__()
        hidden, patch, channels = fields["hidden_size"], fields["patch_size"], fields["num_channels"]
        ffn = fields.get("intermediate_size", 4 * hidden)
        self.patches = nn.Conv2d(channels, hidden, patch, patch)
        self.positions = nn.Parameter(torch.zeros(1, (fields["image_size"] // patch) ** 2, hidden), requires_grad=False)
        self.time = nn.Sequential(nn.Linear(FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.classes = nn.Embedding(fields["num_labels"] + 1, hidden)  # one more for "no class"
        self.blocks = nn.ModuleList(Block(hidden, fields["num_attention_heads"], ffn) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))
        self.head = nn.Linear(hidden, patch * patch * 2 * channels)

    def forward(self, latents: Tensor, timesteps: Tensor, labels: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """The squared error of the predicted noise; latents and noise (n, channels, size, size), timesteps and labels (n)."""
        x = self.patches(latents.to(self.positions.dtype)).flatten(2).transpose(1, 2) + self.positions
        condition = self.time(self.waves(timesteps)) + self.classes(labels)
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(condition).chunk(2, dim=1)
        predicted, _ = self.images(self.head(_modulated(self.norm(x), shift, scale)), latents.shape).chunk(2, dim=1)
        return {"loss": F.mse_loss(predicted, noise.to(predicted.dtype))}

    def waves(self, timesteps: Tensor) -> Tensor:
        """(n, 256): cosines and sines of the time, of frequencies from 1 to 1/10000."""
        half = FREQUENCIES // 2
        steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        angles = timesteps.float().unsqueeze(1) * torch.exp(steps * (-math.log(10_000.0) / half))
        return torch.cat([angles.cos(), angles.sin()], dim=1).to(self.positions.dtype)

    def images(self, patches: Tensor, shape: torch.Size) -> Tensor:
        """The patches (n, tokens, p·p·2c), each in its place: (n, 2c, size, size)."""
        samples, channels, height, width = shape
        size = self.patches.stride[0]
        rows = patches.view(samples, height // size, width // size, size, size, 2 * channels)
        return rows.permute(0, 5, 1, 3, 2, 4).reshape(samples, 2 * channels, height, width)
