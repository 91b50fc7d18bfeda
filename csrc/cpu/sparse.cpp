// Products with a sparse matrix S (rows × cols, compressed sparse rows) whose other side is tokens × features.
//
// A tile of tokens is turned round first, features × tokens, so that an entry of S is a number times a vector of tokens, wherever the
// entry stands: a load, a multiplication and an addition for LANES of them. A tile stays in the second-level cache.
//
// Compiled once for each instruction set: LOWRANK_LEVEL names it, and the namespace of the table at the end.
#include "lanes.h"
#include "numbers.h"
#include "ops.h"

namespace lowrank {
namespace {

constexpr int PART = 256;  // entries whose values and columns are converted together
constexpr Noise NEAREST = {};

// to[j][t] ← x[first + t][col + j] for SIDE columns and T tokens; 0 where x has only `width` columns and `count` tokens.
template <int T>
INLINE void read_turned(const ConstRows& x, int64_t first, int count, int64_t col, int width, float* __restrict to) {
  for (int start = 0; start < T; start += SIDE) {
    float square[SIDE * SIDE] = {}, room[SIDE];
    for (int t = 0; t < SIDE && start + t < count; ++t) {
      const f32* row = load(x, (first + start + t) * x.stride + col, room, width);
      EACH(j, width) square[t * SIDE + j] = row[j];
    }
    for (int j = 0; j < SIDE; ++j) {
      EACH(t, SIDE) to[j * T + start + t] = square[t * SIDE + j];
    }
  }
}

// out[first + t][col + j] += from[j][t]
template <int T>
INLINE void add_turned(const Rows& out, int64_t first, int count, int64_t col, int width, const float* __restrict from) {
  for (int start = 0; start < count; start += SIDE) {
    float square[SIDE * SIDE], room[SIDE], sum[SIDE];
    for (int t = 0; t < SIDE; ++t) {
      EACH(j, SIDE) square[t * SIDE + j] = from[j * T + start + t];
    }
    for (int t = 0; t < SIDE && start + t < count; ++t) {
      const int64_t at = (first + start + t) * out.stride + col;
      const f32* before = load(out, at, room, width);
      EACH(j, width) sum[j] = before[j] + square[t * SIDE + j];
      store(out, at, sum, width, NEAREST, 0);
    }
  }
}

// Whole squares, whose loops have a known length, and the ragged last one.
template <int T>
INLINE void read_square(const ConstRows& x, int64_t first, int count, int64_t col, int64_t cols, float* to) {
  if (cols - col >= SIDE) return read_turned<T>(x, first, count, col, SIDE, to);
  read_turned<T>(x, first, count, col, int(cols - col), to);
}

template <int T>
INLINE void add_square(const Rows& out, int64_t first, int count, int64_t col, int64_t cols, const float* from) {
  if (cols - col >= SIDE) return add_turned<T>(out, first, count, col, SIDE, from);
  add_turned<T>(out, first, count, col, int(cols - col), from);
}

// One feature of T tokens.
template <int T>
struct Line {
  static constexpr int PARTS = T / LANES;
  Floats part[PARTS];

  static INLINE Line read(const float* from) {
    Line line;
    for (int p = 0; p < PARTS; ++p) line.part[p] = All{}.load(from + p * LANES);
    return line;
  }

  INLINE void write(float* to) const {
    for (int p = 0; p < PARTS; ++p) All{}.store(to + p * LANES, part[p]);
  }

  INLINE void add(float factor, const Line& other) {
    for (int p = 0; p < PARTS; ++p) part[p] += factor * other.part[p];
  }

  // Σ over the tokens, in 16 parts whatever the instruction set.
  INLINE float dot(const Line& other) const {
    constexpr int SUMS = 16 / LANES;
    Floats sums[SUMS] = {};
    for (int p = 0; p < PARTS; ++p) sums[p % SUMS] += part[p] * other.part[p];
    return float(total_of<1>(sums));
  }
};

// body(k, columns, n) for the entries k … k + n of a row, which stand in `columns`.
template <class Body>
INLINE void over_entries(const Support& s, int64_t row, const Body& body) {
  int32_t columns[PART];
  const int64_t end = s.pointers[row + 1];
  for (int64_t k = s.pointers[row]; k < end; k += PART) {
    const int n = smaller(PART, end - k);
    if (s.narrow) {
      EACH(e, n) columns[e] = static_cast<const u16*>(s.columns)[k + e];
    } else {
      EACH(e, n) columns[e] = static_cast<const s32*>(s.columns)[k + e];
    }
    body(k, columns, n);
  }
}

// out += x Sᵀ
template <int T>
void forward(const SparseArgs& args, int64_t tile, float* scratch) {
  const Support& s = args.support;
  const int64_t first = tile * T;
  const int count = smaller(T, args.tokens - first);
  float *turned = scratch, *sums = scratch + whole(s.cols) * T;
  for (int64_t col = 0; col < s.cols; col += SIDE) read_square<T>(args.x, first, count, col, s.cols, turned + col * T);
  float values[PART];
  for (int64_t start = 0; start < s.rows; start += SIDE) {
    for (int i = 0; i < SIDE && start + i < s.rows; ++i) {
      Line<T> sum = {};
      over_entries(s, start + i, [&](int64_t k, const int32_t* columns, int n) __attribute__((always_inline)) {
        const f32* v = load(args.values, k, values, n);
        for (int e = 0; e < n; ++e) sum.add(v[e], Line<T>::read(turned + int64_t(columns[e]) * T));
      });
      sum.write(sums + i * T);
    }
    add_square<T>(args.out, first, count, start, s.rows, sums);
  }
}

// out += x S
template <int T>
void backward_input(const SparseArgs& args, int64_t tile, float* scratch) {
  const Support& s = args.support;
  const int64_t first = tile * T;
  const int count = smaller(T, args.tokens - first);
  float *sums = scratch, *turned = scratch + whole(s.cols) * T;
  __builtin_memset(sums, 0, size_t(whole(s.cols)) * T * sizeof(float));
  float values[PART];
  for (int64_t start = 0; start < s.rows; start += SIDE) {
    read_square<T>(args.x, first, count, start, s.rows, turned);
    for (int i = 0; i < SIDE && start + i < s.rows; ++i) {
      const Line<T> line = Line<T>::read(turned + i * T);
      over_entries(s, start + i, [&](int64_t k, const int32_t* columns, int n) __attribute__((always_inline)) {
        const f32* v = load(args.values, k, values, n);
        for (int e = 0; e < n; ++e) {
          float* at = sums + int64_t(columns[e]) * T;
          Line<T> sum = Line<T>::read(at);
          sum.add(v[e], line);
          sum.write(at);
        }
      });
    }
  }
  for (int64_t col = 0; col < s.cols; col += SIDE) add_square<T>(args.out, first, count, col, s.cols, sums + col * T);
}

// A tile of x, turned round, for `sample`.
template <int T>
void turn(const SampledArgs& args, int64_t tile, float* turned) {
  const int64_t first = tile * T, cols = args.support.cols;
  const int count = smaller(T, args.tokens - first);
  for (int64_t col = 0; col < cols; col += SIDE) read_square<T>(args.x, first, count, col, cols, turned + col * T);
}

// values[k] += Σ_t grad[t][i_k] x[t][j_k] over the tokens of some tiles, for SIDE rows from `start` on.
template <int T>
void sample(const SampledArgs& args, int64_t start, int64_t first_tile, int64_t tiles, const float* turned) {
  const Support& s = args.support;
  float grads[SIDE * T];
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = (first_tile + tile) * T;
    const float* lines = turned + tile * whole(s.cols) * T;
    read_square<T>(args.grad, first, smaller(T, args.tokens - first), start, s.rows, grads);
    for (int i = 0; i < SIDE && start + i < s.rows; ++i) {
      const Line<T> grad = Line<T>::read(grads + i * T);
      over_entries(s, start + i, [&](int64_t k, const int32_t* columns, int n) __attribute__((always_inline)) {
        for (int e = 0; e < n; ++e) args.values[k + e] += grad.dot(Line<T>::read(lines + int64_t(columns[e]) * T));
      });
    }
  }
}

template <int T>
constexpr SparseWidth width = {T, forward<T>, backward_input<T>, turn<T>, sample<T>};

}  // namespace

namespace LOWRANK_LEVEL {
extern const SparseKernels sparse_kernels = {{width<16>, width<32>, width<64>}};
}

}  // namespace lowrank
