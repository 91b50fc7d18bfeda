// The functions that Python calls (lowrank_optim/kernels/cpu/library.py declares the same): plain pointers, sizes and numbers.
//
// They return 0, or 1 where there is no memory for working space; nothing has been changed then. Arguments are not checked.
// Whoever changes a signature raises ABI_VERSION here and in library.py.
#include <cstdlib>
#include <cstring>
#include <memory>

#include "ops.h"
#include "pool.h"

namespace lowrank {
namespace {

constexpr int ABI_VERSION = 2;
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

// A kernel over `units` of `size` elements.
template <class Args>
int run(OnUnits<Args> kernel, const Args& args, int64_t units, int64_t size, int threads) {
  if (units * size <= ALONE) threads = 1;
  struct Call {
    OnUnits<Args> kernel;
    const Args* args;
  } call = {kernel, &args};
  const int64_t piece = ALONE / size > 1 ? ALONE / size : 1;
  parallel(
      units, piece, threads,
      [](void* context, int64_t begin, int64_t end, int) {
        const Call* c = static_cast<Call*>(context);
        c->kernel(*c->args, begin, end);
      },
      &call);
  return 0;
}

// The same for coded matrices, whose kernels need working memory.
template <class Args>
int run(OnBlocks<Args> kernel, const Args& args, int threads) {
  const Coding& c = args.coding;
  if (c.rows == 0 || c.cols == 0) return 0;
  const int64_t width = span(c), units = c.rows * pieces(c.cols, width), floats = scratch_floats(c);
  if (width > INT32_MAX / 2) return 1;  // kernels count the elements of a unit in an int
  if (c.rows * c.cols <= ALONE) threads = 1;
  if (threads > MAX_THREADS) threads = MAX_THREADS;
  struct Call {
    OnBlocks<Args> kernel;
    const Args* args;
    float* scratch;
    int64_t floats;
  } call = {kernel, &args, nullptr, floats};
  alignas(64) float few[8192];  // arrays begin with a cache line: a vector across two of them costs twice
  std::unique_ptr<float, decltype(&std::free)> many(nullptr, &std::free);
  if (floats * threads <= int64_t(sizeof few / sizeof *few)) {
    call.scratch = few;
  } else {
    many.reset(static_cast<float*>(std::aligned_alloc(64, size_t(floats) * size_t(threads) * sizeof(float))));
    if (!many) return 1;
    call.scratch = many.get();
  }
  const int64_t piece = ALONE / width > 1 ? ALONE / width : 1;
  parallel(
      units, piece, threads,
      [](void* context, int64_t begin, int64_t end, int worker) {
        const Call* k = static_cast<Call*>(context);
        k->kernel(*k->args, begin, end, k->scratch + worker * k->floats);
      },
      &call);
  return 0;
}

Noise noise_of(int on, uint64_t key, int64_t start, uint32_t offset) { return Noise{on != 0, key, start, offset}; }

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

// adam_direct_ with `out`, adam_dense_ with `weight`: the other is null.
LOWRANK_API int lowrank_optim_adam(int64_t n, const void* grad, int grad_type, f32* exp_avg, f32* exp_avg_sq, f32* out, void* weight,
                                   int weight_type, float weight1, float beta2, float weight2, float correction, float floor,
                                   float keep, float alpha, int rounding, uint64_t key, int64_t start, int threads) {
  AdamArgs args;
  args.grad = {grad, grad_type, 0};
  args.exp_avg = exp_avg;
  args.exp_avg_sq = exp_avg_sq;
  args.out = out;
  args.weight = {weight, weight_type, 0};
  args.adam = {weight1, beta2, weight2, correction, floor};
  args.write = {keep, alpha, noise_of(rounding, key, start, 0)};
  return run<AdamArgs>(chosen->kernels->adam, args, n, 1, limited(threads));
}

LOWRANK_API int lowrank_optim_rule(int rule, int64_t n, const f32* grad, f32* moment, f32* out, float first, float second, float third,
                                   int threads) {
  const RuleArgs args = {rule, grad, moment, out, first, second, third};
  return run<RuleArgs>(chosen->kernels->rule, args, n, 1, limited(threads));
}

// coded_adam_direct_ with `out`, coded_adam_dense_ with `weight`.
LOWRANK_API int lowrank_optim_coded_adam(int64_t rows, int64_t cols, int64_t block, int bits, const void* grad, int grad_type, void* ratio,
                                         f32* ratio_scale, void* root, f32* root_scale, const f32* col_scale, int64_t rows_per_scale,
                                         f32* out, void* weight, int weight_type, float weight1, float beta2, float weight2,
                                         float correction, float floor, int noisy, uint64_t noise_key, int64_t noise_start,
                                         uint32_t offset, float keep, float alpha, int rounding, uint64_t key, int64_t start,
                                         int threads) {
  CodedAdamArgs args;
  args.coding = {rows, cols, block, bits, col_scale, rows_per_scale};
  args.grad = {grad, grad_type, cols};
  args.ratio = static_cast<u8*>(ratio);
  args.root = static_cast<u8*>(root);
  args.ratio_scale = ratio_scale;
  args.root_scale = root_scale;
  args.out = out;
  args.weight = {weight, weight_type, cols};
  args.adam = {weight1, beta2, weight2, correction, floor};
  args.noise = noise_of(noisy, noise_key, noise_start, offset);
  args.write = {keep, alpha, noise_of(rounding, key, start, 0)};
  return run<CodedAdamArgs>(chosen->kernels->coded_adam, args, limited(threads));
}

LOWRANK_API int lowrank_optim_quantize_rows(int64_t rows, int64_t cols, int64_t block, int bits, int is_signed, const void* x, int x_type,
                                            int64_t x_stride, const f32* col_scale, int64_t rows_per_scale, void* codes, f32* scale,
                                            int noisy, uint64_t key, int64_t start, uint32_t offset, int threads) {
  const QuantizeArgs args = {{rows, cols, block, bits, col_scale, rows_per_scale},
                             is_signed != 0,
                             {x, x_type, x_stride},
                             static_cast<u8*>(codes),
                             scale,
                             noise_of(noisy, key, start, offset)};
  return run<QuantizeArgs>(chosen->kernels->quantize, args, limited(threads));
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

LOWRANK_API int lowrank_optim_gaussian(int64_t numel, f32* out, uint64_t key, int threads) {
  const GaussianArgs args = {out, numel, key};
  return run<GaussianArgs>(chosen->kernels->gaussian, args, pieces(numel, 2), 32, limited(threads));  // a pair costs what 32 others do
}
