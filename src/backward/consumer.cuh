// One of two consumer warpgroups' share of a work tile: a block of keys against all the queries
// that see it, dK and dV in registers throughout (GQA: over all query heads of the group).
//
//   for each query block:
//     issue S^T = K Q^T, dP^T = V dO^T
//     P^T = exp2(S^T - LSE);  dS^T = P^T (dP^T - delta)         delta = rowsum(dO O) - dLSE
//     publish dS^T;  meet the other warpgroup
//     issue dV += P^T dO, dQ = dS K, dK += dS^T Q
//     while dK runs: add dQ to the float32 workspace
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
  const WorkTile tile;
  const Mask mask;
  const TileRange queries;

  typename T::Cursor cursor;
  int dscores_buffer = 0;

  CUTE_DEVICE void meet() const { NamedBarrier::sync(T::kConsumerThreads, T::kConsumersMeet); }
  CUTE_DEVICE void sync_warpgroup() const {
    NamedBarrier::sync(kWarpgroupThreads, T::kWarpgroup + warpgroup);
  }

  // Rows past a sequence's length may hold anything, NaN included, and a probability of zero does
  // not stop NaN: they are cleared before a GEMM reads them.
  CUTE_DEVICE void clear_key_tail() const {
    const int valid = max(mask.key_length - tile.block * T::kBlockN, 0);
    if (mask.key_length == p.seqlen_k || valid >= T::kBlockN) return;
    const int thread = threadIdx.x - kWarpgroupThreads;
    T::KTile::zero_rows_from(shared.key, valid, thread, T::kConsumerThreads);
    T::VTile::zero_rows_from(shared.value, valid, thread, T::kConsumerThreads);
    cutlass::arch::fence_view_async_shared();
    meet();
  }
  // Each warpgroup clears for itself; both write the same zeros.
  CUTE_DEVICE void clear_query_tail(int m) const {
    const int valid = mask.query_length - m * T::kBlockM;
    if (mask.query_length == p.seqlen_q || valid >= T::kBlockM) return;
    wait_full(shared.dout_ring, cursor);
    const int thread = threadIdx.x % kWarpgroupThreads;
    T::QTile::zero_rows_from(shared.query[cursor.stage], valid, thread, kWarpgroupThreads);
    T::DOTile::zero_rows_from(shared.dout[cursor.stage], valid, thread, kWarpgroupThreads);
    cutlass::arch::fence_view_async_shared();
    sync_warpgroup();
  }

  // Calls f(i, statistic of the query of accumulator element i), two columns to a load.
  template <class F>
  CUTE_DEVICE void for_each_query(const float* statistics, F f) const {
    const int first = (T::kSplitKeys ? 0 : warpgroup * T::kQueries) + thread_col();
    CUTE_UNROLL
    for (int group = 0; group < T::kQueries / 8; ++group) {
      const float2 pair = *reinterpret_cast<const float2*>(statistics + first + 8 * group);
      f(4 * group + 0, pair.x);
      f(4 * group + 1, pair.y);
      f(4 * group + 2, pair.x);
      f(4 * group + 3, pair.y);
    }
  }

  // One step. `dquery` is this query block's part of the workspace.
  template <class AccumulatorDK, class AccumulatorDV>
  CUTE_DEVICE void step(AccumulatorDK& tDK, AccumulatorDV& tDV, int m, float* dquery,
                        int* semaphore) {
    using namespace cute;
    typename T::MmaS mma_s;
    typename T::MmaDV mma_dv;
    typename T::MmaDK mma_dk;
    typename T::MmaDQ mma_dq;
    Element* const query = shared.query[cursor.stage];
    Element* const dout = shared.dout[cursor.stage];
    Element* const dscores = shared.dscores[dscores_buffer];
    Element* const probabilities = shared.probabilities[T::kSplitKeys ? 0 : dscores_buffer];
    const int key_block = T::kSplitKeys ? warpgroup : 0;    // of 64 keys
    const int query_block = T::kSplitKeys ? 0 : warpgroup;  // of kQueries queries

    auto tS = make_accumulator<typename T::MmaS, T::kQueries>();
    auto tDP = make_accumulator<typename T::MmaS, T::kQueries>();
    wait_full(shared.query_ring, cursor);
    clear_query_tail(m);
    issue_mma<Accumulate::kOverwrite>(
        mma_s, operand_a(mma_s, T::KTile::row_block(shared.key, key_block)),
        operand_b(mma_s, T::QTile::template row_block<T::kQueries>(query, query_block)), tS);
    wait_full(shared.dout_ring, cursor);
    issue_mma<Accumulate::kOverwrite>(
        mma_s, operand_a(mma_s, T::VTile::row_block(shared.value, key_block)),
        operand_b(mma_s, T::DOTile::template row_block<T::kQueries>(dout, query_block)), tDP);

    wait_mma<1>(tS);
    // A vote, because dP is in flight: only a branch known to be uniform leaves it alone.
    if (__any_sync(0xffffffff, queries.cuts(m))) {
      mask_scores_transposed(tS, mask, m * T::kBlockM + query_block * T::kQueries,
                             tile.block * T::kBlockN + key_block * kWarpgroupRows);
    }
    for_each_query(shared.lse_log2[cursor.stage], [&](int i, float lse_log2) {
      tS(i) = exp2_approx(fmaf(tS(i), p.softmax_scale_log2, -lse_log2));
    });
    wait_mma<0>(tDP);
    for_each_query(shared.delta[cursor.stage],
                   [&](int i, float delta) { tDP(i) = tS(i) * (tDP(i) - delta); });
    // Only now, when dP no longer needs float32 P: at head dim 64 both fill 128 registers.
    auto tP = make_operand_a<Element, T::kQueries>();
    auto tDS = make_operand_a<Element, T::kQueries>();
    convert(tS, tP);
    convert(tDP, tDS);
    if constexpr (T::kSplitKeys) {
      store_rounded<typename T::MmaS>(tDS, T::PTile::row_block(dscores, warpgroup));
    } else {
      store_rounded<typename T::MmaS>(
          tP, T::PTile::template col_block<T::kQueries>(probabilities, warpgroup));
      store_rounded<typename T::MmaS>(
          tDS, T::PTile::template col_block<T::kQueries>(dscores, warpgroup));
    }
    cutlass::arch::fence_view_async_shared();

    const auto sdO = T::DOTile::template transposed_cols<T::kColsV>(
        dout, T::kSplitKeys ? 0 : warpgroup * T::kColsV);
    const auto sQ = T::QTile::template transposed_cols<T::kColsK>(
        query, T::kSplitKeys ? 0 : warpgroup * T::kColsK);
    if constexpr (T::kSplitKeys) {
      issue_mma<Accumulate::kAdd>(mma_dv, tP, operand_b(mma_dv, sdO), tDV);
      meet();
    } else {
      meet();
      issue_mma<Accumulate::kAdd>(mma_dv, operand_a(mma_dv, T::PTile::tensor(probabilities)),
                                  operand_b(mma_dv, sdO), tDV);
    }
    auto tDQ = make_accumulator<typename T::MmaDQ, T::kColsDQ>();
    issue_mma<Accumulate::kOverwrite>(
        mma_dq,
        operand_a(mma_dq, T::PTile::template transposed_cols<kWarpgroupRows>(
                              dscores, T::kSplitRowsDQ ? warpgroup * kWarpgroupRows : 0)),
        operand_b(mma_dq, T::KTile::template transposed_cols<T::kColsDQ>(
                              shared.key, warpgroup * T::kFirstColDQ)),
        tDQ);
    if constexpr (T::kSplitKeys) {
      issue_mma<Accumulate::kAdd>(mma_dk, tDS, operand_b(mma_dk, sQ), tDK);
    } else {
      issue_mma<Accumulate::kAdd>(mma_dk, operand_a(mma_dk, T::PTile::tensor(dscores)),
                                  operand_b(mma_dk, sQ), tDK);
    }
    wait_mma<1>(tDQ);
    release(shared.dout_ring, cursor);
    add_dquery(tDQ, m, dquery, semaphore);
    wait_mma<0>(tDK);
    warpgroup_fence_operand(tDV);
    release(shared.query_ring, cursor);
    cursor.advance();
    dscores_buffer ^= 1;
  }

  // Adds to the workspace in fragment order: a warp writes 512 contiguous bytes at a time.
  template <class AccumulatorDQ>
  CUTE_DEVICE void add_dquery(const AccumulatorDQ& tDQ, int m, float* dquery,
                              int* semaphore) const {
    const int thread = threadIdx.x % kWarpgroupThreads;
    constexpr int kFloats = decltype(cute::size(tDQ))::value;
    // Deterministic: key blocks add in ascending order; the first one that sees this query block
    // is number 0.
    const int row = m * T::kBlockM;
    const int turn = T::kDeterministic
                         ? tile.block - mask.key_tiles(row, row + T::kBlockM, T::kBlockN).begin
                         : 0;
    if constexpr (T::kDeterministic) {
      if (thread == 0) {
        while (load_acquire(semaphore + warpgroup) != turn) {
        }
      }
      sync_warpgroup();
    }
    float* const base = dquery + warpgroup * kFloats * kWarpgroupThreads + thread * 4;
    const int skipped = warpgroup == 1 ? T::kSkippedDQ : 0;
    CUTE_UNROLL
    for (int i = 0; i < kFloats; i += 4) {
      if (i < skipped) continue;
      reduce_add(base + (i - skipped) * kWarpgroupThreads, tDQ(i), tDQ(i + 1), tDQ(i + 2),
                 tDQ(i + 3));
    }
    if constexpr (T::kDeterministic) {
      __threadfence();
      sync_warpgroup();
      if (thread == 0) store_release(semaphore + warpgroup, turn + 1);
    }
  }

  CUTE_DEVICE void run() {
    using namespace cute;
    auto tDK = make_accumulator<typename T::MmaDK, T::kColsK>();
    auto tDV = make_accumulator<typename T::MmaDV, T::kColsV>();
    clear(tDK);
    clear(tDV);
    if (!queries.empty()) {
      shared.key_value_full.wait(0);
      clear_key_tail();
    }
    for (QueryWalk walk(p, tile, queries); walk.more(); walk.next()) {
      step(tDK, tDV, walk.m, p.dquery + walk.block() * T::kBlockFloatsDQ,
           p.semaphore + walk.block() * T::kConsumers);
    }
    CUTE_UNROLL
    for (int i = 0; i < size(tDK); ++i) tDK(i) *= p.softmax_scale;
    meet();  // nobody reads K or V any more
    store_block<typename T::MmaDV, typename T::VTile, T::kColsV>(tDV, shared.value, p.dvalue);
    store_block<typename T::MmaDK, typename T::KTile, T::kColsK>(tDK, shared.key, p.dkey);
  }

  // Registers to shared memory to global memory; both warpgroups' parts in one TMA store.
  template <class Mma, class Tile, int kCols, class Accumulator>
  CUTE_DEVICE void store_block(const Accumulator& tC, Element* smem, const CUtensorMap& map) const {
    if constexpr (T::kSplitKeys) {
      store_accumulator<Mma>(tC, Tile::row_block(smem, warpgroup));
    } else {
      store_accumulator<Mma>(tC, Tile::template col_block<kCols>(smem, warpgroup));
    }
    cutlass::arch::fence_view_async_shared();
    meet();
    if (warpgroup == 0 && threadIdx.x % kWarpgroupThreads == 0) {
      store_tile<Tile>(map, smem, 0, tile.block * T::kBlockN, tile.head, tile.batch);
      cute::tma_store_arrive();
      cute::tma_store_wait<0>();
    }
  }
};

}  // namespace jax_fa3
