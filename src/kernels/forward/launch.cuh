// Plan and problem become tensor maps, kernel parameters and one launch.
#pragma once

#include "device/launch.cuh"
#include "kernels/forward/consumer.cuh"
#include "kernels/forward/family.h"
#include "kernels/forward/kernel.cuh"
#include "kernels/maps.cuh"

namespace jax_fa3 {

// What all forward kernels are launched with, tensor maps apart; clears the tile counter.
inline Status set_common(ForwardParams* p, const TileOrder& order, const ForwardProblem& problem,
                         cudaStream_t stream) {
  const Shape& s = problem.shape;
  static_cast<CommonParams&>(*p) = common_params(problem);
  p->scheduler = TileScheduler{order.num_m_blocks,
                               p->num_heads,
                               static_cast<int>(s.batch * s.num_heads_q),
                               order.heads_per_group,
                               static_cast<int>(order.num_tiles),
                               order.longest_first,
                               order.by_counter ? problem.tile_counter : nullptr};
  p->rescale_threshold = problem.rescale_threshold;
  // While a row's maximum is negative, its reference is the only one that knows it.
  p->negative_threshold = problem.max_logits != nullptr ? 0.f : problem.rescale_threshold;
  p->sinks = head_table(problem.sinks, s);
  p->lse = problem.lse;
  p->max_logits = problem.max_logits;
  if (!order.by_counter) return {};
  return cuda_status(cudaMemsetAsync(problem.tile_counter, 0, sizeof(int), stream),
                     "cudaMemsetAsync of the tile counter");
}

template <class Config>
Status Forward::launch(const Plan& plan, const Problem& problem, cudaStream_t stream) {
  using T = TraitsOf<Config>;
  const Shape& s = problem.shape;
  if (plan.num_tiles == 0) return {};

  const CallMaps maps{s, problem.out};
  typename T::Params p;
  JFA_CHECK_OK(
      maps.of_queries<typename T::QTile>(&p.query, problem.query, s.head_dim, kWarpgroupRows));
  JFA_CHECK_OK(maps.of_keys<typename T::KTile>(&p.key, problem.key, s.head_dim));
  JFA_CHECK_OK(maps.of_keys<typename T::VTile>(&p.value, problem.value, s.head_dim_v));
  JFA_CHECK_OK(
      maps.of_queries<typename T::OTile>(&p.out, problem.out, s.head_dim_v, kWarpgroupRows));
  JFA_CHECK_OK(set_common(&p, plan, problem, stream));
  if constexpr (T::kListed) JFA_CHECK_OK(set_dense<T>(&p, problem));
  constexpr int kSharedBytes = sizeof(typename T::SharedStorage);
  if constexpr (has_function(Config::kVariant)) {
    p.score = function_params(problem);
    return launch_loaded("forward_kernel", problem.function.kernel, dim3(plan.grid), T::kThreads,
                         kSharedBytes, stream, p);
  } else {
    return launch_kernel("forward_kernel", forward_kernel<T, ConsumerOf<T>>, dim3(plan.grid),
                         T::kThreads, kSharedBytes, stream, p);
  }
}

}  // namespace jax_fa3
