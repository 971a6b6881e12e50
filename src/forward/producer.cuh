// The forward producer: one thread that walks the CTA's work tiles and keeps the Q, K and V
// rings filled. It runs ahead of the consumers across tiles, so the next tile's loads are under
// way during the epilogue.
#pragma once

#include "attention/mask.h"
#include "forward/traits.cuh"

namespace jax_fa3 {

template <class T>
CUTE_DEVICE void produce(const ForwardParams& p, typename T::SharedStorage& shared) {
  RingCursor<1> query_cursor;
  typename T::Cursor key_cursor, value_cursor;

  for (int round = 0, index; (index = p.scheduler.index(round)) >= 0; ++round) {
    const WorkTile tile = p.scheduler.tile(index);
    const Mask mask = make_mask(p.mask, p.index, tile.batch, p.seqlen_q, p.seqlen_k);
    const int row = tile.block * T::kBlockM;
    const int head_kv = tile.head / p.heads_per_kv_head;
    const TileRange keys = mask.key_tiles(row, row + T::kBlockM, T::kBlockN);

    const auto load_k = [&](int n) {
      auto& barrier = acquire(shared.key_ring, key_cursor, T::KTile::kBytes);
      load_tile<typename T::KTile>(p.key, barrier, kEvictLast, shared.key[key_cursor.stage],
                                   n * T::kBlockN, head_kv, tile.batch);
      key_cursor.advance();
    };
    const auto load_v = [&](int n) {
      auto& barrier = acquire(shared.value_ring, value_cursor, T::VTile::kBytes);
      load_tile<typename T::VTile>(p.value, barrier, kEvictLast, shared.value[value_cursor.stage],
                                   n * T::kBlockN, head_kv, tile.batch);
      value_cursor.advance();
    };

    auto& barrier = acquire(shared.query_ring, query_cursor, T::QTile::kBytes);
    load_tile<typename T::QTile>(p.query, barrier, kEvictFirst, shared.query, row, tile.head,
                                 tile.batch);
    query_cursor.advance();

    if (keys.empty()) continue;
    // In the order of use: a K tile is needed one step ahead of its V tile.
    load_k(keys.end - 1);
    for (int n = keys.end - 2; n >= keys.begin; --n) {
      load_k(n);
      load_v(n + 1);
    }
    load_v(keys.begin);
  }
}

}  // namespace jax_fa3
