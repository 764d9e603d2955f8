// y = x W^T where W is int8 or int4 and the rows of x are made int8 on the way.
//
// Products are summed in int32 within a group of inputs, which is exact; groups are added in
// order in float32, every operation rounded on its own (no fused multiply-add). So results
// depend neither on the batch nor on the instruction set, and the formula is simple enough to
// be written in PyTorch (../quantized_reference.py), which agrees bit for bit.
#pragma once

#include "bytes.h"
#include "finish.h"
#include "quantized_table.h"

namespace coppice {
namespace COPPICE_ISA {

constexpr int TILE_ROWS = W == 16 ? 12 : W == 8 ? 4 : 2;  // of a register tile
constexpr int64_t CODE_ROW_BLOCK = W == 16 ? 96 : 64;  // their codes stay in L2

// Panels of a register tile. One row does best with four streams from memory and the
// processor's own prefetching, more rows with one (two on AVX-512) fetched ahead in code.
constexpr int panels_beside(int rows) { return rows == 1 ? 4 : W == 16 || rows == 2 ? 2 : 1; }

// One row to codes: per group `amax / 127` as scale and the nearest multiples of it.
static void quantize(const QuantizeArgs& a, int64_t row) {
  const CodeRows& to = a.to;
  const float* x = a.x + row * a.k;
  int8_t* codes = to.codes + row * to.stride;
  const auto part = [&](int64_t k) {
    return k + 16 <= a.k ? load16(x + k) : k < a.k ? load_part(x + k, a.k - k) : splat(0.0f);
  };
  for (int64_t g = 0; g < to.groups; ++g) {
    // The bits of |x| order like the numbers, with infinities and NaN on top.
    I16 most = {};
    for (int64_t k = g * to.group; k < (g + 1) * to.group; k += 16) {
      const V16 v = part(k);
      COPPICE_EACH {
        const vi bits = (vi)v.v[i] & 0x7fffffff;
        most.v[i] = bits > most.v[i] ? bits : most.v[i];
      }
    }
    int32_t lanes[16], top = 0;
    store_lanes(lanes, most);
    for (int i = 0; i < 16; ++i) top = lanes[i] > top ? lanes[i] : top;
    float amax;
    memcpy(&amax, &top, 4);
    const bool finite = top < 0x7f800000, used = amax >= 0x1p-119f;  // 127 / amax is finite
    const V16 inverse = splat(finite && used ? 127.0f / amax : 0.0f);
    const V16 magic = splat(12582912.0f);  // adding it rounds to a whole number, half to even
    I16 sum = {};
    for (int64_t k = g * to.group; k < (g + 1) * to.group; k += 16) {
      I16 code;
      const V16 rounded = (finite ? part(k) : splat(0.0f)) * inverse + magic;
      COPPICE_EACH {
        code.v[i] = (vi)rounded.v[i] - 0x4b400000;
        sum.v[i] += code.v[i];
      }
      store_codes(codes + X_BYTES * k, code);
    }
    int32_t total = 0;
    store_lanes(lanes, sum);
    for (int i = 0; i < 16; ++i) total += lanes[i];
    to.scale[row * to.groups + g] = !finite ? __builtin_nanf("") : used ? amax / 127.0f : 0.0f;
    to.sum[row * to.groups + g] = total;
  }
}

// Which lines of the weights to come a tile fetches ahead: those of every `every`th block of
// inputs, from block `first`.
struct Ahead {
  int64_t bytes, every, first;
};

// Sums of R rows from `row` with B panels, every `step`th from `panel`: out[r][16 b + lane].
template <int R, int B, class Store>
static void code_tile(const CodesArgs& a, int64_t row, int64_t panel, int64_t step, Ahead ahead,
                      float* out) {
  const int64_t groups = a.x.groups, panel_stride = step * panel_bytes(a.w);
  const int8_t* w = static_cast<const int8_t*>(a.w.data) + panel * panel_bytes(a.w);
  const int8_t* x = a.x.codes + row * a.x.stride;
  const uint16_t* scales =
      a.w.group ? static_cast<const uint16_t*>(a.w.scales) + panel * groups * 16 : nullptr;
  const uint8_t* zeros =
      a.w.zeros ? static_cast<const uint8_t*>(a.w.zeros) + panel * groups * 16 : nullptr;
  int64_t turn = ahead.first;
  for (int64_t g = 0; g < groups; ++g) {
    I16 sum[R][B];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const int32_t total = a.x.sum[(row + r) * groups + g];
      const vi start = isplat(-Store::ADDS * total);
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) COPPICE_EACH sum[r][b].v[i] = start;
    }
    if (zeros) {
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) {
        const I16 zero = load_unsigned(zeros + (b * step * groups + g) * 16);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const vi total = isplat(-a.x.sum[(row + r) * groups + g]);
          COPPICE_EACH sum[r][b].v[i] = madd(zero.v[i], total);
        }
      }
    }
    for (int64_t k = 0; k < a.x.group; k += 32) {
      if (R > 1 && turn == 0) {
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b)
#pragma GCC unroll 8
          for (int line = 0; line < Store::LINES; ++line)
            __builtin_prefetch(w + b * panel_stride + 64 * line + ahead.bytes);
        turn = ahead.every;
      }
      --turn;
      Store::template add<R, B>(sum, w, panel_stride, x, a.x.stride);
      w += 64 * Store::LINES;
      x += 32 * X_BYTES;
    }
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      const V16 scale = scales ? load_half(scales + (b * step * groups + g) * 16) : splat(1.0f);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        float* at = out + (r * B + b) * 16;
        const V16 before = g ? load16(at) : splat(0.0f);
        const V16 both = splat(a.x.scale[(row + r) * groups + g]) * scale;
        store16(at, before + to_float(sum[r][b]) * both);
      }
    }
  }
  if (!scales) {
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      const V16 scale = load16(static_cast<const float*>(a.w.scales) + (panel + b * step) * 16);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
        store16(out + (r * B + b) * 16, load16(out + (r * B + b) * 16) * scale);
    }
  }
  for (int b = 0; b < B; ++b) finish(a, out + 16 * b, 16 * B, row, R, panel + b * step);
}

template <int B, class Store, int R = TILE_ROWS>
static void code_rows(const CodesArgs& a, int64_t rows, int64_t row, int64_t panel, int64_t step,
                      Ahead ahead, float* out) {
  if constexpr (R > 1) {
    if (rows < R) return code_rows<B, Store, R - 1>(a, rows, row, panel, step, ahead, out);
  }
  if constexpr (B <= panels_beside(R)) code_tile<R, B, Store>(a, row, panel, step, ahead, out);
}

// All rows of a block with B panels. Where they take several tiles, the first waits for memory
// and the others compute: so each fetches its share of the panels that come next.
template <int B, class Store>
static void code_block(const CodesArgs& a, int64_t row, int64_t rows, int64_t panel, int64_t step,
                       float* out) {
  const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  for (int64_t t = tiles; t > 0; --t) {
    const int64_t now = (rows + t - 1) / t;
    const int64_t bytes = tiles > 1 ? panel_bytes(a.w) : 2048;
    code_rows<B, Store>(a, now, row, panel, step, {bytes, tiles, t - 1}, out);
    row += now;
    rows -= now;
  }
}

// Panels from `panel` on in B runs side by side, each a long stream of memory; the first left.
template <int B, class Store>
static int64_t code_runs(const CodesArgs& a, int64_t row, int64_t rows, int64_t panel, int64_t end,
                         float* out) {
  const int64_t run = (end - panel) / B;
  for (int64_t i = 0; i < run; ++i) code_block<B, Store>(a, row, rows, panel + i, run, out);
  return panel + B * run;
}

template <class Store>
static void multiply_codes(const CodesArgs& a, int64_t task) {
  float out[TILE_ROWS * 4 * 16];
  const int64_t end = a.shares.end(task / a.row_blocks);
  int64_t panel = a.shares.begin(task / a.row_blocks);
  const int64_t row = task % a.row_blocks * CODE_ROW_BLOCK;
  const int64_t rows = min64(CODE_ROW_BLOCK, a.rows - row);
  const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  const int beside = panels_beside((int)((rows + tiles - 1) / tiles));
  if (beside >= 4) panel = code_runs<4, Store>(a, row, rows, panel, end, out);
  if (beside >= 2) panel = code_runs<2, Store>(a, row, rows, panel, end, out);
  code_runs<1, Store>(a, row, rows, panel, end, out);
}

static void multiply(const CodesArgs& a, int64_t task) {
  if (is_int4(a.w)) return multiply_codes<Int4>(a, task);
  multiply_codes<Int8>(a, task);
}

}  // namespace COPPICE_ISA
}  // namespace coppice
