// Vectors of as many floats as the instruction set computes at a time, in the compiler's own vector types.
//
// For loops in which bytes, integers and floats meet, which compilers turn into poor vector code by themselves. An operation on a
// vector is the operation on each of its lanes, rounded alike, so that all instruction sets give the same bits.
#pragma once

#ifdef __SSE2__
#include <immintrin.h>  // intrinsics alone, which are inlined always
#endif

#include <utility>  // types alone

#include "numbers.h"

namespace lowrank {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef u8 Bytes __attribute__((vector_size(LANES)));
typedef s8 SignedBytes __attribute__((vector_size(LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint16_t Pairs __attribute__((vector_size(4 * LANES)));  // the halves of Words, the lower ones first

// A cast between vectors of one size takes the bits as they are; this takes the values.
INLINE Floats floats(Ints x) { return __builtin_convertvector(x, Floats); }

INLINE Ints ints(Bytes x) {
#if defined(__AVX512F__)
  return Ints(_mm512_cvtepu8_epi32(__m128i(x)));
#elif defined(__AVX2__)
  return Ints(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(x))));
#else
  return __builtin_convertvector(x, Ints);
#endif
}

// Of bytes with a sign, in two's complement.
INLINE Ints signed_ints(Bytes x) {
#if defined(__AVX512F__)
  return Ints(_mm512_cvtepi8_epi32(__m128i(x)));
#elif defined(__AVX2__)
  return Ints(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(int64_t(x))));
#else
  return __builtin_convertvector(SignedBytes(x), Ints);
#endif
}

INLINE Ints ints(Halves x) {
#if defined(__AVX512F__)
  return Ints(_mm512_cvtepu16_epi32(__m256i(x)));
#elif defined(__AVX2__)
  return Ints(_mm256_cvtepu16_epi32(__m128i(x)));
#else
  return __builtin_convertvector(x, Ints);
#endif
}

// Their low bytes.
INLINE Bytes bytes(Ints x) {
#if defined(__AVX512F__)
  return Bytes(_mm512_cvtepi32_epi8(__m512i(x)));
#elif defined(__AVX2__)
  x &= 0xFF;
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(__m256i(x)), _mm256_extracti128_si256(__m256i(x), 1));
  return Bytes(_mm_cvtsi128_si64(_mm_packus_epi16(words, words)));
#else
  return __builtin_convertvector(x, Bytes);
#endif
}

INLINE Words numbered() {  // 0, 1, 2, …
  Words x;
  for (int k = 0; k < LANES; ++k) x[k] = uint32_t(k);
  return x;
}

INLINE Floats square_root(Floats x) {
#if defined(__AVX512F__)
  return Floats(_mm512_sqrt_ps(__m512(x)));
#elif defined(__AVX2__)
  return Floats(_mm256_sqrt_ps(__m256(x)));
#elif defined(__SSE2__)
  return Floats(_mm_sqrt_ps(__m128(x)));
#else
  for (int k = 0; k < LANES; ++k) x[k] = __builtin_sqrtf(x[k]);
  return x;
#endif
}

// x y + z, rounded once where the instruction set can do so.
INLINE Floats multiply_add(Floats x, Floats y, Floats z) {
#if defined(__AVX512F__)
  return Floats(_mm512_fmadd_ps(__m512(x), __m512(y), __m512(z)));
#elif defined(__AVX2__) && defined(__FMA__)
  return Floats(_mm256_fmadd_ps(__m256(x), __m256(y), __m256(z)));
#else
  return x * y + z;
#endif
}

// The bits of |x|.
INLINE Ints magnitude(Floats x) { return Ints(x) & int32_t(MAGNITUDE); }

template <class T>  // a number, or a vector of them
INLINE T larger(T a, T b) {
  return a > b ? a : b;
}

INLINE uint32_t largest(Words x) {
  uint32_t most = x[0];
  for (int k = 1; k < LANES; ++k) most = x[k] > most ? x[k] : most;
  return most;
}

// How a vector comes from memory and goes there: all of its lanes, or the first n, the others being 0.
struct All {
  INLINE Floats load(const f32* from) const { return get<Floats>(from); }
  INLINE Bytes load(const u8* from) const { return get<Bytes>(from); }
  INLINE Halves load(const u16* from) const { return get<Halves>(from); }
  INLINE void store(f32* to, Floats x) const { __builtin_memcpy(to, &x, sizeof x); }
  INLINE void store(u8* to, Bytes x) const { __builtin_memcpy(to, &x, sizeof x); }
  INLINE Words only(Words x) const { return x; }

 private:
  template <class T>
  INLINE static T get(const void* from) {
    T x;
    __builtin_memcpy(&x, from, sizeof x);
    return x;
  }
};

struct First {
  int n;

  INLINE Floats load(const f32* from) const { return get<Floats>(from); }
  INLINE Bytes load(const u8* from) const { return get<Bytes>(from); }
  INLINE Halves load(const u16* from) const { return get<Halves>(from); }
  INLINE void store(f32* to, Floats x) const { put(to, x); }
  INLINE void store(u8* to, Bytes x) const { put(to, x); }
  INLINE Words only(Words x) const { return Ints(numbered()) < n ? x : Words{}; }

 private:
  template <class V, class T>
  INLINE V get(const T* from) const {
    V x = {};
    for (int k = 0; k < n; ++k) x[k] = from[k];
    return x;
  }
  template <class V, class T>
  INLINE void put(T* to, V x) const {
    for (int k = 0; k < n; ++k) to[k] = x[k];
  }
};

// body(j, part) for vectors from `begin` to `end`; `part` moves their lanes.
template <class Body>
INLINE void over(int begin, int end, const Body& body) {
  int j = begin;
  for (; j + LANES <= end; j += LANES) body(j, All{});
  if (j < end) body(j, First{end - j});
}

// Numbers that are known when this is compiled: templates have them as parameters.
template <int... I>
using Numbers = std::integer_sequence<int, I...>;
template <int COUNT>
using UpTo = std::make_integer_sequence<int, COUNT>;
using Lanes = UpTo<LANES>;

// The lanes number I… of two vectors, those of the second after those of the first.
template <int... I>
INLINE Floats lanes_of(Floats a, Floats b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, Ints{I...});
#endif
}

// FOLD vectors of elements beside one vector of numbers, of which each belongs to FOLD neighbours: FOLD is 1, 2, 4 or 8.
//
// AVX2 moves lanes of two vectors within halves of 128 bits only, and of one vector there in half the time. So numbers that belong to
// elements of the first halves lie in the first half there: `placed` brings them from their order in memory, `back` returns them.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool BY_HALVES = true;
#else
constexpr bool BY_HALVES = false;
#endif

template <int FOLD>
struct Neighbours {
  static constexpr int EACH_HALF = FOLD < 8 ? 4 / FOLD : 0;  // numbers that belong to half a vector

  // The sums of neighbours, then of neighbouring sums, until each is of FOLD; they lie as `placed` says.
  INLINE static Floats sums(Floats* x) {
    for (int left = FOLD / 2; left > 0; left /= 2) {
      for (int k = 0; k < left; ++k) x[k] = FOLD == 8 && left == 1 ? of_halves(x[0], x[1], Lanes{}) : of_pairs(x[2 * k], x[2 * k + 1], Lanes{});
    }
    return x[0];
  }

  INLINE static Floats placed(Floats x) { return EACH_HALF && BY_HALVES ? placed(x, Lanes{}) : x; }
  INLINE static Floats back(Floats x) { return EACH_HALF && BY_HALVES ? back(x, Lanes{}) : x; }

  // The number of every element of vector number K.
  template <int K>
  INLINE static Floats repeated(Floats x) {
    return repeated<K>(x, Lanes{});
  }

 private:
  static constexpr int half(int lane) { return lane / 4 * 4; }

  template <int... I>
  INLINE static Floats of_pairs(Floats a, Floats b, Numbers<I...>) {
    if constexpr (BY_HALVES) {
      return lanes_of<(half(I) + I % 2 * 2 + I % 4 / 2 * LANES)...>(a, b) + lanes_of<(half(I) + I % 2 * 2 + I % 4 / 2 * LANES + 1)...>(a, b);
    } else {
      return lanes_of<(2 * I)...>(a, b) + lanes_of<(2 * I + 1)...>(a, b);
    }
  }

  template <int... I>
  INLINE static Floats of_halves(Floats a, Floats b, Numbers<I...>) {
    if constexpr (BY_HALVES) {
      return lanes_of<(I % 4 + I / 4 * LANES)...>(a, b) + lanes_of<(4 + I % 4 + I / 4 * LANES)...>(a, b);
    } else {
      return of_pairs(a, b, Numbers<I...>{});
    }
  }

  template <int... I>
  INLINE static Floats placed(Floats x, Numbers<I...>) {
    constexpr int part = EACH_HALF ? EACH_HALF : 4;
    return lanes_of<(I % 4 / part * 2 * part + I / 4 % 2 * part + I % part)...>(x, x);
  }

  template <int... I>
  INLINE static Floats back(Floats x, Numbers<I...>) {
    constexpr int part = EACH_HALF ? EACH_HALF : 4;
    return lanes_of<(I / part % 2 * 4 + I / part / 2 * part + I % part)...>(x, x);
  }

  template <int K, int... I>
  INLINE static Floats repeated(Floats x, Numbers<I...>) {
    if constexpr (BY_HALVES && EACH_HALF) {
      return lanes_of<(half(I) + K * EACH_HALF + I % 4 / FOLD)...>(x, x);
    } else {
      return lanes_of<((K * LANES + I) / FOLD)...>(x, x);
    }
  }
};

// The sum of 16 · COUNT parts.
template <int COUNT>
INLINE double total_of(const Floats* sums) {
  float parts[16 * COUNT];
  __builtin_memcpy(parts, sums, sizeof parts);
  for (int half = 8 * COUNT; half > 0; half /= 2) {
    EACH(k, half) parts[k] += parts[k + half];
  }
  return double(parts[0]);
}

// Σx² of n floats, in 16 parts of float32 whatever the instruction set.
INLINE double sum_of_squares(const f32* x, int n) {
  constexpr int PARTS = 16 / LANES;
  Floats sums[PARTS] = {};
  const auto add = [&](const f32* from) __attribute__((always_inline)) {
    for (int k = 0; k < PARTS; ++k) {
      const Floats value = All{}.load(from + k * LANES);
      sums[k] += value * value;
    }
  };
  int j = 0;
  for (; j + 16 <= n; j += 16) add(x + j);
  float last[16] = {};  // the rest, with zeros after it, which change no sum
  EACH(k, n - j) last[k] = x[j + k];
  if (j < n) add(last);
  return total_of<1>(sums);
}

// The same of each of COUNT arrays. Memory gives several streams, far from each other, in less time than one after the other.
template <int COUNT>
INLINE void sums_of_squares(const f32* const* x, int n, double* totals) {
  constexpr int PARTS = 16 / LANES;
  Floats sums[COUNT][PARTS] = {};
  const int whole = n / 16 * 16;
  for (int j = 0; j < whole; j += 16) {
    for (int i = 0; i < COUNT; ++i) {
      for (int k = 0; k < PARTS; ++k) {
        const Floats value = All{}.load(x[i] + j + k * LANES);
        sums[i][k] += value * value;
      }
    }
  }
  for (int i = 0; i < COUNT; ++i) {
    float last[16] = {};
    EACH(k, n - whole) last[k] = x[i][whole + k];
    for (int k = 0; k < PARTS; ++k) {
      const Floats value = All{}.load(last + k * LANES);
      sums[i][k] += value * value;
    }
    totals[i] = total_of<1>(sums[i]);
  }
}

struct SquareAndDot {
  double square, dot;
};

// Σx² and Σxy, in 64 parts each: sums that wait for the ones before would take as long as the memory does.
INLINE SquareAndDot square_and_dot(const f32* x, const f32* y, int n) {
  constexpr int PARTS = 64 / LANES;
  Floats squares[PARTS] = {}, dots[PARTS] = {};
  const auto add = [&](const f32* from, const f32* with) __attribute__((always_inline)) {
    for (int k = 0; k < PARTS; ++k) {
      const Floats value = All{}.load(from + k * LANES);
      squares[k] += value * value;
      dots[k] += value * All{}.load(with + k * LANES);
    }
  };
  int j = 0;
  for (; j + 64 <= n; j += 64) add(x + j, y + j);
  float last_x[64] = {}, last_y[64] = {};  // the rest, with zeros after it, which change no sum
  EACH(k, n - j) last_x[k] = x[j + k];
  EACH(k, n - j) last_y[k] = y[j + k];
  if (j < n) add(last_x, last_y);
  return {total_of<4>(squares), total_of<4>(dots)};
}

}  // namespace
}  // namespace lowrank
