// What the backward kernels know of a query row: LSE / scale and delta, each a sum of bf16 terms,
// as tensor cores take them (kernels/backward/statistics.cuh). bf16 has the range of float32, and
// three terms its precision, whatever the dtype of the problem.
#pragma once

#include <cutlass/bfloat16.h>

#include <cute/config.hpp>

namespace jax_fa3 {

struct StatisticTerms {
  cutlass::bfloat16_t terms[4];  // the last one is zero
};

// An infinity becomes three terms that overflow to it in the accumulator.
CUTE_DEVICE StatisticTerms split_statistic(float x) {
  StatisticTerms split{};
  CUTE_UNROLL
  for (int i = 0; i < 3; ++i) {
    if (isinf(x)) {
      split.terms[i] = cutlass::bfloat16_t::bitcast(x < 0.f ? 0xff7f : 0x7f7f);  // the largest
    } else {
      split.terms[i] = cutlass::bfloat16_t(x);
      x -= float(split.terms[i]);
    }
  }
  return split;
}

// One query row. Both GEMMs read it whole, and 0 * NaN is NaN. So delta, which may be NaN where P
// is not, is infinite instead; and what comes out infinite of the gradients that it takes part in
// is made NaN at the end.
struct alignas(16) RowStatistics {
  StatisticTerms negative_lse;    // -LSE / scale; kNoGradient for a row that takes part in nothing
  StatisticTerms negative_delta;  // delta = rowsum(dO O) - dLSE

  static constexpr float kNoGradient = -1e38f;  // makes P = 0

  CUTE_DEVICE static float sum(const StatisticTerms& split) {
    return float(split.terms[0]) + float(split.terms[1]) + float(split.terms[2]);
  }

  CUTE_DEVICE static RowStatistics make(float negative_lse, float negative_delta) {
    return {split_statistic(negative_lse < kNoGradient ? kNoGradient : negative_lse),
            split_statistic(isnan(negative_delta) ? INFINITY : negative_delta)};
  }
};

// x, with NaN for the infinities.
CUTE_DEVICE float finite_or_nan(float x) { return fmaf(x, 0.f, x); }

}  // namespace jax_fa3
