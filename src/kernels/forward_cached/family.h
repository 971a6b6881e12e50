// The forward pass over caches of keys and values, as a kernel family.
#pragma once

#include "attention/cached.h"
#include "kernels/family.h"
#include "kernels/forward_cached/plan.h"

namespace jax_fa3 {

struct ForwardCached {
  static constexpr const char* kName = "forward_cached";
  using Key = ForwardCachedKey;
  using Plan = ForwardCachedPlan;
  using Problem = ForwardCachedProblem;

  template <class Config>
  static Status launch(const Plan& plan, const Problem& problem, CUstream_st* stream);

  static Fields describe(const Key& key) {
    return {{"direction", kName},        {"dtype", to_string(key.dtype)},
            {"head_dim", key.head_dim},  {"head_dim_v", key.head_dim_v},
            {"block_m", key.block_rows}, {"block_n", tile_keys(key)}};
  }
  static Fields describe(const Plan& plan) {
    return joined({describe(plan.key),
                   {{"heads_at_once", plan.heads_at_once},
                    {"groups", plan.groups},
                    {"grid", plan.grid},
                    {"workspace_bytes", plan.workspace_bytes},
                    {"counters", plan.num_counters}}});
  }
};

}  // namespace jax_fa3
