// Row statistics as tensor core operands. The GEMMs that make S^T and dP^T have one k-step more,
// which subtracts LSE / scale and delta from each query's column: no loads and no additions are
// left to the threads that hold the accumulators.
// The other operand is constant.
#pragma once

#include "attention/row_statistics.cuh"
#include "device/mma.cuh"

namespace jax_fa3 {

enum class Statistic { kLse, kDelta };

// The constant operand: eight rows of eight terms that stand for all rows and for both halves.
struct alignas(128) StatisticConstant {
  cutlass::bfloat16_t terms[8][8];

  // By 64 threads of which this is number `thread`.
  CUTE_DEVICE void fill(Statistic statistic, int thread) {
    const bool picked = (thread % 8 < 4) == (statistic == Statistic::kLse) && thread % 4 < 3;
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
