#include "pool.h"

#include <pthread.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <new>

namespace coppice {
namespace {

constexpr auto SPIN = std::chrono::microseconds(50);

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

std::atomic<int> current_pid{0};

int pid() {
  static const bool registered = [] {
    current_pid = getpid();
    pthread_atfork(nullptr, nullptr, [] { current_pid = getpid(); });
    return true;
  }();
  (void)registered;
  return current_pid.load(std::memory_order_relaxed);
}

}  // namespace

void Pool::Free::operator()(float* p) const { std::free(p); }

Pool::Pool(int threads) : scratch_(threads < 1 ? 1 : threads), owner_pid_(pid()) {
  for (int i = 1; i < this->threads(); ++i) workers_.emplace_back([this, i] { work(i); });
}

Pool::~Pool() {
  if (owner_pid_ != pid()) {  // in a fork's child the threads do not exist
    for (auto& worker : workers_) worker.detach();
    return;
  }
  {
    std::lock_guard<std::mutex> hold(sleep_);
    stop_ = true;
    epoch_.fetch_add(1);
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Pool::run(int64_t count, Task task, const void* context, int64_t scratch_bytes) {
  std::lock_guard<std::mutex> turn(callers_);
  run_held(count, task, context, scratch_bytes);
}

void Pool::hold() {
  callers_.lock();
  if (workers_.empty() || owner_pid_ != pid()) return;
  held_.store(true);
  wake_sleepers();
}

void Pool::release() {
  held_.store(false);
  callers_.unlock();
}

void Pool::nudge() {
  if (!workers_.empty() && owner_pid_ == pid()) wake_sleepers();
}

// Whoever sleeps finds the count changed, and stays awake while work comes or the pool is held.
void Pool::wake_sleepers() {
  epoch_.fetch_add(1);
  if (sleepers_.load() == 0) return;
  std::lock_guard<std::mutex> hold(sleep_);
  wake_.notify_all();
}

void Pool::run_held(int64_t count, Task task, const void* context, int64_t scratch_bytes) {
  const bool alone = count < 2 || workers_.empty() || owner_pid_ != pid();
  for (int i = 0; i < (alone ? 1 : threads()); ++i) {
    Scratch& s = scratch_[i];
    if (s.bytes >= scratch_bytes) continue;
    const int64_t bytes = (scratch_bytes + 4095) / 4096 * 4096;
    s.memory.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (!s.memory) throw std::bad_alloc();
    s.bytes = bytes;
  }
  task_ = task;
  context_ = context;
  count_ = count;
  next_.store(0, std::memory_order_relaxed);
  if (alone) return take_tasks(0);

  open_.store(true);
  wake_sleepers();
  take_tasks(0);
  // Close, then wait for those inside. A worker counts itself before it looks at open_, so
  // either it sees the run closed or we see it active.
  open_.store(false);
  for (int i = 0; active_.load() != 0; ++i) {
    pause();
    if (i > 2000) std::this_thread::yield();
  }
}

void Pool::take_tasks(int thread) {
  float* scratch = scratch_[thread].memory.get();
  for (;;) {
    const int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
    if (i >= count_) return;
    task_(context_, i, scratch);
  }
}

bool Pool::wait_for_work(uint64_t seen) {
  auto end = std::chrono::steady_clock::now() + SPIN;
  for (int turns = 0;; ++turns) {
    for (int i = 0; i < 64; ++i) {
      if (epoch_.load(std::memory_order_acquire) != seen) return !stop_;
      pause();
    }
    const auto now = std::chrono::steady_clock::now();
    if (held_.load(std::memory_order_relaxed)) {
      end = now + SPIN;
      if (turns > 100) std::this_thread::yield();  // a long task elsewhere: let others run
    } else if (now >= end) {
      break;
    }
  }
  std::unique_lock<std::mutex> hold(sleep_);
  sleepers_.fetch_add(1);
  wake_.wait(hold, [&] { return stop_ || epoch_.load() != seen; });  // `seen` may be the last
  sleepers_.fetch_sub(1);
  return !stop_;
}

void Pool::work(int thread) {
  uint64_t seen = 0;
  while (wait_for_work(seen)) {
    seen = epoch_.load();
    active_.fetch_add(1);
    if (open_.load()) take_tasks(thread);
    active_.fetch_sub(1);
  }
}

}  // namespace coppice
