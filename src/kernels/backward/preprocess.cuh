// Before the main kernel: per query row -LSE / scale and -delta, delta = rowsum(dO * O) - dLSE,
// both padded to whole blocks, the grid of its dQ, and what it gives its sink; the workspace of a
// fused dQ zeroed, and the tile counters set. Of one chunk.
// Memory-bound.
#pragma once

#include "attention/mask.h"
#include "kernels/backward/dquery_grid.cuh"
#include "kernels/backward/traits.cuh"

namespace jax_fa3 {

struct PreprocessParams : CommonParams {
  const void* out;    // [b, s_q, h_q, d_v]
  const void* dout;   // [b, s_q, h_q, d_v]
  const float* lse;   // [b, h_q, s_q]
  const float* dlse;  // [b, h_q, s_q] or null
  HeadTable sinks;
  float* dsinks;                // [b, h_q, s_q] or null
  RowStatistics* statistics;    // [heads, num_m_blocks * kBlockM], of the chunk's query heads
  float* dquery;                // [heads, num_m_blocks, kBlockM * kHeadDim]; fused dQ only
  const KeyMaxima* key_maxima;  // [b, h_kv, num_n_blocks]; null where dQ has no grid
  int num_n_blocks;
  int first_head;      // of the chunk's query heads, counted through all batches
  int first_tile;      // of the main kernel
  int* tile_counters;  // [2]
  int num_m_blocks;
  int head_dim_v;
};

constexpr int kPreprocessThreads = kMaximaThreads;

// One CTA per block of queries of one (batch, head); kLanes threads share a row.
template <class Config>
__global__ void __launch_bounds__(kPreprocessThreads) preprocess_kernel(const PreprocessParams p) {
  using T = BackwardTraits<Config>;
  using Element = typename T::Element;
  constexpr int kVector = 16 / sizeof(Element);
  constexpr int kLanes = T::kHeadDimV <= 64 ? 8 : T::kHeadDimV <= 128 ? 16 : 32;
  constexpr int kRowsAtOnce = kPreprocessThreads / kLanes;

  const std::int64_t block = blockIdx.x;
  const int m_block = block % p.num_m_blocks;
  const std::int64_t batch_head = p.first_head + block / p.num_m_blocks;
  const int head = batch_head % p.num_heads;
  const std::int64_t batch = batch_head / p.num_heads;
  Mask mask = make_mask(p.mask, p.index, int(batch), p.seqlen_q, p.seqlen_k);
  Intervals intervals;
  read_intervals(intervals, mask, p.index, int(batch), p.query_heads(head),
                 {p.seqlen_q, p.seqlen_k});

  if constexpr (T::kFusedDQ) {
    auto* const dquery = reinterpret_cast<float4*>(p.dquery + block * T::kBlockFloatsDQ);
    for (int i = threadIdx.x; i < T::kBlockFloatsDQ / 4; i += kPreprocessThreads) {
      dquery[i] = float4{0.f, 0.f, 0.f, 0.f};
    }
  }
  if (block == 0 && threadIdx.x < 2) {
    p.tile_counters[threadIdx.x] = threadIdx.x == 0 ? p.first_tile : 0;
  }

  KeyMaxima maxima;
  const bool has_grid = T::kTakesGrid && p.key_maxima != nullptr;
  if (has_grid) {
    __shared__ KeyMaxima shared[kPreprocessThreads / 32];
    const KeyMaxima* const blocks =
        p.key_maxima + batch_head / p.heads_per_kv_head * p.num_n_blocks;
    for (int i = threadIdx.x; i < p.num_n_blocks; i += kPreprocessThreads) maxima.add(blocks[i]);
    maxima = reduce_maxima(maxima, shared);
  }

  const int lane = threadIdx.x % kLanes;
  CUTE_UNROLL
  for (int first = 0; first < T::kBlockM; first += kRowsAtOnce) {
    const int local_row = first + threadIdx.x / kLanes;
    const int row = m_block * T::kBlockM + local_row;
    const bool exists = row < mask.query_length;
    float sum = 0.f, dout_square = 0.f;
    if (exists && lane * kVector < p.head_dim_v) {
      const std::int64_t at =
          ((batch * p.seqlen_q + row) * p.num_heads + head) * p.head_dim_v + lane * kVector;
      const uint4 out_bits =
          *reinterpret_cast<const uint4*>(static_cast<const Element*>(p.out) + at);
      const uint4 dout_bits =
          *reinterpret_cast<const uint4*>(static_cast<const Element*>(p.dout) + at);
      const auto* out = reinterpret_cast<const Element*>(&out_bits);
      const auto* dout = reinterpret_cast<const Element*>(&dout_bits);
      CUTE_UNROLL
      for (int i = 0; i < kVector; ++i) sum = fmaf(float(out[i]), float(dout[i]), sum);
      if (has_grid) {
        CUTE_UNROLL
        for (int i = 0; i < kVector; ++i) {
          dout_square = fmaf(float(dout[i]), float(dout[i]), dout_square);
        }
      }
    }
    CUTE_UNROLL
    for (int step = kLanes / 2; step > 0; step /= 2) {
      sum += __shfl_xor_sync(0xffffffff, sum, step);
      if (has_grid) dout_square += __shfl_xor_sync(0xffffffff, dout_square, step);
    }
    if (lane == 0) {
      const std::int64_t statistic = batch_head * p.seqlen_q + row;
      const float lse = exists ? p.lse[statistic] : -INFINITY;
      const bool has_lse = lse != -INFINITY;
      const float dlse = p.dlse != nullptr && has_lse ? p.dlse[statistic] : 0.f;
      const float delta = sum - dlse;
      if (p.dsinks != nullptr && row < p.seqlen_q) {
        const float weight =
            has_lse ? exp2_approx((p.sinks.of(int(batch), head) - lse) * kLog2e) : 0.f;
        p.dsinks[statistic] = -weight * delta;
      }
      // The LSE of a row that sees no key is -inf, or its sink.
      bool empty = !has_lse;
      if (has_lse && intervals.plane != nullptr) {
        const Interval keys = intervals.rows()[row];
        empty = keys.begin >= keys.end;
      }
      using Statistics = RowStatistics;
      constexpr bool kInProduct = T::Score::kIsLinear;
      Statistics statistics = empty ? Statistics::make<kInProduct>(Statistics::kNoGradient, 0.f)
                                    : Statistics::make<kInProduct>(-lse / p.logit_scale, -delta);
      if (has_grid) statistics.set_grid(grid_of(dout_square, delta, maxima));
      p.statistics[block * T::kBlockM + local_row] = statistics;
    }
  }
}

}  // namespace jax_fa3
