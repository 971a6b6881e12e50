// From a problem's extents to everything the launch needs. Pure host code: no CUDA call, tested
// without a GPU.
#pragma once

#include <string>
#include <vector>

#include "base/problem.h"
#include "base/status.h"
#include "forward/config.h"

namespace jax_fa3 {

struct ForwardPlan {
  ForwardKey key;
  std::int32_t num_m_blocks;     // work tiles along the queries of one (batch, head)
  std::int32_t heads_per_group;  // (batch, head) pairs whose K and V are live in L2 at once
  bool longest_first;            // tiles differ in length: deepest rows first, from a counter
  std::int64_t num_tiles;        // work tiles in all
  std::int32_t grid;             // persistent CTAs
};

// `available` is the list of kernels to choose from (forward/dispatch.h has the compiled ones).
StatusOr<ForwardPlan> plan_forward(const Shape& shape, const MaskOptions& mask,
                                   const std::vector<ForwardKey>& available, int num_sms);

std::string to_string(const ForwardPlan& plan);

}  // namespace jax_fa3
