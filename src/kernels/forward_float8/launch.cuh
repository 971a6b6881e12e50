// Plan and problem become tensor maps, kernel parameters and one launch, after another one that
// prepares value if the caller has not.
#pragma once

#include <algorithm>

#include "kernels/forward/launch.cuh"
#include "kernels/forward_float8/consumer.cuh"
#include "kernels/forward_float8/family.h"
#include "kernels/forward_float8/transpose.h"

namespace jax_fa3 {

template <class Config>
Status ForwardFloat8::launch(const Plan& plan, const Problem& problem, cudaStream_t stream) {
  using T = ForwardFloat8Traits<Config>;
  const Shape& s = problem.shape;
  if (plan.num_tiles == 0) return {};
  if (!problem.value_is_prepared) JFA_CHECK_OK(launch_transpose(problem, stream));

  const CallMaps maps{s, problem.out};
  const void* const value = problem.value_is_prepared ? problem.value : problem.workspace;
  const std::int64_t keys = std::max<std::int64_t>(padded_keys(s.seqlen_k), kPreparedBlock);
  ForwardFloat8Params p;
  JFA_CHECK_OK(
      maps.of_queries<typename T::QTile>(&p.query, problem.query, s.head_dim, kWarpgroupRows));
  JFA_CHECK_OK(maps.of_keys<typename T::KTile>(&p.key, problem.key, s.head_dim));
  JFA_CHECK_OK(make_plane_map<typename T::VTile>(&p.value, value ? value : problem.out, s.batch,
                                                 s.num_heads_kv, s.head_dim_v, keys));
  JFA_CHECK_OK(
      maps.of_queries<typename T::OTile>(&p.out, problem.out, s.head_dim_v, kWarpgroupRows));
  JFA_CHECK_OK(set_common(&p, plan, problem, stream));
  p.query_descale = problem.query_descale;
  p.key_descale = problem.key_descale;
  p.value_descale = problem.value_descale;
  p.query_descales = static_cast<int>(problem.query_descales);
  p.key_descales = static_cast<int>(problem.key_descales);
  p.out_is_fp16 = s.dtype == DType::kFP16;
  return launch_kernel("forward_kernel", forward_kernel<T, ForwardFloat8Consumer<T>>,
                       dim3(plan.grid), T::kThreads, sizeof(typename T::SharedStorage), stream, p);
}

}  // namespace jax_fa3
