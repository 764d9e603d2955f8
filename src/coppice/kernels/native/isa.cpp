// Compiled once per instruction set, with COPPICE_ISA and the compiler flags to match.

#include "attention.h"
#include "elementwise.h"
#include "linear.h"
#include "sampler_lanes.h"

namespace coppice {
namespace COPPICE_ISA {

extern const QuantizedTable quantized_table;  // isa_quantized.cpp

// Four streams side by side, as memory controllers like it best.
static float read_probe(const float* p, int64_t count) {
  const int64_t quarter = count / 64 * 16;
  V16 acc[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
  for (int64_t i = 0; i < quarter; i += 16)
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) acc[u] = acc[u] + load16(p + u * quarter + i);
  return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

static float fma_probe(int64_t rounds) {
  constexpr int CHAINS = W == 4 ? 3 : W == 8 ? 6 : 12;
  V16 acc[CHAINS];
  for (int c = 0; c < CHAINS; ++c) acc[c] = splat((float)c);
  const V16 a = splat(0.999f), b = splat(0.001f);
  for (int64_t i = 0; i < rounds * (12 / CHAINS); ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < CHAINS; ++c) acc[c] = fma(acc[c], a, b);
  }
  V16 total = acc[0];
  for (int c = 1; c < CHAINS; ++c) total = total + acc[c];
  return sum(total);
}

static const Table table = {
    COPPICE_ISA_NAME, W,    FEW_ROWS, ROW_BLOCK, LINEAR_FLOATS * 4, attention_bytes,
    linear,           pack, unpack, gather,  norm,              gate,
    rope,             attention, merge_spans, record_floats, read_probe, fma_probe,
    &sampler_table,   &quantized_table,
};

}  // namespace COPPICE_ISA

#define COPPICE_JOIN2(a, b) a##b
#define COPPICE_JOIN(a, b) COPPICE_JOIN2(a, b)
const Table* COPPICE_JOIN(COPPICE_ISA, _table)() { return &COPPICE_ISA::table; }

}  // namespace coppice
