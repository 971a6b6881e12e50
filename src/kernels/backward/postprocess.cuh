// After the main kernel: dQ from float32 fragments to rows of 16-bit elements, times the softmax
// scale. Of one chunk. Memory-bound.
#pragma once

#include "kernels/backward/traits.cuh"

namespace jax_fa3 {

struct PostprocessParams : CommonParams {
  const float* dquery_accumulator;  // [heads, num_m_blocks, kBlockM * kHeadDim], of the chunk
  void* dquery;                     // [b, s_q, h_q, d]
  int first_head;                   // of the chunk's query heads, counted through all batches
  int num_m_blocks;
  int head_dim;
};

// One CTA per block of queries of one (batch, head), its threads standing where the consumer
// threads of the main kernel stood.
template <class Config>
__global__ void __launch_bounds__(BackwardTraits<Config>::kConsumerThreads)
    postprocess_kernel(const PostprocessParams p) {
  using T = BackwardTraits<Config>;
  using Element = typename T::Element;
  constexpr int kVector = 16 / sizeof(Element);
  constexpr int kStride = T::kHeadDim + kVector;  // padded against bank conflicts
  __shared__ alignas(16) Element rows[T::kBlockM * kStride];

  const std::int64_t block = blockIdx.x;
  const int m_block = block % p.num_m_blocks;
  const std::int64_t batch_head = p.first_head + block / p.num_m_blocks;
  const int head = batch_head % p.num_heads;
  const std::int64_t batch = batch_head / p.num_heads;

  const int warpgroup = threadIdx.x / kWarpgroupThreads;
  constexpr int kFloats = kWarpgroupRows * T::kColsDQ / kWarpgroupThreads;
  const float* const source = p.dquery_accumulator + block * T::kBlockFloatsDQ +
                              warpgroup * kFloats * kWarpgroupThreads +
                              threadIdx.x % kWarpgroupThreads * 4;
  const int skipped = warpgroup == 1 ? T::kSkippedDQ : 0;
  const int first_row = (T::kSplitRowsDQ ? warpgroup * kWarpgroupRows : 0) + thread_row();
  const int first_col = warpgroup * T::kFirstColDQ + thread_col();
  CUTE_UNROLL
  for (int i = 0; i < kFloats; i += 4) {
    if (i < skipped) continue;
    const float4 value =
        *reinterpret_cast<const float4*>(source + (i - skipped) * kWarpgroupThreads);
    const float values[4] = {value.x, value.y, value.z, value.w};
    CUTE_UNROLL
    for (int j = 0; j < 4; ++j) {
      rows[(first_row + 8 * accumulator_row(i + j)) * kStride + first_col +
           accumulator_col(i + j)] = Element(finite_or_nan(values[j]) * p.softmax_scale);
    }
  }
  __syncthreads();

  constexpr int kVectorsPerRow = T::kHeadDim / kVector;
  for (int i = threadIdx.x; i < T::kBlockM * kVectorsPerRow; i += T::kConsumerThreads) {
    const int local_row = i / kVectorsPerRow, col = i % kVectorsPerRow * kVector;
    const std::int64_t row = m_block * T::kBlockM + local_row;
    if (row < p.seqlen_q && col < p.head_dim) {
      auto* const target = static_cast<Element*>(p.dquery) +
                           ((batch * p.seqlen_q + row) * p.num_heads + head) * p.head_dim + col;
      *reinterpret_cast<uint4*>(target) =
          *reinterpret_cast<const uint4*>(rows + local_row * kStride + col);
    }
  }
}

}  // namespace jax_fa3
