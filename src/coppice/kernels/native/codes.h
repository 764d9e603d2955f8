// Packing quantized weights and reading them back: plain code, the same on every machine.
#pragma once

#include "kernels.h"

namespace coppice {

struct PackCodesArgs {
  Packed w;            // written, at output features first .. first + count
  const int8_t* codes;  // [count, k]
  const void* scales;   // [count, groups], of the type the layout stores
  const int8_t* zeros;  // [count, groups] or null
  int64_t first, count;
};

void pack_codes(const PackCodesArgs& args);
// Output feature n as float32, `scale * (code - zero)`.
void unpack_codes(const Packed& w, int64_t n, float* out);

}  // namespace coppice
