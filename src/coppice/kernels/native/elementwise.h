// Norms, gated activations, and rotary embedding with the append to the KV pages.
#pragma once

#include "kernels.h"
#include "kv.h"
#include "math.h"

namespace coppice {
namespace COPPICE_ISA {

// 1 / sqrt(mean(x^2) + eps): four V16 partial sums in turn, then one tree.
COPPICE_INLINE float inverse_rms(const float* x, int64_t n, float eps) {
  V16 part[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
  int64_t j = 0;
  for (; j + 64 <= n; j += 64)
    for (int u = 0; u < 4; ++u) {
      const V16 v = load16(x + j + 16 * u);
      part[u] = fma(v, v, part[u]);
    }
  for (int u = 0; j < n; j += 16, ++u) {
    const V16 v = j + 16 <= n ? load16(x + j) : load_part(x + j, n - j);
    part[u] = fma(v, v, part[u]);
  }
  const float total = sum((part[0] + part[1]) + (part[2] + part[3]));
  return 1.0f / __builtin_sqrtf(total / (float)n + eps);
}

COPPICE_INLINE void norm_row(const float* x, const float* weight, float* out, int64_t n,
                             float eps) {
  const V16 scale = splat(inverse_rms(x, n, eps));
  int64_t j = 0;
  for (; j + 16 <= n; j += 16) store16(out + j, load16(x + j) * scale * load16(weight + j));
  if (j < n)
    store_part(out + j, load_part(x + j, n - j) * scale * load_part(weight + j, n - j), n - j);
}

static void norm(const NormArgs& a, int64_t row) {
  norm_row(a.x + row * a.n, a.weight, a.out + row * a.n, a.n, a.eps);
}

template <int KIND>
COPPICE_INLINE V16 activate(V16 x) {
  return KIND == 0 ? silu16(x) : KIND == 1 ? gelu_tanh16(x) : gelu16(x);
}

template <int KIND>
static void gate_span(const float* g, const float* u, float* out, int64_t n) {
  int64_t j = 0;
  for (; j + 16 <= n; j += 16) store16(out + j, activate<KIND>(load16(g + j)) * load16(u + j));
  if (j < n) {
    const int64_t left = n - j;
    store_part(out + j, activate<KIND>(load_part(g + j, left)) * load_part(u + j, left), left);
  }
}

static void gate(const GateArgs& a, int64_t row, int64_t begin, int64_t end) {
  const float* g = a.gate_up + row * 2 * a.n + begin;
  const float* u = g + a.n;
  float* out = a.out + row * a.n + begin;
  if (a.kind == 0) return gate_span<0>(g, u, out, end - begin);
  if (a.kind == 1) return gate_span<1>(g, u, out, end - begin);
  gate_span<2>(g, u, out, end - begin);
}

// Half-split rotation of the first 2 * half dims of one head, in place.
COPPICE_INLINE void rotate(float* x, const float* cosine, const float* sine, int64_t half) {
  int64_t j = 0;
  for (; j + 16 <= half; j += 16) {
    const V16 a = load16(x + j), b = load16(x + half + j);
    const V16 c = load16(cosine + j), s = load16(sine + j);
    store16(x + j, a * c - b * s);
    store16(x + half + j, b * c + a * s);
  }
  if (j < half) {
    const int64_t n = half - j;
    const V16 a = load_part(x + j, n), b = load_part(x + half + j, n);
    const V16 c = load_part(cosine + j, n), s = load_part(sine + j, n);
    store_part(x + j, a * c - b * s, n);
    store_part(x + half + j, b * c + a * s, n);
  }
}

// Norm and rotate `heads` heads from x to out (q to its tensor, k to scratch).
COPPICE_INLINE void prepare(const RopeArgs& a, const float* x, const float* weight,
                            int64_t heads, int64_t row, float* out) {
  const int64_t d = a.cache.head_dim;
  if (a.qk_norm == 2) {
    norm_row(x, weight, out, heads * d, a.eps);
  } else if (a.qk_norm == 1) {
    for (int64_t h = 0; h < heads; ++h) norm_row(x + h * d, weight, out + h * d, d, a.eps);
  } else {
    memcpy(out, x, heads * d * sizeof(float));
  }
  if (a.half == 0) return;
  const float* table = a.cos_sin + (int64_t)a.in.position[row] * 2 * a.half;
  for (int64_t h = 0; h < heads; ++h) rotate(out + h * d, table, table + a.half, a.half);
}

static void rope(const RopeArgs& a, int64_t row, float* scratch) {
  const int64_t d = a.cache.head_dim, kv = a.cache.kv_heads;
  const float* q = a.qkv + row * (a.heads + 2 * kv) * d;
  const float* k = q + a.heads * d;
  prepare(a, q, a.q_weight, a.heads, row, a.q + row * a.heads * d);
  prepare(a, k, a.k_weight, kv, row, scratch);
  const int64_t slot = a.in.slot[row];
  const int64_t page =
      a.in.page_table[a.in.sequence[row] * a.in.max_pages + slot / a.cache.page_size];
  const int64_t offset = slot % a.cache.page_size;
  float* room = scratch + kv * d;
  const float* v = k + kv * d;
  if (a.cache.kind == KV_INT8) return append<int8_t>(a.cache, page, offset, scratch, v, room);
  if (a.cache.kind == KV_BF16) return append<bf16>(a.cache, page, offset, scratch, v, room);
  append<float>(a.cache, page, offset, scratch, v, room);
}

}  // namespace COPPICE_ISA
}  // namespace coppice
