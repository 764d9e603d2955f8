// What the instruction-set builds offer: plain argument structs and a table of functions.
//
// A kernel is a task function: the pool calls it with task numbers 0 .. count-1 in any
// order on any thread. How work is cut into tasks never changes a result.
#pragma once

#include <cstdint>

namespace coppice {

// How a packed weight is stored; `ops.py` has the same numbers.
// Quantized weights meet rows made int8 on the way, or float rows.
enum Store : int {
  STORE_F32 = 0,
  STORE_BF16 = 1,
  STORE_INT8 = 2,
  STORE_INT4 = 3,
  STORE_INT8_FLOAT = 4,
  STORE_INT4_FLOAT = 5,
};

// A linear layer's weight in panels of sixteen output features, and its bias.
struct Packed {
  const void* data;    // [ceil(n/16)][k][16] floats, or codes (see quantized_table.h)
  const void* scales;  // of quantized weights, else null
  const void* zeros;   // likewise, where there are zero points
  const float* bias;   // [ceil(n/16)*16] or null
  int64_t n, k;        // output and input features
  int64_t group;       // inputs that share a scale; 0: all
  int format;          // a Store
};

// Panels cut into tasks: large ones first, which read long runs of memory, then small ones, so
// that threads end together.
struct Shares {
  int64_t panels, large, larges, small;

  // `most` panels a task.
  static Shares of(int64_t panels, int64_t threads, int64_t most) {
    int64_t large = (panels / (4 * threads) + 3) / 4 * 4;
    if (large > most) large = most;
    if (large < 8) return {panels, 4, 0, 4};
    return {panels, large, panels * 3 / 4 / large, (large / 4 + 3) / 4 * 4};
  }
  static Shares one(int64_t panels) { return {panels, panels, 1, panels}; }

  int64_t begin(int64_t task) const {
    const int64_t panel =
        task < larges ? task * large : larges * large + (task - larges) * small;
    return panel < panels ? panel : panels;
  }
  int64_t end(int64_t task) const { return begin(task + 1); }
  int64_t tasks() const { return larges + (panels - larges * large + small - 1) / small; }
};

struct LinearArgs {
  Packed w;
  const float* x;         // [rows, k]
  const float* residual;  // [rows, n] or null
  float* out;             // [rows, n]
  int64_t rows;
  Shares shares;  // set by the planner: task = row block * shares.tasks() + share
};

struct PackArgs {
  Packed w;            // written, at output features first .. first + count
  const void* source;  // [count, k] row-major, float32 or bfloat16
  int64_t first, count;
  bool source_bf16;
};

struct NormArgs {
  const float* x;  // [rows, n]
  const float* weight;
  float* out;
  int64_t rows, n;
  float eps;
};

struct GateArgs {
  const float* gate_up;  // [rows, 2 * n]
  float* out;            // [rows, n]
  int64_t rows, n;
  int kind;  // 0 silu, 1 gelu_tanh, 2 gelu
};

enum KvKind : int { KV_F32 = 0, KV_BF16 = 1, KV_INT8 = 2 };  // `ops.py` has the same numbers

// One layer's KV pages, [pages, kv_heads] of groups of sixteen keys (kv.h).
struct Cache {
  void *k, *v;
  int64_t pages, kv_heads, page_size, head_dim;
  int kind;  // a KvKind
};

struct RowArrays {
  const int32_t *position, *sequence, *parent, *slot;  // [rows]
  const int32_t* page_table;                           // [sequences, max_pages]
  const int32_t* prefix_len;                           // [sequences]
  int64_t rows, sequences, max_pages;
};

struct RopeArgs {
  const float* qkv;      // [rows, (heads + 2 kv_heads) * head_dim]
  const float* cos_sin;  // [max_position, 2, half]
  const float *q_weight, *k_weight;
  float* q;  // [rows, heads, head_dim]
  Cache cache;
  RowArrays in;
  int64_t heads, half;
  int qk_norm;  // 0 none, 1 head, 2 full
  float eps;
};

// Consecutive rows of one sequence that attention works on together.
struct Tile {
  int32_t first, count;
  int32_t shared;  // logical keys [0, shared) are the prefix slots, the same for every row
  bool chain;      // rows follow each other and slot == logical index throughout
};

struct AttentionArgs {
  const float* q;      // [rows, heads, head_dim]
  const float* sinks;  // [heads] or null
  float* out;          // [rows, heads * head_dim]
  Cache cache;
  RowArrays in;
  const int32_t* index;  // [rows] logical index of the row itself
  const Tile* tiles;
  int64_t num_tiles, heads;
  float scale, softcap;
  int32_t window;
  // Set by the planner where each span of keys is a task of its own:
  int64_t spans = 1, record = 0;  // spans; floats of a span's result
  float* records = nullptr;       // [tiles * kv_heads * splits][spans][record]
};

struct SamplerTable;    // sampler.h
struct QuantizedTable;  // quantized_table.h

struct Table {
  const char* name;
  int width;             // floats per register
  int64_t few_rows;      // up to here one pass over the weights, unfolded in registers
  int64_t row_block;     // rows of a task beyond that
  int64_t linear_bytes;  // scratch per thread
  int64_t (*attention_bytes)(const AttentionArgs&);
  void (*linear)(const LinearArgs&, int64_t task, float* scratch);
  void (*pack)(const PackArgs&);
  void (*unpack)(const Packed&, float* out);
  void (*gather)(const Packed&, const int32_t* token, int64_t rows, float* out);
  void (*norm)(const NormArgs&, int64_t row);
  void (*gate)(const GateArgs&, int64_t row, int64_t begin, int64_t end);
  void (*rope)(const RopeArgs&, int64_t row, float* scratch);
  void (*attention)(const AttentionArgs&, int64_t task, float* scratch);
  void (*merge_spans)(const AttentionArgs&, int64_t task, float* scratch);
  int64_t (*record_floats)(const AttentionArgs&, int64_t queries);
  float (*read_probe)(const float*, int64_t count);
  float (*fma_probe)(int64_t rounds);  // 2 * 16 * 12 * rounds flops
  const SamplerTable* sampler;
  const QuantizedTable* quantized;
};

constexpr int64_t TILE_QUERIES = 96;  // query vectors (rows x heads of a group) per tile
constexpr int64_t KEY_BLOCK = 64;     // keys per softmax block, counted from logical key 0
constexpr int64_t KEY_SPAN = 512;     // keys summed up apart and then merged, counted likewise

const Table* portable_table();
const Table* avx2_table();
const Table* avx512_table();
const Table* avx2vnni_table();
const Table* avx512vnni_table();
const Table* wide_table();  // AVX-512's shapes on AVX2, in test builds

}  // namespace coppice
