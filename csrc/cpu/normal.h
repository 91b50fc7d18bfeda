// Standard normal numbers by Box-Muller, in float64: √(−2 ln u) cos 2πv and √(−2 ln u) sin 2πv, for u and v from random words.
//
// Logarithm, cosine and sine are those of the few numbers that occur here, without branches or tables, so that compilers turn loops
// over them into vector instructions. They are off by at most one unit in the last place or so, as those of libm, and of the same bits
// with every instruction set and every libm.
#pragma once

#include "numbers.h"

namespace lowrank {
namespace {

inline uint64_t bits_of(double x) {
  uint64_t u;
  __builtin_memcpy(&u, &x, 8);
  return u;
}

inline double double_of(uint64_t u) {
  double x;
  __builtin_memcpy(&x, &u, 8);
  return x;
}

// u < 2⁵² as a number: the fraction of 2⁵².
inline double number(uint64_t u) { return double_of(0x4330000000000000u | u) - 0x1p52; }

// c₀ + z (c₁ + z (c₂ + …))
INLINE double polynomial(double, double c) { return c; }
template <class... More>
INLINE double polynomial(double z, double c, More... more) {
  return c + z * polynomial(z, more...);
}

// (word + 1/2)/2³², in (0, 1).
inline double uniform(uint32_t word) { return (number(word) + 0.5) * 0x1p-32; }

// ln x for a normal x < 1: x = 2ᵏ (1 + f) with 1 + f between √½ and √2; ln(1 + f) = 2 (s + s³/3 + s⁵/5 + …), s = f/(2 + f).
inline double logarithm(double x) {
  constexpr double LN2_HIGH = 0x1.62e42fefa38p-1, LN2_LOW = 0x1.ef35793c7673p-45;  // k times the first is exact
  constexpr uint64_t ROOT_HALF = 0x3FE6A09E667F3BCDu;
  const uint64_t above = (bits_of(x) - ROOT_HALF + (uint64_t(1024) << 52)) >> 52;  // k + 1024
  const double k = number(above) - 1024.0, f = double_of(bits_of(x) - ((above - 1024) << 52)) - 1.0;
  const double s = f / (2.0 + f), z = s * s;
  const double tail = 2.0 * z * polynomial(z, 1.0 / 3, 1.0 / 5, 1.0 / 7, 1.0 / 9, 1.0 / 11, 1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21);
  return k * LN2_HIGH - ((s * (f - tail) - k * LN2_LOW) - f);
}

struct Turn {
  double cos, sin;
};

// Of the angle 2πv, v = `uniform(word)`: x is what it is away from the nearest quarter turn, |x| ≤ π/4.
inline Turn turn(uint32_t word) {
  constexpr double QUARTER_HIGH = 0x1.921fb54442dp+0, QUARTER_LOW = 0x1.8469898cc517p-48;  // four times the first is exact
  const double angle = 6.283185307179586 * uniform(word);
  const uint64_t quarter = (uint64_t(word) + (1u << 29)) >> 30;
  const double x = (angle - number(quarter) * QUARTER_HIGH) - number(quarter) * QUARTER_LOW, z = x * x, half = 0.5 * z;
  const double sin_tail = polynomial(z, -1.0 / 6, 1.0 / 120, -1.0 / 5040, 1.0 / 362880, -1.0 / 39916800, 1.0 / 6227020800, -1.0 / 1307674368000,
                                     1.0 / 355687428096000);
  const double cos_tail = polynomial(z, 1.0 / 24, -1.0 / 720, 1.0 / 40320, -1.0 / 3628800, 1.0 / 479001600, -1.0 / 87178291200,
                                     1.0 / 20922789888000);
  const double near_one = 1.0 - half;
  const double sin_x = x + x * z * sin_tail, cos_x = near_one + ((1.0 - near_one - half) + z * z * cos_tail);
  const double cos = quarter & 1 ? sin_x : cos_x, sin = quarter & 1 ? cos_x : sin_x;
  return {double_of(bits_of(cos) ^ (((quarter + 1) & 2) << 62)), double_of(bits_of(sin) ^ ((quarter & 2) << 62))};
}

}  // namespace
}  // namespace lowrank
