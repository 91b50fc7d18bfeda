#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace lowrank {
namespace {

// A worker does its own share of the work first, the same one in every call, so that it finds in its caches what it had there; then
// what others have left.
struct Job {
  struct alignas(64) Share {  // a cache line, which nobody else writes to
    std::atomic<int64_t> next;
    int64_t end;
  };

  int64_t piece;
  int workers;
  Work work;
  void* context;
  Share shares[MAX_THREADS];

  Job(int64_t count, int64_t piece, int workers, Work work, void* context)
      : piece(piece), workers(workers), work(work), context(context) {
    const int64_t parts = (count + piece - 1) / piece, each = parts / workers, more = parts % workers;
    int64_t next = 0;
    for (int k = 0; k < workers; ++k) {
      const int64_t end = next + (each + (k < more)) * piece;
      shares[k].next.store(next, std::memory_order_relaxed);
      shares[k].end = end < count ? end : count;
      next = end;
    }
  }

  void run(int worker) {
    for (int k = 0; k < workers; ++k) {
      Share& share = shares[(worker + k) % workers];
      for (;;) {
        const int64_t begin = share.next.fetch_add(piece, std::memory_order_relaxed);
        if (begin >= share.end) break;
        work(context, begin, begin + piece < share.end ? begin + piece : share.end, worker);
      }
    }
  }
};

class Pool {
 public:
  std::mutex busy;  // held through a call; who cannot have it works alone

  void run(Job& job, int helpers) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      hire(helpers);
      job_ = &job;
      places_ = helpers < hired_ ? helpers : hired_;
      joined_ = 0;
    }
    wake_.notify_all();
    job.run(0);
    // A helper that has not come by now finds nothing left to do: wait for those that have.
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;
    places_ = 0;
    done_.wait(lock, [this] { return working_ == 0; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int places_ = 0, joined_ = 0, working_ = 0, hired_ = 0;

  void hire(int wanted) {
    for (; hired_ < wanted; ++hired_) {
      try {
        std::thread(&Pool::serve, this).detach();
      } catch (const std::system_error&) {
        return;  // no more threads to be had: those that are there do the work
      }
    }
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return job_ && places_ > 0; });
      Job* job = job_;
      --places_;
      ++working_;
      const int worker = ++joined_;
      lock.unlock();
      job->run(worker);
      lock.lock();
      if (--working_ == 0) done_.notify_one();
    }
  }
};

// Never destroyed: its threads outlive the destructors of the process. A forked child has none of them, and starts anew.
std::atomic<Pool*> the_pool{nullptr};

Pool* pool() {
  Pool* there = the_pool.load(std::memory_order_acquire);
  if (there) return there;
  Pool* fresh = new Pool;
  if (the_pool.compare_exchange_strong(there, fresh, std::memory_order_acq_rel)) return fresh;
  delete fresh;
  return there;
}

std::atomic<OpenMP> openmp{nullptr};
std::atomic<Number> number_of_thread{nullptr};

const int fork_handler = pthread_atfork(nullptr, nullptr, [] {
  the_pool.store(nullptr);
  openmp.store(nullptr);  // its threads are gone, too, which it does not notice
});

}  // namespace

void parallel(int64_t count, int64_t piece, int threads, Work work, void* context) {
  const int64_t parts = (count + piece - 1) / piece;
  if (threads > parts) threads = static_cast<int>(parts);
  if (threads > 1) {
    Job job(count, piece, threads, work, context);
    if (const OpenMP runtime = openmp.load(std::memory_order_acquire)) {
      runtime([](void* data) { static_cast<Job*>(data)->run(number_of_thread.load(std::memory_order_relaxed)()); }, &job, static_cast<unsigned>(threads), 0);
      return;
    }
    Pool* shared = pool();
    std::unique_lock<std::mutex> mine(shared->busy, std::try_to_lock);
    if (mine.owns_lock()) {
      shared->run(job, threads - 1);
      return;
    }
  }
  if (count > 0) work(context, 0, count, 0);
}

void use_openmp(OpenMP runtime, Number number) {
  number_of_thread.store(number, std::memory_order_relaxed);
  openmp.store(runtime, std::memory_order_release);
}

}  // namespace lowrank
