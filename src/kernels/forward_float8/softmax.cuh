// The online softmax of float8: attention/softmax.cuh, and a shorter way for tiles that no mask
// cuts, which finds no maxima.
//
// There P is made with the reference as it stands, and the sums of P, which the LSE needs anyway,
// say whether that was right: no P is greater than its thread's sum, so while sums are at most 448,
// the largest number of e4m3, nothing is cut off. Otherwise the reference moves up by the sums'
// excess, and P, still in float32, is multiplied by what that comes to.
#pragma once

#include "attention/softmax.cuh"

namespace jax_fa3 {

// P <= 2^(6 + 2) where maxima are found. Whole numbers: where the reference is the maximum, the
// largest P is a power of two and has no rounding error.
struct Float8Softmax : OnlineSoftmax<6, true, false> {
  using Base = OnlineSoftmax<6, true, false>;
  static constexpr float kLargest = 448.f;  // of e4m3
  static constexpr int kAim = 6;            // moved sums are 2^6 to 2^7

  // P of a tile, made before anything is known of its maxima; returns, uniformly over the warp,
  // whether the reference moved. recompute(tS) makes the scores once more, for where they are so
  // far above the reference that P is infinite.
  template <class Accumulator, class Recompute>
  CUTE_DEVICE bool exponentiate_first(Accumulator& tS, float scale_log2,
                                      const Recompute& recompute) {
    float sums[2];
    exponentiate_into(sums, tS, scale_log2);
    const bool moves = any(!(sums[0] <= kLargest && sums[1] <= kLargest));
    if (moves) {
      correction[0] = correction[1] = 1.f;
      if (any(sums[0] == INFINITY || sums[1] == INFINITY)) {
        recompute(tS);
        float row_max[2];
        maximum(row_max, tS);
        move_reference(row_max, scale_log2);
        exponentiate_into(sums, tS, scale_log2);
      }
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        float largest = fmaxf(sums[r], __shfl_xor_sync(0xffffffff, sums[r], 1));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 2));
        // Of every row that is above the aim, or their turns would come one by one.
        const int excess = max((__float_as_int(largest) >> 23) - 127 - kAim, 0);
        const float factor = __int_as_float((127 - excess) << 23);
        CUTE_UNROLL
        for (int i = 0; i < cute::size(tS); ++i) {
          if (accumulator_row(i) == r) tS(i) *= factor;
        }
        sums[r] *= factor;
        row_sum[r] *= factor;
        correction[r] *= factor;
        set_reference(r, reference[r] + excess);
      }
    }
    row_sum[0] += sums[0];
    row_sum[1] += sums[1];
    return moves;
  }

 private:
  // P, and this thread's sums of it.
  template <class Accumulator>
  CUTE_DEVICE void exponentiate_into(float (&sums)[2], Accumulator& tS, float scale_log2) const {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tS); ++i) {
      const int r = accumulator_row(i);
      tS(i) = exp2_approx(fmaf(tS(i), scale_log2, -reference[r]));
      sums[r] = i < 4 && i % 2 == 0 ? tS(i) : sums[r] + tS(i);
    }
  }
};

}  // namespace jax_fa3
