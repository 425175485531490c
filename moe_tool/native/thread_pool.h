// Threads that share out the chunks of one job at a time. A chunk's result does not depend on the
// thread that computes it, so neither does the job's.
#pragma once
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace moe {

class ThreadPool {
 public:
  ~ThreadPool() { resize(1); }

  // Threads in all, the caller's included. Not while a job runs.
  void resize(int n_threads);
  int n_threads() const { return int(workers_.size()) + 1; }

  // Call run(context, chunk) for every chunk in [0, n_chunks); returns when all are done.
  void parallel(int n_chunks, void (*run)(void*, int), void* context);

  template <class F>
  void each(int n_chunks, F&& body) {
    parallel(n_chunks, [](void* f, int chunk) { (*static_cast<F*>(f))(chunk); }, &body);
  }

 private:
  void work();
  void take_chunks();

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint32_t> generation_{0};  // odd while a job takes workers
  std::atomic<int> inside_{0}, sleeping_{0}, next_{0}, done_{0};
  std::atomic<bool> stop_{false};
  int n_chunks_ = 0;
  void (*run_)(void*, int) = nullptr;
  void* context_ = nullptr;
};

}  // namespace moe
