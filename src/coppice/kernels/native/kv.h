// Keys and values in pages: where they lie, how they are written and unfolded.
//
// A page holds groups of sixteen keys of one KV head. A group of K is the panel
// [padded][16], one lane per key, so that a query's products with sixteen keys need no
// turning; a group of V is [padded / 16][16][16]: panels of sixteen dims, one row per key.
// `padded` is the head dim in whole sixteens. bfloat16 lanes lie in packed order (vec.h). An int8
// group ends with sixteen float32 scales: a key's codes times its scale are its values.
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

template <class T>
constexpr bool SCALED = sizeof(T) == 1;

// Elements of a group.
template <class T>
COPPICE_INLINE int64_t group_size(const Cache& c) {
  return GROUP * padded_dim(c.head_dim) + (SCALED<T> ? GROUP * (int64_t)sizeof(float) : 0);
}

// The scales of an int8 group's keys.
COPPICE_INLINE const float* scales_of(const int8_t* group, int64_t d) {
  return reinterpret_cast<const float*>(group + GROUP * padded_dim(d));
}
COPPICE_INLINE float* scales_of(int8_t* group, int64_t d) {
  return reinterpret_cast<float*>(group + GROUP * padded_dim(d));
}

// Sixteen elements of a line as floats, lane by lane.
COPPICE_INLINE V16 unfold(const float* p) { return load16(p); }
COPPICE_INLINE V16 unfold(const bf16* p) { return load_packed(p); }
COPPICE_INLINE V16 unfold(const int8_t* p) {
  V16 r;
#if defined(__AVX512F__)
  r.v[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__) && defined(COPPICE_WIDE)
  for (int i = 0; i < 2; ++i) {
    const __m128i codes = _mm_loadl_epi64((const __m128i*)(p + 8 * i));
    const __m256 half = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
    memcpy(reinterpret_cast<char*>(&r) + 32 * i, &half, 32);
  }
#elif defined(__AVX2__)
  COPPICE_EACH {
    const __m128i codes = _mm_loadl_epi64((const __m128i*)(p + 8 * i));
    r.v[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
  }
#else
  float s[16];
  for (int i = 0; i < 16; ++i) s[i] = (float)p[i];
  r = load16(s);
#endif
  return r;
}

// The group of `page` that holds the key at `offset` in the page.
template <class T>
COPPICE_INLINE T* group_at(const Cache& c, void* pages, int64_t page, int64_t head,
                           int64_t offset) {
  const int64_t groups = c.page_size / GROUP;
  const int64_t group = (page * c.kv_heads + head) * groups + offset / GROUP;
  return static_cast<T*>(pages) + group * group_size<T>(c);
}

// One head in the pages' type. The result is its scale, of use to int8 alone: the largest size
// over 127, so that codes reach from -127 to 127. A head with a value that is no number gets
// a scale that is none, which whoever attends to it will see.
COPPICE_INLINE float round_to(const float* x, int64_t d, float* to) {
  memcpy(to, x, d * sizeof(float));
  return 1.0f;
}
COPPICE_INLINE float round_to(const float* x, int64_t d, bf16* to) {
  for (int64_t j = 0; j < d; ++j) to[j] = to_bf16(x[j]);
  return 1.0f;
}
COPPICE_INLINE float round_to(const float* x, int64_t d, int8_t* to) {
  const V16 zero = splat(0.0f), magic = splat(12582912.0f);  // 1.5 * 2^23: sums are integers
  V16 top = zero, bad = zero;
  for (int64_t j = 0; j < d; j += 16) {
    const V16 v = load_part(x + j, min64(16, d - j));
    top = max(top, where_less(v, zero, zero - v, v));
    bad = fma(v, zero, bad);
  }
  const float most = max_lane(top), fault = sum(bad);
  const bool some = most >= 1e-30f;  // below, 127 / most would leave the range
  const float inverse = some ? 127.0f / most : 0.0f;
  for (int64_t j = 0; j < d; j += 16) {
    const V16 shifted = load_part(x + j, min64(16, d - j)) * splat(inverse) + magic;
    int32_t bits[16];
    memcpy(bits, &shifted, sizeof(bits));
    for (int64_t i = 0; i < min64(16, d - j); ++i) to[j + i] = (int8_t)(bits[i] - 0x4b400000);
  }
  return (some ? most / 127.0f : 0.0f) + fault;
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
    T* keys = group_at<T>(c, c.k, page, h, offset);
    T* values = group_at<T>(c, c.v, page, h, offset);
    const float k_scale = round_to(k + h * d, d, rounded);
    put_key(keys, lane, rounded, d);
    const float v_scale = round_to(v + h * d, d, rounded);
    put_value(values, lane, rounded, d);
    if constexpr (SCALED<T>)
      scales_of(keys, d)[lane] = k_scale, scales_of(values, d)[lane] = v_scale;
  }
}

// Copies of one key's K and V from group to group (of a token tree: ancestors side by side).
template <class T>
COPPICE_INLINE void copy_key(const T* from, int64_t lane, T* to, int64_t to_lane, int64_t d) {
  if constexpr (SCALED<T>) scales_of(to, d)[to_lane] = scales_of(from, d)[lane];
  from += place_of<T>((int)lane), to += place_of<T>((int)to_lane);
  for (int64_t j = 0; j < d; ++j) to[16 * j] = from[16 * j];
}
template <class T>
COPPICE_INLINE void copy_value(const T* from, int64_t lane, T* to, int64_t to_lane, int64_t d) {
  if constexpr (SCALED<T>) scales_of(to, d)[to_lane] = scales_of(from, d)[lane];
  for (int64_t j = 0; j < d; j += 16)
    memcpy(to + 16 * (j + to_lane), from + 16 * (j + lane), 16 * sizeof(T));
}

}  // namespace COPPICE_ISA
}  // namespace coppice
