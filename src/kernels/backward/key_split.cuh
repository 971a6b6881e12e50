// Head dims up to 128: a work tile of 128 keys, dK and dV of 64 of them in the registers of each of
// two consumer warpgroups.
//
//   for each query block n:
//     issue S^T = K Q^T - LSE / scale, dP^T = V dO^T - delta    delta = rowsum(dO O) - dLSE
//     P^T = exp(scale S^T);  dS^T = P^T dP^T
//     take the other's dS(n-1);  write dS(n)
//     issue dQ(n-1) = dS(n-1) K, dV += P^T dO, dK += dS^T Q
//     once dQ(n-1) is made, give dS(n);  add dQ(n-1) to the float32 workspace
//   the same for dQ of the last block
//
// dQ is made a step late: the other's dS has long been there, and the additions run under dV and
// dK. Whoever has taken the other's dS(n-1) knows that the other has read dS(n-2), whose buffer
// dS(n) takes. Where a late dQ does not fit the registers, at head dim 64, dQ(n) follows dV of its
// own step:
//
//     write and give dS(n);  issue dV += P^T dO;  take the other's dS(n)
//     issue dQ(n) = dS(n) K, dK += dS^T Q
//     while dK runs: add dQ(n)
//
// Without fused dQ the warpgroups share nothing: they neither give nor take.
#pragma once

#include "device/reduce.cuh"
#include "kernels/backward/dquery_grid.cuh"
#include "kernels/backward/tile_consumer.cuh"

namespace jax_fa3 {

template <class T>
struct KeySplitConsumer : TileConsumer<T> {
  using Base = TileConsumer<T>;
  using Base::cursor, Base::p, Base::queries, Base::shared, Base::warpgroup;
  using typename Base::Element;
  using typename Base::NamedBarrier;

  int buffer = 0;       // of dS, of the step at hand
  int late_block = -1;  // of queries, whose dQ is still to be made; -1: none
  float late_grids[2];  // of this thread's rows of it

  // The CTA's work tiles, one after another.
  CUTE_DEVICE void run() {
    while (this->next_tile()) {
      auto tDK = make_accumulator<typename T::MmaDK, T::kHeadDim>();
      auto tDV = make_accumulator<typename T::MmaDV, T::kHeadDimV>();
      cute::clear(tDK);
      cute::clear(tDV);
      if (!queries.empty()) {
        this->await_keys();
        this->template clear_tail<typename T::KTile>(shared.key);
        this->template clear_tail<typename T::VTile>(shared.value);
        if constexpr (T::kListed) {
          this->for_each_listed_step([&](const auto& listed) { step(tDK, tDV, listed); },
                                     [&] {
                                       release(shared.dout_ring, cursor);
                                       release(shared.query_ring, cursor);
                                     });
        } else {
          QueryWalk walk = this->walk();
          do {
            step(tDK, tDV, walk);
          } while (walk.next());
        }
        // A list may be empty.
        if constexpr (T::kLateDQ) {
          if (!T::kListed || __any_sync(0xffffffff, late_block >= 0)) finish_dquery();
        }
        this->release_keys();
      }
      const int row = warpgroup * kWarpgroupRows;
      auto& buffers = shared.exchange.output[warpgroup];
      this->template store_output<typename T::DVTile, T::kHeadDimV>(tDV, p.dvalue, row, buffers[0]);
      this->scale_dkey(tDK);
      this->template store_output<typename T::DKTile, T::kHeadDim>(tDK, p.dkey, row,
                                                                   buffers[T::kOutputBuffers - 1]);
      this->end_tile();
    }
    cute::tma_store_wait<0>();  // shared memory must outlive the last store
  }

  // One step of the walk.
  template <class AccumulatorDK, class AccumulatorDV, class Walk>
  CUTE_DEVICE void step(AccumulatorDK& tDK, AccumulatorDV& tDV, const Walk& walk) {
    using namespace cute;
    typename T::MmaDV mma_dv;
    typename T::MmaDK mma_dk;
    Element* const query = shared.query[cursor.stage];
    Element* const dout = shared.dout[cursor.stage];

    auto tS = make_accumulator<typename T::MmaS, T::kBlockM>();
    auto tDP = make_accumulator<typename T::MmaS, T::kBlockM>();
    // A vote: only a branch known to be uniform leaves GEMMs in flight alone.
    const bool cut = __any_sync(0xffffffff, walk.cuts(queries));
    wait_full(shared.query_ring, cursor);
    if (cut) this->clear_query_tail(walk.m);
    this->template issue_scores<Statistic::kLse>(T::KTile::row_block(shared.key, warpgroup),
                                                 T::QTile::tensor(query), tS);
    const auto bits = this->mask_bits(walk, warpgroup * kWarpgroupRows, cut);
    wait_full(shared.dout_ring, cursor);
    this->template issue_scores<Statistic::kDelta>(T::VTile::row_block(shared.value, warpgroup),
                                                   T::DOTile::tensor(dout), tDP);

    wait_mma<1>(tS);
    this->finish_scores(tS, walk, warpgroup * kWarpgroupRows, cut, bits);
    auto tP = make_operand_a<Element, T::kBlockM>();
    this->exponentiate(tS, tP, walk, warpgroup * kWarpgroupRows);
    wait_mma<0>(tDP);
    CUTE_UNROLL
    for (int i = 0; i < size(tDP); ++i) tDP(i) *= tS(i);
    // Only now, when dP no longer needs float32 P: at head dim 64 both fill 128 registers.
    if constexpr (T::Score::kIsLinear) convert(tS, tP);
    auto tDS = make_operand_a<Element, T::kBlockM>();
    convert(tDP, tDS);
    Element* const dscores = shared.exchange.dscores[buffer];
    const auto write_scores = [&] {
      store_rounded<typename T::PTile>(tDS, dscores, warpgroup * kWarpgroupRows);
      cutlass::arch::fence_view_async_shared();
    };
    const auto issue_dvalue = [&] {
      issue_mma<Accumulate::kAdd>(mma_dv, tP, operand_b(mma_dv, T::DOTile::transposed(dout)), tDV);
    };
    const auto issue_dkey = [&] {
      issue_mma<Accumulate::kAdd>(mma_dk, tDS, operand_b(mma_dk, T::QTile::transposed(query)), tDK);
    };
    const std::int64_t block = p.query_block(walk.batch_head, walk.m);
    if constexpr (T::kLateDQ) {
      auto tDQ = make_accumulator<typename T::MmaDQ, T::kColsDQ>();
      const bool has_late = __any_sync(0xffffffff, late_block >= 0);
      warpgroup_fence_operand(tP);
      warpgroup_fence_operand(tDS);
      if (has_late) take_scores(buffer ^ 1);
      write_scores();
      float grids[2];
      read_grids(grids);
      // Also for a tile's first step, and dropped then: products are issued on one path.
      issue_dquery(shared.exchange.dscores[buffer ^ 1], tDQ);
      issue_dvalue();
      issue_dkey();
      wait_mma<2>(tDQ);
      give_scores(buffer);
      if (has_late) add_dquery(tDQ, late_block, late_grids);
      late_block = int(block);
      late_grids[0] = grids[0];
      late_grids[1] = grids[1];
    } else if constexpr (T::kFusedDQ) {
      auto tDQ = make_accumulator<typename T::MmaDQ, T::kColsDQ>();
      write_scores();
      give_scores(buffer);
      issue_dvalue();
      // dQ before what is left: adding it to memory takes longer than any of these GEMMs.
      take_scores(buffer);
      issue_dquery(dscores, tDQ);
      float grids[2];
      read_grids(grids);
      issue_dkey();
      wait_mma<1>(tDQ);
      add_dquery(tDQ, block, grids);
    } else {
      issue_dvalue();
      issue_dkey();
    }
    wait_mma<0>(tDK);
    warpgroup_fence_operand(tDV);
    release(shared.dout_ring, cursor);
    release(shared.query_ring, cursor);
    cursor.advance();
    buffer ^= 1;
  }

  // Behind a tile's last step.
  CUTE_DEVICE void finish_dquery() {
    auto tDQ = make_accumulator<typename T::MmaDQ, T::kColsDQ>();
    take_scores(buffer ^ 1);
    issue_dquery(shared.exchange.dscores[buffer ^ 1], tDQ);
    wait_mma<0>(tDQ);
    add_dquery(tDQ, late_block, late_grids);
    late_block = -1;
  }

  template <class AccumulatorDQ>
  CUTE_DEVICE void issue_dquery(Element* dscores, AccumulatorDQ& tDQ) const {
    typename T::MmaDQ mma_dq;
    issue_mma<Accumulate::kOverwrite>(
        mma_dq,
        operand_a(mma_dq, T::PTile::template transposed_cols<kWarpgroupRows>(
                              dscores, T::kSplitRowsDQ ? warpgroup * kWarpgroupRows : 0)),
        operand_b(mma_dq, T::KTile::template transposed_cols<T::kColsDQ>(
                              shared.key, warpgroup * T::kFirstColDQ)),
        tDQ);
  }

  // Of this thread's rows of dQ, in the step at hand. Before the step's last product is issued: one
  // thread gives the stage back when that is done, and all warps must have read it by then.
  CUTE_DEVICE void read_grids(float (&grids)[2]) const {
    if (!T::kTakesGrid || !p.has_grid) return;
    const int row = (T::kSplitRowsDQ ? warpgroup * kWarpgroupRows : 0) + thread_row();
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) grids[r] = shared.statistics[cursor.stage][row + 8 * r].grid();
  }

  // Adds to the workspace in fragment order: a warp writes 512 contiguous bytes at a time.
  template <class AccumulatorDQ>
  CUTE_DEVICE void add_dquery(AccumulatorDQ& tDQ, std::int64_t block,
                              const float (&grids)[2]) const {
    if (T::kTakesGrid && p.has_grid) round_to_grid(tDQ, grids);
    constexpr int kFloats = decltype(cute::size(tDQ))::value;
    float* const base = p.dquery + block * T::kBlockFloatsDQ +
                        warpgroup * kFloats * kWarpgroupThreads +
                        threadIdx.x % kWarpgroupThreads * 4;
    const int skipped = warpgroup == 1 ? T::kSkippedDQ : 0;
    CUTE_UNROLL
    for (int i = 0; i < kFloats; i += 4) {
      if (i < skipped) continue;
      reduce_add(base + (i - skipped) * kWarpgroupThreads, tDQ(i), tDQ(i + 1), tDQ(i + 2),
                 tDQ(i + 3));
    }
  }

  // One's dS for the other's dQ. A barrier for each buffer: one may give the next step's before the
  // other has taken this one's, and two arrivals at one barrier would complete it.
  CUTE_DEVICE void give_scores(int buffer) const {
    NamedBarrier::arrive(T::kConsumerThreads, T::kScores + 2 * buffer + warpgroup);
  }
  CUTE_DEVICE void take_scores(int buffer) const {
    NamedBarrier::sync(T::kConsumerThreads, T::kScores + 2 * buffer + (1 - warpgroup));
  }
};

}  // namespace jax_fa3
