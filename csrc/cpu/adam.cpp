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
  const f32* old = load(weight, at, buffer, n);
  const float keep = w.keep, step = -w.alpha;
  if (weight.dtype == FLOAT32) {
    f32* to = static_cast<f32*>(weight.data) + at;
    EACH(j, n) to[j] = to[j] * keep + step * direction[j];
    return;
  }
  EACH(j, n) buffer[j] = old[j] * keep + step * direction[j];
  store(weight, at, buffer, n, w.rounding, first);
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

// Sums of pairs, and each number twice.
INLINE void halve(const float* __restrict from, float* __restrict to, int n) {
  EACH(j, n) to[j] = from[2 * j] + from[2 * j + 1];
}

INLINE void twice(const float* __restrict from, float* __restrict to, int n) {
  EACH(j, n) {
    to[2 * j] = from[j];
    to[2 * j + 1] = from[j];
  }
}

// Numbers of blocks for each of their elements: `x` becomes the one of two arrays that holds them, `spare` the other.
INLINE void unfold(float*& x, float*& spare, int blocks, int64_t fold) {
  for (; fold > 1; fold /= 2, blocks *= 2) {
    twice(x, spare, blocks);
    float* const filled = spare;
    spare = x;
    x = filled;
  }
}

// A tile of n elements, which begins with a block; all but the last block of a row are whole. `memory` is nine arrays, `apart`.
INLINE void folded_tile(const FoldedAdamArgs& args, int64_t at, int64_t block, int n, float* memory, int64_t apart) {
  float *g_buffer = memory, *w_buffer = memory + apart, *direction = memory + 2 * apart;
  float *mean = memory + 3 * apart, *square = memory + 4 * apart, *moment = memory + 5 * apart;
  float *spare = memory + 6 * apart, *spare_square = memory + 7 * apart, *spare_moment = memory + 8 * apart;
  const int64_t fold = args.fold;
  const int blocks = int(pieces(n, fold)), whole = int(blocks * fold);
  const Adam a = args.adam;
  const Lerp lerp(a.weight1);
  const f32* g = load(args.grad, at, g_buffer, n);
  if (whole > n) {  // what is missing counts as zeros
    if (g != g_buffer) {
      EACH(j, n) g_buffer[j] = g[j];
    }
    for (int j = n; j < whole; ++j) g_buffer[j] = 0.0f;
    g = g_buffer;
  }
  EACH(j, whole) {
    mean[j] = g[j];
    square[j] = g[j] * g[j];
  }
  for (int64_t left = whole; left > blocks;) {
    left /= 2;
    halve(mean, spare, int(left));
    halve(square, spare_square, int(left));
    float* const halved = spare;
    spare = mean;
    mean = halved;
    float* const halved_square = spare_square;
    spare_square = square;
    square = halved_square;
  }
  const float share = 1.0f / float(fold);
  f32 *m = args.exp_avg + block, *v = args.exp_avg_sq + block;
  EACH(j, blocks) {
    mean[j] *= share;
    moment[j] = m[j] = lerp(m[j], mean[j]);
    square[j] = v[j] = v[j] * a.beta2 + a.weight2 * (square[j] * share);
  }
  unfold(mean, spare, blocks, fold);
  unfold(square, spare_square, blocks, fold);
  unfold(moment, spare_moment, blocks, fold);
  const float residual = args.residual, residual_square = residual * residual;
  EACH(j, n) {
    const float rest = g[j] - mean[j];
    const float root = __builtin_sqrtf(square[j] + residual_square * (rest * rest));
    direction[j] = adam_direction(moment[j] + residual * rest, root, a);
  }
  write(args.weight, at, direction, n, args.write, at, w_buffer);
}

void folded_adam(const FoldedAdamArgs& args, int64_t first, int64_t last) {
  const int64_t per_row = pieces(args.cols, TILE), blocks = pieces(args.cols, args.fold);
  // Arrays that stay in the first-level cache, and begin in different sets of it.
  const int64_t width = args.fold > USUAL ? args.fold : USUAL, apart = width + 16;
  alignas(64) float memory[9 * (TILE + 16)];
  for (int64_t index = first; index < last; ++index) {
    const int64_t row = index / per_row, begin = index % per_row * TILE, end = begin + smaller(TILE, args.cols - begin);
    for (int64_t col = begin; col < end; col += width) {
      folded_tile(args, row * args.cols + col, row * blocks + col / args.fold, smaller(width, end - col), memory, apart);
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
extern const AdamKernels adam_kernels = {adam, rule, folded_adam};
}

}  // namespace lowrank
