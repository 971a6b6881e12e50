// One attention call, as the kernels see it: extents, options and device pointers.
//
// Arrays are dense and row-major, (batch, seq, heads, head_dim); the strides follow from the
// extents and are not stored. Lengths are in tokens, windows in columns, both sides inclusive.
#pragma once

#include <cstdint>
#include <string_view>

#include "call/function.h"
#include "call/types.h"

namespace jax_fa3 {

// What is known before any buffer exists; enough to plan.
struct Shape {
  DType dtype = DType::kBF16;
  std::int64_t batch = 0;
  std::int64_t seqlen_q = 0;
  std::int64_t seqlen_k = 0;
  std::int64_t num_heads_q = 0;
  std::int64_t num_heads_kv = 0;
  std::int64_t head_dim = 0;    // of query and key
  std::int64_t head_dim_v = 0;  // of value and output
};

// Row i of the queries sees key j when i < query_length, j < key_length and
// i + offset - window_left <= j <= i + offset + window_right. A side of kUnbounded is off.
struct MaskOptions {
  std::int32_t window_left = kUnbounded;
  std::int32_t window_right = kUnbounded;
  std::int32_t query_offset = 0;  // used when the offset array is absent
};

// Index arrays in device memory; a null pointer means absent. Values outside [0, seqlen] (lengths,
// intervals) or +/- kMaxSeqlen (offsets) are clamped by the kernels.
struct IndexArrays {
  const std::int32_t* query_lengths = nullptr;  // [b]
  const std::int32_t* key_lengths = nullptr;    // [b]
  const std::int32_t* query_offset = nullptr;   // [b]
  const std::int32_t* visibility = nullptr;     // [b or 1, h_q or 1, words]; attention/visibility.h
  std::int64_t visibility_batch_stride = 0;     // words; 0 where all sequences share planes
  std::int64_t visibility_head_stride = 0;      // words; 0 where all heads share a plane
};

// An array with a value for each pair of a row and a key, that may be the same for several
// sequences, for all heads and for all rows: as many sequences in a row as there are for each of
// its planes share one.
struct Broadcast {
  std::int64_t sequences = 1;  // of batch, which it divides
  std::int64_t heads = 1;      // 1 or num_heads_q
  std::int64_t rows = 1;       // 1 or seqlen_q
};

// Dense arrays in device memory; a null pointer means absent.
struct DenseArrays {
  const void* bias = nullptr;  // [sequences, heads, rows, padded_bias_keys], in query's dtype
  Broadcast bias_shape;
  const std::int32_t* mask = nullptr;  // [sequences, heads, words]; attention/dense_mask.h
  Broadcast mask_shape;
};

// A number for each query head, in device memory, that may be the same for several sequences; a
// null pointer means absent.
struct HeadValues {
  const float* values = nullptr;  // [planes, h_q]
  std::int64_t planes = 1;        // divides batch: so many sequences in a row share one
};

// What a call with a score function has beside; null where it has none. The kernels are those that
// the function has been linked into, handles of the runtime.
struct FunctionArrays {
  const std::int32_t* batch_numbers = nullptr;  // [b], as the function counts them
  const std::int32_t* head_numbers = nullptr;   // [h_q]
  const std::int32_t* blocks = nullptr;  // [sequences, heads, words]; BlockLayout (attention/)
  Broadcast blocks_shape;
  JfaCaptured captured{};
  std::string_view kernel_key;         // by which the kernel has been loaded
  std::string_view dquery_kernel_key;  // of the backward pass, where dQ has a kernel of its own
  const void* kernel = nullptr;
  const void* dquery_kernel = nullptr;
};

// A bias' keys, whole packets of TMA.
constexpr std::int64_t padded_bias_keys(std::int64_t seqlen_k) { return (seqlen_k + 7) / 8 * 8; }

// What a call has, as far as plans ask: with any index array, or a dense mask, work tiles differ in
// length as no plan can know.
struct IndexPresence {
  bool any = false;
  bool visibility = false;
  Variant variant = Variant::kPlain;
};

// What a call of either direction has.
struct CallProblem {
  Shape shape;
  MaskOptions mask;
  IndexArrays index;
  DenseArrays dense;
  HeadValues sinks;         // natural logits, each of a key that has no value
  HeadValues alibi_slopes;  // of logits, for each row or key of distance
  FunctionArrays function;
  IndexPresence presence;
  float softmax_scale = 1.f;  // > 0
  float softcap = 0.f;        // logits are softcap * tanh(logit / softcap); 0: as they are

  const void* query = nullptr;  // [b, s_q, h_q, d]
  const void* key = nullptr;    // [b, s_k, h_kv, d]
  const void* value = nullptr;  // [b, s_k, h_kv, d_v]
};

struct ForwardProblem : CallProblem {
  // Log2 units a row maximum may grow before O is rescaled; 0: exact.
  float rescale_threshold = 8.f;

  void* out = nullptr;          // [b, s_q, h_q, d_v]
  float* lse = nullptr;         // [b, h_q, s_q], natural log, -inf for a row that sees no key
  float* max_logits = nullptr;  // [b, h_q, s_q], the largest that a row sees, as the LSE; or null
  std::int32_t* tile_counter = nullptr;  // [1], workspace
};

// Rows or keys that share a scale, where there is more than one to a head.
constexpr int kDescaleBlock = 128;

// The forward pass of e4m3 arrays; shape.dtype is the output's. The logits are
// softmax_scale * query_descale * key_descale * (query . key).
struct ForwardFloat8Problem : ForwardProblem {
  const float* query_descale = nullptr;  // [b, h_q, query_descales]
  const float* key_descale = nullptr;    // [b, h_kv, key_descales]
  const float* value_descale = nullptr;  // [b, h_kv]
  std::int64_t query_descales = 1;       // of a head: 1, or one for each block of rows
  std::int64_t key_descales = 1;         // of a head: 1, or one for each block of keys
  bool value_is_prepared = false;        // then value is [b, h_kv, d_v, padded keys]
  void* workspace = nullptr;             // ForwardFloat8Plan::workspace_bytes
  std::int64_t workspace_bytes = 0;      // that it has
};

struct BackwardProblem : CallProblem {
  bool deterministic = false;

  const void* out = nullptr;         // [b, s_q, h_q, d_v]
  const float* lse = nullptr;        // [b, h_q, s_q]
  const void* dout = nullptr;        // [b, s_q, h_q, d_v]
  const float* dlse = nullptr;       // [b, h_q, s_q] or null
  void* dquery = nullptr;            // [b, s_q, h_q, d]
  void* dkey = nullptr;              // [b, s_k, h_kv, d]
  void* dvalue = nullptr;            // [b, s_k, h_kv, d_v]
  void* dbias = nullptr;             // as dense.bias, or null
  float* dsinks = nullptr;           // [b, h_q, s_q], what a row gives its sink; or null
  void* workspace = nullptr;         // BackwardPlan::workspace_bytes
  std::int64_t workspace_bytes = 0;  // that it has
};

}  // namespace jax_fa3
