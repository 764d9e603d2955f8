// Codes of a panel back to the floats they stand for, for rows that stay float.
#pragma once

#include "bytes.h"
#include "quantized_table.h"

namespace coppice {
namespace COPPICE_ISA {

// Byte `byte` of each lane, with its sign.
COPPICE_INLINE I16 signed_byte(const I16& line, int byte) {
  I16 r;
  COPPICE_EACH r.v[i] = (vi)((vu)line.v[i] << (24 - 8 * byte)) >> 24;
  return r;
}
// The nibble of each lane from bit `bit`, less its zero point.
COPPICE_INLINE I16 nibble(const I16& line, int bit, const I16& zero) {
  I16 r;
  COPPICE_EACH r.v[i] = ((line.v[i] >> bit) & 15) - zero.v[i];
  return r;
}

// Inputs k0 .. k0 + count of one panel as float32 [count][16]; both are multiples of the group,
// or of 64 without groups (the last count may be less).
static void unfold(const Packed& w, int64_t panel, int64_t k0, int64_t count, float* out) {
  const int64_t group = w.group ? w.group : CHANNEL_GROUP, groups = held_inputs(w) / group;
  const int64_t per_line = is_int4(w) ? 8 : 4;
  const int8_t* line = static_cast<const int8_t*>(w.data) + panel * panel_bytes(w) +
                       k0 / per_line * 64;
  for (int64_t k = 0; k < count; k += group) {
    const int64_t at = (panel * groups + (k0 + k) / group) * 16;
    const V16 scale = w.group ? load_half(static_cast<const uint16_t*>(w.scales) + at)
                              : load16(static_cast<const float*>(w.scales) + panel * 16);
    I16 zero;
    COPPICE_EACH zero.v[i] = isplat(8);
    if (w.zeros) zero = load_unsigned(static_cast<const uint8_t*>(w.zeros) + at);
    for (int64_t j = k; j < min64(count, k + group); j += per_line, line += 64) {
      const I16 codes = load_line(line);
#pragma GCC unroll 4
      for (int byte = 0; byte < 4; ++byte) {
        float* to = out + (j + byte) * 16;
        if (per_line == 4) {
          store16(to, to_float(signed_byte(codes, byte)) * scale);
        } else {
          store16(to, to_float(nibble(codes, 8 * byte, zero)) * scale);
          store16(to + 64, to_float(nibble(codes, 8 * byte + 4, zero)) * scale);
        }
      }
    }
  }
}

}  // namespace COPPICE_ISA
}  // namespace coppice
