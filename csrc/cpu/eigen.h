// Many small symmetric matrices K = Z diag(w) Zᵀ and f(K) = Z diag(f(w)) Zᵀ, in float64.
//
// A lane of a vector is a matrix: as many as a vector has lanes are decomposed together, by reflections to a tridiagonal matrix and
// QL steps with implicit shifts on that. Lanes never mix, and no product is fused with an addition, so that all instruction sets give
// the same bits, wherever in a stack a matrix stands.
#pragma once

#include "lanes.h"
#include "numbers.h"

namespace lowrank {
namespace {

constexpr int WIDE = LANES / 2;  // matrices at a time
constexpr double EPS = 0x1p-52;
constexpr int MOST_STEPS = 60;  // for one eigenvalue: two or three are usual

typedef double Doubles __attribute__((vector_size(4 * LANES)));
typedef int64_t Longs __attribute__((vector_size(4 * LANES)));

INLINE Doubles all(double x) { return x - Doubles{}; }
INLINE Doubles absolute(Doubles x) { return Doubles(Longs(x) & INT64_MAX); }
INLINE Doubles with_sign(Doubles x, Doubles sign) { return sign < 0.0 ? -absolute(x) : absolute(x); }
INLINE Doubles most(Doubles a, Doubles b) { return a > b ? a : b; }

INLINE Doubles root(Doubles x) {
#if defined(__AVX512F__)
  return Doubles(_mm512_sqrt_pd(__m512d(x)));
#elif defined(__AVX2__)
  return Doubles(_mm256_sqrt_pd(__m256d(x)));
#else
  for (int k = 0; k < WIDE; ++k) x[k] = __builtin_sqrt(x[k]);
  return x;
#endif
}

INLINE bool any(Longs x) {
  int64_t found = 0;
  for (int k = 0; k < WIDE; ++k) found |= x[k];
  return found != 0;
}

// K = Q T Qᵀ with T tridiagonal: `diagonal` and `beside` it (element i is at (i, i + 1)), the columns of Q as rows of `z`. K is lost.
INLINE void tridiagonal(int n, Doubles* k, Doubles* z, Doubles* diagonal, Doubles* beside, Doubles* w) {
  for (int i = 0; i + 2 < n; ++i) {
    Doubles* v = k + i * n;  // the reflection I − v vᵀ, kept in the row that it makes
    Doubles square = {};
    for (int j = i + 1; j < n; ++j) square += v[j] * v[j];
    const Doubles size = root(square), first = v[i + 1], turned = with_sign(size, -first);
    const Doubles half = square - first * turned;  // vᵀv / 2, before v is scaled to vᵀv = 2
    const Longs there = half > 0.0;
    const Doubles scale = there ? all(1.0) / root(half) : Doubles{};
    diagonal[i] = v[i];
    beside[i] = there ? turned : first;
    v[i + 1] = first - turned;
    Doubles dot = {};
    for (int j = i + 1; j < n; ++j) v[j] *= scale;
    for (int j = i + 1; j < n; ++j) {  // w = K v − (vᵀKv / 2) v
      Doubles sum = {};
      for (int l = i + 1; l < n; ++l) sum += k[j * n + l] * v[l];
      w[j] = sum;
      dot += sum * v[j];
    }
    for (int j = i + 1; j < n; ++j) w[j] -= 0.5 * dot * v[j];
    for (int j = i + 1; j < n; ++j) {
      for (int l = i + 1; l < n; ++l) k[j * n + l] -= v[j] * w[l] + w[j] * v[l];
    }
  }
  for (int i = n > 1 ? n - 2 : 0; i < n; ++i) diagonal[i] = k[i * n + i];
  if (n > 1) beside[n - 2] = k[(n - 2) * n + n - 1];
  for (int i = 0; i < n * n; ++i) z[i] = all(i % (n + 1) == 0 ? 1.0 : 0.0);
  for (int i = n - 3; i >= 0; --i) {  // the reflections, from the last to the first
    const Doubles* v = k + i * n;
    for (int c = i + 1; c < n; ++c) {
      Doubles dot = {};
      for (int j = i + 1; j < n; ++j) dot += z[c * n + j] * v[j];
      for (int j = i + 1; j < n; ++j) z[c * n + j] -= dot * v[j];
    }
  }
}

// T becomes diagonal; rows of `z` are turned with it. `end` is how far a lane's block that is not split goes.
INLINE void diagonalize(int n, Doubles* z, Doubles* d, Doubles* e) {
  for (int l = 0; l + 1 < n; ++l) {
    for (int step = 0; step < MOST_STEPS; ++step) {
      Longs end = Longs{} + (n - 1);
      for (int i = n - 2; i >= l; --i) end = absolute(e[i]) <= EPS * (absolute(d[i]) + absolute(d[i + 1])) ? Longs{} + i : end;
      const Longs active = end > l;
      if (!any(active)) break;
      int last = l;
      for (int k = 0; k < WIDE; ++k) last = end[k] > last ? int(end[k]) : last;
      const Doubles ratio = (d[l + 1] - d[l]) / (2.0 * e[l]);
      const Doubles shift = d[l] - e[l] / (ratio + with_sign(root(ratio * ratio + 1.0), ratio));
      Doubles g = {}, s = {}, c = {}, p = {};
      for (int i = last - 1; i >= l; --i) {
        const Longs starts = end == i + 1, on = active & (end > i);
        g = starts ? d[i + 1] - shift : g;
        s = starts ? all(1.0) : s;
        c = starts ? all(1.0) : c;
        p = starts ? Doubles{} : p;
        const Doubles f = s * e[i], b = c * e[i], r = root(f * f + g * g), inverse = all(1.0) / r;
        const Longs none = r == 0.0;
        s = none ? Doubles{} : f * inverse;
        c = none ? all(1.0) : g * inverse;
        e[i + 1] = on ? (starts ? Doubles{} : r) : e[i + 1];
        const Doubles before = d[i + 1] - p, moved = (d[i] - before) * s + 2.0 * c * b;
        p = s * moved;
        d[i + 1] = on ? before + p : d[i + 1];
        g = c * moved - b;
        const Doubles sine = on ? s : Doubles{}, cosine = on ? c : all(1.0);
        Doubles *low = z + i * n, *high = low + n;
        for (int k = 0; k < n; ++k) {
          const Doubles x = low[k], y = high[k];
          high[k] = sine * x + cosine * y;
          low[k] = cosine * x - sine * y;
        }
      }
      d[l] = active ? d[l] - p : d[l];
      e[l] = active ? g : e[l];
    }
  }
}

// What is made of the eigenvalues: 1/(w + shift), or with `root` 1/(√(w + shift) + added); 0 up to `tolerance` times the largest.
struct Power {
  double tolerance, added;
  bool root;
};

// out ← f(K) of a symmetric `k`, which is lost, as `z` is; `lines` has room for three lines of n.
INLINE void power_of(int n, const Power& f, Doubles shift, Doubles* k, Doubles* z, Doubles* lines, Doubles* out) {
  Doubles *d = lines, *e = d + n, *w = e + n, largest = {};
  for (int i = 0; i < n * n; ++i) {
    k[i] = k[i] - k[i] == 0.0 ? k[i] : Doubles{};
    largest = most(largest, absolute(k[i]));
  }
  const Doubles size = largest > 0.0 ? largest : all(1.0);
  for (int i = 0; i < n * n; ++i) k[i] /= size;  // no square of an element under- or overflows
  tridiagonal(n, k, z, d, e, w);
  diagonalize(n, z, d, e);
  Doubles top = {};
  for (int i = 0; i < n; ++i) {
    d[i] = most(d[i] * size, Doubles{}) + shift;
    top = i && top > d[i] ? top : d[i];
  }
  const Doubles threshold = f.tolerance * top;
  for (int i = 0; i < n; ++i) {
    const Doubles value = f.root ? root(d[i]) + f.added : d[i];
    const Doubles factor = d[i] > threshold ? all(1.0) / value : Doubles{};
    for (int j = 0; j < n; ++j) k[i * n + j] = factor * z[i * n + j];
  }
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j <= i; ++j) {
      Doubles sum = {};
      for (int l = 0; l < n; ++l) sum += k[l * n + i] * z[l * n + j];
      out[i * n + j] = out[j * n + i] = sum;
    }
  }
}

// Element (i, j) of `count` matrices, at from(lane)[i n + j]; behind the last one, zeros.
template <class From>
INLINE Doubles gathered(int count, const From& from, int at) {
  Doubles x = {};
  for (int lane = 0; lane < count; ++lane) x[lane] = double(from(lane)[at]);
  return x;
}

}  // namespace
}  // namespace lowrank
