// 16-bit query, key and value to e4m3 with scales, or to what they are after that rounding. Memory
// bound: query and key are read once, value twice, since all of a head shares its scale.
#pragma once

#include "call/problem.h"
#include "call/status.h"

struct CUstream_st;

namespace jax_fa3 {

constexpr std::int64_t kQuantizeHeadDimMultiple = 16;  // half a row of four packets (rotation.h)

// Query and key are rotated, with a scale for each kDescaleBlock rows; value has one for each head,
// and comes out in the prepared layout or as it is. With `back` the results are the rounded arrays
// in the dtype, basis and layout that they came in.
struct QuantizeProblem {
  Shape shape;
  IndexArrays index;       // of which there are lengths
  std::uint32_t seed = 0;  // of the rotation
  bool back = false;
  bool prepare_value = false;  // not with `back`

  const void* query = nullptr;     // [b, s_q, h_q, d]
  const void* key = nullptr;       // [b, s_k, h_kv, d]
  const void* value = nullptr;     // [b, s_k, h_kv, d_v]
  void* query_out = nullptr;       // as query
  void* key_out = nullptr;         // as key
  void* value_out = nullptr;       // as value, or [b, h_kv, d_v, padded keys]
  float* query_descale = nullptr;  // [b, h_q, blocks]
  float* key_descale = nullptr;    // [b, h_kv, blocks]
  float* value_descale = nullptr;  // [b, h_kv]
};

// What the launches need of the extents; the message names got and expected. No dimension may be 0.
Status check_quantize(const Shape& shape);

// Defined in builds with kernels. Query and key come first: that launch clears value_descale, of
// which the next one takes maxima.
Status launch_quantize_rows(const QuantizeProblem& problem, CUstream_st* stream);
Status launch_quantize_value(const QuantizeProblem& problem, CUstream_st* stream);

}  // namespace jax_fa3
