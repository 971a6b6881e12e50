// From a product q . k to a logit, in a warpgroup's registers. A kernel's Score is one of these
// policies; the softmax multiplies what it leaves by the scale, in the instruction that subtracts
// the maximum.
#pragma once

#include <cute/config.hpp>

#include "attention/score.h"

namespace jax_fa3 {

CUTE_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The logit is scale * (q . k).
struct Plain {
  // Whether a logit is a multiple of the product. Then the backward pass may subtract a row's LSE
  // within the product itself (backward/statistics.cuh).
  static constexpr bool kIsLinear = true;

  template <class Accumulator>
  CUTE_DEVICE static void apply(Accumulator&) {}
};

}  // namespace jax_fa3
