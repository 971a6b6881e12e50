// From a product q . k to a logit, in a warpgroup's registers. A kernel's Score is one of these
// policies; the softmax multiplies what it leaves by the logit_scale, in the instruction that
// subtracts the maximum.
#pragma once

#include <cute/config.hpp>

#include "attention/score.h"
#include "call/types.h"
#include "device/mma.cuh"

namespace jax_fa3 {

CUTE_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A relative error of 2^-11, less than that of P in 16 bits for caps up to 50.
CUTE_DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A policy is made for a query head. apply() turns products into scores; `distance` is how far the
// tile's first row's position is behind its first column's, of S; of S^T, whose rows are keys, the
// same. slope() is dS / dP of a score whose weight is `p`.

// The logit is scale * (q . k).
struct Plain {
  // Whether what a score leaves grows as the product does. Then the backward pass may subtract a
  // row's LSE within the product itself (backward/statistics.cuh), and dS is made of P and dP
  // alone.
  static constexpr bool kIsLinear = true;

  CUTE_DEVICE Plain(const ScoreParams&, int /*batch*/, int /*head*/) {}
  template <class Accumulator>
  CUTE_DEVICE void apply(Accumulator&, int /*distance*/) const {}
  CUTE_DEVICE static float slope(float /*score*/, float p) { return p; }
};

// The logit is softcap * tanh(scale * (q . k) / softcap).
struct Softcap {
  static constexpr bool kIsLinear = false;

  CUTE_DEVICE Softcap(const ScoreParams& params, int /*batch*/, int /*head*/)
      : factor_(params.factor) {}

  template <class Accumulator>
  CUTE_DEVICE void apply(Accumulator& tS, int /*distance*/) const {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tS); ++i) tS(i) = tanh_approx(tS(i) * factor_);
  }

  // A score that a mask has made -inf counts as -1, where the slope is 0.
  CUTE_DEVICE static float slope(float score, float p) {
    const float t = fmaxf(score, -1.f);
    return p * fmaf(-t, t, 1.f);
  }

 private:
  float factor_;
};

// The logit is scale * (q . k) - slope * |position of the row - key|.
struct Alibi {
  static constexpr bool kIsLinear = true;

  CUTE_DEVICE Alibi(const ScoreParams& params, int batch, int head)
      : slope_(params.slopes.of(batch, head) * params.factor) {}

  template <class Accumulator>
  CUTE_DEVICE void apply(Accumulator& tS, int distance) const {
    float first[2];  // of the thread's two rows, in its first column
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      first[r] = slope_ * float(distance + thread_row() + 8 * r - thread_col());
    }
    // Two loops, or the sign would be an instruction more for each score. A vote: only a branch
    // known to be uniform leaves GEMMs in flight alone.
    if (__any_sync(0xffffffff, slope_ > 0.f)) {
      add<1>(tS, first);
    } else {
      add<-1>(tS, first);
    }
  }
  CUTE_DEVICE static float slope(float /*score*/, float p) { return p; }

 private:
  template <int kSign, class Accumulator>
  CUTE_DEVICE void add(Accumulator& tS, const float (&first)[2]) const {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tS); ++i) {
      const float x = fmaf(slope_, -float(accumulator_col(i)), first[accumulator_row(i)]);
      tS(i) += kSign * fabsf(x);
    }
  }

  float slope_;  // of products
};

template <Variant>
struct ScoreChoice {
  using Type = Plain;
};
template <>
struct ScoreChoice<Variant::kSoftcap> {
  using Type = Softcap;
};
template <>
struct ScoreChoice<Variant::kAlibi> {
  using Type = Alibi;
};
template <Variant kVariant>
using ScoreOf = typename ScoreChoice<kVariant>::Type;

}  // namespace jax_fa3
