// Online softmax on a warpgroup's accumulator of S = Q K^T (Algorithm 2 of arXiv:2407.08608), with
// the conditional rescale: O, l and P refer to a reference maximum that follows the true one only
// when it has grown by more than `threshold`.
#pragma once

#include <cfloat>
#include <cmath>

#include "attention/score.cuh"
#include "device/mma.cuh"

namespace jax_fa3 {

// P = exp2(S * scale_log2 - reference), row by row. The reference, in log2 units, is the largest
// scaled logit less kShift when it moves, and it moves when a logit has grown `threshold` beyond:
// P <= 2^(kShift + threshold). scale_log2 is positive and may differ from tile to tile.
//
// A tile goes through update(), a row's first one through begin(). Or through its parts, largest(),
// follow() and exponentiate(), so that a warpgroup can act between them.
//
// kReuseFound: what largest() found is made use of when the reference moves, rather than found
// anew. For a small threshold, with which it moves often: that is a few instructions more where it
// does not.
template <int kShift, bool kReuseFound>
struct OnlineSoftmax {
  float threshold;
  // Of each of the thread's two rows. Below every logit, and finite: a row that has seen no key
  // needs no care.
  float reference[2] = {-FLT_MAX, -FLT_MAX};
  // This thread's share of the row sums, until finish() adds up the quad's.
  float row_sum[2] = {0.f, 0.f};
  // What O must be multiplied with before the next P V is added, if the reference moved.
  float correction[2];
  // The result of largest() from which on the reference may have to move.
  float limit[2] = {-INFINITY, -INFINITY};

  template <class Accumulator>
  CUTE_DEVICE void begin(Accumulator& tS, float scale_log2) {
    float row_max[2];
    maximum(row_max, tS, scale_log2);
    move_reference(row_max);
    exponentiate(tS, scale_log2);
  }

  // Returns, uniformly over the warp, whether the reference moved.
  template <class Accumulator>
  CUTE_DEVICE bool update(Accumulator& tS, float scale_log2) {
    float found[2];
    largest(found, tS, scale_log2);
    const bool moved = follow(found, tS, scale_log2);
    exponentiate(tS, scale_log2);
    return moved;
  }

  // The largest of this thread's scaled logits in each row, for follow(); where it is negative,
  // some negative number. One instruction finds the largest of three integers, of floats only of
  // two, and bits of floats compare as integers where one of them is not negative.
  template <class Accumulator>
  CUTE_DEVICE static void largest(float (&found)[2], const Accumulator& tS, float scale_log2) {
    int bits[2][2];  // two chains a row: one would wait for its own latency
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tS); ++i) {
      int& chain = bits[accumulator_row(i)][i / 4 % 2];
      chain = i < 8 && i % 2 == 0 ? __float_as_int(tS(i)) : max(chain, __float_as_int(tS(i)));
    }
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      found[r] = __int_as_float(max(bits[r][0], bits[r][1])) * scale_log2;
    }
  }

  // Every thread compares what it has found, and a vote makes that the warp's: as long as no
  // reference moves, nobody needs a row's maximum. Negative ones count where a limit is negative.
  template <class Accumulator>
  CUTE_DEVICE bool follow(const float (&found)[2], const Accumulator& tS, float scale_log2) {
    if (!any(found[0] >= limit[0] || found[1] >= limit[1])) return false;
    float row_max[2] = {found[0], found[1]};
    if (!kReuseFound || any(limit[0] < 0.f || limit[1] < 0.f)) maximum(row_max, tS, scale_log2);
    return move_reference(row_max);
  }

  template <class Accumulator>
  CUTE_DEVICE void exponentiate(Accumulator& tS, float scale_log2) {
    exponentiate<0, decltype(cute::size(tS))::value>(tS, scale_log2);
  }
  // Elements kBegin to kEnd - 1 only.
  template <int kBegin, int kEnd, class Accumulator>
  CUTE_DEVICE void exponentiate(Accumulator& tS, float scale_log2) {
    CUTE_UNROLL
    for (int i = kBegin; i < kEnd; ++i) {
      const int r = accumulator_row(i);
      tS(i) = exp2_approx(fmaf(tS(i), scale_log2, -reference[r]));
      row_sum[r] += tS(i);
    }
  }

  template <class Accumulator>
  CUTE_DEVICE void rescale(Accumulator& tO) const {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tO); ++i) tO(i) *= correction[accumulator_row(i)];
  }

  // Makes all that comes out NaN.
  CUTE_DEVICE void poison() { row_sum[0] = row_sum[1] = __int_as_float(0x7fffffff); }

  // The rows' LSE in natural log: sums are shifted as the reference is. A row that saw no key, or
  // does not exist, is empty, and its LSE -inf.
  CUTE_DEVICE void finish(const bool (&exists)[2], float (&lse)[2], bool (&empty)[2]) {
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      row_sum[r] += __shfl_xor_sync(0xffffffff, row_sum[r], 1);
      row_sum[r] += __shfl_xor_sync(0xffffffff, row_sum[r], 2);
      empty[r] = !exists[r] || row_sum[r] == 0.f;
      lse[r] = empty[r] ? -INFINITY : reference[r] * kLn2 + logf(row_sum[r]);
    }
  }

  // The same, and O /= l; 0 where a row is empty.
  template <class Accumulator>
  CUTE_DEVICE void finish(Accumulator& tO, const bool (&exists)[2], float (&lse)[2]) {
    bool empty[2];
    finish(exists, lse, empty);
    const float inverse[2] = {1.f / row_sum[0], 1.f / row_sum[1]};
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tO); ++i) {
      const int r = accumulator_row(i);
      tO(i) = empty[r] ? 0.f : tO(i) * inverse[r];
    }
  }

 protected:
  CUTE_DEVICE static bool any(bool condition) { return __any_sync(0xffffffff, condition); }

  CUTE_DEVICE float reach(int r) const { return reference[r] + (kShift + threshold); }

  // The largest of this thread's scaled logits in each row.
  template <class Accumulator>
  CUTE_DEVICE static void maximum(float (&row_max)[2], const Accumulator& tS, float scale_log2) {
    row_max[0] = row_max[1] = -INFINITY;
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tS); ++i) {
      const int r = accumulator_row(i);
      row_max[r] = fmaxf(row_max[r], tS(i));
    }
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) row_max[r] *= scale_log2;
  }

  // Lets the references follow the quads' maxima if one has outgrown its own; returns whether.
  CUTE_DEVICE bool move_reference(float (&row_max)[2]) {
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      row_max[r] = fmaxf(row_max[r], __shfl_xor_sync(0xffffffff, row_max[r], 1));
      row_max[r] = fmaxf(row_max[r], __shfl_xor_sync(0xffffffff, row_max[r], 2));
    }
    if (!any(row_max[0] > reach(0) || row_max[1] > reach(1))) return false;
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float moved = fmaxf(row_max[r] - kShift, reference[r]);
      correction[r] = exp2_approx(reference[r] - moved);
      row_sum[r] *= correction[r];
      set_reference(r, moved);
    }
    return true;
  }

  CUTE_DEVICE void set_reference(int r, float moved) {
    reference[r] = moved;
    limit[r] = reach(r) < 0.f ? -INFINITY : reach(r);
  }
};

}  // namespace jax_fa3
