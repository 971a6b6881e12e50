// Attention over caches of keys and values (docs/design/forward_cached.md). For few query rows keys
// are the rows of the products, packed query rows their columns; for many the other way around.
#pragma once

#include "kernels/forward_cached/consumer.cuh"
#include "kernels/forward_cached/producer.cuh"
#include "kernels/forward_cached/rows_consumer.cuh"
#include "kernels/forward_cached/rows_producer.cuh"
#include "kernels/forward_cached/rows_schedule.cuh"
#include "kernels/forward_cached/schedule.cuh"

namespace jax_fa3 {

template <class Config, bool kHasColumns = has_columns(Config::kKey)>
struct CachedRoles {
  using Traits = ForwardCachedTraits<Config>;
  template <class Units>
  using Schedule = Scheduler<Units>;
  using Producer = CachedProducer<Traits>;
  using Consumer = CachedConsumer<Traits>;
};
template <class Config>
struct CachedRoles<Config, false> {
  using Traits = CachedRowsTraits<Config>;
  template <class Units>
  using Schedule = ItemScheduler<Traits, Units>;
  using Producer = CachedRowsProducer<Traits>;
  using Consumer = CachedRowsConsumer<Traits>;
};

constexpr int kSchedulingWarp = 1;

template <class Roles, class T = typename Roles::Traits>
__global__ void __launch_bounds__(T::kThreads, 1)
    forward_cached_kernel(const __grid_constant__ ForwardCachedParams p) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename T::SharedStorage*>(shared_bytes);

  // The warp that schedules reads the lengths meanwhile: all wait for what it makes of them.
  const int warp = cutlass::canonical_warp_idx_sync();
  typename Roles::template Schedule<int> schedule(p, shared.rest.pieces);
  const bool reads_early = T::kSchedulesEarly && p.units_fit_int;
  if (warp == kSchedulingWarp && reads_early) schedule.read();
  if (threadIdx.x == 2 * 32) prefetch_maps({&p.key, &p.value});
  if (threadIdx.x == 0) {
    shared.key_ring.init(T::kReleases);
    shared.value_ring.init(T::kReleases);
    shared.rest.pieces.init(T::kConsumers + 1);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  const int warpgroup = cutlass::canonical_warp_group_idx();
  if (warpgroup == 0) {
    if constexpr (T::kMovesRegisters) {
      cutlass::arch::warpgroup_reg_dealloc<T::kRegisters.producer>();
    }
    if (warp == 0) typename Roles::Producer{p, shared}.run();
    if (warp == kSchedulingWarp) {
      if (reads_early) {
        schedule.run();
      } else {
        typename Roles::template Schedule<std::int64_t> long_schedule(p, shared.rest.pieces);
        long_schedule.read();
        long_schedule.run();
      }
    }
  } else {
    if constexpr (T::kMovesRegisters) {
      cutlass::arch::warpgroup_reg_alloc<T::kRegisters.consumer>();
    }
    typename Roles::Consumer{p, shared, warpgroup - 1}.run();
  }
}

constexpr int kClearingThreads = 256;

template <class T>
__global__ void __launch_bounds__(kClearingThreads)
    clear_counters_kernel(int* counters, int num_counters) {
  begin_next_grid();
  for (int i = threadIdx.x; i < num_counters; i += kClearingThreads) counters[i] = 0;
}

}  // namespace jax_fa3
