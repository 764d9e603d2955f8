// Keys and values in pages: where they lie, how they are written and unfolded.
//
// A page holds groups of sixteen keys of one KV head. A group of K is the panel
// [padded][16], one lane per key, so that a query's products with sixteen keys need no
// turning; a group of V is [padded / 16][16][16]: panels of sixteen dims, one row per key.
// `padded` is the head dim in whole sixteens. bfloat16 lanes lie in packed order (vec.h).
#pragma once

#include "kernels.h"
#include "vec.h"

namespace coppice {
namespace COPPICE_ISA {

constexpr int64_t GROUP = 16;  // keys of a group

COPPICE_INLINE int64_t padded_dim(int64_t d) { return (d + 15) / 16 * 16; }

template <class T>
constexpr int place_of(int lane) {
  return sizeof(T) == 2 ? packed_place(lane) : lane;
}

// Elements of a group.
COPPICE_INLINE int64_t group_size(const Cache& c) { return GROUP * padded_dim(c.head_dim); }

// The group of `page` that holds the key at `offset` in the page.
template <class T>
COPPICE_INLINE T* group_at(const Cache& c, void* pages, int64_t page, int64_t head,
                           int64_t offset) {
  const int64_t groups = c.page_size / GROUP;
  const int64_t group = (page * c.kv_heads + head) * groups + offset / GROUP;
  return static_cast<T*>(pages) + group * group_size(c);
}

COPPICE_INLINE void round_to(const float* x, int64_t d, float* to) {
  memcpy(to, x, d * sizeof(float));
}
COPPICE_INLINE void round_to(const float* x, int64_t d, bf16* to) {
  for (int64_t j = 0; j < d; ++j) to[j] = to_bf16(x[j]);
}

// One key's K and V in their groups, `lane` being its place among the sixteen; `room` holds
// `padded` values. Padding of V is written too: it is read.
template <class T>
COPPICE_INLINE void put_key(T* group, int64_t lane, const T* x, int64_t d) {
  T* to = group + place_of<T>((int)lane);
  for (int64_t j = 0; j < d; ++j) to[16 * j] = x[j];
}
template <class T>
COPPICE_INLINE void put_value(T* group, int64_t lane, const T* x, int64_t d) {
  for (int64_t j = 0; j < d; j += 16) {
    T* to = group + 16 * (j + lane);
    for (int i = 0; i < 16; ++i) to[place_of<T>(i)] = x[j + i];
  }
}

template <class T>
COPPICE_INLINE void append(const Cache& c, int64_t page, int64_t offset, const float* k,
                           const float* v, float* room) {
  const int64_t d = c.head_dim, padded = padded_dim(d), lane = offset % GROUP;
  T* rounded = reinterpret_cast<T*>(room);
  for (int64_t j = d; j < padded; ++j) rounded[j] = 0;
  for (int64_t h = 0; h < c.kv_heads; ++h) {
    round_to(k + h * d, d, rounded);
    put_key(group_at<T>(c, c.k, page, h, offset), lane, rounded, d);
    round_to(v + h * d, d, rounded);
    put_value(group_at<T>(c, c.v, page, h, offset), lane, rounded, d);
  }
}

// Copies of one key's K and V from group to group (of a token tree: ancestors side by side).
template <class T>
COPPICE_INLINE void copy_key(const T* from, int64_t lane, T* to, int64_t to_lane, int64_t d) {
  from += place_of<T>((int)lane), to += place_of<T>((int)to_lane);
  for (int64_t j = 0; j < d; ++j) to[16 * j] = from[16 * j];
}
template <class T>
COPPICE_INLINE void copy_value(const T* from, int64_t lane, T* to, int64_t to_lane, int64_t d) {
  for (int64_t j = 0; j < d; j += 16)
    memcpy(to + 16 * (j + to_lane), from + 16 * (j + lane), 16 * sizeof(T));
}

}  // namespace COPPICE_ISA
}  // namespace coppice
