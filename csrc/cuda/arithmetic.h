// The arithmetic of single numbers: hash, conversions, rounding, codes, rules of moments. For the device under nvcc, for the host under
// any C++17 compiler, with the same bits (but for the last ones of `log`, `cos` and `sin`, in float64).
//
// Definitions: lowrank_optim/kernels/{counter_rng,reference}.py and lowrank_optim/quantization/{rows,moments,basis}.py. Every operation
// is rounded to float32 once, in the order written there: compile with --fmad=false (-ffp-contract=off), IEEE division and roots.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define LOWRANK_HD __host__ __device__ __forceinline__
#else
#define LOWRANK_HD inline
#endif

namespace lowrank {

LOWRANK_HD uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
#endif
}

LOWRANK_HD float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
#endif
}

constexpr uint32_t INFINITE = 0x7F800000u, NOT_A_NUMBER = 0x7FC00000u, MAGNITUDE = 0x7FFFFFFFu;

// ------------------------------------------------------------------------------------------------------------------ random bits

LOWRANK_HD uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

LOWRANK_HD uint32_t random_bits(uint64_t key, int64_t position) {
  const uint64_t at = static_cast<uint64_t>(position);
  const uint32_t x = mix(static_cast<uint32_t>(at) ^ static_cast<uint32_t>(key));
  return mix(x ^ (static_cast<uint32_t>(at >> 32) * 0x9E3779B9u) ^ static_cast<uint32_t>(key >> 32));
}

// Two random halves in a word, mixed once: enough for the noise of codes.
LOWRANK_HD uint32_t random_halves(uint64_t key, int64_t pair) {
  const uint64_t at = static_cast<uint64_t>(pair);
  const uint32_t upper = (static_cast<uint32_t>(at >> 32) * 0x9E3779B9u) ^ static_cast<uint32_t>(key ^ (key >> 32));
  return mix(static_cast<uint32_t>(at) ^ upper);
}

// In (0, 1), never 0 or 1, to 32 bits.
LOWRANK_HD double uniform(uint64_t key, int64_t position) {
  return (static_cast<double>(random_bits(key, position)) + 0.5) * 2.3283064365386963e-10;  // 2⁻³²
}

// Random bits of positions from `start` on, those of codes moved by `shift` (turn times the golden ratio); `on` 0 rounds to nearest.
struct Noise {
  int32_t on;
  uint16_t shift;
  uint64_t key;
  int64_t start;
};

// --------------------------------------------------------------------------------------------------------------- stored numbers

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

LOWRANK_HD float half_to_float(uint16_t h) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(h));
#else
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = (h >> 10) & 0x1F, mantissa = h & 0x3FF;
  if (exponent == 31) return float_of(sign | INFINITE | (mantissa << 13));
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(mantissa) * 5.9604644775390625e-08f;  // 2⁻²⁴
  return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
#endif
}

LOWRANK_HD uint16_t float_to_half(float x) {
#ifdef __CUDA_ARCH__
  return __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t bits = bits_of(x), magnitude = bits & MAGNITUDE;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  if (magnitude > INFINITE) return sign | 0x7E00;
  if (magnitude >= 0x477FF000u) return sign | 0x7C00;  // from 65520 on, to infinity
  if (magnitude < 0x38800000u) {                       // below 2⁻¹⁴ the spacing is 2⁻²⁴: the sum rounds to it
    return sign | static_cast<uint16_t>(bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u);
  }
  const uint32_t rounded = magnitude + 0xFFF + ((magnitude >> 13) & 1);
  return sign | static_cast<uint16_t>((rounded - 0x38000000u) >> 13);
#endif
}

// A bfloat16 is the upper half of a float32. Adding to the lower half rounds; NaNs stay NaNs, infinities infinities.
LOWRANK_HD uint16_t upper_half(uint32_t bits, uint32_t added) {
  const uint32_t magnitude = bits & MAGNITUDE;
  if (magnitude > INFINITE) return static_cast<uint16_t>(NOT_A_NUMBER >> 16);
  return static_cast<uint16_t>((magnitude < INFINITE ? bits + added : bits) >> 16);
}

LOWRANK_HD uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  return upper_half(bits, 0x7FFFu + ((bits >> 16) & 1));
}

LOWRANK_HD uint16_t float_to_bfloat16(float x, const Noise& noise, int64_t position) {
  return upper_half(bits_of(x), random_bits(noise.key, noise.start + position) & 0xFFFFu);
}

LOWRANK_HD float load(const void* data, int32_t dtype, int64_t at) {
  if (dtype == FLOAT32) return static_cast<const float*>(data)[at];
  const uint16_t raw = static_cast<const uint16_t*>(data)[at];
  return dtype == BFLOAT16 ? float_of(static_cast<uint32_t>(raw) << 16) : half_to_float(raw);
}

// Round to nearest, or with `noise` stochastically to bfloat16 (a float32 target then holds the bfloat16).
LOWRANK_HD void store(void* data, int32_t dtype, int64_t at, float x, const Noise& noise, int64_t position) {
  if (dtype == FLOAT16) {
    static_cast<uint16_t*>(data)[at] = float_to_half(x);
  } else if (dtype == BFLOAT16) {
    static_cast<uint16_t*>(data)[at] = noise.on ? float_to_bfloat16(x, noise, position) : float_to_bfloat16(x);
  } else {
    static_cast<float*>(data)[at] =
        noise.on ? float_of(static_cast<uint32_t>(float_to_bfloat16(x, noise, position)) << 16) : x;
  }
}

// ------------------------------------------------------------------------------------------------------------------------ codes

LOWRANK_HD float levels_of(int bits, bool with_sign) {
  return bits == 8 ? (with_sign ? 127.0f : 256.0f) : (with_sign ? 7.0f : 16.0f);
}

// The stored code (as read: int8 or uint8 or a nibble) as a level.
LOWRANK_HD float level_of(int code, int bits, bool with_sign) {
  return static_cast<float>(code) + (with_sign ? (bits == 4 ? -8.0f : 0.0f) : 1.0f);
}

// A block's scale from the bits of its largest magnitude.
LOWRANK_HD float scale_of(uint32_t largest) {
  if (largest >= INFINITE) return float_of(NOT_A_NUMBER);
  const float scale = float_of(largest);
  return scale < 7.888609052210118e-31f ? 0.0f : scale;  // 2⁻¹⁰⁰
}

LOWRANK_HD float factor_of(float scale, float levels) { return scale > 0.0f ? (1.0f / scale) * levels : 0.0f; }

// What moves a number before it goes to the nearest level: 0 without noise, else ρ = (r + 1/2)/2¹⁶ − 1/2 for a random r of 16 bits.
// An even position and the odd one after it share a word, hashed once where they are asked for in a row.
struct Parts {
  const Noise& noise;
  int64_t pair;  // the number of the word
  uint32_t word;

  LOWRANK_HD explicit Parts(const Noise& n) : noise(n), pair(-1), word(0) {}

  LOWRANK_HD float operator()(int64_t position) {
    if (!noise.on) return 0.0f;
    const int64_t at = noise.start + position;
    if (at >> 1 != pair) {
      pair = at >> 1;
      word = random_halves(noise.key, pair);
    }
    const uint32_t random = ((at & 1 ? word >> 16 : word) + noise.shift) & 0xFFFFu;
    return static_cast<float>(random) * 1.52587890625e-05f - 0.49999237060546875f;  // 2⁻¹⁶, 1/2 − 2⁻¹⁷
  }
};

// The code of x in a block of this factor, moved by `part`. What was decoded comes back within 2⁻²¹ |y|, and has to stay what it was:
// hence the factor of `part`.
LOWRANK_HD int code_of(float x, float factor, int bits, bool with_sign, float part) {
  float y = x * factor;
  if (!(y == y)) y = 0.0f;
  float level = rintf(y + part * (1.0f - fabsf(y) * 1.9073486328125e-06f));  // 2⁻¹⁹
  const float levels = levels_of(bits, with_sign), least = with_sign ? -levels : 1.0f;
  level = fminf(fmaxf(level, least), levels);
  return static_cast<int>(level + (with_sign ? (bits == 4 ? 8.0f : 0.0f) : -1.0f));
}

// The bits of floats as unsigned integers in the order of their values (NaNs at both ends), and back.
LOWRANK_HD uint32_t ordered(uint32_t bits) { return bits >> 31 ? ~bits : bits | 0x80000000u; }

LOWRANK_HD uint32_t disordered(uint32_t place) { return place >> 31 ? place & MAGNITUDE : ~place; }

// The step between the codes of a group of a basis; NaN where an end is NaN or infinite, or the span overflows.
LOWRANK_HD float step_of(float least, float greatest, int bits) {
  const float step = (greatest - least) / (bits == 8 ? 255.0f : 15.0f);
  if (bits_of(step) >= INFINITE) return float_of(NOT_A_NUMBER);
  return step < 1.1754943508222875e-38f ? 0.0f : step;  // 2⁻¹²⁶
}

// The code of x in a group with this zero point and step; 0 where there is no step, or it is NaN.
LOWRANK_HD int code_between(float x, float zero, float step, int bits) {
  if (!(step > 0.0f)) return 0;
  return static_cast<int>(fminf(fmaxf(rintf((x - zero) / step), 0.0f), bits == 8 ? 255.0f : 15.0f));
}

// ------------------------------------------------------------------------------------------------------------- rules of moments

// weight1 = 1 − β₁, weight2 = 1 − β₂; N = m / (√v · root_factor + root_offset)
struct Adam {
  float weight1, beta2, weight2, root_factor, root_offset;
};

// What rounding weights to bfloat16 drops (kernels/rounding.py), which lies as the weights do: `low` may be null, and where `high` is,
// nothing is kept.
struct WeightError {
  int8_t* high;
  uint8_t* low;
};

// w ← keep·w − alpha·N
struct StepParams {
  float alpha, keep;
  WeightError error;
};

// A weight as float32, with what was dropped from it.
LOWRANK_HD float load(const void* data, int32_t dtype, const WeightError& error, int64_t at) {
  if (!error.high) return load(data, dtype, at);
  const uint32_t upper = static_cast<const uint16_t*>(data)[at];
  const int32_t rest = error.high[at] * 256 + (error.low ? error.low[at] : 0);
  const int32_t size = static_cast<int32_t>((upper & 0x7FFF) << 16) + rest;
  return float_of(static_cast<uint32_t>(size < 0 ? 0 : size) | (upper & 0x8000) << 16);
}

LOWRANK_HD void store(void* data, int32_t dtype, const WeightError& error, int64_t at, float x, const Noise& noise, int64_t position) {
  if (!error.high) return store(data, dtype, at, x, noise, position);
  uint32_t bits = bits_of(x);
  const bool number = (bits & MAGNITUDE) <= INFINITE;
  if (!error.low) bits = (bits + 0x7Fu + ((bits >> 8) & 1)) & 0xFFFFFF00u;
  if (!number) bits = NOT_A_NUMBER;
  const uint32_t upper = (bits + 0x8000u) >> 16, rest = bits - (upper << 16);
  static_cast<uint16_t*>(data)[at] = static_cast<uint16_t>(upper);
  error.high[at] = static_cast<int8_t>(static_cast<uint8_t>(rest >> 8));
  if (error.low) error.low[at] = static_cast<uint8_t>(rest);
}

struct Moments {
  float m, v, direction;
};

LOWRANK_HD float lerp(float start, float end, float weight) {
  const bool near = weight < 0.5f;
  return (near ? start : end) + (near ? weight : weight - 1.0f) * (end - start);
}

LOWRANK_HD float square_update(float v, float g, float beta, float rest) { return v * beta + (g * rest) * g; }

LOWRANK_HD Moments adam_step(float g, float m, float v, const Adam& adam) {
  m = lerp(m, g, adam.weight1);
  v = square_update(v, g, adam.beta2, adam.weight2);
  return {m, v, m / (sqrtf(v) * adam.root_factor + adam.root_offset)};
}

// −1, 0 or 1; 0 for NaN.
LOWRANK_HD float sign_of(float x) { return static_cast<float>((x > 0.0f) - (x < 0.0f)); }

}  // namespace lowrank
