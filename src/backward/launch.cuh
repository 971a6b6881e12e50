// Plan and problem become tensor maps, kernel parameters and three launches: row statistics, the
// main kernel, and dQ, made or only rounded.
#pragma once

#include "backward/dquery.cuh"
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
  p.tile_counters = main.scheduler.counter;
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

// Of an array that may have no address when it has no elements; its map is never used then.
template <class Tile>
Status map_of(CUtensorMap* map, const BackwardProblem& problem, const void* data,
              std::int64_t seqlen, std::int64_t heads, std::int64_t head_dim,
              int rows = Tile::kRows) {
  const Shape& s = problem.shape;
  return make_tensor_map<Tile>(map, data != nullptr ? data : problem.workspace, s.batch, seqlen,
                               heads, head_dim, rows);
}

template <class Config>
Status launch_dquery(const BackwardPlan& plan, const BackwardProblem& problem,
                     const BackwardParams& main, cudaStream_t stream) {
  using T = DQueryTraits<Config>;
  const Shape& s = problem.shape;
  DQueryParams p;
  JFA_CHECK_OK(map_of<typename T::QTile>(&p.query, problem, problem.query, s.seqlen_q,
                                         s.num_heads_q, s.head_dim, kWarpgroupRows));
  JFA_CHECK_OK(map_of<typename T::DOTile>(&p.dout, problem, problem.dout, s.seqlen_q, s.num_heads_q,
                                          s.head_dim_v, kWarpgroupRows));
  JFA_CHECK_OK(map_of<typename T::KTile>(&p.key, problem, problem.key, s.seqlen_k, s.num_heads_kv,
                                         s.head_dim));
  JFA_CHECK_OK(map_of<typename T::VTile>(&p.value, problem, problem.value, s.seqlen_k,
                                         s.num_heads_kv, s.head_dim_v));
  JFA_CHECK_OK(map_of<typename T::QTile>(&p.dquery, problem, problem.dquery, s.seqlen_q,
                                         s.num_heads_q, s.head_dim, kWarpgroupRows));
  const bool causal = problem.mask.window_right < kUnbounded;
  p.scheduler = TileScheduler{ceil_div(main.seqlen_q, T::kBlockM),
                              static_cast<int>(s.num_heads_q),
                              static_cast<int>(s.batch * s.num_heads_q),
                              causal ? plan.dq_heads_per_group : 1,
                              static_cast<int>(plan.dq_num_tiles),
                              /*last_block_first=*/causal,
                              main.scheduler.counter + 1};
  p.mask = problem.mask;
  p.index = problem.index;
  p.seqlen_q = main.seqlen_q;
  p.seqlen_k = main.seqlen_k;
  p.heads_per_kv_head = main.heads_per_kv_head;
  p.statistics_rows = plan.num_m_blocks * plan.key.block_m;
  p.softmax_scale = main.softmax_scale;
  p.softmax_scale_log2 = main.softmax_scale_log2;
  p.statistics = main.statistics;
  return launch_kernel("dquery_kernel", dquery_kernel<Config>, dim3(plan.dq_grid), T::kThreads,
                       sizeof(typename T::SharedStorage), stream, p);
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

  const bool has_queries = s.batch * s.num_heads_q * s.seqlen_q > 0;
  int* const tile_counters = reinterpret_cast<int*>(workspace + plan.tile_counters_offset);
  BackwardParams p;
  JFA_CHECK_OK(map_of<typename T::QTile>(&p.query, problem, problem.query, s.seqlen_q,
                                         s.num_heads_q, s.head_dim));
  JFA_CHECK_OK(map_of<typename T::DOTile>(&p.dout, problem, problem.dout, s.seqlen_q, s.num_heads_q,
                                          s.head_dim_v));
  JFA_CHECK_OK(map_of<typename T::KTile>(&p.key, problem, problem.key, s.seqlen_k, s.num_heads_kv,
                                         s.head_dim));
  JFA_CHECK_OK(map_of<typename T::VTile>(&p.value, problem, problem.value, s.seqlen_k,
                                         s.num_heads_kv, s.head_dim_v));
  JFA_CHECK_OK(map_of<typename T::DKTile>(&p.dkey, problem, problem.dkey, s.seqlen_k,
                                          s.num_heads_kv, s.head_dim));
  JFA_CHECK_OK(map_of<typename T::DVTile>(&p.dvalue, problem, problem.dvalue, s.seqlen_k,
                                          s.num_heads_kv, s.head_dim_v));
  p.scheduler = TileScheduler{plan.num_n_blocks,
                              static_cast<int>(s.num_heads_kv),
                              static_cast<int>(s.batch * s.num_heads_kv),
                              plan.heads_per_group,
                              static_cast<int>(plan.num_tiles),
                              /*last_block_first=*/false,
                              has_queries ? tile_counters : nullptr};
  p.mask = problem.mask;
  p.index = problem.index;
  p.seqlen_q = static_cast<int>(s.seqlen_q);
  p.seqlen_k = static_cast<int>(s.seqlen_k);
  p.num_heads = static_cast<int>(s.num_heads_q);
  p.heads_per_kv_head = static_cast<int>(s.num_heads_q / s.num_heads_kv);
  p.num_m_blocks = plan.num_m_blocks;
  p.softmax_scale = problem.softmax_scale;
  p.softmax_scale_log2 = problem.softmax_scale * kLog2e;
  p.statistics = reinterpret_cast<RowStatistics*>(workspace + plan.statistics_offset);
  p.dquery = reinterpret_cast<float*>(workspace + plan.dq_offset);

  if (has_queries) JFA_CHECK_OK(launch_preprocess<Config>(plan, problem, p, stream));
  if (plan.num_tiles > 0) {
    JFA_CHECK_OK(launch_kernel("backward_kernel", backward_kernel<Config>, dim3(plan.grid),
                               T::kThreads, sizeof(typename T::SharedStorage), stream, p));
  }
  if (!has_queries) return {};
  if constexpr (T::kFusedDQ) {
    return launch_postprocess<Config>(plan, problem, p, stream);
  } else {
    return launch_dquery<Config>(plan, problem, p, stream);
  }
}

}  // namespace jax_fa3
