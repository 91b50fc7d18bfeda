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

// W ← keep W − alpha N for n elements of W, which are not of float32.
INLINE void write(const Rows& weight, int64_t at, const float* direction, int n, const StepParams& w, int64_t first, float* buffer) {
  const f32* old = load(weight, w.error, at, buffer, n);
  const float keep = w.keep, step = -w.alpha;
  EACH(j, n) buffer[j] = old[j] * keep + step * direction[j];
  store(weight, w.error, at, buffer, n, w.rounding, first);
}

void adam(const AdamArgs& args, int64_t first, int64_t last) {
  float g_buffer[TILE], w_buffer[TILE], direction[TILE];
  const Adam a = args.adam;
  const Lerp lerp(a.weight1);
  const float keep = args.write.keep, step = -args.write.alpha;
  const auto tile = [&](int64_t at, int n) __attribute__((always_inline)) {  // a call would make the compiler reload `a`
    const f32* g = load(args.grad, at, g_buffer, n);
    f32 *m = args.exp_avg + at, *v = args.exp_avg_sq + at;
    const auto direct = [&](int j) __attribute__((always_inline)) {
      const float mean = lerp(m[j], g[j]), square = square_update(v[j], g[j], a.beta2, a.weight2);
      m[j] = mean;
      v[j] = square;
      return adam_direction(mean, __builtin_sqrtf(square), a);
    };
    if (!args.out && args.weight.dtype == FLOAT32) {
      f32* to = static_cast<f32*>(args.weight.data) + at;
      EACH(j, n) to[j] = to[j] * keep + step * direct(j);
      return g;
    }
    EACH(j, n) direction[j] = direct(j);
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

// Of a step of Adam with folded moments; WHOLE: the residual is taken as it is, with κ = 1.
template <bool WHOLE>
struct Folded {
  Adam adam;
  Lerp lerp;
  float share, residual, keep, step;

  explicit Folded(const FoldedAdamArgs& args)
      : adam(args.adam),
        lerp(args.adam.weight1),
        share(1.0f / float(args.fold)),
        residual(args.residual),
        keep(args.write.keep),
        step(-args.write.alpha) {}

  template <class T>  // a float, or a vector of them: sums of a block's elements and of their squares become its moments
  INLINE void moments(T sum, T squares, T& mean, T& m, T& v) const {
    mean = sum * share;
    m = lerp(m, mean);
    v = v * adam.beta2 + adam.weight2 * (squares * share);
  }

  template <class Part>  // how vectors come from memory and go there
  INLINE void weights(f32* to, Floats g, Floats mean, Floats m, Floats v, Part part) const {
    const Floats rest = g - mean, square = rest * rest;
    const Floats root = square_root(v + (WHOLE ? square : (residual * residual) * square));
    part.store(to, part.load(to) * keep + step * adam_direction(m + (WHOLE ? rest : residual * rest), root, adam));
  }
};

// FOLD vectors of elements, whose blocks of FOLD elements have one vector of moments: FOLD is 1, 2, 4 or 8.
template <int FOLD, class How, int... K>
INLINE void folded_group(const f32* g, f32* m_at, f32* v_at, f32* to, const How& how, Numbers<K...>) {
  constexpr All all;
  using Blocks = Neighbours<FOLD>;
  const Floats x[FOLD] = {all.load(g + K * LANES)...};
  Floats sums[FOLD] = {x[K]...}, squares[FOLD] = {(x[K] * x[K])...};
  Floats mean, m = Blocks::placed(all.load(m_at)), v = Blocks::placed(all.load(v_at));
  how.moments(Blocks::sums(sums), Blocks::sums(squares), mean, m, v);
  all.store(m_at, Blocks::back(m));
  all.store(v_at, Blocks::back(v));
  (how.weights(to + K * LANES, x[K], Blocks::template repeated<K>(mean), Blocks::template repeated<K>(m),
               Blocks::template repeated<K>(v), all),
   ...);
}

// n elements in blocks of FOLD, of which the last may be cut off: what is missing counts as zeros.
template <int FOLD, class How>
INLINE void folded_blocks(const f32* g, f32* m, f32* v, f32* to, int n, const How& how) {
  constexpr int GROUP = FOLD * LANES;
  const auto group = [&](const f32* g, f32* m, f32* v, f32* to) __attribute__((always_inline)) {
    folded_group<FOLD>(g, m, v, to, how, UpTo<FOLD>{});
  };
  int j = 0;
  for (; j + GROUP <= n; j += GROUP) group(g + j, m + j / FOLD, v + j / FOLD, to + j);
  if (j == n) return;
  float last_g[GROUP] = {}, last_to[GROUP] = {}, last_m[LANES] = {}, last_v[LANES] = {};
  const int left = n - j, blocks = (left + FOLD - 1) / FOLD;
  EACH(k, left) last_g[k] = g[j + k];
  EACH(k, left) last_to[k] = to[j + k];
  EACH(k, blocks) last_m[k] = m[j / FOLD + k];
  EACH(k, blocks) last_v[k] = v[j / FOLD + k];
  group(last_g, last_m, last_v, last_to);
  EACH(k, left) to[j + k] = last_to[k];
  EACH(k, blocks) m[j / FOLD + k] = last_m[k];
  EACH(k, blocks) v[j / FOLD + k] = last_v[k];
}

// A block of n elements: n is `fold` or, at the end of a row, less.
template <class How>
INLINE void folded_block(const f32* g, f32& m_at, f32& v_at, f32* to, int n, const How& how) {
  constexpr int PARTS = 16 / LANES;  // sums of 16 parts, whatever the instruction set
  Floats sums[PARTS] = {}, squares[PARTS] = {};
  over(0, n, [&](int j, auto part) __attribute__((always_inline)) {
    const Floats x = part.load(g + j);
    sums[j / LANES % PARTS] += x;
    squares[j / LANES % PARTS] += x * x;
  });
  float mean, m = m_at, v = v_at;
  how.moments(float(total_of<1>(sums)), float(total_of<1>(squares)), mean, m, v);
  m_at = m;
  v_at = v;
  const Floats none = {};
  over(0, n, [&](int j, auto part) __attribute__((always_inline)) {
    how.weights(to + j, part.load(g + j), none + mean, none + m, none + v, part);
  });
}

template <bool WHOLE>
void folded_adam_with(const FoldedAdamArgs& args, int64_t first, int64_t last) {
  float g_buffer[TILE], w_buffer[TILE];
  const int64_t per_row = pieces(args.cols, TILE), blocks = pieces(args.cols, args.fold);
  const Folded<WHOLE> how(args);
  const bool in_place = args.weight.dtype == FLOAT32;
  for (int64_t index = first; index < last; ++index) {
    const int64_t row = index / per_row, col = index % per_row * TILE, at = row * args.cols + col;
    const int n = smaller(TILE, args.cols - col);
    const f32* g = load(args.grad, at, g_buffer, n);
    f32 *m = args.exp_avg + row * blocks + col / args.fold, *v = args.exp_avg_sq + row * blocks + col / args.fold;
    f32* to = in_place ? static_cast<f32*>(args.weight.data) + at : w_buffer;
    if (!in_place) load(args.weight, at, w_buffer, n);
    switch (args.fold) {
      case 1: folded_blocks<1>(g, m, v, to, n, how); break;
      case 2: folded_blocks<2>(g, m, v, to, n, how); break;
      case 4: folded_blocks<4>(g, m, v, to, n, how); break;
      case 8: folded_blocks<8>(g, m, v, to, n, how); break;
      default:
        for (int j = 0, size = int(args.fold); j < n; j += size) folded_block(g + j, *m++, *v++, to + j, smaller(size, n - j), how);
    }
    if (!in_place) store(args.weight, at, w_buffer, n, args.write.rounding, at);
  }
}

void folded_adam(const FoldedAdamArgs& args, int64_t first, int64_t last) {
  args.residual == 1.0f ? folded_adam_with<true>(args, first, last) : folded_adam_with<false>(args, first, last);
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
