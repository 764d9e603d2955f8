#include "codes.h"

#include <cmath>
#include <cstring>

#include "quantized_table.h"

namespace coppice {
namespace {

float from_half(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h & 0x7fff) << 13;
  float size;
  std::memcpy(&size, &bits, 4);
  return std::copysign(size * 0x1p112f, h & 0x8000 ? -1.0f : 1.0f);
}

// Where output feature n's four inputs from 4 q (int8) or eight from 8 q (int4) lie.
int64_t place(const Packed& w, int64_t n, int64_t q) {
  return n / 16 * panel_bytes(w) + q * 64 + n % 16 * 4;
}

// And its scale and zero point of group g.
int64_t group_place(const Packed& w, int64_t n, int64_t g) {
  return (n / 16 * (w.k / w.group) + g) * 16 + n % 16;
}

void pack_row(const Packed& w, int64_t n, const int8_t* codes) {
  int8_t* data = static_cast<int8_t*>(const_cast<void*>(w.data));
  if (is_int4(w)) {
    const int shift = w.zeros ? 0 : 8;
    for (int64_t q = 0; q < w.k / 8; ++q)
      for (int i = 0; i < 4; ++i) {
        const int low = codes[8 * q + i] + shift, high = codes[8 * q + 4 + i] + shift;
        data[place(w, n, q) + i] = static_cast<int8_t>((low & 15) | (high & 15) << 4);
      }
    return;
  }
  for (int64_t j = 0; j < w.k; ++j) data[place(w, n, j / 4) + j % 4] = codes[j];
}

}  // namespace

void pack_codes(const PackCodesArgs& a) {
  const Packed& w = a.w;
  const int64_t groups = w.group ? w.k / w.group : 1;
  for (int64_t i = 0; i < a.count; ++i) {
    const int64_t n = a.first + i;
    pack_row(w, n, a.codes + i * w.k);
    if (!w.group) {
      static_cast<float*>(const_cast<void*>(w.scales))[n] = static_cast<const float*>(a.scales)[i];
      continue;
    }
    uint16_t* scales = static_cast<uint16_t*>(const_cast<void*>(w.scales));
    uint8_t* zeros = static_cast<uint8_t*>(const_cast<void*>(w.zeros));
    for (int64_t g = 0; g < groups; ++g) {
      scales[group_place(w, n, g)] = static_cast<const uint16_t*>(a.scales)[i * groups + g];
      if (zeros) zeros[group_place(w, n, g)] = static_cast<uint8_t>(a.zeros[i * groups + g]);
    }
  }
}

void unpack_codes(const Packed& w, int64_t n, float* out) {
  const int64_t group = w.group ? w.group : w.k, per_line = is_int4(w) ? 8 : 4;
  for (int64_t k = 0; k < w.k; k += group) {
    const int64_t g = w.group ? group_place(w, n, k / group) : n;
    const float scale = w.group ? from_half(static_cast<const uint16_t*>(w.scales)[g])
                                : static_cast<const float*>(w.scales)[g];
    const int zero = w.zeros ? static_cast<const uint8_t*>(w.zeros)[g] : 8;
    const int8_t* line = static_cast<const int8_t*>(w.data) + place(w, n, k / per_line);
    if (is_int4(w)) {
      for (int64_t j = k; j < k + group; j += 8, line += 64)
        for (int i = 0; i < 4; ++i) {
          const int byte = static_cast<uint8_t>(line[i]);
          out[j + i] = static_cast<float>((byte & 15) - zero) * scale;
          out[j + 4 + i] = static_cast<float>((byte >> 4) - zero) * scale;
        }
    } else {
      for (int64_t j = k; j < k + group; ++j)
        out[j] = static_cast<float>(line[(j - k) / 4 * 64 + (j - k) % 4]) * scale;
    }
  }
}

}  // namespace coppice
