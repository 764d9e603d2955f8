#include "driver.h"

#include <atomic>
#include <chrono>
#include <stdexcept>

#include "codes.h"
#include "parallel.h"
#include "quantized_table.h"
#include "tables.h"

namespace coppice {
namespace {

std::atomic<const Table*> chosen{runnable_tables().front()};

}  // namespace

std::vector<std::string> available() {
  std::vector<std::string> names;
  for (const Table* t : runnable_tables()) names.emplace_back(t->name);
  return names;
}

const Table* chosen_table() { return chosen.load(); }

void run_rows(int64_t rows, int64_t row_work, const std::function<void(int64_t row)>& f) {
  parallel_rows(rows, row_work, 0, [&](int64_t row, float*) { f(row); });
}

std::string isa() { return chosen.load()->name; }

void set_isa(const std::string& name) {
  for (const Table* t : runnable_tables()) {
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
  if (meets_codes(w)) return quantized_linear(w, x, rows, residual, out);
  LinearArgs a{w, x, residual, out, rows, {}};
  const int64_t panels = (w.n + 15) / 16, threads = num_threads();
  const bool few = rows <= t.few_rows && !is_quantized(w);
  const int64_t row_blocks = few ? 1 : (rows + t.row_block - 1) / t.row_block;
  a.shares = Shares::of(panels, threads, few ? panels : 16);
  if (few && rows * w.n * w.k < 1 << 16) a.shares = Shares::one(panels);
  parallel(a.shares.tasks() * row_blocks, t.linear_bytes,
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

void pack(const PackCodesArgs& a) {
  const int64_t first_panel = a.first / 16, last_panel = (a.first + a.count - 1) / 16;
  const int64_t groups = a.w.group ? a.w.k / a.w.group : 1;
  parallel(a.count > 0 ? last_panel - first_panel + 1 : 0, 0, [&](int64_t task, float*) {
    PackCodesArgs part = a;
    part.first = std::max(a.first, (first_panel + task) * 16);
    part.count = std::min(a.first + a.count, (first_panel + task + 1) * 16) - part.first;
    const int64_t skipped = part.first - a.first;
    part.codes = a.codes + skipped * a.w.k;
    part.scales = static_cast<const char*>(a.scales) + skipped * groups * (a.w.group ? 2 : 4);
    if (a.zeros) part.zeros = a.zeros + skipped * groups;
    pack_codes(part);
  });
}

void unpack(const Packed& w, float* out) {
  if (!is_quantized(w)) return chosen.load()->unpack(w, out);
  for (int64_t i = 0; i < w.n; ++i) unpack_codes(w, i, out + i * w.k);
}

void gather(const Packed& w, const int32_t* token, int64_t rows, float* out) {
  for (int64_t i = 0; i < rows; ++i)
    require(token[i] >= 0 && token[i] < w.n, "token id is outside the vocabulary");
  if (!is_quantized(w)) return chosen.load()->gather(w, token, rows, out);
  for (int64_t i = 0; i < rows; ++i) unpack_codes(w, token[i], out + i * w.k);
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

double probe_tasks(double operations, const std::function<void()>& task) {
  const int64_t tasks = num_threads() * 4;
  double best = 0;
  for (int i = 0; i < 3; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    parallel(tasks, 0, [&](int64_t, float*) { task(); });
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    best = std::max(best, operations * static_cast<double>(tasks) / took.count());
  }
  return best;
}

double fma_probe(int64_t rounds) {
  const Table& t = *chosen.load();
  volatile float sink = 0;
  const double operations = 2.0 * 16 * 12 * static_cast<double>(rounds);
  return probe_tasks(operations, [&] { sink = t.fma_probe(rounds); });
}

}  // namespace coppice
