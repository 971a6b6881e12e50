// Online softmax of logits whose scale changes from key tile to key tile, for P in e4m3.
#pragma once

#include "attention/softmax.cuh"

namespace jax_fa3 {

// As OnlineSoftmax, but row_max is in scaled log2 units and kShift below the maximum, so that P
// uses the range of e4m3 (at most 448); it follows the maximum exactly. Sums are of P before it is
// rounded. finish() takes the natural logarithm of 2 for a scale.
struct Float8Softmax : OnlineSoftmax {
  static constexpr float kShift = 8.f;  // log2 units: P <= 256

  // P = exp2(S * scale_log2 - row_max), scale_log2 > 0. Returns, uniformly over the warp, whether a
  // maximum has grown.
  template <class Accumulator>
  CUTE_DEVICE bool update(Accumulator& tS, float scale_log2) {
    float tile_max[2] = {-INFINITY, -INFINITY};
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tS); ++i) {
      const int r = accumulator_row(i);
      tile_max[r] = fmaxf(tile_max[r], tS(i));
    }
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      tile_max[r] = fmaxf(tile_max[r], __shfl_xor_sync(0xffffffff, tile_max[r], 1));
      tile_max[r] = fmaxf(tile_max[r], __shfl_xor_sync(0xffffffff, tile_max[r], 2));
      tile_max[r] = fmaxf(row_max[r], fmaf(tile_max[r], scale_log2, -kShift));
    }
    const bool rescale =
        __any_sync(0xffffffff, tile_max[0] > row_max[0] || tile_max[1] > row_max[1]);
    if (rescale) {
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        correction[r] = exp2_approx(row_max[r] - finite(tile_max[r]));
        row_max[r] = tile_max[r];
        row_sum[r] *= correction[r];
      }
    }
    const float offset[2] = {finite(row_max[0]), finite(row_max[1])};
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tS); ++i) {
      const int r = accumulator_row(i);
      tS(i) = exp2_approx(fmaf(tS(i), scale_log2, -offset[r]));
      row_sum[r] += tS(i);
    }
    return rescale;
  }
};

}  // namespace jax_fa3
