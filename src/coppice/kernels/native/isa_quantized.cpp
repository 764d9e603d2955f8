// Compiled once per instruction set for quantized layers, of which there are more than of
// other operators: VNNI adds an instruction that only these use.

#include "quantized.h"

namespace coppice {
namespace COPPICE_ISA {

// The multiplications of a full tile, over and over, weights and row from L1.
static int32_t int8_probe(int64_t rounds) {
  constexpr int SUMS = W == 16 ? 12 : W == 8 ? 4 : 2;
  int8_t line[64], codes[4 * X_BYTES];
  for (int i = 0; i < 64; ++i) line[i] = (int8_t)(i - 32);
  for (int i = 0; i < 4 * X_BYTES; ++i) codes[i] = (int8_t)i;
  I16 sum[SUMS] = {};
  for (int64_t i = 0; i < rounds * (96 / SUMS); ++i) {
    asm("" : "+m"(line));  // nothing may be kept from one round to the next
    const Bytes w = load_int8(line);
#pragma GCC unroll 12
    for (int s = 0; s < SUMS; ++s) {
      asm("" : "+m"(codes));
      dot(sum[s], w, load_x(codes));
    }
  }
  int32_t total = 0;
#pragma GCC unroll 12
  for (int s = 0; s < SUMS; ++s) COPPICE_EACH total += sum[s].v[i][0];
  return total;
}

extern const QuantizedTable quantized_table;
const QuantizedTable quantized_table = {
    CODE_ROW_BLOCK, X_BYTES, quantize, multiply, int8_probe,
};

}  // namespace COPPICE_ISA
}  // namespace coppice
