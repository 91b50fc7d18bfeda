// The functions that Python calls (lowrank_optim/kernels/cpu/library.py declares the same): plain pointers, sizes and numbers.
//
// They return 0, or 1 where there is no memory for working space; nothing has been changed then. Arguments are not checked.
// Whoever changes a signature or a structure raises ABI_VERSION here and in library.py.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "ops.h"
#include "pool.h"

namespace lowrank {
namespace {

constexpr int ABI_VERSION = 6;
constexpr int64_t ALONE = 1 << 15;  // elements that are not worth a second thread

#define LOWRANK_TEXT_(x) #x
#define LOWRANK_TEXT(x) LOWRANK_TEXT_(x)
#ifdef __clang__
#define LOWRANK_COMPILER "clang " __clang_version__
#else
#define LOWRANK_COMPILER "gcc " __VERSION__
#endif
#ifndef LOWRANK_FLAGS
#define LOWRANK_FLAGS "flags unknown"
#endif

struct Level {
  const char* name;
  const Kernels* kernels;
};

#ifdef LOWRANK_X86
const Level LEVELS[] = {{"avx512", &kernels_avx512}, {"avx2", &kernels_avx2}, {"baseline", &kernels_baseline}};
#else
const Level LEVELS[] = {{"baseline", &kernels_baseline}};
#endif

bool runs_here(const Level& level) {
#ifdef LOWRANK_X86
  __builtin_cpu_init();
  if (std::strcmp(level.name, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  }
  if (std::strcmp(level.name, "avx2") == 0) return __builtin_cpu_supports("avx2");
#endif
  return std::strcmp(level.name, "baseline") == 0;
}

const Level* best() {
  for (const Level& level : LEVELS) {
    if (runs_here(level)) return &level;
  }
  return &LEVELS[sizeof LEVELS / sizeof *LEVELS - 1];
}

const Level* chosen = best();

template <class Args>
using OnUnits = void (*)(const Args&, int64_t, int64_t);
template <class Args>
using OnBlocks = void (*)(const Args&, int64_t, int64_t, float*);

// 1 where there is no memory.
template <class Body>
int guarded(const Body& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// Units of a coded matrix that is not empty.
int64_t units_of(const Coding& c) { return c.rows * pieces(c.cols, span(c)); }

// body(begin, end, worker) over [0, count) in pieces.
template <class Body>
void in_pieces(int64_t count, int64_t piece, int threads, const Body& body) {
  parallel(
      count, piece > 1 ? piece : 1, threads,
      [](void* context, int64_t begin, int64_t end, int worker) { (*static_cast<const Body*>(context))(begin, end, worker); },
      const_cast<Body*>(&body));
}

// The units of several calls in a row.
struct Units {
  std::vector<int64_t> first{0};  // the first one of each call, and their number

  void add(int64_t units) { first.push_back(first.back() + units); }
  int64_t count() const { return first.back(); }

  // body(call, from, to) for the units `begin` … `end`, counted within each call.
  template <class Body>
  void each(int64_t begin, int64_t end, const Body& body) const {
    size_t k = size_t(std::upper_bound(first.begin(), first.end(), begin) - first.begin()) - 1;
    for (; begin < end; ++k) {
      const int64_t to = end < first[k + 1] ? end : first[k + 1];
      if (begin < to) body(k, begin - first[k], to - first[k]);
      begin = to;
    }
  }
};

// A kernel over `units` of `size` elements.
template <class Args>
int run(OnUnits<Args> kernel, const Args& args, int64_t units, int64_t size, int threads) {
  in_pieces(units, ALONE / size, units * size <= ALONE ? 1 : threads,
            [&](int64_t begin, int64_t end, int) { kernel(args, begin, end); });
  return 0;
}

// The same for coded matrices, whose kernels need working memory: several at once.
template <class Args>
int run_many(OnBlocks<Args> kernel, const std::vector<Args>& calls, int threads) {
  Units units;
  int64_t elements = 0, floats = 0, widest = 1;
  for (const Args& args : calls) {
    const Coding& c = args.coding;
    const bool empty = c.rows == 0 || c.cols == 0;
    const int64_t width = empty ? 1 : span(c);
    if (width > INT32_MAX / 2) return 1;  // kernels count the elements of a unit in an int
    units.add(empty ? 0 : units_of(c));
    elements += c.rows * c.cols;
    if (!empty && scratch_floats(c) > floats) floats = scratch_floats(c);
    if (width > widest) widest = width;
  }
  if (elements == 0) return 0;
  if (elements <= ALONE) threads = 1;
  alignas(64) float few[8192];  // arrays begin with a cache line: a vector across two of them costs twice
  std::unique_ptr<float, decltype(&std::free)> many(nullptr, &std::free);
  float* scratch = few;
  if (floats * threads > int64_t(sizeof few / sizeof *few)) {
    many.reset(static_cast<float*>(std::aligned_alloc(64, size_t(floats) * size_t(threads) * sizeof(float))));
    if (!many) return 1;
    scratch = many.get();
  }
  in_pieces(units.count(), ALONE / widest, threads, [&](int64_t begin, int64_t end, int worker) {
    units.each(begin, end, [&](size_t k, int64_t from, int64_t to) { kernel(calls[k], from, to, scratch + worker * floats); });
  });
  return 0;
}

template <class Args>
int run(OnBlocks<Args> kernel, const Args& args, int threads) {
  return guarded([&] { return run_many<Args>(kernel, std::vector<Args>(1, args), threads); });
}

// 1/c of the column scales, for as long as a call takes; null where there are none, or, which `failed` says, no memory.
struct Inverse {
  std::unique_ptr<f32, decltype(&std::free)> numbers{nullptr, &std::free};
  bool failed = false;

  explicit Inverse(Coding& c) {
    if (!c.col_scale || c.rows == 0 || c.cols == 0) return;
    const int64_t count = pieces(c.rows, c.rows_per_scale) * c.cols;
    numbers.reset(static_cast<f32*>(std::malloc(size_t(count) * sizeof(f32))));
    failed = !numbers;
    for (int64_t k = 0; !failed && k < count; ++k) numbers.get()[k] = 1.0f / c.col_scale[k];
    c.inverse = numbers.get();
  }
};

Noise noise_of(int on, uint64_t key, int64_t start, uint16_t offset) { return Noise{on != 0, key, start, offset}; }

// ‖N_j‖ and ‖g_j‖ of rows from the sums of the units that each has.
void write_lengths(const Squares* squares, int64_t rows, int64_t units, f32* lengths, f32* grad_lengths) {
  for (int64_t row = 0; row < rows; ++row) {
    Squares sum = {};
    for (int64_t k = 0; k < units; ++k, ++squares) {
      sum.direction += squares->direction;
      sum.grad += squares->grad;
    }
    lengths[row] = root_of(sum.direction);
    grad_lengths[row] = root_of(sum.grad);
  }
}

int limited(int threads) { return threads < 1 ? 1 : threads > MAX_THREADS ? MAX_THREADS : threads; }

}  // namespace
}  // namespace lowrank

using namespace lowrank;

#define LOWRANK_API extern "C" __attribute__((visibility("default")))

LOWRANK_API int lowrank_optim_abi_version() { return ABI_VERSION; }

LOWRANK_API const char* lowrank_optim_build_info() { return LOWRANK_COMPILER ", " LOWRANK_FLAGS; }

LOWRANK_API const char* lowrank_optim_simd() { return chosen->name; }

// Use this instruction set from now on; 1 if the processor (or the library) does not have it. For tests.
LOWRANK_API int lowrank_optim_use_simd(const char* name) {
  for (const Level& level : LEVELS) {
    if (std::strcmp(level.name, name) == 0 && runs_here(level)) {
      chosen = &level;
      return 0;
    }
  }
  return 1;
}

// Run on the threads of an OpenMP runtime, from its GOMP_parallel and omp_get_thread_num; null stands for threads of our own.
LOWRANK_API void lowrank_optim_use_openmp(void* runtime, void* number) {
  use_openmp(reinterpret_cast<OpenMP>(runtime), reinterpret_cast<Number>(number));
}

// `count` tensors at once.
LOWRANK_API int lowrank_optim_adam(int64_t count, const AdamArgs* calls, int threads) {
  return guarded([&] {
    Units units;
    int64_t elements = 0, widest = TILE;
    // What a unit has, and all of them: rows where there are norms, else elements.
    const auto height = [](const AdamArgs& c) { return !c.norms ? TILE : c.cols < TILE ? TILE / c.cols : 1; };
    const auto total = [](const AdamArgs& c) { return c.norms ? c.numel / c.cols : c.numel; };
    for (int64_t k = 0; k < count; ++k) {
      const AdamArgs& c = calls[k];
      units.add(pieces(total(c), height(c)));
      elements += c.numel;
      if (c.norms && c.cols > widest) widest = c.cols;
    }
    in_pieces(units.count(), ALONE / widest, elements <= ALONE ? 1 : limited(threads), [&](int64_t begin, int64_t end, int) {
      units.each(begin, end, [&](size_t k, int64_t from, int64_t to) {
        const int64_t size = height(calls[k]), last = total(calls[k]);
        chosen->kernels->adam(calls[k], from * size, to * size < last ? to * size : last);
      });
    });
    return 0;
  });
}

LOWRANK_API int lowrank_optim_rule(int rule, int64_t n, const f32* grad, f32* moment, f32* out, float first, float second, float third,
                                   int threads) {
  const RuleArgs args = {rule, grad, moment, out, first, second, third};
  return run<RuleArgs>(chosen->kernels->rule, args, n, 1, limited(threads));
}

// coded_adam_direct_ with `out`, coded_adam_dense_ with `weight`, of `count` matrices at once: for each, a row of WORDS integers and
// addresses and a row of NUMBERS floats, in the order in which they are read here. `lengths` are the `norms` of AdamArgs.
LOWRANK_API int lowrank_optim_coded_adam(int64_t count, const int64_t* words, const float* numbers, int threads) {
  return guarded([&] {
    constexpr int WORDS = 24, NUMBERS = 7;
    std::vector<CodedAdamArgs> calls(static_cast<size_t>(count));
    std::vector<Inverse> inverses;
    std::vector<std::vector<Squares>> squares;
    std::vector<f32*> lengths, grad_lengths;
    inverses.reserve(calls.size());
    for (CodedAdamArgs& args : calls) {
      const auto at = [&](int i) { return reinterpret_cast<void*>(words[i]); };
      args.coding = {words[0], words[1], words[2], int32_t(words[3]), static_cast<const f32*>(at(10)), words[11]};
      args.grad = {at(4), int32_t(words[5]), words[1]};
      args.ratio = static_cast<u8*>(at(6));
      args.ratio_scale = static_cast<f32*>(at(7));
      args.root = static_cast<u8*>(at(8));
      args.root_scale = static_cast<f32*>(at(9));
      args.out = static_cast<f32*>(at(12));
      args.weight = {at(13), int32_t(words[14]), words[1]};
      args.noise = noise_of(words[15] != 0, uint64_t(words[16]), words[17], uint16_t(words[18]));
      args.adam = {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]};
      args.write = {numbers[5], numbers[6], noise_of(words[19] != 0, uint64_t(words[20]), words[21], 0)};
      inverses.emplace_back(args.coding);
      if (inverses.back().failed) return 1;
      lengths.push_back(static_cast<f32*>(at(22)));
      grad_lengths.push_back(static_cast<f32*>(at(23)));
      squares.emplace_back(lengths.back() ? static_cast<size_t>(units_of(args.coding)) : 0);
      args.squares = lengths.back() ? squares.back().data() : nullptr;
      words += WORDS;
      numbers += NUMBERS;
    }
    if (run_many<CodedAdamArgs>(chosen->kernels->coded_adam, calls, limited(threads))) return 1;
    for (size_t k = 0; k < calls.size(); ++k) {
      const int64_t rows = calls[k].coding.rows;
      if (!lengths[k]) continue;
      write_lengths(squares[k].data(), rows, units_of(calls[k].coding) / rows, lengths[k], grad_lengths[k]);
    }
    return 0;
  });
}

// ‖x‖ of `count` flat tensors: for each its address, type and number of elements.
LOWRANK_API int lowrank_optim_norms(int64_t count, const int64_t* words, float* norms, int threads) {
  return guarded([&] {
    Units tiles;
    for (int64_t i = 0; i < count; ++i) tiles.add(pieces(words[3 * i + 2], TILE));
    std::vector<double> sums(static_cast<size_t>(tiles.count()));
    in_pieces(tiles.count(), ALONE / TILE, tiles.count() * TILE <= ALONE ? 1 : limited(threads), [&](int64_t begin, int64_t end, int) {
      tiles.each(begin, end, [&](size_t k, int64_t from, int64_t to) {
        const int64_t* x = words + 3 * k;
        const SquaresArgs args = {{reinterpret_cast<const void*>(x[0]), int32_t(x[1]), 0}, sums.data() + tiles.first[k]};
        chosen->kernels->squares(args, from * TILE, to * TILE < x[2] ? to * TILE : x[2]);
      });
    });
    for (size_t k = 0; k < size_t(count); ++k) {
      double total = 0.0;
      for (int64_t tile = tiles.first[k]; tile < tiles.first[k + 1]; ++tile) total += sums[size_t(tile)];
      norms[k] = root_of(total);
    }
    return 0;
  });
}

LOWRANK_API int lowrank_optim_quantize_rows(int64_t rows, int64_t cols, int64_t block, int bits, int is_signed, const void* x, int x_type,
                                            int64_t x_stride, const f32* col_scale, int64_t rows_per_scale, void* codes, f32* scale,
                                            int noisy, uint64_t key, int64_t start, uint16_t offset, int threads) {
  QuantizeArgs args = {{rows, cols, block, bits, col_scale, rows_per_scale},
                       is_signed != 0,
                       {x, x_type, x_stride},
                       static_cast<u8*>(codes),
                       scale,
                       noise_of(noisy, key, start, offset)};
  const Inverse inverse(args.coding);
  return inverse.failed ? 1 : run<QuantizeArgs>(chosen->kernels->quantize, args, limited(threads));
}

LOWRANK_API int lowrank_optim_dequantize_rows(int64_t rows, int64_t cols, int64_t block, int bits, int is_signed, const void* codes,
                                              const f32* scale, const f32* col_scale, int64_t rows_per_scale, void* x, int x_type,
                                              int threads) {
  const DequantizeArgs args = {{rows, cols, block, bits, col_scale, rows_per_scale},
                               is_signed != 0,
                               static_cast<const u8*>(codes),
                               scale,
                               {x, x_type, cols}};
  return run<DequantizeArgs>(chosen->kernels->dequantize, args, limited(threads));
}

LOWRANK_API int lowrank_optim_pack_basis(int64_t rows, int64_t cols, int64_t group, int bits, const void* x, int x_type, int64_t x_stride,
                                         void* codes, f32* scale, f32* zero, int threads) {
  const PackArgs args = {{rows, cols, group, bits, nullptr, 1}, {x, x_type, x_stride}, static_cast<u8*>(codes), scale, zero};
  return run<PackArgs>(chosen->kernels->pack, args, limited(threads));
}

LOWRANK_API int lowrank_optim_unpack_basis(int64_t rows, int64_t cols, int64_t group, int bits, const void* codes, const f32* scale,
                                           const f32* zero, void* x, int x_type, int threads) {
  const UnpackArgs args = {{rows, cols, group, bits, nullptr, 1}, static_cast<const u8*>(codes), scale, zero, {x, x_type, cols}};
  return run<UnpackArgs>(chosen->kernels->unpack, args, limited(threads));
}

// apply_ after its matrix products, and apply_dense_; `grad` and `subtract` may be null.
LOWRANK_API int lowrank_optim_update(int64_t rows, int64_t cols, void* weight, int weight_type, int64_t weight_stride,
                                     const f32* product, int64_t product_stride, const void* grad, int grad_type, int64_t grad_stride,
                                     const f32* subtract, int64_t subtract_stride, int sign, const f32* phi, int64_t phi_row,
                                     int64_t phi_col, float keep, float alpha, int rounding, uint64_t key, int64_t start,
                                     int threads) {
  const UpdateArgs args = {rows,
                           cols,
                           {weight, weight_type, weight_stride},
                           {keep, alpha, noise_of(rounding, key, start, 0)},
                           {product, FLOAT32, product_stride},
                           {grad, grad_type, grad_stride},
                           {subtract, FLOAT32, subtract_stride},
                           sign != 0,
                           phi,
                           phi_row,
                           phi_col};
  const int64_t width = cols < TILE ? cols : TILE;
  return cols == 0 ? 0 : run<UpdateArgs>(chosen->kernels->update, args, rows * pieces(cols, TILE), width, limited(threads));
}

LOWRANK_API int lowrank_optim_store(int64_t rows, int64_t cols, void* target, int target_type, int64_t target_stride,
                                    const f32* value, int64_t value_stride, int rounding, uint64_t key, int64_t start, int threads) {
  const StoreArgs args = {
      rows, cols, {target, target_type, target_stride}, {value, FLOAT32, value_stride}, noise_of(rounding, key, start, 0)};
  const int64_t width = cols < TILE ? cols : TILE;
  return cols == 0 ? 0 : run<StoreArgs>(chosen->kernels->store, args, rows * pieces(cols, TILE), width, limited(threads));
}

// ‖g_j‖² of every row (`by_row`) or column of a matrix, and, with `dots`, its product with a `vector`, which may be empty.
LOWRANK_API int lowrank_optim_lines(int64_t rows, int64_t cols, const void* grad, int grad_type, int64_t grad_stride, int by_row,
                                    const f32* vector, f32* dots, f32* squares, int threads) {
  const LinesArgs args = {rows, cols, {grad, grad_type, grad_stride}, vector, dots, squares};
  if (by_row) return run<LinesArgs>(chosen->kernels->row_sums, args, rows, cols > 0 ? cols : 1, limited(threads));
  const int64_t height = rows > 0 ? rows : 1;
  return run<LinesArgs>(chosen->kernels->column_sums, args, pieces(cols, STRIP), STRIP * height, limited(threads));
}

LOWRANK_API int lowrank_optim_gaussian(int64_t numel, f32* out, uint64_t key, int threads) {
  const GaussianArgs args = {out, numel, key};
  return run<GaussianArgs>(chosen->kernels->gaussian, args, pieces(numel, 2), 8, limited(threads));  // a pair costs what 8 others do
}
