// The end of a tile of dBias: from a warpgroup's registers to global memory.
#pragma once

#include "kernels/backward_dbias/traits.cuh"

namespace jax_fa3 {

// The sum of a tile's rows, which both warpgroups have 64 of each, becomes the first row of
// `buffer`. Always in the same order: a thread's two rows, a warp's eight times two, the warps'.
template <class T, class Accumulator>
CUTE_DEVICE void sum_rows(const Accumulator& tDB, typename T::Element* buffer, int warpgroup) {
  constexpr int kThreads = T::kConsumers * kWarpgroupThreads;
  using BiasTile = typename T::BiasTile;
  // Each warp's, where the second warpgroup's rows are, which do not leave the buffer.
  auto* const sums = reinterpret_cast<float(*)[T::kBlockN]>(buffer + BiasTile::kChunkElements / 2);
  static_assert(T::kConsumerWarps * T::kBlockN * sizeof(float) <=
                BiasTile::kChunkElements / 2 * sizeof(typename T::Element));
  const int thread = warpgroup_thread();
  const int warp = warpgroup * (kWarpgroupThreads / 32) + thread / 32;

  cutlass::arch::NamedBarrier::sync(kThreads, T::kRowSums);  // both have read the bias
  CUTE_UNROLL
  for (int i = 0; i < cute::size(tDB); ++i) {
    if (accumulator_row(i) != 0) continue;
    float sum = tDB(i) + tDB(i + 2);
    CUTE_UNROLL
    for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(0xffffffff, sum, lanes);
    if (thread % 32 < 4) sums[warp][thread_col() + accumulator_col(i)] = sum;
  }
  cutlass::arch::NamedBarrier::sync(kThreads, T::kRowSums);
  if (warpgroup == 0 && thread < T::kBlockN) {
    float sum = 0.f;
    CUTE_UNROLL
    for (int w = 0; w < T::kConsumerWarps; ++w) sum += sums[w][thread];
    buffer[BiasTile::offset(0, thread)] = typename T::Element(sum);
  }
}

// This warpgroup's 64 rows, or of a bias of one row that one. On return the leader knows that the
// buffer has been read.
template <class T, class Accumulator>
CUTE_DEVICE void store_dbias(Accumulator& tDB, const DBiasParams& p, const BiasBlock& tile,
                             typename T::Element* buffer, int warpgroup) {
  CUTE_UNROLL
  for (int i = 0; i < cute::size(tDB); ++i) tDB(i) = finite_or_nan(tDB(i));
  const int row = warpgroup * kWarpgroupRows;
  if (p.work.shares_rows) {
    sum_rows<T>(tDB, buffer, warpgroup);
  } else {
    store_accumulator<typename T::BiasTile>(tDB, buffer, row);
  }
  cutlass::arch::fence_view_async_shared();
  cutlass::arch::NamedBarrier::sync(kWarpgroupThreads, T::kWarpgroup + warpgroup);
  if (leads_warpgroup()) {
    if (!p.work.shares_rows || warpgroup == 0) {
      store_plane<typename T::BiasTile>(p.dbias, buffer, row, tile.row + row, tile.key, tile.head,
                                        tile.plane);
    }
    cute::tma_store_arrive();
    cute::tma_store_wait<0>();
  }
}

// An item's sums, where a thread of a warpgroup writes and reads its own.
template <class T>
CUTE_DEVICE float4* partial_sums(const DBiasParams& p, int item, int warpgroup) {
  constexpr int kFloats4 = T::kThreadFloats / 4 * kWarpgroupThreads;
  return p.partial_sums + (std::int64_t{item} * T::kConsumers + warpgroup) * kFloats4 +
         warpgroup_thread();
}

}  // namespace jax_fa3
