#include "driver.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <stdexcept>

#include "pool.h"

namespace coppice {
namespace {

std::vector<const Table*> tables() {
  std::vector<const Table*> found;
#if defined(COPPICE_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if defined(COPPICE_AVX512)
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    found.push_back(avx512_table());
#endif
  if (avx2) found.push_back(avx2_table());
#if defined(COPPICE_WIDE)
  if (avx2) found.push_back(wide_table());
#endif
#endif
  found.push_back(portable_table());
  return found;
}

std::atomic<const Table*> chosen{tables().front()};

// Never destroyed: threads may still be idling in it while the process exits.
std::shared_ptr<Pool>& pool_slot() {
  static auto* slot = new std::shared_ptr<Pool>(std::make_shared<Pool>(1));
  return *slot;
}
std::mutex pool_mutex;

std::shared_ptr<Pool> pool() {
  std::lock_guard<std::mutex> hold(pool_mutex);
  return pool_slot();
}

// One task per call of f(task, scratch).
template <class F>
void parallel(int64_t count, int64_t scratch_bytes, const F& f) {
  pool()->run(
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

void require(bool fine, const char* message) {
  if (!fine) throw std::out_of_range(message);
}

// Every slot a row writes or reads must lie in a page the sequence owns.
void check_rows(const RowArrays& in, const Cache& cache) {
  for (int64_t i = 0; i < in.rows; ++i) {
    const int64_t sequence = in.sequence[i], slot = in.slot[i];
    require(sequence >= 0 && sequence < in.sequences, "row names a sequence that is not there");
    require(slot >= 0 && slot / cache.page_size < in.max_pages, "row's slot is beyond its pages");
    const int64_t page = in.page_table[sequence * in.max_pages + slot / cache.page_size];
    require(page >= 0 && page < cache.pages, "row's slot has no page");
    require(in.parent[i] < i, "row stands before its parent");
    require(in.parent[i] < 0 || in.sequence[in.parent[i]] == sequence,
            "row's parent is of another sequence");
  }
}

void check_prefix(const RowArrays& in, const Cache& cache) {
  for (int64_t s = 0; s < in.sequences; ++s) {
    const int64_t pages = (in.prefix_len[s] + cache.page_size - 1) / cache.page_size;
    require(in.prefix_len[s] >= 0 && pages <= in.max_pages, "prefix is longer than its pages");
    for (int64_t p = 0; p < pages; ++p) {
      const int64_t page = in.page_table[s * in.max_pages + p];
      require(page >= 0 && page < cache.pages, "prefix lacks a page");
    }
  }
}

}  // namespace

std::vector<std::string> available() {
  std::vector<std::string> names;
  for (const Table* t : tables()) names.emplace_back(t->name);
  return names;
}

const Table* chosen_table() { return chosen.load(); }

void run_rows(int64_t rows, int64_t row_work, const std::function<void(int64_t row)>& f) {
  parallel_rows(rows, row_work, 0, [&](int64_t row, float*) { f(row); });
}

std::string isa() { return chosen.load()->name; }

void set_isa(const std::string& name) {
  for (const Table* t : tables()) {
    if (name == t->name) {
      chosen = t;
      return;
    }
  }
  throw std::invalid_argument("this machine cannot run " + name);
}

int num_threads() { return pool()->threads(); }

void set_num_threads(int threads) {
  auto fresh = std::make_shared<Pool>(threads);
  std::lock_guard<std::mutex> hold(pool_mutex);
  pool_slot().swap(fresh);
}

void linear(const Packed& w, const float* x, int64_t rows, const float* residual, float* out) {
  const Table& t = *chosen.load();
  if (rows == 0) return;
  LinearArgs a{w, x, residual, out, rows, 0, 0};
  const int64_t panels = (w.n + 15) / 16, threads = num_threads();
  const bool few = rows <= t.few_rows;
  const int64_t row_blocks = few ? 1 : (rows + t.row_block - 1) / t.row_block;
  // About six tasks a thread: fine enough to end together, coarse enough to be cheap.
  const int64_t target = std::max<int64_t>(1, panels * row_blocks / (6 * threads));
  const int64_t quantum = few ? 4 : 2, most = few ? 64 : 16;
  a.panels_per_task = std::min(most, (target + quantum - 1) / quantum * quantum);
  if (rows * w.n * w.k < 1 << 16) a.panels_per_task = few ? panels : most;
  a.panel_groups = (panels + a.panels_per_task - 1) / a.panels_per_task;
  parallel(a.panel_groups * row_blocks, t.linear_bytes,
           [&](int64_t task, float* scratch) { t.linear(a, task, scratch); });
}

void pack(const PackArgs& a) {
  const Table& t = *chosen.load();
  const int64_t first_panel = a.first / 16, last_panel = (a.first + a.count - 1) / 16;
  const int64_t row_bytes = a.w.k * (a.source_bf16 ? 2 : 4);
  parallel(a.count > 0 ? last_panel - first_panel + 1 : 0, 0, [&](int64_t task, float*) {
    PackArgs part = a;
    part.first = std::max(a.first, (first_panel + task) * 16);
    part.count = std::min(a.first + a.count, (first_panel + task + 1) * 16) - part.first;
    part.source = static_cast<const char*>(a.source) + (part.first - a.first) * row_bytes;
    t.pack(part);
  });
}

void unpack(const Packed& w, float* out) { chosen.load()->unpack(w, out); }

void gather(const Packed& w, const int32_t* token, int64_t rows, float* out) {
  for (int64_t i = 0; i < rows; ++i)
    require(token[i] >= 0 && token[i] < w.n, "token id is outside the vocabulary");
  chosen.load()->gather(w, token, rows, out);
}

void norm(const NormArgs& a) {
  const Table& t = *chosen.load();
  parallel_rows(a.rows, a.n, 0, [&](int64_t row, float*) { t.norm(a, row); });
}

void gate(const GateArgs& a) {
  const Table& t = *chosen.load();
  const int64_t span = 2048, spans = (a.n + span - 1) / span;
  parallel_rows(a.rows * spans, 4 * std::min(a.n, span), 0, [&](int64_t i, float*) {
    const int64_t begin = i % spans * span;
    t.gate(a, i / spans, begin, std::min(a.n, begin + span));
  });
}

void rope(const RopeArgs& a, int64_t max_position) {
  const Table& t = *chosen.load();
  check_rows(a.in, a.cache);
  for (int64_t i = 0; i < a.in.rows && a.half > 0; ++i)
    require(a.in.position[i] >= 0 && a.in.position[i] < max_position,
            "position is beyond the rotary table");
  const int64_t width = (a.heads + 2 * a.cache.kv_heads) * a.cache.head_dim;
  parallel_rows(a.in.rows, width, a.cache.kv_heads * a.cache.head_dim * 4,
                [&](int64_t row, float* scratch) { t.rope(a, row, scratch); });
}

void attention(AttentionArgs a) {
  const Table& t = *chosen.load();
  const RowArrays& in = a.in;
  if (in.rows == 0) return;
  check_rows(in, a.cache);
  check_prefix(in, a.cache);
  std::vector<int32_t> index(in.rows);
  std::vector<char> plain(in.rows);  // slot == logical index for the row and its ancestors
  std::vector<Tile> tiles;
  const int64_t group = a.heads / a.cache.kv_heads;
  const int64_t most = std::max<int64_t>(1, TILE_QUERIES / group);
  for (int64_t i = 0; i < in.rows; ++i) {
    const int32_t parent = in.parent[i], prefix = in.prefix_len[in.sequence[i]];
    index[i] = parent < 0 ? prefix : index[parent] + 1;
    plain[i] = in.slot[i] == index[i] && (parent < 0 || plain[parent]);
    if (!tiles.empty()) {
      Tile& tile = tiles.back();
      if (in.sequence[i] == in.sequence[tile.first] && tile.count < most) {
        ++tile.count;
        tile.chain = tile.chain && plain[i] && parent == i - 1;
        continue;
      }
    }
    tiles.push_back({static_cast<int32_t>(i), 1, prefix, plain[i] != 0});
  }
  a.index = index.data();
  a.tiles = tiles.data();
  a.num_tiles = static_cast<int64_t>(tiles.size());
  const int64_t splits = (group + TILE_QUERIES - 1) / TILE_QUERIES;
  parallel(a.num_tiles * a.cache.kv_heads * splits, t.attention_bytes(a),
           [&](int64_t task, float* scratch) { t.attention(a, task, scratch); });
}

double read_probe(const float* memory, int64_t count, int rounds) {
  const Table& t = *chosen.load();
  const int64_t piece = 1 << 18;  // floats: 1 MiB
  volatile float sink = 0;
  double best = 0;
  for (int i = 0; i < rounds; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    parallel(count / piece, 0, [&](int64_t task, float*) {
      sink = t.read_probe(memory + task * piece, piece);
    });
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    best = std::max(best, static_cast<double>(count / piece * piece) * 4 / took.count());
  }
  return best;
}

double fma_probe(int64_t rounds) {
  const Table& t = *chosen.load();
  const int64_t threads = num_threads();
  volatile float sink = 0;
  double best = 0;
  for (int i = 0; i < 3; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    parallel(threads * 4, 0, [&](int64_t, float*) { sink = t.fma_probe(rounds); });
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    const double flops = 2.0 * 16 * 12 * static_cast<double>(rounds * threads * 4);
    best = std::max(best, flops / took.count());
  }
  return best;
}

}  // namespace coppice
