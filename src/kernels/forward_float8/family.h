// The forward pass on e4m3 arrays, as a kernel family.
#pragma once

#include "kernels/forward/family.h"
#include "kernels/forward_float8/plan.h"

namespace jax_fa3 {

struct ForwardFloat8 {
  static constexpr const char* kName = "forward_float8";
  using Key = ForwardFloat8Key;
  using Plan = ForwardFloat8Plan;
  using Problem = ForwardFloat8Problem;

  template <class Config>
  static Status launch(const Plan& plan, const Problem& problem, CUstream_st* stream);

  static Fields describe(const Key& key) {
    return {{"direction", kName},           {"dtype", "e4m3"},        {"head_dim", key.head_dim},
            {"head_dim_v", key.head_dim_v}, {"block_m", key.block_m}, {"block_n", key.block_n}};
  }
  static Fields describe(const Plan& plan) {
    return joined(
        {describe(plan.key), describe_order(plan), {{"workspace_bytes", plan.workspace_bytes}}});
  }
};

}  // namespace jax_fa3
