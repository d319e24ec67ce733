// Residual addition, RMS norm and cast in one pass over a row. Included once an instruction set.
#include "bf16.inl"
#include "ops.h"

namespace {

template <typename Branch, typename Normed>
void add_rms_norm_row(const float* __restrict residual, const Branch* __restrict branch, const float* __restrict gain,
                      float* __restrict sum, Normed* __restrict normed, int64_t dim, float eps) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < dim; ++i) {
    const float x = residual[i] + widen(branch[i]);
    sum[i] = x;
    squares += x * x;
  }
  const float scale = 1.0f / __builtin_sqrtf(squares / static_cast<float>(dim) + eps);
#pragma omp simd
  for (int64_t i = 0; i < dim; ++i) narrow(sum[i] * scale * (gain[i] + 1.0f), normed + i);
}

template <typename Branch, typename Normed>
void add_rms_norm_rows(const horsepower::AddRmsNorm& a) {
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t expert = (row >= a.first_rows[0]) + (row >= a.first_rows[1]);
    add_rms_norm_row(a.residual + row * a.residual_pitch, static_cast<const Branch*>(a.branch) + row * a.branch_pitch,
                     a.gain + expert * a.dim, a.sum + row * a.dim, static_cast<Normed*>(a.normed) + row * a.dim, a.dim,
                     a.eps);
  }
}

void add_rms_norm(const horsepower::AddRmsNorm& a) {
  if (a.branch_bf16 && a.normed_bf16) return add_rms_norm_rows<uint16_t, uint16_t>(a);
  if (a.branch_bf16) return add_rms_norm_rows<uint16_t, float>(a);
  if (a.normed_bf16) return add_rms_norm_rows<float, uint16_t>(a);
  add_rms_norm_rows<float, float>(a);
}

}  // namespace
