// Attention of rows over paged keys and values, by streaming softmax.
//
// A tile is some rows of one sequence times the query heads that share a KV head: all its
// query vectors use each key block while it is in cache. Blocks hold 64 keys and start at
// logical key 0 whatever the chunking or the window, and within a block every sum runs in
// key order, so a row's result depends on its own visible keys alone. A key a row may not
// see gets weight exactly 0. Method: Dao et al., FlashAttention (NeurIPS 2022).
#pragma once

#include "kernels.h"
#include "linear.h"
#include "math.h"

namespace coppice {
namespace COPPICE_ISA {

constexpr float NEVER = -__builtin_inff();
constexpr int64_t SUBS = KEY_BLOCK / 16;

// One task's state; all pointers lie in the thread's scratch.
struct Work {
  int64_t queries, d, padded;  // query vectors, head dim, head dim in whole V16s
  float* q;                    // [queries][d]
  float* scores;               // [queries][64], logits then weights
  float* out;                  // [queries][padded], weighted values so far
  float* top;                  // [queries], largest logit so far
  float* mass;                 // [queries][16], sum of weights, by lane
  float* keys;                 // [4][d][16]: a panel per 16 keys
  float* values;               // [padded / 16][64][16]: a panel per 16 dims
  int32_t* slots;              // a tree row's slots from its first own block on
};

COPPICE_INLINE int64_t padded_dim(int64_t d) { return (d + 15) / 16 * 16; }

static int64_t attention_bytes(const AttentionArgs& a) {
  const int64_t d = a.cache.head_dim, p = padded_dim(d);
  const int64_t per_query = d + KEY_BLOCK + p + 1 + 16;
  const int64_t floats = TILE_QUERIES * per_query + KEY_BLOCK * (d + p);
  return 4 * (floats + a.in.rows + KEY_BLOCK + 64);
}

static Work lay_out(const AttentionArgs& a, int64_t queries, float* scratch) {
  Work w;
  w.queries = queries;
  w.d = a.cache.head_dim;
  w.padded = padded_dim(w.d);
  w.keys = scratch;
  w.values = w.keys + KEY_BLOCK * w.d;
  w.scores = w.values + KEY_BLOCK * w.padded;
  w.mass = w.scores + TILE_QUERIES * KEY_BLOCK;
  w.out = w.mass + TILE_QUERIES * 16;
  w.q = w.out + TILE_QUERIES * w.padded;
  w.top = w.q + TILE_QUERIES * w.d;
  w.slots = reinterpret_cast<int32_t*>(w.top + TILE_QUERIES);
  return w;
}

typedef float f4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));
typedef uint16_t s8 __attribute__((vector_size(16)));
typedef uint32_t u8 __attribute__((vector_size(32)));

// Dims j .. j + STEP of keys i .. i + STEP, turned to rows of keys in the panel.
constexpr int64_t step_of(const float*) { return 4; }
constexpr int64_t step_of(const bf16*) { return 8; }

COPPICE_INLINE void turn(const float* const* key, int64_t j, float* to) {
  f4 k[4];
  for (int i = 0; i < 4; ++i) memcpy(&k[i], key[i] + j, 16);
  const i4 low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, left = {0, 1, 4, 5}, right = {2, 3, 6, 7};
  const f4 ab0 = __builtin_shuffle(k[0], k[1], low), ab1 = __builtin_shuffle(k[0], k[1], high);
  const f4 cd0 = __builtin_shuffle(k[2], k[3], low), cd1 = __builtin_shuffle(k[2], k[3], high);
  const f4 rows[4] = {__builtin_shuffle(ab0, cd0, left), __builtin_shuffle(ab0, cd0, right),
                      __builtin_shuffle(ab1, cd1, left), __builtin_shuffle(ab1, cd1, right)};
  for (int i = 0; i < 4; ++i) memcpy(to + 16 * i, &rows[i], 16);
}

// Three rounds of interleaving: single values, then pairs, then fours.
COPPICE_INLINE void turn(const bf16* const* key, int64_t j, float* to) {
  const s8 low1 = {0, 8, 1, 9, 2, 10, 3, 11}, high1 = {4, 12, 5, 13, 6, 14, 7, 15};
  const s8 low2 = {0, 1, 8, 9, 2, 3, 10, 11}, high2 = {4, 5, 12, 13, 6, 7, 14, 15};
  const s8 low4 = {0, 1, 2, 3, 8, 9, 10, 11}, high4 = {4, 5, 6, 7, 12, 13, 14, 15};
  s8 a[8], b[8];
  for (int i = 0; i < 8; ++i) memcpy(&a[i], key[i] + j, 16);
  for (int i = 0; i < 8; i += 2) {
    b[i] = __builtin_shuffle(a[i], a[i + 1], low1);       // dims 0-3 of two keys
    b[i + 1] = __builtin_shuffle(a[i], a[i + 1], high1);  // dims 4-7
  }
  for (int i = 0; i < 8; i += 4)
    for (int h = 0; h < 2; ++h) {
      a[i + 2 * h] = __builtin_shuffle(b[i + h], b[i + h + 2], low2);  // two dims of four keys
      a[i + 2 * h + 1] = __builtin_shuffle(b[i + h], b[i + h + 2], high2);
    }
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = __builtin_shuffle(a[i], a[i + 4], low4);
    b[2 * i + 1] = __builtin_shuffle(a[i], a[i + 4], high4);
  }
  for (int i = 0; i < 8; ++i) {
    const u8 row = __builtin_convertvector(b[i], u8) << 16;
    memcpy(to + 16 * i, &row, 32);
  }
}

// Sixteen keys as a panel [d][16].
template <class T>
COPPICE_INLINE void key_panel(const T* const* key, int64_t d, float* panel) {
  constexpr int64_t STEP = step_of(static_cast<const T*>(nullptr));
  int64_t j = 0;
  for (; j + STEP <= d; j += STEP)
    for (int64_t i = 0; i < 16; i += STEP) turn(key + i, j, panel + 16 * j + i);
  for (; j < d; ++j)
    for (int i = 0; i < 16; ++i) panel[16 * j + i] = to_float(key[i][j]);
}

// Keys and values `begin .. begin + count` (at most a block) of one KV head to panels; what
// fills up the last sixteen is zero, so that stale memory cannot reach a sum.
template <class T>
static void load_block(const AttentionArgs& a, const Work& w, int32_t sequence, int64_t head,
                       int64_t begin, int64_t count, const int32_t* slots) {
  const Cache& c = a.cache;
  const int32_t* table = a.in.page_table + sequence * a.in.max_pages;
  const T* key[KEY_BLOCK];
  int64_t at[KEY_BLOCK];
  int64_t page = begin / c.page_size, offset = begin % c.page_size;
  for (int64_t i = 0; i < count; ++i) {
    if (slots) page = slots[i] / c.page_size, offset = slots[i] % c.page_size;
    at[i] = ((table[page] * c.kv_heads + head) * c.page_size + offset) * c.head_dim;
    key[i] = static_cast<const T*>(c.k) + at[i];
    if (++offset == c.page_size) offset = 0, ++page;
  }
  const int64_t whole = (count + 15) / 16 * 16;
  for (int64_t i = count; i < whole; ++i) key[i] = key[0];
  for (int64_t i = 0; i < whole; i += 16) key_panel(key + i, w.d, w.keys + i * w.d);
  for (int64_t i = 0; i < count; ++i) {
    const T* value = static_cast<const T*>(c.v) + at[i];
    float* to = w.values + 16 * i;
    int64_t j = 0;
    for (; j + 16 <= w.d; j += 16) store16(to + j * KEY_BLOCK, load16(value + j));
    if (j < w.d) store16(to + j * KEY_BLOCK, load_part(value + j, w.d - j));
  }
  for (int64_t i = count; i < whole; ++i)
    for (int64_t j = 0; j < w.padded; j += 16)
      store16(w.values + j * KEY_BLOCK + 16 * i, splat(0.0f));
}

// Query vectors times panels side by side. One or a few vectors alone would wait for each
// multiply-add to finish before the next, so they take several panels at once.
COPPICE_INLINE void multiply_panels(int64_t rows, const float* x, int64_t x_stride,
                                    const float* w, int64_t panel_stride, int64_t panels,
                                    int64_t k, float* out, int64_t out_stride, bool resume) {
  int64_t p = 0;
  if (rows == 1)
    for (; p + 4 <= panels; p += 4)
      multiply_tile<1, 4, float>(x, x_stride, w + p * panel_stride, panel_stride, k,
                                 out + 16 * p, out_stride, resume);
  if (rows <= 3)
    for (; p + 2 <= panels; p += 2)
      multiply_rows<2, float, 3>(rows, x, x_stride, w + p * panel_stride, panel_stride, k,
                                 out + 16 * p, out_stride, resume);
  for (; p < panels; ++p)
    multiply_all<1, float>(rows, x, x_stride, w + p * panel_stride, 0, k, out + 16 * p,
                           out_stride, resume);
}

// Logits to weights for one query vector; `last` is the row's own logical index.
COPPICE_INLINE void weigh(const AttentionArgs& a, const Work& w, int64_t query, int64_t begin,
                          int64_t subs, int64_t last) {
  const int64_t first = a.window > 0 ? last - a.window + 1 : 0;
  float* s = w.scores + query * KEY_BLOCK;
  const float counting[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const V16 lanes = load16(counting);
  V16 logit[SUBS];
  V16 best = splat(NEVER);
  for (int64_t b = 0; b < subs; ++b) {
    const int64_t key = begin + 16 * b;
    V16 v = load16(s + 16 * b) * splat(a.scale);
    if (a.softcap > 0) v = tanh16(v / splat(a.softcap)) * splat(a.softcap);
    if (key + 15 > last) v = where_less(splat((float)(last - key)), lanes, splat(NEVER), v);
    if (key < first) v = where_less(lanes, splat((float)(first - key)), splat(NEVER), v);
    logit[b] = v;
    best = max(best, v);
  }
  const float peak = max_lane(best), before = w.top[query];
  if (peak == NEVER) {  // nothing of this block is visible: weights 0, state unchanged
    for (int64_t b = 0; b < subs; ++b) store16(s + 16 * b, splat(0.0f));
    return;
  }
  float* mass = w.mass + 16 * query;
  V16 total = load16(mass);
  float now = before;
  if (!(peak <= before)) {
    now = peak;
    w.top[query] = now;
    const V16 shrink = exp16(splat(before - now));
    total = total * shrink;
    float* out = w.out + query * w.padded;
    for (int64_t j = 0; j < w.padded; j += 16) store16(out + j, load16(out + j) * shrink);
  }
  for (int64_t b = 0; b < subs; ++b) {
    const V16 weight = exp16(logit[b] - splat(now));
    total = total + weight;
    store16(s + 16 * b, weight);
  }
  store16(mass, total);
}

// All query vectors `from .. from + count` over keys `begin .. end` of one block; a row has
// `heads` query vectors and row i's own logical index is index[i].
template <class T>
static void attend_block(const AttentionArgs& a, const Work& w, int32_t sequence, int64_t head,
                         int64_t begin, int64_t end, const int32_t* slots, int64_t from,
                         int64_t count, int64_t heads, const int32_t* index) {
  load_block<T>(a, w, sequence, head, begin, end - begin, slots);
  const int64_t subs = (end - begin + 15) / 16;
  float* scores = w.scores + from * KEY_BLOCK;
  multiply_panels(count, w.q + from * w.d, w.d, w.keys, 16 * w.d, subs, w.d, scores, KEY_BLOCK,
                  false);
  for (int64_t i = 0; i < count; ++i) weigh(a, w, from + i, begin, subs, index[i / heads]);
  multiply_panels(count, scores, KEY_BLOCK, w.values, 16 * KEY_BLOCK, w.padded / 16, 16 * subs,
                  w.out + from * w.padded, w.padded, true);
}

// A tree row's own part: keys from the block its prefix ends in, through its slot list.
template <class T>
static void attend_branch(const AttentionArgs& a, const Work& w, int64_t row, int64_t head,
                          int64_t shared, int64_t from, int64_t heads) {
  const int32_t last = a.index[row], sequence = a.in.sequence[row];
  int32_t ancestor = (int32_t)row;
  for (int64_t j = last; j >= shared; --j) {
    if (ancestor < 0) {
      w.slots[j - shared] = (int32_t)j;
    } else {
      w.slots[j - shared] = a.in.slot[ancestor];
      ancestor = a.in.parent[ancestor];
    }
  }
  const int64_t first = a.window > 0 ? max64(0, last - a.window + 1) : 0;
  for (int64_t begin = max64(shared, first / KEY_BLOCK * KEY_BLOCK); begin <= last;
       begin += KEY_BLOCK) {
    const int64_t end = min64(begin + KEY_BLOCK, last + 1);
    attend_block<T>(a, w, sequence, head, begin, end, w.slots + (begin - shared), from, heads,
                    heads, &last);
  }
}

// Divide by the mass (an attention sink adds its own) and hand the result over.
COPPICE_INLINE void finish_query(const AttentionArgs& a, const Work& w, int64_t query,
                                 int64_t head, float* to) {
  float total = sum(load16(w.mass + 16 * query));
  V16 factor = splat(1.0f);
  if (a.sinks) {
    const float top = w.top[query], sink = a.sinks[head];
    if (sink > top) {
      factor = exp16(splat(top - sink));
      total = total * lane0(factor) + 1.0f;
    } else {
      total = total + lane0(exp16(splat(sink - top)));
    }
  }
  factor = factor / splat(total);
  const float* out = w.out + query * w.padded;
  int64_t j = 0;
  for (; j + 16 <= w.d; j += 16) store16(to + j, load16(out + j) * factor);
  if (j < w.d) store_part(to + j, load16(out + j) * factor, w.d - j);
}

template <class T>
static void attend_tile(const AttentionArgs& a, const Tile& tile, int64_t head, int64_t split,
                        float* scratch) {
  const int64_t group = a.heads / a.cache.kv_heads;
  const int64_t low = split * TILE_QUERIES, heads = min64(TILE_QUERIES, group - low);
  const int64_t first_head = head * group + low, d = a.cache.head_dim;
  const Work w = lay_out(a, tile.count * heads, scratch);
  for (int64_t i = 0; i < tile.count; ++i)
    memcpy(w.q + i * heads * d, a.q + ((tile.first + i) * a.heads + first_head) * d,
           heads * d * sizeof(float));
  memset(w.out, 0, w.queries * w.padded * sizeof(float));
  memset(w.mass, 0, w.queries * 16 * sizeof(float));
  for (int64_t i = 0; i < w.queries; ++i) w.top[i] = NEVER;

  const int32_t* index = a.index + tile.first;
  int64_t nearest = index[0], furthest = index[0];
  for (int64_t i = 1; i < tile.count; ++i) {
    nearest = min64(nearest, index[i]);
    furthest = max64(furthest, index[i]);
  }
  const int64_t common = tile.chain ? furthest + 1 : tile.shared / KEY_BLOCK * KEY_BLOCK;
  const int64_t start = a.window > 0 ? max64(0, nearest - a.window + 1) : 0;
  for (int64_t begin = start / KEY_BLOCK * KEY_BLOCK; begin < common; begin += KEY_BLOCK)
    attend_block<T>(a, w, a.in.sequence[tile.first], head, begin,
                    min64(begin + KEY_BLOCK, common), nullptr, 0, w.queries, heads, index);
  for (int64_t i = 0; i < tile.count && !tile.chain; ++i)
    attend_branch<T>(a, w, tile.first + i, head, common, i * heads, heads);
  for (int64_t i = 0; i < w.queries; ++i) {
    const int64_t row = tile.first + i / heads, h = first_head + i % heads;
    finish_query(a, w, i, h, a.out + (row * a.heads + h) * d);
  }
}

static void attention(const AttentionArgs& a, int64_t task, float* scratch) {
  const int64_t group = a.heads / a.cache.kv_heads;
  const int64_t splits = (group + TILE_QUERIES - 1) / TILE_QUERIES;
  const int64_t split = task % splits, head = task / splits % a.cache.kv_heads;
  // Later tiles see more keys: they go first, so that the threads end together.
  const Tile& tile = a.tiles[a.num_tiles - 1 - task / splits / a.cache.kv_heads];
  if (a.cache.is_bf16) return attend_tile<bf16>(a, tile, head, split, scratch);
  attend_tile<float>(a, tile, head, split, scratch);
}

}  // namespace COPPICE_ISA
}  // namespace coppice
