// One consumer warpgroup of the dBias kernel: 64 rows of each work tile.
//
//   for each pair of query block and key tile that shares the tile's bias:
//     issue S = Q K^T, dP = dO V^T
//     P = exp2(scale (S + bias / scale) - LSE)
//     dBias += P (dP - delta)
#pragma once

#include "kernels/backward_dbias/store.cuh"

namespace jax_fa3 {

template <class T>
struct DBiasConsumer {
  const DBiasParams& p;
  typename T::SharedStorage& shared;
  const int warpgroup;

  RingCursor<T::kSteps> step_cursor;
  RingCursor<T::kStages> cursor;
  RingCursor<T::kBiasStages> bias_cursor;

  CUTE_DEVICE const BiasStep& step() const { return shared.steps[step_cursor.stage]; }

  CUTE_DEVICE void run() {
    auto tDB = make_accumulator<typename T::Mma, T::kBlockN>();
    cute::clear(tDB);
    while (true) {
      wait_full(shared.step_ring, step_cursor);
      // In a uniform register: only a branch known to be uniform leaves a GEMM in flight alone.
      const int kind = __reduce_or_sync(0xffffffff, unsigned(step().kind));
      if (kind == BiasStep::kStop) break;
      if (kind == BiasStep::kEnd) {
        finish(tDB);
        cute::clear(tDB);
      } else {
        add_step(tDB, kind == BiasStep::kCut);
      }
      release_by_warp(shared.step_ring, step_cursor);
      step_cursor.advance();
    }
  }

  template <class Accumulator>
  CUTE_DEVICE void add_step(Accumulator& tDB, bool cut) {
    using namespace cute;
    typename T::Mma mma;
    auto tS = make_accumulator<typename T::Mma, T::kBlockN>();
    auto tDP = make_accumulator<typename T::Mma, T::kBlockN>();
    const auto stage = cursor.stage;

    wait_full(shared.query_ring, cursor);
    issue_mma<Accumulate::kOverwrite>(
        mma, operand_a(mma, T::QTile::row_block(shared.query[stage], warpgroup)),
        operand_b(mma, T::KTile::tensor(shared.key[stage])), tS);
    wait_full(shared.dout_ring, cursor);
    issue_mma<Accumulate::kOverwrite>(
        mma, operand_a(mma, T::DOTile::row_block(shared.dout[stage], warpgroup)),
        operand_b(mma, T::VTile::tensor(shared.value[stage])), tDP);

    wait_mma<1>(tS);
    release_by_warp(shared.query_ring, cursor);
    wait_full(shared.bias_ring, bias_cursor);
    add_bias<typename T::BiasTile>(tS, shared.bias[bias_cursor.stage], warpgroup * kWarpgroupRows,
                                   p.dense.bias_factor);
    bool active[2];  // rows that exist and see a key
    float negative_lse_log2[2], negative_delta[2];
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int row = warpgroup * kWarpgroupRows + thread_row() + 8 * r;
      const RowStatistics statistics = shared.statistics[stage][row];
      const float negative_lse = statistics.lse<true>();
      active[r] = !(negative_lse <= 0.5f * RowStatistics::kNoGradient);
      negative_lse_log2[r] = negative_lse * p.logit_scale_log2;
      negative_delta[r] = RowStatistics::sum(statistics.negative_delta);
    }
    const auto probability = [&](int i) {
      return exp2_approx(fmaf(tS(i), p.logit_scale_log2, negative_lse_log2[accumulator_row(i)]));
    };
    if (cut) {
      mask_scores(tS, active);
      CUTE_UNROLL
      for (int i = 0; i < size(tS); ++i) tS(i) = tS(i) == -INFINITY ? 0.f : probability(i);
    } else {
      CUTE_UNROLL
      for (int i = 0; i < size(tS); ++i) tS(i) = probability(i);
    }
    wait_mma<0>(tDP);
    release_by_warp(shared.dout_ring, cursor);
    cursor.advance();

    // Of pairs that are not seen dP and the statistics may be anything, NaN included, and P = 0
    // does not stop NaN.
    CUTE_UNROLL
    for (int i = 0; i < size(tDP); ++i) tDP(i) += negative_delta[accumulator_row(i)];
    if (cut) {
      CUTE_UNROLL
      for (int i = 0; i < size(tDP); ++i) {
        if (tS(i) == 0.f) tDP(i) = 0.f;
      }
    }
    CUTE_UNROLL
    for (int i = 0; i < size(tDP); ++i) tDB(i) = fmaf(tS(i), tDP(i), tDB(i));
  }

  // Sets to -inf what is not seen, and all of rows that are not `active`, or not there.
  template <class Accumulator>
  CUTE_DEVICE void mask_scores(Accumulator& tS, const bool (&active)[2]) {
    const int row = step().row + warpgroup * kWarpgroupRows;
    Intervals intervals;
    intervals.plane = step().plane;
    T::Masking::mask_scores(tS, step().mask, intervals, row, step().tile.key);
    if (p.dense.has_mask) {
      using Bits = MaskBits<T::kBlockN>;
      const DenseMask mask = p.dense.mask_of(step().batch, step().head);
      Bits::of_rows(mask, row, step().tile.key).apply(tS);
    }
    bool takes_part[2];
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      takes_part[r] = active[r] && row + thread_row() + 8 * r < p.statistics_rows;
    }
    CUTE_UNROLL
    for (int i = 0; i < cute::size(tS); ++i) {
      if (!takes_part[accumulator_row(i)]) tS(i) = -INFINITY;
    }
  }

  // The item's sum goes out. Where it is all of the tile, by way of the bias' place.
  template <class Accumulator>
  CUTE_DEVICE void finish(Accumulator& tDB) {
    wait_full(shared.bias_ring, bias_cursor);
    if (p.partial_sums != nullptr) {
      float4* const sums = partial_sums<T>(p, step().item, warpgroup);
      CUTE_UNROLL
      for (int i = 0; i < T::kThreadFloats; i += 4) {
        sums[i / 4 * kWarpgroupThreads] = {tDB(i), tDB(i + 1), tDB(i + 2), tDB(i + 3)};
      }
    } else {
      store_dbias<T>(tDB, p, step().tile, shared.bias[bias_cursor.stage], warpgroup);
    }
    release_by_warp(shared.bias_ring, bias_cursor);
    bias_cursor.advance();
  }
};

}  // namespace jax_fa3
