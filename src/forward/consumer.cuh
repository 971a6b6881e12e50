// One consumer warpgroup's share of a work tile: 64 query rows against all their keys.
//
//   S(last) = Q K(last)^T;  P = softmax(S)
//   for the tiles before it, right to left:
//     in turn with the other warpgroups: issue S = Q K(n)^T, then O += P V(n+1)
//     while O and the other warpgroups' GEMMs run: mask and exponentiate S
//     when O has arrived: rescale it if a row maximum has outgrown its reference; P = S
//   O += P V(first)
//
// Tiles that straddle an edge of the mask are peeled off at both ends, so that the middle, the
// bulk, runs without a compare.
#pragma once

#include "forward/warpgroup.cuh"

namespace jax_fa3 {

template <class T>
struct ForwardConsumer : ForwardWarpgroup<T, ForwardConsumer<T>> {
  using Base = ForwardWarpgroup<T, ForwardConsumer<T>>;
  using Base::key_cursor;
  using Base::p;
  using Base::query_cursor;
  using Base::shared;
  using Base::value_cursor;
  using Base::warpgroup;

  // V rows past the sequence's keys may hold anything, NaN included, and P = 0 does not stop
  // NaN. Only the right-most tile can have such rows. Every warpgroup clears them for itself,
  // before its own GEMM reads them.
  CUTE_DEVICE void clear_value_tail(const Mask& mask, int n) const {
    const int valid = mask.key_length - n * T::kBlockN;
    if (mask.key_length == p.seqlen_k || valid >= T::kBlockN) return;
    wait_full(shared.value_ring, value_cursor);
    T::VTile::zero_rows_from(shared.value[value_cursor.stage], valid,
                             threadIdx.x % kWarpgroupThreads, kWarpgroupThreads);
    cutlass::arch::fence_view_async_shared();
    this->sync_warpgroup();
  }

  template <class AccumulatorO>
  CUTE_DEVICE void attend(AccumulatorO& tO, OnlineSoftmax& softmax, const WorkTile&,
                          const Mask& mask, const TileRange& keys, int row) {
    typename T::MmaS mma_s;
    typename T::MmaO mma_o;
    using namespace cute;
    const auto tSrQ = operand_a(mma_s, T::QTile::row_block(shared.query, warpgroup));
    auto tP = make_operand_a<typename T::Element, T::kBlockN>();
    const float scale_log2 = p.softmax_scale_log2;

    const auto issue_scores = [&](auto& tS) {
      wait_full(shared.key_ring, key_cursor);
      const auto sK = T::KTile::tensor(shared.key[key_cursor.stage]);
      issue_mma<Accumulate::kOverwrite>(mma_s, tSrQ, operand_b(mma_s, sK), tS);
    };
    const auto issue_output = [&] {
      wait_full(shared.value_ring, value_cursor);
      const auto sVt = T::VTile::transposed(shared.value[value_cursor.stage]);
      issue_mma<Accumulate::kAdd>(mma_o, tP, operand_b(mma_o, sVt), tO);
    };

    // The right-most tile: nothing to overlap with yet.
    int n = keys.end - 1;
    {
      auto tS = make_accumulator<typename T::MmaS, T::kBlockN>();
      issue_scores(tS);
      wait_mma<0>(tS);
      release(shared.key_ring, key_cursor);
      key_cursor.advance();
      if (keys.cuts(n)) mask_scores(tS, mask, row, n * T::kBlockN);
      softmax.update(tS, scale_log2, p.rescale_threshold);  // O is zero: no rescale
      convert(tS, tP);
      clear_value_tail(mask, n);
    }

    const auto step = [&](auto masked) {
      auto tS = make_accumulator<typename T::MmaS, T::kBlockN>();
      this->take_turn();
      issue_scores(tS);
      issue_output();
      this->pass_turn();
      wait_mma<1>(tS);
      release(shared.key_ring, key_cursor);
      key_cursor.advance();
      if constexpr (decltype(masked)::value) mask_scores(tS, mask, row, n * T::kBlockN);
      const bool rescale = softmax.update(tS, scale_log2, p.rescale_threshold);
      wait_mma<0>(tO);
      release(shared.value_ring, value_cursor);
      value_cursor.advance();
      convert(tS, tP);
      if (rescale) softmax.rescale(tO);
    };
    --n;
    for (; n >= keys.full_end; --n) step(true_type{});
    for (; n >= keys.full_begin; --n) step(false_type{});
    for (; n >= keys.begin; --n) step(true_type{});

    if constexpr (T::kOwnOutput) release(shared.query_ring[warpgroup], query_cursor);
    issue_output();
    wait_mma<0>(tO);
    release(shared.value_ring, value_cursor);
    value_cursor.advance();
  }

  template <class AccumulatorO>
  CUTE_DEVICE void finish(AccumulatorO& tO, OnlineSoftmax& softmax, const WorkTile&,
                          const bool (&exists)[2], float (&lse)[2]) const {
    softmax.finish(tO, p.softmax_scale, exists, lse);
  }

  template <class AccumulatorO, class Tensor>
  CUTE_DEVICE void write_output(const AccumulatorO& tO, Tensor&& sO) const {
    store_accumulator<typename T::MmaO>(tO, sO);
  }
};

}  // namespace jax_fa3
