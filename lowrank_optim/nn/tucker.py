"""`tucker_adapters_`: train a core tensor and a factor for each dimension beside frozen convolutions."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_optim.groups.roles import Role
from lowrank_optim.kernels import as_python
from lowrank_optim.kernels.counter_rng import PURPOSE_FACTOR, make_key, uniform
from lowrank_optim.nn.adapted import AdaptedLayer, scale_of, stored_number, wide
from lowrank_optim.nn.frozen_base import add_adapters_
from lowrank_optim.nn.low_rank import check_rank_option
from lowrank_optim.nn.plain_layers import kind_of
from lowrank_optim.nn.reparametrized import Patterns

CONVOLVE: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}


class TuckerConvolution(AdaptedLayer):
    """A frozen convolution with a Tucker tensor beside it: ΔW = s·G ×₁ B ×₂ A (×₃ C₁ ×₄ C₂ …).

    The passes never make ΔW: A takes the c channels of the input to r, a convolution with the kernel G ×₃ C₁ … takes these to r, with
    stride, padding and dilation of the base, and B to the c' channels of the output. Parameters: `core`, G (r'×r×k₁×k₂…), 0 at the
    start; `input_factor`, Aᵀ (r×c), uniform in ±1/√c; `output_factor`, B (c'×r'), uniform in ±1/√r'; with a kernel rank q,
    `kernel_factor_0`, C₁ (k₁×q₁), …, uniform in ±1/√q, and G is r'×r×q₁×q₂…. A state dict holds s under "scaling".

    Args:
        base: an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` without groups; `tucker_adapters_` freezes it.
        rank: an integer of at least 1, or a fraction in (0, 1) of each side: r and r', at most c and c'.
        kernel_rank: q, at most the side of the kernel; None leaves the kernel whole, without factors of its own.
        alpha: s = alpha/rank; None means s = 1. Of a fraction, rank is the larger of r and r'.
        seed, position: of the factors.

    Raises:
        ValueError: another kind of layer; groups; a rank or alpha out of range.

    Memory: the base, and b·(r'·r·k₁·k₂… + r·c + r'·c') bytes at b bytes a number. Backward keeps r channels of the input's size and
    r' of the output's.

    Paper: Si et al., "FLoRA: Low-Rank Core Space for N-dimension", arXiv:2405.14739.
    """

    converter = "lowrank_optim.nn.tucker_adapters_"
    core: nn.Parameter
    input_factor: nn.Parameter
    output_factor: nn.Parameter
    scaling = stored_number("scaling", "s.")

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int | float,
        kernel_rank: int | None = None,
        alpha: float | None = None,
        seed: int = 0,
        position: int = 0,
    ) -> None:
        super().__init__()
        if kind_of(base) != "convolution":
            raise ValueError(f"base is a {type(base).__name__}; it must be an nn.Conv1d, nn.Conv2d or nn.Conv3d")
        if base.groups != 1:
            raise ValueError(
                f"groups is {base.groups}; the core joins all channels, and a convolution in groups cannot have one: leave it out "
                "(exclude)"
            )
        check_rank_option(rank, needed=True)
        check_kernel_rank(kernel_rank)
        self.base = base
        like = self.like()
        outputs, inputs, *kernel = like.shape
        ranks = [max(1, round(rank * c)) if isinstance(rank, float) else min(rank, c) for c in (outputs, inputs)]
        inner = kernel if kernel_rank is None else [min(kernel_rank, k) for k in kernel]
        self.stored = {"scaling": scale_of(alpha, max(ranks) if isinstance(rank, float) else rank)}

        def factor(number: int, shape: tuple[int, int], bound: float) -> Tensor:
            draw = uniform(make_key(seed, position, number, PURPOSE_FACTOR), shape, like.device)
            return draw.mul_(2 * bound).sub_(bound)

        self.train_(
            core=like.new_zeros(*ranks, *inner),
            input_factor=factor(0, (ranks[1], inputs), 1 / math.sqrt(inputs)),
            output_factor=factor(1, (outputs, ranks[0]), 1 / math.sqrt(ranks[0])),
        )
        self.sides = 0 if kernel_rank is None else len(kernel)
        for side in range(self.sides):
            k, q = kernel[side], inner[side]
            self.train_(**{f"kernel_factor_{side}": factor(2 + side, (k, q), 1 / math.sqrt(q))})

    def kernel(self, exact: bool = False) -> Tensor:
        """G ×₃ C₁ ×₄ C₂ …: the kernel between the inner channels, r'×r×k₁×k₂…; `exact`: in float32 or wider."""
        made: Tensor = self.core
        factors = [getattr(self, f"kernel_factor_{side}") for side in range(self.sides)]
        if exact:
            made, *factors = wide(made, *factors)
        for side, factor in enumerate(factors, start=2):
            # Autocast has made a 16-bit tensor of the first product; it leaves tensordot's types as they are.
            made = torch.tensordot(made, factor.to(made.dtype), dims=([side], [1])).movedim(-1, side)
        return made

    def added(self, x: Tensor) -> Tensor:
        """Three convolutions: of one element with A, with the kernel of the core, of one element with B."""
        convolve, ones = CONVOLVE[type(self.base)], (1,) * (self.core.dim() - 2)
        inner = convolve(x, self.input_factor.unflatten(1, (-1, *ones)))
        middle = convolve_as(self.base, inner, self.kernel())
        out: Tensor = self.stored["scaling"] * convolve(middle, self.output_factor.unflatten(1, (-1, *ones)))
        return out

    @torch.no_grad()
    def change(self) -> Tensor:
        """ΔW, c'×c×k₁×k₂…."""
        output, inputs = wide(self.output_factor, self.input_factor)
        whole: Tensor = torch.tensordot(output, self.kernel(exact=True), dims=1)
        whole = torch.tensordot(whole, inputs, dims=([1], [0])).movedim(-1, 1)
        return whole.mul(self.stored["scaling"])

    def plain(self, weight: nn.Parameter) -> nn.Module:
        """The convolution with this weight and the bias of the base."""
        base: Any = self.base
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode")
        made: nn.Module = type(base)(**{name: getattr(base, name) for name in names}, device="meta")
        made.register_parameter("weight", weight)
        made.register_parameter("bias", base.bias)
        return made

    def parameter_roles(self) -> Mapping[str, Role]:
        """ΔW is a product of the core and the factors, which decay in equal parts, so that ΔW decays as a dense tensor would."""
        own = dict(self.named_parameters(recurse=False))
        return dict.fromkeys(own, Role(decay_factor=1 / len(own)))

    def extra_repr(self) -> str:
        return f"core={tuple(self.core.shape)}"


def check_kernel_rank(kernel_rank: Any) -> None:
    """Raise ValueError unless it is None or an integer of at least 1."""
    whole = isinstance(kernel_rank, int) and not isinstance(kernel_rank, bool)
    if kernel_rank is not None and not (whole and kernel_rank >= 1):
        raise ValueError(
            f"kernel_rank is {kernel_rank!r}; it must be an integer of at least 1, or None for the whole kernel"
        )


def convolve_as(base: Any, x: Tensor, kernel: Tensor) -> Tensor:
    """x with another kernel, with stride, padding and dilation of a convolution."""
    convolve, padding = CONVOLVE[type(base)], base.padding
    if base.padding_mode == "zeros":
        return convolve(x, kernel, None, base.stride, padding, base.dilation)
    if isinstance(padding, str):  # "same" or "valid"
        sums = [d * (k - 1) * (padding == "same") for d, k in zip(base.dilation, base.kernel_size, strict=True)]
        sides = [(total // 2, total - total // 2) for total in sums]
    else:
        sides = [(width, width) for width in padding]
    around = [width for pair in reversed(sides) for width in pair]  # F.pad begins with the last dimension
    return convolve(F.pad(x, around, mode=base.padding_mode), kernel, None, base.stride, 0, base.dilation)


def tucker_adapters_(
    model: nn.Module,
    *,
    rank: int | float,
    kernel_rank: int | None = None,
    alpha: float | None = None,
    seed: int = 0,
    freeze_rest: bool = True,
    include: Patterns = None,
    exclude: Patterns = None,
) -> nn.Module:
    """Freeze the convolutions of a model and train a Tucker tensor beside each, in place. Returns the model.

        ΔW = s·G ×₁ B ×₂ A (×₃ C₁ ×₄ C₂ …),    G: r'×r×k₁×k₂…,  B: c'×r',  A: c×r

    The core G keeps the shape of the kernel, which a pair of factors of the flattened weight does not. G starts at 0, so that the
    model starts as it was. Call it before the optimizer is built. `merge_` gives plain convolutions with W + ΔW back.

    Args:
        model: its plain `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d` become `TuckerConvolution`s. Those with the same weight share their
            parameters. On the meta device the layers have shapes alone: for planning, or to load a checkpoint.
        rank: an integer, or a fraction in (0, 1) of each side; a side with fewer channels has all of them.
        kernel_rank: ranks of the sides of the kernel, at most its size; None leaves the kernel whole.
        alpha: s = alpha/rank; None means s = 1.
        seed: of the factors, which are the same on every device and in every process.
        freeze_rest: freeze all other parameters, too, biases and norms among them; False leaves those as they are.
        include: patterns of the weights to take, as in `param_groups`; None takes every convolution but output heads.
        exclude: patterns of weights to leave alone.

    Raises:
        TypeError: no nn.Module.
        ValueError: a rank or alpha out of range; a convolution in groups, with the layer's name; a pattern that matches nothing; no
            convolution to take; a weight that is sharded or tied to another kind of layer; a layer that has an adapter already.

    Memory: the weights, and b·(r'·r·k₁·k₂… + r·c + r'·c') bytes a layer, all of which are trained.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(32, 8, 1))
        >>> model = lo.nn.tucker_adapters_(model, rank=4, include="0")
        >>> [(name, tuple(param.shape)) for name, param in model.named_parameters() if param.requires_grad]
        [('0.core', (4, 4, 3, 3)), ('0.input_factor', (4, 16)), ('0.output_factor', (32, 4))]

    Paper: Si et al., "FLoRA: Low-Rank Core Space for N-dimension", arXiv:2405.14739.
    """
    rank, kernel_rank, alpha, seed = map(as_python, (rank, kernel_rank, alpha, seed))
    check_rank_option(rank)
    check_kernel_rank(kernel_rank)
    options: dict[str, Any] = {"rank": rank, "kernel_rank": kernel_rank, "alpha": alpha, "seed": seed}
    return add_adapters_(
        model,
        lambda layer: TuckerConvolution(layer.module, position=layer.position, **options),
        include,
        exclude,
        freeze_rest,
        kinds=("convolution",),
    )
