// Adam and the rules of one moment, on tensors of float32 moments.
//
// Compiled once for each instruction set: LOWRANK_LEVEL names it, and the namespace of the table at the end. Loops run over at most
// TILE elements, which stay in the first-level cache; the compiler turns them into vector instructions. Only builtins are used: an
// inline function of the standard library compiled here for AVX-512 could be the copy that the linker keeps for every processor.
#include "arithmetic.h"
#include "lanes.h"
#include "numbers.h"
#include "ops.h"

namespace lowrank {
namespace {

// W ← keep W − alpha N for n elements of W.
INLINE void write(const Rows& weight, int64_t at, const float* direction, int n, const StepParams& w, int64_t first, float* buffer) {
  const f32* old = load(weight, w.error, at, buffer, n);
  const float keep = w.keep, step = -w.alpha;
  if (weight.dtype == FLOAT32) {
    f32* to = static_cast<f32*>(weight.data) + at;
    EACH(j, n) to[j] = to[j] * keep + step * direction[j];
    return;
  }
  EACH(j, n) buffer[j] = old[j] * keep + step * direction[j];
  store(weight, w.error, at, buffer, n, w.rounding, first);
}

void adam(const AdamArgs& args, int64_t first, int64_t last) {
  float g_buffer[TILE], w_buffer[TILE], direction[TILE];
  const Adam a = args.adam;
  const Lerp lerp(a.weight1);
  const auto tile = [&](int64_t at, int n) __attribute__((always_inline)) {  // a call would make the compiler reload `a`
    const f32* g = load(args.grad, at, g_buffer, n);
    f32 *m = args.exp_avg + at, *v = args.exp_avg_sq + at;
    EACH(j, n) {
      m[j] = lerp(m[j], g[j]);
      v[j] = square_update(v[j], g[j], a.beta2, a.weight2);
      direction[j] = adam_direction(m[j], __builtin_sqrtf(v[j]), a);
    }
    if (f32* out = args.out) {
      out += at;
      EACH(j, n) out[j] = direction[j];
    } else {
      write(args.weight, at, direction, n, args.write, at, w_buffer);
    }
    return g;
  };
  if (!args.norms) {
    for (int64_t at = first; at < last; at += TILE) tile(at, smaller(TILE, last - at));
    return;
  }
  const int64_t width = args.cols < TILE ? args.cols : TILE, height = TILE / width;  // whole rows, where they are short
  Squares sums[TILE];
  for (int64_t row = first; row < last; row += height) {
    const int rows = smaller(height, last - row);
    for (int k = 0; k < rows; ++k) sums[k] = {};
    for (int64_t col = 0; col < args.cols; col += width) {
      const int n = smaller(width, args.cols - col);
      const f32* g = tile(row * args.cols + col, rows * n);
      for (int k = 0; k < rows; ++k) {
        sums[k].direction += sum_of_squares(direction + k * n, n);
        sums[k].grad += sum_of_squares(g + k * n, n);
      }
    }
    for (int k = 0; k < rows; ++k) {
      args.norms[row + k] = root_of(sums[k].direction);
      args.grad_norms[row + k] = root_of(sums[k].grad);
    }
  }
}

void rule(const RuleArgs& args, int64_t first, int64_t last) {
  const f32* __restrict g = args.grad;
  f32 *__restrict m = args.moment, *__restrict out = args.out;
  const float a = args.first, b = args.second, c = args.third;
  const Lerp towards(a), update(b);
  switch (args.rule) {
    case LION:
      for (int64_t j = first; j < last; ++j) {
        out[j] = sign_of(towards(m[j], g[j]));
        m[j] = update(m[j], g[j]);
      }
      break;
    case SGD:
      for (int64_t j = first; j < last; ++j) out[j] = m[j] = m[j] * a + g[j];
      break;
    case NESTEROV:
      for (int64_t j = first; j < last; ++j) {
        m[j] = m[j] * a + g[j];
        out[j] = g[j] + a * m[j];
      }
      break;
    case RMSPROP:
      for (int64_t j = first; j < last; ++j) {
        m[j] = square_update(m[j], g[j], a, b);
        out[j] = g[j] / (__builtin_sqrtf(m[j]) + c);
      }
      break;
  }
}

}  // namespace

namespace LOWRANK_LEVEL {
extern const AdamKernels adam_kernels = {adam, rule};
}

}  // namespace lowrank
