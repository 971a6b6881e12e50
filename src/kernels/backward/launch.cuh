// Plan and problem become tensor maps, kernel parameters and three launches: row statistics, the
// main kernel, and dQ, made or only rounded; before dQ dBias, where it is wanted.
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

template <class Config>
Status launch_key_maxima(const BackwardPlan& plan, const BackwardProblem& problem,
                         KeyMaxima* maxima, cudaStream_t stream) {
  using T = BackwardTraits<Config>;
  const Shape& s = problem.shape;
  KeyMaximaParams p;
  static_cast<CommonParams&>(p) = common_params(problem);
  p.key = problem.key;
  p.value = problem.value;
  p.maxima = maxima;
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
                         const BackwardParams& main, cudaStream_t stream) {
  const Shape& s = problem.shape;
  PreprocessParams p;
  static_cast<CommonParams&>(p) = common_params(problem);
  p.out = problem.out;
  p.dout = problem.dout;
  p.lse = problem.lse;
  p.dlse = problem.dlse;
  p.sinks = head_table(problem.sinks, s);
  p.dsinks = problem.dsinks;
  p.statistics = const_cast<RowStatistics*>(main.statistics);
  p.dquery = main.dquery;
  p.key_maxima = nullptr;
  if constexpr (BackwardTraits<Config>::kTakesGrid) {
    if (plan.has_grid) {
      auto* const maxima = reinterpret_cast<KeyMaxima*>(
          static_cast<unsigned char*>(problem.workspace) + plan.key_maxima_offset);
      JFA_CHECK_OK(launch_key_maxima<Config>(plan, problem, maxima, stream));
      p.key_maxima = maxima;
    }
  }
  p.num_n_blocks = plan.num_n_blocks;
  p.tile_counters = main.scheduler.counter;
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
  static_cast<CommonParams&>(p) = common_params(problem);
  p.dquery_accumulator = main.dquery;
  p.dquery = problem.dquery;
  p.num_m_blocks = plan.num_m_blocks;
  p.head_dim = static_cast<int>(s.head_dim);
  const auto grid = static_cast<unsigned>(s.batch * s.num_heads_q * plan.num_m_blocks);
  return launch_kernel("postprocess_kernel", postprocess_kernel<Config>, dim3(grid),
                       BackwardTraits<Config>::kConsumerThreads, 0, stream, p);
}

template <class Config>
Status Backward::launch(const Plan& plan, const Problem& problem, cudaStream_t stream) {
  using T = BackwardTraits<Config>;
  const Shape& s = problem.shape;
  const bool has_queries = s.batch * s.num_heads_q * s.seqlen_q > 0;
  if (problem.dbias != nullptr && !has_queries) JFA_CHECK_OK(clear_dbias(problem, stream));
  if (s.batch == 0) return {};
  auto* const workspace = static_cast<unsigned char*>(problem.workspace);

  int* const tile_counters = reinterpret_cast<int*>(workspace + plan.tile_counters_offset);
  typename T::Params p;
  const CallMaps maps{s, problem.workspace};
  JFA_CHECK_OK(maps.of_queries<typename T::QTile>(&p.query, problem.query, s.head_dim));
  JFA_CHECK_OK(maps.of_queries<typename T::DOTile>(&p.dout, problem.dout, s.head_dim_v));
  JFA_CHECK_OK(maps.of_keys<typename T::KTile>(&p.key, problem.key, s.head_dim));
  JFA_CHECK_OK(maps.of_keys<typename T::VTile>(&p.value, problem.value, s.head_dim_v));
  JFA_CHECK_OK(maps.of_keys<typename T::DKTile>(&p.dkey, problem.dkey, s.head_dim));
  JFA_CHECK_OK(maps.of_keys<typename T::DVTile>(&p.dvalue, problem.dvalue, s.head_dim_v));
  static_cast<CommonParams&>(p) = common_params(problem);
  static_cast<BackwardParams&>(p).scheduler =
      TileScheduler{plan.num_n_blocks,
                    static_cast<int>(s.num_heads_kv),
                    static_cast<int>(s.batch * s.num_heads_kv),
                    plan.heads_per_group,
                    static_cast<int>(plan.num_tiles),
                    /*last_block_first=*/false,
                    has_queries ? tile_counters : nullptr};
  if constexpr (T::kListed) JFA_CHECK_OK(set_dense<T>(&p, problem));
  p.num_m_blocks = plan.num_m_blocks;
  p.statistics = reinterpret_cast<RowStatistics*>(workspace + plan.statistics_offset);
  p.dquery = reinterpret_cast<float*>(workspace + plan.dq_offset);
  p.has_grid = plan.has_grid;

  if (has_queries) JFA_CHECK_OK(launch_preprocess<Config>(plan, problem, p, stream));
  if (plan.num_tiles > 0) {
    constexpr int kSharedBytes = sizeof(typename T::SharedStorage);
    if constexpr (has_function(Config::kVariant)) {
      p.score = function_params(problem);
      JFA_CHECK_OK(launch_loaded("backward_kernel", problem.function.kernel, dim3(plan.grid),
                                 T::kThreads, kSharedBytes, stream, p));
    } else {
      JFA_CHECK_OK(launch_kernel("backward_kernel", backward_kernel<Config>, dim3(plan.grid),
                                 T::kThreads, kSharedBytes, stream, p));
    }
  }
  if (!has_queries) return {};
  if constexpr (T::kFusedDQ) {
    return launch_postprocess<Config>(plan, problem, p, stream);
  } else {
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
}

}  // namespace jax_fa3
