// FlashAttention forward for Hopper (arXiv:2407.08608): persistent CTAs, a thread that schedules,
// one TMA producer thread, two or three WGMMA consumer warpgroups. docs/design/forward.md draws the
// schedule. Traits and Consumer are those of the operands' type: forward/ for 16 bits,
// forward_float8/ for 8.
#pragma once

#include "kernels/forward/dense.cuh"
#include "kernels/forward/producer.cuh"

namespace jax_fa3 {

template <class T, class Consumer>
__global__ void __launch_bounds__(T::kThreads, 1)
    forward_kernel(const __grid_constant__ typename T::Params p) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename T::SharedStorage*>(shared_bytes);

  if (threadIdx.x == 0) {
    prefetch_maps({&p.query, &p.key, &p.value, &p.out});
    shared.works.ring.init(T::kConsumers + 1);
    for (auto& ring : shared.query_ring) ring.init(1);
    shared.key_ring.init(T::kKeyReleases);
    shared.value_ring.init(T::kConsumers);
    cutlass::arch::fence_barrier_init();
  }
  Consumer::prepare(shared);
  __syncthreads();

  const int warpgroup = cutlass::canonical_warp_group_idx();
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<T::kRegisters.producer>();
    if constexpr (T::kListed) {
      if (threadIdx.x < 32) produce_listed<T>(p, shared);
    } else {
      if (threadIdx.x == 0) produce<T>(p, shared);
    }
    if (threadIdx.x == kSchedulingThread) shared.works.fill(p, visible_keys<T>);
  } else {
    cutlass::arch::warpgroup_reg_alloc<T::kRegisters.consumer>();
    Consumer{p, shared, warpgroup - 1}.run();
  }
}

}  // namespace jax_fa3
