// Plan and problem become tensor maps, kernel parameters and one launch.
#pragma once

#include "device/launch.cuh"
#include "kernels/forward_cached/family.h"
#include "kernels/forward_cached/kernel.cuh"

namespace jax_fa3 {

// The map of a cache of `head_dim` columns, by (page, slot, kv head, column), in boxes of `rows`
// slots.
template <class Tile>
Status make_cache_map(CUtensorMap* map, const void* data, const CacheShape& cache,
                      std::int64_t num_heads_kv, std::int64_t head_dim, int rows) {
  const CacheStrides strides = cache.strides(num_heads_kv, head_dim);
  return encode_tensor_map<Tile>(map, data, {head_dim, num_heads_kv, cache.page_size, cache.pages},
                                 {strides.head, strides.slot, strides.page},
                                 {Tile::kChunkCols, 1, static_cast<cuuint32_t>(rows), 1});
}

template <class Config>
Status ForwardCached::launch(const Plan& plan, const Problem& problem, cudaStream_t stream) {
  using Roles = CachedRoles<Config>;
  using T = typename Roles::Traits;
  const Shape& s = problem.shape;
  const CacheShape& cache = problem.cache;
  if (problem.tokens == 0) return {};

  ForwardCachedParams p;
  p.index = problem.index;
  p.extents = {static_cast<int>(s.batch),
               static_cast<int>(problem.tokens),
               static_cast<int>(s.seqlen_q),
               static_cast<int>(s.num_heads_q / s.num_heads_kv),
               static_cast<int>(cache.capacity()),
               problem.window_left,
               problem.window_right,
               T::kBlockRows};
  p.pages = make_pages(cache, problem.index.block_tables);
  p.box_rows = box_rows(problem.has_block_tables, cache.page_size, T::kTileKeys);
  // A cache without elements may have no address, but its map must have one.
  const bool is_empty = cache.pages == 0 || cache.page_size == 0;
  const void* const key = is_empty ? problem.out : problem.key_cache;
  const void* const value = is_empty ? problem.out
                            : cache.is_fused
                                ? static_cast<const typename T::Element*>(key) + s.head_dim
                                : problem.value_cache;
  JFA_CHECK_OK(make_cache_map<typename T::KTile>(&p.key, key, cache, s.num_heads_kv, s.head_dim,
                                                 p.box_rows));
  JFA_CHECK_OK(make_cache_map<typename T::VTile>(&p.value, value, cache, s.num_heads_kv,
                                                 s.head_dim_v, p.box_rows));
  p.num_heads = static_cast<int>(s.num_heads_q);
  p.num_heads_kv = static_cast<int>(s.num_heads_kv);
  p.heads_at_once = plan.heads_at_once;
  p.rounds = p.num_heads_kv / plan.heads_at_once;
  p.groups = plan.groups;
  p.units_fit_int = most_units(p.extents, p.rounds, T::kTileKeys, T::kUnitsBeside) < 1 << 30;
  p.head_dim = static_cast<int>(s.head_dim);
  p.head_dim_v = static_cast<int>(s.head_dim_v);
  p.softmax_scale_log2 = problem.softmax_scale * kLog2e;
  p.rescale_threshold = problem.rescale_threshold;
  p.out_float32 = problem.out_float32;
  p.query = problem.query;
  p.out = problem.out;
  p.lse = problem.lse;
  p.partials = static_cast<float*>(problem.workspace);
  p.counters = problem.counters;
  // Beside the kernel, which counts at its end.
  if (plan.num_counters > 0) {
    JFA_CHECK_OK(launch_kernel("clear_counters_kernel", clear_counters_kernel<T>, dim3(1),
                               kClearingThreads, 0, stream, p.counters, int(plan.num_counters)));
  }
  return launch_early("forward_cached_kernel", forward_cached_kernel<Roles>, dim3(plan.grid),
                      T::kThreads, sizeof(typename T::SharedStorage), stream, p);
}

}  // namespace jax_fa3
