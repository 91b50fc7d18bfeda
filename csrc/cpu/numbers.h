// Storage types, rounding and random bits, for the kernels: everything is local to each copy of a file that includes it.
#pragma once

#include "ops.h"

namespace lowrank {
namespace {

// A loop over elements, none of which depends on another: what is written either does not overlap what is read, or is it.
#ifdef __clang__
#define EACH(j, n) _Pragma("clang loop vectorize(assume_safety)") for (int j = 0; j < (n); ++j)
#else
#define EACH(j, n) _Pragma("GCC ivdep") for (int j = 0; j < (n); ++j)
#endif

// Loops of a known length have no ragged end, which counts where they are short: blocks of the usual size have code of their own,
// for which everything that they call must be inlined.
#define INLINE inline __attribute__((always_inline))
constexpr int USUAL = 256;

constexpr float MIN_SCALE = 0x1p-100f;
constexpr uint32_t GOLDEN = 0x9E3779B9u, INFINITE = 0x7F800000u, MAGNITUDE = 0x7FFFFFFFu;
constexpr float SHIFTER = 0x1.8p23f;  // added and taken off again, it rounds |y| < 2²² to the nearest integer, ties to even

inline uint32_t bits_of(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}

inline float float_of(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}

inline int smaller(int64_t a, int64_t b) { return int(a < b ? a : b); }  // one of them is the size of a tile or block

// ----------------------------------------------------------------------------------------------------------- storage types

inline float from_bfloat16(uint16_t h) { return float_of(uint32_t(h) << 16); }

// The bits of the nearest bfloat16 to the float of bits u.
inline uint32_t to_bfloat16(uint32_t u) {
  const uint32_t rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
  return (u & MAGNITUDE) > INFINITE ? 0x7FC0 : rounded;
}

inline float from_float16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = uint32_t(h & 0x7FFF) << 13, exponent = rest & 0x0F800000;
  const float small = float_of((113u << 23) + rest) - 0x1p-14f;  // subnormal: the fraction of 2⁻¹⁴
  const uint32_t normal = rest + (112u << 23), special = rest | INFINITE;
  return float_of(sign | (exponent == 0 ? bits_of(small) : exponent == 0x0F800000 ? special : normal));
}

inline uint16_t to_float16(float x) {
  const uint32_t u = bits_of(x) & MAGNITUDE, sign = (bits_of(x) >> 16) & 0x8000;
  const uint32_t small = bits_of(float_of(u) + 0.5f) - bits_of(0.5f);  // subnormal: the sum rounds at its last bit
  const uint32_t normal = (u - (112u << 23) + 0xFFF + ((u >> 13) & 1)) >> 13;
  const uint32_t special = u > INFINITE ? 0x7E00u : 0x7C00u;
  return uint16_t(sign | (u >= 0x47800000 ? special : u < 0x38800000 ? small : normal));
}

// n elements as float32: the tensor itself where it is of that type, else a converted copy in `buffer`.
INLINE const f32* load(const ConstRows& x, int64_t at, float* buffer, int n) {
  if (x.dtype == FLOAT32) return static_cast<const f32*>(x.data) + at;
  const u16* from = static_cast<const u16*>(x.data) + at;
  if (x.dtype == BFLOAT16) {
    EACH(j, n) buffer[j] = from_bfloat16(from[j]);
  } else {
    EACH(j, n) buffer[j] = from_float16(from[j]);
  }
  return buffer;
}

INLINE const f32* load(const Rows& x, int64_t at, float* buffer, int n) {
  return load(ConstRows{x.data, x.dtype, x.stride}, at, buffer, n);
}

// ------------------------------------------------------------------------------------------------- what rounding drops, kept beside

INLINE float joined(uint16_t upper, int32_t rest) {
  const int32_t bits = (int32_t(upper & 0x7FFF) << 16) + rest;
  return float_of(uint32_t(bits < 0 ? 0 : bits) | uint32_t(upper & 0x8000) << 16);
}

// n weights as float32, with what was dropped from them.
INLINE const f32* load(const ConstRows& x, const WeightError& error, int64_t at, float* buffer, int n) {
  if (!error.high) return load(x, at, buffer, n);
  const u16* from = static_cast<const u16*>(x.data) + at;
  const s8* high = error.high + at;
  if (error.low) {
    const u8* low = error.low + at;
    EACH(j, n) buffer[j] = joined(from[j], int32_t(high[j]) * 256 + low[j]);
  } else {
    EACH(j, n) buffer[j] = joined(from[j], int32_t(high[j]) * 256);
  }
  return buffer;
}

INLINE const f32* load(const Rows& x, const WeightError& error, int64_t at, float* buffer, int n) {
  return load(ConstRows{x.data, x.dtype, x.stride}, error, at, buffer, n);
}

// ------------------------------------------------------------------------------------------------------------- random bits

template <class T>  // uint32_t, or a vector of them
INLINE T mix(T x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// Random words number `position` + j, for j < `left`: where the lower half of the number wraps around, a new stream begins.
struct Stream {
  uint32_t low, key, upper;
  uint16_t offset;  // for halves of words, which are added to it
  int left;

  Stream(const Noise& noise, uint64_t position, int n)
      : low(uint32_t(position)),
        key(uint32_t(noise.key)),
        upper((uint32_t(position >> 32) * GOLDEN) ^ uint32_t(noise.key >> 32)),
        offset(noise.offset) {
    const uint32_t before_wrap = 0u - low;
    left = before_wrap && before_wrap < uint32_t(n) ? int(before_wrap) : n;
  }

  template <class T>
  INLINE T operator()(T j) const {
    return mix(mix((j + low) ^ key) ^ upper);
  }

  // A word of two random halves, mixed once: enough for the noise of codes.
  template <class T>
  INLINE T halves(T j) const {
    return mix((j + low) ^ (key ^ upper));
  }
};

// Round n floats into elements `at` … of x; `first` is the number of the first one, for the noise.
INLINE void store(const Rows& x, int64_t at, const float* __restrict value, int n, const Noise& noise, int64_t first) {
  if (x.dtype == FLOAT32) {
    f32* __restrict to = static_cast<f32*>(x.data) + at;
    EACH(j, n) to[j] = value[j];
    return;
  }
  u16* __restrict to = static_cast<u16*>(x.data) + at;
  if (x.dtype == FLOAT16) {
    EACH(j, n) to[j] = to_float16(value[j]);
  } else if (!noise.on) {
    EACH(j, n) to[j] = u16(to_bfloat16(bits_of(value[j])));
  } else {
    while (n > 0) {
      const Stream random(noise, uint64_t(noise.start) + uint64_t(first), n);
      EACH(j, random.left) {
        const uint32_t u = bits_of(value[j]), up = (u + (random(uint32_t(j)) & 0xFFFF)) >> 16;
        const uint32_t rounded = (u & MAGNITUDE) < INFINITE ? up : to_bfloat16(u);
        to[j] = u16(rounded);
      }
      n -= random.left;
      first += random.left;
      value += random.left;
      to += random.left;
    }
  }
}

// The same, with what is dropped kept in `error`.
INLINE void store(const Rows& x, const WeightError& error, int64_t at, const float* __restrict value, int n, const Noise& noise,
                  int64_t first) {
  if (!error.high) return store(x, at, value, n, noise, first);
  u16* __restrict to = static_cast<u16*>(x.data) + at;
  s8* __restrict high = error.high + at;
  u8* __restrict low = error.low ? error.low + at : nullptr;
  const auto number = [](float y, bool whole) __attribute__((always_inline)) {
    const uint32_t u = bits_of(y), bits = whole ? u : (u + 0x7F + ((u >> 8) & 1)) & 0xFFFFFF00u;
    return (u & MAGNITUDE) > INFINITE ? 0x7FC00000u : bits;
  };
  if (low) {
    EACH(j, n) {
      const uint32_t bits = number(value[j], true), upper = (bits + 0x8000) >> 16, rest = bits - (upper << 16);
      to[j] = u16(upper);
      high[j] = s8(u8(rest >> 8));
      low[j] = u8(rest);
    }
  } else {
    EACH(j, n) {
      const uint32_t bits = number(value[j], false), upper = (bits + 0x8000) >> 16;
      to[j] = u16(upper);
      high[j] = s8(u8((bits - (upper << 16)) >> 8));
    }
  }
}

}  // namespace
}  // namespace lowrank
