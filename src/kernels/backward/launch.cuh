// Plan and problem become tensor maps, kernel parameters and three launches for each chunk: row
// statistics, the main kernel, and dQ, made or only rounded; before dQ dBias, where it is wanted.
#pragma once

#include "device/launch.cuh"
#include "kernels/backward/family.h"
#include "kernels/backward/kernel.cuh"
#include "kernels/backward/postprocess.cuh"
#include "kernels/backward/preprocess.cuh"
#include "kernels/backward_dbias/launch.cuh"
#include "kernels/backward_dq/launch.cuh"
#include "kernels/maps.cuh"

namespace jax_fa3 {

// A part of the workspace.
template <class T>
T* part_at(std::int64_t offset, const BackwardProblem& problem) {
  return reinterpret_cast<T*>(static_cast<unsigned char*>(problem.workspace) + offset);
}

template <class Config>
Status launch_key_maxima(const BackwardPlan& plan, const BackwardProblem& problem,
                         cudaStream_t stream) {
  using T = BackwardTraits<Config>;
  const Shape& s = problem.shape;
  KeyMaximaParams p;
  static_cast<CommonParams&>(p) = common_params(problem);
  p.key = problem.key;
  p.value = problem.value;
  p.maxima = part_at<KeyMaxima>(plan.key_maxima_offset, problem);
  p.num_n_blocks = plan.num_n_blocks;
  p.head_dim = static_cast<int>(s.head_dim);
  p.head_dim_v = static_cast<int>(s.head_dim_v);
  const auto grid = static_cast<unsigned>(s.batch * s.num_heads_kv * plan.num_n_blocks);
  return launch_kernel("key_maxima_kernel",
                       key_maxima_kernel<typename T::Element, T::kHeadDim, T::kBlockN>, dim3(grid),
                       kMaximaThreads, 0, stream, p);
}

template <class Config>
Status launch_preprocess(const BackwardPlan& plan, const BackwardProblem& problem,
                         const BackwardParams& main, const BackwardChunk& queries,
                         cudaStream_t stream) {
  const Shape& s = problem.shape;
  PreprocessParams p;
  static_cast<CommonParams&>(p) = common_params(problem);
  p.out = problem.out;
  p.dout = problem.dout;
  p.lse = problem.lse;
  p.dlse = problem.dlse;
  p.sinks = head_table(problem.sinks, s);
  p.dsinks = problem.dsinks;
  p.statistics = part_at<RowStatistics>(plan.statistics_offset, problem);
  p.dquery = part_at<float>(plan.dq_offset, problem);
  p.key_maxima = plan.has_grid ? part_at<KeyMaxima>(plan.key_maxima_offset, problem) : nullptr;
  p.num_n_blocks = plan.num_n_blocks;
  p.first_head = static_cast<int>(queries.first_head);
  p.first_tile = main.scheduler.first_tile;
  p.tile_counters = main.scheduler.counter;
  p.num_m_blocks = plan.num_m_blocks;
  p.head_dim_v = static_cast<int>(s.head_dim_v);
  const auto grid = static_cast<unsigned>(queries.num_heads * plan.num_m_blocks);
  return launch_kernel("preprocess_kernel", preprocess_kernel<Config>, dim3(grid),
                       kPreprocessThreads, 0, stream, p);
}

template <class Config>
Status launch_postprocess(const BackwardPlan& plan, const BackwardProblem& problem,
                          const BackwardChunk& queries, cudaStream_t stream) {
  PostprocessParams p;
  static_cast<CommonParams&>(p) = common_params(problem);
  p.dquery_accumulator = part_at<float>(plan.dq_offset, problem);
  p.dquery = problem.dquery;
  p.first_head = static_cast<int>(queries.first_head);
  p.num_m_blocks = plan.num_m_blocks;
  p.head_dim = static_cast<int>(problem.shape.head_dim);
  const auto grid = static_cast<unsigned>(queries.num_heads * plan.num_m_blocks);
  return launch_kernel("postprocess_kernel", postprocess_kernel<Config>, dim3(grid),
                       BackwardTraits<Config>::kConsumerThreads, 0, stream, p);
}

template <class Config>
Status launch_main(const BackwardPlan& plan, const BackwardProblem& problem,
                   typename BackwardTraits<Config>::Params& p, cudaStream_t stream) {
  using T = BackwardTraits<Config>;
  constexpr int kSharedBytes = sizeof(typename T::SharedStorage);
  if constexpr (has_function(Config::kVariant)) {
    p.score = function_params(problem);
    return launch_loaded("backward_kernel", problem.function.kernel, dim3(plan.grid), T::kThreads,
                         kSharedBytes, stream, p);
  } else {
    return launch_kernel("backward_kernel", backward_kernel<Config>, dim3(plan.grid), T::kThreads,
                         kSharedBytes, stream, p);
  }
}

template <class Config>
Status Backward::launch(const Plan& plan, const Problem& problem, cudaStream_t stream) {
  using T = BackwardTraits<Config>;
  const Shape& s = problem.shape;
  const bool has_queries = s.batch * s.num_heads_q * s.seqlen_q > 0;
  if (problem.dbias != nullptr && !has_queries) JFA_CHECK_OK(clear_dbias(problem, stream));
  if (s.batch == 0) return {};
  int* const tile_counters = part_at<int>(plan.tile_counters_offset, problem);
  typename T::Params p;
  const CallMaps maps{s, problem.workspace};
  JFA_CHECK_OK(maps.of_queries<typename T::QTile>(&p.query, problem.query, s.head_dim));
  JFA_CHECK_OK(maps.of_queries<typename T::DOTile>(&p.dout, problem.dout, s.head_dim_v));
  JFA_CHECK_OK(maps.of_keys<typename T::KTile>(&p.key, problem.key, s.head_dim));
  JFA_CHECK_OK(maps.of_keys<typename T::VTile>(&p.value, problem.value, s.head_dim_v));
  JFA_CHECK_OK(maps.of_keys<typename T::DKTile>(&p.dkey, problem.dkey, s.head_dim));
  JFA_CHECK_OK(maps.of_keys<typename T::DVTile>(&p.dvalue, problem.dvalue, s.head_dim_v));
  static_cast<CommonParams&>(p) = common_params(problem);
  p.num_m_blocks = plan.num_m_blocks;
  p.has_grid = plan.has_grid;

  if constexpr (T::kTakesGrid) {
    if (plan.has_grid && has_queries) {
      JFA_CHECK_OK(launch_key_maxima<Config>(plan, problem, stream));
    }
  }
  for (std::int64_t i = 0; i < plan.num_chunks; ++i) {
    const BackwardChunk chunk = plan.chunk(i);
    const std::int64_t heads_per_kv_head = s.num_heads_q / s.num_heads_kv;
    const BackwardChunk queries{chunk.first_head * heads_per_kv_head,
                                chunk.num_heads * heads_per_kv_head};
    static_cast<BackwardParams&>(p).scheduler =
        ChunkScheduler{{plan.num_n_blocks, static_cast<int>(s.num_heads_kv),
                        static_cast<int>(s.batch * s.num_heads_kv), plan.heads_per_group,
                        static_cast<int>((chunk.first_head + chunk.num_heads) * plan.num_n_blocks),
                        /*last_block_first=*/false, has_queries ? tile_counters : nullptr},
                       static_cast<int>(chunk.first_head * plan.num_n_blocks)};
    if constexpr (T::kListed) JFA_CHECK_OK(set_dense<T>(&p, problem));
    const std::int64_t rows_before = queries.first_head * plan.num_m_blocks * T::kBlockM;
    p.statistics = part_at<RowStatistics>(plan.statistics_offset, problem) - rows_before;
    p.dquery = part_at<float>(plan.dq_offset, problem) - rows_before * T::kHeadDim;
    if (has_queries) {
      JFA_CHECK_OK(launch_preprocess<Config>(plan, problem, p, queries, stream));
    }
    if (plan.num_tiles > 0) JFA_CHECK_OK(launch_main<Config>(plan, problem, p, stream));
    if constexpr (T::kFusedDQ) {
      if (has_queries) {
        JFA_CHECK_OK(launch_postprocess<Config>(plan, problem, queries, stream));
      }
    }
  }
  if constexpr (!T::kFusedDQ) {
    if (!has_queries) return {};
    const int statistics_rows = plan.num_m_blocks * plan.key.block_m;
    if constexpr (T::kTakesBias) {
      if (problem.dbias != nullptr) {
        JFA_CHECK_OK(
            launch_dbias<Config>(problem, p.statistics, statistics_rows, plan.num_sms, stream));
      }
    }
    return launch_dquery<Config>(plan.dquery, problem, p.statistics, statistics_rows,
                                 tile_counters + 1, stream);
  }
  return {};
}

}  // namespace jax_fa3
