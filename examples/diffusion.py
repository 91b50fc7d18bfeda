"""A small UNet with convolutions learns to denoise latents, with GaLore updating each weight in backward; nothing is downloaded.

    python examples/diffusion.py
    python examples/diffusion.py --optimizer fira --rank 32 --steps 300

Latents stand for those of an autoencoder: smooth random fields of 4 × 16 × 16. A convolution's kernel (out, in, 3, 3) is a matrix of
out × 9·in to the optimizer. A loop with diffusers' UNet2DModel is the same: it returns `.sample`, and its scheduler adds the noise.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowrank_optim as lo
from lowrank_optim.console import accept_any_text


class Block(nn.Module):
    """Two convolutions around the time: x + conv(norm(conv(norm(x)) + t))."""

    def __init__(self, channels: int, out: int, time: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, out)
        self.time, self.skip = nn.Linear(time, out), nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        inner = self.first(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        return self.skip(x) + self.second(F.silu(self.norm2(inner)))


class UNet(nn.Module):
    """Down to half the size, and up again beside what was there before."""

    def __init__(self, channels: int = 4, width: int = 64, time: int = 128) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, time), nn.SiLU(), nn.Linear(time, time), nn.SiLU())
        self.entrance, self.exit = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, channels, 3, padding=1)
        self.down, self.middle = Block(width, width, time), Block(width, 2 * width, time)
        self.up = Block(3 * width, width, time)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        time = self.time(level[:, None])
        wide = self.down(self.entrance(x), time)
        deep = self.middle(F.avg_pool2d(wide, 2), time)
        return self.exit(self.up(torch.cat([wide, F.interpolate(deep, scale_factor=2)], dim=1), time))


def latents(count: int, generator: torch.Generator) -> Tensor:
    """Smooth fields (count, 4, 16, 16) of unit variance."""
    coarse = torch.randn(count, 4, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, size=16, mode="bilinear")
    return smooth / smooth.std()


def train(optimizer: str, rank: int, steps: int, lr: float, width: int = 64, batch: int = 16) -> list[float]:
    """The losses of a run: squared errors of the predicted noise."""
    torch.manual_seed(0)
    model, generator = UNet(width=width), torch.Generator().manual_seed(1)
    chosen = lo.by_name(optimizer)(lo.param_groups(model, rank=rank), lr=lr, update_proj_gap=50)
    print(lo.describe(chosen))
    handle = lo.update_in_backward(chosen, max_grad_norm=1.0)
    losses = []
    for step in range(steps):
        clean, level = latents(batch, generator), torch.rand(batch, generator=generator)
        noise, kept = (
            torch.randn(clean.shape, generator=generator),
            torch.cos(level * torch.pi / 2)[:, None, None, None],
        )
        noisy = kept * clean + (1 - kept.square()).sqrt() * noise
        loss = F.mse_loss(model(noisy, level), noise)
        loss.backward()  # every weight is updated in here, and its gradient freed
        chosen.step()
        losses.append(loss.item())
        if (step + 1) % 25 == 0:
            print(f"step {step + 1:4}  loss {sum(losses[-25:]) / 25:.4f}")
    print(f"state: {lo.state_bytes(chosen)}, largest gradient: {handle.memory()['gradient']:,} bytes")
    return losses


def main(argv: list[str] | None = None) -> list[float]:
    accept_any_text()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--optimizer", default="galore", choices=[*lo.METHODS], metavar="NAME", help="default: galore")
    parser.add_argument("--rank", type=int, default=16, help="of the subspaces (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=1e-2, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=64, help="channels, a multiple of 8 (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.rank < 1 or args.width < 8 or args.width % 8:
        parser.error("--steps and --rank must be at least 1, --width a multiple of 8")
    return train(args.optimizer, args.rank, args.steps, args.lr, args.width)


if __name__ == "__main__":
    main()
