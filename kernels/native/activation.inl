// The clamped activations of the MLP and the cast that follows. Included once an instruction set.
#include "bf16.inl"
#include "ops.h"

namespace {

// e^x for x > -87; infinity from 2^128 on. NaN gives infinity.
inline float exponential(float x) {
  constexpr float round = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const float shifted = x * 0x1.715476p0f + round;
  const float n = shifted - round;
  const float r = x - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;  // ln 2 in two parts, the first exact times n
  // Least relative error for |r| <= ln 2 / 2, with 1 + r kept exact: 2^-23.
  float e = 0x1.106278p-7f;
  e = e * r + 0x1.572a06p-5f;
  e = e * r + 0x1.5557aep-3f;
  e = e * r + 0x1.fffdfcp-2f;
  e = e * r * r + r + 1.0f;
  // 2^n goes into the exponent's bits, so that n = 128 with e < 1 is still finite.
  uint32_t bits, exponent;
  __builtin_memcpy(&bits, &e, sizeof bits);
  __builtin_memcpy(&exponent, &shifted, sizeof exponent);
  bits += exponent << 23;
  __builtin_memcpy(&e, &bits, sizeof e);
  return x < 0x1.62e42ep6f ? e : __builtin_inff();
}

// A NaN passes through the numerator.
inline float gelu7(float z) {
  z = z > 7.0f ? 7.0f : z;
  return z / (1.0f + exponential(-1.702f * z));
}

inline float swiglu7(float a, float b) {
  b = b > 7.0f ? 7.0f : b;
  b = b < -7.0f ? -7.0f : b;
  return gelu7(a) * (b + 1.0f);
}

template <typename Out>
void swiglu7_row(const float* __restrict u, Out* __restrict out, int64_t dim) {
#pragma omp simd
  for (int64_t i = 0; i < dim; ++i) narrow(swiglu7(u[2 * i], u[2 * i + 1]), out + i);
}

// A pair is one load of 32 bits, of which each half widens in place.
template <typename Out>
void swiglu7_row(const uint16_t* __restrict u, Out* __restrict out, int64_t dim) {
#pragma omp simd
  for (int64_t i = 0; i < dim; ++i) {
    uint32_t pair;
    __builtin_memcpy(&pair, u + 2 * i, sizeof pair);
    narrow(swiglu7(widen(static_cast<uint16_t>(pair)), widen(static_cast<uint16_t>(pair >> 16))), out + i);
  }
}

template <typename U, typename Out>
void gelu7_row(const U* __restrict u, Out* __restrict out, int64_t dim) {
#pragma omp simd
  for (int64_t i = 0; i < dim; ++i) narrow(gelu7(widen(u[i])), out + i);
}

template <typename U, typename Out>
void activation_rows(const horsepower::Activation& a) {
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) {
    const U* u = static_cast<const U*>(a.u) + row * a.pitch;
    Out* out = static_cast<Out*>(a.out) + row * a.dim;
    a.gated ? swiglu7_row(u, out, a.dim) : gelu7_row(u, out, a.dim);
  }
}

void activation(const horsepower::Activation& a) {
  by_types(a.u_bf16, a.out_bf16, [&](auto u, auto out) { activation_rows<decltype(u), decltype(out)>(a); });
}

}  // namespace
