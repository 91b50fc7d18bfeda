// The operations, compiled once for each instruction set: LOWRANK_TABLE names the table that this copy defines.
//
// Plain loops over at most a block or TILE elements, which stay in the first-level cache and which the compiler turns into vector
// instructions; a ragged end runs the same operations one by one. Only builtins are used: an inline function of the standard
// library compiled here for AVX-512 could be the copy that the linker keeps for every processor.
#include "numbers.h"
#include "ops.h"

namespace lowrank {
namespace {

// -------------------------------------------------------------------------------------------------------------------- Adam

// As torch.lerp, which starts from the nearer end; the choice is made outside of the loops.
struct Lerp {
  float coefficient;
  bool near_end;

  explicit Lerp(float weight) : coefficient(weight < 0.5f ? weight : -(1.0f - weight)), near_end(!(weight < 0.5f)) {}

  float operator()(float from, float to) const { return (near_end ? to : from) + coefficient * (to - from); }
};

inline float square_update(float v, float g, float beta, float weight) { return v * beta + (weight * g) * g; }

inline float adam_direction(float m, float root, const Adam& a) { return m / (root * a.correction + a.floor); }

// W ← keep W − alpha N for n elements of W.
INLINE void write(const Rows& weight, int64_t at, const float* direction, int n, const Write& w, int64_t first, float* buffer) {
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
  for (int64_t at = first; at < last; at += TILE) {
    const int n = smaller(TILE, last - at);
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
  }
}

inline float sign_of(float x) { return float(int(x > 0.0f) - int(x < 0.0f)); }

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

// ------------------------------------------------------------------------------------------------------------------- codes

// A unit of a coded matrix: columns `col` … `col` + n of a row.
struct Unit {
  int n;
  int64_t row, col, blocks, element;  // blocks: index of its first scale; element: row-major index of its first element

  Unit(const Coding& c, int64_t unit) {
    const int64_t width = span(c), per_row = pieces(c.cols, width);
    row = unit / per_row;
    col = unit % per_row * width;
    n = smaller(width, c.cols - col);
    blocks = row * pieces(c.cols, c.block) + col / c.block;
    element = row * c.cols + col;
  }
};

inline const f32* columns(const Coding& c, const Unit& unit) {
  return c.col_scale ? c.col_scale + unit.row / c.rows_per_scale * c.cols + unit.col : nullptr;
}

inline int64_t code_at(const Coding& c, const Unit& unit) {
  return c.bits == 8 ? unit.element : unit.row * ((c.cols + 1) / 2) + unit.col / 2;
}

// Four-bit codes, even columns in the low half of a byte; an odd last column leaves the high half 0.
inline void pack_nibbles(const u8* level, u8* packed, int n) {
  EACH(j, n / 2) packed[j] = u8(level[2 * j] | level[2 * j + 1] << 4);
  if (n % 2) packed[n / 2] = level[n - 1];
}

inline void unpack_nibbles(const u8* packed, u8* level, int n) {
  EACH(j, n / 2) {
    level[2 * j] = packed[j] & 0xF;
    level[2 * j + 1] = packed[j] >> 4;
  }
  if (n % 2) level[n - 1] = packed[n / 2] & 0xF;
}

inline int levels_of(int bits, bool is_signed) { return is_signed ? (bits == 8 ? 127 : 7) : (bits == 8 ? 256 : 16); }

// x = (level (1/L)) s; codes of one block, a byte each.
INLINE void decode(const u8* code, int n, int bits, bool is_signed, float scale, float* x) {
  const float unit = float(1.0 / levels_of(bits, is_signed)), zero = is_signed ? -8.0f : 1.0f;
  if (is_signed && bits == 8) {
    EACH(j, n) x[j] = float(s8(code[j])) * unit * scale;
  } else {
    EACH(j, n) x[j] = (float(code[j]) + zero) * unit * scale;
  }
}

// The bits of |x|: as integers they are ordered as the magnitudes are, infinity above all numbers and NaN above infinity.
inline int32_t magnitude(float x) { return int32_t(bits_of(x) & MAGNITUDE); }

inline int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

// The scale of a block from its largest magnitude; NaN where it holds one or infinity.
inline float scale_of(int32_t most) {
  const float s = float_of(uint32_t(most));
  return uint32_t(most) >= INFINITE ? __builtin_nanf("") : s < MIN_SCALE ? 0.0f : s;
}

inline int between(int least, int x, int most) { return x < least ? least : x > most ? most : x; }

// Noise of one block: `first` is the number of its first element.
inline void draw(const Noise& noise, int64_t first, int n, float* __restrict uniform) {
  for (int done = 0; done < n;) {
    const Stream random(noise, first + done, n - done);
    EACH(j, random.left) uniform[done + j] = random.uniform(j);
    done += random.left;
  }
}

// Codes of one block, a byte each, rounded by the numbers in `uniform`, or to nearest without them; `level` is working memory.
// (Loops over bytes and words at once make poor vector code: the levels are narrowed in a loop of their own.)
INLINE void encode(const float* __restrict x, int n, int bits, bool is_signed, float scale, const float* __restrict uniform,
                   int* __restrict level, u8* __restrict code) {
  const int zero = is_signed ? (bits == 8 ? 0 : -8) : 1, least = is_signed ? -128 : 1;
  if (!(scale > 0.0f)) {
    EACH(j, n) code[j] = u8(is_signed ? -zero : 0);
    return;
  }
  // y is at most L and three roundings of it, so that no level is above L.
  const float factor = (1.0f / scale) * float(levels_of(bits, is_signed));  // as torch divides a number by a tensor
  if (uniform) {
    EACH(j, n) {
      // With d = y − nearest, which is exact, y − ⌊y⌋ is d, or d + 1 where d < 0: then ⌊y⌋ is one below the nearest.
      const float y = x[j] * factor, shifted = y + SHIFTER, nearest = shifted - SHIFTER, d = y - nearest;
      const int below = d < 0.0f ? 1 : 0, up = uniform[j] < (d < 0.0f ? d + 1.0f : d) ? 1 : 0;
      // What was decoded comes back within four roundings, and has to stay what it was.
      const int move = __builtin_fabsf(d) <= __builtin_fabsf(nearest) * 0x1p-21f ? 0 : up - below;
      level[j] = larger(int32_t(bits_of(shifted) - bits_of(SHIFTER)) + move, least) - zero;
    }
  } else {
    EACH(j, n) level[j] = larger(int32_t(bits_of(x[j] * factor + SHIFTER) - bits_of(SHIFTER)), least) - zero;
  }
  EACH(j, n) code[j] = u8(level[j]);
}

// Working arrays of a block: in, m/√v and √v as they were decoded; out, as they are to be coded, the direction, and the noise for
// coding √v. Drawn in the same loop, the noise costs nothing: the loop waits for the divider.
struct Block {
  float *__restrict ratio, *__restrict root, *__restrict direction, *__restrict uniform;
  int32_t most_ratio, most_root;  // the bits of the largest magnitudes
};

template <bool NOISY>
INLINE void step_block(Block& b, const f32* __restrict g, int from, int n, const Adam& a, const Stream& random) {
  float *__restrict ratio = b.ratio + from, *__restrict root = b.root + from;
  float *__restrict direction = b.direction + from, *__restrict uniform = b.uniform + from;
  int32_t most_ratio = b.most_ratio, most_root = b.most_root;
  const Lerp lerp(a.weight1);
  EACH(j, n) {
    const float m = lerp(ratio[j] * root[j], g[from + j]);
    const float s = __builtin_sqrtf(square_update(root[j] * root[j], g[from + j], a.beta2, a.weight2));
    const float quotient = m / s, q = s > 0.0f ? quotient : 0.0f;
    direction[j] = adam_direction(m, s, a);
    ratio[j] = q;
    root[j] = s;
    if (NOISY) uniform[j] = random.uniform(j);
    most_ratio = larger(most_ratio, magnitude(q));
    most_root = larger(most_root, magnitude(s));
  }
  b.most_ratio = most_ratio;
  b.most_root = most_root;
}

// Working memory of `coded_adam`.
struct Work {
  Block block;
  float* buffer;
  int* levels;
};

// One block of n elements: `from` is its first column in the unit, `index` the number of its scales.
INLINE void coded_block(const CodedAdamArgs& args, Work& work, int64_t element, const int n, const f32* scales, int64_t index,
                        u8* __restrict ratio_code, u8* __restrict root_code) {
  const int bits = args.coding.bits;
  Block& b = work.block;
  float *__restrict root = b.root, *buffer = work.buffer;
  decode(ratio_code, n, bits, true, args.ratio_scale[index], b.ratio);
  decode(root_code, n, bits, false, args.root_scale[index], root);
  if (scales) {
    EACH(j, n) root[j] *= scales[j];
  }
  const f32* g = load(args.grad, element, buffer, n);
  b.most_ratio = b.most_root = 0;
  const Stream random(args.noise, element, n);
  if (!args.noise.on) {
    step_block<false>(b, g, 0, n, args.adam, random);
  } else if (random.left == n) {
    step_block<true>(b, g, 0, n, args.adam, random);
  } else {
    step_block<true>(b, g, 0, random.left, args.adam, random);
    step_block<true>(b, g, random.left, n - random.left, args.adam, Stream(args.noise, element + random.left, n));
  }
  if (scales) {
    int32_t most_root = 0;
    EACH(j, n) {
      root[j] /= scales[j];
      most_root = larger(most_root, magnitude(root[j]));
    }
    b.most_root = most_root;
  }
  const float ratio_scale = scale_of(b.most_ratio), root_scale = scale_of(b.most_root);
  encode(b.ratio, n, bits, true, ratio_scale, nullptr, work.levels, ratio_code);
  encode(root, n, bits, false, root_scale, args.noise.on ? b.uniform : nullptr, work.levels, root_code);
  args.ratio_scale[index] = ratio_scale;
  args.root_scale[index] = root_scale;
  if (f32* out = args.out) {
    out += element;
    EACH(j, n) out[j] = b.direction[j];
  } else {
    write(args.weight, element, b.direction, n, args.write, element, buffer);
  }
}

void coded_adam(const CodedAdamArgs& args, int64_t first, int64_t last, float* scratch) {
  const Coding& c = args.coding;
  const int64_t most = padded(c);
  Work work = {{scratch, scratch + most, scratch + 2 * most, scratch + 3 * most, 0, 0},
               scratch + 4 * most,
               reinterpret_cast<int*>(scratch + 5 * most)};
  u8* ratio_levels = reinterpret_cast<u8*>(work.levels + most);
  u8* root_levels = ratio_levels + most;
  for (int64_t index = first; index < last; ++index) {
    const Unit unit(c, index);
    const f32* scales = columns(c, unit);
    const int64_t at = code_at(c, unit);
    u8 *ratio_code = args.ratio + at, *root_code = args.root + at;
    if (c.bits == 4) {
      unpack_nibbles(ratio_code, ratio_levels, unit.n);
      unpack_nibbles(root_code, root_levels, unit.n);
      ratio_code = ratio_levels;
      root_code = root_levels;
    }
    for (int64_t from = 0, block = unit.blocks; from < unit.n; from += c.block, ++block) {
      const int n = smaller(c.block, unit.n - from);
      const f32* own = scales ? scales + from : nullptr;
      if (n == USUAL) {
        coded_block(args, work, unit.element + from, USUAL, own, block, ratio_code + from, root_code + from);
      } else {
        coded_block(args, work, unit.element + from, n, own, block, ratio_code + from, root_code + from);
      }
    }
    if (c.bits == 4) {
      pack_nibbles(ratio_levels, args.ratio + at, unit.n);
      pack_nibbles(root_levels, args.root + at, unit.n);
    }
  }
}

void quantize(const QuantizeArgs& args, int64_t first, int64_t last, float* scratch) {
  const Coding& c = args.coding;
  const int64_t most = padded(c);
  float *buffer = scratch, *__restrict y = buffer + most, *uniform = y + most;
  int* wide = reinterpret_cast<int*>(uniform + most);
  u8* levels = reinterpret_cast<u8*>(wide + most);
  for (int64_t index = first; index < last; ++index) {
    const Unit unit(c, index);
    const f32* scales = columns(c, unit);
    u8* codes = args.codes + code_at(c, unit);
    u8* to = c.bits == 4 ? levels : codes;
    for (int64_t from = 0, block = unit.blocks; from < unit.n; from += c.block, ++block) {
      const int n = smaller(c.block, unit.n - from);
      const f32* x = load(args.x, unit.row * args.x.stride + unit.col + from, buffer, n);
      int32_t greatest = 0;
      EACH(j, n) {
        y[j] = scales ? x[j] / scales[from + j] : x[j];
        greatest = larger(greatest, magnitude(y[j]));
      }
      const float scale = scale_of(greatest);
      args.scale[block] = scale;
      if (args.noise.on) draw(args.noise, unit.element + from, n, uniform);
      encode(y, n, c.bits, args.is_signed, scale, args.noise.on ? uniform : nullptr, wide, to + from);
    }
    if (c.bits == 4) pack_nibbles(levels, codes, unit.n);
  }
}

void dequantize(const DequantizeArgs& args, int64_t first, int64_t last, float* scratch) {
  const Coding& c = args.coding;
  const int64_t most = padded(c);
  float* y = scratch;
  u8* levels = reinterpret_cast<u8*>(y + most);
  for (int64_t index = first; index < last; ++index) {
    const Unit unit(c, index);
    const f32* scales = columns(c, unit);
    const u8* codes = args.codes + code_at(c, unit);
    if (c.bits == 4) {
      unpack_nibbles(codes, levels, unit.n);
      codes = levels;
    }
    for (int64_t from = 0, block = unit.blocks; from < unit.n; from += c.block, ++block) {
      decode(codes + from, smaller(c.block, unit.n - from), c.bits, args.is_signed, args.scale[block], y + from);
    }
    if (scales) {
      EACH(j, unit.n) y[j] *= scales[j];
    }
    store(args.x, unit.row * args.x.stride + unit.col, y, unit.n, Noise{}, 0);
  }
}

// Bits of floats as integers in the order of their values.
inline int32_t ordered(uint32_t u) { return int32_t(u ^ (uint32_t(int32_t(u) >> 31) & MAGNITUDE)); }

void pack(const PackArgs& args, int64_t first, int64_t last, float* scratch) {
  const Coding& c = args.coding;
  const int64_t most = padded(c);
  const int top = (1 << c.bits) - 1;
  u8* levels = reinterpret_cast<u8*>(scratch + most);
  for (int64_t index = first; index < last; ++index) {
    const Unit unit(c, index);
    u8* codes = args.codes + code_at(c, unit);
    u8* to = c.bits == 4 ? levels : codes;
    for (int64_t from = 0, block = unit.blocks; from < unit.n; from += c.block, ++block) {
      const int n = smaller(c.block, unit.n - from);
      const f32* x = load(args.x, unit.row * args.x.stride + unit.col + from, scratch, n);
      int32_t least = INT32_MAX, greatest = INT32_MIN, most_magnitude = 0;
      EACH(j, n) {
        const int32_t value = ordered(bits_of(x[j]));
        least = value < least ? value : least;
        greatest = value > greatest ? value : greatest;
        most_magnitude = larger(most_magnitude, magnitude(x[j]));
      }
      const float low = float_of(uint32_t(ordered(uint32_t(least))));
      const float high = float_of(uint32_t(ordered(uint32_t(greatest))));
      float step = (high - low) / float(top);
      if (step < 0x1p-126f) step = 0.0f;
      const bool finite = uint32_t(larger(most_magnitude, magnitude(step))) < INFINITE;
      args.scale[block] = finite ? step : __builtin_nanf("");
      args.zero[block] = finite ? low : __builtin_nanf("");
      if (finite && step > 0.0f) {
        EACH(j, n) {
          to[from + j] = u8(between(0, int(((x[j] - low) / step + SHIFTER) - SHIFTER), top));
        }
      } else {
        EACH(j, n) to[from + j] = 0;
      }
    }
    if (c.bits == 4) pack_nibbles(levels, codes, unit.n);
  }
}

void unpack(const UnpackArgs& args, int64_t first, int64_t last, float* scratch) {
  const Coding& c = args.coding;
  const int64_t most = padded(c);
  float* y = scratch;
  u8* levels = reinterpret_cast<u8*>(y + most);
  for (int64_t index = first; index < last; ++index) {
    const Unit unit(c, index);
    const u8* codes = args.codes + code_at(c, unit);
    if (c.bits == 4) {
      unpack_nibbles(codes, levels, unit.n);
      codes = levels;
    }
    for (int64_t from = 0, block = unit.blocks; from < unit.n; from += c.block, ++block) {
      const int n = smaller(c.block, unit.n - from);
      const float step = args.scale[block], zero = args.zero[block];
      EACH(j, n) y[from + j] = float(codes[from + j]) * step + zero;
    }
    store(args.x, unit.row * args.x.stride + unit.col, y, unit.n, Noise{}, 0);
  }
}

// ----------------------------------------------------------------------------------------------------------------- weights

void update(const UpdateArgs& args, int64_t first, int64_t last) {
  float w_buffer[TILE], p_buffer[TILE], g_buffer[TILE], s_buffer[TILE], sum[TILE];
  const int64_t per_row = pieces(args.cols, TILE);
  const float keep = args.write.keep, step = -args.write.alpha;
  for (int64_t index = first; index < last; ++index) {
    const int64_t row = index / per_row, col = index % per_row * TILE;
    const int n = smaller(TILE, args.cols - col);
    const int64_t at = row * args.weight.stride + col;
    const f32* w = load(args.weight, at, w_buffer, n);
    if (args.product.data) {
      const f32* p = load(args.product, row * args.product.stride + col, p_buffer, n);
      EACH(j, n) sum[j] = w[j] * keep + step * p[j];
    } else {
      EACH(j, n) sum[j] = w[j] * keep;
    }
    if (args.grad.data) {
      const f32* e = load(args.grad, row * args.grad.stride + col, g_buffer, n);
      if (args.subtract.data) {
        const f32* s = load(args.subtract, row * args.subtract.stride + col, s_buffer, n);
        EACH(j, n) g_buffer[j] = e[j] - s[j];
        e = g_buffer;
      }
      if (args.sign) {
        EACH(j, n) g_buffer[j] = sign_of(e[j]);
        e = g_buffer;
      }
      const f32* phi = args.phi + row * args.phi_row + col * args.phi_col;
      if (args.phi_col) {
        EACH(j, n) sum[j] += step * e[j] * phi[j];
      } else {
        const float scale = *phi;
        EACH(j, n) sum[j] += step * e[j] * scale;
      }
    }
    store(args.weight, at, sum, n, args.write.rounding, row * args.cols + col);
  }
}

void store_rows(const StoreArgs& args, int64_t first, int64_t last) {
  float value[TILE];
  const int64_t per_row = pieces(args.cols, TILE);
  for (int64_t index = first; index < last; ++index) {
    const int64_t row = index / per_row, col = index % per_row * TILE;
    const int n = smaller(TILE, args.cols - col);
    const f32* from = load(args.value, row * args.value.stride + col, value, n);
    EACH(j, n) value[j] = from[j];
    store(args.target, row * args.target.stride + col, value, n, args.rounding, row * args.cols + col);
  }
}

// In (0, 1), to 32 bits.
inline double uniform(uint64_t key, uint64_t position) {
  const uint32_t upper = (uint32_t(position >> 32) * GOLDEN) ^ uint32_t(key >> 32);
  return (double(mix(mix(uint32_t(position) ^ uint32_t(key)) ^ upper)) + 0.5) * 0x1p-32;
}

void gaussian(const GaussianArgs& args, int64_t first, int64_t last) {
  const int64_t pairs = pieces(args.numel, 2);
  for (int64_t i = first; i < last; ++i) {
    const double radius = __builtin_sqrt(-2.0 * __builtin_log(uniform(args.key, uint64_t(i))));
    const double angle = 6.283185307179586 * uniform(args.key, uint64_t(pairs + i));
    args.out[i] = float(radius * __builtin_cos(angle));
    if (pairs + i < args.numel) args.out[pairs + i] = float(radius * __builtin_sin(angle));
  }
}

}  // namespace

extern const Kernels LOWRANK_TABLE = {adam,   rule,   coded_adam, quantize, dequantize, pack,
                                      unpack, update, store_rows, gaussian};

}  // namespace lowrank
