// The small matrices of a step of LoRA-RITE, of many pairs, in float64 and in lanes as `eigen.h` has them: the two factors of a pair are
// neighbours. Compiled once for each instruction set, as the other kernels.
#include "eigen.h"
#include "ops.h"

namespace lowrank {
namespace {

// Of the other factor of each pair.
INLINE Doubles other(Doubles x) {
  Longs places;
  for (int k = 0; k < WIDE; ++k) places[k] = k ^ 1;
#ifdef __clang__
  Doubles y;
  for (int k = 0; k < WIDE; ++k) y[k] = x[k ^ 1];
  return y;
#else
  return __builtin_shuffle(x, places);
#endif
}

// out ← a b, or with TURNED a bᵀ; `out` is neither of them.
template <bool TURNED>
INLINE void multiply(int n, const Doubles* a, const Doubles* b, Doubles* out) {
  constexpr int WIDTH = 4;
  const int down = TURNED ? 1 : n, along = TURNED ? n : 1;  // of b
  for (int i = 0; i < n; ++i) {
    int j = 0;
    for (; j + WIDTH <= n; j += WIDTH) {
      Doubles sums[WIDTH] = {};
      for (int l = 0; l < n; ++l) {
        for (int k = 0; k < WIDTH; ++k) sums[k] += a[i * n + l] * b[l * down + (j + k) * along];
      }
      for (int k = 0; k < WIDTH; ++k) out[i * n + j + k] = sums[k];
    }
    for (; j < n; ++j) {
      Doubles sum = {};
      for (int l = 0; l < n; ++l) sum += a[i * n + l] * b[l * down + j * along];
      out[i * n + j] = sum;
    }
  }
}

// to ← (from + fromᵀ) / 2
INLINE void symmetric_part(int n, const Doubles* from, Doubles* to) {
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j <= i; ++j) to[i * n + j] = to[j * n + i] = (from[i * n + j] + from[j * n + i]) / 2.0;
  }
}

// Room of a thread, and what is kept: K^(−1/2) of each factor, and V.
struct Rooms {
  int n, size;
  Doubles *first, *second, *third, *fourth, *fifth, *lines, *roots, *moments;

  Rooms(int64_t rank, float* scratch, float* kept) : n(int(rank)), size(n * n) {
    first = reinterpret_cast<Doubles*>(scratch);
    second = first + size, third = second + size, fourth = third + size, fifth = fourth + size, lines = fifth + size;
    roots = reinterpret_cast<Doubles*>(kept);
    moments = roots + size;
  }
};

// small ← W (V + …)^(−1/2) W with the new V, V ← (1 − share) V + share W GᵀG W / d, with W = K^(−1/2) of the other factor's K = XᵀX.
template <int RANK>
void before(const RiteArgs* factors, int count, bool known, const double* sums, float* kept, float* small, float* scratch) {
  const Rooms s(factors->tall.rank, scratch, kept);
  const int n = RANK ? RANK : s.n, size = n * n;
  const auto own = [&](int lane) { return sums + 2 * lane * size; };
  const auto squares = [&](int lane) { return own(lane) + size; };
  const auto moment = [&](int lane) { return static_cast<const f32*>(factors[lane].moment); };
  Doubles share = {}, length = all(1.0);
  for (int lane = 0; lane < count; ++lane) {
    share[lane] = factors[lane].square_share;
    length[lane] = double(factors[lane].tall.size);
  }
  if (known) {
    const auto there = [&](int lane) { return static_cast<const f64*>(factors[lane].known); };
    for (int i = 0; i < size; ++i) s.roots[i] = gathered(count, there, i);
  } else {
    for (int i = 0; i < size; ++i) s.first[i] = gathered(count, own, i);
    power_of(n, {factors->tolerance, 0.0, true}, Doubles{}, s.first, s.second, s.lines, s.roots);
  }
  Doubles *duals = s.third, *mean = s.fourth, *half = s.fifth;
  for (int i = 0; i < size; ++i) duals[i] = other(s.roots[i]);
  for (int i = 0; i < size; ++i) mean[i] = gathered(count, squares, i) / length;
  multiply<false>(n, duals, mean, half);
  multiply<false>(n, half, duals, mean);
  for (int i = 0; i < size; ++i) {
    const Doubles old = gathered(count, moment, i);
    s.moments[i] = old + share * (mean[i] - old);
  }
  symmetric_part(n, s.moments, s.first);
  power_of(n, {factors->tolerance, factors->added, true}, Doubles{}, s.first, s.second, s.lines, mean);
  multiply<false>(n, duals, mean, half);
  multiply<false>(n, half, duals, mean);
  for (int lane = 0; lane < count; ++lane) {
    for (int i = 0; i < size; ++i) small[lane * size + i] = float(mean[i][lane]);
  }
}

// small ← (Y_oldᵀ Y_new) K_new⁺ and V ← P V Pᵀ, P = K_new^(−1/2) Y_newᵀ Y_old K_old^(−1/2), of the other factor Y.
template <int RANK>
void after(const RiteArgs* factors, int count, const double* sums, const float* kept, float* small, float* scratch) {
  const Rooms s(factors->tall.rank, scratch, const_cast<float*>(kept));
  const int n = RANK ? RANK : s.n, size = n * n;
  const auto own = [&](int lane) { return sums + 2 * lane * size; };
  const auto across = [&](int lane) { return own(lane) + size; };
  for (int i = 0; i < size; ++i) s.first[i] = gathered(count, own, i);
  Doubles *roots = s.third, *cross = s.fourth, *turn = s.fifth;
  power_of(n, {factors->tolerance, 0.0, true}, Doubles{}, s.first, s.second, s.lines, roots);
  for (int lane = 0; lane < count; ++lane) {
    f64* to = factors[lane].known;
    for (int i = 0; to && i < size; ++i) to[i] = roots[i][lane];
  }
  for (int i = 0; i < size; ++i) cross[i] = gathered(count, across, i);
  multiply<false>(n, roots, roots, s.first);
  multiply<false>(n, cross, s.first, s.second);
  for (int lane = 0; lane < count; ++lane) {
    for (int i = 0; i < size; ++i) small[lane * size + i] = float(s.second[i][lane ^ 1]);
  }
  multiply<true>(n, roots, cross, s.first);
  multiply<false>(n, s.first, s.roots, s.second);
  for (int i = 0; i < size; ++i) turn[i] = other(s.second[i]);
  multiply<false>(n, turn, s.moments, s.first);
  multiply<true>(n, s.first, turn, s.second);
  for (int lane = 0; lane < count; ++lane) {
    f32* to = factors[lane].moment;
    for (int i = 0; to && i < size; ++i) to[i] = float(s.second[i][lane]);
  }
}

template <int RANK>
constexpr RiteKernels kernels = {WIDE, before<RANK>, after<RANK>};

const RiteKernels& kernels_for(int64_t rank) { return rank == 16 ? kernels<16> : kernels<0>; }

}  // namespace

namespace LOWRANK_LEVEL {
extern const RiteKernelsFor rite_kernels = kernels_for;
}

}  // namespace lowrank
