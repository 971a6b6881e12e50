// Row statistics as tensor core operands. The GEMMs that make S^T and dP^T have one k-step more,
// which subtracts LSE / scale and delta from each query's column: no loads and no additions are
// left to the threads that hold the accumulators.
//
// A number is a sum of bf16 terms, whatever the dtype of the problem: bf16 has the range of
// float32, and three terms its precision. The other operand is constant.
#pragma once

#include <cutlass/bfloat16.h>

#include "device/mma.cuh"

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

enum class Statistic { kLse, kDelta };

// The constant operand: eight rows of eight terms that stand for all rows and for both halves.
struct alignas(128) StatisticConstant {
  cutlass::bfloat16_t terms[8][8];

  // By 64 threads of which this is number `thread`.
  CUTE_DEVICE void fill(Statistic statistic, int thread) {
    const bool picked = (thread % 8 < 4) == (statistic == Statistic::kLse);
    terms[thread / 8][thread % 8] = cutlass::bfloat16_t(picked ? 0.5f : 0.f);
  }
  CUTE_DEVICE auto tensor() {
    using Layout = cute::Layout<
        cute::Shape<cute::Shape<cute::_8, cute::_8>, cute::Shape<cute::_8, cute::_2>>,
        cute::Stride<cute::Stride<cute::_8, cute::_0>, cute::Stride<cute::_1, cute::_0>>>;
    return cute::make_tensor(cute::make_smem_ptr(&terms[0][0]), Layout{});
  }
};

// kRows statistics, an operand of kRows by one k-step. WGMMA wants 16 terms: the row's eight stand
// in for both halves, and the constant operand has one half for the terms it picks.
template <int kRows>
struct StatisticTile {
  using Mma = MmaSS<cutlass::bfloat16_t, kRows, Major::K, Major::K>;
  using Layout = cute::Layout<
      cute::Shape<cute::Shape<cute::_8, cute::Int<kRows / 8>>, cute::Shape<cute::_8, cute::_2>>,
      cute::Stride<cute::Stride<cute::_8, cute::_64>, cute::Stride<cute::_1, cute::_0>>>;

  CUTE_DEVICE static auto tensor(RowStatistics* rows) {
    return cute::make_tensor(cute::make_smem_ptr(reinterpret_cast<cutlass::bfloat16_t*>(rows)),
                             Layout{});
  }
};

}  // namespace jax_fa3
