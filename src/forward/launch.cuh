// Plan and problem become tensor maps, kernel parameters and one launch.
#pragma once

#include "device/launch.cuh"
#include "forward/consumer.cuh"
#include "forward/kernel.cuh"
#include "forward/launch.h"

namespace jax_fa3 {

// What all forward kernels are launched with, tensor maps apart; clears the tile counter.
inline Status set_common(ForwardParams* p, const TileOrder& order, const ForwardProblem& problem,
                         cudaStream_t stream) {
  const Shape& s = problem.shape;
  p->scheduler = TileScheduler{order.num_m_blocks,
                               static_cast<int>(s.num_heads_q),
                               static_cast<int>(s.batch * s.num_heads_q),
                               order.heads_per_group,
                               static_cast<int>(order.num_tiles),
                               order.longest_first,
                               order.longest_first ? problem.tile_counter : nullptr};
  p->mask = problem.mask;
  p->index = problem.index;
  p->seqlen_q = static_cast<int>(s.seqlen_q);
  p->seqlen_k = static_cast<int>(s.seqlen_k);
  p->heads_per_kv_head = static_cast<int>(s.num_heads_q / s.num_heads_kv);
  p->softmax_scale_log2 = problem.softmax_scale * kLog2e;
  p->rescale_threshold = problem.rescale_threshold;
  p->lse = problem.lse;
  if (!order.longest_first) return {};
  return cuda_status(cudaMemsetAsync(problem.tile_counter, 0, sizeof(int), stream),
                     "cudaMemsetAsync of the tile counter");
}

template <class Config>
Status launch_forward(const ForwardPlan& plan, const ForwardProblem& problem, cudaStream_t stream) {
  using T = ForwardTraits<Config>;
  const Shape& s = problem.shape;
  if (plan.num_tiles == 0) return {};

  // Arrays without elements may have no address; their maps are never used.
  const auto address = [&](const void* data) { return data ? data : problem.out; };
  ForwardParams p;
  JFA_CHECK_OK(make_tensor_map<typename T::QTile>(&p.query, address(problem.query), s.batch,
                                                  s.seqlen_q, s.num_heads_q, s.head_dim,
                                                  kWarpgroupRows));
  JFA_CHECK_OK(make_tensor_map<typename T::KTile>(&p.key, address(problem.key), s.batch, s.seqlen_k,
                                                  s.num_heads_kv, s.head_dim));
  JFA_CHECK_OK(make_tensor_map<typename T::VTile>(&p.value, address(problem.value), s.batch,
                                                  s.seqlen_k, s.num_heads_kv, s.head_dim_v));
  JFA_CHECK_OK(make_tensor_map<typename T::OTile>(&p.out, problem.out, s.batch, s.seqlen_q,
                                                  s.num_heads_q, s.head_dim_v, kWarpgroupRows));
  JFA_CHECK_OK(set_common(&p, plan, problem, stream));
  return launch_kernel("forward_kernel", forward_kernel<T, ForwardConsumer<T>>, dim3(plan.grid),
                       T::kThreads, sizeof(typename T::SharedStorage), stream, p);
}

}  // namespace jax_fa3
