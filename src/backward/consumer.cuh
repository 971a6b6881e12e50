// One of two consumer warpgroups' share of a work tile: a block of keys against all the queries
// that see it, dK and dV in registers throughout (GQA: over all query heads of the group).
//
//   for each query block:
//     issue S^T = K Q^T - LSE / scale, dP^T = V dO^T - delta    delta = rowsum(dO O) - dLSE
//     P^T = exp(scale S^T);  dS^T = P^T dP^T
//     issue dV += P^T dO;  publish dS^T;  meet the other warpgroup
//     issue dQ = dS K, dK += dS^T Q
//     while dK runs: add dQ to the float32 workspace; wait for the next Q
//
// Without fused dQ the warpgroups share nothing where each has keys of its own: no publishing, no
// meeting. Where they share a block of keys, both still need all of P and dS.
#pragma once

#include "backward/traits.cuh"
#include "device/reduce.cuh"

namespace jax_fa3 {

template <class T>
struct BackwardConsumer {
  using Element = typename T::Element;
  using NamedBarrier = cutlass::arch::NamedBarrier;

  const BackwardParams& p;
  typename T::SharedStorage& shared;
  const int warpgroup;  // 0 or 1

  TileNumbers::Cursor tiles_cursor;
  RingCursor<1> key_value_cursor;
  typename T::Cursor cursor;
  int dscores_buffer = 0;

  BackwardTile tile;  // the one at hand

  CUTE_DEVICE void meet() const { NamedBarrier::sync(T::kConsumerThreads, T::kConsumersMeet); }
  CUTE_DEVICE void sync_warpgroup() const {
    NamedBarrier::sync(kWarpgroupThreads, T::kWarpgroup + warpgroup);
  }

  // Rows past a sequence's length may hold anything, NaN included, and a probability of zero does
  // not stop NaN: they are cleared before a GEMM reads them.
  CUTE_DEVICE void clear_key_tail() const {
    const int valid = max(tile.mask.key_length - tile.at.block * T::kBlockN, 0);
    if (tile.mask.key_length == p.seqlen_k || valid >= T::kBlockN) return;
    const int thread = threadIdx.x - kWarpgroupThreads;
    T::KTile::zero_rows_from(shared.key, valid, thread, T::kConsumerThreads);
    T::VTile::zero_rows_from(shared.value, valid, thread, T::kConsumerThreads);
    cutlass::arch::fence_view_async_shared();
    meet();
  }
  // Each warpgroup clears for itself; both write the same zeros.
  CUTE_DEVICE void clear_query_tail(int m) const {
    const int valid = tile.mask.query_length - m * T::kBlockM;
    if (tile.mask.query_length == p.seqlen_q || valid >= T::kBlockM) return;
    wait_full(shared.dout_ring, cursor);
    const int thread = threadIdx.x % kWarpgroupThreads;
    T::QTile::zero_rows_from(shared.query[cursor.stage], valid, thread, kWarpgroupThreads);
    T::DOTile::zero_rows_from(shared.dout[cursor.stage], valid, thread, kWarpgroupThreads);
    cutlass::arch::fence_view_async_shared();
    sync_warpgroup();
  }

  // One step of the walk; its Q has arrived.
  template <class AccumulatorDK, class AccumulatorDV>
  CUTE_DEVICE void step(AccumulatorDK& tDK, AccumulatorDV& tDV, QueryWalk& walk) {
    using namespace cute;
    typename T::MmaS mma_s;
    typename T::Statistics::Mma mma_statistic;
    typename T::MmaDV mma_dv;
    typename T::MmaDK mma_dk;
    typename T::MmaDQ mma_dq;
    Element* const query = shared.query[cursor.stage];
    Element* const dout = shared.dout[cursor.stage];
    Element* const dscores = shared.dscores[dscores_buffer];
    Element* const probabilities = shared.probabilities[T::kSplitKeys ? 0 : dscores_buffer];
    const int key_block = T::kSplitKeys ? warpgroup : 0;    // of 64 keys
    const int query_block = T::kSplitKeys ? 0 : warpgroup;  // of kQueries queries

    const int first_query = query_block * T::kQueries;
    const auto statistics = operand_b(
        mma_statistic, T::Statistics::tensor(shared.statistics[cursor.stage] + first_query));

    auto tS = make_accumulator<typename T::MmaS, T::kQueries>();
    auto tDP = make_accumulator<typename T::MmaS, T::kQueries>();
    clear_query_tail(walk.m);
    issue_mma(mma_s, operand_a(mma_s, T::KTile::row_block(shared.key, key_block)),
              operand_b(mma_s, T::QTile::template row_block<T::kQueries>(query, query_block)),
              mma_statistic, T::Statistics::constant(Statistic::kLse), statistics, tS);
    wait_full(shared.dout_ring, cursor);
    issue_mma(mma_s, operand_a(mma_s, T::VTile::row_block(shared.value, key_block)),
              operand_b(mma_s, T::DOTile::template row_block<T::kQueries>(dout, query_block)),
              mma_statistic, T::Statistics::constant(Statistic::kDelta), statistics, tDP);

    wait_mma<1>(tS);
    // A vote, because dP is in flight: only a branch known to be uniform leaves it alone.
    if (__any_sync(0xffffffff, tile.queries.cuts(walk.m))) {
      mask_scores_transposed(tS, tile.mask, walk.m * T::kBlockM + first_query,
                             tile.at.block * T::kBlockN + key_block * kWarpgroupRows);
    }
    CUTE_UNROLL
    for (int i = 0; i < size(tS); ++i) tS(i) = exp2_approx(tS(i) * p.softmax_scale_log2);
    wait_mma<0>(tDP);
    CUTE_UNROLL
    for (int i = 0; i < size(tDP); ++i) tDP(i) *= tS(i);
    // Only now, when dP no longer needs float32 P: at head dim 64 both fill 128 registers.
    auto tP = make_operand_a<Element, T::kQueries>();
    auto tDS = make_operand_a<Element, T::kQueries>();
    convert(tS, tP);
    convert(tDP, tDS);
    if constexpr (T::kFusedDQ) {
      store_rounded<typename T::MmaS>(tDS, T::PTile::row_block(dscores, warpgroup));
    } else if constexpr (!T::kSplitKeys) {
      store_rounded<typename T::MmaS>(
          tP, T::PTile::template col_block<T::kQueries>(probabilities, warpgroup));
      store_rounded<typename T::MmaS>(
          tDS, T::PTile::template col_block<T::kQueries>(dscores, warpgroup));
    }
    if constexpr (T::kSharesScores) cutlass::arch::fence_view_async_shared();

    const auto tDOt = operand_b(mma_dv, T::DOTile::template transposed_cols<T::kColsV>(
                                            dout, T::kSplitKeys ? 0 : warpgroup * T::kColsV));
    const auto tQt = operand_b(mma_dk, T::QTile::template transposed_cols<T::kColsK>(
                                           query, T::kSplitKeys ? 0 : warpgroup * T::kColsK));
    if constexpr (T::kSplitKeys) issue_mma<Accumulate::kAdd>(mma_dv, tP, tDOt, tDV);
    if constexpr (T::kSharesScores) meet();
    // dQ before what is left: adding it to memory takes longer than any of these GEMMs.
    auto tDQ = make_accumulator<typename T::MmaDQ, T::kColsDQ>();
    if constexpr (T::kFusedDQ) {
      issue_mma<Accumulate::kOverwrite>(
          mma_dq,
          operand_a(mma_dq, T::PTile::template transposed_cols<kWarpgroupRows>(
                                dscores, T::kSplitRowsDQ ? warpgroup * kWarpgroupRows : 0)),
          operand_b(mma_dq, T::KTile::template transposed_cols<T::kColsDQ>(
                                shared.key, warpgroup * T::kFirstColDQ)),
          tDQ);
    }
    if constexpr (T::kSplitKeys) {
      issue_mma<Accumulate::kAdd>(mma_dk, tDS, tQt, tDK);
    } else {
      issue_mma<Accumulate::kAdd>(mma_dv, operand_a(mma_dv, T::PTile::tensor(probabilities)), tDOt,
                                  tDV);
      issue_mma<Accumulate::kAdd>(mma_dk, operand_a(mma_dk, T::PTile::tensor(dscores)), tQt, tDK);
    }
    if constexpr (T::kFusedDQ) {
      wait_mma<1>(tDQ);
      add_dquery(tDQ, walk);
    }
    const auto done = cursor;
    cursor.advance();
    walk.next();
    if (walk.more()) wait_full(shared.query_ring, cursor);
    wait_mma<0>(tDK);
    warpgroup_fence_operand(tDV);
    release(shared.dout_ring, done);
    release(shared.query_ring, done);
    dscores_buffer ^= 1;
  }

  // Adds to the workspace in fragment order: a warp writes 512 contiguous bytes at a time.
  template <class AccumulatorDQ>
  CUTE_DEVICE void add_dquery(const AccumulatorDQ& tDQ, const QueryWalk& walk) const {
    constexpr int kFloats = decltype(cute::size(tDQ))::value;
    float* const base = p.dquery + walk.block() * T::kBlockFloatsDQ +
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

  CUTE_DEVICE void run() {
    using namespace cute;
    for (int index; (index = shared.tiles.read(tiles_cursor)) < p.scheduler.num_tiles;) {
      tile = BackwardTile::make<T>(p, index);
      auto tDK = make_accumulator<typename T::MmaDK, T::kColsK>();
      auto tDV = make_accumulator<typename T::MmaDV, T::kColsV>();
      clear(tDK);
      clear(tDV);
      QueryWalk walk = tile.walk(p);
      if (walk.more()) {
        wait_full(shared.query_ring, cursor);
        wait_full(shared.key_value_ring, key_value_cursor);
        clear_key_tail();
      }
      meet();  // the buffer of dS is free: both warpgroups' dK have left it
      while (walk.more()) step(tDK, tDV, walk);
      if (!tile.queries.empty()) {
        release(shared.key_value_ring, key_value_cursor);
        key_value_cursor.advance();
      }
      meet();  // nobody reads dS any more
      store_output<typename T::MmaDV, typename T::DVTile>(tDV, p.dvalue);
      CUTE_UNROLL
      for (int i = 0; i < size(tDK); ++i) tDK(i) = finite_or_nan(tDK(i)) * p.softmax_scale;
      store_output<typename T::MmaDK, typename T::DKTile>(tDK, p.dkey);
      release(shared.tiles.ring, tiles_cursor);
      tiles_cursor.advance();
    }
  }

  // Registers to shared memory to global memory, this warpgroup's part. On return its leader knows
  // that the buffer has been read.
  template <class Mma, class Tile, class Accumulator>
  CUTE_DEVICE void store_output(const Accumulator& tC, const CUtensorMap& map) const {
    Element* const buffer = shared.output[warpgroup];
    sync_warpgroup();
    store_accumulator<Mma>(tC, Tile::tensor(buffer));
    cutlass::arch::fence_view_async_shared();
    sync_warpgroup();
    if (threadIdx.x % kWarpgroupThreads == 0) {
      const int row = tile.at.block * T::kBlockN + (T::kSplitKeys ? warpgroup * kWarpgroupRows : 0);
      const int col = T::kSplitKeys ? 0 : warpgroup * Tile::kCols;
      if (row < p.seqlen_k) store_tile<Tile>(map, buffer, 0, row, tile.at.head, tile.at.batch, col);
      cute::tma_store_arrive();
      cute::tma_store_wait<0>();
    }
  }
};

}  // namespace jax_fa3
