#include "parallel.h"

#include <mutex>
#include <vector>

namespace coppice {
namespace {

// Never destroyed: threads may still be idling in it while the process exits.
std::shared_ptr<Pool>& pool_slot() {
  static auto* slot = new std::shared_ptr<Pool>(std::make_shared<Pool>(1));
  return *slot;
}
std::mutex pool_mutex;

thread_local std::vector<std::shared_ptr<Pool>> teams;  // this thread entered

std::shared_ptr<Pool> pool() {
  if (!teams.empty()) return teams.back();
  std::lock_guard<std::mutex> hold(pool_mutex);
  return pool_slot();
}

thread_local Pool* held = nullptr;  // by a region of this thread

}  // namespace

int num_threads() { return held ? held->threads() : pool()->threads(); }

void set_num_threads(int threads) {
  {
    std::lock_guard<std::mutex> hold(pool_mutex);
    if (pool_slot()->threads() == threads) return;
  }
  auto fresh = std::make_shared<Pool>(threads);
  std::lock_guard<std::mutex> hold(pool_mutex);
  pool_slot().swap(fresh);
}

void expect_work() {
  if (!held) pool()->nudge();
}

void Team::enter() const { teams.push_back(pool_); }

void Team::leave() { teams.pop_back(); }

Region::Region() : pool_(held ? nullptr : pool()) {
  if (!pool_) return;
  pool_->hold();
  held = pool_.get();
}

Region::~Region() {
  if (!pool_) return;
  held = nullptr;
  pool_->release();
}

void run_tasks(int64_t count, Pool::Task task, const void* context, int64_t scratch_bytes) {
  if (held) return held->run_held(count, task, context, scratch_bytes);
  pool()->run(count, task, context, scratch_bytes);
}

}  // namespace coppice
