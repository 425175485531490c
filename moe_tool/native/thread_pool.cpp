#include "thread_pool.h"

#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
static inline void pause_briefly() { _mm_pause(); }
#else
static inline void pause_briefly() { std::this_thread::yield(); }
#endif

namespace moe {
namespace {
// The next product of a layer follows within microseconds, the next layer within some hundred, and
// after misses within a few disk reads. A core that went to sleep meanwhile costs the next product
// as much time as it takes.
constexpr auto kSpin = std::chrono::milliseconds(20);
constexpr int kPausesPerLook = 64;
}  // namespace

void ThreadPool::resize(int n_threads) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
  stop_ = false;
  for (int i = 1; i < n_threads; ++i) workers_.emplace_back([this] { work(); });
}

void ThreadPool::parallel(int n_chunks, void (*run)(void*, int), void* context) {
  if (workers_.empty() || n_chunks < 2) {
    for (int chunk = 0; chunk < n_chunks; ++chunk) run(context, chunk);
    return;
  }
  n_chunks_ = n_chunks, run_ = run, context_ = context;
  next_ = 0, done_ = 0;
  ++generation_;  // open
  if (sleeping_.load() > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  take_chunks();
  while (done_.load() < n_chunks) pause_briefly();
  ++generation_;  // closed: whoever comes now leaves at once
  while (inside_.load() > 0) pause_briefly();
}

void ThreadPool::take_chunks() {
  for (int chunk; (chunk = next_.fetch_add(1)) < n_chunks_;) {
    run_(context_, chunk);
    done_.fetch_add(1);
  }
}

void ThreadPool::work() {
  uint32_t seen = 0;
  while (!stop_) {
    auto until = std::chrono::steady_clock::now() + kSpin;
    while (!stop_ && (generation_ % 2 == 0 || generation_ == seen)) {
      for (int i = 0; i < kPausesPerLook && (generation_ % 2 == 0 || generation_ == seen); ++i)
        pause_briefly();
      if (std::chrono::steady_clock::now() < until) continue;
      std::unique_lock<std::mutex> lock(mutex_);
      ++sleeping_;
      wake_.wait(lock, [&] { return stop_ || (generation_ % 2 == 1 && generation_ != seen); });
      --sleeping_;
    }
    if (stop_) return;
    const uint32_t open = generation_;
    ++inside_;
    if (open % 2 == 1 && generation_ == open) take_chunks();
    --inside_;
    if (open % 2 == 1) seen = open;
  }
}

}  // namespace moe
