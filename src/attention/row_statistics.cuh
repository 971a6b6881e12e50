// What the backward kernels know of a query row: LSE / scale and delta, each a sum of bf16 terms,
// as tensor cores take them (kernels/backward/statistics.cuh). bf16 has the range of float32, and
// three terms its precision, whatever the dtype of the problem.
#pragma once

#include <cutlass/bfloat16.h>

#include <cfloat>
#include <cstdint>
#include <cute/config.hpp>

namespace jax_fa3 {

struct StatisticTerms {
  cutlass::bfloat16_t terms[4];  // the last one is left out
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

// A number that is read as it is, where it stands for terms that a constant of zeros meets: neither
// half may be NaN or infinite as bf16. The sign, the exponent and the upper half of the mantissa of
// a finite number are a finite bf16; of the lower half one bit may have to go.
CUTE_DEVICE StatisticTerms plain_statistic(float x) {
  std::uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7f80) == 0x7f80) bits ^= 0x80;
  StatisticTerms plain{};
  reinterpret_cast<std::uint32_t&>(plain) = bits;
  return plain;
}

// One query row. Both GEMMs read it whole, and 0 * NaN is NaN. So delta, which may be NaN where P
// is not, is infinite instead; and what comes out infinite of the gradients that it takes part in
// is made NaN at the end.
struct alignas(16) RowStatistics {
  StatisticTerms negative_lse;    // -LSE / scale; kNoGradient for a row that takes part in nothing
  StatisticTerms negative_delta;  // delta = rowsum(dO O) - dLSE; the last term is grid()

  static constexpr float kNoGradient = -1e38f;  // makes P = 0

  CUTE_DEVICE static float sum(const StatisticTerms& split) {
    return float(split.terms[0]) + float(split.terms[1]) + float(split.terms[2]);
  }

  // kInProduct: the products subtract the LSE. Else threads do, and it is a plain number.
  template <bool kInProduct>
  CUTE_DEVICE static RowStatistics make(float negative_lse, float negative_delta) {
    const float bounded = negative_lse < kNoGradient ? kNoGradient : negative_lse;
    return {kInProduct ? split_statistic(bounded) : plain_statistic(bounded),
            split_statistic(isnan(negative_delta) ? INFINITY : negative_delta)};
  }
  template <bool kInProduct>
  CUTE_DEVICE float lse() const {
    return kInProduct ? sum(negative_lse) : reinterpret_cast<const float&>(negative_lse);
  }

  // Of the row's dQ, where its shares are rounded before they are added (dquery_grid.cuh). Three
  // quarters of a power of two, which bf16 holds.
  CUTE_DEVICE float grid() const { return float(negative_delta.terms[3]); }
  CUTE_DEVICE void set_grid(float grid) { negative_delta.terms[3] = cutlass::bfloat16_t(grid); }
};

// x, with NaN for the infinities.
CUTE_DEVICE float finite_or_nan(float x) { return fmaf(x, 0.f, x); }

// The exponent of a weight where scores have a bias, which is at most 0 but for rounding: a row
// whose bias is large and the same for all keys has an LSE as large, beside which float32 loses the
// scores. Its weights stay finite; and those of a row that sees nothing, whose bias may be NaN or
// infinite, are 0, because a maximum takes the number beside a NaN.
CUTE_DEVICE float bounded_exponent(float log2) {
  return fminf(fmaxf(finite_or_nan(log2), -FLT_MAX), 1.f);
}

}  // namespace jax_fa3
