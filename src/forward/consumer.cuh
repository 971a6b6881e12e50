// One consumer warpgroup's share of the work tiles: 64 query rows of each against all their keys.
//
//   for all key tiles of all work tiles, right to left:
//     in turn with the other warpgroups: issue S = Q K(n)^T, then O += P V of the key tile before
//     while O and the other warpgroups' GEMMs run: mask and exponentiate S
//     when O has arrived: if it was its work tile's last, store it and start a new one;
//       else rescale it if a row maximum has outgrown its reference;  P = S
//
// So the pipeline runs through from one work tile into the next, where shared memory holds two Q.
#pragma once

#include "attention/softmax.cuh"
#include "forward/traits.cuh"

namespace jax_fa3 {

template <class T>
struct ForwardConsumer {
  using NamedBarrier = cutlass::arch::NamedBarrier;

  // What is left to know of a work tile whose last O += P V has not been issued yet.
  struct Unfinished {
    WorkTile tile;
    int row;
    int query_length;
    int query_stage;
  };

  const ForwardParams& p;
  typename T::SharedStorage& shared;
  const int warpgroup;  // 0 .. kConsumers - 1

  TileNumbers::Cursor tiles_cursor;
  typename T::QueryCursor query_cursor;
  typename T::Cursor key_cursor, value_cursor;
  int skipped_values = 0;  // V tiles to pass over once the V before them has been used
  int stored_stage = -1;   // of Q: it holds an O that is being stored

  // Ping-pong: the warpgroups issue their GEMMs one after another, so that one's softmax falls
  // under another's GEMMs. Each has a turn for each key tile that is loaded.
  CUTE_DEVICE void take_turn() const {
    NamedBarrier::sync(2 * kWarpgroupThreads, T::kOrder + warpgroup);
  }
  CUTE_DEVICE void pass_turn() const {
    NamedBarrier::arrive(2 * kWarpgroupThreads, T::kOrder + (warpgroup + 1) % T::kConsumers);
  }

  CUTE_DEVICE void release_key() {
    release(shared.key_ring, key_cursor);
    key_cursor.advance();
  }
  // The V just used, and those after it that this warpgroup's rows do not see.
  CUTE_DEVICE void release_value() {
    release(shared.value_ring, value_cursor);
    value_cursor.advance();
    pass_over_values();
  }
  CUTE_DEVICE void pass_over_values() {
    for (; skipped_values > 0; --skipped_values) {
      wait_full(shared.value_ring, value_cursor);
      release(shared.value_ring, value_cursor);
      value_cursor.advance();
    }
  }

  // Passes over key tiles that other warpgroups' rows see and none of this one's does, with nothing
  // pending. Each one's V comes after the next one's K, and must not be held for longer: the other
  // warpgroups need its stage.
  CUTE_DEVICE void pass_over_key() {
    wait_full(shared.key_ring, key_cursor);
    release_key();
    pass_over_values();
    ++skipped_values;
  }
  CUTE_DEVICE void pass_over(int tiles) {
    for (; tiles > 0; --tiles) {
      take_turn();
      pass_turn();
      pass_over_key();
    }
  }

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
    NamedBarrier::sync(kWarpgroupThreads, T::kOutput + warpgroup);
  }

  CUTE_DEVICE void run() {
    using namespace cute;
    typename T::MmaS mma_s;
    typename T::MmaO mma_o;
    auto tP = make_operand_a<typename T::Element, T::kBlockN>();
    auto tO = make_accumulator<typename T::MmaO, T::kHeadDimV>();
    clear(tO);
    OnlineSoftmax softmax;
    const float scale_log2 = p.softmax_scale_log2;
    Unfinished unfinished{};
    bool pending = false;  // P of `unfinished` waits for its V

    const auto issue_scores = [&](auto& tS) {
      wait_full(shared.key_ring, key_cursor);
      const auto tSrQ =
          operand_a(mma_s, T::QTile::row_block(shared.query[query_cursor.stage], warpgroup));
      const auto sK = T::KTile::tensor(shared.key[key_cursor.stage]);
      issue_mma<Accumulate::kOverwrite>(mma_s, tSrQ, operand_b(mma_s, sK), tS);
    };
    const auto issue_output = [&] {
      wait_full(shared.value_ring, value_cursor);
      const auto sVt = T::VTile::transposed(shared.value[value_cursor.stage]);
      issue_mma<Accumulate::kAdd>(mma_o, tP, operand_b(mma_o, sVt), tO);
    };
    const auto finish = [&](OnlineSoftmax& softmax) {
      store(tO, softmax, unfinished);
      clear(tO);
    };
    // Ends the pending work tile, if it may in the turn of a key tile that is passed over.
    const auto drain = [&](bool passes) {
      if (passes) take_turn();
      issue_output();
      if (passes) pass_turn();
      wait_mma<0>(tO);
      release_value();
      if (passes) pass_over_key();
      finish(softmax);
      pending = false;
      return int(passes);
    };

    if (warpgroup == T::kConsumers - 1) pass_turn();  // the first turn is warpgroup 0's
    for (int index; (index = shared.tiles.read(tiles_cursor)) < p.scheduler.num_tiles;) {
      const WorkTile tile = p.scheduler.tile(index);
      const Mask mask = make_mask(p.mask, p.index, tile.batch, p.seqlen_q, p.seqlen_k);
      const int block_row = tile.block * T::kBlockM;
      const int row = block_row + warpgroup * kWarpgroupRows;
      // What the producer loads, and what of it this warpgroup's rows see.
      const TileRange loaded = mask.key_tiles(block_row, block_row + T::kBlockM, T::kBlockN);
      const TileRange keys = mask.key_tiles(row, row + kWarpgroupRows, T::kBlockN);
      const Unfinished current{tile, row, mask.query_length, query_cursor.stage};

      int passed = keys.empty() ? loaded.end - loaded.begin : loaded.end - keys.end;
      if (pending && (keys.empty() || passed > 0)) passed -= drain(passed > 0);
      pass_over(passed);
      wait_full(shared.query_ring[warpgroup], query_cursor);
      if (keys.empty()) {
        pass_over_values();
        unfinished = current;
        softmax = OnlineSoftmax{};
        finish(softmax);
      } else {
        int n = keys.end - 1;
        if (!pending) {  // nothing to overlap with
          auto tS = make_accumulator<typename T::MmaS, T::kBlockN>();
          take_turn();
          issue_scores(tS);
          pass_turn();
          wait_mma<0>(tS);
          release_key();
          pass_over_values();
          if (keys.cuts(n)) mask_scores(tS, mask, row, n * T::kBlockN);
          softmax = OnlineSoftmax{};
          softmax.update(tS, scale_log2, p.rescale_threshold);  // O is zero: no rescale
          convert(tS, tP);
          clear_value_tail(mask, n);
          --n;
        }
        CUTE_NO_UNROLL
        for (; n >= keys.begin; --n) {
          const bool begins = T::kOverlapTiles && n == keys.end - 1;
          if (!begins) release_stored();
          auto tS = make_accumulator<typename T::MmaS, T::kBlockN>();
          take_turn();
          issue_scores(tS);
          issue_output();
          pass_turn();
          wait_mma<1>(tS);
          release_key();
          // A vote, because O is in flight: only a branch known to be uniform leaves it alone.
          if (__any_sync(0xffffffff, keys.cuts(n))) mask_scores(tS, mask, row, n * T::kBlockN);
          OnlineSoftmax last = softmax;
          if constexpr (T::kOverlapTiles) softmax.reset_if(begins);
          const bool rescale = softmax.update(tS, scale_log2, p.rescale_threshold);
          wait_mma<0>(tO);
          release_value();
          convert(tS, tP);
          if (begins) {
            finish(last);
            clear_value_tail(mask, n);
          } else if (rescale) {
            softmax.rescale(tO);
          }
        }
        unfinished = current;
        pending = true;
        passed = keys.begin - loaded.begin;
        if (!T::kOverlapTiles || passed > 0) passed -= drain(passed > 0);
        pass_over(passed);
      }
      release_stored();
      query_cursor.advance();
      // There have been barriers of the warpgroup since every warp read the number.
      release(shared.tiles.ring, tiles_cursor);
      tiles_cursor.advance();
    }
    if (pending) drain(false);
    tma_store_wait<0>();  // shared memory must outlive the last store
  }

  // Gives Q's buffer back when the O in it has been read.
  CUTE_DEVICE void release_stored() {
    if (stored_stage < 0) return;
    if (threadIdx.x % kWarpgroupThreads == 0) {
      cute::tma_store_wait<0>();
      shared.query_ring[warpgroup].empty[stored_stage].arrive();
    }
    stored_stage = -1;
  }

  // O and LSE of a work tile: registers to shared memory, where its Q was, to global memory.
  template <class AccumulatorO>
  CUTE_DEVICE void store(AccumulatorO& tO, OnlineSoftmax& softmax, const Unfinished& work) {
    using namespace cute;
    const int first_row = work.row + thread_row();
    const bool exists[2] = {first_row < work.query_length, first_row + 8 < work.query_length};
    float lse[2];
    softmax.finish(tO, p.softmax_scale, exists, lse);
    float* row_lse =
        p.lse +
        (std::int64_t(work.tile.batch) * p.scheduler.num_heads + work.tile.head) * p.seqlen_q;
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + 8 * r;
      if (threadIdx.x % 4 == 0 && row < p.seqlen_q) row_lse[row] = lse[r];
    }

    release_stored();
    auto* const buffer = shared.query[work.query_stage];
    store_accumulator<typename T::MmaO>(tO, T::OTile::row_block(buffer, warpgroup));
    cutlass::arch::fence_view_async_shared();
    NamedBarrier::sync(kWarpgroupThreads, T::kOutput + warpgroup);
    if (threadIdx.x % kWarpgroupThreads == 0) {
      if (work.row < p.seqlen_q) {
        store_tile<typename T::OTile>(p.out, buffer, warpgroup * kWarpgroupRows, work.row,
                                      work.tile.head, work.tile.batch);
      }
      tma_store_arrive();
    }
    stored_stage = work.query_stage;
  }
};

}  // namespace jax_fa3
