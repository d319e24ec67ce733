// Activations of the MLP and the cast that follows. Included once an instruction set.
#include "bf16.inl"
#include "ops.h"

namespace {

// A loop over calls is not vectorised: these are always part of the loop.
#define INLINE inline __attribute__((always_inline))

// e^x for x > -87; infinity from 2^128 on. NaN gives infinity.
INLINE float exponential(float x) {
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
INLINE float gelu7(float z) {
  z = z > 7.0f ? 7.0f : z;
  return z / (1.0f + exponential(-1.702f * z));
}

INLINE float swiglu7(float a, float b) {
  b = b > 7.0f ? 7.0f : b;
  b = b < -7.0f ? -7.0f : b;
  return gelu7(a) * (b + 1.0f);
}

// The exponent is held where `exponential` is exact enough; beyond, 1 + e^-z is 1.
INLINE float silu(float z) { return z / (1.0f + exponential(z > 80.0f ? -80.0f : -z)); }

INLINE float gelu_tanh(float x) {
  const float y = 2 * 0x1.988454p-1f * (x + 0.044715f * x * x * x);  // 2 sqrt(2 / pi)
  return x / (1.0f + exponential(y > 80.0f ? -80.0f : -y));
}

// x times the normal distribution's probability below x, through erfc with a relative error of 1.2e-7 (Numerical
// Recipes, 2nd ed., section 6.2): unlike 1 + erf it loses nothing where x is negative.
INLINE float gelu(float x) {
  const float z = __builtin_fabsf(x) * 0x1.6a09e6p-1f, t = 1.0f / (1.0f + 0.5f * z);
  float p = 0.17087277f;
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const float half_erfc = p - z * z < -87.0f ? 0.0f : 0.5f * t * exponential(p - z * z);
  return x * (x > 0 ? 1.0f - half_erfc : half_erfc);
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

template <typename Function, typename U, typename Out>
void each_of_row(Function function, const U* __restrict u, Out* __restrict out, int64_t dim) {
#pragma omp simd
  for (int64_t i = 0; i < dim; ++i) narrow(function(widen(u[i])), out + i);
}

template <typename U, typename Out>
void activation_row(horsepower::Activation::Kind kind, const U* u, Out* out, int64_t dim) {
  switch (kind) {
    case horsepower::Activation::SWIGLU7: return swiglu7_row(u, out, dim);
    case horsepower::Activation::GELU7: return each_of_row([](float x) { return gelu7(x); }, u, out, dim);
    case horsepower::Activation::GELU: return each_of_row([](float x) { return gelu(x); }, u, out, dim);
    case horsepower::Activation::GELU_TANH: return each_of_row([](float x) { return gelu_tanh(x); }, u, out, dim);
    case horsepower::Activation::SILU: return each_of_row([](float x) { return silu(x); }, u, out, dim);
  }
}

template <typename U, typename Out>
void activation_rows(const horsepower::Activation& a) {
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) {
    const U* u = static_cast<const U*>(a.u) + row * a.pitch;
    Out* out = static_cast<Out*>(a.out) + row * a.dim;
    activation_row(a.kind, u, out, a.dim);
  }
}

void activation(const horsepower::Activation& a) {
  by_types(a.u_bf16, a.out_bf16, [&](auto u, auto out) { activation_rows<decltype(u), decltype(out)>(a); });
}

template <typename X, typename Out>
void silu_mul_rows(const horsepower::SiluMul& a) {
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) {
    const X* __restrict gate = static_cast<const X*>(a.gate) + row * a.gate_pitch;
    const X* __restrict up = static_cast<const X*>(a.up) + row * a.up_pitch;
    Out* __restrict out = static_cast<Out*>(a.out) + row * a.dim;
#pragma omp simd
    for (int64_t i = 0; i < a.dim; ++i) narrow(silu(widen(gate[i])) * widen(up[i]), out + i);
  }
}

void silu_mul(const horsepower::SiluMul& a) {
  by_types(a.bf16, a.out_bf16, [&](auto x, auto out) { silu_mul_rows<decltype(x), decltype(out)>(a); });
}

}  // namespace
