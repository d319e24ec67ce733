#include "activation.inl"
#include "add_rms_norm.inl"

namespace horsepower {

const Ops& avx2_ops() {
  static constexpr Ops ops{add_rms_norm, activation};
  return ops;
}

}  // namespace horsepower
