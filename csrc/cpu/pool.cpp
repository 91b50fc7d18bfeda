#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace lowrank {
namespace {

struct Job {
  int64_t count, piece;
  Work work;
  void* context;
  std::atomic<int64_t> next{0};
  std::atomic<int> joined{0};

  void join() { run(joined.fetch_add(1, std::memory_order_relaxed)); }

  void run(int worker) {
    for (;;) {
      const int64_t begin = next.fetch_add(piece, std::memory_order_relaxed);
      if (begin >= count) return;
      work(context, begin, begin + piece < count ? begin + piece : count, worker);
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

const int fork_handler = pthread_atfork(nullptr, nullptr, [] {
  the_pool.store(nullptr);
  openmp.store(nullptr);  // its threads are gone, too, which it does not notice
});

}  // namespace

void parallel(int64_t count, int64_t piece, int threads, Work work, void* context) {
  const int64_t parts = (count + piece - 1) / piece;
  if (threads > parts) threads = static_cast<int>(parts);
  if (threads > 1) {
    Job job;
    job.count = count;
    job.piece = piece;
    job.work = work;
    job.context = context;
    if (const OpenMP runtime = openmp.load(std::memory_order_acquire)) {
      runtime([](void* data) { static_cast<Job*>(data)->join(); }, &job, static_cast<unsigned>(threads), 0);
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

void use_openmp(OpenMP runtime) { openmp.store(runtime, std::memory_order_release); }

}  // namespace lowrank
