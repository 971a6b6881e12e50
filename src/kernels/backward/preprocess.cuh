// Before the main kernel: per query row -LSE / scale and -delta, delta = rowsum(dO * O) - dLSE,
// both padded to whole blocks, and what it gives its sink; the workspace of a fused dQ and the tile
// counters zeroed. Memory-bound. The first CTAs make the lists of work tiles.
#pragma once

#include "attention/mask.h"
#include "kernels/backward/traits.cuh"

namespace jax_fa3 {

struct PreprocessParams : CommonParams {
  const void* out;    // [b, s_q, h_q, d_v]
  const void* dout;   // [b, s_q, h_q, d_v]
  const float* lse;   // [b, h_q, s_q]
  const float* dlse;  // [b, h_q, s_q] or null
  HeadTable sinks;
  float* dsinks;              // [b, h_q, s_q] or null
  RowStatistics* statistics;  // [b, h_q, num_m_blocks * kBlockM]
  float* dquery;              // [b, h_q, num_m_blocks, kBlockM * kHeadDim]; fused dQ only
  int* tile_counters;         // [2]
  KeyTile* key_tiles;         // [num_lists, key_tile_list_size]
  int key_tile_list_size;
  int num_lists;  // b, or none
  int num_m_blocks;
  int head_dim_v;
};

constexpr int kPreprocessThreads = 256;

// Makes the list of a sequence's work tiles, from the intervals of its keys if all heads share
// these and they are monotone. A bit for each key says whether it is an edge; those of the keys
// around it say whether the documents that end and begin there are long. Of a whole CTA.
CUTE_DEVICE void list_key_tiles(KeyTile* tiles, int block_n, const Intervals& intervals,
                                const PlaneLayout& layout) {
  constexpr int kWarps = kPreprocessThreads / 32;
  constexpr int kWords = 128;                  // of a window
  constexpr int kAround = kLongDocument / 32;  // words
  constexpr int kAllWords = kAround + kWords + kAround;
  constexpr int kAtOnce = 6;  // loads under way
  static_assert(kAllWords % (kWarps * kAtOnce) == 0 && kWords <= kPreprocessThreads);
  __shared__ unsigned edges[kAllWords], ends[kWords], begins[kWords], with_any[kWords / 32];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int seqlen_k = layout.seqlen_k;
  const bool is_shared = intervals.keys != nullptr && intervals.plane_stride == 0;
  KeyTileList list(tiles, block_n, intervals, layout, thread, kPreprocessThreads);

  for (int window = 0; is_shared && window < seqlen_k; window += 32 * kWords) {
    for (int first = warp; first < kAllWords; first += kWarps * kAtOnce) {
      bool edge[kAtOnce];
      CUTE_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        const int key = window + (first + i * kWarps - kAround) * 32 + lane;
        edge[i] = key == 0 || key == seqlen_k;
        if (0 < key && key < seqlen_k) {
          edge[i] = is_edge(intervals.keys[key - 1], intervals.keys[key]);
        }
      }
      CUTE_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        const unsigned bits = __ballot_sync(0xffffffff, edge[i]);
        if (lane == 0) edges[first + i * kWarps] = bits;
      }
    }
    __syncthreads();
    if (thread < kWords) {
      const unsigned* const around = edges + kAround + thread;
      unsigned near_before = 0, near_behind = 0;  // in the words between
      CUTE_UNROLL
      for (int w = 1; w < kAround; ++w) {
        near_before |= around[-w];
        near_behind |= around[w];
      }
      unsigned long_ends = 0, long_begins = 0;
      for (unsigned left = around[0]; left != 0; left &= left - 1) {
        const unsigned bit = left & ~(left - 1), below = bit - 1, above = ~(bit | below);
        const unsigned before = near_before | (around[0] & below) | (around[-kAround] & above);
        const unsigned behind = near_behind | (around[0] & above) | (around[kAround] & below);
        if (before == 0) long_ends |= bit;
        if (behind == 0) long_begins |= bit;
      }
      ends[thread] = long_ends;
      begins[thread] = long_begins;
      const unsigned words = __ballot_sync(0xffffffff, (long_ends | long_begins) != 0);
      if (lane == 0) with_any[warp] = words;
    }
    __syncthreads();
    for (int i = 0; i < kWords / 32; ++i) {
      for (unsigned words = with_any[i]; words != 0; words &= words - 1) {
        const int w = 32 * i + __ffs(words) - 1;
        for (unsigned left = ends[w] | begins[w]; left != 0; left &= left - 1) {
          const unsigned bit = left & ~(left - 1);
          const int key = window + 32 * w + __ffs(bit) - 1;
          if (key < seqlen_k) list.add_edge(key, ends[w] & bit, begins[w] & bit);
        }
      }
    }
    __syncthreads();
  }
  list.finish();
  __syncthreads();
  list.add_bounds();
}

// One CTA per block of queries of one (batch, head); kLanes threads share a row.
template <class Config>
__global__ void __launch_bounds__(kPreprocessThreads) preprocess_kernel(const PreprocessParams p) {
  using T = BackwardTraits<Config>;
  using Element = typename T::Element;
  constexpr int kVector = 16 / sizeof(Element);
  constexpr int kLanes = T::kHeadDimV <= 64 ? 8 : T::kHeadDimV <= 128 ? 16 : 32;
  constexpr int kRowsAtOnce = kPreprocessThreads / kLanes;

  if (int(blockIdx.x) < p.num_lists) {
    const int b = blockIdx.x;
    Mask mask = make_mask(p.mask, p.index, b, p.seqlen_q, p.seqlen_k);
    Intervals intervals;
    read_intervals(intervals, mask, p.index, b, p.query_heads(0), {p.seqlen_q, p.seqlen_k});
    list_key_tiles(p.key_tiles + std::int64_t(b) * p.key_tile_list_size, T::kBlockN, intervals,
                   {p.seqlen_q, p.seqlen_k});
    return;
  }
  const std::int64_t block = blockIdx.x - p.num_lists;
  const int m_block = block % p.num_m_blocks;
  const std::int64_t batch_head = block / p.num_m_blocks;
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
  if (block == 0 && threadIdx.x < 2) p.tile_counters[threadIdx.x] = 0;

  const int lane = threadIdx.x % kLanes;
  CUTE_UNROLL
  for (int first = 0; first < T::kBlockM; first += kRowsAtOnce) {
    const int local_row = first + threadIdx.x / kLanes;
    const int row = m_block * T::kBlockM + local_row;
    const bool exists = row < mask.query_length;
    float sum = 0.f;
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
    }
    CUTE_UNROLL
    for (int step = kLanes / 2; step > 0; step /= 2) {
      sum += __shfl_xor_sync(0xffffffff, sum, step);
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
      p.statistics[block * T::kBlockM + local_row] =
          empty ? Statistics::make<kInProduct>(Statistics::kNoGradient, 0.f)
                : Statistics::make<kInProduct>(-lse / p.logit_scale, -delta);
    }
  }
}

}  // namespace jax_fa3
