// dQ by a kernel of its own: a block of queries against all the keys that they see, dQ in registers
// throughout, as the forward pass has O. It makes S and dP a second time, seven GEMMs for the whole
// backward pass instead of five, but no CTA adds to another's memory: no float32 workspace, no
// kernels before and after that fill and empty it, and equal bits each time.
#pragma once

#include "kernels/backward_dq/consumer.cuh"
#include "kernels/backward_dq/producer.cuh"

namespace jax_fa3 {

template <class Config>
__global__ void __launch_bounds__(DQueryTraits<Config>::kThreads, 1)
    dquery_kernel(const __grid_constant__ typename DQueryTraits<Config>::Params p) {
  using T = DQueryTraits<Config>;
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename T::SharedStorage*>(shared_bytes);

  if (threadIdx.x == 0) {
    prefetch_maps({&p.query, &p.dout, &p.key, &p.value, &p.dquery});
    shared.works.ring.init(T::kConsumers + 1);
    for (auto& ring : shared.query_ring) ring.init(1);
    shared.key_ring.init(T::kConsumers);
    shared.value_ring.init(T::kValueReleases);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  const int warpgroup = cutlass::canonical_warp_group_idx();
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<T::kRegisters.producer>();
    // A list is walked by a warp.
    if (threadIdx.x < (T::kListed ? 32 : 1)) produce_for_dquery<T>(p, shared);
    if (threadIdx.x == kSchedulingThread) shared.works.fill(p, visible_keys<T>);
  } else {
    cutlass::arch::warpgroup_reg_alloc<T::kRegisters.consumer>();
    DQueryConsumer<T>{p, shared, warpgroup - 1}.run();
  }
}

}  // namespace jax_fa3
