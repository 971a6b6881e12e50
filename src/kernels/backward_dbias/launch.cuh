// Plan and problem become tensor maps, kernel parameters and one launch, or two where the work
// tiles are divided.
#pragma once

#include <algorithm>

#include "device/launch.cuh"
#include "kernels/backward_dbias/kernel.cuh"
#include "kernels/maps.cuh"

namespace jax_fa3 {

// Instead of launch_dbias where there are no queries.
inline Status clear_dbias(const BackwardProblem& problem, cudaStream_t stream) {
  const Broadcast& bias = problem.dense.bias_shape;
  const std::int64_t elements =
      bias.sequences * bias.heads * bias.rows * padded_bias_keys(problem.shape.seqlen_k);
  constexpr std::int64_t kElementBytes = 2;
  return cuda_status(cudaMemsetAsync(problem.dbias, 0, elements * kElementBytes, stream),
                     "cudaMemsetAsync of dBias");
}

// Writes all of problem.dbias. `statistics` has `statistics_rows` rows for each head. Called before
// dQ is made, whose memory holds the sums of slices until then.
template <class Config>
Status launch_dbias(const BackwardProblem& problem, const RowStatistics* statistics,
                    int statistics_rows, int num_sms, cudaStream_t stream) {
  using T = DBiasTraits<Config>;
  using Element = typename T::Element;
  const Shape& s = problem.shape;
  const Broadcast& bias = problem.dense.bias_shape;
  const std::int64_t keys = padded_bias_keys(s.seqlen_k);

  const std::int64_t dquery_bytes =
      s.batch * s.seqlen_q * s.num_heads_q * s.head_dim * std::int64_t{sizeof(Element)};
  const auto work = divide_dbias(problem, T::kBlockN, num_sms, dquery_bytes);
  if (!work.ok()) return work.status();
  if (work.value().num_tiles == 0) return {};  // no keys

  DBiasParams p;
  const CallMaps maps{s, problem.dbias};
  JFA_CHECK_OK(maps.of_queries<typename T::QTile>(&p.query, problem.query, s.head_dim));
  JFA_CHECK_OK(maps.of_queries<typename T::DOTile>(&p.dout, problem.dout, s.head_dim_v));
  JFA_CHECK_OK(maps.of_keys<typename T::KTile>(&p.key, problem.key, s.head_dim));
  JFA_CHECK_OK(maps.of_keys<typename T::VTile>(&p.value, problem.value, s.head_dim_v));
  JFA_CHECK_OK(make_bias_map<typename T::BiasTile>(&p.bias, problem));
  JFA_CHECK_OK(make_plane_map<typename T::BiasRows>(&p.dbias, problem.dbias, bias.sequences,
                                                    bias.heads, bias.rows, keys));
  static_cast<CommonParams&>(p) = common_params(problem);
  p.dense = dense_params(problem);
  p.statistics_rows = statistics_rows;
  p.statistics = statistics;

  p.work = work.value();
  p.partial_sums = p.work.num_slices > 1 ? static_cast<float4*>(problem.dquery) : nullptr;

  JFA_CHECK_OK(launch_kernel("dbias_kernel", dbias_kernel<Config>,
                             dim3(std::min(p.work.num_items(), num_sms)), T::kThreads,
                             sizeof(typename T::SharedStorage), stream, p));
  if (p.partial_sums == nullptr) return {};
  return launch_kernel("dbias_combine_kernel", dbias_combine_kernel<Config>, dim3(p.work.num_tiles),
                       T::kConsumers * kWarpgroupThreads, 0, stream, p);
}

}  // namespace jax_fa3
