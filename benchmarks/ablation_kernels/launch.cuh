// Launches the forward kernel, without the parts that JAX_FA3_WITHOUT names.
#pragma once

#include "benchmarks/ablation_kernels/family.h"
#include "benchmarks/ablation_kernels/unspecialised.cuh"
#include "kernels/forward/launch.cuh"

namespace jax_fa3 {

template <class Config>
Status AblatedForward::launch(const Plan& plan, const Problem& problem, cudaStream_t stream) {
  using T = ForwardTraits<Config>;
  const Shape& s = problem.shape;
  if (plan.num_tiles == 0) return {};

  const CallMaps maps{s, problem.out};
  ForwardParams p;
  JFA_CHECK_OK(
      maps.of_queries<typename T::QTile>(&p.query, problem.query, s.head_dim, kWarpgroupRows));
  JFA_CHECK_OK(maps.of_keys<typename T::KTile>(&p.key, problem.key, s.head_dim));
  JFA_CHECK_OK(maps.of_keys<typename T::VTile>(&p.value, problem.value, s.head_dim_v));
  JFA_CHECK_OK(
      maps.of_queries<typename T::OTile>(&p.out, problem.out, s.head_dim_v, kWarpgroupRows));
  JFA_CHECK_OK(set_common(&p, plan, problem, stream));
  constexpr int kShared = sizeof(typename T::SharedStorage);
  if constexpr (kSpecialised) {
    return launch_kernel("forward_kernel", forward_kernel<T, AblatedConsumer<T>>, dim3(plan.grid),
                         T::kThreads, kShared, stream, p);
  } else {
    return launch_kernel("unspecialised_kernel", unspecialised_kernel<T>, dim3(plan.grid),
                         T::kConsumers * kWarpgroupThreads, kShared, stream, p);
  }
}

}  // namespace jax_fa3
