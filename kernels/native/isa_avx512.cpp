#include "activation.inl"
#include "add_rms_norm.inl"
#include "attention.inl"
#include "layer_norm.inl"
#include "linear.inl"
#include "qk_norm_rope.inl"
#include "rms_norm.inl"

namespace horsepower {

const Ops& avx512_ops() {
  static constexpr Ops ops{add_rms_norm, activation, attention_workspace, attention,        qk_norm_rope,
                           rms_norm,     layer_norm, silu_mul,            linear_workspace, linear};
  return ops;
}

}  // namespace horsepower
