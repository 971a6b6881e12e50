// Online softmax of logits whose scale changes from key tile to key tile, for P in e4m3.
#pragma once

#include <cfloat>

#include "attention/softmax.cuh"

namespace jax_fa3 {

// As OnlineSoftmax, but the reference maximum is in scaled log2 units and kShift below the row's
// maximum when it follows it, so that P uses the range of e4m3 (at most 448). Sums are of P before
// it is rounded. finish() takes the natural logarithm of 2 for a scale.
//
// A tile goes through maximum(), follow() and exponentiate(), so that a warpgroup can act between
// them. scale_log2 is positive.
struct Float8Softmax : OnlineSoftmax {
  // In log2 units; P <= 2^(kShift + kThreshold) = 256. Whole numbers: where the reference is the
  // maximum, the largest P is a power of two and has no rounding error.
  static constexpr float kShift = 6.f;
  static constexpr float kThreshold = 2.f;

  // Below every logit, and finite: a row that has seen no key needs no care.
  CUTE_DEVICE Float8Softmax() { row_max[0] = row_max[1] = -FLT_MAX; }

  // The rows' maxima in S.
  template <class Accumulator>
  CUTE_DEVICE static void maximum(float (&tile_max)[2], const Accumulator& tS, float scale_log2) {
    tile_max[0] = tile_max[1] = -INFINITY;
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tS); ++i) {
      const int r = accumulator_row(i);
      tile_max[r] = fmaxf(tile_max[r], tS(i));
    }
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      tile_max[r] *= scale_log2;
      tile_max[r] = fmaxf(tile_max[r], __shfl_xor_sync(0xffffffff, tile_max[r], 1));
      tile_max[r] = fmaxf(tile_max[r], __shfl_xor_sync(0xffffffff, tile_max[r], 2));
    }
  }

  // Lets the reference maximum follow S's. Returns, uniformly over the warp, whether it moved.
  CUTE_DEVICE bool follow(const float (&tile_max)[2]) {
    const bool moves = __any_sync(0xffffffff, tile_max[0] > reach(0) || tile_max[1] > reach(1));
    if (moves) {
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        const float reference = fmaxf(tile_max[r] - kShift, row_max[r]);
        correction[r] = exp2_approx(row_max[r] - reference);
        row_max[r] = reference;
        row_sum[r] *= correction[r];
      }
    }
    return moves;
  }

  // S becomes P = exp2(S * scale_log2 - row_max).
  template <class Accumulator>
  CUTE_DEVICE void exponentiate(Accumulator& tS, float scale_log2) {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tS); ++i) {
      const int r = accumulator_row(i);
      tS(i) = exp2_approx(fmaf(tS(i), scale_log2, -row_max[r]));
      row_sum[r] += tS(i);
    }
  }

 private:
  CUTE_DEVICE float reach(int r) const { return row_max[r] + (kShift + kThreshold); }
};

}  // namespace jax_fa3
