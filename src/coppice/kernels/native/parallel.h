// Work in numbered tasks over the process's pool of threads, or over a team of the caller's own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "pool.h"

namespace coppice {

int num_threads();
void set_num_threads(int threads);
void expect_work();  // threads that sleep wake up and look out for it

// Threads apart from the process's own. Operators of a thread run on the team it entered last
// and has not left; those of several threads in one team take turns.
class Team {
 public:
  explicit Team(int threads) : pool_(std::make_shared<Pool>(threads)) {}
  void enter() const;
  static void leave();

 private:
  std::shared_ptr<Pool> pool_;
};

// While one lives, its thread's operators follow each other without waking anybody: the pool
// is theirs, and its threads watch for the next one instead of falling asleep.
class Region {
 public:
  Region();
  ~Region();
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

 private:
  std::shared_ptr<Pool> pool_;  // null inside another region
};

void run_tasks(int64_t count, Pool::Task task, const void* context, int64_t scratch_bytes);

// One task per call of f(task, scratch).
template <class F>
void parallel(int64_t count, int64_t scratch_bytes, const F& f) {
  run_tasks(
      count,
      [](const void* context, int64_t task, float* scratch) {
        (*static_cast<const F*>(context))(task, scratch);
      },
      &f, scratch_bytes);
}

// Rows in runs of about `work` elements, so that small batches stay on one thread.
template <class F>
void parallel_rows(int64_t rows, int64_t row_work, int64_t scratch_bytes, const F& f) {
  const int64_t work = 16384;
  const int64_t run = std::max<int64_t>(1, work / std::max<int64_t>(1, row_work));
  parallel((rows + run - 1) / run, scratch_bytes, [&](int64_t task, float* scratch) {
    const int64_t end = std::min(rows, (task + 1) * run);
    for (int64_t row = task * run; row < end; ++row) f(row, scratch);
  });
}

}  // namespace coppice
