// Codes of 8 and 4 bits: Adam on coded moments, rows, bases.
//
// Compiled once for each instruction set: LOWRANK_LEVEL names it, and the namespace of the table at the end. Loops run over at most a
// block, which stays in the first-level cache. Those in which bytes and floats meet are written in vectors (lanes.h). Only builtins are
// used, as in adam.cpp.
#include <type_traits>  // no function, which a linker could take from here

#include "arithmetic.h"
#include "lanes.h"
#include "numbers.h"
#include "ops.h"

namespace lowrank {
namespace {

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

// Where the numbers of a unit's columns begin, of one number for each column.
inline const f32* columns(const f32* numbers, const Coding& c, const Unit& unit) {
  return numbers ? numbers + unit.row / c.rows_per_scale * c.cols + unit.col : nullptr;
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

// How numbers become levels and levels are stored, signed or not, in 8 bits or 4: x = (level (1/L)) s, level = (code ^ flip) + zero.
struct Code {
  float levels, unit;  // L and 1/L
  int zero, least;  // the lowest level, if it is not −L
  u8 flip;  // codes of 8 bits with a sign are two's complement

  Code(int bits, bool is_signed)
      : levels(is_signed ? (bits == 8 ? 127.0f : 7.0f) : (bits == 8 ? 256.0f : 16.0f)),
        unit(float(1.0 / double(levels))),
        zero(is_signed ? (bits == 8 ? -128 : -8) : 1),
        least(is_signed ? 0 : 1),
        flip(is_signed && bits == 8 ? 0x80 : 0) {}

  INLINE Floats decoded(Bytes code, float scale) const {
    const Floats level = flip ? floats(signed_ints(code)) : floats(ints(code)) + float(zero);
    return least ? level * (unit * scale) : level * unit * scale;  // without a sign, the unit is a power of two
  }
  // `shifted`: y + SHIFTER, whose low bits are the nearest level; those of the sum, 2²³ + 2²², end in a byte of zeros.
  INLINE Bytes stored(Floats shifted) const {
    const Ints level = least > 0 ? larger(Ints(shifted), Ints(Floats{} + (SHIFTER + float(least)))) : Ints(shifted);
    return (bytes(level) - u8(zero)) ^ flip;
  }
};

INLINE void decode(const Code& how, const u8* code, int n, float scale, float* x) {
  over(0, n, [&](int j, auto part) __attribute__((always_inline)) { part.store(x + j, how.decoded(part.load(code + j), scale)); });
}

// The bits of |x|: as integers they are ordered as the magnitudes are, infinity above all numbers and NaN above infinity.
inline int32_t magnitude(float x) { return int32_t(bits_of(x) & MAGNITUDE); }

// The scale of a block from the bits of its largest magnitude, whatever their sign; NaN where it holds one or infinity.
inline float scale_of(uint32_t most) {
  const float s = float_of(most & MAGNITUDE);
  return (most & MAGNITUDE) >= INFINITE ? __builtin_nanf("") : s < MIN_SCALE ? 0.0f : s;
}

inline int between(int least, int x, int most) { return x < least ? least : x > most ? most : x; }

// y + ρ, whose nearest level is y on average: ρ = (r + 1/2)/2¹⁶ − 1/2 with a random r of 16 bits. What was decoded comes back within
// 2⁻²² |y|, and has to stay what it was: hence the factor of ρ. `size` is |y|.
INLINE Floats moved(Floats y, Floats size, Halves random) {
  const Floats part = floats(ints(random)) - 32767.5f;  // 2¹⁶ρ: powers of two change no rounding
  return y + part * (0x1p-16f - size * 0x1p-35f);
}

// Random halves of the elements `first` … `first` + n, of which two share a word; returns where they begin in `words`.
INLINE const u16* draw(const Noise& noise, int64_t first, int n, uint32_t* words) {
  const uint64_t position = uint64_t(noise.start) + uint64_t(first), pair = position / 2;
  const int count = int((position + uint64_t(n) - 1) / 2 - pair) + 1;
  for (int done = 0; done < count;) {
    const Stream random(noise, pair + uint64_t(done), count - done);
    // What is written beyond the end of a stream is written again, or never read.
    for (int j = 0; j < random.left; j += LANES) {
      const Pairs halves = Pairs(random.halves(numbered() + uint32_t(j))) + random.offset;
      __builtin_memcpy(words + done + j, &halves, sizeof halves);
    }
    done += random.left;
  }
  return reinterpret_cast<const u16*>(words) + position % 2;  // (bytes of a word in little-endian order)
}

// The factor that takes the numbers of a block to levels. Those of the largest are at most L and three roundings of it: none is above L.
inline float to_levels(const Code& how, float scale) { return (1.0f / scale) * how.levels; }  // as torch divides a number by a tensor

// Codes of one block, a byte each, rounded to nearest, or by random halves.
INLINE void encode(const Code& how, const float* __restrict x, int n, float scale, const u16* random, u8* __restrict code) {
  if (!(scale > 0.0f)) {
    const u8 nothing = how.least > 0 ? 0 : u8(-how.zero) ^ how.flip;
    EACH(j, n) code[j] = nothing;
    return;
  }
  const float factor = to_levels(how, scale);
  if (random) {
    over(0, n, [&](int j, auto part) __attribute__((always_inline)) {
      const Floats y = part.load(x + j) * factor;
      part.store(code + j, how.stored(moved(y, Floats(magnitude(y)), part.load(random + j)) + SHIFTER));
    });
  } else {
    over(0, n, [&](int j, auto part) __attribute__((always_inline)) {
      part.store(code + j, how.stored(part.load(x + j) * factor + SHIFTER));
    });
  }
}

// Working arrays of one block: m, then m/√v, and √v as they are to be coded, random words; copies of gradient and weight of other types.
struct Work {
  float *__restrict ratio, *__restrict root, *__restrict grad, *__restrict weight;
  uint32_t* random;
};

// A block of n elements whose codes are still to be written.
struct Coded {
  int n = 0;
  const float *ratio, *root;
  float ratio_scale, root_scale;
  const u16* random;
  u8 *ratio_code, *root_code;

  INLINE void finish(const Code& ratios, const Code& roots) {
    encode(ratios, ratio, n, ratio_scale, nullptr, ratio_code);
    encode(roots, root, n, root_scale, random, root_code);
    n = 0;
  }
};

// Asks for the memory of a tensor that blocks to come will want. The processor does so by itself, but not beyond a page of 4 KiB.
struct Ahead {
  const char* next;
  int size;

  INLINE Ahead(const void* data, int32_t dtype, int64_t at) : size(dtype == FLOAT32 ? 4 : 2) {
    next = static_cast<const char*>(data) + at * size;
    __builtin_prefetch(next + 4096);
  }
  INLINE void operator()(int j) const { __builtin_prefetch(next + j * size); }
};

// One block of n elements: `index` is the number of its scales. Its codes, which need the largest element, are left to be written:
// here those of the block before are, if there is one (`both`; it has n elements, and noise), so that its multiplications are done
// while the divisions of this one are under way.
template <bool both>
INLINE Coded coded_block(const CodedAdamArgs& args, const Work& work, int64_t element, const int n, const f32* scales,
                         const f32* inverse, int64_t index, u8* __restrict ratio_code, u8* __restrict root_code, Squares* squares, const Coded& before) {
  const Code ratios(args.coding.bits, true), roots(args.coding.bits, false);
  const float ratio_scale = args.ratio_scale[index], root_scale = args.root_scale[index];
  const f32* g = load(args.grad, element, work.grad, n);
  const bool direct = args.out, in_place = !direct && args.weight.dtype == FLOAT32;
  if (!direct && !in_place) load(args.weight, args.write.error, element, work.weight, n);
  f32* to = direct ? args.out + element : in_place ? static_cast<f32*>(args.weight.data) + element : work.weight;
  const Ahead grads(args.grad.data, args.grad.dtype, element + n);
  const Ahead weights(direct ? args.out : args.weight.data, direct ? FLOAT32 : args.weight.dtype, element + n);
  const Adam a = args.adam;
  const Lerp lerp(a.weight1);
  const float keep = args.write.keep, step = -args.write.alpha;
  const float ratio_factor = both ? to_levels(ratios, before.ratio_scale) : 0.0f;
  const float root_factor = both ? to_levels(roots, before.root_scale) : 0.0f;
  Words most_ratio = {}, most_root = {};
  // In two loops: the square root and the divisions take long, and more of them are under way at a time in short ones.
  over(0, n, [&](int j, auto part) __attribute__((always_inline)) {
    grads(j);
    weights(j);
    const Floats grad = part.load(g + j), ratio = ratios.decoded(part.load(ratio_code + j), ratio_scale);
    Floats root = roots.decoded(part.load(root_code + j), root_scale);
    if (scales) root *= part.load(scales + j);
    part.store(work.ratio + j, lerp(ratio * root, grad));
    part.store(work.root + j, square_root(square_update(root * root, grad, a.beta2, a.weight2)));
  });
  over(0, n, [&](int j, auto part) __attribute__((always_inline)) {
    const Floats m = part.load(work.ratio + j), s = part.load(work.root + j);
    const Floats direction = adam_direction(m, s, a), quotient = m / s;
    const Floats ratio = s > 0.0f ? quotient : Floats{}, root = scales ? s * part.load(inverse + j) : s;
    part.store(work.ratio + j, ratio);
    if (scales) part.store(work.root + j, root);
    most_ratio = larger(most_ratio, part.only(Words(magnitude(ratio))));
    most_root = larger(most_root, part.only(Words(root)));  // not below 0; a NaN, of any sign, is above all
    part.store(to + j, direct ? direction : part.load(to + j) * keep + step * direction);
    if (both) {
      part.store(before.ratio_code + j, ratios.stored(part.load(before.ratio + j) * ratio_factor + SHIFTER));
      const Floats y = part.load(before.root + j) * root_factor;
      part.store(before.root_code + j, roots.stored(moved(y, y, part.load(before.random + j)) + SHIFTER));
    }
  });
  if (squares) {
    squares->direction += sum_of_squares(to, n);
    squares->grad += sum_of_squares(g, n);
  }
  args.ratio_scale[index] = scale_of(largest(most_ratio));
  args.root_scale[index] = scale_of(largest(most_root));
  if (!direct && !in_place) store(args.weight, args.write.error, element, work.weight, n, args.write.rounding, element);
  const u16* random = args.noise.on ? draw(args.noise, element, n, work.random) : nullptr;
  return {n, work.ratio, work.root, args.ratio_scale[index], args.root_scale[index], random, ratio_code, root_code};
}

void coded_adam(const CodedAdamArgs& args, int64_t first, int64_t last, float* scratch) {
  const Coding& c = args.coding;
  const int64_t most = padded(c);
  const auto array = [&](int i) { return scratch + i * most; };
  const Work works[] = {{array(0), array(1), array(4), array(5), reinterpret_cast<uint32_t*>(array(6))},
                        {array(2), array(3), array(4), array(5), reinterpret_cast<uint32_t*>(array(7))}};
  u8* ratio_levels = reinterpret_cast<u8*>(array(8));
  u8* root_levels = ratio_levels + most;
  const Code ratios(c.bits, true), roots(c.bits, false);
  Coded before;
  int turn = 0;
  for (int64_t index = first; index < last; ++index) {
    const Unit unit(c, index);
    const f32 *scales = columns(c.col_scale, c, unit), *inverse = columns(c.inverse, c, unit);
    const int64_t at = code_at(c, unit);
    u8 *ratio_code = args.ratio + at, *root_code = args.root + at;
    Squares* squares = args.squares ? args.squares + index : nullptr;
    if (squares) *squares = {};
    if (c.bits == 4) {
      unpack_nibbles(ratio_code, ratio_levels, unit.n);
      unpack_nibbles(root_code, root_levels, unit.n);
      ratio_code = ratio_levels;
      root_code = root_levels;
    }
    for (int64_t from = 0, block = unit.blocks; from < unit.n; from += c.block, ++block, turn ^= 1) {
      const int n = smaller(c.block, unit.n - from);
      const f32 *own = scales ? scales + from : nullptr, *over_own = scales ? inverse + from : nullptr;
      const auto run = [&](auto both, const int size) __attribute__((always_inline)) {
        return coded_block<decltype(both)::value>(args, works[turn], unit.element + from, size, own, over_own, block, ratio_code + from,
                                       root_code + from, squares, before);
      };
      if (before.n == USUAL && n == USUAL && before.random && before.ratio_scale > 0.0f && before.root_scale > 0.0f) {
        before = run(std::true_type{}, USUAL);
      } else {
        if (before.n) before.finish(ratios, roots);
        before = n == USUAL ? run(std::false_type{}, USUAL) : run(std::false_type{}, n);
      }
    }
    if (c.bits == 4) {
      before.finish(ratios, roots);
      pack_nibbles(ratio_levels, args.ratio + at, unit.n);
      pack_nibbles(root_levels, args.root + at, unit.n);
    }
  }
  if (before.n) before.finish(ratios, roots);
}

void quantize(const QuantizeArgs& args, int64_t first, int64_t last, float* scratch) {
  const Coding& c = args.coding;
  const int64_t most = padded(c);
  const Code how(c.bits, args.is_signed);
  float *buffer = scratch, *__restrict y = buffer + most;
  uint32_t* words = reinterpret_cast<uint32_t*>(y + most);
  u8* levels = reinterpret_cast<u8*>(words + most);
  for (int64_t index = first; index < last; ++index) {
    const Unit unit(c, index);
    const f32* inverse = columns(c.inverse, c, unit);
    u8* codes = args.codes + code_at(c, unit);
    u8* to = c.bits == 4 ? levels : codes;
    for (int64_t from = 0, block = unit.blocks; from < unit.n; from += c.block, ++block) {
      const int n = smaller(c.block, unit.n - from);
      const f32* x = load(args.x, unit.row * args.x.stride + unit.col + from, buffer, n);
      int32_t greatest = 0;
      EACH(j, n) {
        y[j] = inverse ? x[j] * inverse[from + j] : x[j];
        greatest = larger(greatest, magnitude(y[j]));
      }
      const float scale = scale_of(greatest);
      args.scale[block] = scale;
      encode(how, y, n, scale, args.noise.on ? draw(args.noise, unit.element + from, n, words) : nullptr, to + from);
    }
    if (c.bits == 4) pack_nibbles(levels, codes, unit.n);
  }
}

void dequantize(const DequantizeArgs& args, int64_t first, int64_t last, float* scratch) {
  const Coding& c = args.coding;
  const int64_t most = padded(c);
  const Code how(c.bits, args.is_signed);
  float* y = scratch;
  u8* levels = reinterpret_cast<u8*>(y + most);
  for (int64_t index = first; index < last; ++index) {
    const Unit unit(c, index);
    const f32* scales = columns(c.col_scale, c, unit);
    const u8* codes = args.codes + code_at(c, unit);
    if (c.bits == 4) {
      unpack_nibbles(codes, levels, unit.n);
      codes = levels;
    }
    for (int64_t from = 0, block = unit.blocks; from < unit.n; from += c.block, ++block) {
      decode(how, codes + from, smaller(c.block, unit.n - from), args.scale[block], y + from);
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

}  // namespace

namespace LOWRANK_LEVEL {
extern const CodeKernels code_kernels = {coded_adam, quantize, dequantize, pack, unpack};
}

}  // namespace lowrank
