// Plan and problem become tensor maps, kernel parameters and one launch.
#pragma once

#include "device/launch.cuh"
#include "forward/kernel.cuh"
#include "forward/launch.h"

namespace jax_fa3 {

template <class Config>
Status launch_forward(const ForwardPlan& plan, const ForwardProblem& problem, cudaStream_t stream) {
  using T = ForwardTraits<Config>;
  const Shape& s = problem.shape;
  if (plan.num_tiles == 0) return {};

  // Arrays without elements may have no address; their maps are never used.
  const auto address = [&](const void* data) { return data ? data : problem.out; };
  ForwardParams p;
  JFA_CHECK_OK(make_tensor_map<typename T::QTile>(&p.query, address(problem.query), s.dtype,
                                                  s.batch, s.seqlen_q, s.num_heads_q, s.head_dim,
                                                  kWarpgroupRows));
  JFA_CHECK_OK(make_tensor_map<typename T::KTile>(&p.key, address(problem.key), s.dtype, s.batch,
                                                  s.seqlen_k, s.num_heads_kv, s.head_dim));
  JFA_CHECK_OK(make_tensor_map<typename T::VTile>(&p.value, address(problem.value), s.dtype,
                                                  s.batch, s.seqlen_k, s.num_heads_kv,
                                                  s.head_dim_v));
  JFA_CHECK_OK(make_tensor_map<typename T::OTile>(&p.out, problem.out, s.dtype, s.batch, s.seqlen_q,
                                                  s.num_heads_q, s.head_dim_v, kWarpgroupRows));
  p.scheduler = TileScheduler{plan.num_m_blocks,
                              static_cast<int>(s.num_heads_q),
                              static_cast<int>(s.batch * s.num_heads_q),
                              plan.heads_per_group,
                              static_cast<int>(plan.num_tiles),
                              plan.longest_first,
                              plan.longest_first ? problem.tile_counter : nullptr};
  if (plan.longest_first) {
    JFA_CHECK_OK(cuda_status(cudaMemsetAsync(problem.tile_counter, 0, sizeof(int), stream),
                             "cudaMemsetAsync of the tile counter"));
  }
  p.mask = problem.mask;
  p.index = problem.index;
  p.seqlen_q = static_cast<int>(s.seqlen_q);
  p.seqlen_k = static_cast<int>(s.seqlen_k);
  p.heads_per_kv_head = static_cast<int>(s.num_heads_q / s.num_heads_kv);
  p.softmax_scale = problem.softmax_scale;
  p.softmax_scale_log2 = problem.softmax_scale * kLog2e;
  p.rescale_threshold = problem.rescale_threshold;
  p.lse = problem.lse;
  return launch_kernel("forward_kernel", forward_kernel<Config>, dim3(plan.grid), T::kThreads,
                       sizeof(typename T::SharedStorage), stream, p);
}

}  // namespace jax_fa3
