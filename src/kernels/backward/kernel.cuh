// FlashAttention backward for Hopper: persistent CTAs that take blocks of keys, two threads that
// load, two WGMMA consumer warpgroups. docs/design/backward.md draws the schedule.
#pragma once

#include "kernels/backward/gradient_split.cuh"
#include "kernels/backward/key_split.cuh"
#include "kernels/backward/producer.cuh"

namespace jax_fa3 {

template <class Config>
__global__ void __launch_bounds__(BackwardTraits<Config>::kThreads, 1)
    backward_kernel(const __grid_constant__ typename BackwardTraits<Config>::Params p) {
  using T = BackwardTraits<Config>;
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename T::SharedStorage*>(shared_bytes);

  if (threadIdx.x == 0) {
    prefetch_maps({&p.query, &p.dout, &p.key, &p.value, &p.dkey, &p.dvalue});
    shared.works.ring.init(T::kConsumers + 1);
    shared.demand.init(1);
    shared.key_value_ring.init(T::kConsumers);
    shared.query_ring.init(T::kQueryReleases);
    shared.dout_ring.init(T::kConsumers);
    shared.handover_ring.init(kWarpgroupThreads, kWarpgroupThreads);
    shared.output_ring.init(1);
    cutlass::arch::fence_barrier_init();
  }
  if (threadIdx.x < 128) {
    const int i = threadIdx.x / 64;
    shared.constants[i].fill(Statistic(i), threadIdx.x % 64);
    cutlass::arch::fence_view_async_shared();
  }
  __syncthreads();

  const int warpgroup = cutlass::canonical_warp_group_idx();
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<T::kRegisters.producer>();
    if constexpr (T::kListed) {
      if (threadIdx.x < 32) produce_listed<T>(p, shared);
    } else {
      if (threadIdx.x == 0) produce<T>(p, shared);
    }
    if (threadIdx.x == kSchedulingThread) schedule<T>(p, shared);
  } else {
    cutlass::arch::warpgroup_reg_alloc<T::kRegisters.consumer>();
    using Consumer =
        cute::conditional_t<T::kSplitKeys, KeySplitConsumer<T>, GradientSplitConsumer<T>>;
    Consumer{{p, shared, warpgroup - 1}}.run();
  }
}

}  // namespace jax_fa3
