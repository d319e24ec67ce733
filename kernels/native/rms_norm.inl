// RMS norm and cast. Included once an instruction set.
#include "ops.h"
#include "row_norm.inl"

namespace {

template <typename X, typename Out>
void rms_norm_row(const X* __restrict x, const float* __restrict gain, Out* __restrict out, int64_t dim, float eps) {
  const float scale = norm_scale(sum_of_squares(x, dim), dim, eps);
  if (!gain) {
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) narrow(widen(x[i]) * scale, out + i);
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < dim; ++i) narrow(widen(x[i]) * scale * gain[i], out + i);
}

template <typename X, typename Out>
void rms_norm_rows(const horsepower::RmsNorm& a) {
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) {
    rms_norm_row(static_cast<const X*>(a.x) + row * a.pitch, a.gain ? a.gain + expert_of(row, a.first_rows) * a.gain_pitch : nullptr,
                 static_cast<Out*>(a.out) + row * a.dim, a.dim, a.eps);
  }
}

void rms_norm(const horsepower::RmsNorm& a) {
  by_types(a.x_bf16, a.out_bf16, [&](auto x, auto out) { rms_norm_rows<decltype(x), decltype(out)>(a); });
}

}  // namespace
