// Threads that wait for work. A library of its own threads needs no OpenMP runtime beside the one in torch.
#pragma once

#include <cstdint>

namespace lowrank {

// The most threads of a call, the calling one among them.
constexpr int MAX_THREADS = 256;

// work(context, begin, end, worker) over [0, count) in pieces of `piece`, by at most `threads` threads, whose numbers are `worker`.
// The calling thread takes part, and does everything if the others are busy: with another call, or because this is a forked child.
typedef void (*Work)(void* context, int64_t begin, int64_t end, int worker);
void parallel(int64_t count, int64_t piece, int threads, Work work, void* context);

}  // namespace lowrank
