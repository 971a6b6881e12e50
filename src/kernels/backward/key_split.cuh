// Head dims up to 128: a work tile of 128 keys, dK and dV of 64 of them in the registers of each of
// two consumer warpgroups.
//
//   for each query block:
//     issue S^T = K Q^T - LSE / scale, dP^T = V dO^T - delta    delta = rowsum(dO O) - dLSE
//     P^T = exp(scale S^T);  dS^T = P^T dP^T
//     publish dS^T;  issue dV += P^T dO;  wait for the other's dS^T
//     issue dQ = dS K, dK += dS^T Q
//     while dK runs: add dQ to the float32 workspace
//
// Without fused dQ the warpgroups share nothing: no publishing, no waiting for each other.
#pragma once

#include "device/reduce.cuh"
#include "kernels/backward/tile_consumer.cuh"

namespace jax_fa3 {

template <class T>
struct KeySplitConsumer : TileConsumer<T> {
  using Base = TileConsumer<T>;
  using Base::cursor, Base::p, Base::queries, Base::shared, Base::warpgroup;
  using typename Base::Element;
  using typename Base::NamedBarrier;

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
    typename T::MmaDQ mma_dq;
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
    Element* const dscores = shared.exchange.dscores[cursor.stage];
    if constexpr (T::kFusedDQ) {
      store_rounded<typename T::PTile>(tDS, dscores, warpgroup * kWarpgroupRows);
      cutlass::arch::fence_view_async_shared();
      give_scores(cursor.stage);
    }
    issue_mma<Accumulate::kAdd>(mma_dv, tP, operand_b(mma_dv, T::DOTile::transposed(dout)), tDV);
    // dQ before what is left: adding it to memory takes longer than any of these GEMMs.
    auto tDQ = make_accumulator<typename T::MmaDQ, T::kColsDQ>();
    if constexpr (T::kFusedDQ) {
      take_scores(cursor.stage);
      issue_mma<Accumulate::kOverwrite>(
          mma_dq,
          operand_a(mma_dq, T::PTile::template transposed_cols<kWarpgroupRows>(
                                dscores, T::kSplitRowsDQ ? warpgroup * kWarpgroupRows : 0)),
          operand_b(mma_dq, T::KTile::template transposed_cols<T::kColsDQ>(
                                shared.key, warpgroup * T::kFirstColDQ)),
          tDQ);
    }
    issue_mma<Accumulate::kAdd>(mma_dk, tDS, operand_b(mma_dk, T::QTile::transposed(query)), tDK);
    if constexpr (T::kFusedDQ) {
      wait_mma<1>(tDQ);
      add_dquery(tDQ, walk);
    }
    wait_mma<0>(tDK);
    warpgroup_fence_operand(tDV);
    release(shared.dout_ring, cursor);
    release(shared.query_ring, cursor);
    cursor.advance();
  }

  // Adds to the workspace in fragment order: a warp writes 512 contiguous bytes at a time.
  template <class AccumulatorDQ, class Walk>
  CUTE_DEVICE void add_dquery(const AccumulatorDQ& tDQ, const Walk& walk) const {
    constexpr int kFloats = decltype(cute::size(tDQ))::value;
    float* const base = p.dquery + p.query_block(walk.batch_head, walk.m) * T::kBlockFloatsDQ +
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
