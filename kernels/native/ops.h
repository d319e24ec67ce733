// What every instruction set implements: one function pointer an op.
#pragma once

#include <cstdint>

namespace horsepower {

struct AddRmsNorm {
  const float* residual;     // [rows, dim], rows residual_pitch apart
  const void* branch;        // [rows, dim], rows branch_pitch apart; bf16 or float
  const float* post_gain;    // [dim] or [3, dim]; null: the branch is not normalised
  const float* gain;         // [dim] or [3, dim]
  float* sum;                // [rows, dim]
  void* normed;              // [rows, dim]; bf16 or float
  int64_t residual_pitch, branch_pitch;
  int64_t post_gain_pitch, gain_pitch;  // dim, or 0 when one gain serves all rows
  int64_t rows, dim;
  int64_t first_rows[2];     // where the second and the third modality's rows begin; `rows` when all share their gains
  float eps;
  bool branch_bf16, normed_bf16;
  int threads;
};

struct Activation {
  enum Kind { SWIGLU7, GELU7, GELU, GELU_TANH, SILU };
  const void* u;  // [rows, dim], or interleaved pairs [rows, 2 dim] for SWIGLU7, rows pitch apart; bf16 or float
  void* out;      // [rows, dim]; bf16 or float
  int64_t pitch, rows, dim;
  Kind kind;
  bool u_bf16, out_bf16;
  int threads;
};

struct SiluMul {
  const void *gate, *up;  // [rows, dim], rows gate_pitch and up_pitch apart; both bf16 or float
  void* out;              // [rows, dim]; bf16 or float
  int64_t gate_pitch, up_pitch, rows, dim;
  bool bf16, out_bf16;
  int threads;
};

struct LayerNorm {
  const void* x;              // [rows, dim], rows pitch apart; bf16 or float
  const float *weight, *bias; // [dim]; null for none
  void* out;                  // [rows, dim]; bf16 or float
  int64_t pitch, rows, dim;
  float eps;
  bool x_bf16, out_bf16;
  int threads;
};

struct QkNormRope {
  const void* qkv;             // [rows, (heads_q + heads_kv) * dim and more], rows qkv_pitch apart; bf16 or float
  const float *q_gain, *k_gain;  // [dim] or [3, dim]
  const float* rope;           // [rows, 2 half], rows rope_pitch apart: sines, then cosines
  void *q, *k;                 // [rows, heads_q, dim] and [rows, heads_kv, dim], in qkv's type
  int64_t qkv_pitch, rope_pitch;
  int64_t gain_pitch;          // dim, or 0 when one gain serves all rows
  int64_t rows, heads_q, heads_kv, dim, half;
  int64_t first_rows[2];       // as above
  float eps;
  bool bf16;
  int threads;
};

struct RmsNorm {
  const void* x;          // [rows, dim], rows pitch apart; bf16 or float
  const float* gain;      // [dim] or [3, dim]; null for none
  void* out;              // [rows, dim]; bf16 or float
  int64_t pitch, gain_pitch, rows, dim;
  int64_t first_rows[2];  // as above
  float eps;
  bool x_bf16, out_bf16;
  int threads;
};

struct Attention {
  const void* q;             // [rows, heads, dim]; bf16 or float, as are k, v and out
  const void* k;             // [keys, kv_heads, dim]
  const void* v;             // [keys, kv_heads, dim]
  const void* gate;          // before the sigmoid, [rows, heads] or [experts, heads]; null for none; bf16 or float
  void* out;                 // [rows, heads, dim], contiguous
  void* workspace;           // as many bytes as attention_workspace says, at a multiple of 64
  int64_t q_pitch, q_head;   // elements between rows and between heads
  int64_t k_pitch, k_head, v_pitch, v_head;
  int64_t gate_pitch;        // elements between the gates of two rows; 0 for one a head
  int64_t first_rows[2];     // where the second and the third expert's rows begin; all when there is one expert
  const int64_t* ranges;     // [range_count, 6]: first and last + 1 of query rows, and of two ranges of keys they see
  int64_t range_count;
  int64_t keys, heads, kv_heads, dim;
  bool bf16, gate_bf16;
  int threads;
};

struct Linear {
  const void* x;         // [rows, depth], rows x_pitch apart; bf16 or float
  const uint8_t* codes;  // e4m3 weights [experts * width, depth], rows codes_pitch apart
  const float* scales;   // [experts * width]
  void* out;             // [rows, width], rows out_pitch apart; in x's type
  void* workspace;       // as many bytes as linear_workspace says, at a multiple of 64
  int64_t x_pitch, codes_pitch, out_pitch;
  int64_t rows, depth, width;
  int64_t first_rows[2];  // where the second and the third expert's rows begin; `rows` when there is one expert
  bool bf16;
  int threads;
};

struct Ops {
  void (*add_rms_norm)(const AddRmsNorm&);
  void (*activation)(const Activation&);
  int64_t (*attention_workspace)(const Attention&);  // reads only keys, heads, kv_heads, dim, bf16 and threads
  void (*attention)(const Attention&);
  void (*qk_norm_rope)(const QkNormRope&);
  void (*rms_norm)(const RmsNorm&);
  void (*layer_norm)(const LayerNorm&);
  void (*silu_mul)(const SiluMul&);
  int64_t (*linear_workspace)(const Linear&);  // reads only depth, bf16 and threads
  void (*linear)(const Linear&);
};

const Ops& portable_ops();
#if defined(__x86_64__)
const Ops& avx2_ops();
const Ops& avx512_ops();
const Ops& avx512_bf16_ops();
#endif

constexpr int MAX_ISAS = 4;

// Names of the instruction sets that this CPU runs, best first.
int supported_isas(const char* (&names)[MAX_ISAS]);
// The ops of one of them; null for a name that this CPU does not run.
const Ops* ops_for(const char* isa);

}  // namespace horsepower
