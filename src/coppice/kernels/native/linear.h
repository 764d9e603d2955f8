// y = x W^T over weights packed in panels of sixteen output features, [n/16][k][16].
//
// Each lane adds its products over k in order, one fused multiply-add at a time, from zero.
// Tile shape, blocking over k (partial sums rest in memory in float32) and threading only
// choose which outputs are computed together, so a row's result never depends on the rest
// of the batch. Structure of the blocked path: Goto and van de Geijn, Anatomy of
// High-Performance Matrix Multiplication (TOMS 2008).
#pragma once

#include "finish.h"
#include "kernels.h"
#include "unfold.h"

namespace coppice {
namespace COPPICE_ISA {

// Rows of a register tile: as many accumulators as the registers hold.
constexpr int ROWS = W == 16 ? 12 : W == 8 ? 6 : 3;
constexpr int REGISTERS = W == 16 ? 32 : 16;
constexpr int WIDE = W == 16 ? 2 : 1;  // panels beside each other in the blocked path
constexpr int FEW_ROWS = 2 * ROWS;     // up to here weights go straight from memory to use
// Of k at a time: a panel block is 16 KiB, half of L1, in bfloat16 or (AVX-512) expanded.
constexpr int64_t K_BLOCK = W == 16 ? 256 : 512;
constexpr int64_t X_STRIDE = K_BLOCK + 16;  // off powers of two, or rows share cache sets
constexpr int64_t ROW_BLOCK = 96;           // these rows of x stay in L2

// Panels one register tile of R rows spans when weights are read once (few rows).
constexpr int panels_for(int rows) {
  int budget = (W == 16 ? 24 : W == 8 ? 12 : 12) / (rows * NV);
  int cap = W == 16 ? 8 : 4;
  return budget >= cap ? cap : budget >= 4 ? 4 : budget >= 2 ? 2 : 1;
}

// out[r][16 b + lane] (+)= sum over k of x[r][k] * panel b [k][lane], R rows by B panels.
template <int R, int B, class T>
COPPICE_INLINE void multiply(const float* __restrict x, int64_t x_stride,
                             const T* __restrict w, int64_t panel_stride, int64_t k,
                             float* __restrict out, int64_t out_stride, bool resume) {
  constexpr bool FULL = R * B * NV + R + 3 > REGISTERS;
  // Between the bandwidth-bound and the arithmetic-bound ends the hardware fetches too late.
  constexpr bool AHEAD = R >= (sizeof(T) == 2 ? 2 : 4);
  V16 acc[R][B];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b)
      acc[r][b] = resume ? load16(out + r * out_stride + 16 * b) : splat(0.0f);
  for (int64_t j = 0; j < k; ++j) {
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      const T* place = w + b * panel_stride + 16 * j;
      const V16 panel = load_packed(place);
      if (AHEAD) __builtin_prefetch(reinterpret_cast<const char*>(place) + 2048);
      // Where accumulators fill the registers, x values are loaded anew for each panel: the
      // compiler would rather keep them and spill.
      if (FULL) asm("" : "+r"(x));
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
        acc[r][b] = fma(splat(x[r * x_stride + j]), panel, acc[r][b]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) store16(out + r * out_stride + 16 * b, acc[r][b]);
}

template <int R, int B, class T>
static void multiply_tile(const float* x, int64_t x_stride, const T* w, int64_t panel_stride,
                          int64_t k, float* out, int64_t out_stride, bool resume) {
  multiply<R, B, T>(x, x_stride, w, panel_stride, k, out, out_stride, resume);
}

// The same for any row count: rows are shared out evenly over register tiles.
template <int B, class T, int R = ROWS>
static void multiply_rows(int64_t rows, const float* x, int64_t x_stride, const T* w,
                          int64_t panel_stride, int64_t k, float* out, int64_t out_stride,
                          bool resume) {
  if constexpr (R > 1) {
    if (rows < R) {
      return multiply_rows<B, T, R - 1>(rows, x, x_stride, w, panel_stride, k, out, out_stride,
                                        resume);
    }
  }
  multiply_tile<R, B, T>(x, x_stride, w, panel_stride, k, out, out_stride, resume);
}

template <int B, class T>
static void multiply_all(int64_t rows, const float* x, int64_t x_stride, const T* w,
                         int64_t panel_stride, int64_t k, float* out, int64_t out_stride,
                         bool resume) {
  for (int64_t tiles = (rows + ROWS - 1) / ROWS; tiles > 0; --tiles) {
    const int64_t now = (rows + tiles - 1) / tiles;
    multiply_rows<B, T>(now, x, x_stride, w, panel_stride, k, out, out_stride, resume);
    x += now * x_stride;
    out += now * out_stride;
    rows -= now;
  }
}

// Few rows: every weight is read once, straight from its packed form. Panels side by side are
// far apart, so that each is followed by the next of its run: memory is read in B long streams.
template <int R, class T>
static void few_rows(const LinearArgs& a, int64_t begin, int64_t end) {
  constexpr int B = panels_for(R);
  const T* w = static_cast<const T*>(a.w.data);
  const int64_t k = a.w.k, run = (end - begin) / B;
  float tile[R * B * 16];
  for (int64_t p = begin; p < begin + run; ++p) {
    multiply<R, B, T>(a.x, k, w + p * k * 16, run * k * 16, k, tile, B * 16, false);
    for (int b = 0; b < B; ++b) finish(a, tile + 16 * b, B * 16, 0, R, p + b * run);
  }
  for (int64_t p = begin + B * run; p < end; ++p) {
    multiply_tile<R, 1, T>(a.x, k, w + p * k * 16, k * 16, k, tile, 16, false);
    finish(a, tile, 16, 0, R, p);
  }
}

// Two tiles of rows: the second finds the panel in L2.
template <class T>
static void two_tiles(const LinearArgs& a, int64_t begin, int64_t end) {
  const T* w = static_cast<const T*>(a.w.data);
  const int64_t k = a.w.k;
  float tile[2 * ROWS * 16];
  for (int64_t p = begin; p < end; ++p) {
    multiply_all<1, T>(a.rows, a.x, k, w + p * k * 16, 0, k, tile, 16, false);
    finish(a, tile, 16, 0, a.rows, p);
  }
}

template <class T, int R = ROWS>
static void few_rows_any(const LinearArgs& a, int64_t begin, int64_t end) {
  if (a.rows > ROWS) return two_tiles<T>(a, begin, end);
  if constexpr (R > 1) {
    if (a.rows < R) return few_rows_any<T, R - 1>(a, begin, end);
  }
  few_rows<R, T>(a, begin, end);
}

struct Codes {};  // in place of an element type: a quantized weight

// One block of k for all rows of a task and B panels side by side. Codes are first unfolded to
// float32, and so is bfloat16 on AVX-512: there unfolding competes with the multipliers.
template <int B, class T>
static void panel_block(const Packed& w, int64_t p, int64_t k0, int64_t kc, int64_t rows,
                        const float* x, float* scratch, float* out) {
  const T* block = static_cast<const T*>(w.data) + (p * w.k + k0) * 16;
  if constexpr (sizeof(T) == 4 || (W < 16 && sizeof(T) == 2)) {
    multiply_all<B, T>(rows, x, X_STRIDE, block, w.k * 16, kc, out, WIDE * 16, k0 > 0);
  } else {
    for (int b = 0; b < B; ++b) {
      float* to = scratch + b * kc * 16;
      if constexpr (sizeof(T) == 2)
        for (int64_t j = 0; j < kc; ++j)
          store16(to + j * 16, load_packed(block + b * w.k * 16 + 16 * j));
      else
        unfold(w, p + b, k0, kc, to);
    }
    multiply_all<B, float>(rows, x, X_STRIDE, scratch, kc * 16, kc, out, WIDE * 16, k0 > 0);
  }
}

// Many rows: x rows rest in L2, one panel block in L1, sums in scratch.
template <class T>
static void many_rows(const LinearArgs& a, int64_t row, int64_t rows, int64_t begin, int64_t end,
                      float* scratch) {
  float* x = scratch;                         // [ROW_BLOCK][X_STRIDE]
  float* panel = x + ROW_BLOCK * X_STRIDE;    // [WIDE][K_BLOCK][16]
  float* sums = panel + WIDE * K_BLOCK * 16;  // [panels / WIDE][ROW_BLOCK][WIDE * 16]
  const int64_t k = a.w.k;
  for (int64_t k0 = 0; k0 < k; k0 += K_BLOCK) {
    const int64_t kc = min64(K_BLOCK, k - k0);
    for (int64_t r = 0; r < rows; ++r)
      memcpy(x + r * X_STRIDE, a.x + (row + r) * k + k0, kc * sizeof(float));
    for (int64_t p = begin; p < end; p += WIDE) {
      float* out = sums + (p - begin) * ROW_BLOCK * 16;
      if (end - p >= WIDE)
        panel_block<WIDE, T>(a.w, p, k0, kc, rows, x, panel, out);
      else
        panel_block<1, T>(a.w, p, k0, kc, rows, x, panel, out);
    }
  }
  for (int64_t p = begin; p < end; ++p) {
    const int64_t group = (p - begin) / WIDE, b = (p - begin) % WIDE;
    finish(a, sums + group * WIDE * ROW_BLOCK * 16 + 16 * b, WIDE * 16, row, rows, p);
  }
}

constexpr int64_t MAX_PANELS = 16;  // panels of a many-rows task: sums take at most 96 KiB
constexpr int64_t LINEAR_FLOATS =
    ROW_BLOCK * X_STRIDE + WIDE * K_BLOCK * 16 + MAX_PANELS * ROW_BLOCK * 16;

static void linear(const LinearArgs& a, int64_t task, float* scratch) {
  const int64_t share = task % a.shares.tasks();
  const int64_t begin = a.shares.begin(share), end = a.shares.end(share);
  const bool is_bf16 = a.w.format == STORE_BF16;
  if (a.rows <= FEW_ROWS && !is_quantized(a.w)) {
    if (is_bf16) return few_rows_any<bf16>(a, begin, end);
    return few_rows_any<float>(a, begin, end);
  }
  const int64_t row = task / a.shares.tasks() * ROW_BLOCK;
  const int64_t rows = min64(ROW_BLOCK, a.rows - row);
  if (is_quantized(a.w)) return many_rows<Codes>(a, row, rows, begin, end, scratch);
  if (is_bf16) return many_rows<bf16>(a, row, rows, begin, end, scratch);
  many_rows<float>(a, row, rows, begin, end, scratch);
}

COPPICE_INLINE float read_element(const void* p, int64_t i, bool is_bf16) {
  return is_bf16 ? to_float(static_cast<const bf16*>(p)[i]) : static_cast<const float*>(p)[i];
}

// Rows of one panel; k in short blocks, so that the lines written stay in L1.
static void pack(const PackArgs& a) {
  constexpr int64_t BLOCK = 64;
  const int64_t k = a.w.k;
  void* weight = const_cast<void*>(a.w.data);
  for (int64_t j0 = 0; j0 < k; j0 += BLOCK) {
    const int64_t end = min64(k, j0 + BLOCK);
    for (int64_t i = 0; i < a.count; ++i) {
      const int64_t n = a.first + i, base = n / 16 * k * 16;
      const int lane = (int)(n % 16), place = packed_place(lane);
      for (int64_t j = j0; j < end; ++j) {
        const float value = read_element(a.source, i * k + j, a.source_bf16);
        if (a.w.format == STORE_BF16)
          static_cast<bf16*>(weight)[base + j * 16 + place] = to_bf16(value);
        else
          static_cast<float*>(weight)[base + j * 16 + lane] = value;
      }
    }
  }
}

// Row n of the matrix, back in float32 order.
COPPICE_INLINE void unpack_row(const Packed& p, int64_t n, float* out) {
  const int64_t base = n / 16 * p.k * 16;
  const int lane = (int)(n % 16), place = packed_place(lane);
  if (p.format == STORE_BF16) {
    const bf16* w = static_cast<const bf16*>(p.data) + base + place;
    for (int64_t j = 0; j < p.k; ++j) out[j] = to_float(w[16 * j]);
  } else {
    const float* w = static_cast<const float*>(p.data) + base + lane;
    for (int64_t j = 0; j < p.k; ++j) out[j] = w[16 * j];
  }
}

static void unpack(const Packed& w, float* out) {
  for (int64_t i = 0; i < w.n; ++i) unpack_row(w, i, out + i * w.k);
}

static void gather(const Packed& w, const int32_t* token, int64_t rows, float* out) {
  for (int64_t i = 0; i < rows; ++i) unpack_row(w, token[i], out + i * w.k);
}

}  // namespace COPPICE_ISA
}  // namespace coppice
