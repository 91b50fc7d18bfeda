// How calls are run: the instruction set, the cutting of work, room. Shared by the files of exported functions.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "ops.h"
#include "pool.h"

#define LOWRANK_API extern "C" __attribute__((visibility("default")))

namespace lowrank {

struct Level {
  const char* name;
  const AdamKernels& adam;
  const CodeKernels& codes;
  const WeightKernels& weights;
  const SparseKernels& sparse;
  const PairKernelsFor& pairs;
  const EigenKernels& eigen;
  const RiteKernelsFor& rite;
};

// The instruction set in use.
const Level& level_in_use();

namespace {

constexpr int64_t ALONE = 1 << 15;  // elements that are not worth a second thread

// 1 where there is no memory.
template <class Body>
int guarded(const Body& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

inline int limited(int threads) { return threads < 1 ? 1 : threads > MAX_THREADS ? MAX_THREADS : threads; }

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

typedef std::unique_ptr<float, decltype(&std::free)> Room;

// Room that begins with a cache line; null where there is no memory.
inline Room room_for(int64_t floats) { return Room(static_cast<float*>(std::aligned_alloc(64, size_t(floats) * sizeof(float))), &std::free); }

}  // namespace
}  // namespace lowrank
