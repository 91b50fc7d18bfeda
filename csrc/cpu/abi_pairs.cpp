// The functions of pairs that Python calls, as in abi.cpp.
#include <cstring>

#include "calls.h"

namespace lowrank {
namespace {

int64_t units_of(const TallArgs& t) { return pieces(t.size, TALL_UNIT); }

// The sums over the units of a matrix, in order, of what lies at `at` in their parts; `symmetric`: only above the diagonal.
template <class Number>
void reduce(const float* parts, int64_t units, int64_t stride, int64_t rank, bool symmetric, Number* out) {
  const int64_t padded = padded_rank(rank);
  for (int64_t i = 0; i < rank; ++i) {
    for (int64_t j = 0; j < rank; ++j) {
      const bool below = symmetric && i > j;
      const float* at = parts + (below ? j * padded + i : i * padded + j);
      double sum = 0.0;
      for (int64_t k = 0; k < units; ++k) sum += double(at[k * stride]);
      out[i * rank + j] = Number(sum);
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

// A step of LoRA-RITE for some factors, whole pairs, which stay in the caches between its passes.
class RiteStep {
 public:
  RiteStep(int64_t most, int64_t units, int64_t rank, int threads)
      : rite_(level_in_use().rite(rank)),
        rank_(rank),
        square_(rank * rank),
        stride_(2 * padded_rank(rank) * padded_rank(rank)),
        threads_(threads),
        floats_(std::max(tall_floats(rank), rite_floats(rank))),
        sums_(size_t(2 * most * square_)),
        small_(size_t(most * square_)),
        scratch_(room_for(floats_ * threads)),
        kept_(room_for(rite_kept_floats(rank) * pieces(most, rite_.matrices))),
        parts_(room_for(stride_ * units)),
        marks_(size_t(units)),
        stays_(size_t(most)) {}

  bool has_room() const { return scratch_ && kept_ && parts_; }

  void run(const RiteArgs* factors, int64_t count) {
    Units units;
    for (int64_t k = 0; k < count; ++k) units.add(units_of(factors[k].tall));
    each_unit(factors, units, [&](const RiteArgs& f, size_t k, int64_t unit, float* part, float* scratch) {
      const PairKernels& kernels = kernels_of(f);
      if (mark_of(f)) {
        marks_[size_t(units.first[k] + unit)] = kernels.mark(f.tall, f.weight, unit, scratch);
      } else {
        kernels.gram({f.tall, f.weight, f.weight, nullptr}, unit, part, scratch);
      }
      kernels.gram({f.tall, f.grad, f.grad, nullptr}, unit, part + stride_ / 2, scratch);
    });
    each_group(count, [&](int64_t at, int64_t first, int64_t last, float* scratch) {
      const bool known = knows(factors, units, first, last, scratch);
      for (int64_t k = first; k < last; ++k) {
        if (!known) sum(units, k, 0, true);
        sum(units, k, 1, true);
      }
      for (int64_t k = first; k < last; k += 2) see_gradients(factors, k);
      rite_.before(factors + first, int(last - first), known, sums_of(first), kept_of(at), small_of(first), scratch);
    });
    each_unit(factors, units, [&](const RiteArgs& f, size_t k, int64_t unit, float* part, float* scratch) {
      if (stays_[k]) return;
      uint64_t* marks = f.known ? marks_.data() + units.first[k] : nullptr;
      kernels_of(f).step({f.tall, f.weight, f.grad, f.momentum, small_of(int64_t(k)), f.share, f.alpha, f.keep, nullptr, nullptr, marks}, unit,
                         part, scratch);
    });
    each_group(count, [&](int64_t at, int64_t first, int64_t last, float* scratch) {
      RiteArgs moved[MOST_TOGETHER];
      for (int64_t k = first; k < last; ++k) {
        RiteArgs& f = moved[k - first] = factors[k];
        if (stays_[size_t(k)]) {  // no sums were taken
          f.moment = nullptr, f.known = nullptr;
          continue;
        }
        sum(units, k, 0, true);
        sum(units, k, 1, false);
        if (f.known) put_mark(f, marked(units, k));
      }
      rite_.after(moved, int(last - first), sums_of(first), kept_of(at), small_of(first), scratch);
    });
    each_unit(factors, units, [&](const RiteArgs& f, size_t k, int64_t unit, float* part, float* scratch) {
      if (!stays_[k]) kernels_of(f).turn({f.tall, f.momentum, small_of(int64_t(k))}, unit, part, scratch);
    });
  }

 private:
  const Level& level_ = level_in_use();
  const RiteKernels& rite_;
  int64_t rank_, square_, stride_;
  int threads_;
  int64_t floats_;
  std::vector<double> sums_;  // two matrices of each factor
  std::vector<float> small_;  // one of each
  Room scratch_, kept_, parts_;
  std::vector<uint64_t> marks_;  // of the units
  std::vector<char> stays_;      // whether a factor stays as it is

  static constexpr int MOST_TOGETHER = 8;  // factors whose small matrices are computed together

  const PairKernels& kernels_of(const RiteArgs& f) const { return level_.pairs(rank_, f.tall.wide); }
  double* sums_of(int64_t factor) { return sums_.data() + 2 * factor * square_; }
  float* small_of(int64_t factor) { return small_.data() + factor * square_; }
  float* kept_of(int64_t group) { return kept_.get() + group * rite_kept_floats(rank_); }

  // The mark that is known of a factor; 0 where there is none.
  uint64_t mark_of(const RiteArgs& f) const {
    uint64_t mark = 0;
    if (f.known) std::memcpy(&mark, reinterpret_cast<const char*>(f.known) + 8 * square_, 8);
    return mark;
  }

  void put_mark(const RiteArgs& f, uint64_t mark) const { std::memcpy(reinterpret_cast<char*>(f.known) + 8 * square_, &mark, 8); }

  uint64_t marked(const Units& units, int64_t k) const {
    uint64_t mark = 1;
    for (int64_t unit = units.first[size_t(k)]; unit < units.first[size_t(k) + 1]; ++unit) {
      mark = (mark ^ marks_[size_t(unit)]) * 0x9E3779B97F4A7C15u ^ mark >> 29;
    }
    return mark ? mark : 1;
  }

  // Whether the weights of all these factors are those of which something is known; else their XᵀX is found. Says who has changed.
  bool knows(const RiteArgs* factors, const Units& units, int64_t first, int64_t last, float* scratch) {
    bool all = true;
    for (int64_t k = first; k < last; ++k) {
      const uint64_t mark = mark_of(factors[k]);
      const bool same = mark && mark == marked(units, k);
      if (factors[k].known) factors[k].known[square_ + 1] = mark && !same ? 1.0 : 0.0;
      all = all && same;
    }
    for (int64_t k = first; !all && k < last; ++k) {
      if (!mark_of(factors[k])) continue;  // whose XᵀX is there
      const RiteArgs& f = factors[k];
      for (int64_t unit = 0; unit < units.first[size_t(k) + 1] - units.first[size_t(k)]; ++unit) {
        kernels_of(f).gram({f.tall, f.weight, f.weight, nullptr}, unit, parts_.get() + (units.first[size_t(k)] + unit) * stride_, scratch);
      }
    }
    return all;
  }

  // Whether the gradients of a pair, the factors k and k + 1, can be used.
  void see_gradients(const RiteArgs* factors, int64_t k) {
    bool finite = true;
    for (int64_t own = k; own < k + 2; ++own) {
      if (!factors[own].finite) continue;
      const double* squares = sums_of(own) + square_;
      double total = 0.0;
      for (int64_t i = 0; i < rank_; ++i) total += squares[i * (rank_ + 1)];
      const bool good = total <= double(__FLT_MAX__);  // NaN is not
      *factors[own].finite = good;
      finite = finite && good;
    }
    stays_[size_t(k)] = stays_[size_t(k + 1)] = !finite;
  }

  // The sums over the units of a factor of the first or second of their parts.
  void sum(const Units& units, int64_t k, int64_t which, bool symmetric) {
    const int64_t begin = units.first[size_t(k)], count = units.first[size_t(k) + 1] - begin;
    reduce(parts_.get() + begin * stride_ + which * (stride_ / 2), count, stride_, rank_, symmetric, sums_of(k) + which * square_);
  }

  // body(factor, its number, unit, part, scratch)
  template <class Body>
  void each_unit(const RiteArgs* factors, const Units& units, const Body& body) {
    in_pieces(units.count(), 1, threads_, [&](int64_t begin, int64_t end, int worker) {
      units.each(begin, end, [&](size_t k, int64_t from, int64_t to) {
        for (int64_t unit = from; unit < to; ++unit) {
          body(factors[k], k, unit, parts_.get() + (units.first[k] + unit) * stride_, scratch_.get() + worker * floats_);
        }
      });
    });
  }

  // body(number, first, last, scratch) for the factors whose small matrices are computed together
  template <class Body>
  void each_group(int64_t count, const Body& body) {
    const int64_t group = rite_.matrices;
    in_pieces(pieces(count, group), 1, threads_, [&](int64_t begin, int64_t end, int worker) {
      for (int64_t at = begin; at < end; ++at) body(at, at * group, std::min((at + 1) * group, count), scratch_.get() + worker * floats_);
    });
  }
};

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

// `count` factors of one rank, two and two of a pair, at once.
LOWRANK_API int lowrank_optim_rite_step(int64_t count, const RiteArgs* factors, int threads) {
  return guarded([&] {
    if (count == 0) return 0;
    const int64_t rank = factors->tall.rank;
    int64_t elements = 0;
    for (int64_t k = 0; k < count; ++k) elements += factors[k].tall.size * rank;
    threads = elements <= ALONE ? 1 : limited(threads);
    const int64_t together = std::min<int64_t>(count, int64_t(threads) * level_in_use().rite(rank).matrices);
    int64_t most = 0;  // units of factors that are stepped together
    for (int64_t first = 0; first < count; first += together) {
      int64_t units = 0;
      for (int64_t k = first; k < std::min(first + together, count); ++k) units += units_of(factors[k].tall);
      most = std::max(most, units);
    }
    RiteStep step(together, most, rank, threads);
    if (!step.has_room()) return 1;
    for (int64_t first = 0; first < count; first += together) step.run(factors + first, std::min(together, count - first));
    return 0;
  });
}
