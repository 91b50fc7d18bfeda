// inverse_power, for `eigen.h`. Compiled once for each instruction set, as the other kernels.
#include "eigen.h"
#include "ops.h"

namespace lowrank {
namespace {

void inverse_power(const InversePowerArgs& args, int64_t unit, float*, float* scratch) {
  const int n = int(args.rank);
  const int64_t first = unit * WIDE, size = args.rank * args.rank;
  const int count = smaller(WIDE, args.count - first);
  Doubles *k = reinterpret_cast<Doubles*>(scratch), *z = k + size, *out = z + size, *lines = out + size, shift = {};
  const auto from = [&](int lane) { return args.matrices + (first + lane) * size; };
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j <= i; ++j) {
      const Doubles x = (gathered(count, from, i * n + j) + gathered(count, from, j * n + i)) / 2.0;
      k[i * n + j] = k[j * n + i] = x;
    }
  }
  if (args.shift) {
    for (int lane = 0; lane < count; ++lane) shift[lane] = args.shift[first + lane];
  }
  power_of(n, {args.tolerance, args.added, args.root}, shift, k, z, lines, out);
  for (int lane = 0; lane < count; ++lane) {
    f64* to = args.out + (first + lane) * size;
    for (int64_t i = 0; i < size; ++i) to[i] = out[i][lane];
  }
}

}  // namespace

namespace LOWRANK_LEVEL {
extern const EigenKernels eigen_kernels = {WIDE, inverse_power};
}

}  // namespace lowrank
