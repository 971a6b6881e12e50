// Head dims past 128: dK and dV of 64 keys take half the registers of a warpgroup each. So one
// warpgroup makes dV and the other dK, each with all of the head dim, and each has the left operand
// of its second GEMM in registers:
//
//   dV's warpgroup, for each query block      dK's warpgroup
//     issue S^T = K Q^T - LSE / scale           issue dP^T = V dO^T - delta
//     P^T = exp(scale S^T);  hand it over ───▶  take P^T
//                                               dS^T = P^T dP^T
//     issue dV += P^T dO                        issue dK += dS^T Q
//
// P^T, or what else makes dS^T of dP^T (Softcap), goes from thread to thread in float32, through
// shared memory. Nothing goes back, so that dV's
// warpgroup runs ahead by as much as there are buffers, and one's exponentials fall under the
// other's GEMMs.
#pragma once

#include "kernels/backward/tile_consumer.cuh"

namespace jax_fa3 {

template <class T>
struct GradientSplitConsumer : TileConsumer<T> {
  using Base = TileConsumer<T>;
  using Base::cursor, Base::p, Base::queries, Base::shared;
  using typename Base::Element;

  static constexpr int kThreadFloats = T::kBlockN * T::kBlockM / kWarpgroupThreads;
  RingCursor<T::kHandoverStages> handover{};
  RingCursor<1> output_cursor{};

  CUTE_DEVICE void run() {
    if (this->warpgroup == 0) {
      run_for_dvalue();
    } else {
      run_for_dkey();
    }
  }
  // dV goes out through the first buffer of P^T, dK through the second.
  CUTE_DEVICE void run_for_dvalue() {
    while (this->next_tile()) {
      auto tDV = make_accumulator<typename T::MmaDV, T::kHeadDimV>();
      cute::clear(tDV);
      this->sync_warpgroup();                         // dV has left
      wait_empty(shared.output_ring, output_cursor);  // and dK
      output_cursor.advance();
      if (!queries.empty()) {
        this->await_keys();
        this->template clear_tail<typename T::KTile>(shared.key);
        visit_for_dvalue(tDV);
        this->release_keys();
      }
      auto last = handover;
      for (int i = 0; i < T::kHandoverStages; ++i) {
        wait_empty(shared.handover_ring, last);
        last.advance();
      }
      this->template store_output<typename T::DVTile, T::kHeadDimV>(tDV, p.dvalue, 0,
                                                                    shared.exchange.output[0]);
      this->end_tile();
    }
  }
  CUTE_DEVICE void run_for_dkey() {
    while (this->next_tile()) {
      auto tDK = make_accumulator<typename T::MmaDK, T::kHeadDim>();
      cute::clear(tDK);
      if (!queries.empty()) {
        this->await_keys();
        this->template clear_tail<typename T::VTile>(shared.value);
        visit_for_dkey(tDK);
        this->release_keys();
      }
      this->scale_dkey(tDK);
      this->template store_output<typename T::DKTile, T::kHeadDim>(tDK, p.dkey, 0,
                                                                   shared.exchange.output[1]);
      release(shared.output_ring, output_cursor);
      this->end_tile();
    }
  }

  // The visits are of tiles that some query sees.
  template <class AccumulatorDV>
  CUTE_DEVICE void visit_for_dvalue(AccumulatorDV& tDV) {
    using namespace cute;
    typename T::MmaDV mma_dv;
    auto tP = make_operand_a<Element, T::kBlockM>();
    bool pending = false;  // dV of the step before

    const auto step = [&](const auto& walk) {
      auto tS = make_accumulator<typename T::MmaS, T::kBlockM>();
      // A vote: only a branch known to be uniform leaves GEMMs in flight alone.
      const bool cut = __any_sync(0xffffffff, walk.cuts(queries));
      wait_full(shared.query_ring, cursor);
      if (cut) this->clear_query_tail(walk.m);
      this->template issue_scores<Statistic::kLse>(
          T::KTile::tensor(shared.key), T::QTile::tensor(shared.query[cursor.stage]), tS);
      const auto bits = this->mask_bits(walk, 0, cut);
      wait_mma<1>(tDV);
      if (pending) release(shared.dout_ring, cursor.before());
      pending = true;
      wait_mma<0>(tS);
      if constexpr (!T::kReadsQueryStage) release_query();
      this->finish_scores(tS, walk, 0, cut, bits);
      if constexpr (T::kReadsQueryStage && T::Score::kIsLinear) release_query();
      this->exponentiate(tS, tP, walk, 0);
      if constexpr (!T::Score::kIsLinear) release_query();
      give_factors(tS);
      if constexpr (T::Score::kIsLinear) convert(tS, tP);
      wait_full(shared.dout_ring, cursor);
      issue_mma<Accumulate::kAdd>(
          mma_dv, tP, operand_b(mma_dv, T::DOTile::transposed(shared.dout[cursor.stage])), tDV);
      cursor.advance();
    };
    this->for_each_step(step, [&] { release_query(); });
    wait_mma<0>(tDV);
    release(shared.dout_ring, cursor.before());
  }

  template <class AccumulatorDK>
  CUTE_DEVICE void visit_for_dkey(AccumulatorDK& tDK) {
    using namespace cute;
    typename T::MmaDK mma_dk;
    auto tDS = make_operand_a<Element, T::kBlockM>();
    bool pending = false;  // dK of the step before

    const auto step = [&](const auto& walk) {
      auto tDP = make_accumulator<typename T::MmaS, T::kBlockM>();
      wait_full(shared.query_ring, cursor);  // the statistics
      if (walk.cuts(queries)) this->clear_query_tail(walk.m);
      wait_full(shared.dout_ring, cursor);
      this->template issue_scores<Statistic::kDelta>(
          T::VTile::tensor(shared.value), T::DOTile::tensor(shared.dout[cursor.stage]), tDP);
      wait_mma<1>(tDK);
      if (pending) release(shared.query_ring, cursor.before());
      pending = true;
      auto tP = make_accumulator<typename T::MmaS, T::kBlockM>();
      take_factors(tP);
      wait_mma<0>(tDP);
      release(shared.dout_ring, cursor);

      CUTE_UNROLL
      for (int i = 0; i < size(tDP); ++i) tDP(i) *= tP(i);
      convert(tDP, tDS);
      issue_mma<Accumulate::kAdd>(
          mma_dk, tDS, operand_b(mma_dk, T::QTile::transposed(shared.query[cursor.stage])), tDK);
      cursor.advance();
    };
    this->for_each_step(step, [&] { release(shared.dout_ring, cursor); });
    wait_mma<0>(tDK);
    release(shared.query_ring, cursor.before());
  }

  // By dV's warpgroup, whose warps may have read what is beside Q by themselves.
  CUTE_DEVICE void release_query() const {
    if constexpr (T::kReadsQueryStage) {
      release_by_warp(shared.query_ring, cursor);
    } else {
      release(shared.query_ring, cursor);
    }
  }

  // Each thread answers for what it has written and read.
  CUTE_DEVICE float4* factors() const {
    return shared.exchange.factors[handover.stage] + threadIdx.x % kWarpgroupThreads;
  }
  template <class Accumulator>
  CUTE_DEVICE void give_factors(const Accumulator& tS) {
    wait_empty(shared.handover_ring, handover);
    CUTE_UNROLL
    for (int i = 0; i < kThreadFloats; i += 4) {
      factors()[i / 4 * kWarpgroupThreads] = {tS(i), tS(i + 1), tS(i + 2), tS(i + 3)};
    }
    shared.handover_ring.full[handover.stage].arrive();
    handover.advance();
  }
  template <class Accumulator>
  CUTE_DEVICE void take_factors(Accumulator& tP) {
    wait_full(shared.handover_ring, handover);
    CUTE_UNROLL
    for (int i = 0; i < kThreadFloats; i += 4) {
      const float4 four = factors()[i / 4 * kWarpgroupThreads];
      tP(i) = four.x;
      tP(i + 1) = four.y;
      tP(i + 2) = four.z;
      tP(i + 3) = four.w;
    }
    shared.handover_ring.empty[handover.stage].arrive();
    handover.advance();
  }
};

}  // namespace jax_fa3
