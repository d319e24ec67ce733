#include "ops.h"

#include <cstring>

namespace horsepower {

int supported_isas(const char* (&names)[MAX_ISAS]) {
  int count = 0;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    // Cooper Lake alone has the first without the second.
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi")) names[count++] = "avx512_bf16";
    names[count++] = "avx512";
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) names[count++] = "avx2";
#endif
  names[count++] = "portable";
  return count;
}

const Ops* ops_for(const char* isa) {
  const char* names[MAX_ISAS];
  const int count = supported_isas(names);
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(names[i], isa) != 0) continue;
#if defined(__x86_64__)
    if (std::strcmp(isa, "avx512_bf16") == 0) return &avx512_bf16_ops();
    if (std::strcmp(isa, "avx512") == 0) return &avx512_ops();
    if (std::strcmp(isa, "avx2") == 0) return &avx2_ops();
#endif
    return &portable_ops();
  }
  return nullptr;
}

}  // namespace horsepower
