// The two products of attention as register tiles: queries by keys, weights by values.
//
// A lane owns one output (a logit, or one dim of a result) and adds its products one by one,
// over dims or over keys, whatever the tile's shape: how many query vectors are computed
// together never shows in a result.
#pragma once

#include "kv.h"

namespace coppice {
namespace COPPICE_ISA {

constexpr int64_t SUBS = KEY_BLOCK / GROUP;

// Query vectors of a register tile.
constexpr int QUERIES = W == 16 ? 12 : W == 8 ? 6 : 3;

// Panels side by side: few query vectors alone would wait for each multiply-add to end.
constexpr int beside(int queries) {
  const int budget = (W == 16 ? 24 : 12) / (queries * NV);
  return budget >= 4 ? 4 : budget >= 2 ? 2 : 1;
}

// Groups of a block of keys, and what to fetch meanwhile: lines of the same size.
template <class T>
struct Groups {
  const T* at[SUBS];
  const T* ahead[SUBS];
};

// out[r][16 s + lane] = sum over j of q[r][j] * key [j][lane], for B groups from `s` on; times
// the key's scale if it has one.
template <int R, int B, class T>
static void score_tile(const float* __restrict q, int64_t d, const Groups<T>& keys, int64_t s,
                       float* __restrict out) {
  const T *key[B], *ahead[B];
  for (int b = 0; b < B; ++b) key[b] = keys.at[s + b], ahead[b] = keys.ahead[s + b];
  V16 acc[R][B];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) acc[r][b] = splat(0.0f);
  for (int64_t j = 0; j < d; ++j) {
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      const V16 panel = unfold(key[b] + 16 * j);
      __builtin_prefetch(ahead[b] + 16 * j);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) acc[r][b] = fma(splat(q[r * d + j]), panel, acc[r][b]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      if constexpr (SCALED<T>) acc[r][b] = acc[r][b] * load16(scales_of(key[b], d));
      store16(out + r * KEY_BLOCK + 16 * (s + b), acc[r][b]);
    }
}

// out[r][lane of panel p + b] += sum over keys of weight[r][key] * value [key][lane].
template <int R, int B, class T>
static void value_tile(const float* __restrict weight, const Groups<T>& values, int64_t count,
                       int64_t p, float* __restrict out, int64_t stride) {
  V16 acc[R][B];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) acc[r][b] = load16(out + r * stride + 16 * (p + b));
  for (int64_t s = 0; 16 * s < count; ++s) {
    const T *value = values.at[s] + 256 * p, *ahead = values.ahead[s] + 256 * p;
    const float* x = weight + 16 * s;
    const int64_t keys = min64(16, count - 16 * s);
    for (int64_t j = 0; j < keys; ++j) {
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) {
        const V16 panel = unfold(value + 256 * b + 16 * j);
        __builtin_prefetch(ahead + 256 * b + 16 * j);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
          acc[r][b] = fma(splat(x[r * KEY_BLOCK + j]), panel, acc[r][b]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) store16(out + r * stride + 16 * (p + b), acc[r][b]);
}

// All groups of `count` keys, as many side by side as there are.
template <int R, int B, class T>
COPPICE_INLINE int64_t score_span(const float* q, int64_t d, const Groups<T>& keys, int64_t s,
                                  int64_t subs, float* out) {
  for (; s + B <= subs; s += B) score_tile<R, B, T>(q, d, keys, s, out);
  if constexpr (B > 1) return score_span<R, B / 2, T>(q, d, keys, s, subs, out);
  return s;
}
template <int R, int B, class T>
COPPICE_INLINE int64_t value_span(const float* weight, const Groups<T>& values, int64_t count,
                                  int64_t p, int64_t panels, float* out) {
  for (; p + B <= panels; p += B)
    value_tile<R, B, T>(weight, values, count, p, out, 16 * panels);
  if constexpr (B > 1)
    return value_span<R, B / 2, T>(weight, values, count, p, panels, out);
  return p;
}

template <class T, int R = QUERIES>
static void score_rows(int64_t rows, const float* q, int64_t d, const Groups<T>& keys,
                       int64_t subs, float* out) {
  if constexpr (R > 1) {
    if (rows < R) return score_rows<T, R - 1>(rows, q, d, keys, subs, out);
  }
  score_span<R, beside(R), T>(q, d, keys, 0, subs, out);
}
template <class T, int R = QUERIES>
static void value_rows(int64_t rows, const float* weight, const Groups<T>& values,
                       int64_t count, int64_t padded, float* out) {
  if constexpr (R > 1) {
    if (rows < R) return value_rows<T, R - 1>(rows, weight, values, count, padded, out);
  }
  value_span<R, beside(R), T>(weight, values, count, 0, padded / 16, out);
}

// Logits [rows][KEY_BLOCK] of `count` keys: q [rows][d].
template <class T>
static void score(int64_t rows, const float* q, int64_t d, const Groups<T>& keys, int64_t count,
                  float* out) {
  for (int64_t tiles = (rows + QUERIES - 1) / QUERIES; tiles > 0; --tiles) {
    const int64_t now = (rows + tiles - 1) / tiles;
    score_rows<T>(now, q, d, keys, (count + 15) / 16, out);
    q += now * d, out += now * KEY_BLOCK, rows -= now;
  }
}

// Weights [rows][KEY_BLOCK] times `count` values, added to out [rows][padded]. Where values
// have scales, the weights take them up.
template <class T>
static void add_values(int64_t rows, float* weight, const Groups<T>& values, int64_t count,
                       int64_t padded, float* out) {
  if constexpr (SCALED<T>)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t s = 0; 16 * s < count; ++s) {
        float* x = weight + r * KEY_BLOCK + 16 * s;
        store16(x, load16(x) * load16(scales_of(values.at[s], padded)));
      }
  for (int64_t tiles = (rows + QUERIES - 1) / QUERIES; tiles > 0; --tiles) {
    const int64_t now = (rows + tiles - 1) / tiles;
    value_rows<T>(now, weight, values, count, padded, out);
    weight += now * KEY_BLOCK, out += now * padded, rows -= now;
  }
}

}  // namespace COPPICE_ISA
}  // namespace coppice
