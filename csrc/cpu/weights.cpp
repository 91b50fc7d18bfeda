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

void squares(const NormArgs& args, int64_t first, int64_t last) {
  float buffer[TILE];
  for (int64_t at = first; at < last; at += TILE) {
    const int n = smaller(TILE, last - at);
    args.sums[at / TILE] = sum_of_squares(load(args.x, at, buffer, n), n);
  }
}

void row_sums(const LinesArgs& args, int64_t first, int64_t last) {
  float buffer[TILE];
  for (int64_t row = first; row < last; ++row) {
    double square = 0.0, dot = 0.0;
    for (int64_t col = 0; col < args.cols; col += TILE) {
      const int n = smaller(TILE, args.cols - col);
      const f32* g = load(args.grad, row * args.grad.stride + col, buffer, n);
      const SquareAndDot part = square_and_dot(g, args.dots ? args.vector + col : g, n);
      square += part.square;
      dot += part.dot;
    }
    args.squares[row] = float(square);
    if (args.dots) args.dots[row] = float(dot);
  }
}

void column_sums(const LinesArgs& args, int64_t first, int64_t last) {
  constexpr int64_t RUN = 256;  // rows that are summed in float32
  float buffer[STRIP], square[STRIP], dot[STRIP];
  double squares[STRIP], dots[STRIP];
  for (int64_t strip = first; strip < last; ++strip) {
    const int64_t col = strip * STRIP;
    const int n = smaller(STRIP, args.cols - col);
    EACH(j, n) squares[j] = dots[j] = 0.0;
    for (int64_t from = 0; from < args.rows; from += RUN) {
      const int64_t end = from + smaller(RUN, args.rows - from);
      EACH(j, n) square[j] = dot[j] = 0.0f;
      for (int64_t row = from; row < end; ++row) {
        const f32* g = load(args.grad, row * args.grad.stride + col, buffer, n);
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
