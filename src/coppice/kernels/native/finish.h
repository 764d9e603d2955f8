// Bias and residual, and the copy out of a register tile.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace coppice {
namespace COPPICE_ISA {

// Rows of one panel's sums to `out`, where the last panel may not be full. `Args` has the
// weight `w`, `residual` and `out`.
template <class Args>
COPPICE_INLINE void finish(const Args& a, const float* tile, int64_t tile_stride, int64_t row,
                           int64_t rows, int64_t panel) {
  const int64_t column = 16 * panel, width = min64(16, a.w.n - column);
  for (int64_t r = 0; r < rows; ++r) {
    V16 sum = load16(tile + r * tile_stride);
    const int64_t at = (row + r) * a.w.n + column;
    if (a.w.bias) sum = sum + load16(a.w.bias + column);
    if (width == 16) {
      if (a.residual) sum = sum + load16(a.residual + at);
      store16(a.out + at, sum);
    } else {
      if (a.residual) sum = sum + load_part(a.residual + at, width);
      store_part(a.out + at, sum, width);
    }
  }
}

}  // namespace COPPICE_ISA
}  // namespace coppice
