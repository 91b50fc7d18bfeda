// Threads that wait for work: those of torch, if `use_openmp` has been told of its OpenMP runtime, else the library's own.
//
// After its own loops OpenMP's threads wait busily for a while, and would take the processors from any others.
#pragma once

#include <cstdint>

namespace lowrank {

// The most threads of a call, the calling one among them.
constexpr int MAX_THREADS = 256;

// work(context, begin, end, worker) over [0, count) in pieces of `piece`, by at most `threads` threads, whose numbers are `worker`.
// The calling thread takes part, and does everything if the others are busy: with another call, or because this is a forked child.
typedef void (*Work)(void* context, int64_t begin, int64_t end, int worker);
void parallel(int64_t count, int64_t piece, int threads, Work work, void* context);

// GOMP_parallel(function, data, threads, flags) and omp_get_thread_num() of an OpenMP runtime; null goes back to own threads.
typedef void (*OpenMP)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
typedef int (*Number)();
void use_openmp(OpenMP runtime, Number number);

}  // namespace lowrank
