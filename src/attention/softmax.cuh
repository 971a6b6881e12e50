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
//
// kKeepsLargest: largest() keeps what it finds from tile to tile, which makes the rows' largest
// logits known in the end. scale_log2 must be the same for all tiles.
//
// kExact: differences of huge logits are exact. float32 holds a logit of 2^12 in steps of 2^-11,
// and the weight of the largest one would no longer be 1. A huge row's reference is the score
// itself, exponentiate_exactly() subtracts it before it scales, and the row's limit sends every
// tile there. Here too scale_log2 must be the same for all tiles.
template <int kShift, bool kReuseFound, bool kKeepsLargest, bool kExact = kKeepsLargest>
struct OnlineSoftmax {
  float threshold;
  // In its place while a row's logits are negative: largest() does not tell these apart. 0 where
  // the largest of them is wanted, which then is the reference.
  float negative_threshold;
  // Of each of the thread's two rows, of a huge row in scores until settle(). Below every logit,
  // and finite: a row that has seen no key needs no care.
  float reference[2] = {-FLT_MAX, -FLT_MAX};
  // This thread's share of the row sums, until finish() adds up the quad's.
  float row_sum[2] = {0.f, 0.f};
  // What O must be multiplied with before the next P V is added, if the reference moved.
  float correction[2];
  // The result of largest() from which on the reference may have to move; NaN of a huge row.
  float limit[2] = {-INFINITY, -INFINITY};
  // The largest of this thread's scores in each row, where that is not negative.
  float kept[2] = {-INFINITY, -INFINITY};

  template <class Accumulator, class Shift = NoShift>
  CUTE_DEVICE void begin(Accumulator& tS, float scale_log2, const Shift& shift = {}) {
    float row_max[2];
    maximum(row_max, tS);
    shift.add_to(row_max);
    if constexpr (kKeepsLargest) {
      kept[0] = row_max[0];
      kept[1] = row_max[1];
    }
    move_reference(row_max, scale_log2);
    if (any_is_huge()) return exponentiate_exactly(tS, scale_log2, shift);
    exponentiate(tS, scale_log2, shift);
  }

  // Returns, uniformly over the warp, whether the reference moved.
  template <class Accumulator, class Shift = NoShift>
  CUTE_DEVICE bool update(Accumulator& tS, float scale_log2, const Shift& shift = {}) {
    float found[2];
    largest(found, tS, shift);
    bool moved = false;
    if (may_move(found, scale_log2)) {
      moved = follow(found, tS, scale_log2, shift);
      if (any_is_huge()) {
        exponentiate_exactly(tS, scale_log2, shift);
        return moved;
      }
    }
    exponentiate(tS, scale_log2, shift);
    return moved;
  }

  // The largest of this thread's scores in each row, for may_move(); where it is negative,
  // some negative number. One instruction finds the largest of three integers, of floats only of
  // two, and bits of floats compare as integers where one of them is not negative. What is kept
  // takes part: of an even number of scores it costs no instruction. What a shift leaves negative
  // was so before: shifts are not above 0.
  template <class Accumulator, class Shift = NoShift>
  CUTE_DEVICE void largest(float (&found)[2], const Accumulator& tS, const Shift& shift = {}) {
    constexpr bool kKeptTakesPart = kKeepsLargest && cute::is_same_v<Shift, NoShift>;
    int bits[2][2];  // two chains a row: one would wait for its own latency
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tS); ++i) {
      int& chain = bits[accumulator_row(i)][i / 4 % 2];
      const bool is_first = i < 8 && i % 2 == 0;
      if (is_first && kKeptTakesPart && i < 4) {
        chain = max(__float_as_int(kept[accumulator_row(i)]), __float_as_int(tS(i)));
      } else {
        chain = is_first ? __float_as_int(tS(i)) : max(chain, __float_as_int(tS(i)));
      }
    }
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      found[r] = __int_as_float(max(bits[r][0], bits[r][1]));
      if constexpr (kKeptTakesPart) kept[r] = found[r];
    }
    if constexpr (kKeepsLargest && !kKeptTakesPart) {
      shift.add_to_found(found);
      CUTE_UNROLL
      for (int r = 0; r < 2; ++r) {
        kept[r] = __int_as_float(max(__float_as_int(kept[r]), __float_as_int(found[r])));
      }
    }
  }

  // Whether follow() has anything to do. Every thread compares what it has found, and a vote makes
  // that the warp's: as long as no reference moves, nobody needs a row's maximum. Negative ones
  // count where a limit is negative.
  CUTE_DEVICE bool may_move(const float (&found)[2], float scale_log2) const {
    return any(!(found[0] * scale_log2 < limit[0] && found[1] * scale_log2 < limit[1]));
  }

  template <class Accumulator, class Shift = NoShift>
  CUTE_DEVICE bool follow(const float (&found)[2], const Accumulator& tS, float scale_log2,
                          const Shift& shift = {}) {
    float row_max[2] = {found[0], found[1]};
    if (!kReuseFound || any(limit[0] < 0.f || limit[1] < 0.f)) {
      maximum(row_max, tS);
      shift.add_to(row_max);
    }
    return move_reference(row_max, scale_log2);
  }

  template <class Accumulator, class Shift = NoShift>
  CUTE_DEVICE void exponentiate(Accumulator& tS, float scale_log2, const Shift& shift = {}) {
    exponentiate<0, decltype(cute::size(tS))::value>(tS, scale_log2, shift);
  }
  // Elements kBegin to kEnd - 1 only.
  template <int kBegin, int kEnd, class Accumulator, class Shift = NoShift>
  CUTE_DEVICE void exponentiate(Accumulator& tS, float scale_log2, const Shift& shift = {}) {
    const float below[2] = {shift.below(0, reference[0], scale_log2),
                            shift.below(1, reference[1], scale_log2)};
    CUTE_UNROLL
    for (int i = kBegin; i < kEnd; ++i) {
      const int r = accumulator_row(i);
      tS(i) = exp2_approx(fmaf(tS(i), scale_log2, -below[r]));
      row_sum[r] += tS(i);
    }
  }

  // P = exp2((S - reference) * scale_log2) of huge rows, and of the others as above.
  template <class Accumulator, class Shift = NoShift>
  CUTE_DEVICE void exponentiate_exactly(Accumulator& tS, float scale_log2,
                                        const Shift& shift = {}) {
    shift.add_to_scores(tS);
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float before = is_huge(r) ? reference[r] : 0.f;
      const float behind = is_huge(r) ? 0.f : reference[r];
      CUTE_UNROLL
      for (int i = 0; i < cute::size(tS); ++i) {
        if (accumulator_row(i) != r) continue;
        tS(i) = exp2_approx(fmaf(tS(i) - before, scale_log2, -behind));
        row_sum[r] += tS(i);
      }
    }
  }

  // After the last tile: every reference in log2 units.
  CUTE_DEVICE void settle(float scale_log2) {
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r)
      if (is_huge(r)) reference[r] *= scale_log2;
  }

  template <class Accumulator>
  CUTE_DEVICE void rescale(Accumulator& tO) const {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tO); ++i) tO(i) *= correction[accumulator_row(i)];
  }

  // Makes all that comes out NaN.
  CUTE_DEVICE void poison() { row_sum[0] = row_sum[1] = __int_as_float(0x7fffffff); }

  // The rows' largest logits in natural units; -inf for a row that saw no key.
  CUTE_DEVICE void largest_logits(float (&logits)[2], float scale_log2) const {
    static_assert(kKeepsLargest);
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      float largest = kept[r];
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 2));
      const float log2 = largest >= 0.f ? largest * scale_log2 : reference[r];
      logits[r] = log2 == -FLT_MAX ? -INFINITY : log2 * kLn2;
    }
  }

  // The rows' LSE in natural log: sums are shifted as the reference is. A row that saw no key, or
  // does not exist, is empty, and its LSE -inf.
  CUTE_DEVICE void finish(const bool (&exists)[2], float (&lse)[2], bool (&empty)[2]) {
    add_quads();
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      empty[r] = !exists[r] || row_sum[r] == 0.f;
      lse[r] = empty[r] ? -INFINITY : reference[r] * kLn2 + logf(row_sum[r]);
    }
  }

  // The same, and O /= l; 0 where a row is empty. All rows have a sink beside their keys, a logit
  // in log2 units without a value; -inf is none.
  template <class Accumulator>
  CUTE_DEVICE void finish(Accumulator& tO, const bool (&exists)[2], float sink, float (&lse)[2]) {
    add_quads();
    float factor[2];
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float moved = fmaxf(reference[r], sink);
      const float shrink = exp2_approx(reference[r] - moved);
      const float sum = fmaf(row_sum[r], shrink, exp2_approx(sink - moved));
      const bool empty = !exists[r] || sum == 0.f;
      lse[r] = empty ? -INFINITY : moved * kLn2 + logf(sum);
      factor[r] = empty ? 0.f : shrink / sum;
    }
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tO); ++i) {
      const float scale = factor[accumulator_row(i)];
      tO(i) = scale == 0.f ? 0.f : tO(i) * scale;
    }
  }

 protected:
  CUTE_DEVICE static bool any(bool condition) { return __any_sync(0xffffffff, condition); }

  // Logits beyond this, in log2 units, are huge.
  static constexpr float kHuge = 4096.f;

  CUTE_DEVICE bool is_huge(int r) const { return kExact && isnan(limit[r]); }
  CUTE_DEVICE bool any_is_huge() const { return kExact && any(is_huge(0) || is_huge(1)); }

  // How far above the reference a logit may be, in log2 units.
  CUTE_DEVICE float reach(int r) const {
    return kShift + (kKeepsLargest && reference[r] < 0.f ? negative_threshold : threshold);
  }

  // This thread's sums become the rows'.
  CUTE_DEVICE void add_quads() {
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      row_sum[r] += __shfl_xor_sync(0xffffffff, row_sum[r], 1);
      row_sum[r] += __shfl_xor_sync(0xffffffff, row_sum[r], 2);
    }
  }

  // The largest of this thread's scores in each row.
  template <class Accumulator>
  CUTE_DEVICE static void maximum(float (&row_max)[2], const Accumulator& tS) {
    row_max[0] = row_max[1] = -INFINITY;
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tS); ++i) {
      const int r = accumulator_row(i);
      row_max[r] = fmaxf(row_max[r], tS(i));
    }
  }

  // Lets the references follow the quads' maxima if one has outgrown its own; returns whether.
  // row_max are scores: times scale_log2 they are in log2 units.
  CUTE_DEVICE bool move_reference(float (&row_max)[2], float scale_log2) {
    float above[2];  // the reference, in log2 units
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      row_max[r] = fmaxf(row_max[r], __shfl_xor_sync(0xffffffff, row_max[r], 1));
      row_max[r] = fmaxf(row_max[r], __shfl_xor_sync(0xffffffff, row_max[r], 2));
      above[r] = is_huge(r) ? (row_max[r] - reference[r]) * scale_log2
                            : row_max[r] * scale_log2 - reference[r];
    }
    if (!any(above[0] > reach(0) || above[1] > reach(1))) return false;
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float step = fmaxf(above[r] - kShift, 0.f);
      correction[r] = exp2_approx(-step);
      row_sum[r] *= correction[r];
      const float moved = row_max[r] * scale_log2 - kShift;
      if (kExact && step > 0.f && fabsf(moved) > kHuge) {
        reference[r] = row_max[r];
        limit[r] = NAN;
      } else if (step > 0.f) {
        set_reference(r, moved);
      }
    }
    return true;
  }

  CUTE_DEVICE void set_reference(int r, float moved) {
    reference[r] = moved;
    limit[r] = moved + reach(r) < 0.f ? -INFINITY : moved + reach(r);
  }
};

}  // namespace jax_fa3
