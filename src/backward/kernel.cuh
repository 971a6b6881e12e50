// FlashAttention backward for Hopper: persistent CTAs that take blocks of keys, one TMA producer
// thread, two WGMMA consumer warpgroups. docs/design/backward.md draws the schedule.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "backward/consumer.cuh"
#include "backward/producer.cuh"

namespace jax_fa3 {

template <class Config>
__global__ void __launch_bounds__(BackwardTraits<Config>::kThreads, 1)
    backward_kernel(const __grid_constant__ BackwardParams p) {
  using T = BackwardTraits<Config>;
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename T::SharedStorage*>(shared_bytes);

  if (threadIdx.x == 0) {
    prefetch_maps({&p.query, &p.dout, &p.key, &p.value, &p.dkey, &p.dvalue});
    shared.tiles.ring.init(T::kConsumers);
    shared.key_value_ring.init(T::kConsumers);
    shared.query_ring.init(T::kConsumers);
    shared.dout_ring.init(T::kConsumers);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  const int warpgroup = cutlass::canonical_warp_group_idx();
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<T::kProducerRegisters>();
    if (threadIdx.x == 0) produce<T>(p, shared);
  } else {
    cutlass::arch::warpgroup_reg_alloc<T::kConsumerRegisters>();
    BackwardConsumer<T>{p, shared, warpgroup - 1}.run();
  }
}

}  // namespace jax_fa3
