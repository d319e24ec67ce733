#include "activation.inl"
#include "add_rms_norm.inl"
#include "qk_norm_rope.inl"

namespace horsepower {

const Ops& avx512_ops() {
  static constexpr Ops ops{add_rms_norm, activation, qk_norm_rope};
  return ops;
}

}  // namespace horsepower
