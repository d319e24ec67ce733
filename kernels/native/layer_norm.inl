// Layer norm and cast. Included once an instruction set.
#include "ops.h"
#include "row_norm.inl"

namespace {

// The variance is taken about the mean, since squares minus the squared mean would cancel; what the mean was rounded by
// is the mean of the differences from it.
template <typename X, typename Out>
void layer_norm_row(const X* __restrict x, const float* __restrict weight, const float* __restrict bias,
                    Out* __restrict out, int64_t dim, float eps) {
  float total = 0, rest = 0, squares = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < dim; ++i) total += widen(x[i]);
  const float mean = total / static_cast<float>(dim);
#pragma omp simd reduction(+ : rest, squares)
  for (int64_t i = 0; i < dim; ++i) {
    const float centred = widen(x[i]) - mean;
    rest += centred;
    squares += centred * centred;
  }
  const float shift = rest / static_cast<float>(dim);
  const float scale = norm_scale(squares - rest * shift, dim, eps);
  if (weight && bias) {
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) narrow((widen(x[i]) - mean - shift) * scale * weight[i] + bias[i], out + i);
  } else if (weight) {
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) narrow((widen(x[i]) - mean - shift) * scale * weight[i], out + i);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) narrow((widen(x[i]) - mean - shift) * scale, out + i);
  }
}

template <typename X, typename Out>
void layer_norm_rows(const horsepower::LayerNorm& a) {
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int64_t row = 0; row < a.rows; ++row)
    layer_norm_row(static_cast<const X*>(a.x) + row * a.pitch, a.weight, a.bias,
                   static_cast<Out*>(a.out) + row * a.dim, a.dim, a.eps);
}

void layer_norm(const horsepower::LayerNorm& a) {
  by_types(a.x_bf16, a.out_bf16, [&](auto x, auto out) { layer_norm_rows<decltype(x), decltype(out)>(a); });
}

}  // namespace
