"""Random numbers as a pure function of (key, position): the package's only source of randomness.

A counter-based generator hashes the position of an element together with a key, so a draw does not depend on the device, on the
order of the calls, on how a tensor is sharded, or on torch's global generators, and nothing has to be saved for a resume to be
exact. Keys are 64-bit integers made by `make_key` from (seed, parameter index, step, purpose).

The hash is two rounds of a 32-bit multiply-xorshift mixer. It is meant for sketches and rounding noise, not for cryptography.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from lowrank_optim.kernels.host import host_tensor

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF

GOLDEN = 0x9E37
"""The golden ratio's fraction in units of 2⁻¹⁶: how far the noise of a code moves from one turn to the next."""

# Separate streams for separate purposes, so that no two draws of one step are ever correlated.
PURPOSE_BASIS = 1
PURPOSE_ROUNDING = 2
PURPOSE_BLOCKS = 3
PURPOSE_STATE = 4
PURPOSE_LAYERS = 5
PURPOSE_SKETCH = 6


@lru_cache(maxsize=1 << 14)
def make_key(seed: int, index: int, step: int, purpose: int) -> int:
    """A 64-bit key for one stream of random numbers (splitmix64 over the four integers)."""
    key = 0
    for word in (seed, index, step, purpose):
        key = derive_key(key, word)
    return key


def derive_key(key: int, word: int) -> int:
    """The key of stream number `word` below `key`: of one expert of a stack, or one of two bases.

    Neighbouring keys would not do: their streams are permutations of each other.
    """
    key = (key + (word & _MASK64) + 0x9E3779B97F4A7C15) & _MASK64
    key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & _MASK64
    return key ^ (key >> 31)


def signed_key(key: int) -> int:
    """The 64 bits of a key as the int64 that a tensor holds; `unsigned_key` is the inverse."""
    return (key ^ 1 << 63) - (1 << 63)


def unsigned_key(word: int) -> int:
    """A key from the int64 that a tensor holds."""
    return word & _MASK64


def turn_offset(turn: int) -> int:
    """What is added to the random half of every element in turn number `turn`, modulo 2¹⁶."""
    return turn * GOLDEN & 0xFFFF


def _mix32_(x: Tensor) -> Tensor:
    """One round of the mixer on int64 values below 2**32; modifies x in place."""
    # int64 products wrap around, which leaves their low 32 bits (all that is kept) exact.
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x.bitwise_xor_(x >> shift).mul_(factor).bitwise_and_(_MASK32)
    return x.bitwise_xor_(x >> 16)


def random_bits(key: int, positions: Tensor) -> Tensor:
    """32 random bits for each position.

    Args:
        key: from `make_key`.
        positions: int64 tensor of any shape, non-negative.

    Returns:
        int64 tensor of the same shape with values in [0, 2**32).
    """
    low, high = key & _MASK32, key >> 32
    x = _mix32_((positions & _MASK32).bitwise_xor_(low))
    x.bitwise_xor_((positions >> 32).mul_(0x9E3779B9).bitwise_and_(_MASK32)).bitwise_xor_(high)
    return _mix32_(x)


def random_halves(key: int, positions: Tensor) -> Tensor:
    """16 random bits for each position, int64 in [0, 2**16), for the rounding of codes.

    Two positions share a word, even ones its lower half, and words are mixed once only: keys give permutations of one sequence, which
    is enough where elements of different keys are never compared, and takes a quarter of the time.
    """
    pairs = positions >> 1
    upper = (pairs >> 32).mul_(0x9E3779B9).bitwise_and_(_MASK32).bitwise_xor_((key ^ key >> 32) & _MASK32)
    words = _mix32_((pairs & _MASK32).bitwise_xor_(upper))
    return (words >> (positions & 1) * 16).bitwise_and_(0xFFFF)


def uniform(key: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers in (0, 1), never 0 or 1: (b random bits + 1/2) / 2ᵇ, b as many as the type holds exactly (32 in float64)."""
    bits = 32 if dtype == torch.float64 else 23
    words = random_bits(key, torch.arange(math.prod(shape), device=device)) >> (32 - bits)
    return words.to(torch.float64).add_(0.5).mul_(2.0**-bits).to(dtype).view(shape)


def gaussian(key: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers by Box-Muller: √(−2 ln u) cos 2πv.

    The transcendental functions are evaluated in float64, so that devices whose last bits differ there agree after rounding to
    float32 (but for about one element in 10**8).
    """
    out = torch.empty(shape, dtype=dtype, device=device)
    torch.ops.lowrank_optim.gaussian_(out, host_tensor([signed_key(key)], torch.int64))
    return out


def fill_gaussian_(out: Tensor, key: int) -> None:
    """The definition of `gaussian`, in torch ops: `out` is contiguous."""
    numel, pairs = out.numel(), (out.numel() + 1) // 2
    u, v = uniform(key, (2, pairs), out.device, torch.float64)
    radius, angle = u.log_().mul_(-2.0).sqrt_(), v.mul_(2.0 * math.pi)
    out.view(-1).copy_(torch.cat([radius * angle.cos(), radius * angle.sin()])[:numel])


def choose(key: int, population: int, count: int, device: torch.device) -> Tensor:
    """`count` distinct indices below `population`, uniformly and in ascending order; int64.

    The `count` smallest hashes win; ties (one in 2**32) go to the smaller index.
    """
    order = random_bits(key, torch.arange(population, device=device)).argsort(stable=True)
    return order[:count].sort().values


def choose_stratified(key: int, population: int, count: int, device: torch.device) -> Tensor:
    """`count` distinct ascending indices below `population`, one from each of `count` equal strata of a circle; int64.

    Needs memory for `count` indices only, whatever the population: index j is drawn uniformly from
    [⌊j·population/count⌋, ⌊(j+1)·population/count⌋), and all are turned by the same random offset, without which the members of
    smaller strata would be favoured.
    """
    edges = torch.arange(count + 1, device=device) * population // max(count, 1)
    width = edges[1:] - edges[:-1]
    indices = edges[:-1] + random_bits(key, torch.arange(count, device=device)) * width // 2**32
    # Two words make the offset: one has too few bits for the largest populations.
    high, low = random_bits(derive_key(key, 1), torch.arange(2, device=device))
    offset = (high * 2**31 + (low >> 1)) % population
    turned: Tensor = (indices + offset) % population
    return turned.sort().values
