// Residual addition, RMS norm and cast in one pass over a row. Included once an instruction set.
#include "ops.h"
#include "row_norm.inl"

namespace {

// Returns the sum of the squares of `sum`. Without a post-norm, `post_gain` is null.
template <typename Branch>
float add_row(const float* __restrict residual, const Branch* __restrict branch, const float* __restrict post_gain,
              float* __restrict sum, int64_t dim, float eps) {
  float squares = 0;
  if (!post_gain) {
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < dim; ++i) {
      const float x = residual[i] + widen(branch[i]);
      sum[i] = x;
      squares += x * x;
    }
    return squares;
  }
  const float scale = norm_scale(sum_of_squares(branch, dim), dim, eps);
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < dim; ++i) {
    const float x = residual[i] + widen(branch[i]) * scale * post_gain[i];
    sum[i] = x;
    squares += x * x;
  }
  return squares;
}

template <typename Branch, typename Normed>
void add_rms_norm_row(const float* __restrict residual, const Branch* __restrict branch,
                      const float* __restrict post_gain, const float* __restrict gain, float* __restrict sum,
                      Normed* __restrict normed, int64_t dim, float eps) {
  const float scale = norm_scale(add_row(residual, branch, post_gain, sum, dim, eps), dim, eps);
#pragma omp simd
  for (int64_t i = 0; i < dim; ++i) narrow(sum[i] * scale * gain[i], normed + i);
}

template <typename Branch, typename Normed>
void add_rms_norm_rows(const horsepower::AddRmsNorm& a) {
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t expert = expert_of(row, a.first_rows);
    add_rms_norm_row(a.residual + row * a.residual_pitch, static_cast<const Branch*>(a.branch) + row * a.branch_pitch,
                     a.post_gain ? a.post_gain + expert * a.post_gain_pitch : nullptr, a.gain + expert * a.gain_pitch,
                     a.sum + row * a.dim, static_cast<Normed*>(a.normed) + row * a.dim, a.dim, a.eps);
  }
}

void add_rms_norm(const horsepower::AddRmsNorm& a) {
  by_types(a.branch_bf16, a.normed_bf16,
           [&](auto branch, auto normed) { add_rms_norm_rows<decltype(branch), decltype(normed)>(a); });
}

}  // namespace
