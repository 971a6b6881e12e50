// Online softmax of logits whose scale changes from key tile to key tile, for P in e4m3.
#pragma once

#include <cfloat>

#include "attention/softmax.cuh"

namespace jax_fa3 {

// As OnlineSoftmax, but the reference maximum is in scaled log2 units and kShift below the row's
// maximum when it follows it, so that P uses the range of e4m3 (at most 448). Sums are of P before
// it is rounded. finish() takes the natural logarithm of 2 for a scale.
//
// begin() is for a row's first tile. Each of the others goes through maximum(), follow() and
// exponentiate(), so that a warpgroup can act between them. scale_log2 is positive.
struct Float8Softmax : OnlineSoftmax {
  // In log2 units; P <= 2^(kShift + kThreshold) = 256. Whole numbers: where the reference is the
  // maximum, the largest P is a power of two and has no rounding error.
  static constexpr float kShift = 6.f;
  static constexpr float kThreshold = 2.f;

  // Below every logit, and finite: a row that has seen no key needs no care.
  CUTE_DEVICE Float8Softmax() { row_max[0] = row_max[1] = -FLT_MAX; }

  template <class Accumulator>
  CUTE_DEVICE void begin(Accumulator& tS, float scale_log2) {
    float tile_max[2];
    maximum_by<Compare::kFloats>(tile_max, tS, scale_log2);
    move_reference(tile_max);
    exponentiate(tS, scale_log2);
  }

  // The rows' maxima in S; -inf where a maximum is negative.
  template <class Accumulator>
  CUTE_DEVICE static void maximum(float (&tile_max)[2], const Accumulator& tS, float scale_log2) {
    maximum_by<Compare::kIntegers>(tile_max, tS, scale_log2);
  }

  // Given what maximum() found in S, lets the reference maximum follow. Returns, uniformly over the
  // warp, whether it moved.
  template <class Accumulator>
  CUTE_DEVICE bool follow(float (&tile_max)[2], const Accumulator& tS, float scale_log2) {
    bool moves = any(tile_max[0] >= limit[0] || tile_max[1] >= limit[1]);
    if (moves && any(limit[0] < 0.f || limit[1] < 0.f)) {
      maximum_by<Compare::kFloats>(tile_max, tS, scale_log2);
      moves = any(tile_max[0] > reach(0) || tile_max[1] > reach(1));
    }
    if (moves) move_reference(tile_max);
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
  // The maximum() from which on a row's reference may have to move: the largest logit that it
  // allows, but -inf where that is negative, of which maximum() says nothing.
  float limit[2];

  CUTE_DEVICE float reach(int r) const { return row_max[r] + (kShift + kThreshold); }

  CUTE_DEVICE void move_reference(const float (&tile_max)[2]) {
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float reference = fmaxf(tile_max[r] - kShift, row_max[r]);
      correction[r] = exp2_approx(row_max[r] - reference);
      row_max[r] = reference;
      row_sum[r] *= correction[r];
      limit[r] = reach(r) < 0.f ? -INFINITY : reach(r);
    }
  }

  // One instruction finds the largest of three integers, but only of two floats. Bits of floats
  // compare as integers where one is not negative; of negative ones, -inf comes out as the largest.
  enum class Compare { kFloats, kIntegers };

  template <Compare kCompare>
  CUTE_DEVICE static float larger(float a, float b) {
    if constexpr (kCompare == Compare::kFloats) return fmaxf(a, b);
    return __int_as_float(max(__float_as_int(a), __float_as_int(b)));
  }

  template <Compare kCompare, class Accumulator>
  CUTE_DEVICE static void maximum_by(float (&tile_max)[2], const Accumulator& tS,
                                     float scale_log2) {
    tile_max[0] = tile_max[1] = -INFINITY;
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tS); ++i) {
      const int r = accumulator_row(i);
      tile_max[r] = larger<kCompare>(tile_max[r], tS(i));
    }
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      tile_max[r] *= scale_log2;
      tile_max[r] = fmaxf(tile_max[r], __shfl_xor_sync(0xffffffff, tile_max[r], 1));
      tile_max[r] = fmaxf(tile_max[r], __shfl_xor_sync(0xffffffff, tile_max[r], 2));
    }
  }

  CUTE_DEVICE static bool any(bool condition) { return __any_sync(0xffffffff, condition); }
};

}  // namespace jax_fa3
