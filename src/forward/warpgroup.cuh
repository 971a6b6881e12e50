// What a consumer warpgroup does around its attention: it takes the work tiles one after another,
// keeps the order of turns, passes over key tiles that its rows do not see, and stores the result.
//
// A consumer derives from this (CRTP) and adds, for the 64 rows of one tile,
//   attend(tO, softmax, tile, mask, keys, row)    O, the softmax's maxima and sums
//   finish(tO, softmax, tile, exists, lse)        O and LSE final; rows that do not exist: 0, -inf
//   write_output(tO, sO)                          rounded into shared memory
#pragma once

#include "forward/traits.cuh"

namespace jax_fa3 {

template <class T, class Consumer>
struct ForwardWarpgroup {
  using NamedBarrier = cutlass::arch::NamedBarrier;

  const typename T::Params& p;
  typename T::SharedStorage& shared;
  const int warpgroup;  // 0 .. kConsumers - 1

  RingCursor<1> query_cursor;
  TileNumbers::Cursor tiles_cursor;
  typename T::Cursor key_cursor, value_cursor;

  // Ping-pong: the warpgroups issue their GEMMs one after another, so that one's softmax falls
  // under another's GEMMs.
  CUTE_DEVICE void take_turn() const {
    NamedBarrier::sync(2 * kWarpgroupThreads, T::kOrder + warpgroup);
  }
  CUTE_DEVICE void pass_turn() const {
    NamedBarrier::arrive(2 * kWarpgroupThreads, T::kOrder + (warpgroup + 1) % T::kConsumers);
  }

  CUTE_DEVICE void sync_warpgroup() const {
    NamedBarrier::sync(kWarpgroupThreads, T::kOutput + warpgroup);
  }

  // Passes over key tiles that other warpgroups' rows see and none of this one's does. A warpgroup
  // has a turn for each loaded tile but one, whether it uses the tile or not.
  CUTE_DEVICE void skip(int tiles, int turns) {
    for (int i = 0; i < tiles; ++i) {
      if (i < turns) {
        take_turn();
        pass_turn();
      }
      wait_full(shared.key_ring, key_cursor);
      release(shared.key_ring, key_cursor);
      key_cursor.advance();
      wait_full(shared.value_ring, value_cursor);
      release(shared.value_ring, value_cursor);
      value_cursor.advance();
    }
  }

  CUTE_DEVICE void run() {
    Consumer& consumer = static_cast<Consumer&>(*this);
    if (warpgroup == T::kConsumers - 1) pass_turn();  // the first turn is warpgroup 0's
    for (int index; (index = shared.tiles.read(tiles_cursor)) < p.scheduler.num_tiles;) {
      const WorkTile tile = p.scheduler.tile(index);
      const Mask mask = make_mask(p.mask, p.index, tile.batch, p.seqlen_q, p.seqlen_k);
      const int block_row = tile.block * T::kBlockM;
      const int row = block_row + warpgroup * kWarpgroupRows;
      // What the producer loads, and what of it this warpgroup's rows see.
      const TileRange loaded = mask.key_tiles(block_row, block_row + T::kBlockM, T::kBlockN);
      const TileRange keys = mask.key_tiles(row, row + kWarpgroupRows, T::kBlockN);

      auto tO = make_accumulator<typename T::MmaO, T::kHeadDimV>();
      cute::clear(tO);
      typename T::Softmax softmax;
      wait_full(shared.query_ring[warpgroup], query_cursor);
      if (!keys.empty()) {
        skip(loaded.end - keys.end, loaded.end - keys.end);
        consumer.attend(tO, softmax, tile, mask, keys, row);
        skip(keys.begin - loaded.begin, keys.begin - loaded.begin);
      } else {
        if constexpr (T::kOwnOutput) release(shared.query_ring[warpgroup], query_cursor);
        skip(loaded.end - loaded.begin, loaded.end - loaded.begin - 1);
      }
      const int first_row = row + thread_row();
      const bool exists[2] = {first_row < mask.query_length, first_row + 8 < mask.query_length};
      float lse[2];
      consumer.finish(tO, softmax, tile, exists, lse);
      store_lse(lse, tile, first_row);
      store_output(tO, tile, row);
      if constexpr (!T::kOwnOutput) {
        cute::tma_store_wait<0>();
        release(shared.query_ring[warpgroup], query_cursor);
      }
      query_cursor.advance();
      // Not before the barriers of store_output: by then every warp has read the number.
      release(shared.tiles.ring, tiles_cursor);
      tiles_cursor.advance();
    }
    cute::tma_store_wait<0>();  // shared memory must outlive the last store
  }

  CUTE_DEVICE void store_lse(const float (&lse)[2], const WorkTile& tile, int first_row) const {
    float* row_lse =
        p.lse + (std::int64_t(tile.batch) * p.scheduler.num_heads + tile.head) * p.seqlen_q;
    CUTE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + 8 * r;
      if (threadIdx.x % 4 == 0 && row < p.seqlen_q) row_lse[row] = lse[r];
    }
  }

  // Registers to shared memory to global memory, this warpgroup's 64 rows. One thread stores, and
  // before anyone writes the buffer again it waits until the previous store has read it.
  template <class AccumulatorO>
  CUTE_DEVICE void store_output(const AccumulatorO& tO, const WorkTile& tile, int row) {
    const bool leader = threadIdx.x % kWarpgroupThreads == 0;
    if constexpr (T::kOwnOutput) {
      if (leader) cute::tma_store_wait<0>();
      sync_warpgroup();
    }
    static_cast<Consumer&>(*this).write_output(tO, T::OTile::row_block(shared.output(), warpgroup));
    cutlass::arch::fence_view_async_shared();
    sync_warpgroup();
    if (leader) {
      if (row < p.seqlen_q) {
        store_tile<typename T::OTile>(p.out, shared.output(), warpgroup * kWarpgroupRows, row,
                                      tile.head, tile.batch);
      }
      cute::tma_store_arrive();
    }
  }
};

}  // namespace jax_fa3
