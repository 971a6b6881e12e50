// Plan and problem become tensor maps, kernel parameters and one launch, or two where the work
// tiles are divided.
#pragma once

#include <algorithm>

#include "device/launch.cuh"
#include "kernels/backward/plan.h"
#include "kernels/backward_dbias/kernel.cuh"
#include "kernels/maps.cuh"

namespace jax_fa3 {

// Writes all of problem.dbias. `statistics` has `statistics_rows` rows for each head. Called before
// dQ is made, whose memory holds the sums of slices until then.
template <class Config>
Status launch_dbias(const BackwardPlan& plan, const BackwardProblem& problem,
                    const RowStatistics* statistics, int statistics_rows, cudaStream_t stream) {
  using T = DBiasTraits<Config>;
  using Element = typename T::Element;
  const Shape& s = problem.shape;
  const Broadcast& bias = problem.dense.bias_shape;
  const std::int64_t keys = padded_bias_keys(s.seqlen_k);

  DBiasParams p;
  BiasWork& work = p.work;
  JFA_CHECK_OK(make_bias_extents(&work, problem, T::kBlockN));
  const auto num_tiles = count_tiles(bias.sequences, bias.heads,
                                     std::int64_t{work.row_blocks} * work.key_blocks);
  if (!num_tiles.ok()) return num_tiles.status();
  work.num_tiles = static_cast<int>(num_tiles.value());
  if (work.num_tiles == 0) return {};

  const CallMaps maps{s, problem.dbias};
  JFA_CHECK_OK(maps.of_queries<typename T::QTile>(&p.query, problem.query, s.head_dim));
  JFA_CHECK_OK(maps.of_queries<typename T::DOTile>(&p.dout, problem.dout, s.head_dim_v));
  JFA_CHECK_OK(maps.of_keys<typename T::KTile>(&p.key, problem.key, s.head_dim));
  JFA_CHECK_OK(maps.of_keys<typename T::VTile>(&p.value, problem.value, s.head_dim_v));
  JFA_CHECK_OK(make_bias_map<typename T::BiasTile>(&p.bias, problem, problem.dbias));
  JFA_CHECK_OK(make_plane_map<typename T::BiasRows>(&p.dbias, problem.dbias, bias.sequences,
                                                    bias.heads, bias.rows, keys));
  static_cast<CommonParams&>(p) = common_params(problem);
  p.dense = dense_params(problem);
  p.statistics_rows = statistics_rows;
  p.statistics = statistics;

  constexpr std::int64_t kTileBytes = T::BiasTile::kElements * sizeof(float);
  const std::int64_t dquery_bytes =
      s.batch * s.seqlen_q * s.num_heads_q * s.head_dim * std::int64_t{sizeof(Element)};
  work.num_slices = choose_bias_slices(work.num_tiles, work.num_steps(), plan.num_sms,
                                       dquery_bytes / (kTileBytes * work.num_tiles));
  p.partial_sums = work.num_slices > 1 ? static_cast<float4*>(problem.dquery) : nullptr;

  JFA_CHECK_OK(launch_kernel("dbias_kernel", dbias_kernel<Config>,
                             dim3(std::min(work.num_items(), plan.num_sms)), T::kThreads,
                             sizeof(typename T::SharedStorage), stream, p));
  if (p.partial_sums == nullptr) return {};
  return launch_kernel("dbias_combine_kernel", dbias_combine_kernel<Config>, dim3(work.num_tiles),
                       T::kConsumers * kWarpgroupThreads, 0, stream, p);
}

}  // namespace jax_fa3
