// bfloat16 <-> float in integer arithmetic that every compiler vectorises. Included once an instruction set.
// The bf16 conversion instructions of AVX-512 are not used: they flush denormals to zero.
#pragma once

#include <cstdint>

namespace {

inline float widen(float x) { return x; }

inline float widen(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  __builtin_memcpy(&out, &bits, sizeof out);
  return out;
}

inline void narrow(float x, float* out) { *out = x; }

// Round to nearest, ties to even; NaN becomes the quiet NaN.
inline void narrow(float x, uint16_t* out) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *out = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

// Calls f with a value of each tensor's storage type.
template <typename F>
void by_types(bool first_bf16, bool second_bf16, F f) {
  if (first_bf16 && second_bf16) return f(uint16_t{}, uint16_t{});
  if (first_bf16) return f(uint16_t{}, float{});
  if (second_bf16) return f(float{}, uint16_t{});
  f(float{}, float{});
}

}  // namespace
