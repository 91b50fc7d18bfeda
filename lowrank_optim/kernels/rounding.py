"""How float32 numbers become weights of fewer bits: rounded to nearest, stochastically, or with what rounding drops kept beside them.

**Error bits.** A bfloat16 is the upper half of a float32. With the bits of the float32 number W as an integer B,

    bits(W) = bits(w)·2¹⁶ + high·2⁸ + low        high in [−128, 127], low in [0, 255]

where w is the nearest bfloat16, ties away from zero (to even, the sum could be 2¹⁵, which the two bytes do not hold). The sum runs
across exponents; signs are apart. With both bytes W comes back to the bit. With `high` alone, W is rounded to a multiple of 2⁸ first,
to nearest and ties to even: that is 16 bits of the fraction of W, the leading one included, so that the error is at most 2⁻¹⁶|W|
where W is a normal number.

Two tensors of bytes, and not one of 16 bits: neither gloo nor NCCL sends those.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_optim.kernels.compute import cache_elements, row_chunks
from lowrank_optim.kernels.counter_rng import random_bits

NOT_A_NUMBER = 0x7FC00000


class WeightError(NamedTuple):
    """The bytes beside bfloat16 weights: `high` int8, and `low` uint8 or None, both of the shape of the weights."""

    high: Tensor
    low: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "WeightError":
        """The same function of both tensors: a view, a chunk, a copy."""
        return WeightError(function(self.high), None if self.low is None else function(self.low))

    def at(self, place: Any) -> "WeightError":
        """Those of some rows, or of some elements of flat weights."""
        return self.map(lambda part: part[place])

    def part(self, first: int, like: Tensor) -> "WeightError":
        """Of flat errors, those from element `first` on, in the shape of `like`."""
        return self.map(lambda error: error[first : first + like.numel()].view(like.shape))

    def is_contiguous(self) -> bool:
        """Whether both tensors are."""
        return self.high.is_contiguous() and (self.low is None or self.low.is_contiguous())


def weight_error(high: Tensor | None, low: Tensor | None) -> WeightError | None:
    """The arguments `error` and `error_low` of an operation as one."""
    return None if high is None else WeightError(high, low)


def lie_alike(weight: Tensor, *errors: Tensor | None) -> bool:
    """Whether the elements of what rounding drops lie as those of the weights do, which compiled kernels need."""
    both = weight.is_contiguous()
    return all(e is None or e.stride() == weight.stride() or (both and e.is_contiguous()) for e in errors)


def joined(weight: Tensor, error: WeightError | None) -> Tensor:
    """The float32 weights that bfloat16 weights and their errors stand for, a new tensor; without an error, as they are.

    Memory: besides the result, as much again while it is made.
    """
    if error is None:
        return weight
    upper = weight.view(torch.int16)
    bits = (upper & 0x7FFF).to(torch.int32) << 16
    bits += error.high.to(torch.int32) << 8
    if error.low is not None:
        bits += error.low
    # Where somebody has set a weight to 0, what was beside it may be below.
    return (bits.clamp_min_(0) | ((upper & -0x8000).to(torch.int32) << 16)).view(torch.float32)


def split_(weight: Tensor, error: WeightError, value: Tensor) -> None:
    """Store float32 numbers as bfloat16 weights and their errors, both modified in place. A NaN has no error."""
    bits = value.contiguous().view(torch.int32)
    if error.low is None:
        bits = (bits + (0x7F + ((bits >> 8) & 1))) & -256
    bits = torch.where(torch.isnan(value), NOT_A_NUMBER, bits)
    upper = (bits + 0x8000) >> 16
    rest = bits - (upper << 16)
    weight.copy_(upper.to(torch.int16).view(torch.bfloat16))
    error.high.copy_(rest >> 8)
    if error.low is not None:
        error.low.copy_(rest & 0xFF)


def in_float32(
    apply: Callable[..., Any],
    load: Callable[[Tensor, WeightError], Tensor],
    store: Callable[[Tensor, WeightError, Tensor], None],
    weight: Tensor,
    error: WeightError,
    factors: tuple[Tensor, Tensor],
    how: tuple[Any, ...],
    residual: tuple[Any, ...],
) -> None:
    """`apply_` on bfloat16 weights with their errors: `apply` on the float32 weights that they stand for, some rows at a time.

    `load` and `store` are `joined` and `split_`, or do the same.
    """
    grad, phi, subtract_left, subtract_right, sign = residual
    rows, cols = weight.shape[-2:]

    def matrices(tensor: Tensor | None) -> list[Any]:
        return [tensor] if tensor is None or tensor.dim() == 2 else list(tensor)

    stacks = [weight, *error, *factors, grad, phi, subtract_left, subtract_right]
    count = len(matrices(weight))
    for w, high, low, a, b, g, scale, c, d in zip(
        *(matrices(t) * (count if t is None else 1) for t in stacks), strict=True
    ):
        for chunk in row_chunks(rows, cols, cache_elements(w.device)):
            own = WeightError(high, low).at(chunk)
            value = load(w[chunk], own)
            lines = [t if t is None or t.shape[0] == 1 else t[chunk] for t in (g, scale, c)]
            apply(value, a[chunk], b, *how, *lines, d, sign)
            store(w[chunk], own, value)


def store_(
    target: Tensor, value: Tensor, rounding_key: int | None, start: int, error: WeightError | None = None
) -> None:
    """target ← value, rounded to the target's type: to nearest, or stochastically with a key, or with what that drops in `error`.

    Args:
        target: modified in place; for stochastic rounding, bfloat16.
        value: float32, same shape.
        rounding_key: from `counter_rng.make_key`; None rounds to nearest.
        start: global index of the first element, so that the noise does not depend on chunks or shards.
        error: of the target, bfloat16, modified in place; there is no key then.
    """
    if error is not None:
        split_(target, error, value)
        return
    if rounding_key is not None:
        positions = torch.arange(start, start + value.numel(), device=value.device).view(value.shape)
        value = stochastic_round(value, rounding_key, positions)
    target.copy_(value)


def stochastic_round(value: Tensor, key: int, positions: Tensor) -> Tensor:
    """float32 values on the bfloat16 grid, each rounded up with a probability equal to its distance from the lower neighbour.

    A bfloat16 is the upper half of a float32:

        | s | eeeeeeee | mmmmmmm | xxxxxxxxxxxxxxxx |
        |<--- kept: bfloat16 --->|<--- dropped ---->|

    Adding a uniform 16-bit integer to the dropped half carries into the kept half with probability x / 2**16. The sum is an integer
    addition on the bits, so it works across exponents and for both signs (away from or towards zero in magnitude). Expectation over
    keys is the value itself. Infinities and NaNs are left alone; finite values within one step of the largest bfloat16 can become
    infinite, as in rounding to nearest.
    """
    noise = random_bits(key, positions).bitwise_and_(0xFFFF).to(torch.int32)
    bits = value.contiguous().view(torch.int32)
    rounded = (bits + noise).bitwise_and_(-65536).view(torch.float32)
    return torch.where(torch.isfinite(value), rounded, value)
