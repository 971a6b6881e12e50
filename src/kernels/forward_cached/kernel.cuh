// Attention over caches of keys and values, for few query rows: keys are the rows of the products,
// packed query rows their columns (docs/design/forward_cached.md).
#pragma once

#include "kernels/forward_cached/consumer.cuh"
#include "kernels/forward_cached/producer.cuh"
#include "kernels/forward_cached/schedule.cuh"

namespace jax_fa3 {

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    forward_cached_kernel(const __grid_constant__ ForwardCachedParams p) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename T::SharedStorage*>(shared_bytes);

  if (threadIdx.x == 0) {
    prefetch_maps({&p.key, &p.value});
    shared.key_ring.init(1);
    shared.value_ring.init(1);
    shared.rest.pieces.ring.init(T::kConsumers + 1);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  const int warpgroup = cutlass::canonical_warp_group_idx();
  if (warpgroup == 0) {
    if constexpr (T::kMovesRegisters) {
      cutlass::arch::warpgroup_reg_dealloc<T::kRegisters.producer>();
    }
    const int warp = cutlass::canonical_warp_idx_sync();
    if (warp == 0) CachedProducer<T>{p, shared}.run();
    if (warp == 1) Scheduler{p, shared.rest.pieces}.run();
  } else {
    if constexpr (T::kMovesRegisters) {
      cutlass::arch::warpgroup_reg_alloc<T::kRegisters.consumer>();
    }
    CachedConsumer<T>{p, shared, warpgroup - 1}.run();
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
