#include "driver.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>

#include "parallel.h"

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

void rope(const RopeArgs& a) {
  const Table& t = *chosen.load();
  const int64_t width = (a.heads + 2 * a.cache.kv_heads) * a.cache.head_dim;
  // A row's keys before they are written, and one head of them in the pages' type.
  const int64_t scratch_bytes = ((a.cache.kv_heads + 1) * a.cache.head_dim + 16) * 4;
  parallel_rows(a.in.rows, width, scratch_bytes,
                [&](int64_t row, float* scratch) { t.rope(a, row, scratch); });
}

void attention(AttentionArgs a, const Tiles& tiles) {
  const Table& t = *chosen.load();
  a.index = tiles.index.data();
  a.tiles = tiles.tiles.data();
  a.num_tiles = static_cast<int64_t>(tiles.tiles.size());
  if (a.num_tiles == 0) return;
  const int64_t group = a.heads / a.cache.kv_heads;
  const int64_t splits = (group + TILE_QUERIES - 1) / TILE_QUERIES;
  const int64_t parts = a.num_tiles * a.cache.kv_heads * splits, threads = num_threads();
  const int64_t longest = *std::max_element(tiles.index.begin(), tiles.index.end());
  const int64_t spans = longest / KEY_SPAN + 1, rounds = (parts + threads - 1) / threads;
  // A span of keys a task, where tasks of whole contexts would leave threads idle.
  std::vector<float> records;
  if (spans > 1 && 5 * parts < 4 * rounds * threads) {
    a.spans = spans;
    const int64_t most = std::max<int64_t>(1, TILE_QUERIES / group);  // rows of a tile
    a.record = t.record_floats(a, std::min(a.in.rows, most) * std::min(group, TILE_QUERIES));
    records.resize(parts * spans * a.record);
    a.records = records.data();
  }
  parallel(parts * a.spans, t.attention_bytes(a),
           [&](int64_t task, float* scratch) { t.attention(a, task, scratch); });
  if (a.records)
    parallel(parts, t.attention_bytes(a),
             [&](int64_t task, float* scratch) { t.merge_spans(a, task, scratch); });
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
