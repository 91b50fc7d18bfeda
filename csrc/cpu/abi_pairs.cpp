// The functions of pairs that Python calls, as in abi.cpp.
#include "calls.h"

namespace lowrank {
namespace {

int64_t units_of(const TallArgs& t) { return pieces(t.size, TALL_UNIT); }

// The sums over the units of a matrix, in order, of what lies at `at` in their parts; `symmetric`: only above the diagonal.
void reduce(const float* parts, int64_t units, int64_t stride, int64_t rank, bool symmetric, f32* out) {
  const int64_t padded = padded_rank(rank);
  for (int64_t i = 0; i < rank; ++i) {
    for (int64_t j = 0; j < rank; ++j) {
      const bool below = symmetric && i > j;
      const float* at = parts + (below ? j * padded + i : i * padded + j);
      double sum = 0.0;
      for (int64_t k = 0; k < units; ++k) sum += double(at[k * stride]);
      out[i * rank + j] = float(sum);
    }
  }
}

// Kernels over the units of tall matrices of one rank; `squares` sums of each are reduced by finish(args, parts, units).
template <class Args, class Kernel, class Finish>
int run_tall(int64_t count, const Args* calls, int threads, int64_t squares, const Kernel& kernel, const Finish& finish) {
  return guarded([&] {
    if (count == 0) return 0;
    Units units;
    int64_t elements = 0, rank = 0;
    for (int64_t k = 0; k < count; ++k) {
      units.add(units_of(calls[k].tall));
      elements += calls[k].tall.size * calls[k].tall.rank;
      rank = std::max(rank, calls[k].tall.rank);
    }
    threads = elements <= ALONE ? 1 : limited(threads);
    const int64_t floats = tall_floats(rank), part = squares * padded_rank(rank) * padded_rank(rank);
    const auto scratch = room_for(floats * threads);
    const auto parts = room_for(std::max<int64_t>(part * units.count(), 16));
    if (!scratch || !parts) return 1;
    in_pieces(units.count(), 1, threads, [&](int64_t begin, int64_t end, int worker) {
      units.each(begin, end, [&](size_t k, int64_t from, int64_t to) {
        const PairKernels& kernels = level_in_use().pairs(calls[k].tall.rank, calls[k].tall.wide);
        for (int64_t unit = from; unit < to; ++unit) {
          kernel(kernels)(calls[k], unit, parts.get() + (units.first[k] + unit) * part, scratch.get() + worker * floats);
        }
      });
    });
    for (int64_t k = 0; k < count; ++k) finish(calls[k], parts.get() + units.first[size_t(k)] * part, units_of(calls[k].tall), part);
    return 0;
  });
}

}  // namespace
}  // namespace lowrank

using namespace lowrank;

// `count` matrices of one rank at once, each function.
LOWRANK_API int lowrank_optim_thin_grams(int64_t count, const GramArgs* calls, int threads) {
  return run_tall(count, calls, threads, 1, [](const PairKernels& kernels) { return kernels.gram; },
                  [](const GramArgs& args, const float* parts, int64_t units, int64_t stride) {
                    reduce(parts, units, stride, args.tall.rank, args.left == args.right, args.out);
                  });
}

LOWRANK_API int lowrank_optim_pair_step(int64_t count, const PairStepArgs* calls, int threads) {
  return run_tall(count, calls, threads, 2, [](const PairKernels& kernels) { return kernels.step; },
                  [](const PairStepArgs& args, const float* parts, int64_t units, int64_t stride) {
                    reduce(parts, units, stride, args.tall.rank, true, args.after);
                    reduce(parts + stride / 2, units, stride, args.tall.rank, false, args.cross);
                  });
}

LOWRANK_API int lowrank_optim_thin_turn(int64_t count, const TurnArgs* calls, int threads) {
  return run_tall(count, calls, threads, 0, [](const PairKernels& kernels) { return kernels.turn; },
                  [](const TurnArgs&, const float*, int64_t, int64_t) {});
}

LOWRANK_API int lowrank_optim_inverse_power(const InversePowerArgs* args, int threads) {
  const EigenKernels& kernels = level_in_use().eigen;
  const int64_t units = pieces(args->count, kernels.matrices), floats = eigen_floats(args->rank);
  threads = units < 4 ? 1 : limited(threads);
  const auto scratch = room_for(floats * threads);
  if (!scratch) return 1;
  in_pieces(units, 1, threads, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t unit = begin; unit < end; ++unit) kernels.inverse_power(*args, unit, nullptr, scratch.get() + worker * floats);
  });
  return 0;
}
