// Sixteen floats at a time, the same arithmetic on every instruction set.
//
// Included only by isa.cpp, which is compiled once per instruction set with
// COPPICE_ISA naming the namespace. All kernels are written over V16; how many machine
// registers a V16 takes is the only difference. Rules that keep AVX2 and AVX-512 equal bit
// for bit: fused multiply-add is always explicit (the compiler may not contract), sums
// across lanes follow one fixed tree, and nothing here depends on the register width W.
//
// No standard library templates are used in these files: the linker keeps one copy of an
// inline function, and it could be the one compiled for a newer machine than the user's.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define COPPICE_INLINE static inline __attribute__((always_inline))

namespace coppice {
namespace COPPICE_ISA {

#if defined(__AVX512F__)
#define COPPICE_WIDE
constexpr int W = 16;
typedef __m512 vf;
COPPICE_INLINE vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
COPPICE_INLINE vf vsplat(float x) { return _mm512_set1_ps(x); }
#elif defined(COPPICE_WIDE)
// What AVX-512 does, on AVX2: for tests of its shapes on machines that lack it.
constexpr int W = 16;
typedef float vf __attribute__((vector_size(64)));
COPPICE_INLINE vf vsplat(float x) { return x - vf{}; }
COPPICE_INLINE vf vfma(vf a, vf b, vf c) {
  __m256 x[2], y[2], z[2];
  memcpy(x, &a, sizeof(a)), memcpy(y, &b, sizeof(b)), memcpy(z, &c, sizeof(c));
  for (int i = 0; i < 2; ++i) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
  memcpy(&c, z, sizeof(c));
  return c;
}
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int W = 8;
typedef __m256 vf;
COPPICE_INLINE vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
COPPICE_INLINE vf vsplat(float x) { return _mm256_set1_ps(x); }
#elif defined(__ARM_NEON)
constexpr int W = 4;
typedef float32x4_t vf;
COPPICE_INLINE vf vfma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
COPPICE_INLINE vf vsplat(float x) { return vdupq_n_f32(x); }
#else
constexpr int W = 4;
typedef float vf __attribute__((vector_size(16)));
COPPICE_INLINE vf vfma(vf a, vf b, vf c) { return a * b + c; }
COPPICE_INLINE vf vsplat(float x) { return vf{x, x, x, x}; }
#endif

constexpr int NV = 16 / W;  // registers in a V16
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t bf16;

struct V16 {
  vf v[NV];
};

#define COPPICE_EACH _Pragma("GCC unroll 4") for (int i = 0; i < NV; ++i)


COPPICE_INLINE V16 splat(float x) {
  V16 r;
  COPPICE_EACH r.v[i] = vsplat(x);
  return r;
}
COPPICE_INLINE V16 load16(const float* p) {
  V16 r;
  COPPICE_EACH memcpy(&r.v[i], p + i * W, sizeof(vf));
  return r;
}
COPPICE_INLINE void store16(float* p, V16 a) {
  COPPICE_EACH memcpy(p + i * W, &a.v[i], sizeof(vf));
}
COPPICE_INLINE V16 operator+(V16 a, V16 b) {
  COPPICE_EACH a.v[i] += b.v[i];
  return a;
}
COPPICE_INLINE V16 operator-(V16 a, V16 b) {
  COPPICE_EACH a.v[i] -= b.v[i];
  return a;
}
COPPICE_INLINE V16 operator*(V16 a, V16 b) {
  COPPICE_EACH a.v[i] *= b.v[i];
  return a;
}
COPPICE_INLINE V16 operator/(V16 a, V16 b) {
  COPPICE_EACH a.v[i] /= b.v[i];
  return a;
}
COPPICE_INLINE V16 fma(V16 a, V16 b, V16 c) {
  COPPICE_EACH a.v[i] = vfma(a.v[i], b.v[i], c.v[i]);
  return a;
}
// a < b ? x : y, per lane; comparisons with NaN are false.
COPPICE_INLINE V16 where_less(V16 a, V16 b, V16 x, V16 y) {
  COPPICE_EACH x.v[i] = a.v[i] < b.v[i] ? x.v[i] : y.v[i];
  return x;
}
COPPICE_INLINE V16 max(V16 a, V16 b) { return where_less(a, b, b, a); }

// Lanes are added i and i+8, then i and i+4, and so on: one tree on every machine.
COPPICE_INLINE float sum(V16 a) {
  float s[16];
  store16(s, a);
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) s[i] += s[i + half];
  return s[0];
}
COPPICE_INLINE float max_lane(V16 a) {
  float s[16];
  store16(s, a);
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) s[i] = s[i] < s[i + half] ? s[i + half] : s[i];
  return s[0];
}
COPPICE_INLINE float lane0(V16 a) { return a.v[0][0]; }

// First n of 16 values, the rest zero: never reads past the end.
COPPICE_INLINE V16 load_part(const float* p, int64_t n) {
  float s[16] = {};
  memcpy(s, p, n * sizeof(float));
  return load16(s);
}
COPPICE_INLINE void store_part(float* p, V16 a, int64_t n) {
  float s[16];
  store16(s, a);
  memcpy(p, s, n * sizeof(float));
}

// Sixteen bfloat16 in lane order.
COPPICE_INLINE V16 load16(const bf16* p) {
  typedef uint16_t vs __attribute__((vector_size(2 * W)));
  V16 r;
  COPPICE_EACH {
    vs half;
    memcpy(&half, p + i * W, sizeof(half));
    r.v[i] = (vf)(__builtin_convertvector(half, vu) << 16);
  }
  return r;
}
COPPICE_INLINE V16 load_part(const bf16* p, int64_t n) {
  bf16 s[16] = {};
  memcpy(s, p, n * sizeof(bf16));
  return load16(s);
}

// Sixteen float16 values, exactly.
COPPICE_INLINE V16 load_half(const uint16_t* p) {
  V16 r;
#if defined(__AVX512F__)
  r.v[0] = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__) && !defined(COPPICE_WIDE)
  COPPICE_EACH r.v[i] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + W * i)));
#else
  typedef uint16_t vs __attribute__((vector_size(2 * W)));
  COPPICE_EACH {
    vs half;
    memcpy(&half, p + W * i, sizeof(half));
    const vu bits = __builtin_convertvector(half, vu);
    const vf size = (vf)((bits & 0x7fff) << 13) * vsplat(0x1p112f);
    r.v[i] = (vf)((vu)size | (bits & 0x8000) << 16);
  }
#endif
  return r;
}

// Sixteen bfloat16 of a packed panel: place 2i holds lane i, place 2i+1 holds lane 8+i, so
// a shift and a mask unfold them without shuffling (see docs/internals/kernels.md).
COPPICE_INLINE V16 load_packed(const float* p) { return load16(p); }
COPPICE_INLINE V16 load_packed(const bf16* p) {
  V16 r;
#ifdef COPPICE_WIDE
  const vi lanes = {0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15};
  r.v[0] = __builtin_shuffle(load16(p).v[0], lanes);
#else
  _Pragma("GCC unroll 4") for (int i = 0; i < NV / 2; ++i) {
    vu both;
    memcpy(&both, p + 2 * i * W, sizeof(both));
    r.v[i] = (vf)(both << 16);
    r.v[i + NV / 2] = (vf)(both & 0xffff0000u);
  }
#endif
  return r;
}
COPPICE_INLINE int packed_place(int lane) { return lane < 8 ? 2 * lane : 2 * (lane - 8) + 1; }

// Nearest bfloat16, ties to even; NaN stays NaN.
COPPICE_INLINE bf16 to_bf16(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return (bf16)((u >> 16) | 0x40u);
  return (bf16)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
COPPICE_INLINE float to_float(bf16 x) {
  uint32_t u = (uint32_t)x << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
COPPICE_INLINE float to_float(float x) { return x; }

COPPICE_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
COPPICE_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace COPPICE_ISA
}  // namespace coppice
