// What the instruction-set builds offer for quantized weights.
//
// Layouts, P = ceil(n / 16) panels of sixteen output features:
//   int8 codes   [P][k / 4][16][4]
//   int4 codes   [P][k / 8][16][4], low nibbles inputs 0 to 3, high nibbles 4 to 7, unsigned:
//                without zero points 8 is added
//   scales       float16 [P][k / group][16], or float32 [P][16] for one per output feature
//   zero points  uint8 [P][k / group][16]
// Without groups k is filled up with zero codes to a multiple of 64.
#pragma once

#include "kernels.h"

namespace coppice {

constexpr int64_t CHANNEL_GROUP = 64;  // inputs per activation scale where k has one group

// Rows of a batch as int8 codes; the order of bytes is the instruction set's own.
struct CodeRows {
  int8_t* codes;      // [rows][stride]
  float* scale;       // [rows][groups], NaN where a group holds a NaN or an infinity
  int32_t* sum;       // [rows][groups] of codes
  int64_t stride, groups, group;
};

struct QuantizeArgs {
  const float* x;  // [rows, k]
  int64_t k;
  CodeRows to;
};

struct CodesArgs {
  Packed w;
  CodeRows x;
  const float* residual;  // [rows, n] or null
  float* out;             // [rows, n]
  int64_t rows;
  int64_t row_blocks;  // task = share * row_blocks + row block
  Shares shares;
};

struct QuantizedTable {
  int64_t row_block;    // rows of a task, at most
  int64_t code_stride;  // bytes per input of a row
  void (*quantize)(const QuantizeArgs&, int64_t row);
  void (*multiply)(const CodesArgs&, int64_t task);
  int32_t (*int8_probe)(int64_t rounds);  // 2 * 16 * 4 * 96 * rounds operations
};

// Functions here are static: of an inline one the linker keeps a single copy, perhaps one
// compiled for a newer machine.
static inline bool is_quantized(const Packed& w) { return w.format >= STORE_INT8; }
// Whether rows are made int8 too.
static inline bool meets_codes(const Packed& w) {
  return w.format == STORE_INT8 || w.format == STORE_INT4;
}
static inline bool is_int4(const Packed& w) {
  return w.format == STORE_INT4 || w.format == STORE_INT4_FLOAT;
}
// Inputs held per output feature, those filled up included.
static inline int64_t held_inputs(const Packed& w) {
  return w.group ? w.k : (w.k + CHANNEL_GROUP - 1) / CHANNEL_GROUP * CHANNEL_GROUP;
}
static inline int64_t panel_bytes(const Packed& w) {
  if (is_quantized(w)) return held_inputs(w) * (is_int4(w) ? 8 : 16);
  return w.k * 16 * (w.format == STORE_BF16 ? 2 : 4);
}

// Output features first .. first + count (or fewer, at the end) of any weight; `first` is a
// multiple of sixteen.
static inline Packed output_features(const Packed& w, int64_t first, int64_t count) {
  Packed part = w;
  const int64_t groups = w.group ? w.k / w.group : 1, scale_bytes = w.group ? 2 : 4;
  part.data = static_cast<const char*>(w.data) + first / 16 * panel_bytes(w);
  if (w.scales) part.scales = static_cast<const char*>(w.scales) + first * groups * scale_bytes;
  if (w.zeros) part.zeros = static_cast<const char*>(w.zeros) + first * groups;
  if (w.bias) part.bias = w.bias + first;
  part.n = count < w.n - first ? count : w.n - first;
  return part;
}

}  // namespace coppice
