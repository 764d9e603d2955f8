// Quantized linear layers: rows to codes, then tasks over panels.

#include <cstdlib>
#include <new>

#include "driver.h"
#include "parallel.h"
#include "quantized_table.h"

namespace coppice {
namespace {

// Rows whose codes are held at a time; they stay in the last cache together.
constexpr int64_t MOST_ROWS = 512;

// Memory of the calling thread, kept for the next layer.
struct Room {
  char* memory = nullptr;
  int64_t bytes = 0;

  ~Room() { std::free(memory); }
  char* of(int64_t wanted) {
    if (wanted > bytes) {
      std::free(memory);
      bytes = (wanted + 4095) / 4096 * 4096;
      memory = static_cast<char*>(std::aligned_alloc(64, bytes));
      if (!memory) {
        bytes = 0;
        throw std::bad_alloc();
      }
    }
    return memory;
  }
};

thread_local Room room;

CodeRows room_for(const Packed& w, int64_t rows, int64_t code_bytes) {
  CodeRows to;
  const int64_t k = held_inputs(w);
  to.group = w.group ? w.group : CHANNEL_GROUP;
  to.groups = k / to.group;
  to.stride = (k * code_bytes + 63) / 64 * 64 + 64;  // off powers of two
  char* memory = room.of(rows * (to.stride + 8 * to.groups));
  to.codes = reinterpret_cast<int8_t*>(memory);
  to.scale = reinterpret_cast<float*>(memory + rows * to.stride);
  to.sum = reinterpret_cast<int32_t*>(to.scale + rows * to.groups);
  return to;
}

void multiply(const QuantizedTable& t, CodesArgs a) {
  const int64_t panels = (a.w.n + 15) / 16;
  a.row_blocks = (a.rows + t.row_block - 1) / t.row_block;
  // Several blocks of rows find the panels of a share in cache.
  a.shares = Shares::of(panels, num_threads(), a.row_blocks > 1 ? 64 : panels);
  if (a.rows * a.w.n * a.w.k < 1 << 17) a.shares = Shares::one(panels);
  parallel(a.shares.tasks() * a.row_blocks, 0, [&](int64_t task, float*) { t.multiply(a, task); });
}

}  // namespace

void quantized_linear(const Packed& w, const float* x, int64_t rows, const float* residual,
                      float* out) {
  const QuantizedTable& t = *chosen_table()->quantized;
  const CodeRows codes = room_for(w, std::min(rows, MOST_ROWS), t.code_stride);
  for (int64_t row = 0; row < rows; row += MOST_ROWS) {
    const int64_t now = std::min(MOST_ROWS, rows - row);
    const QuantizeArgs quantize{x + row * w.k, w.k, codes};
    parallel_rows(now, w.k, 0, [&](int64_t r, float*) { t.quantize(quantize, r); });
    multiply(t, {w, codes, residual ? residual + row * w.n : nullptr, out + row * w.n, now, 0, {}});
  }
}

double int8_probe(int64_t rounds) {
  const QuantizedTable& t = *chosen_table()->quantized;
  volatile int32_t sink = 0;
  const double operations = 2.0 * 16 * 4 * 96 * static_cast<double>(rounds);
  return probe_tasks(operations, [&] { sink = t.int8_probe(rounds); });
}

}  // namespace coppice
