// Sums of dQ that have equal bits in any order.
//
// Additions in float32 are exact, so that their order does not matter, while all numbers are
// multiples of one step and no sum is beyond 2^24 of them. So each block of keys rounds its share
// of a row's dQ to the row's step before it adds it. Any shares of row i together are below
//
//   bound_i = (|dO_i| * max_j |V_j| + |delta_i|) * max_jd |K_jd|    over the keys that are seen,
//
// because a share is a sum of P_ij (dP_ij - delta_i) K_j, |dP_ij| <= |dO_i| |V_j|, and the weights
// P_ij of a row sum to 1 at most. The step is 2^-24 of a power of two above twice that. A number is
// rounded to it by adding and subtracting the row's grid, three quarters of that power of two: the
// last digit of the sum is a step. Of a share that is more than a quarter of that power below 0 it
// is half a step, and sums of such shares up to the bound are exact, too.
#pragma once

#include <cfloat>

#include "attention/mask.h"
#include "attention/row_statistics.cuh"
#include "device/mma.cuh"
#include "kernels/params.h"

namespace jax_fa3 {

// What the keys of one (batch, kv head) put into the bound.
struct KeyMaxima {
  float key = 0.f;    // |K_jd|
  float value = 0.f;  // |V_j|

  CUTE_DEVICE void add(const KeyMaxima& more) {
    key = fmaxf(key, more.key);
    value = fmaxf(value, more.value);
  }
};

struct KeyMaximaParams : CommonParams {
  const void* key;    // [b, s_k, h_kv, head_dim]
  const void* value;  // [b, s_k, h_kv, head_dim_v]
  KeyMaxima* maxima;  // [b, h_kv, num_n_blocks], of kBlockN keys each
  int num_n_blocks;
  int head_dim;
  int head_dim_v;
};

constexpr int kMaximaThreads = 256;

// Of all of a thread block's threads. `shared` has a place for each warp.
CUTE_DEVICE KeyMaxima reduce_maxima(KeyMaxima found, KeyMaxima* shared) {
  CUTE_UNROLL
  for (int step = 16; step > 0; step /= 2) {
    found.add({__shfl_xor_sync(0xffffffff, found.key, step),
               __shfl_xor_sync(0xffffffff, found.value, step)});
  }
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = found;
  __syncthreads();
  for (int warp = 0; warp < kMaximaThreads / 32; ++warp) found.add(shared[warp]);
  return found;
}

// One CTA per block of keys; kLanes threads share a key. Keys that no row sees may hold anything.
// What is not finite is left out: where it is seen, gradients are not finite either.
template <class Element, int kHeadDim, int kBlockN>
__global__ void __launch_bounds__(kMaximaThreads) key_maxima_kernel(const KeyMaximaParams p) {
  constexpr int kVector = 16 / sizeof(Element);
  constexpr int kLanes = kHeadDim <= 64 ? 8 : 16;
  static_assert(kLanes * kVector >= kHeadDim);
  __shared__ KeyMaxima shared[kMaximaThreads / 32];

  const int n_block = blockIdx.x % p.num_n_blocks;
  const int num_heads = p.num_heads / p.heads_per_kv_head;
  const int head = blockIdx.x / p.num_n_blocks % num_heads;
  const int batch = blockIdx.x / p.num_n_blocks / num_heads;
  const QueryHeads query_heads{head * p.heads_per_kv_head, p.heads_per_kv_head};
  Mask mask = make_mask(p.mask, p.index, batch, p.seqlen_q, p.seqlen_k);
  Intervals intervals;
  read_intervals(intervals, mask, p.index, batch, query_heads, {p.seqlen_q, p.seqlen_k});

  const int col = threadIdx.x % kLanes * kVector;
  const auto load = [&](const void* array, int key, int head_dim) {
    const std::int64_t row = (std::int64_t(batch) * p.seqlen_k + key) * num_heads + head;
    uint4 vector{0, 0, 0, 0};
    if (col < head_dim) {
      vector = *reinterpret_cast<const uint4*>(static_cast<const Element*>(array) + row * head_dim +
                                               col);
    }
    return vector;
  };
  KeyMaxima found;
  for (int i = threadIdx.x / kLanes; i < kBlockN; i += kMaximaThreads / kLanes) {
    const int key = n_block * kBlockN + i;
    const Bounds rows = key < mask.key_length ? intervals.of_keys({p.seqlen_q, p.seqlen_k}, key,
                                                                  key + 1, p.heads_per_kv_head)
                                              : Bounds::none();
    const bool is_seen = !mask.query_tiles(key, key + 1, 1, rows).empty();
    float square = 0.f;
    if (is_seen) {
      const uint4 key_bits = load(p.key, key, p.head_dim);
      const uint4 value_bits = load(p.value, key, p.head_dim_v);
      CUTE_UNROLL
      for (int c = 0; c < kVector; ++c) {
        const float magnitude = fabsf(float(reinterpret_cast<const Element*>(&key_bits)[c]));
        const float element = float(reinterpret_cast<const Element*>(&value_bits)[c]);
        if (magnitude <= FLT_MAX) found.key = fmaxf(found.key, magnitude);
        square = fmaf(element, element, square);
      }
    }
    CUTE_UNROLL
    for (int step = kLanes / 2; step > 0; step /= 2) {
      square += __shfl_xor_sync(0xffffffff, square, step);
    }
    if (square <= FLT_MAX) found.value = fmaxf(found.value, sqrtf(square));
  }
  found = reduce_maxima(found, shared);
  if (threadIdx.x == 0) p.maxima[blockIdx.x] = found;
}

// The grid of a row.
CUTE_DEVICE float grid_of(float dout_square, float delta, const KeyMaxima& maxima) {
  // Twice the bound, and room for weights that sum to a little more than 1, the 16 bits of dS, and
  // half a step for each block of keys.
  constexpr float kMargin = 2.125f;
  const float bound = kMargin * (sqrtf(dout_square) * maxima.value + fabsf(delta)) * maxima.key;
  const float within = fminf(fmaxf(bound, 0x1p-100f), 0x1p120f);
  const float power = __uint_as_float((__float_as_uint(within) & 0x7f800000u) + 0x00800000u);
  return 0.75f * power;
}

// Of a thread's two rows, what add_dquery adds.
template <class Accumulator>
CUTE_DEVICE void round_to_grid(Accumulator& tDQ, const float (&grids)[2]) {
  CUTE_UNROLL
  for (int i = 0; i < cute::size(tDQ); ++i) {
    const float grid = grids[accumulator_row(i)];
    tDQ(i) = __fsub_rn(__fadd_rn(tDQ(i), grid), grid);
  }
}

}  // namespace jax_fa3
