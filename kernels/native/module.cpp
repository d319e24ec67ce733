// Bindings. Tensors arrive as addresses: a capsule a call would cost more than the small kernels do.
// The Python side of each op checks shapes, dtypes and strides before it calls.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "ops.h"

namespace nb = nanobind;

namespace {

std::vector<std::string> isas() {
  const char* names[horsepower::MAX_ISAS];
  return {names, names + horsepower::supported_isas(names)};
}

const horsepower::Ops& require(const std::string& isa) {
  const horsepower::Ops* ops = horsepower::ops_for(isa.c_str());
  if (!ops) throw nb::value_error(("isa: got '" + isa + "', allowed: what isas() lists").c_str());
  return *ops;
}

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void add_rms_norm(const std::string& isa, uintptr_t residual, uintptr_t branch, uintptr_t post_gain, uintptr_t gain,
                  uintptr_t sum, uintptr_t normed, int64_t residual_pitch, int64_t branch_pitch,
                  int64_t post_gain_pitch, int64_t gain_pitch, int64_t rows, int64_t dim, int64_t second,
                  int64_t third, float eps, bool branch_bf16, bool normed_bf16, int threads) {
  const auto& ops = require(isa);
  nb::gil_scoped_release release;
  ops.add_rms_norm({at<const float>(residual), at<const void>(branch), at<const float>(post_gain),
                    at<const float>(gain), at<float>(sum), at<void>(normed), residual_pitch, branch_pitch,
                    post_gain_pitch, gain_pitch, rows, dim, {second, third}, eps, branch_bf16, normed_bf16, threads});
}

void activation(const std::string& isa, uintptr_t u, uintptr_t out, int64_t pitch, int64_t rows, int64_t dim,
                int kind, bool u_bf16, bool out_bf16, int threads) {
  const auto& ops = require(isa);
  nb::gil_scoped_release release;
  ops.activation({at<const void>(u), at<void>(out), pitch, rows, dim,
                  static_cast<horsepower::Activation::Kind>(kind), u_bf16, out_bf16, threads});
}

void silu_mul(const std::string& isa, uintptr_t gate, uintptr_t up, uintptr_t out, int64_t gate_pitch,
              int64_t up_pitch, int64_t rows, int64_t dim, bool bf16, bool out_bf16, int threads) {
  const auto& ops = require(isa);
  nb::gil_scoped_release release;
  ops.silu_mul({at<const void>(gate), at<const void>(up), at<void>(out), gate_pitch, up_pitch, rows, dim, bf16,
                out_bf16, threads});
}

void layer_norm(const std::string& isa, uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t out, int64_t pitch,
                int64_t rows, int64_t dim, float eps, bool x_bf16, bool out_bf16, int threads) {
  const auto& ops = require(isa);
  nb::gil_scoped_release release;
  ops.layer_norm({at<const void>(x), at<const float>(weight), at<const float>(bias), at<void>(out), pitch, rows, dim,
                  eps, x_bf16, out_bf16, threads});
}

void qk_norm_rope(const std::string& isa, uintptr_t qkv, uintptr_t q_gain, uintptr_t k_gain, uintptr_t rope,
                  uintptr_t q, uintptr_t k, int64_t qkv_pitch, int64_t rope_pitch, int64_t gain_pitch, int64_t rows,
                  int64_t heads_q, int64_t heads_kv, int64_t dim, int64_t half, int64_t second, int64_t third,
                  float eps, bool bf16, int threads) {
  const auto& ops = require(isa);
  nb::gil_scoped_release release;
  ops.qk_norm_rope({at<const void>(qkv), at<const float>(q_gain), at<const float>(k_gain), at<const float>(rope),
                    at<void>(q), at<void>(k), qkv_pitch, rope_pitch, gain_pitch, rows, heads_q, heads_kv, dim, half,
                    {second, third}, eps, bf16, threads});
}

void rms_norm(const std::string& isa, uintptr_t x, uintptr_t gain, uintptr_t out, int64_t pitch, int64_t gain_pitch,
              int64_t rows, int64_t dim, int64_t second, int64_t third, float eps, bool x_bf16, bool out_bf16,
              int threads) {
  const auto& ops = require(isa);
  nb::gil_scoped_release release;
  ops.rms_norm({at<const void>(x), at<const float>(gain), at<void>(out), pitch, gain_pitch, rows, dim,
                {second, third}, eps, x_bf16, out_bf16, threads});
}

int64_t attention_workspace(const std::string& isa, int64_t keys, int64_t heads, int64_t kv_heads, int64_t dim,
                            bool bf16, int threads) {
  horsepower::Attention sizes{};
  sizes.keys = keys;
  sizes.heads = heads;
  sizes.kv_heads = kv_heads;
  sizes.dim = dim;
  sizes.bf16 = bf16;
  sizes.threads = threads;
  return require(isa).attention_workspace(sizes);
}

void attention(const std::string& isa, uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t gate, uintptr_t out,
               uintptr_t workspace, int64_t q_pitch, int64_t q_head, int64_t k_pitch, int64_t k_head, int64_t v_pitch,
               int64_t v_head, int64_t gate_pitch, int64_t second, int64_t third, const std::vector<int64_t>& ranges,
               int64_t keys, int64_t heads, int64_t kv_heads, int64_t dim, bool bf16, bool gate_bf16, int threads) {
  const auto& ops = require(isa);
  nb::gil_scoped_release release;
  ops.attention({at<const void>(q), at<const void>(k), at<const void>(v), at<const void>(gate), at<void>(out),
                 at<void>(workspace), q_pitch, q_head, k_pitch, k_head, v_pitch, v_head, gate_pitch, {second, third},
                 ranges.data(), static_cast<int64_t>(ranges.size() / 6), keys, heads, kv_heads, dim, bf16, gate_bf16,
                 threads});
}

int64_t linear_workspace(const std::string& isa, int64_t depth, bool bf16, int threads) {
  horsepower::Linear sizes{};
  sizes.depth = depth;
  sizes.bf16 = bf16;
  sizes.threads = threads;
  return require(isa).linear_workspace(sizes);
}

void linear(const std::string& isa, uintptr_t x, uintptr_t codes, uintptr_t scales, uintptr_t out, uintptr_t workspace,
            int64_t x_pitch, int64_t codes_pitch, int64_t out_pitch, int64_t rows, int64_t depth, int64_t width,
            int64_t second, int64_t third, bool bf16, int threads) {
  const auto& ops = require(isa);
  nb::gil_scoped_release release;
  ops.linear({at<const void>(x), at<const uint8_t>(codes), at<const float>(scales), at<void>(out), at<void>(workspace),
              x_pitch, codes_pitch, out_pitch, rows, depth, width, {second, third}, bf16, threads});
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Native CPU kernels of horsepower, in the widest instruction set that the CPU has.";
  m.def("isas", &isas, "Instruction sets that this CPU runs, best first.");
  using namespace nb::literals;
  m.def("add_rms_norm", &add_rms_norm, "isa"_a, "residual"_a, "branch"_a, "post_gain"_a, "gain"_a, "sum"_a,
        "normed"_a, "residual_pitch"_a, "branch_pitch"_a, "post_gain_pitch"_a, "gain_pitch"_a, "rows"_a, "dim"_a,
        "second"_a, "third"_a, "eps"_a, "branch_bf16"_a, "normed_bf16"_a, "threads"_a,
        "See horsepower.kernels.add_rms_norm. Addresses; pitches in elements.");
  m.def("activation", &activation, "isa"_a, "u"_a, "out"_a, "pitch"_a, "rows"_a, "dim"_a, "kind"_a, "u_bf16"_a,
        "out_bf16"_a, "threads"_a, "See horsepower.kernels.activation. Addresses; pitches in elements.");
  m.def("silu_mul", &silu_mul, "isa"_a, "gate"_a, "up"_a, "out"_a, "gate_pitch"_a, "up_pitch"_a, "rows"_a, "dim"_a,
        "bf16"_a, "out_bf16"_a, "threads"_a, "See horsepower.kernels.silu_mul. Addresses; pitches in elements.");
  m.def("layer_norm", &layer_norm, "isa"_a, "x"_a, "weight"_a, "bias"_a, "out"_a, "pitch"_a, "rows"_a, "dim"_a,
        "eps"_a, "x_bf16"_a, "out_bf16"_a, "threads"_a,
        "See horsepower.kernels.layer_norm. Addresses; pitches in elements.");
  m.def("qk_norm_rope", &qk_norm_rope, "isa"_a, "qkv"_a, "q_gain"_a, "k_gain"_a, "rope"_a, "q"_a, "k"_a,
        "qkv_pitch"_a, "rope_pitch"_a, "gain_pitch"_a, "rows"_a, "heads_q"_a, "heads_kv"_a, "dim"_a, "half"_a,
        "second"_a, "third"_a, "eps"_a, "bf16"_a, "threads"_a,
        "See horsepower.kernels.qk_norm_rope. Addresses; pitches in elements.");
  m.def("rms_norm", &rms_norm, "isa"_a, "x"_a, "gain"_a, "out"_a, "pitch"_a, "gain_pitch"_a, "rows"_a, "dim"_a,
        "second"_a, "third"_a, "eps"_a, "x_bf16"_a, "out_bf16"_a, "threads"_a,
        "See horsepower.kernels.rms_norm. Addresses; pitches in elements.");
  m.def("attention_workspace", &attention_workspace, "isa"_a, "keys"_a, "heads"_a, "kv_heads"_a, "dim"_a, "bf16"_a,
        "threads"_a, "Bytes of scratch memory that attention needs.");
  m.def("attention", &attention, "isa"_a, "q"_a, "k"_a, "v"_a, "gate"_a, "out"_a, "workspace"_a, "q_pitch"_a,
        "q_head"_a, "k_pitch"_a, "k_head"_a, "v_pitch"_a, "v_head"_a, "gate_pitch"_a, "second"_a, "third"_a,
        "ranges"_a, "keys"_a, "heads"_a, "kv_heads"_a, "dim"_a, "bf16"_a, "gate_bf16"_a, "threads"_a,
        "See horsepower.kernels.attention. Addresses; pitches in elements; six numbers a range.");
  m.def("linear_workspace", &linear_workspace, "isa"_a, "depth"_a, "bf16"_a, "threads"_a,
        "Bytes of scratch memory that linear needs.");
  m.def("linear", &linear, "isa"_a, "x"_a, "codes"_a, "scales"_a, "out"_a, "workspace"_a, "x_pitch"_a, "codes_pitch"_a,
        "out_pitch"_a, "rows"_a, "depth"_a, "width"_a, "second"_a, "third"_a, "bf16"_a, "threads"_a,
        "See horsepower.kernels.linear. Addresses; pitches in elements.");
}
