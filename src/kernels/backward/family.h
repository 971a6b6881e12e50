// The backward pass, as a kernel family.
#pragma once

#include "kernels/backward/plan.h"
#include "kernels/family.h"

namespace jax_fa3 {

struct Backward {
  static constexpr const char* kName = "backward";
  using Key = BackwardKey;
  using Plan = BackwardPlan;
  using Problem = BackwardProblem;

  template <class Config>
  static Status launch(const Plan& plan, const Problem& problem, CUstream_st* stream);

  static Fields describe(const Key& key) {
    return {{"direction", kName},
            {"dtype", to_string(key.dtype)},
            {"head_dim", key.head_dim},
            {"head_dim_v", key.head_dim_v},
            {"block_m", key.block_m},
            {"block_n", key.block_n},
            {"separate_dq", key.separate_dq},
            {"variant", to_string(key.variant)}};
  }
  static Fields describe(const Plan& plan) {
    return joined({describe(plan.key),
                   {{"num_m_blocks", plan.num_m_blocks},
                    {"num_n_blocks", plan.num_n_blocks},
                    {"heads_per_group", plan.heads_per_group},
                    {"num_chunks", plan.num_chunks},
                    {"num_tiles", plan.num_tiles},
                    {"grid", plan.grid},
                    {"dq_offset", plan.dq_offset},
                    {"statistics_offset", plan.statistics_offset},
                    {"tile_counters_offset", plan.tile_counters_offset},
                    {"workspace_bytes", plan.workspace_bytes}}});
  }
};

}  // namespace jax_fa3
