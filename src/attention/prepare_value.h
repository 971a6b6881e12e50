// How many thread blocks bring a value into the prepared layout.
#pragma once

#include "attention/prepared_value.h"
#include "call/problem.h"

namespace jax_fa3 {

constexpr int kPrepareColumns = 64;  // of value, for each thread block; by kPreparedBlock keys

// Below 2^63 if value's bytes are.
constexpr std::int64_t prepare_blocks(const Shape& shape) {
  return shape.batch * shape.num_heads_kv * (padded_keys(shape.seqlen_k) / kPreparedBlock) *
         ceil_div<std::int64_t>(shape.head_dim_v, kPrepareColumns);
}

}  // namespace jax_fa3
