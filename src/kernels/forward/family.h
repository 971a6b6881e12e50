// The forward pass on 16-bit arrays, as a kernel family.
#pragma once

#include "kernels/family.h"
#include "kernels/forward/plan.h"

namespace jax_fa3 {

inline Fields describe_order(const TileOrder& order) {
  return {{"num_m_blocks", order.num_m_blocks},   {"heads_per_group", order.heads_per_group},
          {"longest_first", order.longest_first}, {"by_counter", order.by_counter},
          {"num_tiles", order.num_tiles},         {"grid", order.grid}};
}

struct Forward {
  static constexpr const char* kName = "forward";
  using Key = ForwardKey;
  using Plan = ForwardPlan;
  using Problem = ForwardProblem;

  template <class Config>
  static Status launch(const Plan& plan, const Problem& problem, CUstream_st* stream);

  static Fields describe(const Key& key) {
    return {{"direction", kName},
            {"dtype", to_string(key.dtype)},
            {"head_dim", key.head_dim},
            {"head_dim_v", key.head_dim_v},
            {"block_m", key.block_m},
            {"block_n", key.block_n},
            {"variant", to_string(key.variant)}};
  }
  static Fields describe(const Plan& plan) {
    return joined({describe(plan.key), describe_order(plan)});
  }
};

}  // namespace jax_fa3
