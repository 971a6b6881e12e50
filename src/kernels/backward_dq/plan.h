// What the launch of the separate dQ kernel needs beside the backward kernel's Config.
#pragma once

#include <cstdint>

#include "call/types.h"

namespace jax_fa3 {

// Query rows of a work tile, 64 for each consumer warpgroup: three of them where their accumulators
// fit the registers, of plain scores up to a greater head_dim. A function needs registers of its
// own.
constexpr int dquery_block_m(int head_dim, Variant variant) {
  if (has_function(variant)) return 128;
  return head_dim <= (variant == Variant::kPlain ? 96 : 64) ? 192 : 128;
}

struct DQueryPlan {
  std::int32_t heads_per_group;  // (batch, query head) pairs whose K and V are in use at once
  std::int64_t num_tiles;
  std::int32_t grid;
};

}  // namespace jax_fa3
