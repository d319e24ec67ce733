// float8 e4m3 (no infinities; 0x7f and 0xff are NaN) -> float and bfloat16, exactly. Included once an instruction set.
#pragma once

#include <cstdint>

#include "vector.inl"

namespace {

// The values of LANES codes. In integers: a denormal float on the way would be lost where the host flushes them.
inline Floats widen_codes(const uint8_t* from) {
  const Ints c = load_ints(from);
  const Ints denormal = (c & 0x78) == 0, nan = (c & 0x7f) == 0x7f;
  // Without an exponent, m / 8 x 2^-6 is (1 + m / 8) x 2^-6 - 2^-6.
  const Ints bits = ((c & 0x7f) << 20) + (120 << 23) + (denormal & (1 << 23));
  const Floats size = reinterpret_cast<Floats>(bits) - reinterpret_cast<Floats>(denormal & (121 << 23));
  return reinterpret_cast<Floats>(reinterpret_cast<Ints>(size) | (nan & 0x7fc00000) | (c & 0x80) << 24);
}

#if defined(__AVX512BF16__)
// The bfloat16 of each code without its sign, low and high bytes apart.
struct Bf16Bytes {
  uint8_t low[128], high[128];

  constexpr Bf16Bytes() : low(), high() {
    for (int code = 0; code < 128; ++code) {
      int exponent = code >> 3, mantissa = code & 7;
      if (exponent == 0 && mantissa != 0)  // a denormal: normal in bfloat16, whose products take denormals for zero
        for (exponent = 1; mantissa < 8; mantissa *= 2) --exponent;
      int bits = code == 0 ? 0 : (exponent + 120) * 128 + (mantissa & 7) * 16;
      if (code == 127) bits = 0x7fc0;
      low[code] = static_cast<uint8_t>(bits);
      high[code] = static_cast<uint8_t>(bits >> 8);
    }
  }
};

alignas(64) constexpr Bf16Bytes BF16_BYTES;

// Which bytes of (low, high) make two vectors of pairs.
struct Interleaved {
  uint8_t first[64], second[64];

  // `run` codes in a row go to the first vector, the next `run` to the second.
  constexpr explicit Interleaved(int run) : first(), second() {
    for (int i = 0; i < 32; ++i) {
      const int code = i / run * 2 * run + i % run;
      first[2 * i] = static_cast<uint8_t>(code);
      first[2 * i + 1] = static_cast<uint8_t>(64 + code);
      second[2 * i] = static_cast<uint8_t>(code + run);
      second[2 * i + 1] = static_cast<uint8_t>(64 + code + run);
    }
  }
};

alignas(64) constexpr Interleaved IN_ORDER(32), PAIRS_APART(2);

// 64 codes as bfloat16, in two vectors.
struct Bf16Codes {
  __m512i first, second;

  Bf16Codes(__m512i codes, const Interleaved& order) {
    const auto at = [](const uint8_t* table) { return _mm512_load_si512(table); };
    const __m512i low = _mm512_permutex2var_epi8(at(BF16_BYTES.low), codes, at(BF16_BYTES.low + 64));
    const __m512i size = _mm512_permutex2var_epi8(at(BF16_BYTES.high), codes, at(BF16_BYTES.high + 64));
    const __m512i high = _mm512_ternarylogic_epi32(size, codes, _mm512_set1_epi8(-128), 0xf8);  // size | codes & sign
    first = _mm512_permutex2var_epi8(low, at(order.first), high);
    second = _mm512_permutex2var_epi8(low, at(order.second), high);
  }
};
#endif

}  // namespace
