// The pre-kernel that brings a plain value into the prepared layout (attention/prepared_value.h).
#pragma once

#include "attention/prepared_value.h"
#include "base/problem.h"
#include "base/status.h"

struct CUstream_st;

namespace jax_fa3 {

constexpr int kTransposeColumns = 64;  // of value, for each CTA; by kPreparedBlock keys

// CTAs of the launch; below 2^63 if value's bytes are.
constexpr std::int64_t transpose_blocks(const Shape& shape) {
  return shape.batch * shape.num_heads_kv * (padded_keys(shape.seqlen_k) / kPreparedBlock) *
         ceil_div<std::int64_t>(shape.head_dim_v, kTransposeColumns);
}

// problem.value [b, s_k, h_kv, d_v] into problem.workspace [b, h_kv, d_v, padded keys]; keys past
// s_k become 0. Defined in builds with kernels.
Status launch_transpose(const ForwardFloat8Problem& problem, CUstream_st* stream);

}  // namespace jax_fa3
