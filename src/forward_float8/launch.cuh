// Plan and problem become tensor maps, kernel parameters and one launch, after another one that
// prepares value if the caller has not.
#pragma once

#include <algorithm>

#include "forward/launch.cuh"
#include "forward_float8/consumer.cuh"
#include "forward_float8/launch.h"
#include "forward_float8/transpose.h"

namespace jax_fa3 {

template <class Config>
Status launch_forward_float8(const ForwardFloat8Plan& plan, const ForwardFloat8Problem& problem,
                             cudaStream_t stream) {
  using T = ForwardFloat8Traits<Config>;
  const Shape& s = problem.shape;
  if (plan.num_tiles == 0) return {};
  if (!problem.value_is_prepared) JFA_CHECK_OK(launch_transpose(problem, stream));

  // Arrays without elements may have no address; their maps are never used.
  const auto address = [&](const void* data) { return data ? data : problem.out; };
  const void* const value = problem.value_is_prepared ? problem.value : problem.workspace;
  const std::int64_t keys = std::max<std::int64_t>(padded_keys(s.seqlen_k), kPreparedBlock);
  ForwardFloat8Params p;
  JFA_CHECK_OK(make_tensor_map<typename T::QTile>(&p.query, address(problem.query), s.batch,
                                                  s.seqlen_q, s.num_heads_q, s.head_dim,
                                                  kWarpgroupRows));
  JFA_CHECK_OK(make_tensor_map<typename T::KTile>(&p.key, address(problem.key), s.batch, s.seqlen_k,
                                                  s.num_heads_kv, s.head_dim));
  JFA_CHECK_OK(make_plane_map<typename T::VTile>(&p.value, address(value), s.batch, s.num_heads_kv,
                                                 s.head_dim_v, keys));
  JFA_CHECK_OK(make_tensor_map<typename T::OTile>(&p.out, problem.out, s.batch, s.seqlen_q,
                                                  s.num_heads_q, s.head_dim_v, kWarpgroupRows));
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
