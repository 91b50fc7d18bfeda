"""What kernels share: the counter-based hash, conversions of low-precision numbers, and rounding. Everything is rounded as in torch.

Conversions between bfloat16 and float32 are shifts of bits, here and not by casts: the same bits come out compiled and interpreted
(whose casts cut the last bits off), and subnormal numbers and NaNs are what they are in torch.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def mix(x):
    """One round of the mixer of `counter_rng`, on uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_bits(key, positions):
    """`counter_rng.random_bits` for an int64 key and int64 positions, as uint32."""
    x = mix(positions.to(tl.uint32) ^ key.to(tl.uint32))
    high = (positions >> 32).to(tl.uint32) * 0x9E3779B9
    return mix(x ^ high ^ (key >> 32).to(tl.uint32))


@triton.jit
def random_halves(key, pairs):
    """Words of `counter_rng.random_halves`, as uint32: the lower half is that of position 2·pair, the upper that of the next."""
    upper = (pairs >> 32).to(tl.uint32) * 0x9E3779B9
    return mix(pairs.to(tl.uint32) ^ upper ^ (key ^ (key >> 32)).to(tl.uint32))


@triton.jit
def uniform(key, positions):
    """Numbers of `counter_rng.uniform` in float64: in (0, 1), never 0 or 1, to 32 bits."""
    return (random_bits(key, positions).to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2⁻³²


@triton.jit
def widen(x):
    """A float of any type as float32."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _upper_half(bits, added):
    """The bfloat16 made of the upper half of float32 bits, after adding a number to them; NaNs stay NaNs, infinities infinities."""
    magnitude = bits & 0x7FFFFFFF
    rounded = tl.where(magnitude < 0x7F800000, bits + added, bits)
    upper = tl.where(magnitude > 0x7F800000, 0x7FC00000, rounded) >> 16
    return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def to_bfloat16(x):
    """float32 to the nearest bfloat16, ties to even."""
    bits = x.to(tl.uint32, bitcast=True)
    return _upper_half(bits, 0x7FFF + ((bits >> 16) & 1))


@triton.jit
def to_bfloat16_stochastically(x, key, positions):
    """float32 to bfloat16, see `rounding.stochastic_round`."""
    bits = x.to(tl.uint32, bitcast=True)
    return _upper_half(bits, random_bits(key, positions) & 0xFFFF)


@triton.jit
def narrow(x, like: tl.constexpr):
    """float32 to the nearest number of a type."""
    if like == tl.bfloat16:
        return to_bfloat16(x)
    return x.to(like)


@triton.jit
def load_joined(w_ptr, high_ptr, low_ptr, at, inside):
    """Weights as float32, with what rounding dropped from them (`rounding.joined`) where there are pointers to it."""
    w = widen(tl.load(w_ptr + at, mask=inside, other=0.0))
    if high_ptr is not None:
        bits = w.to(tl.int32, bitcast=True)
        rest = tl.load(high_ptr + at, mask=inside, other=0).to(tl.int32) << 8
        if low_ptr is not None:
            rest += tl.load(low_ptr + at, mask=inside, other=0).to(tl.int32)
        size = tl.maximum((bits & 0x7FFFFFFF) + rest, 0)
        w = (size | ((bits >> 31) << 31)).to(tl.float32, bitcast=True)
    return w


@triton.jit
def store_split(w_ptr, high_ptr, low_ptr, at, value, inside):
    """float32 as bfloat16 weights and what rounding drops (`rounding.split_`)."""
    bits = value.to(tl.uint32, bitcast=True)
    number = (bits & 0x7FFFFFFF) <= 0x7F800000
    if low_ptr is None:
        bits = (bits + 0x7F + ((bits >> 8) & 1)) & 0xFFFFFF00
    bits = tl.where(number, bits, 0x7FC00000)
    upper = (bits + 0x8000) >> 16
    rest = (bits - (upper << 16)).to(tl.int32, bitcast=True)
    tl.store(w_ptr + at, upper.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
    tl.store(high_ptr + at, (rest >> 8).to(tl.int8), mask=inside)
    if low_ptr is not None:
        tl.store(low_ptr + at, (rest & 0xFF).to(tl.uint8), mask=inside)


@triton.jit
def nearest_integer(x):
    """float32 of magnitude below 2²² to the nearest integer, ties to even: past 2²³ there are only integers."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def sign(x):
    """−1, 0 or 1; 0 for NaN, as in torch."""
    return tl.where(x > 0.0, 1.0, 0.0) - tl.where(x < 0.0, 1.0, 0.0)


@triton.jit
def lerp(start, end, weight):
    """torch.lerp: exact at both ends."""
    near = weight < 0.5
    return tl.where(near, start, end) + tl.where(near, weight, weight - 1.0) * (end - start)


@triton.jit
def holds(ok_ptr):
    """The 0-d flag of an operation."""
    return tl.load(ok_ptr) != 0


@triton.jit
def matrix_product(a, b, total, precision: tl.constexpr):
    """total + a @ b; `precision` is for float32 operands. The interpreter knows no bfloat16 products, which float32 ones equal."""
    if a.dtype == tl.float32:
        return tl.dot(a, b, total, input_precision=precision)
    if INTERPRETED:
        return tl.dot(widen(a), widen(b), total)
    return tl.dot(a, b, total)
