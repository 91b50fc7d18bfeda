// Products with tall matrices X (size × rank) of few columns, the factors of adapters: XᵀY, X S, and a step that needs both.
//
// A tile is DEPTH rows of X, each of `padded` neighbours: the rank rounded up to whole vectors, with zeros. It is X itself where X lies
// so, else a copy, turned round if X is `wide` (rank × size in memory). A tile stays in the first-level cache for all products.
//
// Products are fused with their additions where the instruction set can do so: AVX2 and AVX-512 give the same bits, and the baseline
// rounds once more. Compiled once for each instruction set: LOWRANK_LEVEL names it, and the namespace of the table at the end.
#include "lanes.h"
#include "numbers.h"
#include "ops.h"

namespace lowrank {
namespace {

constexpr int DEPTH = int(TALL_TILE), STRIP = 16;
constexpr int VECTORS = STRIP / LANES;  // of a strip of columns

// ------------------------------------------------------------------------------------------------------------- small products

// A matrix whose element (i, k) is data[i · down + k · along].
struct Seen {
  const f32* data;
  int64_t down, along;
};

// HEIGHT rows and WIDTH vectors of out ← factor · from + left right; a null `from` stands for zeros.
template <int HEIGHT, int WIDTH>
INLINE void block(const Seen& left, const float* right, int64_t stride, int count, const f32* from, int64_t from_stride,
                  float factor, f32* out, int64_t out_stride) {
  Floats sums[HEIGHT][WIDTH];
  for (int i = 0; i < HEIGHT; ++i) {
    for (int v = 0; v < WIDTH; ++v) sums[i][v] = from ? factor * All{}.load(from + i * from_stride + v * LANES) : Floats{};
  }
  for (int k = 0; k < count; ++k) {
    Floats row[WIDTH];
    for (int v = 0; v < WIDTH; ++v) row[v] = All{}.load(right + k * stride + v * LANES);
    for (int i = 0; i < HEIGHT; ++i) {
      const Floats x = left.data[i * left.down + k * left.along] - Floats{};  // in every lane
      for (int v = 0; v < WIDTH; ++v) sums[i][v] = multiply_add(x, row[v], sums[i][v]);
    }
  }
  for (int i = 0; i < HEIGHT; ++i) {
    for (int v = 0; v < WIDTH; ++v) All{}.store(out + i * out_stride + v * LANES, sums[i][v]);
  }
}

// As many rows as keep both multipliers busy.
constexpr int HIGH = LANES == 16 ? 8 : LANES == 8 ? 4 : 2;

// Between parts of a product, ask(0) to ask(3) fetch a quarter each of a tile that comes later, so that memory and multipliers work at
// the same time.
constexpr int QUARTERS = 4;

// part (padded × padded) += left (padded × DEPTH) right, a tile. Of the product of a tile with itself, `symmetric`, what lies below
// the diagonal may be left out.
template <class Shape, class Ask>
INLINE void add(const Shape& s, const Seen& left, const float* right, bool symmetric, float* part, const Ask& ask) {
  const int64_t stride = s.padded();
  int asked = 0;
  const auto rows = [&](int col, int first, int last) __attribute__((always_inline)) {
    for (int row = first; row < last; row += HIGH) {
      if (asked < QUARTERS) ask(asked++);
      float* out = part + row * stride + col;
      block<HIGH, VECTORS>({left.data + row * left.down, left.down, left.along}, right + col, stride, DEPTH, out, stride, 1.0f, out, stride);
    }
  };
  for (int col = 0; col < s.padded(); col += STRIP) {
    if (!symmetric) {
      rows(col, 0, int(stride));
    } else if (LANES != 8) {
      rows(col, 0, col + STRIP);
    } else {  // without a quarter of the last square
      rows(col, 0, col + 8);
      while (asked < QUARTERS) ask(asked++);
      float* out = part + (col + 8) * (stride + 1);
      block<8, 1>({left.data + (col + 8) * left.down, left.down, left.along}, right + col + 8, stride, DEPTH, out, stride, 1.0f, out, stride);
    }
  }
}

// out ← factor · from + X S, of tiles; S is padded × padded.
template <class Shape, class Ask>
INLINE void times(const Shape& s, const f32* x, const float* small, const f32* from, float factor, f32* out, const Ask& ask) {
  const int64_t stride = s.padded();
  for (int row = 0; row < DEPTH; row += HIGH) {
    if (row % (DEPTH / QUARTERS) == 0) ask(row / (DEPTH / QUARTERS));
    for (int col = 0; col < s.padded(); col += STRIP) {
      const int64_t at = row * stride + col;
      block<HIGH, VECTORS>({x + row * stride, stride, 1}, small + col, stride, int(s.rank()), from ? from + at : nullptr, stride,
                           factor, out + at, stride);
    }
  }
}

// The same for the lines of DEPTH rows of a wide matrix, where they are: the lines of `out` are those of Sᵀ times those of X, which
// may be its own.
template <class Shape, class Ask>
INLINE void times_lines(const Shape& s, const f32* x, const float* small, const f32* from, float factor, f32* out, int64_t out_stride,
                        float* room, const Ask& ask) {
  const int64_t stride = s.padded();
  for (int col = 0; col < DEPTH; col += STRIP) {
    if (col % (DEPTH / QUARTERS) == 0) ask(col / (DEPTH / QUARTERS));
    for (int k = 0; k < s.rank(); ++k) {
      EACH(j, STRIP) room[k * STRIP + j] = x[k * s.size + col + j];
    }
    for (int row = 0; row < s.padded(); row += HIGH) {
      block<HIGH, VECTORS>({small + row, 1, stride}, room, STRIP, int(s.rank()), from ? from + row * s.size + col : nullptr, s.size, factor,
                           out + row * out_stride + col, out_stride);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------- tiles

// to[j][i] ← from[i][j], 8 × 8.
INLINE void turn_square(const f32* from, int64_t stride, f32* to, int64_t to_stride) {
#ifdef __AVX2__
  __m256 x[8], y[8];
  for (int k = 0; k < 4; ++k) {  // rows k and k + 4 side by side: left halves, then right halves
    x[k] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from + k * stride)), _mm_loadu_ps(from + (k + 4) * stride), 1);
    x[k + 4] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from + k * stride + 4)), _mm_loadu_ps(from + (k + 4) * stride + 4), 1);
  }
  for (int k = 0; k < 8; k += 4) {
    y[k] = _mm256_unpacklo_ps(x[k], x[k + 1]);
    y[k + 1] = _mm256_unpackhi_ps(x[k], x[k + 1]);
    y[k + 2] = _mm256_unpacklo_ps(x[k + 2], x[k + 3]);
    y[k + 3] = _mm256_unpackhi_ps(x[k + 2], x[k + 3]);
    _mm256_storeu_ps(to + k * to_stride, _mm256_shuffle_ps(y[k], y[k + 2], 0x44));
    _mm256_storeu_ps(to + (k + 1) * to_stride, _mm256_shuffle_ps(y[k], y[k + 2], 0xEE));
    _mm256_storeu_ps(to + (k + 2) * to_stride, _mm256_shuffle_ps(y[k + 1], y[k + 3], 0x44));
    _mm256_storeu_ps(to + (k + 3) * to_stride, _mm256_shuffle_ps(y[k + 1], y[k + 3], 0xEE));
  }
#else
  for (int j = 0; j < 8; ++j) {
    for (int i = 0; i < 8; ++i) to[j * to_stride + i] = from[i * stride + j];
  }
#endif
}

// to[j][i] ← from[i][j] of rows × cols, in the order of the lines of `to`, or of those of `from`: eight lines that are far apart are
// gone through together, and not more, which the first-level cache could not hold.
template <bool FAR_TO>
INLINE void turn_round(const f32* from, int64_t stride, int rows, int cols, f32* to, int64_t to_stride) {
  const int whole_rows = rows & ~7, whole_cols = cols & ~7, outer = FAR_TO ? whole_cols : whole_rows, inner = FAR_TO ? whole_rows : whole_cols;
  for (int a = 0; a < outer; a += 8) {
    for (int b = 0; b < inner; b += 8) {
      const int i = FAR_TO ? b : a, j = FAR_TO ? a : b;
      turn_square(from + i * stride + j, stride, to + j * to_stride + i, to_stride);
    }
  }
  for (int i = 0; i < rows; ++i) {
    for (int j = i < whole_rows ? whole_cols : 0; j < cols; ++j) to[j * to_stride + i] = from[i * stride + j];
  }
}

// How a matrix lies, of RANK columns, or as many as it says for RANK 0.
template <int RANK, bool WIDE>
struct Shape {
  int64_t size, given;

  explicit Shape(const TallArgs& t) : size(t.size), given(t.rank) {}

  INLINE int64_t rank() const { return RANK ? RANK : given; }
  INLINE int64_t padded() const { return padded_rank(rank()); }
  INLINE int64_t tile() const { return padded() * DEPTH; }
  INLINE int64_t square() const { return padded() * padded(); }

  // Whether n rows are a tile without zeros.
  INLINE bool full(int n) const { return n == DEPTH && rank() == padded(); }

  // n rows of X, from `row` on, with zeros around them: in `room`, or where they are.
  INLINE const float* read(const f32* x, int64_t row, int n, float* room) const {
    if (!WIDE && full(n)) return x + row * rank();
    if (!full(n)) __builtin_memset(room, 0, size_t(tile()) * 4);
    if (WIDE) {
      turn_round<false>(x + row, size, int(rank()), n, room, padded());
    } else {
      copy(x + row * rank(), rank(), n, room, padded());
    }
    return room;
  }

  INLINE void write(f32* x, int64_t row, int n, const float* tile) const {
    if (WIDE) return turn_round<true>(tile, padded(), n, int(rank()), x + row, size);
    copy(tile, padded(), n, x + row * rank(), rank());
  }

  // Fetches a quarter of the tile that comes after the one from `row` on.
  INLINE auto asking(const f32* x, int64_t row) const {
    return [x, from = row + DEPTH, s = *this](int quarter) __attribute__((always_inline)) {
      constexpr int PART = DEPTH / QUARTERS;
      const int64_t first = from + quarter * PART;
      if (first + PART > s.size) return;
      if (WIDE) {
        for (int i = 0; i < s.rank(); ++i) __builtin_prefetch(x + i * s.size + first);
      } else {
        for (int64_t j = 0; j < PART * s.rank(); j += 16) __builtin_prefetch(x + first * s.rank() + j);
      }
    };
  }

  // body(row, n) for the tiles of a unit.
  template <class Body>
  INLINE void each(int64_t unit, const Body& body) const {
    const int64_t end = (unit + 1) * TALL_UNIT < size ? (unit + 1) * TALL_UNIT : size;
    int64_t row = unit * TALL_UNIT;
    for (; row + DEPTH <= end; row += DEPTH) body(row, DEPTH);
    if (row < end) body(row, int(end - row));
  }

 private:
  INLINE void copy(const f32* from, int64_t stride, int n, f32* to, int64_t to_stride) const {
    if (stride == to_stride) {
      const int all = int(n * stride);
      EACH(j, all) to[j] = from[j];
      return;
    }
    const int width = int(rank());
    for (int i = 0; i < n; ++i) {
      EACH(j, width) to[i * to_stride + j] = from[i * stride + j];
    }
  }
};

// S with zeros around it, times a number.
template <class Shape>
INLINE void pad(const Shape& s, const f32* small, float factor, float* to) {
  __builtin_memset(to, 0, size_t(s.square()) * 4);
  const int rank = int(s.rank());
  for (int64_t i = 0; i < rank; ++i) {
    EACH(j, rank) to[i * s.padded() + j] = factor * small[i * rank + j];
  }
}

// Words that are mixed into a number, those of up to eight vectors at a time: with fewer, each would wait for the one before. A line of
// a tile fills them once or more often, so that a tile that is added whole and one that is added line by line give the same number.
// Each word takes high bits down before the next one: without, changes of signs and exponents, which are what is often changed in all
// elements at once, would cancel.
class Mark {
 public:
  INLINE void add(const float* x, int64_t count) {  // a multiple of 16 floats, as tiles have
    constexpr int WIDTH = int(sizeof lanes_ / sizeof *lanes_);
    static_assert(DEPTH % (WIDTH * LANES) == 0);
    int64_t j = 0;
    for (; j + WIDTH * LANES <= count; j += WIDTH * LANES) {
      for (int k = 0; k < WIDTH; ++k) lanes_[k] = mixed(lanes_[k], Words(All{}.load(x + j + k * LANES)));
    }
    for (; j < count; j += LANES) lanes_[0] = mixed(lanes_[0], Words(All{}.load(x + j)));
  }

  INLINE uint64_t value() const {
    uint64_t found = 1;
    for (const Words& lane : lanes_) {
      for (int k = 0; k < LANES; ++k) found = (found ^ lane[k]) * 0x9E3779B97F4A7C15u ^ found >> 29;
    }
    return found;
  }

 private:
  Words lanes_[DEPTH / LANES < 8 ? DEPTH / LANES : 8] = {};

  INLINE static Words mixed(Words lane, Words word) {
    lane = (lane ^ word) * 0x9E3779B1u;
    return lane ^ lane >> 15;
  }
};

// -------------------------------------------------------------------------------------------------------------------- kernels

template <int RANK, bool WIDE>
void gram(const GramArgs& args, int64_t unit, float* part, float* scratch) {
  const Shape<RANK, WIDE> s(args.tall);
  const bool symmetric = args.left == args.right;
  float *left = scratch, *right = scratch + s.tile();
  __builtin_memset(part, 0, size_t(s.square()) * 4);
  s.each(unit, [&](int64_t row, int n) __attribute__((always_inline)) {
    const float* y = s.read(args.right, row, n, right);
    if (symmetric) {
      add(s, {y, 1, s.padded()}, y, true, part, s.asking(args.right, row));
    } else if (WIDE && s.full(n)) {
      add(s, {args.left + row, s.size, 1}, y, false, part, s.asking(args.right, row));
    } else {
      add(s, {s.read(args.left, row, n, left), 1, s.padded()}, y, false, part, s.asking(args.right, row));
    }
  });
}

template <int RANK, bool WIDE>
void step(const PairStepArgs& args, int64_t unit, float* part, float* scratch) {
  const Shape<RANK, WIDE> s(args.tall);
  const int tile = int(s.tile()), lines = int(s.rank());
  float *small = scratch, *grad = small + s.square(), *momentum = grad + tile, *old = momentum + tile, *next = old + tile,
        *upright = next + tile;
  float *after = part, *cross = part + s.square();
  Mark mark;
  pad(s, args.small, args.share, small);
  __builtin_memset(part, 0, size_t(2 * s.square()) * 4);
  const float rest = 1.0f - args.share, keep = args.keep, size = -args.alpha;
  s.each(unit, [&](int64_t row, int n) __attribute__((always_inline)) {
    if (WIDE && s.full(n)) {
      f32 *m = args.momentum + row, *w = args.weight + row;
      // Lines are a power of two apart more often than not: what is read twice is read from a tile that lies together.
      times_lines(s, args.grad + row, small, m, rest, momentum, DEPTH, grad, s.asking(args.weight, row));
      for (int i = 0; i < lines; ++i) {
        EACH(j, DEPTH) {
          const float moved = momentum[i * DEPTH + j], before = w[i * s.size + j];
          m[i * s.size + j] = moved;
          old[i * DEPTH + j] = before;
          next[i * DEPTH + j] = before * keep + size * moved;
        }
      }
      if (args.marks) mark.add(next, tile);
      turn_round<false>(next, DEPTH, lines, DEPTH, upright, lines);
      add(s, {upright, 1, lines}, upright, true, after, s.asking(args.grad, row));
      add(s, {old, DEPTH, 1}, upright, false, cross, s.asking(args.momentum, row));
      for (int i = 0; i < lines; ++i) {
        EACH(j, DEPTH) w[i * s.size + j] = next[i * DEPTH + j];
      }
      return;
    }
    const f32 *g = s.read(args.grad, row, n, grad), *m = s.read(args.momentum, row, n, momentum), *w = s.read(args.weight, row, n, old);
    f32* moved = !WIDE && s.full(n) ? args.momentum + row * s.rank() : momentum;
    times(s, g, small, m, rest, moved, s.asking(args.weight, row));
    EACH(j, tile) next[j] = w[j] * keep + size * moved[j];
    if (args.marks) mark.add(next, tile);
    add(s, {next, 1, s.padded()}, next, true, after, s.asking(args.grad, row));
    add(s, {w, 1, s.padded()}, next, false, cross, s.asking(args.momentum, row));
    if (moved == momentum) s.write(args.momentum, row, n, momentum);
    s.write(args.weight, row, n, next);
  });
  if (args.marks) args.marks[unit] = mark.value();
}

template <int RANK, bool WIDE>
uint64_t mark(const TallArgs& tall, const f32* x, int64_t unit, float* room) {
  const Shape<RANK, WIDE> s(tall);
  Mark found;
  s.each(unit, [&](int64_t row, int n) __attribute__((always_inline)) {
    if (!WIDE || !s.full(n)) return found.add(s.read(x, row, n, room), s.tile());
    for (int i = 0; i < s.rank(); ++i) found.add(x + i * s.size + row, DEPTH);
  });
  return found.value();
}

template <int RANK, bool WIDE>
void turn(const TurnArgs& args, int64_t unit, float*, float* scratch) {
  const Shape<RANK, WIDE> s(args.tall);
  float *small = scratch, *form = small + s.square(), *moved = form + s.tile();
  pad(s, args.small, 1.0f, small);
  s.each(unit, [&](int64_t row, int n) __attribute__((always_inline)) {
    if (WIDE && s.full(n)) return times_lines(s, args.form + row, small, nullptr, 0.0f, args.form + row, s.size, form, s.asking(args.form, row));
    // With one strip of columns, rows are read before they are written.
    const bool there = !WIDE && s.full(n) && s.padded() == STRIP;
    times(s, s.read(args.form, row, n, form), small, nullptr, 0.0f, there ? args.form + row * s.rank() : moved, s.asking(args.form, row));
    if (!there) s.write(args.form, row, n, moved);
  });
}

template <int RANK, bool WIDE>
constexpr PairKernels kernels = {gram<RANK, WIDE>, step<RANK, WIDE>, turn<RANK, WIDE>, mark<RANK, WIDE>};

const PairKernels& kernels_for(int64_t rank, bool wide) {
  if (rank == 16) return wide ? kernels<16, true> : kernels<16, false>;
  return wide ? kernels<0, true> : kernels<0, false>;
}

}  // namespace

namespace LOWRANK_LEVEL {
extern const PairKernelsFor pair_kernels = kernels_for;
}

}  // namespace lowrank
