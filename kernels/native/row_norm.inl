// What every kernel that normalises rows shares. Included once an instruction set.
#pragma once

#include "bf16.inl"

namespace {

template <typename X>
float sum_of_squares(const X* __restrict x, int64_t dim) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < dim; ++i) squares += widen(x[i]) * widen(x[i]);
  return squares;
}

inline float norm_scale(float squares, int64_t dim, float eps) {
  return 1.0f / __builtin_sqrtf(squares / static_cast<float>(dim) + eps);
}

// Which of the three modalities a row belongs to.
inline int64_t expert_of(int64_t row, const int64_t (&first_rows)[2]) {
  return (row >= first_rows[0]) + (row >= first_rows[1]);
}

}  // namespace
