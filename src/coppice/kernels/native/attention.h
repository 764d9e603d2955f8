// Attention of rows over paged keys and values, by streaming softmax.
//
// A tile is some rows of one sequence times the query heads that share a KV head: all its
// query vectors use each key block while it is in cache. Blocks hold 64 keys and start at
// logical key 0 whatever the chunking or the window, and within a block every sum runs in
// key order, so a row's result depends on its own visible keys alone. A key a row may not
// see gets weight exactly 0. Method: Dao et al., FlashAttention (NeurIPS 2022).
#pragma once

#include "attention_tiles.h"
#include "math.h"

namespace coppice {
namespace COPPICE_ISA {

constexpr float NEVER = -__builtin_inff();

// One task's state; all pointers lie in the thread's scratch.
struct Work {
  int64_t queries, d, padded;  // query vectors, head dim, head dim in whole V16s
  float* q;                    // [queries][d]
  float* scores;               // [queries][64], logits then weights
  float* out;                  // [queries][padded], weighted values so far
  float* top;                  // [queries], largest logit so far
  float* mass;                 // [queries][16], sum of weights, by lane
  float* own;                  // groups of a tree row's own keys or values, side by side
};

static int64_t attention_bytes(const AttentionArgs& a) {
  const int64_t d = a.cache.head_dim, p = padded_dim(d);
  const int64_t per_query = d + KEY_BLOCK + p + 1 + 16;
  return 4 * (TILE_QUERIES * per_query + KEY_BLOCK * p + 64);
}

static Work lay_out(const AttentionArgs& a, int64_t queries, float* scratch) {
  Work w;
  w.queries = queries;
  w.d = a.cache.head_dim;
  w.padded = padded_dim(w.d);
  w.own = scratch;
  w.scores = w.own + KEY_BLOCK * w.padded;
  w.mass = w.scores + TILE_QUERIES * KEY_BLOCK;
  w.out = w.mass + TILE_QUERIES * 16;
  w.q = w.out + TILE_QUERIES * w.padded;
  w.top = w.q + TILE_QUERIES * w.d;
  return w;
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

// What one call of attend_block works on: a tile's rows and one KV head.
struct Span {
  const Tile& tile;
  int64_t head, heads;  // KV head; query vectors of a row
  int64_t common;       // keys before it lie in the same place for all rows of the tile
};

// Where the groups of keys begin .. end of a sequence lie, as K or as V.
template <class T>
COPPICE_INLINE void locate(const AttentionArgs& a, const Span& span, void* pages, int64_t begin,
                           int64_t end, const T** at) {
  const int32_t* table = a.in.page_table + a.in.sequence[span.tile.first] * a.in.max_pages;
  const int64_t size = a.cache.page_size;
  for (int64_t key = begin, s = 0; key < end; key += GROUP, ++s)
    at[s] = group_at<T>(a.cache, pages, table[key / size], span.head, key % size);
}

// Slots of a tree row's keys begin .. end, its ancestors' and (before them) the prefix's.
COPPICE_INLINE void find_slots(const AttentionArgs& a, int64_t row, int64_t begin, int64_t end,
                               int32_t* slots) {
  int32_t ancestor = (int32_t)row;
  for (int64_t key = a.index[row]; key >= begin; --key) {
    if (key < end) slots[key - begin] = ancestor < 0 ? (int32_t)key : a.in.slot[ancestor];
    if (ancestor >= 0) ancestor = a.in.parent[ancestor];
  }
}

// Keys begin .. end as one row sees them, copied side by side.
template <class T, class Copy>
COPPICE_INLINE Groups<T> collect(const AttentionArgs& a, const Work& w, const Span& span,
                                 int64_t row, void* pages, int64_t begin, int64_t end,
                                 const Copy& copy) {
  int32_t slots[KEY_BLOCK];
  find_slots(a, row, begin, end, slots);
  const int32_t* table = a.in.page_table + a.in.sequence[row] * a.in.max_pages;
  const int64_t size = a.cache.page_size, step = group_size(a.cache);
  T* own = reinterpret_cast<T*>(w.own);
  for (int64_t i = 0; i < end - begin; ++i) {
    const int64_t offset = slots[i] % size;
    copy(group_at<T>(a.cache, pages, table[slots[i] / size], span.head, offset), offset % GROUP,
         own + i / GROUP * step, i % GROUP, w.d);
  }
  Groups<T> found;
  for (int64_t s = 0; s < SUBS; ++s) found.at[s] = found.ahead[s] = own + s * step;
  return found;
}

// All rows of a tile over one block of keys; what lies beyond `common` (of a token tree) is
// each row's own.
template <class T>
static void attend_block(const AttentionArgs& a, const Work& w, const Span& span, int64_t begin) {
  const Cache& c = a.cache;
  const int64_t end = begin + KEY_BLOCK, heads = span.heads, d = w.d;
  const int64_t shared = max64(0, min64(end, span.common) - begin);
  const int64_t next = min64(end + KEY_BLOCK, span.common);
  const int32_t* index = a.index + span.tile.first;
  Groups<T> keys{}, values{};
  locate(a, span, c.k, begin, begin + shared, keys.at);
  locate(a, span, c.v, begin, begin + shared, values.at);
  for (int64_t s = 0; s < SUBS; ++s) keys.ahead[s] = values.at[s], values.ahead[s] = values.at[s];
  locate(a, span, c.k, end, next, values.ahead);

  score(w.queries, w.q, d, keys, shared, w.scores);
  const int64_t from = begin + shared;  // of a row's own keys: on a group's edge
  for (int64_t i = 0; i < span.tile.count && from < end && !span.tile.chain; ++i) {
    const int64_t to = min64(end, index[i] + 1), row = span.tile.first + i;
    if (to <= from) continue;
    const auto own = collect<T>(a, w, span, row, c.k, from, to, copy_key<T>);
    score(heads, w.q + i * heads * d, d, own, to - from, w.scores + i * heads * KEY_BLOCK + shared);
  }
  for (int64_t i = 0; i < w.queries; ++i) {
    const int64_t last = index[i / heads];
    const int64_t seen = span.tile.chain ? shared : min64(KEY_BLOCK, last + 1 - begin);
    weigh(a, w, i, begin, (seen + 15) / 16, last);
  }
  add_values(w.queries, w.scores, values, shared, w.padded, w.out);
  for (int64_t i = 0; i < span.tile.count && from < end && !span.tile.chain; ++i) {
    const int64_t to = min64(end, index[i] + 1), row = span.tile.first + i;
    if (to <= from) continue;
    const auto own = collect<T>(a, w, span, row, c.v, from, to, copy_value<T>);
    add_values(heads, w.scores + i * heads * KEY_BLOCK + shared, own, to - from, w.padded,
               w.out + i * heads * w.padded);
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
  const Span span{tile, head, heads, tile.chain ? furthest + 1 : tile.shared / GROUP * GROUP};
  const int64_t start = a.window > 0 ? max64(0, nearest - a.window + 1) : 0;
  for (int64_t begin = start / KEY_BLOCK * KEY_BLOCK; begin <= furthest; begin += KEY_BLOCK)
    attend_block<T>(a, w, span, begin);
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
  if (a.cache.kind == KV_BF16) return attend_tile<bf16>(a, tile, head, split, scratch);
  attend_tile<float>(a, tile, head, split, scratch);
}

}  // namespace COPPICE_ISA
}  // namespace coppice
