// The operations as functors: what one thread does with an element, and what a group of lanes (a warp, or one host thread) does with
// a block of codes. How they are spread over a device is launch.h's.
#pragma once

#include "arithmetic.h"

namespace lowrank {

// ------------------------------------------------------------------------------------------------------------------- elements

// adam_direct_ (out, with no weight) and adam_dense_.
struct AdamElement {
  const void* grad;
  float *m, *v, *out;
  void* weight;
  const uint8_t* ok;
  int32_t grad_dtype, weight_dtype;
  Adam adam;
  StepParams write;
  Noise rounding;

  LOWRANK_HD void operator()(int64_t i) const {
    if (ok && !*ok) {
      if (out) out[i] = 0.0f;
      return;
    }
    const Moments now = adam_step(load(grad, grad_dtype, i), m[i], v[i], adam);
    m[i] = now.m;
    v[i] = now.v;
    if (out) {
      out[i] = now.direction;
    } else {
      const float w = load(weight, weight_dtype, write.error, i) * write.keep - now.direction * write.alpha;
      store(weight, weight_dtype, write.error, i, w, rounding, i);
    }
  }
};

enum Rule : int32_t { LION = 0, SGD = 1, NESTEROV = 2, RMSPROP = 3 };

// lion_direct_ (first = 1 − β₁, second = 1 − β₂), sgd_direct_ (first = μ), rmsprop_direct_ (first = α, second = 1 − α, third = ε).
struct RuleElement {
  const float* grad;
  float *moment, *out;
  const uint8_t* ok;
  int32_t rule;
  float first, second, third;

  LOWRANK_HD void operator()(int64_t i) const {
    if (ok && !*ok) {
      out[i] = 0.0f;
      return;
    }
    const float g = grad[i];
    float m = moment[i], direction;
    if (rule == LION) {
      direction = sign_of(lerp(m, g, first));
      m = lerp(m, g, second);
    } else if (rule == RMSPROP) {
      m = square_update(m, g, first, second);
      direction = g / (sqrtf(m) + third);
    } else {
      m = m * first + g;
      direction = rule == NESTEROV ? g + m * first : m;
    }
    moment[i] = m;
    out[i] = direction;
  }
};

// gaussian_: elements i and pairs + i by Box-Muller, i < pairs = ⌈size/2⌉.
struct GaussianElement {
  float* out;
  int64_t size;
  uint64_t key;

  LOWRANK_HD int64_t pairs() const { return (size + 1) / 2; }

  LOWRANK_HD void operator()(int64_t i) const {
    const int64_t second = pairs() + i;
    const double radius = sqrt(log(uniform(key, i)) * -2.0);
    const double angle = uniform(key, second) * 6.283185307179586;  // 2π
    out[i] = static_cast<float>(radius * cos(angle));
    if (second < size) out[second] = static_cast<float>(radius * sin(angle));
  }
};

// A (batch, rows, cols) tensor of any strides, counted in elements.
struct Strided {
  int64_t batch, row, col;
};

LOWRANK_HD int64_t offset(int64_t i, int64_t rows, int64_t cols, const Strided& by) {
  const int64_t line = i / cols;
  return (line / rows) * by.batch + (line % rows) * by.row + (i % cols) * by.col;
}

// stochastic_round_: target ← value; apply_dense_ (update): target ← keep·target − alpha·value, keep being 1 where ok is false.
struct StoreElement {
  void* target;
  const float* value;
  const void* keep;
  const uint8_t* ok;
  int64_t rows, cols;
  Strided target_by, value_by;
  int32_t target_dtype, flat, update, keep_is_double;
  StepParams write;
  Noise rounding;

  LOWRANK_HD void operator()(int64_t i) const {
    const int64_t at = flat ? i : offset(i, rows, cols, target_by);
    float x = value[flat ? i : offset(i, rows, cols, value_by)];
    if (update) {
      float factor = write.keep;
      if (keep) {
        factor = keep_is_double ? static_cast<float>(*static_cast<const double*>(keep)) : *static_cast<const float*>(keep);
      }
      if (ok && !*ok) factor = 1.0f;
      x = load(target, target_dtype, write.error, at) * factor - x * write.alpha;
    }
    store(target, target_dtype, write.error, at, x, rounding, i);
  }
};

// --------------------------------------------------------------------------------------------------------------------- blocks

// A (rows, cols) matrix in blocks of columns. Codes of 4 bits are two to a byte (`packed`; blocks then start at even columns) or one.
// Row i takes its column scales at (i / rows_per_scale) · cols, all rows the same ones where that is 0.
struct Coding {
  int64_t rows, cols, block;
  const float* col_scale;
  int64_t rows_per_scale;
  int32_t bits, packed;

  LOWRANK_HD int64_t blocks() const { return (cols + block - 1) / block; }
  LOWRANK_HD int64_t bytes() const { return packed ? (cols + 1) / 2 : cols; }
};

// One block of a row; a cell is what a lane works on, a byte of codes: one column, or two.
struct Block {
  const Coding& coding;
  int64_t number, row, first, width;
  const float* col_scale;  // of the block's row, or null
  int per;

  LOWRANK_HD Block(const Coding& c, int64_t segment)
      : coding(c), number(segment), row(segment / c.blocks()), first((segment % c.blocks()) * c.block), per(c.packed ? 2 : 1) {
    width = c.cols - first < c.block ? c.cols - first : c.block;
    col_scale = c.col_scale && c.rows_per_scale ? c.col_scale + (row / c.rows_per_scale) * c.cols : c.col_scale;
  }
  LOWRANK_HD int64_t cells() const { return (width + per - 1) / per; }
  LOWRANK_HD int columns(int64_t cell) const { return cell * per + per <= width ? per : 1; }
  LOWRANK_HD int64_t col(int64_t cell, int k) const { return first + cell * per + k; }
  LOWRANK_HD int64_t at(int64_t cell, int k) const { return row * coding.cols + col(cell, k); }
  LOWRANK_HD int64_t byte(int64_t cell) const { return row * coding.bytes() + first / per + cell; }
};

LOWRANK_HD int code_in(uint8_t byte, int k, const Coding& c, bool with_sign) {
  if (c.packed) return (byte >> (4 * k)) & 0xF;
  return c.bits == 8 && with_sign ? static_cast<int8_t>(byte) : byte;
}

LOWRANK_HD uint8_t with_code(uint8_t byte, int k, int code, const Coding& c) {
  return c.packed ? static_cast<uint8_t>(byte | (code << (4 * k))) : static_cast<uint8_t>(code);
}

// Decoded: (level · (1/L)) · s.
LOWRANK_HD float decoded(int code, float scale, const Coding& c, bool with_sign) {
  return (level_of(code, c.bits, with_sign) * (1.0f / levels_of(c.bits, with_sign))) * scale;
}

// quantize_rows.
struct QuantizeBlock {
  Coding coding;
  const void* x;
  uint8_t* codes;
  float* scale;
  int32_t dtype, with_sign;
  Noise noise;

  LOWRANK_HD float value(const Block& b, int64_t cell, int k) const {
    const float raw = load(x, dtype, b.at(cell, k));
    return b.col_scale ? raw * (1.0f / b.col_scale[b.col(cell, k)]) : raw;
  }

  template <class Lanes>
  LOWRANK_HD void operator()(const Lanes& lanes, int64_t segment) const {
    const Block b(coding, segment);
    uint32_t largest = 0;
    for (int64_t cell = lanes.first; cell < b.cells(); cell += lanes.count) {
      for (int k = 0; k < b.columns(cell); ++k) {
        const uint32_t size = bits_of(value(b, cell, k)) & MAGNITUDE;
        largest = size > largest ? size : largest;
      }
    }
    const float s = scale_of(lanes.max(largest)), factor = factor_of(s, levels_of(coding.bits, with_sign));
    for (int64_t cell = lanes.first; cell < b.cells(); cell += lanes.count) {
      uint8_t byte = 0;
      Parts part(noise);
      for (int k = 0; k < b.columns(cell); ++k) {
        byte = with_code(byte, k, code_of(value(b, cell, k), factor, coding.bits, with_sign, part(b.at(cell, k))), coding);
      }
      codes[b.byte(cell)] = byte;
    }
    if (lanes.first == 0) scale[segment] = s;
  }
};

// dequantize_rows.
struct DequantizeBlock {
  Coding coding;
  const uint8_t* codes;
  const float* scale;
  void* out;
  int32_t dtype, with_sign;

  template <class Lanes>
  LOWRANK_HD void operator()(const Lanes& lanes, int64_t segment) const {
    const Block b(coding, segment);
    const float s = scale[segment];
    const Noise nearest{};
    for (int64_t cell = lanes.first; cell < b.cells(); cell += lanes.count) {
      const uint8_t byte = codes[b.byte(cell)];
      for (int k = 0; k < b.columns(cell); ++k) {
        float x = decoded(code_in(byte, k, coding, with_sign), s, coding, with_sign);
        if (b.col_scale) x *= b.col_scale[b.col(cell, k)];
        store(out, dtype, b.at(cell, k), x, nearest, 0);
      }
    }
  }
};

// pack_basis: codes between each group's least and greatest element.
struct PackBlock {
  Coding coding;
  const void* basis;
  uint8_t* codes;
  float *scale, *zero;
  int32_t dtype;

  template <class Lanes>
  LOWRANK_HD void operator()(const Lanes& lanes, int64_t segment) const {
    const Block b(coding, segment);
    // `low` counts down from the top, so that its largest value is that of the least element. A NaN is at one of the ends.
    uint32_t low = 0, high = 0;
    for (int64_t cell = lanes.first; cell < b.cells(); cell += lanes.count) {
      for (int k = 0; k < b.columns(cell); ++k) {
        const uint32_t place = ordered(bits_of(load(basis, dtype, b.at(cell, k))));
        low = ~place > low ? ~place : low;
        high = place > high ? place : high;
      }
    }
    const float least = float_of(disordered(~lanes.max(low))), greatest = float_of(disordered(lanes.max(high)));
    const float step = step_of(least, greatest, coding.bits);
    for (int64_t cell = lanes.first; cell < b.cells(); cell += lanes.count) {
      uint8_t byte = 0;
      for (int k = 0; k < b.columns(cell); ++k) {
        byte = with_code(byte, k, code_between(load(basis, dtype, b.at(cell, k)), least, step, coding.bits), coding);
      }
      codes[b.byte(cell)] = byte;
    }
    if (lanes.first == 0) {
      scale[segment] = step;
      zero[segment] = step == step ? least : step;
    }
  }
};

// unpack_basis: zero + code · scale.
struct UnpackBlock {
  Coding coding;
  const uint8_t* codes;
  const float *scale, *zero;
  void* out;
  int32_t dtype;

  template <class Lanes>
  LOWRANK_HD void operator()(const Lanes& lanes, int64_t segment) const {
    const Block b(coding, segment);
    const float s = scale[segment], z = zero[segment];
    const Noise nearest{};
    for (int64_t cell = lanes.first; cell < b.cells(); cell += lanes.count) {
      const uint8_t byte = codes[b.byte(cell)];
      for (int k = 0; k < b.columns(cell); ++k) {
        store(out, dtype, b.at(cell, k), static_cast<float>(code_in(byte, k, coding, false)) * s + z, nearest, 0);
      }
    }
  }
};

// coded_adam_direct_ (out, with no weight) and coded_adam_dense_: decode, Adam, write N or the weight, code again.
struct CodedAdamBlock {
  Coding coding;
  const void* grad;
  uint8_t* ratio;
  float* ratio_scale;
  uint8_t* root;
  float *root_scale, *out;
  void* weight;
  const uint8_t* ok;
  int32_t grad_dtype, weight_dtype;
  Adam adam;
  StepParams write;
  Noise noise, rounding;

  struct Coded {
    float root, ratio;
  };

  LOWRANK_HD Moments moments(const Block& b, int64_t cell, int k, float s_root, float s_ratio, float c) const {
    float r = decoded(code_in(root[b.byte(cell)], k, coding, false), s_root, coding, false);
    if (coding.col_scale) r *= c;
    const float q = decoded(code_in(ratio[b.byte(cell)], k, coding, true), s_ratio, coding, true);
    return adam_step(load(grad, grad_dtype, b.at(cell, k)), q * r, r * r, adam);
  }

  LOWRANK_HD Coded coded(const Moments& now, float c) const {
    const float r = sqrtf(now.v);
    return {coding.col_scale ? r * (1.0f / c) : r, r > 0.0f ? now.m / r : 0.0f};
  }

  LOWRANK_HD float column(const Block& b, int64_t cell, int k) const {
    return b.col_scale ? b.col_scale[b.col(cell, k)] : 1.0f;
  }

  template <class Lanes>
  LOWRANK_HD void operator()(const Lanes& lanes, int64_t segment) const {
    const Block b(coding, segment);
    if (ok && !*ok) {
      for (int64_t cell = lanes.first; out && cell < b.cells(); cell += lanes.count) {
        for (int k = 0; k < b.columns(cell); ++k) out[b.at(cell, k)] = 0.0f;
      }
      return;
    }
    if (coding.packed) {
      step<Lanes, 2>(lanes, b);
    } else {
      step<Lanes, 1>(lanes, b);
    }
  }

  template <class Lanes, int PER>
  LOWRANK_HD void step(const Lanes& lanes, const Block& b) const {
    // What a lane's first cells come to (all of a block of 256 columns) is kept in registers; beyond, it is computed again.
    constexpr int CELLS = 8 / PER;
    const float s_root = root_scale[b.number], s_ratio = ratio_scale[b.number];
    Coded kept[CELLS][PER] = {};
    uint32_t largest_root = 0, largest_ratio = 0;
    const int64_t cells = b.cells();

    auto see = [&](int64_t cell, int k) {
      const float c = column(b, cell, k);
      const Moments now = moments(b, cell, k, s_root, s_ratio, c);
      const int64_t i = b.at(cell, k);
      if (out) {
        out[i] = now.direction;
      } else {
        const float w = load(weight, weight_dtype, write.error, i) * write.keep - now.direction * write.alpha;
        lowrank::store(weight, weight_dtype, write.error, i, w, rounding, i);
      }
      const Coded x = coded(now, c);
      const uint32_t a = bits_of(x.root) & MAGNITUDE, q = bits_of(x.ratio) & MAGNITUDE;
      largest_root = a > largest_root ? a : largest_root;
      largest_ratio = q > largest_ratio ? q : largest_ratio;
      return x;
    };
#pragma unroll
    for (int n = 0; n < CELLS; ++n) {
      const int64_t cell = lanes.first + n * lanes.count;
#pragma unroll
      for (int k = 0; k < PER; ++k) {
        if (cell < cells && k < b.columns(cell)) kept[n][k] = see(cell, k);
      }
    }
    for (int64_t cell = lanes.first + CELLS * lanes.count; cell < cells; cell += lanes.count) {
      for (int k = 0; k < b.columns(cell); ++k) see(cell, k);
    }

    const float n_root = scale_of(lanes.max(largest_root)), n_ratio = scale_of(lanes.max(largest_ratio));
    const float f_root = factor_of(n_root, levels_of(coding.bits, false));
    const float f_ratio = factor_of(n_ratio, levels_of(coding.bits, true));
    auto code = [&](int64_t cell, const Coded* x) {
      uint8_t r = 0, q = 0;
      Parts part(noise);
#pragma unroll
      for (int k = 0; k < PER; ++k) {
        if (k < b.columns(cell)) {
          r = with_code(r, k, code_of(x[k].root, f_root, coding.bits, false, part(b.at(cell, k))), coding);
          q = with_code(q, k, code_of(x[k].ratio, f_ratio, coding.bits, true, 0.0f), coding);
        }
      }
      root[b.byte(cell)] = r;
      ratio[b.byte(cell)] = q;
    };
#pragma unroll
    for (int n = 0; n < CELLS; ++n) {
      const int64_t cell = lanes.first + n * lanes.count;
      if (cell < cells) code(cell, kept[n]);
    }
    for (int64_t cell = lanes.first + CELLS * lanes.count; cell < cells; cell += lanes.count) {
      Coded again[PER] = {};
#pragma unroll
      for (int k = 0; k < PER; ++k) {
        if (k < b.columns(cell)) {
          const float c = column(b, cell, k);
          again[k] = coded(moments(b, cell, k, s_root, s_ratio, c), c);
        }
      }
      code(cell, again);
    }
    if (lanes.first == 0) {
      root_scale[b.number] = n_root;
      ratio_scale[b.number] = n_ratio;
    }
  }
};

// ------------------------------------------------------------------------------------------------------------------ many at once

// Operations of one kind on many tensors, in one launch: `first[k]` is where operation k's units begin. An argument of a kernel may
// have 4 KiB.
template <class Op>
struct Many {
  static constexpr int MOST = (4096 - 16) / (sizeof(Op) + 8);
  Op ops[MOST];
  int64_t first[MOST];
  int32_t count;

  LOWRANK_HD int find(int64_t unit) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first[middle] <= unit) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
  LOWRANK_HD void operator()(int64_t unit) const {
    const int k = find(unit);
    ops[k](unit - first[k]);
  }
  template <class Lanes>
  LOWRANK_HD void operator()(const Lanes& lanes, int64_t unit) const {
    const int k = find(unit);
    ops[k](lanes, unit - first[k]);
  }
};

}  // namespace lowrank
