// What is done to weights beside their matrix products, sums of squares of gradients, and normal numbers.
//
// Compiled once for each instruction set: LOWRANK_LEVEL names it, and the namespace of the table at the end. Loops run over at most
// TILE elements, which stay in the first-level cache. Only builtins are used, as in adam.cpp.
#include "arithmetic.h"
#include "lanes.h"
#include "normal.h"
#include "numbers.h"
#include "ops.h"

namespace lowrank {
namespace {

// to ← term(keep w): `term(x, j)` is x with what is subtracted from element j.
template <class Term>
INLINE void combine(const f32* w, f32* to, int n, float keep, const Term& term) {
  EACH(j, n) to[j] = term(w[j] * keep, j);
}

// What every element of a tile becomes, in one loop: each combination of parts has its own.
struct Tile {
  const f32 *weight, *product, *grad, *subtract, *phi;
  f32* to;
  int n;
  float keep, step;
  bool sign, by_column;

  INLINE void run() const {
    if (!grad) return with_product([](float x, int) { return x; });
    if (subtract && sign) return scaled([g = grad, s = subtract](int j) { return sign_of(g[j] - s[j]); });
    if (subtract) return scaled([g = grad, s = subtract](int j) { return g[j] - s[j]; });
    if (sign) return scaled([g = grad](int j) { return sign_of(g[j]); });
    scaled([g = grad](int j) { return g[j]; });
  }

 private:
  template <class E>
  INLINE void scaled(const E& e) const {
    if (by_column) return with_product([e, step = step, phi = phi](float x, int j) { return x + step * e(j) * phi[j]; });
    with_product([e, step = step, scale = *phi](float x, int j) { return x + step * e(j) * scale; });
  }

  template <class Residual>
  INLINE void with_product(const Residual& residual) const {
    if (!product) return combine(weight, to, n, keep, residual);
    combine(weight, to, n, keep, [residual, step = step, p = product](float x, int j) { return residual(x + step * p[j], j); });
  }
};

void update(const UpdateArgs& args, int64_t first, int64_t last) {
  float w_buffer[TILE], p_buffer[TILE], g_buffer[TILE], s_buffer[TILE];
  const int64_t per_row = pieces(args.cols, TILE);
  const bool direct = args.weight.dtype == FLOAT32;
  for (int64_t index = first; index < last; ++index) {
    const int64_t row = index / per_row, col = index % per_row * TILE;
    const int n = smaller(TILE, args.cols - col);
    const int64_t at = row * args.weight.stride + col;
    const auto part = [&](const ConstRows& x, float* buffer) {
      return x.data ? load(x, row * x.stride + col, buffer, n) : nullptr;
    };
    Tile tile;
    tile.weight = load(args.weight, args.write.error, at, w_buffer, n);
    tile.product = part(args.product, p_buffer);
    tile.grad = part(args.grad, g_buffer);
    tile.subtract = part(args.subtract, s_buffer);
    tile.phi = args.phi + row * args.phi_row + col * args.phi_col;
    tile.to = direct ? static_cast<f32*>(args.weight.data) + at : w_buffer;
    tile.n = n;
    tile.keep = args.write.keep;
    tile.step = -args.write.alpha;
    tile.sign = args.sign;
    tile.by_column = args.phi_col != 0;
    tile.run();
    if (!direct) store(args.weight, args.write.error, at, w_buffer, n, args.write.rounding, row * args.cols + col);
  }
}

void store_rows(const StoreArgs& args, int64_t first, int64_t last) {
  float value[TILE];
  const int64_t per_row = pieces(args.cols, TILE);
  for (int64_t index = first; index < last; ++index) {
    const int64_t row = index / per_row, col = index % per_row * TILE;
    const int n = smaller(TILE, args.cols - col);
    const f32* from = load(args.value, args.value_error, row * args.value.stride + col, value, n);
    EACH(j, n) value[j] = from[j];
    store(args.target, args.error, row * args.target.stride + col, value, n, args.rounding, row * args.cols + col);
  }
}

// Arrays of float32 that are summed at a time.
constexpr int STREAMS = 4;

void squares(const NormArgs& args, int64_t first, int64_t last) {
  float buffer[TILE];
  double* sums = args.sums + first / TILE;
  if (args.x.dtype == FLOAT32) {
    const f32* x = static_cast<const f32*>(args.x.data);
    const int64_t apart = (last - first) / TILE / STREAMS;
    for (int64_t tile = 0; tile < apart; ++tile) {
      const f32* parts[STREAMS];
      double totals[STREAMS];
      for (int k = 0; k < STREAMS; ++k) parts[k] = x + first + (k * apart + tile) * TILE;
      sums_of_squares<STREAMS>(parts, TILE, totals);
      for (int k = 0; k < STREAMS; ++k) sums[k * apart + tile] = totals[k];
    }
    sums += STREAMS * apart;
    first += STREAMS * apart * TILE;
  }
  for (int64_t at = first; at < last; at += TILE) {
    const int n = smaller(TILE, last - at);
    *sums++ = sum_of_squares(load(args.x, at, buffer, n), n);
  }
}

// The squares of ‖g_j‖ of rows alone: of several at a time.
INLINE void row_squares(const LinesArgs& args, int64_t first, int64_t last) {
  float buffer[TILE];
  if (args.grad.dtype == FLOAT32) {
    const f32* x = static_cast<const f32*>(args.grad.data);
    const int64_t apart = (last - first) / STREAMS;
    for (int64_t row = first; row < first + apart; ++row) {
      double square[STREAMS] = {}, totals[STREAMS];
      for (int64_t col = 0; col < args.cols; col += TILE) {
        const f32* parts[STREAMS];
        for (int k = 0; k < STREAMS; ++k) parts[k] = x + (row + k * apart) * args.grad.stride + col;
        sums_of_squares<STREAMS>(parts, smaller(TILE, args.cols - col), totals);
        for (int k = 0; k < STREAMS; ++k) square[k] += totals[k];
      }
      for (int k = 0; k < STREAMS; ++k) args.squares[row + k * apart] = float(square[k]);
    }
    first += STREAMS * apart;
  }
  for (int64_t row = first; row < last; ++row) {
    double square = 0.0;
    for (int64_t col = 0; col < args.cols; col += TILE) {
      const int n = smaller(TILE, args.cols - col);
      square += sum_of_squares(load(args.grad, row * args.grad.stride + col, buffer, n), n);
    }
    args.squares[row] = float(square);
  }
}

void row_sums(const LinesArgs& args, int64_t first, int64_t last) {
  if (!args.dots) return row_squares(args, first, last);
  float buffer[TILE];
  for (int64_t row = first; row < last; ++row) {
    double square = 0.0, dot = 0.0;
    for (int64_t col = 0; col < args.cols; col += TILE) {
      const int n = smaller(TILE, args.cols - col);
      const f32* g = load(args.grad, row * args.grad.stride + col, buffer, n);
      const SquareAndDot part = square_and_dot(g, args.vector + col, n);
      square += part.square;
      dot += part.dot;
    }
    args.squares[row] = float(square);
    args.dots[row] = float(dot);
  }
}

void column_sums(const LinesArgs& args, int64_t first, int64_t last) {
  constexpr int64_t RUN = 256;  // rows that are summed in float32
  constexpr int64_t WIDTH = 4 * STRIP;
  constexpr int TOGETHER = 4;  // rows that are read at a time
  float buffer[TOGETHER][WIDTH], square[WIDTH], dot[WIDTH];
  double squares[WIDTH], dots[WIDTH];
  const int64_t end_col = last * STRIP < args.cols ? last * STRIP : args.cols;
  for (int64_t col = first * STRIP; col < end_col; col += WIDTH) {
    const int n = smaller(WIDTH, end_col - col);
    EACH(j, n) squares[j] = dots[j] = 0.0;
    for (int64_t from = 0; from < args.rows; from += RUN) {
      const int64_t end = from + smaller(RUN, args.rows - from);
      EACH(j, n) square[j] = dot[j] = 0.0f;
      int64_t row = from;
      const auto row_of = [&](int k) __attribute__((always_inline)) {
        return load(args.grad, (row + k) * args.grad.stride + col, buffer[k], n);
      };
      for (; !args.dots && row + TOGETHER <= end; row += TOGETHER) {  // each after the other, in one loop
        const f32 *a = row_of(0), *b = row_of(1), *c = row_of(2), *d = row_of(3);
        EACH(j, n) square[j] = square[j] + a[j] * a[j] + b[j] * b[j] + c[j] * c[j] + d[j] * d[j];
      }
      for (; row < end; ++row) {
        const f32* g = row_of(0);
        EACH(j, n) square[j] += g[j] * g[j];
        if (!args.dots) continue;
        const float b = args.vector[row];
        EACH(j, n) dot[j] += g[j] * b;
      }
      EACH(j, n) squares[j] += double(square[j]);
      EACH(j, n) dots[j] += double(dot[j]);
    }
    EACH(j, n) args.squares[col + j] = float(squares[j]);
    if (!args.dots) continue;
    EACH(j, n) args.dots[col + j] = float(dots[j]);
  }
}

// Random words number `position` … of a stream.
INLINE void draw_words(uint64_t key, uint64_t position, int n, uint32_t* words) {
  while (n > 0) {
    const Stream random(Noise{true, key, 0, 0}, position, n);
    EACH(j, random.left) words[j] = random(uint32_t(j));
    n -= random.left;
    position += uint64_t(random.left);
    words += random.left;
  }
}

void gaussian(const GaussianArgs& args, int64_t first, int64_t last) {
  constexpr int PART = 256;
  uint32_t lengths[PART], angles[PART];
  float sines[PART];
  const int64_t pairs = pieces(args.numel, 2);
  for (int64_t at = first; at < last; at += PART) {
    const int n = smaller(PART, last - at);
    draw_words(args.key, uint64_t(at), n, lengths);
    draw_words(args.key, uint64_t(pairs + at), n, angles);
    f32* out = args.out + at;
    EACH(j, n) {
      const double radius = __builtin_sqrt(-2.0 * logarithm(uniform(lengths[j])));
      const Turn direction = turn(angles[j]);
      out[j] = float(radius * direction.cos);
      sines[j] = float(radius * direction.sin);
    }
    out += pairs;
    const int left = smaller(n, args.numel - pairs - at);  // the last pair of an odd number is one alone
    EACH(j, left) out[j] = sines[j];
  }
}

}  // namespace

namespace LOWRANK_LEVEL {
extern const WeightKernels weight_kernels = {update, store_rows, gaussian, squares, row_sums, column_sums};
}

}  // namespace lowrank
