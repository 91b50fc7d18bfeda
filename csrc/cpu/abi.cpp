// The functions that Python calls (lowrank_optim/kernels/cpu/library.py declares the same). They take structures of ops.h and a number
// of threads.
//
// They return 0, or 1 where there is no memory for working space; nothing has been changed then. Arguments are not checked.
// Whoever changes a signature or a structure raises ABI_VERSION here and in library.py.
#include <cstring>

#include "calls.h"

namespace lowrank {
namespace {

constexpr int ABI_VERSION = 14;
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

#define LOWRANK_ROW(level) {#level, level::adam_kernels, level::code_kernels, level::weight_kernels, level::sparse_kernels, \
                            level::pair_kernels, level::eigen_kernels, level::rite_kernels}
#ifdef LOWRANK_X86
const Level LEVELS[] = {LOWRANK_ROW(avx512), LOWRANK_ROW(avx2), LOWRANK_ROW(baseline)};
#else
const Level LEVELS[] = {LOWRANK_ROW(baseline)};
#endif

bool runs_here(const Level& level) {
#ifdef LOWRANK_X86
  __builtin_cpu_init();
  if (std::strcmp(level.name, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  }
  if (std::strcmp(level.name, "avx2") == 0) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
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

// Units of a coded matrix that is not empty.
int64_t units_of(const Coding& c) { return c.rows * pieces(c.cols, span(c)); }

// A kernel over `units` of `size` elements.
template <class Args>
int run(OnUnits<Args> kernel, const Args& args, int64_t units, int64_t size, int threads) {
  in_pieces(units, ALONE / size, units * size <= ALONE ? 1 : threads,
            [&](int64_t begin, int64_t end, int) { kernel(args, begin, end); });
  return 0;
}

// A kernel over the tiles of a matrix.
template <class Args>
int run_tiles(OnUnits<Args> kernel, const Args& args, int threads) {
  const int64_t width = args.cols < TILE ? args.cols : TILE;
  return args.cols == 0 ? 0 : run<Args>(kernel, args, args.rows * pieces(args.cols, TILE), width, limited(threads));
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

// The widest tiles of tokens with `cols` features that have at most so many elements; few tokens have narrow ones.
const SparseWidth& width_of(int64_t cols, int64_t tokens, int64_t most) {
  const SparseWidth* best = chosen->sparse.widths;
  for (const SparseWidth& width : chosen->sparse.widths) {
    if (width.tokens * cols <= most && width.tokens < 2 * tokens) best = &width;
  }
  return *best;
}

// ‖N_j‖ and ‖g_j‖ of rows from the sums of the units of each.
void write_norms(const CodedAdamArgs& args) {
  const Squares* squares = args.squares;
  const int64_t units = units_of(args.coding) / args.coding.rows;
  for (int64_t row = 0; row < args.coding.rows; ++row) {
    Squares sum = {};
    for (int64_t k = 0; k < units; ++k, ++squares) {
      sum.direction += squares->direction;
      sum.grad += squares->grad;
    }
    args.norms[row] = root_of(sum.direction);
    args.grad_norms[row] = root_of(sum.grad);
  }
}

}  // namespace

const Level& level_in_use() { return *chosen; }

}  // namespace lowrank

using namespace lowrank;

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
        chosen->adam.adam(calls[k], from * size, to * size < last ? to * size : last);
      });
    });
    return 0;
  });
}

LOWRANK_API int lowrank_optim_rule(const RuleArgs* args, int threads) {
  return run<RuleArgs>(chosen->adam.rule, *args, args->numel, 1, limited(threads));
}

LOWRANK_API int lowrank_optim_folded_adam(const FoldedAdamArgs* args, int threads) {
  return run_tiles(chosen->adam.folded_adam, *args, threads);
}

// `count` matrices at once.
LOWRANK_API int lowrank_optim_coded_adam(int64_t count, const CodedAdamArgs* given, int threads) {
  return guarded([&] {
    std::vector<CodedAdamArgs> calls(given, given + count);
    std::vector<Inverse> inverses;
    std::vector<std::vector<Squares>> squares;
    inverses.reserve(calls.size());
    squares.reserve(calls.size());
    for (CodedAdamArgs& args : calls) {
      inverses.emplace_back(args.coding);
      if (inverses.back().failed) return 1;
      squares.emplace_back(args.norms ? static_cast<size_t>(units_of(args.coding)) : 0);
      args.squares = args.norms ? squares.back().data() : nullptr;
    }
    if (run_many<CodedAdamArgs>(chosen->codes.coded_adam, calls, limited(threads))) return 1;
    for (const CodedAdamArgs& args : calls) {
      if (args.norms) write_norms(args);
    }
    return 0;
  });
}

// `count` tensors at once.
LOWRANK_API int lowrank_optim_norms(int64_t count, const NormArgs* given, int threads) {
  return guarded([&] {
    std::vector<NormArgs> calls(given, given + count);
    Units tiles;
    for (const NormArgs& args : calls) tiles.add(pieces(args.numel, TILE));
    std::vector<double> sums(static_cast<size_t>(tiles.count()));
    for (size_t k = 0; k < calls.size(); ++k) calls[k].sums = sums.data() + tiles.first[k];
    in_pieces(tiles.count(), ALONE / TILE, tiles.count() * TILE <= ALONE ? 1 : limited(threads), [&](int64_t begin, int64_t end, int) {
      tiles.each(begin, end, [&](size_t k, int64_t from, int64_t to) {
        const NormArgs& args = calls[k];
        chosen->weights.squares(args, from * TILE, to * TILE < args.numel ? to * TILE : args.numel);
      });
    });
    for (const NormArgs& args : calls) {
      double total = 0.0;
      for (int64_t tile = 0; tile < pieces(args.numel, TILE); ++tile) total += args.sums[tile];
      *args.norm = root_of(total);
    }
    return 0;
  });
}

LOWRANK_API int lowrank_optim_quantize_rows(const QuantizeArgs* given, int threads) {
  QuantizeArgs args = *given;
  const Inverse inverse(args.coding);
  return inverse.failed ? 1 : run<QuantizeArgs>(chosen->codes.quantize, args, limited(threads));
}

LOWRANK_API int lowrank_optim_dequantize_rows(const DequantizeArgs* args, int threads) {
  return run<DequantizeArgs>(chosen->codes.dequantize, *args, limited(threads));
}

LOWRANK_API int lowrank_optim_pack_basis(const PackArgs* args, int threads) {
  return run<PackArgs>(chosen->codes.pack, *args, limited(threads));
}

LOWRANK_API int lowrank_optim_unpack_basis(const UnpackArgs* args, int threads) {
  return run<UnpackArgs>(chosen->codes.unpack, *args, limited(threads));
}

LOWRANK_API int lowrank_optim_update(const UpdateArgs* args, int threads) { return run_tiles(chosen->weights.update, *args, threads); }

LOWRANK_API int lowrank_optim_store(const StoreArgs* args, int threads) { return run_tiles(chosen->weights.store, *args, threads); }

LOWRANK_API int lowrank_optim_lines(const LinesArgs* args, int threads) {
  const int64_t height = args->rows > 0 ? args->rows : 1, width = args->cols > 0 ? args->cols : 1;
  if (args->by_row) return run<LinesArgs>(chosen->weights.row_sums, *args, args->rows, width, limited(threads));
  // Strips that lie beside each other are read together: few threads get wide parts.
  const int64_t strips = pieces(args->cols, STRIP), part = pieces(strips, limited(threads));
  in_pieces(strips, part < 4 ? part : 4, args->cols * height <= ALONE ? 1 : limited(threads),
            [&](int64_t begin, int64_t end, int) { chosen->weights.column_sums(*args, begin, end); });
  return 0;
}

LOWRANK_API int lowrank_optim_gaussian(const GaussianArgs* args, int threads) {
  return run<GaussianArgs>(chosen->weights.gaussian, *args, pieces(args->numel, 2), 8, limited(threads));  // a pair costs what 8 others do
}

LOWRANK_API int lowrank_optim_sparse(const SparseArgs* args, int threads) {
  const Support& s = args->support;
  const SparseWidth& width = width_of(s.cols, args->tokens, 1 << 16);  // 256 KiB, read again for every row of S
  const int64_t tiles = pieces(args->tokens, width.tokens), floats = (whole(s.cols) + SIDE) * width.tokens;
  threads = args->tokens * (s.rows + s.cols) <= ALONE ? 1 : int(std::min<int64_t>(limited(threads), tiles));
  if (tiles == 0) return 0;
  const auto scratch = room_for(floats * threads);
  if (!scratch) return 1;
  const auto kernel = args->forward ? width.forward : width.backward_input;
  in_pieces(tiles, 1, threads, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t tile = begin; tile < end; ++tile) kernel(*args, tile, scratch.get() + worker * floats);
  });
  return 0;
}

LOWRANK_API int lowrank_optim_sampled(const SampledArgs* args, int threads) {
  const Support& s = args->support;
  const SparseWidth& width = width_of(s.cols, args->tokens, 3 << 16);  // 768 KiB: a sum over few tokens costs as much as over many
  const int64_t tiles = pieces(args->tokens, width.tokens), floats = whole(s.cols) * width.tokens;
  threads = args->tokens * (s.rows + s.cols) <= ALONE ? 1 : limited(threads);
  if (tiles == 0 || s.cols == 0) return 0;
  // One tile for each thread at a time: they turn them round together, then share the rows of S, so that each sum has one writer.
  const int64_t together = std::min<int64_t>(threads, tiles);
  const auto turned = room_for(floats * together);
  if (!turned) return 1;
  for (int64_t first = 0; first < tiles; first += together) {
    const int64_t count = std::min(together, tiles - first);
    in_pieces(count, 1, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t k = begin; k < end; ++k) width.turn(*args, first + k, turned.get() + k * floats);
    });
    in_pieces(pieces(s.rows, SIDE), 1, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t k = begin; k < end; ++k) width.sample(*args, k * SIDE, first, count, turned.get());
    });
  }
  return 0;
}
