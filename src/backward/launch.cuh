// Plan and problem become tensor maps, kernel parameters and three launches: row statistics, the
// main kernel, dQ.
#pragma once

#include "backward/kernel.cuh"
#include "backward/launch.h"
#include "backward/postprocess.cuh"
#include "backward/preprocess.cuh"
#include "device/launch.cuh"

namespace jax_fa3 {

template <class Config>
Status launch_preprocess(const BackwardPlan& plan, const BackwardProblem& problem,
                         const BackwardParams& main, cudaStream_t stream) {
  const Shape& s = problem.shape;
  PreprocessParams p;
  p.out = problem.out;
  p.dout = problem.dout;
  p.lse = problem.lse;
  p.dlse = problem.dlse;
  p.statistics = const_cast<RowStatistics*>(main.statistics);
  p.dquery = main.dquery;
  p.semaphore = main.semaphore;
  p.tile_counter = main.scheduler.counter;
  p.softmax_scale = problem.softmax_scale;
  p.mask = problem.mask;
  p.index = problem.index;
  p.seqlen_q = main.seqlen_q;
  p.seqlen_k = main.seqlen_k;
  p.num_heads = static_cast<int>(s.num_heads_q);
  p.num_m_blocks = plan.num_m_blocks;
  p.head_dim_v = static_cast<int>(s.head_dim_v);
  const auto grid = static_cast<unsigned>(s.batch * s.num_heads_q * plan.num_m_blocks);
  return launch_kernel("preprocess_kernel", preprocess_kernel<Config>, dim3(grid),
                       kPreprocessThreads, 0, stream, p);
}

template <class Config>
Status launch_postprocess(const BackwardPlan& plan, const BackwardProblem& problem,
                          const BackwardParams& main, cudaStream_t stream) {
  const Shape& s = problem.shape;
  PostprocessParams p;
  p.dquery_accumulator = main.dquery;
  p.dquery = problem.dquery;
  p.softmax_scale = problem.softmax_scale;
  p.seqlen_q = main.seqlen_q;
  p.num_heads = static_cast<int>(s.num_heads_q);
  p.num_m_blocks = plan.num_m_blocks;
  p.head_dim = static_cast<int>(s.head_dim);
  const auto grid = static_cast<unsigned>(s.batch * s.num_heads_q * plan.num_m_blocks);
  return launch_kernel("postprocess_kernel", postprocess_kernel<Config>, dim3(grid),
                       BackwardTraits<Config>::kConsumerThreads, 0, stream, p);
}

template <class Config>
Status launch_backward(const BackwardPlan& plan, const BackwardProblem& problem,
                       cudaStream_t stream) {
  using T = BackwardTraits<Config>;
  const Shape& s = problem.shape;
  auto* const workspace = static_cast<unsigned char*>(problem.workspace);

  // Arrays without elements may have no address; their maps are never used.
  const auto address = [&](const void* data) { return data ? data : problem.workspace; };
  const auto rows_of_query = [&](CUtensorMap* map, const void* data, auto tile, std::int64_t d) {
    return make_tensor_map<decltype(tile)>(map, address(data), s.batch, s.seqlen_q, s.num_heads_q,
                                           d);
  };
  const auto rows_of_key = [&](CUtensorMap* map, const void* data, auto tile, std::int64_t d) {
    return make_tensor_map<decltype(tile)>(map, address(data), s.batch, s.seqlen_k, s.num_heads_kv,
                                           d);
  };
  const bool has_queries = s.batch * s.num_heads_q * s.seqlen_q > 0;
  int* const tile_counter = reinterpret_cast<int*>(workspace + plan.tile_counter_offset);
  BackwardParams p;
  JFA_CHECK_OK(rows_of_query(&p.query, problem.query, typename T::QTile{}, s.head_dim));
  JFA_CHECK_OK(rows_of_query(&p.dout, problem.dout, typename T::DOTile{}, s.head_dim_v));
  JFA_CHECK_OK(rows_of_key(&p.key, problem.key, typename T::KTile{}, s.head_dim));
  JFA_CHECK_OK(rows_of_key(&p.value, problem.value, typename T::VTile{}, s.head_dim_v));
  JFA_CHECK_OK(rows_of_key(&p.dkey, problem.dkey, typename T::DKTile{}, s.head_dim));
  JFA_CHECK_OK(rows_of_key(&p.dvalue, problem.dvalue, typename T::DVTile{}, s.head_dim_v));
  p.scheduler = TileScheduler{plan.num_n_blocks,
                              static_cast<int>(s.num_heads_kv),
                              static_cast<int>(s.batch * s.num_heads_kv),
                              plan.heads_per_group,
                              static_cast<int>(plan.num_tiles),
                              /*last_block_first=*/T::kDeterministic,
                              has_queries ? tile_counter : nullptr};
  p.mask = problem.mask;
  p.index = problem.index;
  p.seqlen_q = static_cast<int>(s.seqlen_q);
  p.seqlen_k = static_cast<int>(s.seqlen_k);
  p.heads_per_kv_head = static_cast<int>(s.num_heads_q / s.num_heads_kv);
  p.num_m_blocks = plan.num_m_blocks;
  p.rotate = T::kDeterministic && plan.head_at_once && problem.mask.window_left >= kUnbounded &&
             problem.mask.window_right >= kUnbounded;
  p.softmax_scale = problem.softmax_scale;
  p.softmax_scale_log2 = problem.softmax_scale * kLog2e;
  p.statistics = reinterpret_cast<RowStatistics*>(workspace + plan.statistics_offset);
  p.dquery = reinterpret_cast<float*>(workspace + plan.dq_offset);
  p.semaphore =
      T::kDeterministic ? reinterpret_cast<int*>(workspace + plan.semaphore_offset) : nullptr;

  if (has_queries) JFA_CHECK_OK(launch_preprocess<Config>(plan, problem, p, stream));
  if (plan.num_tiles > 0) {
    JFA_CHECK_OK(launch_kernel("backward_kernel", backward_kernel<Config>, dim3(plan.grid),
                               T::kThreads, sizeof(typename T::SharedStorage), stream, p));
  }
  if (has_queries) JFA_CHECK_OK(launch_postprocess<Config>(plan, problem, p, stream));
  return {};
}

}  // namespace jax_fa3
