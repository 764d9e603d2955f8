// A pool of threads for kernels.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace coppice {

// Runs numbered tasks on a fixed set of threads, the caller's among them.
//
// Tasks are handed out one by one, so a thread that is slow or descheduled delays nothing
// but its own task. Idle threads watch for work for a few tens of microseconds (operators
// follow each other closely within a step), then sleep; while a caller holds the pool they
// keep watching. One run at a time; concurrent callers wait their turn. After a fork the
// child runs everything on its calling thread.
class Pool {
 public:
  using Task = void (*)(const void* context, int64_t task, float* scratch);

  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(scratch_.size()); }

  // Calls task(context, i, scratch) for each i below count, with scratch_bytes of 64-byte
  // aligned memory per thread, and returns when all have returned.
  void run(int64_t count, Task task, const void* context, int64_t scratch_bytes);

  // Keep the turn for a series of run_held, and the threads awake; until release.
  void hold();
  void run_held(int64_t count, Task task, const void* context, int64_t scratch_bytes);
  void release();

  // Something to run follows shortly: whoever sleeps shall look out for it.
  void nudge();

 private:
  struct Free {
    void operator()(float* p) const;
  };
  struct Scratch {
    std::unique_ptr<float, Free> memory;
    int64_t bytes = 0;
  };

  void work(int thread);
  void take_tasks(int thread);
  bool wait_for_work(uint64_t seen);
  void wake_sleepers();

  std::vector<Scratch> scratch_;  // [threads]; 0 is the caller's
  std::vector<std::thread> workers_;
  std::mutex callers_;

  // A run: written before `open_` is set, read by workers that counted themselves active.
  Task task_ = nullptr;
  const void* context_ = nullptr;
  int64_t count_ = 0;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint64_t> epoch_{0};
  std::atomic<bool> open_{false};
  std::atomic<int> active_{0};
  std::atomic<bool> held_{false};

  std::mutex sleep_;
  std::condition_variable wake_;
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  int owner_pid_;
};

}  // namespace coppice
