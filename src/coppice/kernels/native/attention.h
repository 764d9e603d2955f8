// Attention of rows over paged keys and values, by streaming softmax.
//
// A tile is some rows of one sequence times the query heads that share a KV head: all its
// query vectors use each key block while it is in cache. Blocks hold 64 keys and start at
// logical key 0 whatever the chunking or the window, and within a block every sum runs in
// key order, so a row's result depends on its own visible keys alone. A key a row may not
// see gets weight exactly 0. Every 512 keys the sums begin anew and are merged in order, in
// one task or in several, so that threads can share a long context. Method: Dao et al., FlashAttention (NeurIPS 2022).
#pragma once

#include "attention_tiles.h"
#include "math.h"

namespace coppice {
namespace COPPICE_ISA {

constexpr float NEVER = -__builtin_inff();

// What query vectors have summed up over some keys.
struct Sums {
  float* out;   // [queries][padded], weighted values
  float* mass;  // [queries][16], weights, by lane
  float* top;   // [queries], largest logit
};

// One task's state; all pointers lie in the thread's scratch, but `now` in a record if any.
struct Work {
  int64_t queries, d, padded;  // query vectors, head dim, head dim in whole V16s
  float* q;                    // [queries][d]
  float* scores;               // [queries][64], logits then weights
  float* own;                  // groups of a tree row's own keys or values, side by side
  Sums now, total;             // this span's and those merged so far
};

static int64_t record_floats(const AttentionArgs& a, int64_t queries) {
  return queries * (padded_dim(a.cache.head_dim) + 16 + 1);
}

static int64_t attention_bytes(const AttentionArgs& a) {
  const int64_t d = a.cache.head_dim, p = padded_dim(d);
  const int64_t floats = TILE_QUERIES * (d + KEY_BLOCK) + KEY_BLOCK * p;
  return 4 * (floats + 2 * record_floats(a, TILE_QUERIES) + 64);
}

COPPICE_INLINE Sums sums_at(float* record, int64_t queries, int64_t padded) {
  float* mass = record + queries * padded;
  return {record, mass, mass + queries * 16};
}

static Work lay_out(const AttentionArgs& a, int64_t queries, float* scratch) {
  Work w;
  w.queries = queries;
  w.d = a.cache.head_dim;
  w.padded = padded_dim(w.d);
  w.own = scratch;
  w.scores = w.own + KEY_BLOCK * w.padded;
  w.now = sums_at(w.scores + TILE_QUERIES * KEY_BLOCK, queries, w.padded);
  w.total = sums_at(w.now.out + record_floats(a, TILE_QUERIES), queries, w.padded);
  w.q = w.total.out + record_floats(a, TILE_QUERIES);
  return w;
}

COPPICE_INLINE void clear(const Work& w, const Sums& sums) {
  memset(sums.out, 0, w.queries * w.padded * sizeof(float));
  memset(sums.mass, 0, w.queries * 16 * sizeof(float));
  for (int64_t i = 0; i < w.queries; ++i) sums.top[i] = NEVER;
}

// x <- x * keep + y * add
COPPICE_INLINE void blend(float* x, const float* y, int64_t n, V16 keep, V16 add) {
  for (int64_t j = 0; j < n; j += 16)
    store16(x + j, fma(load16(y + j), add, load16(x + j) * keep));
}

// The next span's sums into the total; the first one is taken as it is.
static void merge(const Work& w, const Sums& next) {
  for (int64_t i = 0; i < w.queries; ++i) {
    const float before = w.total.top[i], top = next.top[i];
    float *out = w.total.out + i * w.padded, *mass = w.total.mass + i * 16;
    if (top == NEVER) continue;
    if (before == NEVER) {
      w.total.top[i] = top;
      memcpy(out, next.out + i * w.padded, w.padded * sizeof(float));
      memcpy(mass, next.mass + i * 16, 16 * sizeof(float));
      continue;
    }
    const float peak = before < top ? top : before;
    const V16 keep = exp16(splat(before - peak)), add = exp16(splat(top - peak));
    w.total.top[i] = peak;
    blend(out, next.out + i * w.padded, w.padded, keep, add);
    blend(mass, next.mass + i * 16, 16, keep, add);
  }
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
  const float peak = max_lane(best), before = w.now.top[query];
  float* mass = w.now.mass + 16 * query;
  if (peak == NEVER) {
    for (int64_t b = 0; b < subs; ++b) store16(s + 16 * b, splat(0.0f));
    if (max64(begin, first) > min64(begin + 16 * subs - 1, last)) return;  // nothing is visible
    // Maxima pass NaN over; where all that is visible is NaN (or -infinity), so is the row.
    if (before == NEVER) w.now.top[query] = 0.0f;
    store16(mass, splat(__builtin_nanf("")));
    return;
  }
  V16 total = load16(mass);
  float now = before;
  if (!(peak <= before)) {
    now = peak;
    w.now.top[query] = now;
    const V16 shrink = exp16(splat(before - now));
    total = total * shrink;
    float* out = w.now.out + query * w.padded;
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
  const int64_t size = a.cache.page_size, step = group_size<T>(a.cache);
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
  add_values(w.queries, w.scores, values, shared, w.padded, w.now.out);
  for (int64_t i = 0; i < span.tile.count && from < end && !span.tile.chain; ++i) {
    const int64_t to = min64(end, index[i] + 1), row = span.tile.first + i;
    if (to <= from) continue;
    const auto own = collect<T>(a, w, span, row, c.v, from, to, copy_value<T>);
    add_values(heads, w.scores + i * heads * KEY_BLOCK + shared, own, to - from, w.padded,
               w.now.out + i * heads * w.padded);
  }
}

// Divide by the mass (an attention sink adds its own) and hand the result over.
COPPICE_INLINE void finish_query(const AttentionArgs& a, const Work& w, const Sums& sums, int64_t query,
                                 int64_t head, float* to) {
  float total = sum(load16(sums.mass + 16 * query));
  V16 factor = splat(1.0f);
  if (a.sinks) {
    const float top = sums.top[query], sink = a.sinks[head];
    if (sink > top) {
      factor = exp16(splat(top - sink));
      total = total * lane0(factor) + 1.0f;
    } else {
      total = total + lane0(exp16(splat(sink - top)));
    }
  }
  factor = factor / splat(total);
  const float* out = sums.out + query * w.padded;
  int64_t j = 0;
  for (; j + 16 <= w.d; j += 16) store16(to + j, load16(out + j) * factor);
  if (j < w.d) store_part(to + j, load16(out + j) * factor, w.d - j);
}

// A tile, one KV head and (where its group is large) some of its query heads.
struct Part {
  Tile tile;
  int64_t head, heads, first_head;  // KV head; query heads of a row and the first of them
};

static Part part_of(const AttentionArgs& a, int64_t task) {
  const int64_t group = a.heads / a.cache.kv_heads;
  const int64_t splits = (group + TILE_QUERIES - 1) / TILE_QUERIES;
  const int64_t low = task % splits * TILE_QUERIES, head = task / splits % a.cache.kv_heads;
  // Later tiles see more keys: they go first, so that the threads end together.
  const Tile& tile = a.tiles[a.num_tiles - 1 - task / splits / a.cache.kv_heads];
  return {tile, head, min64(TILE_QUERIES, group - low), head * group + low};
}

static void finish_part(const AttentionArgs& a, const Part& part, const Work& w,
                        const Sums& sums) {
  for (int64_t i = 0; i < w.queries; ++i) {
    const int64_t row = part.tile.first + i / part.heads, h = part.first_head + i % part.heads;
    finish_query(a, w, sums, i, h, a.out + (row * a.heads + h) * a.cache.head_dim);
  }
}

// All keys of a part; with a record, those of one span, whose sums are left there.
template <class T>
static void attend_part(const AttentionArgs& a, const Part& part, int64_t span, float* record,
                        float* scratch) {
  const Tile& tile = part.tile;
  const int64_t heads = part.heads, d = a.cache.head_dim;
  Work w = lay_out(a, tile.count * heads, scratch);
  if (record) w.now = sums_at(record, w.queries, w.padded);
  for (int64_t i = 0; i < tile.count; ++i)
    memcpy(w.q + i * heads * d, a.q + ((tile.first + i) * a.heads + part.first_head) * d,
           heads * d * sizeof(float));
  clear(w, w.now);

  const int32_t* index = a.index + tile.first;
  int64_t nearest = index[0], furthest = index[0];
  for (int64_t i = 1; i < tile.count; ++i) {
    nearest = min64(nearest, index[i]);
    furthest = max64(furthest, index[i]);
  }
  const Span keys{tile, part.head, heads,
                  tile.chain ? furthest + 1 : tile.shared / GROUP * GROUP};
  int64_t start = a.window > 0 ? max64(0, nearest - a.window + 1) / KEY_BLOCK * KEY_BLOCK : 0;
  int64_t end = furthest + 1;
  if (record) start = max64(start, span * KEY_SPAN), end = min64(end, (span + 1) * KEY_SPAN);
  bool merged = false;
  for (int64_t begin = start; begin < end; begin += KEY_BLOCK) {
    if (begin % KEY_SPAN == 0 && begin > start) {
      if (!merged) clear(w, w.total);
      merge(w, w.now);
      clear(w, w.now);
      merged = true;
    }
    attend_block<T>(a, w, keys, begin);
  }
  if (record) return;
  if (merged) merge(w, w.now);
  finish_part(a, part, w, merged ? w.total : w.now);
}

static void attention(const AttentionArgs& a, int64_t task, float* scratch) {
  const Part part = part_of(a, task / a.spans);
  float* record = a.records ? a.records + task * a.record : nullptr;
  const int64_t span = task % a.spans;
  if (a.cache.kind == KV_INT8) return attend_part<int8_t>(a, part, span, record, scratch);
  if (a.cache.kind == KV_BF16) return attend_part<bf16>(a, part, span, record, scratch);
  attend_part<float>(a, part, span, record, scratch);
}

// What the tasks of a part's spans left, in order.
static void merge_spans(const AttentionArgs& a, int64_t task, float* scratch) {
  const Part part = part_of(a, task);
  const Work w = lay_out(a, part.tile.count * part.heads, scratch);
  clear(w, w.total);
  for (int64_t span = 0; span < a.spans; ++span)
    merge(w, sums_at(a.records + (task * a.spans + span) * a.record, w.queries, w.padded));
  finish_part(a, part, w, w.total);
}

}  // namespace COPPICE_ISA
}  // namespace coppice
