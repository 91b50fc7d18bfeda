// How functors run: on a CUDA stream, or, compiled by a plain C++ compiler for the tests, in a loop.
#pragma once

#include "operations.h"

namespace lowrank {

#ifdef __CUDACC__

constexpr int THREADS = 256, WARP = 32;
constexpr int64_t MOST_BLOCKS = 1 << 16;  // more than a device runs at a time; threads go on to further units

// The lanes of a warp.
struct Lanes {
  int first;
  static constexpr int count = WARP;
  __device__ uint32_t max(uint32_t x) const { return reduced(x); }
  __device__ static uint32_t reduced(uint32_t x) { return __reduce_max_sync(0xFFFFFFFFu, x); }
};

template <class Op>
__global__ void __launch_bounds__(THREADS) over_elements(const __grid_constant__ Op op, const int64_t count) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * THREADS;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; i < count; i += step) op(i);
}

// Two blocks on a multiprocessor leave 128 registers for a thread; left alone, the compiler takes fewer for sm_90, and spills.
template <class Op>
__global__ void __launch_bounds__(THREADS, 2) over_segments(const __grid_constant__ Op op, const int64_t count) {
  const Lanes lanes{static_cast<int>(threadIdx.x) % WARP};
  const int64_t warps = THREADS / WARP, step = gridDim.x * warps;
  for (int64_t i = blockIdx.x * warps + threadIdx.x / WARP; i < count; i += step) op(lanes, i);
}

inline unsigned grid_of(int64_t units, int64_t per_block) {
  const int64_t blocks = (units + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < MOST_BLOCKS ? blocks : MOST_BLOCKS);
}

template <class Op>
int run_elements(const Op& op, int64_t count, void* stream) {
  static_assert(sizeof(Op) <= 4096, "a kernel's argument");
  if (count == 0) return 0;
  over_elements<<<grid_of(count, THREADS), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(op, count);
  return cudaGetLastError();
}

template <class Op>
int run_segments(const Op& op, int64_t count, void* stream) {
  static_assert(sizeof(Op) <= 4096, "a kernel's argument");
  if (count == 0) return 0;
  over_segments<<<grid_of(count, THREADS / WARP), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(op, count);
  return cudaGetLastError();
}

inline const char* error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

#else

// One host thread that does what a warp does.
struct Lanes {
  int first = 0;
  static constexpr int count = 1;
  uint32_t max(uint32_t x) const { return x; }
};

template <class Op>
int run_elements(const Op& op, int64_t count, void*) {
  for (int64_t i = 0; i < count; ++i) op(i);
  return 0;
}

template <class Op>
int run_segments(const Op& op, int64_t count, void*) {
  const Lanes lanes;
  for (int64_t i = 0; i < count; ++i) op(lanes, i);
  return 0;
}

inline const char* error_text(int) { return "no device"; }

#endif

}  // namespace lowrank
