// Sixteen int32 sums at a time, each over products of bytes: the integer half of quantized
// layers. Exact on every instruction set, so how it is done never shows in a result.
//
// A weight line is 64 bytes, sixteen output features by four inputs; four inputs of a row are
// broadcast to all lanes. Three ways to multiply them, all without saturation:
//
//   VNNI   vpdpbusd: weights unsigned (their sign bit is flipped, which adds 128 to each; the
//          sum starts at -128 times the row's), row codes signed.
//   AVX2   vpmaddubsw of |x| and w with x's sign, then pairs are widened. Codes are within
//          +-127, so a pair is below 2^15.
//   other  even and odd bytes as int16, multiplied and added in pairs (vpmaddwd).
#pragma once

#include "vec.h"

namespace coppice {
namespace COPPICE_ISA {

struct I16 {
  vi v[NV];
};

#if defined(__x86_64__) && (defined(__AVX512F__) || !defined(COPPICE_WIDE))
// Keeps the compiler from reordering a chain of additions, which costs it registers.
COPPICE_INLINE void pin(vi& x) { asm("" : "+v"(x)); }
#else
COPPICE_INLINE void pin(vi&) {}
#endif

COPPICE_INLINE vi isplat(int32_t x) { return x - vi{}; }
COPPICE_INLINE vi broadcast4(const int8_t* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return isplat(x);
}
COPPICE_INLINE V16 to_float(I16 a) {
  V16 r;
  COPPICE_EACH r.v[i] = __builtin_convertvector(a.v[i], vf);
  return r;
}
COPPICE_INLINE I16 load_line(const int8_t* p) {
  I16 r;
  COPPICE_EACH memcpy(&r.v[i], p + 4 * W * i, sizeof(vi));
  return r;
}
COPPICE_INLINE void store_lanes(int32_t* p, const I16& a) {
  COPPICE_EACH memcpy(p + W * i, &a.v[i], sizeof(vi));
}
// Sixteen bytes, 0 to 255, one per lane.
COPPICE_INLINE I16 load_unsigned(const uint8_t* p) {
  typedef uint8_t vb __attribute__((vector_size(W)));
  I16 r;
  COPPICE_EACH {
    vb part;
    memcpy(&part, p + i * W, W);
    r.v[i] = __builtin_convertvector(part, vi);
  }
  return r;
}

// Per 32-bit lane: low halves multiplied plus high halves multiplied, as signed int16.
COPPICE_INLINE vi madd(vi a, vi b) {
#if defined(__AVX512F__)
  return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && !defined(COPPICE_WIDE)
  return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__) && !defined(COPPICE_WIDE)
  return (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return ((vi)((vu)a << 16) >> 16) * ((vi)((vu)b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || \
    (defined(COPPICE_WIDE) && !defined(__AVX512F__))

constexpr int X_BYTES = 1;    // of a quantized row, per input
constexpr int INT8_ADDS = 128;  // what load_int8 adds to a code

struct Bytes {
  vi v[NV];
};
struct X4 {
  vi x;
};

COPPICE_INLINE X4 load_x(const int8_t* p) { return {broadcast4(p)}; }
COPPICE_INLINE Bytes load_int8(const int8_t* p) {
  const I16 line = load_line(p);
  Bytes r;
  COPPICE_EACH r.v[i] = line.v[i] ^ (int32_t)0x80808080;
  return r;
}
COPPICE_INLINE vi dot(vi sum, vi w, vi x) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#elif defined(__AVXVNNI__)
  return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)x);
#else  // what the instruction does
  for (int byte = 0; byte < 4; ++byte)
    sum += ((w >> 8 * byte) & 255) * ((vi)((vu)x << (24 - 8 * byte)) >> 24);
  return sum;
#endif
}
COPPICE_INLINE void dot(I16& sum, const Bytes& w, const X4& x) {
  COPPICE_EACH sum.v[i] = dot(sum.v[i], w.v[i], x.x);
}
COPPICE_INLINE void nibbles(const int8_t* p, Bytes& low, Bytes& high) {
  const I16 line = load_line(p);
  COPPICE_EACH {
    low.v[i] = line.v[i] & 0x0f0f0f0f;
    high.v[i] = (line.v[i] >> 4) & 0x0f0f0f0f;
  }
}

#elif defined(__AVX2__) && !defined(COPPICE_WIDE)

#define COPPICE_SIGN
constexpr int X_BYTES = 2;  // four codes, then their magnitudes
constexpr int INT8_ADDS = 0;

struct Bytes {
  vi v[NV];
};
struct X4 {
  vi x, size;
};

COPPICE_INLINE X4 load_x(const int8_t* p) { return {broadcast4(p), broadcast4(p + 4)}; }
COPPICE_INLINE Bytes load_int8(const int8_t* p) {
  const I16 line = load_line(p);
  Bytes r;
  COPPICE_EACH r.v[i] = line.v[i];
  return r;
}
COPPICE_INLINE void dot(I16& sum, const Bytes& w, const X4& x) {
  COPPICE_EACH {
    const __m256i with_sign = _mm256_sign_epi8((__m256i)w.v[i], (__m256i)x.x);
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)x.size, with_sign);
    sum.v[i] += madd((vi)pairs, (vi)_mm256_set1_epi16(1));
    pin(sum.v[i]);
  }
}

#else

constexpr int X_BYTES = 2;  // codes 0 and 2 of four as int16, then codes 1 and 3
constexpr int INT8_ADDS = 0;

struct Bytes {
  vi even[NV], odd[NV];
};
struct X4 {
  vi even, odd;
};

COPPICE_INLINE vi high_bytes(vi x) {  // of each int16, with their sign
#if defined(__AVX512F__)
  return (vi)_mm512_srai_epi16((__m512i)x, 8);
#else
  typedef int16_t vh __attribute__((vector_size(4 * W)));
  return (vi)((vh)x >> 8);
#endif
}
COPPICE_INLINE X4 load_x(const int8_t* p) { return {broadcast4(p), broadcast4(p + 4)}; }
COPPICE_INLINE Bytes load_int8(const int8_t* p) {
  const I16 line = load_line(p);
  Bytes r;
  COPPICE_EACH {
    r.even[i] = high_bytes((vi)(((vu)line.v[i] << 8) & 0xff00ff00u));
    r.odd[i] = high_bytes(line.v[i]);
  }
  return r;
}
COPPICE_INLINE void dot(I16& sum, const Bytes& w, const X4& x) {
  COPPICE_EACH {
    sum.v[i] += madd(w.even[i], x.even);
    pin(sum.v[i]);
    sum.v[i] += madd(w.odd[i], x.odd);
    pin(sum.v[i]);
  }
}
COPPICE_INLINE void nibbles(const int8_t* p, Bytes& low, Bytes& high) {
  const I16 line = load_line(p);
  COPPICE_EACH {
    const vu x = (vu)line.v[i];
    low.even[i] = (vi)(x & 0x000f000fu);
    low.odd[i] = (vi)((x >> 8) & 0x000f000fu);
    high.even[i] = (vi)((x >> 4) & 0x000f000fu);
    high.odd[i] = (vi)((x >> 12) & 0x000f000fu);
  }
}

#endif

// Sixteen codes (lanes of int32, -127 to 127) in the order load_x wants; 16 * X_BYTES bytes.
COPPICE_INLINE void store_codes(int8_t* p, const I16& codes) {
#if defined(__AVX512VNNI__)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)codes.v[0]));
#elif defined(COPPICE_SIGN)
  const __m256i a = (__m256i)codes.v[0], b = (__m256i)codes.v[1];
  const __m256i words = _mm256_packs_epi32(a, b);
  const __m256i bytes = _mm256_packs_epi16(words, _mm256_abs_epi16(words));
  const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  _mm256_storeu_si256((__m256i*)p, _mm256_permutevar8x32_epi32(bytes, order));
#else
  int32_t c[16];
  store_lanes(c, codes);
  if (X_BYTES == 1) {
    for (int i = 0; i < 16; ++i) p[i] = (int8_t)c[i];
  } else {
    int16_t pairs[16];
    for (int i = 0; i < 16; i += 4)
      pairs[i] = (int16_t)c[i], pairs[i + 1] = (int16_t)c[i + 2],
      pairs[i + 2] = (int16_t)c[i + 1], pairs[i + 3] = (int16_t)c[i + 3];
    memcpy(p, pairs, 32);
  }
#endif
}

// Sums over 32 inputs, R rows by B panels: eight lines of int8 or four of int4 per panel.
struct Int8 {
  static constexpr int LINES = 8;
  static constexpr int ADDS = INT8_ADDS;

  template <int R, int B>
  COPPICE_INLINE void add(I16 (&sum)[R][B], const int8_t* w, int64_t panel_stride,
                          const int8_t* x, int64_t x_stride) {
#pragma GCC unroll 8
    for (int q = 0; q < LINES; ++q) {
      Bytes line[B];
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) line[b] = load_int8(w + b * panel_stride + 64 * q);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const X4 four = load_x(x + r * x_stride + 4 * X_BYTES * q);
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) dot(sum[r][b], line[b], four);
      }
    }
  }
};

// Codes are stored unsigned: low nibbles are inputs 0 to 3, high nibbles 4 to 7.
struct Int4 {
  static constexpr int LINES = 4;
  static constexpr int ADDS = 8;

  template <int R, int B>
  COPPICE_INLINE void add(I16 (&sum)[R][B], const int8_t* w, int64_t panel_stride,
                          const int8_t* x, int64_t x_stride) {
#if defined(COPPICE_SIGN)
    // Eight products of 15 by 127, twice, fit an int16.
    I16 part[R][B];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) part[r][b] = {};
#pragma GCC unroll 4
    for (int q = 0; q < LINES; ++q) {
      I16 line[B];
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) line[b] = load_line(w + b * panel_stride + 64 * q);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half)
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const __m256i four = (__m256i)broadcast4(x + r * x_stride + 16 * q + 8 * half);
#pragma GCC unroll 4
          for (int b = 0; b < B; ++b)
            COPPICE_EACH {
              const vi code = (line[b].v[i] >> 4 * half) & 0x0f0f0f0f;
              const __m256i pairs = _mm256_maddubs_epi16((__m256i)code, four);
              part[r][b].v[i] = (vi)_mm256_add_epi16((__m256i)part[r][b].v[i], pairs);
              pin(part[r][b].v[i]);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b)
        COPPICE_EACH sum[r][b].v[i] += madd(part[r][b].v[i], (vi)_mm256_set1_epi16(1));
#else
#pragma GCC unroll 4
    for (int q = 0; q < LINES; ++q) {
      Bytes low[B], high[B];
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) nibbles(w + b * panel_stride + 64 * q, low[b], high[b]);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const int8_t* at = x + r * x_stride + 8 * X_BYTES * q;
        const X4 first = load_x(at), second = load_x(at + 4 * X_BYTES);
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) {
          dot(sum[r][b], low[b], first);
          dot(sum[r][b], high[b], second);
        }
      }
    }
#endif
  }
};

}  // namespace COPPICE_ISA
}  // namespace coppice
