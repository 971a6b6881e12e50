// Plan and problem become tensor maps, kernel parameters and one launch.
#pragma once

#include "device/launch.cuh"
#include "kernels/backward_dq/kernel.cuh"
#include "kernels/maps.cuh"

namespace jax_fa3 {

// `counter` is 0 when the kernel starts; `statistics` has `statistics_rows` rows for each head.
template <class Config>
Status launch_dquery(const DQueryPlan& plan, const BackwardProblem& problem,
                     const RowStatistics* statistics, int statistics_rows, int* counter,
                     cudaStream_t stream) {
  using T = DQueryTraits<Config>;
  const Shape& s = problem.shape;
  const CallMaps maps{s, problem.workspace};
  typename T::Params p;
  JFA_CHECK_OK(
      maps.of_queries<typename T::QTile>(&p.query, problem.query, s.head_dim, kWarpgroupRows));
  JFA_CHECK_OK(
      maps.of_queries<typename T::DOTile>(&p.dout, problem.dout, s.head_dim_v, kWarpgroupRows));
  JFA_CHECK_OK(maps.of_keys<typename T::KTile>(&p.key, problem.key, s.head_dim));
  JFA_CHECK_OK(maps.of_keys<typename T::VTile>(&p.value, problem.value, s.head_dim_v));
  JFA_CHECK_OK(
      maps.of_queries<typename T::QTile>(&p.dquery, problem.dquery, s.head_dim, kWarpgroupRows));
  static_cast<CommonParams&>(p) = common_params(problem);
  // Tiles differ in length, and the CTAs at work should share keys.
  const bool grouped = problem.mask.window_right < kUnbounded || problem.presence.visibility ||
                       problem.presence.variant != Variant::kPlain;
  static_cast<DQueryParams&>(p).scheduler = TileScheduler{ceil_div(p.seqlen_q, T::kBlockM),
                                                          p.num_heads,
                                                          static_cast<int>(s.batch * s.num_heads_q),
                                                          grouped ? plan.heads_per_group : 1,
                                                          static_cast<int>(plan.num_tiles),
                                                          /*last_block_first=*/grouped,
                                                          counter};
  if constexpr (T::kListed) JFA_CHECK_OK(set_dense<T>(&p, problem));
  p.statistics_rows = statistics_rows;
  p.statistics = statistics;
  constexpr int kSharedBytes = sizeof(typename T::SharedStorage);
  if constexpr (has_function(Config::kVariant)) {
    p.score = function_params(problem);
    return launch_loaded("dquery_kernel", problem.function.dquery_kernel, dim3(plan.grid),
                         T::kThreads, kSharedBytes, stream, p);
  } else {
    return launch_kernel("dquery_kernel", dquery_kernel<Config>, dim3(plan.grid), T::kThreads,
                         kSharedBytes, stream, p);
  }
}

}  // namespace jax_fa3
