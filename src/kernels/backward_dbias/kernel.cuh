// dBias by a kernel of its own: a tile of the bias against all the queries and keys that share it,
// their sum in registers throughout. It makes S and dP once more, but no CTA adds to another's
// memory: sums are of float32, rounded once, and have equal bits each time.
#pragma once

#include "kernels/backward_dbias/consumer.cuh"
#include "kernels/backward_dbias/producer.cuh"

namespace jax_fa3 {

template <class Config>
__global__ void __launch_bounds__(DBiasTraits<Config>::kThreads, 1)
    dbias_kernel(const __grid_constant__ DBiasParams p) {
  using T = DBiasTraits<Config>;
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<typename T::SharedStorage*>(shared_bytes);

  if (threadIdx.x == 0) {
    prefetch_maps({&p.query, &p.dout, &p.key, &p.value, &p.bias, &p.dbias});
    shared.step_ring.init(T::kConsumerWarps + 1);
    shared.query_ring.init(T::kConsumerWarps);
    shared.dout_ring.init(T::kConsumerWarps);
    shared.bias_ring.init(T::kConsumerWarps);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  const int warpgroup = cutlass::canonical_warp_group_idx();
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<T::kRegisters.producer>();
    if (threadIdx.x == 0) produce_for_dbias<T>(p, shared);
    if (threadIdx.x / 32 == kSchedulingWarp) schedule_for_dbias<T>(p, shared);
  } else {
    cutlass::arch::warpgroup_reg_alloc<T::kRegisters.consumer>();
    DBiasConsumer<T>{p, shared, warpgroup - 1}.run();
  }
}

// Adds up the slices of the tiles, in their order. A CTA for each tile, with the threads of the
// other kernel's consumers.
template <class Config>
__global__ void __launch_bounds__(2 * kWarpgroupThreads)
    dbias_combine_kernel(const __grid_constant__ DBiasParams p) {
  using T = DBiasTraits<Config>;
  __shared__ alignas(1024) typename T::Element buffer[T::BiasTile::kElements];
  const int warpgroup = cutlass::canonical_warp_group_idx();
  const int tile = blockIdx.x;

  auto tDB = make_accumulator<typename T::Mma, T::kBlockN>();
  cute::clear(tDB);
  CUTE_NO_UNROLL
  for (int slice = 0; slice < p.work.num_slices; ++slice) {
    const float4* const sums = partial_sums<T>(p, slice * p.work.num_tiles + tile, warpgroup);
    CUTE_UNROLL
    for (int i = 0; i < T::kThreadFloats; i += 4) {
      const float4 four = sums[i / 4 * kWarpgroupThreads];
      tDB(i) += four.x;
      tDB(i + 1) += four.y;
      tDB(i + 2) += four.z;
      tDB(i + 3) += four.w;
    }
  }
  store_dbias<T>(tDB, p, p.work.tile(tile, T::kBlockN), buffer, warpgroup);
}

}  // namespace jax_fa3
