"""Random numbers as a pure function of (key, position): the package's only source of randomness.

A counter-based generator hashes the position of an element together with a key, so a draw does not depend on the device, on the
order of the calls, on how a tensor is sharded, or on torch's global generators, and nothing has to be saved for a resume to be
exact. Keys are 64-bit integers made by `make_key` from (seed, parameter index, step, purpose).

The hash is two rounds of a 32-bit multiply-xorshift mixer. It is meant for sketches and rounding noise, not for cryptography.
"""

import math
import sys
from functools import lru_cache

import torch
from torch import Tensor

from lowrank_optim.kernels.host import cpu_tensor

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
PURPOSE_SUPPORT = 7
PURPOSE_FACTOR = 8
PURPOSE_VALUES = 9
PURPOSE_NOISE = 10
PURPOSE_PENALTY = 11
PURPOSE_TRIPLETS = 12
PURPOSE_RANKS = 13
PURPOSE_TRUNCATION = 14


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


def _signed32(word: int) -> int:
    """The low 32 bits of a word as the int32 that a tensor holds."""
    return ((word & _MASK32) ^ 1 << 31) - (1 << 31)


def _mix32_(x: Tensor, spare: Tensor | None = None) -> Tensor:
    """One round of the mixer on the bits of an int32 tensor, taken as unsigned numbers; modifies x, and `spare` of its shape."""
    spare = torch.empty_like(x) if spare is None else spare
    # Products wrap around. A right shift repeats the sign bit, which the mask takes away.
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        torch.bitwise_right_shift(x, shift, out=spare)
        x.bitwise_xor_(spare.bitwise_and_(_MASK32 >> shift)).mul_(_signed32(factor))
    torch.bitwise_right_shift(x, 16, out=spare)
    return x.bitwise_xor_(spare.bitwise_and_(0xFFFF))


def random_words(key: int, positions: Tensor) -> Tensor:
    """`random_bits` as the int32 of the same bits."""
    low, high = _signed32(key), _signed32(key >> 32)
    x = _mix32_(positions.to(torch.int32).bitwise_xor_(low))
    x.bitwise_xor_((positions >> 32).to(torch.int32).mul_(_signed32(0x9E3779B9))).bitwise_xor_(high)
    return _mix32_(x)


def random_bits(key: int, positions: Tensor) -> Tensor:
    """32 random bits for each position.

    Args:
        key: from `make_key`.
        positions: int64 tensor of any shape, non-negative.

    Returns:
        int64 tensor of the same shape with values in [0, 2**32).
    """
    return random_words(key, positions).to(torch.int64).bitwise_and_(_MASK32)


def random_word(key: int, position: int) -> int:
    """`random_bits` of one position as a Python integer, for decisions of the host."""
    word = _mix_int((position ^ key) & _MASK32)
    word ^= (position >> 32) * 0x9E3779B9 & _MASK32
    return _mix_int(word ^ key >> 32 & _MASK32)


def _mix_int(x: int) -> int:
    """`_mix32_` of one unsigned number."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ x >> shift) * factor & _MASK32
    return x ^ x >> 16


def random_halves(key: int, positions: Tensor) -> Tensor:
    """16 random bits for each position, int64 in [0, 2**16), for the rounding of codes.

    Two positions share a word, even ones its lower half, and words are mixed once only: keys give permutations of one sequence, which
    is enough where elements of different keys are never compared, and takes a quarter of the time.
    """
    pairs = positions >> 1
    upper = (pairs >> 32).to(torch.int32).mul_(_signed32(0x9E3779B9)).bitwise_xor_(_signed32(key ^ key >> 32))
    words = _mix32_(pairs.to(torch.int32).bitwise_xor_(upper))
    return (words >> (positions & 1).to(torch.int32) * 16).to(torch.int64).bitwise_and_(0xFFFF)


def consecutive_halves(key: int, start: int, count: int, device: torch.device, room: Tensor | None = None) -> Tensor:
    """`random_halves` of the positions from `start` on, as (count,) int16 of the same 16 bits: each word is mixed once.

    Args:
        key, start, count, device: of the positions.
        room: (2, count/2 + 512 or more) int32, in which the words are made; None makes it.
    """
    first, pairs = start >> 1, (start + count + 1 >> 1) - (start >> 1)
    if first >> 32 != first + pairs >> 32 or sys.byteorder == "big":
        halves = random_halves(key, torch.arange(start, start + count, device=device))
        return halves.bitwise_xor_(1 << 15).sub_(1 << 15).to(torch.int16)
    # Rows of 256 pairs: a sum takes half the time of `arange`.
    row = torch.arange(256, dtype=torch.int32, device=device)
    rows = torch.arange(first, first + pairs, 256, device=device).to(torch.int32)
    room = torch.empty(2, 256 * len(rows), dtype=torch.int32, device=device) if room is None else room
    torch.add(rows.unsqueeze(1), row, out=room[0, : 256 * len(rows)].view(-1, 256))
    words = room[0, :pairs].bitwise_xor_(_signed32(key ^ key >> 32 ^ (first >> 32) * 0x9E3779B9))
    return _mix32_(words, room[1, :pairs]).view(torch.int16)[start & 1 :][:count]


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
    torch.ops.lowrank_optim.gaussian_.default(out, cpu_tensor([signed_key(key)], torch.int64))
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


class Stratified:
    """`choose_stratified` in parts: any run of its sorted indices, on any device, without the rest and without a sort.

    Stratum j has index i_j, ascending, and i_j + offset modulo the population is chosen. So the sorted result is the strata from the
    first that passes the end (number `first`) on, then those before it.
    """

    def __init__(self, key: int, population: int, count: int) -> None:
        self.key, self.population, self.count = key, population, count
        turn = derive_key(key, 1)
        self.offset = (random_word(turn, 0) * 2**31 + (random_word(turn, 1) >> 1)) % population
        self.first = self._strata_below(population - self.offset)

    def below(self, bound: int) -> int:
        """How many of the chosen indices are below `bound`."""
        passed = self._strata_below(min(self.population, bound + self.population - self.offset)) - self.first
        return passed + self._strata_below(max(0, bound - self.offset))

    def indices(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Numbers `start` to `stop` of the sorted indices, int64."""
        first = start + self.first
        turn = min(max(first, self.count), first + stop - start)  # here the strata begin anew
        parts = [self._turned(a, b, device) for a, b in ((first, turn), (turn, first + stop - start)) if a < b]
        return parts[0] if len(parts) == 1 else torch.cat([torch.empty(0, dtype=torch.int64, device=device), *parts])

    def _turned(self, start: int, stop: int, device: torch.device) -> Tensor:
        """The indices of strata `start` to `stop`, which are numbered below `count`, or all from there on."""
        start, stop = (start, stop) if start < self.count else (start - self.count, stop - self.count)
        edges = torch.arange(start, stop + 1, device=device).mul_(self.population).floor_divide_(self.count)
        inside = random_bits(self.key, torch.arange(start, stop, device=device)).mul_(edges.diff())
        index = inside.bitwise_right_shift_(32).add_(edges[:-1]).add_(self.offset)
        return torch.where(index < self.population, index, index - self.population)

    def _strata_below(self, bound: int) -> int:
        """How many strata have an index, before the turn, below `bound`."""
        last = ((bound + 1) * self.count - 1) // self.population  # the last that begins at or before the bound
        if last >= self.count or last < 0:
            return max(0, min(last, self.count))
        edge, end = last * self.population // self.count, (last + 1) * self.population // self.count
        index = edge + random_word(self.key, last) * (end - edge) // 2**32
        return last + (index < bound)
