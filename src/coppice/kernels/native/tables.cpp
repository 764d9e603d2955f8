#include "tables.h"

namespace coppice {

#if defined(COPPICE_X86)
#if defined(COPPICE_AVX512)
namespace avx512vnni {
extern const QuantizedTable quantized_table;
}
#endif
#if defined(COPPICE_AVXVNNI)
namespace avx2vnni {
extern const QuantizedTable quantized_table;
}
#endif

namespace {

// VNNI matters to quantized layers alone: all else is the set it extends.
Table extended(const Table* base, const char* name, const QuantizedTable* quantized) {
  Table table = *base;
  table.name = name;
  table.quantized = quantized;
  return table;
}

}  // namespace
#endif

std::vector<const Table*> runnable_tables() {
  std::vector<const Table*> found;
#if defined(COPPICE_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
#if defined(COPPICE_AVX512)
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    static const Table vnni =
        extended(avx512_table(), "avx512vnni", &avx512vnni::quantized_table);
    if (__builtin_cpu_supports("avx512vnni")) found.push_back(&vnni);
    found.push_back(avx512_table());
  }
#endif
  if (avx2) {
#if defined(COPPICE_AVXVNNI)
    static const Table vnni = extended(avx2_table(), "avx2vnni", &avx2vnni::quantized_table);
    if (__builtin_cpu_supports("avxvnni")) found.push_back(&vnni);
#endif
    found.push_back(avx2_table());
#if defined(COPPICE_WIDE)
    found.push_back(wide_table());
#endif
  }
#endif
  found.push_back(portable_table());
  return found;
}

}  // namespace coppice
