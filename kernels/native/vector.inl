// One vector of floats of this instruction set, and the two ways to multiply and add. Included once an instruction set.
#pragma once

#include <cstdint>

#include "bf16.inl"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

// A register tile is TILE_ROWS x TILE_VECTORS: 24 of 32 registers, or 12 of 16.
#if defined(__AVX512F__)
constexpr int LANES = 16, TILE_VECTORS = 4;
#elif defined(__AVX2__)
constexpr int LANES = 8, TILE_VECTORS = 2;
#else
constexpr int LANES = 4, TILE_VECTORS = 2;
#endif
constexpr int TILE_ROWS = 6, TILE_WIDTH = LANES * TILE_VECTORS;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

template <typename T>
inline Floats load(const T* from) {
  Floats x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

// LANES small integers. By instructions: compilers would take them one by one.
inline Ints load_ints(const uint8_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Ints>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
  return reinterpret_cast<Ints>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#elif defined(__SSE2__)
  int32_t four;
  __builtin_memcpy(&four, from, sizeof four);
  const __m128i zero = _mm_setzero_si128();
  return reinterpret_cast<Ints>(_mm_unpacklo_epi16(_mm_unpacklo_epi8(_mm_cvtsi32_si128(four), zero), zero));
#else
  return Ints{from[0], from[1], from[2], from[3]};
#endif
}

inline Ints load_ints(const uint16_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Ints>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__AVX2__)
  return reinterpret_cast<Ints>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__SSE2__)
  return reinterpret_cast<Ints>(
      _mm_unpacklo_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)), _mm_setzero_si128()));
#else
  return Ints{from[0], from[1], from[2], from[3]};
#endif
}

template <typename T>
inline void store(Floats x, T* to) {
  __builtin_memcpy(to, &x, sizeof x);
}

// Through integers, so that any bits stay as they are.
inline Floats broadcast(uint32_t bits) { return reinterpret_cast<Floats>(Ints{} + static_cast<int32_t>(bits)); }

inline Floats broadcast(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return broadcast(bits);
}

// The larger; y where either is NaN, which is what the instruction does and compilers cannot know.
inline Floats larger(Floats x, Floats y) {
#if defined(__AVX512F__)
  return _mm512_max_ps(x, y);
#elif defined(__AVX2__)
  return _mm256_max_ps(x, y);
#elif defined(__SSE2__)
  return _mm_max_ps(x, y);
#else
  return x > y ? x : y;
#endif
}

inline float largest(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#else
  float out = x[0];
  for (int i = 1; i < LANES; ++i) out = x[i] > out ? x[i] : out;
  return out;
#endif
}

inline float sum(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x);
#else
  float out = 0;
  for (int i = 0; i < LANES; ++i) out += x[i];
  return out;
#endif
}

// LANES x LANES numbers of 32 bits.
inline void transpose(Floats (&x)[LANES]) {
#if defined(__AVX512F__)
  Floats y[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = _mm512_shuffle_ps(y[i + j], y[i + 2 + j], 0x44);
      x[i + 2 * j + 1] = _mm512_shuffle_ps(y[i + j], y[i + 2 + j], 0xee);
    }
#pragma GCC unroll 2
  for (int i = 0; i < 16; i += 8)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      y[i + j] = _mm512_shuffle_f32x4(x[i + j], x[i + 4 + j], 0x88);
      y[i + 4 + j] = _mm512_shuffle_f32x4(x[i + j], x[i + 4 + j], 0xdd);
    }
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    x[j] = _mm512_shuffle_f32x4(y[j], y[8 + j], 0x88);
    x[8 + j] = _mm512_shuffle_f32x4(y[j], y[8 + j], 0xdd);
  }
#else
  uint32_t from[LANES][LANES], to[LANES][LANES];
  __builtin_memcpy(from, x, sizeof from);
  for (int i = 0; i < LANES; ++i)
    for (int j = 0; j < LANES; ++j) to[i][j] = from[j][i];
  __builtin_memcpy(x, to, sizeof to);
#endif
}

// The sums of four vectors.
inline void sum_each(const Floats* x, float* out) {
#if defined(__AVX512F__)
  const auto halves = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  };
  const __m512 a = halves(x[0], x[1]), b = halves(x[2], x[3]);
  __m512 quarters = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  quarters = _mm512_add_ps(quarters, _mm512_permute_ps(quarters, 0xb1));
  quarters = _mm512_add_ps(quarters, _mm512_permute_ps(quarters, 0x4e));
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, quarters)));
#else
  for (int i = 0; i < 4; ++i) out[i] = sum(x[i]);
#endif
}

// 2^x for x <= 0: NaN stays NaN, and all below -127 is exactly 0 because the polynomial is exactly 1 at 0.
// Relative error 3e-6 with 4 terms, below float32's rounding with 6.
template <int terms>
inline Floats exp2_of_negative(Floats x) {
  x = larger(broadcast(-127.0f), x);
  const Floats shifted = x + 12582912.0f;  // 1.5 x 2^23: the low bits of the sum are x rounded to an integer
  const Floats f = x - (shifted - 12582912.0f);
  Floats p;
  if constexpr (terms == 4) {
    p = broadcast(9.582852945e-3f);
    p = p * f + 5.590642616e-2f;
    p = p * f + 2.402409911e-1f;
    p = p * f + 6.931241751e-1f;
  } else {
    p = broadcast(1.535336196e-4f);
    p = p * f + 1.339887502e-3f;
    p = p * f + 9.618436918e-3f;
    p = p * f + 5.550332367e-2f;
    p = p * f + 2.402264774e-1f;
    p = p * f + 6.931471825e-1f;
  }
  p = p * f + 1.0f;
  return reinterpret_cast<Floats>(reinterpret_cast<Ints>(p) + (reinterpret_cast<Ints>(shifted) << 23));
}

// How products are summed. A unit is 32 bits of one row or column along the summed dimension: `DEPTH` values.
struct FloatUnits {
  static constexpr int DEPTH = 1, EXP_TERMS = 6;
  static Floats multiply_add(Floats sum, Floats x, Floats y) { return sum + x * y; }

  // One unit of a row in all lanes; uint32_t is a unit that is packed already.
  static Floats unit(const float* row, int64_t u) { return broadcast(row[u]); }
  static Floats unit(const uint16_t* row, int64_t u) {
    typedef uint16_t Halves __attribute__((vector_size(4 * LANES)));
    return reinterpret_cast<Floats>(reinterpret_cast<Ints>(Halves{} + row[u]) << 16);
  }
  static Floats unit(const uint32_t* row, int64_t u) { return broadcast(row[u]); }

  // Two vectors of values to units at `to`; returns how many units.
  static int pack(Floats first, Floats second, uint32_t* to) {
    store(first, to);
    store(second, to + LANES);
    return 2 * LANES;
  }
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16. The instruction takes denormals for zeros, which attention can bear: weights below 1e-38 of the
// largest, and inputs below 1e-38.
struct PairUnits {
  static constexpr int DEPTH = 2, EXP_TERMS = 4;
  static Floats multiply_add(Floats sum, Floats x, Floats y) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y));
  }

  static Floats unit(const uint32_t* row, int64_t u) { return broadcast(row[u]); }
  static Floats unit(const uint16_t* row, int64_t u) {
    uint32_t pair;
    __builtin_memcpy(&pair, row + 2 * u, sizeof pair);
    return broadcast(pair);
  }

  static int pack(Floats first, Floats second, uint32_t* to) {
    store(reinterpret_cast<Floats>(_mm512_cvtne2ps_pbh(second, first)), to);
    return LANES;
  }
};
#endif

// total[rows, vectors] += a[rows, units] b[units, vectors]; pitches in values of a and in units of b.
template <typename Units, int rows, int vectors, typename T>
inline __attribute__((always_inline)) void add_products(const T* a, int64_t a_pitch, const uint32_t* b,
                                                        int64_t b_pitch, int64_t units,
                                                        Floats (&total)[rows][vectors]) {
  for (int64_t u = 0; u < units; ++u) {
    Floats y[vectors];
#pragma GCC unroll 8
    for (int n = 0; n < vectors; ++n) y[n] = load(b + u * b_pitch + n * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Floats x = Units::unit(a + r * a_pitch, u);
#pragma GCC unroll 8
      for (int n = 0; n < vectors; ++n) total[r][n] = Units::multiply_add(total[r][n], x, y[n]);
    }
  }
}

// c[TILE_ROWS, vectors] (+)= a[TILE_ROWS, units] b[units, vectors]; pitches in units and floats.
// c is added at the end: sums of sums round less than one long sum.
template <typename Units, int vectors>
inline void multiply_tile(const uint32_t* a, int64_t a_pitch, const uint32_t* b, int64_t b_pitch, int64_t units,
                          float* c, int64_t c_pitch, bool accumulate) {
  Floats total[TILE_ROWS][vectors] = {};
  add_products<Units>(a, a_pitch, b, b_pitch, units, total);
#pragma GCC unroll 8
  for (int r = 0; r < TILE_ROWS; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < vectors; ++n) {
      float* to = c + r * c_pitch + n * LANES;
      store(accumulate ? load(to) + total[r][n] : total[r][n], to);
    }
}

}  // namespace
