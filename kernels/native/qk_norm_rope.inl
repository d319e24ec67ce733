// RMS norm, rotation and cast of each query and key head, from the columns of the QKV projection. Included once an
// instruction set.
#include "ops.h"
#include "row_norm.inl"

namespace {

// The first 2 half dimensions turn, (i, i + half) by the i-th angle; the others are only normalised.
template <typename T>
inline void qk_norm_rope_head(const T* __restrict x, const float* __restrict gain, const float* __restrict sin,
                              const float* __restrict cos, T* __restrict out, int64_t dim, int64_t half, float scale) {
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float a = widen(x[i]) * scale * gain[i], b = widen(x[half + i]) * scale * gain[half + i];
    narrow(a * cos[i] - b * sin[i], out + i);
    narrow(b * cos[i] + a * sin[i], out + half + i);
  }
#pragma omp simd
  for (int64_t i = 2 * half; i < dim; ++i) narrow(widen(x[i]) * scale * gain[i], out + i);
}

constexpr int64_t GROUP = 8;  // heads whose roots and divisions overlap, being independent of each other

// Heads are short, so that loops of known length matter: Dim is the head's, its rotation the usual 3/4; 0 is any.
template <typename T, int64_t Dim>
void qk_norm_rope_rows(const horsepower::QkNormRope& a) {
  const int64_t dim = Dim ? Dim : a.dim, half = Dim ? Dim * 3 / 8 : a.half;
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* x = static_cast<const T*>(a.qkv) + row * a.qkv_pitch;
    T* q = static_cast<T*>(a.q) + row * a.heads_q * dim;
    T* k = static_cast<T*>(a.k) + row * a.heads_kv * dim;
    const float* sin = a.rope + row * a.rope_pitch;
    const int64_t own = expert_of(row, a.first_rows) * a.gain_pitch;
    const int64_t heads = a.heads_q + a.heads_kv;
    for (int64_t first = 0; first < heads; first += GROUP) {
      const int64_t end = first + GROUP < heads ? first + GROUP : heads;
      float scales[GROUP];
      for (int64_t head = first; head < end; ++head)
        scales[head - first] = norm_scale(sum_of_squares(x + head * dim, dim), dim, a.eps);
      for (int64_t head = first; head < end; ++head) {
        const bool query = head < a.heads_q;
        T* out = query ? q + head * dim : k + (head - a.heads_q) * dim;
        qk_norm_rope_head(x + head * dim, (query ? a.q_gain : a.k_gain) + own, sin, sin + half, out, dim, half,
                          scales[head - first]);
      }
    }
  }
}

template <typename T>
void qk_norm_rope_of(const horsepower::QkNormRope& a) {
  if (a.dim == 64 && a.half == 24) return qk_norm_rope_rows<T, 64>(a);
  if (a.dim == 128 && a.half == 48) return qk_norm_rope_rows<T, 128>(a);
  qk_norm_rope_rows<T, 0>(a);
}

void qk_norm_rope(const horsepower::QkNormRope& a) {
  a.bf16 ? qk_norm_rope_of<uint16_t>(a) : qk_norm_rope_of<float>(a);
}

}  // namespace
